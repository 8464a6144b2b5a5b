"""ESD: the model learns to steer away from a concept by itself, as if its name were a negative prompt (Gandikota et al., ICCV
2023); a rival of doco.py.

    x_t = a point on a path that the original model e0 draws for the target      no pictures are needed, only the name
    y   = e0(x_t, "") - eta (e0(x_t, target) - e0(x_t, ""))                      as far from the target as eta says
    L   = |y - M(x_t, target)|^2                                                 no loss keeps anything else

The paper draws every x_t anew, with the model as it is so far; the released code now draws it with the original model. So
here: then the paths can be drawn once, each point of them is used, and as the guided sampler computes e0(x_t, target) and
e0(x_t, "") anyway, y costs nothing and an update is one pass forward and backward. The released code also computes y from a
second UNet, in bfloat16, and asks for 200 updates at 5e-5 in place of the paper's 1,000 at 1e-5. ESD has no anchor: --anchor
is for eval.py.

    python baselines/esd.py --target "Grumpy Cat" --anchor Cat
    python baselines/esd.py --model CompVis/stable-diffusion-v1-4 --target "Van Gogh" --anchor painting --concept-type style
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import atomic_save, evaluate_run, fail, load_pipeline, make_run_dir, run_name  # noqa: E402
from doco import TRAINED, check_coverage, prompt_pairs  # noqa: E402

# Their ESD-u leaves out the cross-attention, the output layers and the time embedding
TRAINED = TRAINED | {"noxattn": r"^(?!.*(attn2\.|conv_out|conv_norm_out|time_embedding))"}
# The paper's settings: batch 1, 50 steps of DDIM; doco.py's updates and batch for toys like emoji/sd, and a larger rate
PAPER = dict(steps=1000, batch_size=1, lr=1e-5, paths=100, guidance=3.0, sampling_steps=50)
SMALL = dict(steps=250, batch_size=8, lr=3e-4, paths=64, guidance=3.0, sampling_steps=50)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", nargs="+", required=True, help="what to forget; several are forgotten at once")
    p.add_argument("--anchor", nargs="+", required=True, help="what eval.py compares it with: one for all, or one each")
    p.add_argument("--concept-type", choices=("object", "style"), default="object")
    p.add_argument("--prompts", type=Path, help="text file of anchor prompts, one a line (default: doco.py's templates)")
    p.add_argument("--model", default=str(HERE.parent / "emoji/sd"), help="Stable Diffusion 1.x/2.x: folder or hub id")
    p.add_argument("--resolution", type=int, help="pixels of a side (default: the model's own)")
    p.add_argument("--steps", type=int, help="updates")
    p.add_argument("--batch-size", type=int)
    p.add_argument("--lr", type=float)
    p.add_argument("--eta", type=float, default=1.0, help="how far beyond the unconditional prediction")
    p.add_argument("--train", choices=tuple(TRAINED), help="noxattn: their ESD-u, all but the cross-attention; "
                   "xattn: their ESD-x, the cross-attention (default: noxattn for objects on large models)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="run folder (default: runs/esd-TARGET)")
    return p.parse_args(argv)


def default_train(concept_type, small):
    """The paper: ESD-u for objects, ESD-x for styles. On emoji/sd, ESD-u erased the cat at none of three rates: ESD-x there."""
    return "noxattn" if concept_type == "object" and not small else "xattn"


def steer_away(eps_null, eps_target, eta):
    """What the model shall predict for the target, from the original's predictions without and with it, (B, 4, h, w)."""
    return eps_null - eta * (eps_target - eps_null)


@torch.no_grad()
def draw_path(unet, scheduler, x, emb, emb_null, guidance):
    """DDIM with guidance from noise x (B, 4, h, w). Yields each x_t, its t and what the original says of it, both ways."""
    for t in scheduler.timesteps:
        eps_null, eps_target = unet(torch.cat([x, x]), t, torch.cat([emb_null, emb])).sample.chunk(2)
        yield x, t, eps_null, eps_target
        x = scheduler.step(eps_null + guidance * (eps_target - eps_null), t, x).prev_sample


def unlearn(args):
    """Runs ESD and returns the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    prompts = [wording for _, wordings in prompt_pairs(args) for wording in wordings]
    out = args.out or Path("runs") / run_name("esd", args.target)
    if (out / "delta.safetensors").exists():
        fail(f"{out} already holds a run; choose another --out")
    make_run_dir(out)
    pipe = load_pipeline(args.model, (StableDiffusionPipeline,), dtype=torch.float32).to(device)
    unet, scale = pipe.unet.requires_grad_(False).eval(), pipe.vae_scale_factor
    budget = SMALL["steps"] * len(args.target) * (2 if args.concept_type == "style" else 1)  # doco.py's
    recipe = SMALL | {"steps": budget} if unet.config.sample_size < 32 else PAPER
    steps, batch, lr = (recipe[k] if (v := getattr(args, k)) is None else v for k in ("steps", "batch_size", "lr"))
    if steps < 1 or batch < 1 or not lr > 0:
        fail(f"--steps {steps} --batch-size {batch} --lr {lr:g}: expected at least 1, 1 and a positive rate")
    size = (args.resolution or unet.config.sample_size * scale) // scale  # side of a latent
    with torch.no_grad():
        emb = {text: pipe.encode_prompt(text, device, 1, False)[0][0] for text in ["", *prompts]}  # (77, D) each
    # Latents are N(0, 1) and must not be clipped to [-1, 1], which DDIM does unless it is told
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(recipe["sampling_steps"], device)

    train = args.train or default_train(args.concept_type, recipe is not PAPER)

    # -- the paths, from the original model: every point x_t, its t and its y
    check_coverage(prompts, recipe["paths"], len(args.target))
    points, of_path = [], [prompts[j % len(prompts)] for j in range(recipe["paths"])]
    for i in tqdm(range(0, len(of_path), 16), f"{len(of_path)} paths"):
        part = of_path[i : i + 16]
        noise = [torch.Generator().manual_seed(args.seed * 1_000_003 + i + j) for j in range(len(part))]
        x = torch.stack([torch.randn(unet.config.in_channels, size, size, generator=g) for g in noise]).to(device)
        conditions = torch.stack([emb[p] for p in part]), emb[""].expand(len(part), -1, -1)
        for x_t, t, eps_null, eps_target in draw_path(unet, scheduler, x, *conditions, recipe["guidance"]):
            y = steer_away(eps_null, eps_target, args.eta)
            points += [(x_t[j], t, y[j], part[j]) for j in range(len(part))]

    # -- training
    trained = {n: p.requires_grad_() for n, p in unet.named_parameters() if re.search(TRAINED[train], n)}
    optimizer, log = torch.optim.Adam(trained.values(), lr=lr, fused=True), []
    for step in tqdm(range(steps), "ESD"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + 500_000 + step)
        x_t, t, y, texts = zip(*[points[k] for k in torch.randint(len(points), (batch,), generator=g)], strict=True)
        says = unet(torch.stack(x_t), torch.stack(t), torch.stack([emb[p] for p in texts])).sample  # (B, 4, h, w)
        loss = F.mse_loss(says, torch.stack(y))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append(loss.detach())
    if not torch.stack(log).isfinite().all():
        fail("the loss is not finite any more; lower --lr")

    # -- save: the trained tensors under their UNet names; plain diffusers loads them
    atomic_save(out / "log.jsonl", text="".join(json.dumps({"step": k, "loss": v.item()}) + "\n" for k, v in enumerate(log)))
    settings = vars(args) | {"steps": steps, "batch_size": batch, "lr": lr, "train": train, "resolution": size * scale}
    atomic_save(out / "args.json", text=json.dumps({"settings": settings}, indent=1, default=str))
    atomic_save(out / "delta.safetensors", trained, metadata={"format": "pt", "method": "esd", "base_model": args.model})
    return out


if __name__ == "__main__":
    args = parse_args()
    out = unlearn(args)
    size = ("--resolution", args.resolution) if args.resolution else ()
    sys.exit(evaluate_run("concept", args.model, out, "--seed", args.seed, "--concept-type", args.concept_type, *size,
                          "--target", *args.target, "--anchor", *args.anchor))  # fmt: skip
