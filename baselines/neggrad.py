"""NegGrad: gradient ascent on the denoising loss of the image to unlearn, for a DDPM.

Paper: "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks", Golatkar et
al., CVPR 2020; for diffusion models in the form of Lee et al. (arXiv 2603.10445, Sec. III-A).

    1. x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps   x_0: a remembered image x^r, or
                                                                 the one to unlearn x^f; same eps, t
    2. L_r = |eps - M(x_t^r, t)|^2,  L_f = |eps - M(x_t^f, t)|^2
    3. L   = L_r - lam L_f
    4. L   = -L_f                                                --ascent: as SISS compares it

Nothing bounds L from below, so training stops early (Lee et al., Sec. V: 10 steps). The released
code of SISS (Alberti et al.) has both forms, sums over pixels and clips the norm of the gradient
at 1; EraseDiff's ascends the loss of the remembered images, by mistake as it seems.

    python -m baselines.neggrad --forget emoji/creatures/twemoji-cowboy-hat-face.png
    python -m baselines.neggrad --model google/ddpm-celebahq-256 \\
        --forget face.png --remember celebahq/
"""

import torch
from tqdm import tqdm

from backbones import coefficients
from baselines import (
    batch_timesteps,
    instance_parser,
    load_ddpm,
    main,
    open_run_folder,
    read_forget,
    remember_batch,
    remember_files,
    save_pipeline,
    schedule_lr,
    trainable_weights,
    with_preset,
)
from common import generator
from instance_unlearn import mse_per_sample

TASK = "instance"
ROWS = [
    {
        "label": "NegGrad",
        "flags": [],
        "paper": ["--steps", "10"],
    }
]
PAPER = {"steps": 10, "batch_size": 8, "lr": 5e-6}
SMALL = {"steps": 10, "batch_size": 8, "lr": 2.5e-5}


def parse_args(argv=None):
    """The flags of every instance baseline, and those of NegGrad."""
    parser = instance_parser(__file__, __doc__, PAPER, SMALL)
    add = parser.add_argument_group("method").add_argument
    add("--lam", type=float, default=1.0, help="weight of forgetting, Eq. 3")
    add("--ascent", action="store_true", help="Eq. 4 in place of Eq. 3: remember nothing")
    return parser.parse_args(argv)


def loss_neggrad(error_r, error_f, lam):
    """Eq. 3, or Eq. 4 if error_r is None, from squared errors per image (B,). 0-dim."""
    if error_r is None:
        return -error_f.mean()
    return (error_r - lam * error_f).mean()


def unlearn(args):
    """Runs NegGrad; returns the run folder."""
    out = open_run_folder(args)
    model = load_ddpm(args)
    args = with_preset(args, model, PAPER, SMALL)
    x_f = read_forget(args, model)  # K images (3, H, W)
    files = remember_files(args, x_f)

    weights = list(trainable_weights(model.net).values())
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0, fused=True)
    log = []
    for step in tqdm(range(args.steps * len(x_f)), "NegGrad"):
        g = generator(args.seed, "instance_steps", step)
        x_r = remember_batch(files, args.batch_size, model, g)  # (B, 3, H, W)
        t = batch_timesteps(args, g).to(model.device)
        eps = torch.randn(x_r.shape, generator=g).to(model.device)
        a, b = coefficients(t, model.alpha_bar)

        error_r = None
        if not args.ascent:
            xt_r = a * x_r + b * eps
            error_r = mse_per_sample(model.net(xt_r, t).sample, eps)  # (B,)
        xt_f = a * x_f[step // args.steps] + b * eps  # images one after another
        error_f = mse_per_sample(model.net(xt_f, t).sample, eps)
        loss_neggrad(error_r, error_f, args.lam).backward()
        schedule_lr(optimizer, args, step)
        optimizer.step()
        optimizer.zero_grad()

        row = {"loss_f": error_f.mean().detach()}
        if error_r is not None:
            row["loss_r"] = error_r.mean().detach()
        log.append(row)
    return save_pipeline(args, out, model, log)


if __name__ == "__main__":
    main(TASK, parse_args, unlearn)
