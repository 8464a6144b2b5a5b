"""EraseDiff: remember, and teach wrong noise for the image to unlearn, weighted by their conflict.

Paper: "Erasing Undesirable Influence in Diffusion Models", Wu et al., 2024, arXiv 2401.05779. For a
DDPM, in the form in which SISS (Alberti et al., 2025) compares it.

    1. x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps   x_0: a remembered image x^r, or
                                                                 the one to unlearn x^f; same eps, t
    2. L_r = |eps - M(x_t^r, t)|^2
    3. L_f = |u - M(x_t^f, t)|^2                                 u: uniform noise in [0, 1)
    4. g   = g_r + max(0, eta - g_r . g_f / |g_f|^2) g_f         L_f falls at least by eta |g_f|^2

Eq. 4 is first-order BOME; the norm of g is clipped at 1, and Lee et al. (arXiv 2603.10445) give it
60 steps. The paper's constraint is L_f - L_f*, the latter after K steps on L_f alone from the
present weights: a constant without gradient, so those steps leave nothing but moments in Adam. The
released code has a constant weight by default and, for Stable Diffusion, loaders that are never
shuffled: each batch is the first 16 images.

    python -m baselines.erasediff --forget emoji/creatures/twemoji-cowboy-hat-face.png
    python -m baselines.erasediff --model google/ddpm-celebahq-256 \\
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
from gradsurgery import flat_grad, write_grad
from instance_unlearn import mse_per_sample

TASK = "instance"
ROWS = [{"label": "EraseDiff", "flags": [], "paper": []}]
PAPER = {"steps": 60, "batch_size": 8, "lr": 5e-6}
SMALL = {"steps": 60, "batch_size": 8, "lr": 2.5e-5}


def parse_args(argv=None):
    """The flags of every instance baseline, and that of EraseDiff."""
    parser = instance_parser(__file__, __doc__, PAPER, SMALL)
    add = parser.add_argument_group("method").add_argument
    add("--eta", type=float, default=1e-3, help="of Eq. 4: how fast L_f must fall at least")
    return parser.parse_args(argv)


def combine(g_r, g_f, eta):
    """Eq. 4 for flat gradients (n,). Where they conflict, g . g_f = eta |g_f|^2."""
    tiny = torch.finfo(g_f.dtype).tiny  # a floor, no epsilon: it would bias small gradients
    norm = g_f.square().sum().clamp_min(tiny)
    weight = (eta - g_r @ g_f / norm).clamp(min=0)
    return g_r + weight * g_f


def unlearn(args):
    """Runs EraseDiff; returns the run folder."""
    out = open_run_folder(args)
    model = load_ddpm(args)
    args = with_preset(args, model, PAPER, SMALL)
    x_f = read_forget(args, model)  # K images (3, H, W)
    files = remember_files(args, x_f)

    weights = list(trainable_weights(model.net).values())
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0, fused=True)
    log = []
    for step in tqdm(range(args.steps * len(x_f)), "EraseDiff"):
        g = generator(args.seed, "instance_steps", step)
        x_r = remember_batch(files, args.batch_size, model, g)  # (B, 3, H, W)
        t = batch_timesteps(args, g).to(model.device)
        eps = torch.randn(x_r.shape, generator=g).to(model.device)
        u = torch.rand(x_r.shape, generator=g).to(model.device)
        a, b = coefficients(t, model.alpha_bar)

        # The graph of each loss is freed before the next is built.
        xt_r = a * x_r + b * eps
        pred_r = model.net(xt_r, t).sample
        loss_r = mse_per_sample(pred_r, eps).mean()  # Eq. 2
        g_r = flat_grad(loss_r, weights)  # (n,)
        xt_f = a * x_f[step // args.steps] + b * eps  # images one after another
        pred_f = model.net(xt_f, t).sample
        loss_f = mse_per_sample(pred_f, u).mean()  # Eq. 3
        g_f = flat_grad(loss_f, weights)
        write_grad(weights, combine(g_r, g_f, args.eta))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        schedule_lr(optimizer, args, step)
        optimizer.step()
        log.append({"loss_r": loss_r.detach(), "loss_f": loss_f.detach()})
    return save_pipeline(args, out, model, log)


if __name__ == "__main__":
    main(TASK, parse_args, unlearn)
