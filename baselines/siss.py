"""SISS, subtracted importance-sampled scores: one noisy picture, of what to keep or what to forget, serves both losses with an
importance weight each (Alberti et al., ICLR 2025); a rival of instance_unlearn.py, for a DDPM.

    m_t = x_t^r with probability 1 - lam, x_t^f with lam; same eps, same t                        one pass forward for both
    L_r = w_r |eps_r - M(m_t)|^2,  eps_r = (m_t - sqrt(a_t) x^r) / sqrt(1 - a_t),  w_r = q_r / ((1 - lam) q_r + lam q_f)
    L_f = w_f |eps_f - M(m_t)|^2   in the same way, with q = N(m_t; sqrt(a_t) x, 1 - a_t)         summed over pixels
    g   = g_r - s g_f / |g_f|      then clipped to norm 1

The released code draws no t but 999 for CelebA-HQ and Stable Diffusion (for MNIST all), and so does this file; --full-range
draws all. At 256 pixels the two halves of the mixture hardly overlap below t = 900: there, the weights are 1 / (1 - lam), 1 /
lam or 0. It gives g_f a fixed norm s in place of the paper's factor 1 + s: 500, or as its README says, a tenth of |g_r|, which
is the default here, taken anew at each update. Its batch is 4, accumulated 16 times, for 60 updates, as here for large models.

    python baselines/siss.py --forget emoji/creatures/twemoji-cowboy-hat-face.png --full-range
    python baselines/siss.py --model google/ddpm-celebahq-256 --forget face.png --remember celebahq/ --scaling-norm 500
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import REPO, atomic_save, evaluate_run, fail, is_embedded, load_pipeline, make_run_dir, run_name  # noqa: E402
from gradsurgery import flat_grad, write_grad  # noqa: E402
from instance_unlearn import coefficients, draw_times, list_images, read_any, read_exact, without_forgotten  # noqa: E402


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(HERE.parent / "emoji/ddpm"), help="DDPM: folder or hub id")
    p.add_argument("--forget", nargs="+", type=Path, required=True, metavar="FILE", help="several: one after another")
    p.add_argument("--remember", type=Path, help="folder of pictures (emoji/ddpm: emoji/creatures)")
    p.add_argument("--steps", type=int, default=60, help="updates per picture to forget")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--lr", type=float, help="default: 5e-6, for small models 2.5e-5")
    p.add_argument("--lam", type=float, default=0.5, help="probability of the picture to forget in the mixture")
    p.add_argument("--scaling-norm", type=float, help="s, the norm of the forget gradient (default: a tenth of the other's)")
    p.add_argument("--full-range", action="store_true", help="t from 0 to 999, not 999 alone")
    p.add_argument("--lr-scheduler", choices=("constant", "linear"), default="constant", help="linear: falls to 0 per picture")
    p.add_argument("--timestep-sampling", choices=("uniform", "stratified"), default="uniform", help="stratified: one timestep "
                   "from each n-th of their range; instance_unlearn.py has both remedies for small models")  # fmt: skip
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="run folder (default: runs/siss-PICTURE)")
    return p.parse_args(argv)


def importance_weights(m_t, x_r, x_f, a, b, lam):
    """(w_r, w_f), (B,) each: q_r and q_f over their mixture, at m_t (B, C, H, W). Sigmoids do not overflow, as exp does."""
    if not 0 < lam < 1:
        raise ValueError(f"importance_weights: lam is {lam}, expected a probability between 0 and 1")
    d_r, d_f = ((m_t - a * x).square().sum((1, 2, 3)) / (2 * b.flatten() ** 2) for x in (x_r, x_f))  # -log q, up to a constant
    odds = d_f - d_r + math.log((1 - lam) / lam)  # log of (1 - lam) q_r / lam q_f
    return odds.sigmoid() / (1 - lam), (-odds).sigmoid() / lam


def losses_siss(says, m_t, x_r, x_f, a, b, lam):
    """(L_r, L_f), 0-dim: weighted squared errors of one prediction (B, C, H, W) against both noises, summed over pixels."""
    weights = importance_weights(m_t, x_r, x_f, a, b, lam)
    return tuple((w * (says - (m_t - a * x) / b).square().sum((1, 2, 3))).mean()
                 for w, x in zip(weights, (x_r, x_f), strict=True))  # fmt: skip


def subtract(g_r, g_f, scaling_norm=None):
    """g_r - s g_f / |g_f| for flat gradients (n,); s: scaling_norm, or a tenth of |g_r|."""
    s = 0.1 * g_r.norm() if scaling_norm is None else scaling_norm
    return g_r - s * g_f / g_f.norm().clamp_min(torch.finfo(g_f.dtype).tiny)


def unlearn(args):
    """Runs SISS and returns the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    out = args.out or Path("runs") / run_name("siss", [f.stem for f in args.forget])
    if args.steps < 1 or args.batch_size < 1:
        fail(f"--steps {args.steps} --batch-size {args.batch_size}: expected at least 1 of each")
    if (out / "pipeline").exists():
        fail(f"{out} already holds a run; choose another --out")
    make_run_dir(out)
    if not 0 < args.lam < 1:
        fail(f"--lam {args.lam}: expected a probability between 0 and 1")
    if args.remember is None:
        if not is_embedded(args.model):
            fail(f"--remember is missing: which pictures should {args.model} keep?")
        args.remember = REPO / "emoji/creatures"
    pipe = load_pipeline(args.model, dtype=torch.float32).to(device)
    if type(pipe).__name__ != "DDPMPipeline" or pipe.scheduler.config.prediction_type != "epsilon":
        fail(f"--model {args.model}: expected a DDPM that predicts epsilon")
    net, alpha_bar, size = pipe.unet.eval(), pipe.scheduler.alphas_cumprod.to(device), pipe.unet.config.sample_size
    x_f = [read_exact(f, size, "--forget").to(device) for f in args.forget]
    files = without_forgotten(list_images(args.remember), torch.stack(x_f).cpu(), size)
    micro = args.batch_size if size <= 64 else 4  # at 256 pixels, the graph of 64 pictures would hold 135 GB
    if not files:
        fail(f"--remember {args.remember}: no pictures there; expected a folder of png, jpg or webp files")
    lr, params = args.lr if args.lr is not None else 2.5e-5 if size <= 64 else 5e-6, list(net.parameters())
    if not lr > 0:
        fail(f"--lr {lr:g}: expected a positive rate")
    optimizer, log = torch.optim.AdamW(params, lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, fused=True), []

    for step in tqdm(range(args.steps * len(x_f)), "SISS"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + 100_000 + step)
        i = torch.randint(len(files), (args.batch_size,), generator=g).tolist()
        if args.full_range:
            t = draw_times(args.batch_size, None, g, args.timestep_sampling == "stratified").to(device)
        else:
            t = torch.full((args.batch_size,), 999, device=device)
        x_r = torch.stack([read_any(files[j], size) for j in i]).to(device)  # (B, 3, H, W)
        eps = torch.randn(x_r.shape, generator=g).to(device)
        from_f = (torch.rand(args.batch_size, 1, 1, 1, generator=g) < args.lam).to(device)
        forget, grads, losses = x_f[step // args.steps], [0, 0], [0, 0]
        for part in torch.arange(args.batch_size, device=device).split(micro):  # a graph of the whole batch may not fit
            a, b = coefficients(t[part], alpha_bar)
            x_0 = forget.expand_as(x_r[part])
            m_t = a * torch.where(from_f[part], x_0, x_r[part]) + b * eps[part]
            both = losses_siss(net(m_t, t[part]).sample, m_t, x_r[part], x_0, a, b, args.lam)
            for k, loss in enumerate(both):  # one graph, two ways back; means over the part, weighted to that over the batch
                loss = loss * len(part) / args.batch_size
                grads[k] = grads[k] + flat_grad(loss, params, retain_graph=k == 0)  # (n,)
                losses[k] = losses[k] + loss.detach()
        write_grad(params, subtract(*grads, args.scaling_norm))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        if args.lr_scheduler == "linear":
            optimizer.param_groups[0]["lr"] = lr * (1 - step % args.steps / args.steps)
        optimizer.step()
        log.append(torch.stack(losses))
    if not torch.stack(log).isfinite().all():
        fail("the loss is not finite any more; lower --lr")

    # -- save: plain diffusers loads it
    rows = [dict(zip(("step", "loss_r", "loss_f"), (k, *v.tolist()), strict=True)) for k, v in enumerate(log)]
    atomic_save(out / "log.jsonl", text="".join(json.dumps(row) + "\n" for row in rows))
    atomic_save(out / "args.json", text=json.dumps({"settings": vars(args) | {"lr": lr}}, indent=1, default=str))
    atomic_save(out / "pipeline", pipe=pipe)
    return out


if __name__ == "__main__":
    args = parse_args()
    out = unlearn(args)
    sys.exit(evaluate_run("instance", args.model, out, "--seed", args.seed, "--real", args.remember, "--forget", *args.forget))
