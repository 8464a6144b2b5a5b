"""The rivals on tiny random models: their losses by hand, and that they do what they are known for."""

import torch
from diffusers import DDPMPipeline
from PIL import Image

from baselines import neggrad
from instance_unlearn import coefficients, per_picture, to_tensor


def test_neggrad_loss_by_hand():
    error_r, error_f = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert neggrad.loss_neggrad(error_r, error_f, 0.5) == -0.5  # (1 - 1.5 + 2 - 2.5) / 2
    assert neggrad.loss_neggrad(None, error_f, 0.5) == -4


def test_neggrad_raises_the_loss_of_its_picture(tiny_ddpm, photos, tmp_path):
    def loss(folder):
        pipe, x = DDPMPipeline.from_pretrained(folder), to_tensor(Image.open(photos / "a.png"))[None]
        t, g = torch.arange(50, 1000, 100), torch.Generator().manual_seed(0)
        eps = torch.randn(len(t), 3, 16, 16, generator=g)
        a, b = coefficients(t, pipe.scheduler.alphas_cumprod)
        with torch.no_grad():
            return per_picture(pipe.unet(a * x + b * eps, t).sample, eps).mean()

    common = ["--model", str(tiny_ddpm), "--forget", str(photos / "a.png"), "--remember", str(photos), "--lr", "1e-3"]
    before = loss(tiny_ddpm)
    for name, flags in (("both", []), ("ascent", ["--ascent"])):
        run = neggrad.unlearn(neggrad.parse_args([*common, *flags, "--out", str(tmp_path / name)]))
        assert loss(run / "pipeline") > 1.2 * before
