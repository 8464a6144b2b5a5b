"""NegGrad: forget a picture by climbing its loss (Golatkar et al., CVPR 2020); a rival of instance_unlearn.py, for a DDPM.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps              of a picture to remember and of the one to forget: same eps, same t
    L_r = |eps - M(x_t^r, t)|^2,   L_f = |eps - M(x_t^f, t)|^2
    L   = L_r - lam L_f                                  as Lee et al. (arXiv 2603.10445, Sec. III-A) state it
    L   = -L_f                                           --ascent: without remembering, as SISS (Alberti et al.) compares it

Nothing bounds L from below: stop early (Lee et al., Sec. V: 10 updates). SISS's released code has both forms, sums over pixels
and clips the gradient's norm at 1; EraseDiff's climbs the loss of the pictures to remember, by mistake as it seems.

    python baselines/neggrad.py --forget emoji/creatures/twemoji-cowboy-hat-face.png
    python baselines/neggrad.py --model google/ddpm-celebahq-256 --forget face.png --remember celebahq/
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
    p.add_argument("--steps", type=int, default=10, help="updates per picture to forget")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--lr", type=float, help="default: 5e-6, for small models 2.5e-5")
    p.add_argument("--lam", type=float, default=1.0, help="weight of forgetting")
    p.add_argument("--ascent", action="store_true", help="climb L_f alone, remember nothing")
    p.add_argument("--lr-scheduler", choices=("constant", "linear"), default="constant", help="linear: falls to 0 per picture")
    p.add_argument("--timestep-sampling", choices=("uniform", "stratified"), default="uniform", help="stratified: one timestep "
                   "from each n-th of their range; instance_unlearn.py has both remedies for small models")  # fmt: skip
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="run folder (default: runs/neggrad-PICTURE)")
    return p.parse_args(argv)


def loss_neggrad(error_r, error_f, lam):
    """L_r - lam L_f (Lee et al., Sec. III-A), from squared errors per picture (B,), error_r None for pure ascent. 0-dim."""
    return -error_f.mean() if error_r is None else (error_r - lam * error_f).mean()


def unlearn(args):
    """Runs NegGrad and returns the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    out = args.out or Path("runs") / run_name("neggrad", [f.stem for f in args.forget])
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
    lr = args.lr if args.lr is not None else 2.5e-5 if size <= 64 else 5e-6
    if not lr > 0:
        fail(f"--lr {lr:g}: expected a positive rate")
    optimizer, log = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0, fused=True), []

    for step in tqdm(range(args.steps * len(x_f)), "NegGrad"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + 100_000 + step)
        i = torch.randint(len(files), (args.batch_size,), generator=g).tolist()
        t = draw_times(args.batch_size, None, g, args.timestep_sampling == "stratified").to(device)
        x_r = torch.stack([read_any(files[j], size) for j in i]).to(device)  # (B, 3, H, W)
        eps = torch.randn(x_r.shape, generator=g).to(device)
        a, b = coefficients(t, alpha_bar)
        error_r = None if args.ascent else per_picture(net(a * x_r + b * eps, t).sample, eps)
        error_f = per_picture(net(a * x_f[step // args.steps] + b * eps, t).sample, eps)
        loss_neggrad(error_r, error_f, args.lam).backward()
        if args.lr_scheduler == "linear":
            optimizer.param_groups[0]["lr"] = lr * (1 - step % args.steps / args.steps)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"loss_f": error_f.mean().detach()} | ({} if error_r is None else {"loss_r": error_r.mean().detach()}))
    if not torch.stack([v for row in log for v in row.values()]).isfinite().all():
        fail("the loss is not finite any more; lower --lr")

    # -- save: plain diffusers loads it
    rows = [{"step": k} | {name: v.item() for name, v in row.items()} for k, row in enumerate(log)]
    atomic_save(out / "log.jsonl", text="".join(json.dumps(row) + "\n" for row in rows))
    atomic_save(out / "args.json", text=json.dumps({"settings": vars(args) | {"lr": lr}}, indent=1, default=str))
    atomic_save(out / "pipeline", pipe=pipe)
    return out


if __name__ == "__main__":
    args = parse_args()
    out = unlearn(args)
    sys.exit(evaluate_run("instance", args.model, out, "--seed", args.seed, "--real", args.remember, "--forget", *args.forget))
