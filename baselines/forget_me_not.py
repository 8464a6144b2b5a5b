"""Forget-Me-Not: on pictures of the target, the cross-attention learns to look away from the target's words (Zhang et al.,
2023); a rival of doco.py.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps         of a picture that shows the target
    L   = |A|, A = the attention of all pixels, heads and layers of the UNet at x_t to the tokens of the target in its prompt

L is the Frobenius norm of the attention probabilities. Nothing keeps anything else: stop early (35 updates). The pictures are
8 to 10 real ones (--pictures), or drawn by the original model. The released code can learn new tokens for the target first
(textual inversion), and with a batch above 1 mixes up the heads of its pictures; here each picture has its norm, and their
mean is taken. There is no anchor: --anchor is for eval.py.

    python baselines/forget_me_not.py --target "Grumpy Cat" --anchor Cat
    python baselines/forget_me_not.py --model CompVis/stable-diffusion-v1-4 --target Snoopy --anchor Dog --pictures snoopy/
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import atomic_save, evaluate_run, fail, load_pipeline, make_run_dir, run_name  # noqa: E402
from doco import TRAINED, add_noise, check_coverage, prompt_pairs  # noqa: E402
from instance_unlearn import read_any  # noqa: E402

# The released settings; doco.py's updates and batch for toys like emoji/sd, and a larger rate
PAPER = dict(steps=35, batch_size=1, lr=2e-6, images=10, guidance=6.0, sampling_steps=25)
SMALL = dict(steps=250, batch_size=8, lr=3e-6, images=64, guidance=6.0, sampling_steps=15)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", nargs="+", required=True, help="what to forget; several are forgotten at once")
    p.add_argument("--anchor", nargs="+", required=True, help="what eval.py compares it with: one for all, or one each")
    p.add_argument("--concept-type", choices=("object", "style"), default="object")
    p.add_argument("--prompts", type=Path, help="text file of anchor prompts, one a line (default: doco.py's templates)")
    p.add_argument("--pictures", type=Path, help="folder of pictures of the target (default: the model draws them)")
    p.add_argument("--model", default=str(HERE.parent / "emoji/sd"), help="Stable Diffusion 1.x/2.x: folder or hub id")
    p.add_argument("--resolution", type=int, help="pixels of a side (default: the model's own)")
    p.add_argument("--steps", type=int, help="updates")
    p.add_argument("--batch-size", type=int)
    p.add_argument("--lr", type=float)
    p.add_argument("--train", choices=tuple(TRAINED), default="full", help="the UNet, or its cross-attention")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="run folder (default: runs/forget-me-not-TARGET)")
    return p.parse_args(argv)


class Watch:
    """An attention processor that computes what diffusers' own does, and keeps the probabilities (B, heads, pixels, 77)."""

    def __init__(self):
        self.seen = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        query, key, value = (attn.head_to_batch_dim(f(x)) for f, x in (
            (attn.to_q, hidden_states), (attn.to_k, encoder_hidden_states), (attn.to_v, encoder_hidden_states)))  # fmt: skip
        probabilities = attn.get_attention_scores(query, key, attention_mask)  # (B heads, pixels, 77)
        self.seen.append(probabilities.unflatten(0, (-1, attn.heads)))
        x = attn.batch_to_head_dim(probabilities @ value)
        return attn.to_out[1](attn.to_out[0](x))


def positions(tokenizer, prompt, targets):
    """Where the tokens of any of the targets stand in the prompt's 77, bool (77,)."""
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
    at = torch.zeros(len(ids), dtype=torch.bool)
    for target in targets:
        wanted = tokenizer(target)["input_ids"][1:-1]  # without the start and the end token
        for k in range(len(ids) - len(wanted) + 1):
            if ids[k : k + len(wanted)] == wanted:
                at[k : k + len(wanted)] = True
    return at


def loss_attention(seen, at):
    """The norm of the attention to the marked tokens. seen: (B, heads, pixels, 77) of each layer; at: bool (B, 77). 0-dim."""
    squares = sum((p.square() * at[:, None, None]).sum((1, 2, 3)) for p in seen)  # (B,)
    return squares.sqrt().mean()


def unlearn(args):
    """Runs Forget-Me-Not and returns the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    prompts = [wording for _, wordings in prompt_pairs(args) for wording in wordings]
    out = args.out or Path("runs") / run_name("forget-me-not", args.target)
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
    with torch.no_grad():
        emb = {text: pipe.encode_prompt(text, device, 1, False)[0][0] for text in ["", *prompts]}  # (77, D) each
    where = {prompt: positions(pipe.tokenizer, prompt, args.target).to(device) for prompt in prompts}  # (77,) each
    # A prompt is cut at 77 tokens, and "Wow!" and "'s" become other tokens together: without its target, it teaches nothing
    prompts = [prompt for prompt in prompts if where[prompt].any()]
    for target in args.target:
        if not any(positions(pipe.tokenizer, prompt, [target]).any() for prompt in prompts):
            fail(f"--target {target[:60]!r} is not found in any prompt's first 77 tokens")

    # -- pictures of the target, as latents: from a folder, or from the original model
    if args.pictures:
        files = sorted(f for f in args.pictures.glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if not files or len(args.target) > 1:
            fail(f"--pictures {args.pictures}: expected a folder of png, jpg or webp files, and one --target")
        pixels = torch.stack([read_any(f, size * scale) for f in files]).to(device)
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    else:
        check_coverage(prompts, recipe["images"], len(args.target))
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        latents = torch.cat([pipe(
            prompt_embeds=torch.stack([emb[prompts[j % len(prompts)]] for j in part]),
            negative_prompt_embeds=emb[""].expand(len(part), -1, -1), guidance_scale=recipe["guidance"],
            generator=[torch.Generator().manual_seed(args.seed * 1_000_003 + j) for j in part.tolist()], output_type="latent",
            num_inference_steps=recipe["sampling_steps"], height=size * scale, width=size * scale).images.float()
            for part in torch.arange(recipe["images"]).split(16)])  # fmt: skip

    # -- training
    watch = Watch()
    unet.set_attn_processor({n: watch if ".attn2." in n else p for n, p in unet.attn_processors.items()})
    trained = {n: p.requires_grad_() for n, p in unet.named_parameters() if re.search(TRAINED[args.train], n)}
    optimizer, log = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=1e-2, fused=True), []
    for step in tqdm(range(steps), "Forget-Me-Not"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        i = torch.randint(len(latents), (batch,), generator=g)
        which = torch.randint(len(prompts), (batch,), generator=g) if args.pictures else i % len(prompts)
        texts = [prompts[k] for k in which]
        t, eps = (f.to(device) for f in (torch.randint(len(alpha_bar), (batch,), generator=g),
                                         torch.randn(batch, *latents.shape[1:], generator=g)))  # fmt: skip
        xt = add_noise(latents[i], eps, alpha_bar[t].view(-1, 1, 1, 1))  # (B, 4, h, w)
        watch.seen.clear()
        unet(xt, t, torch.stack([emb[p] for p in texts]))
        loss = loss_attention(watch.seen, torch.stack([where[p] for p in texts]))
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
    about = {"format": "pt", "method": "forget_me_not", "base_model": args.model}
    atomic_save(out / "delta.safetensors", trained, metadata=about)
    return out


if __name__ == "__main__":
    args = parse_args()
    out = unlearn(args)
    size = ("--resolution", args.resolution) if args.resolution else ()
    sys.exit(evaluate_run("concept", args.model, out, "--seed", args.seed, "--concept-type", args.concept_type, *size,
                          "--target", *args.target, "--anchor", *args.anchor))  # fmt: skip
