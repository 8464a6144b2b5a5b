"""EraseDiff: remember, and teach nonsense for the picture to forget, as hard as the two gradients' conflict demands (Wu et
al., 2024); a rival of instance_unlearn.py, for a DDPM.

    L_r = |eps - M(x_t^r, t)|^2,   L_f = |u - M(x_t^f, t)|^2      u: uniform noise in [0, 1) in place of eps; same eps, same t
    g   = g_r + max(0, eta - g_r . g_f / |g_f|^2) g_f             so that L_f falls at least with eta |g_f|^2 (first-order BOME)

This is the form in which SISS (Alberti et al., 2025) compares it, the norm of g clipped at 1, and Lee et al. (arXiv
2603.10445) give it 60 updates. The paper's constraint is L_f - L_f*, the latter after K steps on L_f alone from where the
model stands: a constant without gradient, so that those steps leave nothing but moments in Adam. The released code has a
constant weight by default and, for Stable Diffusion, loaders that are never shuffled: each batch is the first 16 pictures.

    python baselines/erasediff.py --forget emoji/creatures/twemoji-cowboy-hat-face.png
    python baselines/erasediff.py --model google/ddpm-celebahq-256 --forget face.png --remember celebahq/
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import REPO, atomic_save, evaluate_run, fail, is_embedded, load_pipeline, make_run_dir, run_name  # noqa: E402
from gradsurgery import flat_grad, write_grad  # noqa: E402
from instance_unlearn import (  # noqa: E402
    coefficients,
    draw_times,
    list_images,
    per_picture,
    read_any,
    read_exact,
    without_forgotten,
)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(HERE.parent / "emoji/ddpm"), help="DDPM: folder or hub id")
    p.add_argument("--forget", nargs="+", type=Path, required=True, metavar="FILE", help="several: one after another")
    p.add_argument("--remember", type=Path, help="folder of pictures (emoji/ddpm: emoji/creatures)")
    p.add_argument("--steps", type=int, default=60, help="updates per picture to forget")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--lr", type=float, help="default: 5e-6, for small models 2.5e-5")
    p.add_argument("--eta", type=float, default=1e-3, help="how fast L_f must fall at least")
    p.add_argument("--lr-scheduler", choices=("constant", "linear"), default="constant", help="linear: falls to 0 per picture")
    p.add_argument("--timestep-sampling", choices=("uniform", "stratified"), default="uniform", help="stratified: one timestep "
                   "from each n-th of their range; instance_unlearn.py has both remedies for small models")  # fmt: skip
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="run folder (default: runs/erasediff-PICTURE)")
    return p.parse_args(argv)


def combine(g_r, g_f, eta):
    """g_r + max(0, eta - g_r . g_f / |g_f|^2) g_f for flat gradients (n,): where they conflict, g . g_f = eta |g_f|^2."""
    weight = (eta - g_r @ g_f / g_f.square().sum().clamp_min(torch.finfo(g_f.dtype).tiny)).clamp(min=0)
    return g_r + weight * g_f


def unlearn(args):
    """Runs EraseDiff and returns the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    out = args.out or Path("runs") / run_name("erasediff", [f.stem for f in args.forget])
    if args.steps < 1 or args.batch_size < 1:
        fail(f"--steps {args.steps} --batch-size {args.batch_size}: expected at least 1 of each")
    if (out / "pipeline").exists():
        fail(f"{out} already holds a run; choose another --out")
    make_run_dir(out)
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
    if not files:
        fail(f"--remember {args.remember}: no pictures there; expected a folder of png, jpg or webp files")
    lr, params = args.lr if args.lr is not None else 2.5e-5 if size <= 64 else 5e-6, list(net.parameters())
    if not lr > 0:
        fail(f"--lr {lr:g}: expected a positive rate")
    optimizer, log = torch.optim.AdamW(params, lr=lr, weight_decay=0, fused=True), []

    for step in tqdm(range(args.steps * len(x_f)), "EraseDiff"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + 100_000 + step)
        i = torch.randint(len(files), (args.batch_size,), generator=g).tolist()
        t = draw_times(args.batch_size, None, g, args.timestep_sampling == "stratified").to(device)
        x_r = torch.stack([read_any(files[j], size) for j in i]).to(device)  # (B, 3, H, W)
        eps, u = (draw(x_r.shape, generator=g).to(device) for draw in (torch.randn, torch.rand))
        a, b = coefficients(t, alpha_bar)
        loss_r = per_picture(net(a * x_r + b * eps, t).sample, eps).mean()
        g_r = flat_grad(loss_r, params)  # (n,)
        loss_f = per_picture(net(a * x_f[step // args.steps] + b * eps, t).sample, u).mean()
        write_grad(params, combine(g_r, flat_grad(loss_f, params), args.eta))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        if args.lr_scheduler == "linear":
            optimizer.param_groups[0]["lr"] = lr * (1 - step % args.steps / args.steps)
        optimizer.step()
        log.append(torch.stack([loss_r, loss_f]).detach())
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
