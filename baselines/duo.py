"""DUO, direct unlearning optimization: the model learns to prefer a surrogate to the forget image.

Paper: "Direct Unlearning Optimization for Robust and Safe Text-to-Image Models", Park et al.,
NeurIPS 2024. Preference optimization on the pair of an image to unlearn x^f and an edited copy, the
surrogate x^s, that also holds the model to the original M0. For a DDPM here.

    1. L(x)  = |eps - M(x_t, t)|^2,  L0(x) the same of M0         same eps and t for x^f and x^s
    2. L_DPO = -log sigmoid(-beta ((L(x^s) - L0(x^s)) - (L(x^f) - L0(x^f))))
    3. L     = L_DPO + prior |M(eps, T) - M0(eps, T)|^2           preserve what pure noise becomes

t is from 0 to 749. The released code samples it for the two images of a pair independently, here
they share it. There, lr is 100 base-lr / beta and prior is beta base-prior / 100; --lr and --prior
are the results. DUO was made for Stable Diffusion: it trains a LoRA of rank 32 of the
self-attention. A DDPM has little of that and is trained whole, M0 being its saved weights. x^s is
an edited file (--surrogate) or, as in the paper, made by SDEdit.

    python -m baselines.duo --forget emoji/creatures/twemoji-cowboy-hat-face.png
    python -m baselines.duo --model google/ddpm-celebahq-256 \\
        --forget face.png --surrogate edited.png
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from backbones import coefficients, sample_deterministic
from baselines import (
    batch_timesteps,
    instance_parser,
    load_ddpm,
    main,
    open_run_folder,
    read_forget,
    save_pipeline,
    schedule_lr,
    trainable_weights,
    with_preset,
)
from common import fail, generator, to_image
from doco import swap_weights
from instance_unlearn import mse_per_sample

TASK = "instance"
ROWS = [
    {
        "label": "DUO",
        "flags": [],
        "paper": ["--steps", "1000", "--batch-size", "4"],
    }
]
PAPER = {"steps": 1000, "batch_size": 4, "lr": 6e-5}
SMALL = {"steps": 240, "batch_size": 8, "lr": 1e-4}


def parse_args(argv=None):
    """The flags of every instance baseline, without --remember, and those of DUO."""
    parser = instance_parser(__file__, __doc__, PAPER, SMALL, remember=False)
    add = parser.add_argument_group("method").add_argument
    text = "edited images, one per image to unlearn (without them: SDEdit's)"
    add("--surrogate", nargs="+", type=Path, metavar="FILE", help=text)
    add("--beta", type=float, default=500.0, help="of Eq. 2: how sharply the preference saturates")
    add("--prior", type=float, default=5e6, help="weight of the preservation, Eq. 3")
    return parser.parse_args(argv)


def loss_preference(preferred, preferred_0, unwanted, unwanted_0, beta):
    """Eq. 2, from squared errors per image (B,), of the model and of the original (_0). 0-dim.

    log 2 while the two models agree.
    """
    advantage = (preferred - preferred_0) - (unwanted - unwanted_0)
    return -F.logsigmoid(-beta * advantage).mean()


@torch.no_grad()
def sdedit(model, x, g):
    """SDEdit (Meng et al. 2022) of an image (3, H, W): noise up to t = 700, then DDIM."""
    timesteps = torch.arange(700, -1, -20, device=model.device)
    a, b = coefficients(timesteps[:1], model.alpha_bar)
    noise = torch.randn(1, *x.shape, generator=g)
    xt = a * x[None] + b * noise.to(model.device)

    def predict(xt, t):
        """epsilon, (B, 3, H, W)."""
        return model.net(xt, t).sample

    edited = sample_deterministic(predict, xt, timesteps, "epsilon", model.alpha_bar, clip=True)
    return edited[0]


def unlearn(args):
    """Runs DUO; returns the run folder."""
    if args.surrogate and len(args.surrogate) != len(args.forget):
        n, n_surrogates = len(args.forget), len(args.surrogate)
        fail(f"{n} images but {n_surrogates} surrogates; give one --surrogate per image")
    out = open_run_folder(args)
    model = load_ddpm(args)
    args = with_preset(args, model, PAPER, SMALL)
    x_f = read_forget(args, model)  # K images (3, H, W)
    if args.surrogate:
        x_s = read_forget(args, model, args.surrogate, "--surrogate")
    else:
        x_s = []
        for k, x in enumerate(x_f):
            g = generator(args.seed, "surrogates", k)
            x_s.append(sdedit(model, x, g))
    for k, x in enumerate(x_s):
        to_image(x).save(out / f"surrogate-{k}.png")

    weights = list(trainable_weights(model.net).values())
    originals = [w.detach().clone() for w in weights]  # M0
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=1e-2, fused=True)
    device = model.device
    shape = (args.batch_size, *x_f[0].shape)
    log = []
    for step in tqdm(range(args.steps * len(x_f)), "DUO"):
        g = generator(args.seed, "instance_steps", step)
        k = step // args.steps  # images one after another
        t = batch_timesteps(args, g)
        t = (t * 0.75).long().to(device)  # 0 to 749
        eps = torch.randn(shape, generator=g).to(device)
        a, b = coefficients(t, model.alpha_bar)

        # The surrogate, the image to unlearn and pure noise at the last timestep, in one pass
        xt_s = a * x_s[k] + b * eps
        xt_f = a * x_f[k] + b * eps
        xt = torch.cat([xt_s, xt_f, eps])  # (3 B, 3, H, W)
        times = torch.cat([t, t, torch.full_like(t, 999)])
        swap_weights(weights, originals)
        with torch.no_grad():
            s_0, f_0, of_noise_0 = model.net(xt, times).sample.chunk(3)  # M0
        swap_weights(weights, originals)
        s, f, of_noise = model.net(xt, times).sample.chunk(3)  # M

        errors = [mse_per_sample(pred, eps) for pred in (s, s_0, f, f_0)]  # Eq. 1, (B,) each
        preference = loss_preference(*errors, args.beta)
        prior = F.mse_loss(of_noise, of_noise_0)
        (preference + args.prior * prior).backward()  # Eq. 3
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        schedule_lr(optimizer, args, step)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"loss_preference": preference.detach(), "loss_prior": prior.detach()})
    return save_pipeline(args, out, model, log)


if __name__ == "__main__":
    main(TASK, parse_args, unlearn)
