"""DoCo: make a text-to-image diffusion model forget a concept, and keep the rest.

Paper: "Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient",
Wu et al., AAAI 2025. A discriminator learns to tell what the model denoises for the target concept from what the original model
denoises for an anchor concept; the model learns to fool it. Where the gradient of that conflicts with the gradient that keeps
the anchor, the conflicting component is projected out. (AdamW's step may still conflict; --project step projects it instead.)

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps                                          Eq. 1   noise an anchor picture
    eps_c  = M_init(x_t, anchor),   eps_c* = M(x_t, target)                          Eq. 5   two predictions, same x_t
    L_D = -log D(view(eps_c)) - log(1 - D(view(eps_c*)))                             Eq. 8   discriminator: anchor 1, target 0
    L_u = -log D(view(eps_c*))                                                       Eq. 8   generator, non-saturating form
    L_r = |eps - M(x_t, anchor)|^2                                                   Eq. 9   keep the anchor
    G   = G_u if G_u . G_r >= 0 else G_u - lam (G_u . G_r) / |G_r|^2 G_r             Eq. 10  the gradient of the UNet

Run it (the first line needs nothing but this repository; it uses the small model in emoji/sd):

    torchrun doco.py --target "Grumpy Cat" --anchor Cat
    torchrun doco.py --target twemoji --anchor emoji --concept-type style
    torchrun --nproc-per-node 2 doco.py --model CompVis/stable-diffusion-v1-4 --target Snoopy --anchor Dog
"""

import argparse
import json
import math
import os
import re
import signal
import sys
from itertools import zip_longest
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from tqdm import tqdm

from common import (
    REPO,
    agree,
    atomic_save,
    checkpoint_step,
    close,
    evaluate_run,
    fail,
    fingerprint,
    git_commit,
    is_embedded,
    load_or_fail,
    load_pipeline,
    lock_run_dir,
    make_run_dir,
    read_cache,
    run_name,
)
from discriminator import patchgan
from gradsurgery import flat_grad, lambda_projection, write_grad

# The paper's settings; D's rate is the released code's, five times that for styles. Its --scale_lr makes --lr 4.8e-5 of 6e-6.
PAPER = dict(steps=[2000, 1000], batch_size=8, lr=[6e-6, 1e-4], images=1000, guidance=6.0, sampling_steps=25)
# For toys like emoji/sd, with latents under 32x32: larger rates and fewer steps; these are per target, and twice for a style.
SMALL = dict(steps=[250, 50], batch_size=8, lr=[1.5e-4, 2e-4], images=64, guidance=6.0, sampling_steps=15)

TRAINED = {"kv": r"attn2\.to_[kv]\.", "xattn": r"attn2\.", "full": r""}  # --train: which UNet weights, by name

OBJECT_PROMPTS = ("{}", "a {}", "a photo of {}", "a photo of a {}", "a picture of a {}", "an emoji of {}", "an emoji of a {}",
                  "a drawing of a {}", "an image of {}", "the {}", "a cute {}", "{} on a white background")  # fmt: skip
# The models in emoji/ know emoji; of any other, two of twelve anchor images would be emoji that nobody asked for.
OTHER_PROMPTS = tuple(t for t in OBJECT_PROMPTS if "emoji" not in t)
STYLE_SUBJECTS = ("cat", "dog", "bird", "fish", "horse", "tiger", "rabbit", "frog", "butterfly", "rose", "sunflower", "house",
                  "car", "pizza", "banana", "apple", "face", "bear", "tree", "strawberry", "ghost", "owl")  # fmt: skip


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", nargs="+", required=True, help="what to forget; several are forgotten at once")
    p.add_argument("--anchor", nargs="+", required=True, help="what to draw instead: one for all, or one each")
    p.add_argument("--concept-type", choices=("object", "style"), default="object", help="style: the anchor is a medium")
    p.add_argument("--prompts", type=Path, help="text file of anchor prompts, one a line (default: built-in templates)")
    p.add_argument("--model", default=str(REPO / "emoji/sd"), help="Stable Diffusion 1.x/2.x: folder or hub id")
    p.add_argument("--init", type=Path, help="an earlier run folder to go on from; its targets stay forgotten")
    p.add_argument("--resolution", type=int, help="pixels of a side (default: the model's own)")
    p.add_argument("--steps", type=int, nargs="+", metavar="N", help="iterations, and how many of them train D only")
    p.add_argument("--batch-size", type=int, help="pictures per iteration, over all processes")
    p.add_argument("--lr", type=float, nargs="+", help="learning rates of the UNet, and of the discriminator")
    p.add_argument("--lam", type=float, default=1.0, help="lambda of Eq. 10: how much of the conflict is cut away")
    p.add_argument("--view", default="x0", help="what D sees: x0, or xprev:STRIDE (the paper: xprev:1)")
    p.add_argument("--retain", choices=("none", "l2", "cp"), default="cp", help="Table 3: nothing, adding L_r, or Eq. 10")
    p.add_argument("--project", choices=("gradient", "step"), default="gradient", help="what Eq. 10 is applied to: "
                   "the gradient, as in the paper, or the step that AdamW makes of it")  # fmt: skip
    p.add_argument("--train", choices=tuple(TRAINED), default="kv", help="cross-attention K and V, all of it, or the UNet")
    p.add_argument("--compile", action="store_true", help="torch.compile the UNet, which takes minutes at first")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, passes forward twice; same weights")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="run folder (default: runs/doco-TARGET)")
    p.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    p.add_argument("--save-pipeline", action="store_true", help="also write the whole pipeline folder to OUT/pipeline")
    return p.parse_args(argv)


# ---- 1. the method: pure functions of tensors -------------------------------------------------------------------


def add_noise(x0, noise, alpha_bar_t):
    """Eq. 1: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps. Latents (B, 4, h, w), alpha_bar_t (B, 1, 1, 1)."""
    return alpha_bar_t.sqrt() * x0 + (1 - alpha_bar_t).sqrt() * noise


def view_x0(xt, eps, alpha_bar_t):
    """What the released code shows D, and the default here: x0_hat = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t), (B, 4, h, w)."""
    return (xt - (1 - alpha_bar_t).sqrt() * eps) / alpha_bar_t.sqrt()


def view_xprev(xt, eps, alpha_bar_t, alpha_bar_prev, noise):
    """What the paper shows D (Eq. 8): x_{t-stride} by a DDPM step, (B, 4, h, w). eps moves it 80 to 1,200 times less."""
    a = alpha_bar_t / alpha_bar_prev  # the alphas of the skipped steps, multiplied
    mean = alpha_bar_prev.sqrt() * (1 - a) * view_x0(xt, eps, alpha_bar_t) + a.sqrt() * (1 - alpha_bar_prev) * xt
    return mean / (1 - alpha_bar_t) + ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - a)).sqrt() * noise


def loss_discriminator(disc, view_anchor, view_target):
    """Eq. 8, max over D: -log D(anchor) - log(1 - D(target)), for views (B, 4, h, w) and D = sigmoid(logits). 0-dim."""
    return F.softplus(-disc(view_anchor)).mean() + F.softplus(disc(view_target)).mean()


def loss_unlearn(disc, view_target):
    """Eq. 8, min over the UNet, as -log D(target) and not log(1 - D): the same fixed point without its vanishing gradient."""
    return F.softplus(-disc(view_target)).mean()


def swap(params, originals):
    """Turns the UNet into the original model, bitwise, and at the second call back: the few trained tensors trade places.

    Not while a graph is alive, nor inside an autocast: that keeps low-precision copies of the weights.
    """
    for p, o in zip(params, originals, strict=True):
        p.data, o.data = o.data, p.data


def flatten(params):
    """The values of some parameters as one vector (n,), a copy."""
    return torch.cat([p.detach().reshape(-1) for p in params])


def unflatten(params, flat):
    """Writes a vector (n,) back into the parameters, in place."""
    for p, values in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.data.copy_(values.view_as(p))


# ---- 2. prompts ---------------------------------------------------------------------------------------------------


def prompt_pairs(args):
    """[(anchor prompt, [target prompts])]: one entry per template and target, the targets taking turns.

    Taking turns matters: anchor image j belongs to entry j modulo their number, so that with fewer images than entries it is
    the last templates that go untrained, of every target, and never a whole target.
    """
    anchors = args.anchor * len(args.target) if len(args.anchor) == 1 else args.anchor
    if len(anchors) != len(args.target):
        fail(f"{len(args.target)} targets but {len(anchors)} anchors; give one --anchor for all, or one each")
    if args.prompts and not args.prompts.is_file():
        fail(f"--prompts {args.prompts}: no such file")
    lines = args.prompts and [line.strip() for line in args.prompts.read_text("utf-8", "replace").splitlines() if line.strip()]
    if lines == []:
        fail(f"--prompts {args.prompts} is empty; expected one anchor prompt a line")
    templates = OBJECT_PROMPTS if is_embedded(args.model) else OTHER_PROMPTS
    words = {a: re.compile(rf"(?<!\w){re.escape(a)}(?!\w)", re.IGNORECASE) for a in anchors}  # "man" is not in "woman"
    per_target = []
    for target, anchor in zip(args.target, anchors, strict=True):
        if not target.strip() or not anchor.strip():
            fail("--target and --anchor must not be empty")
        if target.lower() == anchor.lower():
            fail(f"--target and --anchor are both {target!r}; there is nothing to change")
        pairs = []
        if args.concept_type == "style":
            article = "an" if anchor[0].lower() in "aeiou" else "a"
            for p in lines or [f"{article} {anchor} of a {s}" for s in STYLE_SUBJECTS]:
                subject = p.removeprefix(f"{article} {anchor} of ")
                pairs.append((p, [f"{q}, in the style of {target}" for q in (p, subject)] + [f"in {target}'s style, {p}"]))
        else:
            fitting = [p for p in lines or [t.format(anchor) for t in templates] if words[anchor].search(p)]
            if lines and len(fitting) < len(lines) and (len(words) == 1 or not fitting):
                fail(f"--prompts: {min(set(lines) - set(fitting))!r} does not contain the anchor {anchor!r}, to be replaced")
            pairs = [(p, [words[anchor].sub(lambda _, t=target: t, p)]) for p in fitting]
        per_target.append(pairs)
    return [pair for turn in zip_longest(*per_target) for pair in turn if pair]


def check_coverage(pairs, n_images, n_targets, warn=True):
    """Says how many entries of prompt_pairs get no image; with fewer images than targets, that is an error."""
    if n_images < n_targets:
        fail(f"{n_targets} targets but {n_images} anchor images; give fewer --target at once, or raise --steps or --batch-size")
    if n_images < len(pairs) and warn:
        tqdm.write(f"warning: {len(pairs) - n_images} of {len(pairs)} pairs of prompt and target are not trained, for there "
                   f"are {n_images} anchor images; every target keeps its first prompts", file=sys.stderr)  # fmt: skip


# ---- 3. checkpoints and anchor images ---------------------------------------------------------------------------


def save_checkpoint(path, step, trained, disc, optimizers):
    """All that the next iteration needs, in one file. Random draws need nothing: they follow (seed, step)."""
    tensors = {f"unet/{n}": p for n, p in trained.items()} | {f"disc/{n}": t for n, t in disc.state_dict().items()}
    for k, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{k}/{i}/{moment}": t for moment, t in state.items()}
    atomic_save(path, tensors, metadata={"step": str(step)})


def load_checkpoint(path, trained, disc, optimizers):
    """Puts everything back and returns the number of iterations done."""
    tensors = load_file(path)
    for n, p in trained.items():
        p.data.copy_(tensors.pop(f"unet/{n}"))
    disc.load_state_dict({n: tensors.pop(f"disc/{n}") for n in disc.state_dict()})
    states = [{} for _ in optimizers]
    for (k, i, moment), t in ((name.split("/"), t) for name, t in tensors.items()):
        states[int(k)].setdefault(int(i), {})[moment] = t
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return checkpoint_step(path)


def sample_anchor_latents(pipe, emb, pairs, n, size, recipe, seed, rank=0, world=1):
    """n images of the anchor prompts from the original model, as latents (n, 4, size, size); the ranks share the work.

    DPM-Solver++ with recipe["sampling_steps"] steps and guidance recipe["guidance"], as in the released code, which saves
    them as JPEG in between. Image j follows (seed, j) and entry j of the pairs, whatever the number of ranks.
    """
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pixels, device = size * pipe.vae_scale_factor, pipe.device
    latents = torch.zeros(n, pipe.unet.config.in_channels, size, size, device=device)
    chunks = [range(i, min(i + 16, n)) for i in range(0, n, 16)]
    for chunk in tqdm(chunks[rank::world], f"{n} anchor images", disable=rank > 0):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents[list(chunk)] = pipe(
                prompt_embeds=torch.stack([emb[pairs[j % len(pairs)][0]] for j in chunk]),
                negative_prompt_embeds=emb[""].expand(len(chunk), -1, -1), guidance_scale=recipe["guidance"],
                generator=[torch.Generator().manual_seed(seed * 1_000_003 + j) for j in chunk], output_type="latent",
                num_inference_steps=recipe["sampling_steps"], height=pixels, width=pixels,
            ).images.float()  # fmt: skip
    if world > 1:
        dist.all_reduce(latents)  # each rank has filled its own rows
    return latents


def save_pipeline(args, out):
    """OUT/pipeline: the whole model with the unlearned weights, for tools that take folders. After the weights are saved."""
    pipe = load_pipeline(args.model, (StableDiffusionPipeline,), safety_checker=True, dtype=torch.float32)
    pipe.unet.load_state_dict(load_file(out / "delta.safetensors"), strict=False)
    atomic_save(out / "pipeline", pipe=pipe)


# ---- 4. the run ---------------------------------------------------------------------------------------------------


def unlearn(args):
    """Runs DoCo and returns the run folder (None on all ranks but the first). Bad input ends it with one line."""
    # -- processes (torchrun sets the variables) and device: bf16 on a GPU; fp32 on a CPU, where N processes equal one
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mps = torch.backends.mps.is_available() and world == 1  # no process group for several of these
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    amp = lambda: torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")  # noqa: E731

    # -- check what can be checked before anything is loaded
    pairs = prompt_pairs(args)
    if not (view := re.fullmatch(r"(x0)|xprev(?::([1-9]\d{0,2}))?", args.view)):
        fail(f"--view {args.view}: expected x0, xprev or xprev:STRIDE with a stride of 1 to 999")
    if args.project == "step" and args.retain != "cp":
        fail(f"--project step goes with --retain cp, not with --retain {args.retain}")
    if args.init and not (args.init / "delta.safetensors").is_file():
        fail(f"--init {args.init}: no delta.safetensors there; expected the folder of a finished run")
    stride = int(view[2] or 1)
    out = args.out or Path("runs") / run_name("doco", args.target)
    finished, checkpoint = out / "delta.safetensors", out / "checkpoint.safetensors"
    make_run_dir(out)
    begun = load_or_fail(checkpoint, lambda: checkpoint_step(checkpoint))
    agree({finished.name: finished.exists(), checkpoint.name: begun}, out)
    if (finished.exists() or begun is not None) and not args.resume:
        fail(f"{out} already holds a run; choose another --out, or --resume one that was stopped")
    lock = lock_run_dir(out) if rank == 0 else None  # noqa: F841, until this function returns

    # -- the original model, and the recipe for its size
    pipe = load_pipeline(args.model, (StableDiffusionPipeline,), dtype=torch.float32).to(device)
    unet, scale = pipe.unet.requires_grad_(False).eval(), pipe.vae_scale_factor
    alpha_bar = pipe.scheduler.alphas_cumprod.to(device)  # (1000,), the a_t of the paper
    if pipe.scheduler.config.prediction_type != "epsilon":
        fail(f"--model {args.model} predicts {pipe.scheduler.config.prediction_type}; only epsilon models are supported")
    style, small = args.concept_type == "style", unet.config.sample_size < 32
    recipe = SMALL | {"steps": [n * len(args.target) * (1 + style) for n in SMALL["steps"]]} if small else PAPER
    steps, warmup = [*(args.steps or recipe["steps"]), (args.steps or [0])[0] * recipe["steps"][1] // recipe["steps"][0]][:2]
    lr, disc_lr = [*(args.lr or recipe["lr"][:1]), recipe["lr"][1] * (5 if style else 1)][:2]
    batch = recipe["batch_size"] if args.batch_size is None else args.batch_size
    size = (args.resolution or unet.config.sample_size * scale) // scale  # side of a latent
    if batch < 1 or batch % world:
        fail(f"--batch-size {batch} cannot be split over {world} processes; take a positive multiple of {world}")
    if not 0 <= warmup <= steps > 0 or len(args.steps or []) > 2:
        fail(f"--steps {steps} {warmup}: expected TOTAL >= WARMUP >= 0")
    if not (lr > 0 and disc_lr > 0) or len(args.lr or []) > 2:
        fail(f"--lr {lr:g} {disc_lr:g}: expected one or two positive rates")
    if args.resolution and (args.resolution % scale or size < 8):
        fail(f"--resolution {args.resolution}: expected a multiple of {scale}, at least {8 * scale}, as this model needs")
    n_images = min(recipe["images"], steps * batch)
    check_coverage(pairs, n_images, len(args.target), warn=rank == 0)

    # -- text embeddings, once
    texts = list(dict.fromkeys(["", *(a for a, _ in pairs), *(t for _, ts in pairs for t in ts)]))
    with torch.no_grad():
        emb = {text: pipe.encode_prompt(text, device, 1, False)[0][0] for text in texts}  # (77, D) each

    # -- a run may go on with the settings that it began with, and with the same contents of what its flags name
    settings = vars(args) | {"steps": [steps, warmup], "batch_size": batch, "lr": [lr, disc_lr], "resolution": size * scale}
    resumable = ("resume", "out", "save_pipeline", "gradient_checkpointing")  # these may change
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if k not in resumable}
    settings["contents of --model"] = fingerprint(unet, pipe.text_encoder, alpha_bar)
    settings["contents of --prompts"] = fingerprint(pairs)
    if args.init:
        settings["contents of --init"] = fingerprint(args.init / "delta.safetensors")
    agree({k: v for k, v in settings.items() if k.startswith("contents of")}, out)
    record = out / "args.json"
    if (begun is not None or finished.exists()) and record.exists():
        then = load_or_fail(record, lambda: json.loads(record.read_text())["settings"])
        if changed := [k for k in settings if settings[k] != then.get(k)]:
            fail(f"{out} was begun with other settings ({', '.join(changed)}); repeat them or choose another --out")
    if finished.exists():  # training had finished; its evaluation, or the writing of its pipeline, was interrupted
        if rank == 0 and args.save_pipeline and not (out / "pipeline").exists():
            save_pipeline(args, out)
        return close(rank, world, out)
    if rank == 0:
        print(f"{'small-model' if small else 'paper'} recipe: {steps} iterations, the first {warmup} for D only, "
              f"batch {batch}, lr {lr:g} and {disc_lr:g}, view {args.view}, retain {args.retain}, lam {args.lam:g}")
        about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "commit": git_commit(), "processes": world}
        atomic_save(record, text=json.dumps(about | {"settings": settings}, indent=1))

    # -- anchor images: sampled once; a stopped run finds its own again. The first rank reads them and sends them to the others
    cache, key = out / "anchor_latents.safetensors", fingerprint(
        settings["contents of --model"], [a for a, _ in pairs], args.seed, size, n_images, recipe["guidance"],
        recipe["sampling_steps"])  # fmt: skip
    latents = read_cache(cache, "latents", key, rank, world, device)  # (n_images, 4, h, w)
    if latents is None:
        latents = sample_anchor_latents(pipe, emb, pairs, n_images, size, recipe, args.seed, rank, world)
        if rank == 0:
            atomic_save(cache, {"latents": latents}, metadata={"key": key})
    del pipe  # the UNet stays

    # -- what is trained, and its original values: this copy is all that the frozen model costs
    trained = {n: p.requires_grad_() for n, p in unet.named_parameters() if re.search(TRAINED[args.train], n)}
    params = list(trained.values())
    originals = [p.detach().clone() for p in params]
    if args.init:
        earlier = load_or_fail(args.init / "delta.safetensors", lambda: load_file(args.init / "delta.safetensors"))
        if any(n not in trained or t.shape != trained[n].shape for n, t in earlier.items()):
            fail(f"--init {args.init} trained weights that are not trained here; repeat its --model and --train")
        unet.load_state_dict(earlier, strict=False)
    torch.manual_seed(args.seed)  # the same discriminator on every rank
    disc = patchgan(size, unet.config.in_channels).to(device)
    # As in the released code: weight decay 1e-2 for the UNet, betas of 0.5 and 0.999 for D. The paper names no optimizer.
    opt_unet = torch.optim.AdamW(params, lr=lr, weight_decay=1e-2, fused=True)
    opt_disc = torch.optim.Adam(disc.parameters(), lr=disc_lr, betas=(0.5, 0.999), fused=True)
    start, log = 0, []
    if begun is not None:
        start = load_or_fail(checkpoint, lambda: load_checkpoint(checkpoint, trained, disc, (opt_unet, opt_disc)))
        log = [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if row["step"] < start]

    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        unet.compile()

    def predict(xt, t, prompts):  # (B, 4, h, w), (B,), B texts -> eps (B, 4, h, w)
        with amp():
            return unet(xt, t, torch.stack([emb[p] for p in prompts])).sample.float()

    # -- the training loop; on SIGTERM, it saves at the next tenth iteration, on all ranks at once, and exits
    asked, conflicts = [], []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    bar = tqdm(range(start, steps), "unlearning", initial=start, total=steps, disable=rank > 0)
    for step in bar:
        # Draws for the whole batch on every rank, from (seed, step) alone; each rank keeps its slice: N processes compute
        # what one does, and a resumed run needs no saved random state.
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # 32 bits count
        mine, train_unet = slice(rank * batch // world, (rank + 1) * batch // world), step >= warmup
        i, i_r = torch.randint(n_images, (2, batch), generator=g)[:, mine].tolist()
        t, t_r = torch.randint(len(alpha_bar), (2, batch), generator=g)[:, mine].to(device)
        eps, eps_r, fresh = torch.randn(3, batch, *latents.shape[1:], generator=g)[:, mine].to(device)
        anchor_prompts, wordings = zip(*[pairs[k % len(pairs)] for k in i], strict=True)
        target_prompts = [w[step % len(w)] for w in wordings]
        logging = (step + 1) % 10 == 0 or step + 1 == steps

        # Eq. 9: what keeps the anchor (other images, other noise, the anchor prompt). First, so that its graph is gone early.
        if train_unet and args.retain != "none":
            x_r = add_noise(latents[i_r], eps_r, alpha_bar[t_r].view(-1, 1, 1, 1))  # (B, 4, h, w)
            loss_r = F.mse_loss(predict(x_r, t_r, [pairs[k % len(pairs)][0] for k in i_r]), eps_r)
            g_r = flat_grad(loss_r, params)  # (n,)

        # Eq. 1 and 5: on one noisy anchor image, the original model predicts for the anchor, the trained one for the target
        a_t = alpha_bar[t].view(-1, 1, 1, 1)
        a_prev = torch.where(t < stride, 1.0, alpha_bar[(t - stride).clamp(min=0)]).view(-1, 1, 1, 1)  # no noise before 0
        xt = add_noise(latents[i], eps, a_t)  # (B, 4, h, w)
        see = lambda e: view_x0(xt, e, a_t) if view[1] else view_xprev(xt, e, a_t, a_prev, fresh)  # noqa: B023, E731
        swap(params, originals)
        with torch.no_grad():
            view_anchor = see(predict(xt, t, anchor_prompts))
        swap(params, originals)
        with torch.set_grad_enabled(train_unet):
            view_target = see(predict(xt, t, target_prompts))

        # Eq. 8, the UNet's half: fool D. autograd.grad reaches through D and leaves nothing on it (the released code does).
        if train_unet:
            loss_u = loss_unlearn(disc, view_target)
            grad, stats = flat_grad(loss_u, params), {}  # (n,): G_u
            if args.retain != "none":
                projected, stats = lambda_projection(grad, g_r, args.lam)  # Eq. 10
                conflicts.append(stats["conflict"])
            if args.retain == "l2":
                grad = grad + g_r
            elif args.retain == "cp" and args.project == "gradient":
                grad = projected
            watch = stats and (logging or args.project == "step")
            old = flatten(params) if watch else None  # (n,)
            write_grad(params, grad)
            opt_unet.step()
            opt_unet.zero_grad()
            # AdamW rescales the gradient entry by entry and adds momentum, so that the step need not be orthogonal to G_r even
            # where G is. With --project step, Eq. 10 is applied to the step itself.
            if watch:
                move = old - flatten(params)  # (n,): minus the step; it has a gradient's sign
                kept, of_step = lambda_projection(move, g_r, args.lam)  # Eq. 10
                stats |= {"cos_step": of_step["cos"]}
                if args.project == "step":
                    unflatten(params, old - kept)

        # Eq. 8, D's half: distinguish the anchor's views from the target's, as they were before the step above
        loss_d = loss_discriminator(disc, view_anchor, view_target.detach())
        write_grad(disc.parameters(), flat_grad(loss_d, disc.parameters()))
        opt_disc.step()

        # -- every tenth iteration: log, of the whole batch
        if logging:
            with torch.no_grad():
                hits = (disc(view_anchor) > 0).float().mean() + (disc(view_target) < 0).float().mean()
            row = {"loss_d": loss_d, "disc_acc": hits / 2}  # means over this rank's part of the batch, and then over the ranks
            row |= {"loss_u": loss_u} if train_unet else {}
            row |= {"loss_r": loss_r} if train_unet and stats else {}
            means = torch.stack([v.detach() for v in row.values()])
            if world > 1:
                dist.all_reduce(means)
            log.append({"step": step} | dict(zip(row, (means / world).tolist(), strict=True)))
            if train_unet:
                log[-1] |= {"norm_g": grad.norm().item()} | {k: v.item() for k, v in stats.items()}
                log[-1] |= {"conflict": torch.stack(conflicts).mean().item()} if conflicts else {}
                conflicts = []  # the fraction of the iterations since the last row
            bar.set_postfix({k: f"{log[-1][k]:.3f}" for k in ("loss_d", "disc_acc", "loss_u", "cos") if k in log[-1]})
            if not all(map(math.isfinite, log[-1].values())):
                fail(f"not finite at iteration {step}: {log[-1]}; lower --lr and choose another --out")
            end = torch.tensor(float(bool(asked)), device=device)
            if world > 1:
                dist.all_reduce(end)
            if rank == 0:
                atomic_save(out / "log.jsonl", text="".join(json.dumps(row) + "\n" for row in log))
                if end or (step + 1) % (10 * max(1, steps // 200)) == 0:
                    save_checkpoint(checkpoint, step + 1, trained, disc, (opt_unet, opt_disc))
            if end:
                if world > 1:
                    dist.barrier()  # until the first has saved
                fail(f"asked to end (SIGTERM) and saved after {step + 1} iterations; continue with --resume")
    signal.signal(signal.SIGTERM, before)

    # -- save: the trained tensors under their UNet names; plain diffusers loads them
    if rank == 0:
        atomic_save(finished, trained, metadata={"format": "pt", "method": "doco", "base_model": args.model})
        checkpoint.unlink(missing_ok=True)
        print(f"\nload it with:\n{loading_lines(args, finished)}\n")
        if args.save_pipeline:
            save_pipeline(args, out)
    return close(rank, world, out)


def loading_lines(args, file):
    """The lines of Python that load the result in plain diffusers and sample the target."""
    return f"""
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

pipe = StableDiffusionPipeline.from_pretrained({args.model!r}, dtype=torch.float32)
pipe.unet.load_state_dict(load_file({str(file)!r}), strict=False)
pipe({args.target[0]!r}).images[0].save("after.png")
"""


if __name__ == "__main__":
    args = parse_args()
    if out := unlearn(args):  # evaluated in a separate process: eval.py knows how, this file knows DoCo
        size = ("--resolution", args.resolution) if args.resolution else ()
        sys.exit(evaluate_run("concept", args.model, out, "--seed", args.seed, "--concept-type", args.concept_type, *size,
                              "--target", *args.target, "--anchor", *args.anchor))  # fmt: skip
