"""DUO, direct unlearning optimization: the model learns to prefer an edited picture to the one to forget, without straying
from what it was (Park et al., NeurIPS 2024); a rival of instance_unlearn.py, for a DDPM.

    L(x)  = |eps - M(x_t, t)|^2,  L0(x) the same of the original model M0                  same eps for both of a pair
    L_DPO = -log sigmoid(-beta ((L(x^s) - L0(x^s)) - (L(x^f) - L0(x^f))))                  x^s, the surrogate, is preferred
    L     = L_DPO + prior |M(eps, T) - M0(eps, T)|^2                                       keep what is made of pure noise

t is drawn from 0 to 749; the released code draws it for the two pictures of a pair independently, here they share it. There,
lr is 100 base-lr / beta and prior is beta base-prior / 100; --lr and --prior are the results. DUO was made for Stable
Diffusion: it trains a LoRA of rank 32 of the self-attention. A DDPM has little of that and is trained whole, M0 being its
saved weights. x^s is an edited file (--surrogate) or, as in the paper, SDEdit's.

    python baselines/duo.py --forget emoji/creatures/twemoji-cowboy-hat-face.png
    python baselines/duo.py --model google/ddpm-celebahq-256 --forget face.png --surrogate edited.png
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import atomic_save, evaluate_run, fail, load_pipeline, make_run_dir, run_name  # noqa: E402
from doco import swap  # noqa: E402
from instance_unlearn import coefficients, denoise, draw_times, per_picture, read_exact, to_image  # noqa: E402


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(HERE.parent / "emoji/ddpm"), help="DDPM: folder or hub id")
    p.add_argument("--forget", nargs="+", type=Path, required=True, metavar="FILE", help="several: one after another")
    p.add_argument("--surrogate", nargs="+", type=Path, metavar="FILE", help="edited, one each (default: sdedit)")
    p.add_argument("--steps", type=int, help="updates per picture to forget (default: 1000, for small models 240)")
    p.add_argument("--batch-size", type=int, help="draws of noise and timestep for the pair (default: 4, for small models 8)")
    p.add_argument("--lr", type=float, help="default: 6e-5, for small models 1e-4")
    p.add_argument("--beta", type=float, default=500.0, help="how sharply the preference saturates")
    p.add_argument("--prior", type=float, default=5e6, help="weight of what pure noise becomes")
    p.add_argument("--lr-scheduler", choices=("constant", "linear"), default="constant", help="linear: falls to 0 per picture")
    p.add_argument("--timestep-sampling", choices=("uniform", "stratified"), default="uniform", help="stratified: one timestep "
                   "from each n-th of their range; instance_unlearn.py has both remedies for small models")  # fmt: skip
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="run folder (default: runs/duo-PICTURE)")
    return p.parse_args(argv)


def loss_preference(preferred, preferred_0, unwanted, unwanted_0, beta):
    """L_DPO from squared errors per picture (B,), of the model and of the original (_0). 0-dim; log 2 where they agree."""
    return -F.logsigmoid(-beta * ((preferred - preferred_0) - (unwanted - unwanted_0))).mean()


def unlearn(args):
    """Runs DUO and returns the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    out = args.out or Path("runs") / run_name("duo", [f.stem for f in args.forget])
    if (out / "pipeline").exists():
        fail(f"{out} already holds a run; choose another --out")
    make_run_dir(out)
    if args.surrogate and len(args.surrogate) != len(args.forget):
        fail(f"{len(args.forget)} pictures but {len(args.surrogate)} surrogates; give one --surrogate each")
    pipe = load_pipeline(args.model, dtype=torch.float32).to(device)
    if type(pipe).__name__ != "DDPMPipeline" or pipe.scheduler.config.prediction_type != "epsilon":
        fail(f"--model {args.model}: expected a DDPM that predicts epsilon")
    net, alpha_bar, size = pipe.unet.eval(), pipe.scheduler.alphas_cumprod.to(device), pipe.unet.config.sample_size
    recipe = dict(steps=240, batch_size=8, lr=1e-4) if size <= 64 else dict(steps=1000, batch_size=4, lr=6e-5)
    steps, batch, lr = (recipe[k] if (v := getattr(args, k)) is None else v for k in ("steps", "batch_size", "lr"))
    if steps < 1 or batch < 1 or not lr > 0:
        fail(f"--steps {steps} --batch-size {batch} --lr {lr:g}: expected at least 1, 1 and a positive rate")
    predict = lambda x, t: net(x, t).sample  # noqa: E731

    # -- the pairs: to forget, and preferred; the model's own edit noises the picture to t = 700 and draws it anew
    x_f, x_s = [read_exact(f, size, "--forget").to(device) for f in args.forget], []
    for k, x in enumerate(x_f):
        if args.surrogate:
            x_s.append(read_exact(args.surrogate[k], size, "--surrogate").to(device))
        else:
            g = torch.Generator().manual_seed(args.seed * 1_000_003 + 900_000 + k)
            times = torch.arange(700, -1, -20, device=device)
            a, b = coefficients(times[:1], alpha_bar)
            noisy = a * x[None] + b * torch.randn(1, *x.shape, generator=g).to(device)
            with torch.no_grad():
                x_s.append(denoise(predict, noisy, times, "epsilon", alpha_bar, clip=True)[0])
        to_image(x_s[k]).save(out / f"surrogate-{k}.png")

    # -- training
    params = list(net.parameters())
    originals = [p.detach().clone() for p in params]
    optimizer, log = torch.optim.AdamW(params, lr=lr, weight_decay=1e-2, fused=True), []
    for step in tqdm(range(steps * len(x_f)), "DUO"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + 100_000 + step)
        k = step // steps
        t = (draw_times(batch, None, g, args.timestep_sampling == "stratified") * 0.75).long().to(device)  # 0 to 749
        eps = torch.randn(batch, *x_f[0].shape, generator=g).to(device)
        a, b = coefficients(t, alpha_bar)
        # The preferred, the unwanted and pure noise at the last timestep, in one pass; first of the original model
        x, times = torch.cat([a * x_s[k] + b * eps, a * x_f[k] + b * eps, eps]), torch.cat([t, t, torch.full_like(t, 999)])
        swap(params, originals)
        with torch.no_grad():
            s_0, f_0, of_noise_0 = predict(x, times).chunk(3)  # (B, 3, H, W) each
        swap(params, originals)
        s, f, of_noise = predict(x, times).chunk(3)
        preference = loss_preference(*(per_picture(says, eps) for says in (s, s_0, f, f_0)), args.beta)
        prior = F.mse_loss(of_noise, of_noise_0)
        (preference + args.prior * prior).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        if args.lr_scheduler == "linear":
            optimizer.param_groups[0]["lr"] = lr * (1 - step % steps / steps)
        optimizer.step()
        optimizer.zero_grad()
        log.append(torch.stack([preference, prior]).detach())
    if not torch.stack(log).isfinite().all():
        fail("the loss is not finite any more; lower --lr")

    # -- save: plain diffusers loads it
    rows = [dict(zip(("step", "loss_preference", "loss_prior"), (k, *v.tolist()), strict=True)) for k, v in enumerate(log)]
    atomic_save(out / "log.jsonl", text="".join(json.dumps(row) + "\n" for row in rows))
    settings = vars(args) | {"steps": steps, "batch_size": batch, "lr": lr}
    atomic_save(out / "args.json", text=json.dumps({"settings": settings}, indent=1, default=str))
    atomic_save(out / "pipeline", pipe=pipe)
    return out


if __name__ == "__main__":
    args = parse_args()
    out = unlearn(args)
    sys.exit(evaluate_run("instance", args.model, out, "--seed", args.seed, "--forget", *args.forget))
