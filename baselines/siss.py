"""SISS, subtracted importance sampled scores: one noisy image serves both losses, by its weights.

Paper: "Data Unlearning in Diffusion Models", Alberti et al., ICLR 2025. For a DDPM. The noisy image
comes from a remembered image x^r or from the one to unlearn x^f; an importance weight makes each
loss right on average, with one forward pass for both.

    1. m_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) eps   x: x^f with probability lam, else x^r
    2. q_r = N(m_t; sqrt(alpha_bar_t) x^r, 1 - alpha_bar_t),  q_f in the same way
    3. w_r = q_r / ((1 - lam) q_r + lam q_f),                 w_f = q_f / (the same)
    4. L_r = w_r |eps_r - M(m_t, t)|^2, summed over pixels; L_f in the same way
       eps_r = (m_t - sqrt(alpha_bar_t) x^r) / sqrt(1 - alpha_bar_t)
    5. g   = g_r - s g_f / |g_f|, then clipped to norm 1

The released code takes t = 999 alone for CelebA-HQ and Stable Diffusion (for MNIST all), and so
does this file; --full-range takes all. At 256 pixels the two halves of the mixture hardly overlap
below t = 900: there, the weights are 1 / (1 - lam), 1 / lam or 0. It gives g_f a fixed norm s in
place of the paper's factor 1 + s: 500, or as its README has it, a tenth of |g_r|, which is the
default here, computed anew at each step. Its batch is 4, accumulated 16 times, for 60 steps, as
here for large models.

    python -m baselines.siss --forget emoji/creatures/twemoji-cowboy-hat-face.png --full-range
    python -m baselines.siss --model google/ddpm-celebahq-256 \\
        --forget face.png --remember celebahq/ --scaling-norm 500
"""

import math

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
from common import fail, generator
from gradsurgery import flat_grad, write_grad

TASK = "instance"
ROWS = [
    {
        "label": "SISS (t = 999)",
        "flags": [],
        "paper": [],
    },
    {
        "label": "SISS (all t)",
        "flags": ["--full-range"],
        "paper": [],
    },
]
PAPER = {"steps": 60, "batch_size": 64, "lr": 5e-6, "micro_batch": 4}
SMALL = {"steps": 60, "batch_size": 64, "lr": 2.5e-5, "micro_batch": None}  # None: all at once


def parse_args(argv=None):
    """The flags of every instance baseline, and those of SISS."""
    parser = instance_parser(__file__, __doc__, PAPER, SMALL)
    add = parser.add_argument_group("method").add_argument
    add("--lam", type=float, default=0.5, help="of Eq. 1: probability of the image to unlearn")
    add("--scaling-norm", type=float, help="s of Eq. 5 (without it: a tenth of |g_r|)")
    add("--full-range", action="store_true", help="t from 0 to 999, not 999 alone")
    return parser.parse_args(argv)


def sum_of_squares(x):
    """(B, C, H, W) -> (B,)."""
    return x.square().sum((1, 2, 3))


def importance_weights(m_t, x_r, x_f, a, b, lam):
    """Eq. 3: (w_r, w_f), (B,) each, at m_t (B, C, H, W); a, b (B, 1, 1, 1).

    As sigmoids of log q_r - log q_f: the densities themselves underflow. Raises ValueError if lam
    is not a probability.
    """
    if not 0 < lam < 1:
        raise ValueError(f"importance_weights: lam is {lam}, expected a number between 0 and 1")
    two_variances = 2 * b.flatten() ** 2  # (B,)
    d_r = sum_of_squares(m_t - a * x_r) / two_variances  # -log q_r + constant
    d_f = sum_of_squares(m_t - a * x_f) / two_variances
    log_odds = d_f - d_r + math.log((1 - lam) / lam)  # log of (1 - lam) q_r / (lam q_f)
    w_r = log_odds.sigmoid() / (1 - lam)
    w_f = (-log_odds).sigmoid() / lam
    return w_r, w_f


def losses_siss(pred, m_t, x_r, x_f, a, b, lam):
    """Eq. 4: (L_r, L_f), 0-dim means over the batch, of one prediction (B, C, H, W)."""
    w_r, w_f = importance_weights(m_t, x_r, x_f, a, b, lam)
    eps_r = (m_t - a * x_r) / b
    eps_f = (m_t - a * x_f) / b
    error_r = sum_of_squares(pred - eps_r)  # (B,)
    error_f = sum_of_squares(pred - eps_f)
    return (w_r * error_r).mean(), (w_f * error_f).mean()


def subtract(g_r, g_f, scaling_norm=None):
    """Eq. 5 for flat gradients (n,); s: scaling_norm, or a tenth of |g_r|."""
    s = 0.1 * g_r.norm() if scaling_norm is None else scaling_norm
    tiny = torch.finfo(g_f.dtype).tiny
    norm = g_f.norm().clamp_min(tiny)
    return g_r - s * g_f / norm


def accumulate(net, weights, batch, alpha_bar, lam, micro_batch):
    """The gradients (g_r, g_f), (n,) each, and losses (L_r, L_f) of a batch, by micro-batches.

    batch: (x_r, x_f, from_f, eps, t), see unlearn. The graph of 64 images of 256x256 pixels would
    hold 135 GB.
    """
    x_r, x_f, from_f, eps, t = batch
    grads, losses = [0, 0], [0, 0]
    every = torch.arange(len(t), device=t.device)
    for part in every.split(micro_batch):
        a, b = coefficients(t[part], alpha_bar)
        x_f_part = x_f.expand_as(x_r[part])
        x = torch.where(from_f[part], x_f_part, x_r[part])
        m_t = a * x + b * eps[part]  # Eq. 1
        pred = net(m_t, t[part]).sample
        both = losses_siss(pred, m_t, x_r[part], x_f_part, a, b, lam)
        for k, loss in enumerate(both):  # two backward passes through one graph
            loss = loss * len(part) / len(t)  # from a mean over the part to one over the batch
            g = flat_grad(loss, weights, retain_graph=k == 0)
            grads[k] = grads[k] + g
            losses[k] = losses[k] + loss.detach()
    return grads, losses


def unlearn(args):
    """Runs SISS; returns the run folder."""
    if not 0 < args.lam < 1:
        fail(f"--lam {args.lam}: expected a probability between 0 and 1")
    out = open_run_folder(args)
    model = load_ddpm(args)
    args = with_preset(args, model, PAPER, SMALL)
    x_f = read_forget(args, model)  # K images (3, H, W)
    files = remember_files(args, x_f)

    weights = list(trainable_weights(model.net).values())
    optimizer = torch.optim.AdamW(  # as in the released code
        weights,
        lr=args.lr,
        betas=(0.95, 0.999),
        weight_decay=1e-6,
        fused=True,
    )
    micro_batch = args.micro_batch or args.batch_size
    log = []
    for step in tqdm(range(args.steps * len(x_f)), "SISS"):
        g = generator(args.seed, "instance_steps", step)
        x_r = remember_batch(files, args.batch_size, model, g)  # (B, 3, H, W)
        t = torch.full((args.batch_size,), 999)
        if args.full_range:
            t = batch_timesteps(args, g)
        t = t.to(model.device)
        eps = torch.randn(x_r.shape, generator=g).to(model.device)
        uniform = torch.rand(args.batch_size, 1, 1, 1, generator=g)
        from_f = (uniform < args.lam).to(model.device)
        batch = (x_r, x_f[step // args.steps], from_f, eps, t)  # images one after another

        (g_r, g_f), (loss_r, loss_f) = accumulate(
            model.net, weights, batch, model.alpha_bar, args.lam, micro_batch
        )
        write_grad(weights, subtract(g_r, g_f, args.scaling_norm))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        schedule_lr(optimizer, args, step)
        optimizer.step()
        log.append({"loss_r": loss_r, "loss_f": loss_f})
    return save_pipeline(args, out, model, log)


if __name__ == "__main__":
    main(TASK, parse_args, unlearn)
