"""Concept Ablation: on noisy pictures of the anchor, the target's prompt shall predict what the anchor's prompt predicts
(Kumari et al., ICCV 2023), as a rival of doco.py.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps              of a picture that the original model drew for the anchor
    L   = |sg M(x_t, anchor) - M(x_t, target)|^2         the model-based loss; sg: without gradient, from the model as it is
    L  += |eps - M(x_t', anchor)|^2                      --retain l2: on other pictures of the anchor, so that it stays

It is DoCo without the discriminator: it aligns predictions one by one where DoCo aligns their distribution. The released code
pastes the pictures at random sizes on black and masks the loss accordingly, detaches K and V of the first token (neither is
done here, nor in doco.py), multiplies the learning rate of 2e-6 by batch size and number of GPUs (1.6e-5, the default here),
and advises --retain l2 where the anchor's name is part of the target's.

    python baselines/conabl.py --target "Grumpy Cat" --anchor Cat
    python baselines/conabl.py --model CompVis/stable-diffusion-v1-4 --target "Van Gogh" --anchor painting --concept-type style
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import atomic_save, evaluate_run, fail, load_pipeline, make_run_dir, run_name  # noqa: E402
from doco import TRAINED, add_noise, check_coverage, prompt_pairs, sample_anchor_latents  # noqa: E402

# The released code's settings on two GPUs; doco.py's updates and batch for toys like emoji/sd, and a larger rate
PAPER = dict(steps=100, batch_size=8, lr=1.6e-5, images=1000, guidance=6.0, sampling_steps=25)
SMALL = dict(steps=250, batch_size=8, lr=1e-4, images=64, guidance=6.0, sampling_steps=15)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", nargs="+", required=True, help="what to forget; several are forgotten at once")
    p.add_argument("--anchor", nargs="+", required=True, help="what to draw instead: one for all, or one each")
    p.add_argument("--concept-type", choices=("object", "style"), default="object", help="style: the anchor is a medium")
    p.add_argument("--prompts", type=Path, help="text file of anchor prompts, one a line (default: doco.py's templates)")
    p.add_argument("--model", default=str(HERE.parent / "emoji/sd"), help="Stable Diffusion 1.x/2.x: folder or hub id")
    p.add_argument("--resolution", type=int, help="pixels of a side (default: the model's own)")
    p.add_argument("--steps", type=int, help="updates")
    p.add_argument("--batch-size", type=int)
    p.add_argument("--lr", type=float)
    p.add_argument("--retain", choices=("none", "l2"), default="none", help="l2: add the denoising loss on the anchor")
    p.add_argument("--train", choices=tuple(TRAINED), default="kv", help="cross-attention K and V, all of it, or the UNet")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="run folder (default: runs/conabl-TARGET)")
    return p.parse_args(argv)


def loss_ablation(says_target, says_anchor):
    """Mean squared error between two predictions (B, 4, h, w), the anchor's as a constant. 0-dim."""
    return F.mse_loss(says_target, says_anchor.detach())


def unlearn(args):
    """Runs Concept Ablation and returns the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    pairs = prompt_pairs(args)
    out = args.out or Path("runs") / run_name("conabl", args.target)
    if (out / "delta.safetensors").exists():
        fail(f"{out} already holds a run; choose another --out")
    make_run_dir(out)
    pipe = load_pipeline(args.model, (StableDiffusionPipeline,), dtype=torch.float32).to(device)
    unet, scale = pipe.unet.requires_grad_(False).eval(), pipe.vae_scale_factor
    alpha_bar = pipe.scheduler.alphas_cumprod.to(device)  # (1000,)
    budget = SMALL["steps"] * len(args.target) * (2 if args.concept_type == "style" else 1)  # doco.py's
    recipe = SMALL | {"steps": budget} if unet.config.sample_size < 32 else PAPER
    steps, batch, lr = (recipe[k] if (v := getattr(args, k)) is None else v for k in ("steps", "batch_size", "lr"))
    if steps < 1 or batch < 1 or not lr > 0:
        fail(f"--steps {steps} --batch-size {batch} --lr {lr:g}: expected at least 1, 1 and a positive rate")
    size = (args.resolution or unet.config.sample_size * scale) // scale  # side of a latent
    texts = list(dict.fromkeys(["", *(a for a, _ in pairs), *(t for _, ts in pairs for t in ts)]))
    with torch.no_grad():
        emb = {text: pipe.encode_prompt(text, device, 1, False)[0][0] for text in texts}  # (77, D) each

    # -- anchor pictures from the original model, as latents (n, 4, h, w): the same as doco.py's
    n = min(recipe["images"], steps * batch)
    check_coverage(pairs, n, len(args.target))
    latents = sample_anchor_latents(pipe, emb, pairs, n, size, recipe, args.seed)

    # -- training
    trained = {n: p.requires_grad_() for n, p in unet.named_parameters() if re.search(TRAINED[args.train], n)}
    optimizer, log = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=1e-2, fused=True), []

    def predict(xt, t, prompts):  # (B, 4, h, w), (B,), B texts -> (B, 4, h, w)
        return unet(xt, t, torch.stack([emb[p] for p in prompts])).sample

    for step in tqdm(range(steps), "Concept Ablation"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        i, i_r = torch.randint(n, (2, batch), generator=g).tolist()
        t, t_r = torch.randint(len(alpha_bar), (2, batch), generator=g).to(device)
        eps, eps_r = torch.randn(2, batch, *latents.shape[1:], generator=g).to(device)
        anchor_prompts, wordings = zip(*[pairs[k % len(pairs)] for k in i], strict=True)
        xt = add_noise(latents[i], eps, alpha_bar[t].view(-1, 1, 1, 1))  # (B, 4, h, w)
        with torch.no_grad():
            says_anchor = predict(xt, t, anchor_prompts)
        loss = loss_ablation(predict(xt, t, [w[step % len(w)] for w in wordings]), says_anchor)
        if args.retain == "l2":
            x_r = add_noise(latents[i_r], eps_r, alpha_bar[t_r].view(-1, 1, 1, 1))
            loss = loss + F.mse_loss(predict(x_r, t_r, [pairs[k % len(pairs)][0] for k in i_r]), eps_r)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append(loss.detach())
    if not torch.stack(log).isfinite().all():
        fail("the loss is not finite any more; lower --lr")

    # -- save: the trained tensors under their UNet names; plain diffusers loads them
    atomic_save(out / "log.jsonl", text="".join(json.dumps({"step": k, "loss": v.item()}) + "\n" for k, v in enumerate(log)))
    settings = vars(args) | {"steps": steps, "batch_size": batch, "lr": lr, "resolution": size * scale}
    atomic_save(out / "args.json", text=json.dumps({"settings": settings}, indent=1, default=str))
    atomic_save(out / "delta.safetensors", trained, metadata={"format": "pt", "method": "conabl", "base_model": args.model})
    return out


if __name__ == "__main__":
    args = parse_args()
    out = unlearn(args)
    size = ("--resolution", args.resolution) if args.resolution else ()
    sys.exit(evaluate_run("concept", args.model, out, "--seed", args.seed, "--concept-type", args.concept_type, *size,
                          "--target", *args.target, "--anchor", *args.anchor))  # fmt: skip
