"""eval.py: the scores against their definitions; an untouched model scores as before, a ruined one does not."""

import json
import subprocess
import sys
from types import SimpleNamespace

import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

import eval as evaluation
from doco import HERE


def test_clip_score_and_accuracy_by_hand():
    image = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    concept, rival = torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    torch.testing.assert_close(evaluation.clip_score(image, concept), torch.tensor([250 * 0.6, 0.0]))
    assert evaluation.clip_accuracy(image, concept, rival).tolist() == [0, 0]
    assert evaluation.clip_accuracy(image, rival, concept).tolist() == [100, 100]


def run(tmp_path, delta):
    save_file(delta, tmp_path / "delta.safetensors")
    command = [sys.executable, str(HERE / "eval.py"), "concept", "--before", str(HERE / "emoji/sd"), "--after", str(tmp_path),
               "--target", "panda", "--anchor", "bear", "--num-images", "3"]  # fmt: skip
    subprocess.run(command, check=True)
    return json.loads((tmp_path / "metrics.json").read_text())


def keys_and_values():
    state = StableDiffusionPipeline.from_pretrained(HERE / "emoji/sd").unet.state_dict()
    return {n: p.float().clone() for n, p in state.items() if "attn2.to_k" in n or "attn2.to_v" in n}


def test_untouched_model_scores_the_same(tmp_path):
    report = run(tmp_path, keys_and_values())
    assert report["before"] == report["after"] and report["before"].keys() == set(evaluation.KINDS)
    assert (tmp_path / "before_after.png").stat().st_size > 10_000


def test_model_without_keys_and_values_loses_everything(tmp_path):
    report = run(tmp_path, {n: torch.zeros_like(p) for n, p in keys_and_values().items()})
    for kind in ("target", "ood", "unrelated"):
        assert report["after"][kind]["CS"] < report["before"][kind]["CS"] - 20


# ---- one picture ------------------------------------------------------------------------------------------------

FACE = HERE / "emoji/creatures/twemoji-cowboy-hat-face.png"


def run_instance(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "pipeline")
    models = ["--before", str(HERE / "emoji/ddpm"), "--after", str(tmp_path)]
    command = [sys.executable, str(HERE / "eval.py"), "instance", *models, "--forget", str(FACE), "--num-images", "12"]
    subprocess.run(command, check=True)
    return json.loads((tmp_path / "metrics.json").read_text())


def test_untouched_ddpm_forgets_nothing(tmp_path):
    report = run_instance(tmp_path, DDPMPipeline.from_pretrained(HERE / "emoji/ddpm"))
    picture = report["pictures"][0]
    assert picture["before"] == picture["after"] > 0.6 and picture["between"] > 0.999
    assert report["ssim"] > 0.999 and abs(report["fid_pre"]) < 1e-2 and report["distance"] < 1e-5
    assert (tmp_path / "before_after.png").stat().st_size > 10_000


def test_ruined_ddpm_forgets_everything_and_keeps_nothing(tmp_path):
    pipe = DDPMPipeline.from_pretrained(HERE / "emoji/ddpm")
    for p in pipe.unet.conv_out.parameters():
        p.data.zero_()
    report = run_instance(tmp_path, pipe)
    assert report["pictures"][0]["after"] < 0.4 and report["ssim"] < 0.5 and report["fid_pre"] > 1 and report["distance"] > 0.1


def test_fid_agrees_with_the_formula():
    """Frechet distance of two Gaussians, with the trace of the matrix root from eigenvalues of symmetric matrices alone."""

    class Identity(torch.nn.Module):
        num_features = 5

        def forward(self, x):
            return x.flatten(1)

    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 5, 1, 1, generator=g), 0.5 + 1.5 * torch.randn(50, 5, 1, 1, generator=g)
    x, y = a.flatten(1).double(), b.flatten(1).double()
    values, vectors = torch.linalg.eigh(x.T.cov())
    root = vectors * values.sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ y.T.cov() @ root).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * cross
    assert abs(evaluation.fid(Identity(), a, b, "cpu") - expected) < 1e-3


def test_probe_of_a_perfect_flow_returns_the_picture():
    """An oracle that knows the clean latent, in place of a network: whatever the noise, the probe ends at the picture."""
    z = torch.randn(1, 4, 4, 4)
    oracle = lambda x, timestep: SimpleNamespace(sample=(x - z) / (timestep / 1000).view(-1, 1, 1, 1))  # noqa: E731
    torch.testing.assert_close(evaluation.denoise_flow(oracle, z, torch.randn(3, 4, 4, 4), {}), z.expand(3, -1, -1, -1))


def test_probe_of_flow_takes_its_steps():
    """A velocity that is the same everywhere carries the half-noised latent half a unit of time."""
    z, noise, v = torch.randn(3, 1, 4, 4, 4)
    constant = lambda x, timestep: SimpleNamespace(sample=v)  # noqa: E731
    torch.testing.assert_close(evaluation.denoise_flow(constant, z, noise, {}), (z + noise) / 2 - v / 2)
