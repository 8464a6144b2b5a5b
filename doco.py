"""DoCo: make a text-to-image diffusion model forget a concept, and keep the rest.

Paper: "Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient",
Wu et al., AAAI 2025. A discriminator learns to tell what the model denoises for the target concept from what the original model
denoises for an anchor concept; the model learns to fool it, and takes only that part of a step that does not hurt the anchor.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps                                          Eq. 1   noise an anchor picture
    eps_c  = M_init(x_t, anchor),   eps_c* = M(x_t, target)                          Eq. 5   two predictions, same x_t
    L_D = -log D(view(eps_c)) - log(1 - D(view(eps_c*)))                             Eq. 8   discriminator: anchor 1, target 0
    L_u = -log D(view(eps_c*))                                                       Eq. 8   generator, non-saturating form
    L_r = |eps - M(x_t, anchor)|^2                                                   Eq. 9   keep the anchor
    G   = G_u if G_u . G_r >= 0 else G_u - lam (G_u . G_r) / |G_r|^2 G_r             Eq. 10  the step that is taken

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
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from discriminator import patchgan
from gradsurgery import flat_grad, lambda_projection, write_grad

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder go unnoticed
    fcntl = None

HERE = Path(__file__).resolve().parent

# The paper's settings; D's rate is the released code's, five times that for styles. Its --scale_lr makes --lr 4.8e-5 of 6e-6.
PAPER = dict(steps=[2000, 1000], batch_size=8, lr=[6e-6, 1e-4], images=1000, guidance=6.0, sampling_steps=25)
# For toys like emoji/sd, with latents under 32x32: larger rates and fewer steps; these are per target, and twice for a style.
SMALL = dict(steps=[250, 50], batch_size=8, lr=[1.5e-4, 2e-4], images=64, guidance=6.0, sampling_steps=15)

TRAINED = {"kv": r"attn2\.to_[kv]\.", "xattn": r"attn2\.", "full": r""}  # --train: which UNet weights, by name

OBJECT_PROMPTS = ("{}", "a {}", "a photo of {}", "a photo of a {}", "a picture of a {}", "an emoji of {}", "an emoji of a {}",
                  "a drawing of a {}", "an image of {}", "the {}", "a cute {}", "{} on a white background")  # fmt: skip
STYLE_SUBJECTS = ("cat", "dog", "bird", "fish", "horse", "tiger", "rabbit", "frog", "butterfly", "rose", "sunflower", "house",
                  "car", "pizza", "banana", "apple", "face", "bear", "tree", "strawberry", "ghost", "owl")  # fmt: skip


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", nargs="+", required=True, help="what to forget; several are forgotten at once")
    p.add_argument("--anchor", nargs="+", required=True, help="what to draw instead: one for all, or one each")
    p.add_argument("--concept-type", choices=("object", "style"), default="object", help="style: the anchor is a medium")
    p.add_argument("--prompts", type=Path, help="text file of anchor prompts, one a line (default: built-in templates)")
    p.add_argument("--model", default=str(HERE / "emoji/sd"), help="Stable Diffusion 1.x/2.x: folder or hub id")
    p.add_argument("--init", type=Path, help="an earlier run folder to go on from; its targets stay forgotten")
    p.add_argument("--resolution", type=int, help="pixels of a side (default: the model's own)")
    p.add_argument("--steps", type=int, nargs="+", metavar="N", help="iterations, and how many of them train D only")
    p.add_argument("--batch-size", type=int, help="pictures per iteration, over all processes")
    p.add_argument("--lr", type=float, nargs="+", help="learning rates of the UNet, and of the discriminator")
    p.add_argument("--lam", type=float, default=1.0, help="lambda of Eq. 10: how much of the conflict is cut away")
    p.add_argument("--view", default="x0", help="what D sees: x0, or xprev:STRIDE (the paper: xprev:1)")
    p.add_argument("--retain", choices=("none", "l2", "cp"), default="cp", help="Table 3: nothing, adding L_r, or Eq. 10")
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


# ---- 2. prompts ---------------------------------------------------------------------------------------------------


def prompt_pairs(args):
    """[(anchor prompt, [target prompts])]: one entry per template and target. Errors name the flag that mends them."""
    anchors = args.anchor * len(args.target) if len(args.anchor) == 1 else args.anchor
    if len(anchors) != len(args.target):
        stop(f"{len(args.target)} targets but {len(anchors)} anchors; give one --anchor for all, or one each")
    if args.prompts and not args.prompts.is_file():
        stop(f"--prompts {args.prompts}: no such file")
    lines = args.prompts and [line.strip() for line in args.prompts.read_text("utf-8", "replace").splitlines() if line.strip()]
    if lines == []:
        stop(f"--prompts {args.prompts} is empty; expected one anchor prompt a line")
    words = {a: re.compile(rf"(?<!\w){re.escape(a)}(?!\w)", re.IGNORECASE) for a in anchors}  # "man" is not in "woman"
    pairs = []
    for target, anchor in zip(args.target, anchors, strict=True):
        if not target.strip() or not anchor.strip():
            stop("--target and --anchor must not be empty")
        if target.lower() == anchor.lower():
            stop(f"--target and --anchor are both {target!r}; there is nothing to change")
        if args.concept_type == "style":
            article = "an" if anchor[0].lower() in "aeiou" else "a"
            for p in lines or [f"{article} {anchor} of a {s}" for s in STYLE_SUBJECTS]:
                subject = p.removeprefix(f"{article} {anchor} of ")
                pairs.append((p, [f"{q}, in the style of {target}" for q in (p, subject)] + [f"in {target}'s style, {p}"]))
        else:
            fitting = [p for p in lines or [t.format(anchor) for t in OBJECT_PROMPTS] if words[anchor].search(p)]
            if lines and len(fitting) < len(lines) and (len(words) == 1 or not fitting):
                stop(f"--prompts: {min(set(lines) - set(fitting))!r} does not contain the anchor {anchor!r}, to be replaced")
            pairs += [(p, [words[anchor].sub(lambda _, t=target: t, p)]) for p in fitting]
    return pairs


# ---- 3. plumbing: errors, files ---------------------------------------------------------------------------------


def stop(message):
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")  # a rival that uses this file speaks for itself


def save_whole(path, tensors=None, text=None, pipe=None, metadata=None):
    """Writes a file or pipeline folder under a temporary name, then renames it: nobody sees a half, a full disk spoils none."""
    temporary = Path(f"{path}.tmp")
    try:
        if pipe is not None:
            pipe.save_pretrained(temporary)
            shutil.rmtree(path, ignore_errors=True)  # only now: a rename does not replace a folder
        elif text is not None:
            temporary.write_text(text, encoding="utf-8")
        else:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        stop(f"{path} cannot be written ({e}); make room there and begin again, or go on with --resume")


def claim(folder):
    """Keeps other runs out of a run folder while its result lives; the lock goes with the process, however that ends."""
    lock = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(f"{folder} is in use by another run; choose another --out")
    return lock


def load_pipeline(model, **kwargs):
    """Any Stable Diffusion folder or hub id, with or without fp16 variant and safety checker; safetensors only."""
    if os.path.exists(model) and not (Path(model) / "model_index.json").is_file():
        stop(f"--model {model}: no model_index.json there; expected a diffusers pipeline folder or a hub id")
    errors = []
    for variant in (None, "fp16"):
        try:
            return StableDiffusionPipeline.from_pretrained(model, variant=variant, use_safetensors=True, **kwargs)
        except Exception as e:  # the hub client raises a dozen types: missing folder, no network, pickle-only weights
            errors.append(str(e).splitlines()[0])
    for pickled in (f for f in Path(model).rglob("*.bin") if not [*f.parent.glob("*.safetensors")]):
        stop(f"--model {model}: {pickled.name} is a pickle, which may run any code; save the model as .safetensors first")
    stop(f"--model {model} cannot be loaded (a Stable Diffusion folder or hub id with .safetensors weights?): {errors[0]}")


def read_back(path, read):
    """read(), but a truncated or foreign file, which raises half a dozen types, ends the run with one line."""
    try:
        return read()
    except Exception as e:
        stop(f"{path} is damaged or of another run ({type(e).__name__}: {str(e).splitlines()[0]}); delete it to begin anew")


def save_checkpoint(path, step, trained, disc, optimizers):
    """All that the next iteration needs, in one file. Random draws need nothing: they follow (seed, step)."""
    tensors = {f"unet/{n}": p for n, p in trained.items()} | {f"disc/{n}": t for n, t in disc.state_dict().items()}
    for k, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{k}/{i}/{moment}": t for moment, t in state.items()}
    save_whole(path, tensors, metadata={"step": str(step)})


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
    with safe_open(path, "pt") as f:
        return int(f.metadata()["step"])


# ---- 4. the run ---------------------------------------------------------------------------------------------------


def unlearn(args):
    """Runs DoCo and returns the run folder (None on all ranks but the first). Bad input ends it with one line."""
    # -- processes (torchrun sets the variables) and device: bf16 on a GPU; fp32 on a CPU, where N processes equal one
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    amp = lambda: torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")  # noqa: E731

    # -- check what can be checked before anything is loaded
    pairs = prompt_pairs(args)
    if not (view := re.fullmatch(r"(x0)|xprev(?::([1-9]\d{0,2}))?", args.view)):
        stop(f"--view {args.view}: expected x0, xprev or xprev:STRIDE with a stride of 1 to 999")
    stride = int(view[2] or 1)
    out = args.out or Path("runs") / ("doco-" + re.sub(r"[^a-z0-9]+", "-", "-".join(args.target).lower()).strip("-"))
    finished, checkpoint = out / "delta.safetensors", out / "checkpoint.safetensors"
    if (finished.exists() or checkpoint.exists()) and not args.resume:
        stop(f"{out} already holds a run; choose another --out, or --resume one that was stopped")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.jsonl").touch()
    except OSError as e:
        stop(f"--out {out} cannot be written: {e.strerror}")
    lock = claim(out) if rank == 0 else None  # noqa: F841, until this function returns

    # -- the original model, and the recipe for its size
    pipe = load_pipeline(args.model, safety_checker=None, requires_safety_checker=False, dtype=torch.float32).to(device)
    unet, scale = pipe.unet.requires_grad_(False).eval(), pipe.vae_scale_factor
    alpha_bar = pipe.scheduler.alphas_cumprod.to(device)  # (1000,), the a_t of the paper
    if pipe.scheduler.config.prediction_type != "epsilon":
        stop(f"--model {args.model} predicts {pipe.scheduler.config.prediction_type}; only epsilon models are supported")
    style, small = args.concept_type == "style", unet.config.sample_size < 32
    recipe = SMALL | {"steps": [n * len(args.target) * (1 + style) for n in SMALL["steps"]]} if small else PAPER
    steps, warmup = [*(args.steps or recipe["steps"]), (args.steps or [0])[0] * recipe["steps"][1] // recipe["steps"][0]][:2]
    lr, disc_lr = [*(args.lr or recipe["lr"][:1]), recipe["lr"][1] * (5 if style else 1)][:2]
    batch = recipe["batch_size"] if args.batch_size is None else args.batch_size
    size = (args.resolution or unet.config.sample_size * scale) // scale  # side of a latent
    if batch < 1 or batch % world:
        stop(f"--batch-size {batch} cannot be split over {world} processes; take a positive multiple of {world}")
    if not 0 <= warmup <= steps > 0 or len(args.steps or []) > 2:
        stop(f"--steps {steps} {warmup}: expected TOTAL >= WARMUP >= 0")
    if not (lr > 0 and disc_lr > 0) or len(args.lr or []) > 2:
        stop(f"--lr {lr:g} {disc_lr:g}: expected one or two positive rates")
    if args.resolution and (args.resolution % scale or size < 8):
        stop(f"--resolution {args.resolution}: expected a multiple of {scale}, at least {8 * scale}, as this model needs")
    settings = vars(args) | {"steps": [steps, warmup], "batch_size": batch, "lr": [lr, disc_lr], "resolution": size * scale}
    free = ("resume", "out", "save_pipeline", "gradient_checkpointing")  # may change when a run is resumed
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if k not in free}
    if (out / "args.json").exists() and (then := json.loads((out / "args.json").read_text())["settings"]) != settings:
        changed = ", ".join(k for k in settings if settings[k] != then.get(k))
        stop(f"{out} was begun with other settings ({changed}); repeat them or choose another --out")
    if finished.exists():
        return out if rank == 0 else None  # it was stopped while it was scored
    if rank == 0:
        print(f"{'small-model' if small else 'paper'} recipe: {steps} iterations, the first {warmup} for D only, "
              f"batch {batch}, lr {lr:g} and {disc_lr:g}, view {args.view}, retain {args.retain}, lam {args.lam:g}")
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
        about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "commit": commit, "processes": world}
        save_whole(out / "args.json", text=json.dumps(about | {"settings": settings}, indent=1))

    # -- text embeddings, once
    texts = list(dict.fromkeys(["", *(a for a, _ in pairs), *(t for _, ts in pairs for t in ts)]))
    with torch.no_grad():
        emb = {text: pipe.encode_prompt(text, device, 1, False)[0][0] for text in texts}  # (77, D) each

    # -- anchor pictures from the original model, straight as latents (no JPEG as in the released code); ranks share the work
    n_images, cache = min(recipe["images"], steps * batch), out / "anchor_latents.safetensors"
    if cache.exists():
        latents = read_back(cache, lambda: load_file(cache)["latents"]).to(device)  # (n_images, 4, h, w)
    else:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        latents = torch.zeros(n_images, unet.config.in_channels, size, size, device=device)
        parts = [range(i, min(i + 16, n_images)) for i in range(0, n_images, 16)]  # the same for any number of ranks
        for part in tqdm(parts[rank::world], f"{n_images} anchor pictures", disable=rank > 0):
            with torch.no_grad(), amp():
                latents[list(part)] = pipe(
                    prompt_embeds=torch.stack([emb[pairs[j % len(pairs)][0]] for j in part]),
                    negative_prompt_embeds=emb[""].expand(len(part), -1, -1), guidance_scale=recipe["guidance"],
                    generator=[torch.Generator().manual_seed(args.seed * 1_000_003 + j) for j in part], output_type="latent",
                    num_inference_steps=recipe["sampling_steps"], height=size * scale, width=size * scale,
                ).images.float()  # fmt: skip
        if world > 1:
            dist.all_reduce(latents)  # each rank has filled its own rows
        if rank == 0:
            save_whole(cache, {"latents": latents})
    del pipe  # the UNet stays

    # -- what is trained, and its original values: this copy is all that the frozen model costs
    trained = {n: p.requires_grad_() for n, p in unet.named_parameters() if re.search(TRAINED[args.train], n)}
    params = list(trained.values())
    originals = [p.detach().clone() for p in params]
    if args.init:
        if not (args.init / "delta.safetensors").is_file():
            stop(f"--init {args.init}: no delta.safetensors there; expected the folder of a finished run")
        earlier = read_back(args.init / "delta.safetensors", lambda: load_file(args.init / "delta.safetensors"))
        if any(n not in trained or t.shape != trained[n].shape for n, t in earlier.items()):
            stop(f"--init {args.init} trained weights that are not trained here; repeat its --model and --train")
        unet.load_state_dict(earlier, strict=False)
    torch.manual_seed(args.seed)  # the same discriminator on every rank
    disc = patchgan(size, unet.config.in_channels).to(device)
    opt_unet = torch.optim.AdamW(params, lr=lr, weight_decay=1e-2, fused=True)
    opt_disc = torch.optim.Adam(disc.parameters(), lr=disc_lr, betas=(0.5, 0.999), fused=True)
    start, log, conflicts = 0, [], 0
    if checkpoint.exists():
        start = read_back(checkpoint, lambda: load_checkpoint(checkpoint, trained, disc, (opt_unet, opt_disc)))
        log = [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if row["step"] < start]

    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        unet.compile()

    def predict(xt, t, prompts):  # (B, 4, h, w), (B,), B texts -> eps (B, 4, h, w)
        with amp():
            return unet(xt, t, torch.stack([emb[p] for p in prompts])).sample.float()

    # -- the training loop; asked to end (SIGTERM), it saves at the next tenth iteration, on all ranks at once
    asked = []
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

        # Eq. 9: what keeps the anchor (other pictures, other noise, the anchor prompt). First, so that its graph is gone early.
        if train_unet and args.retain != "none":
            x_r = add_noise(latents[i_r], eps_r, alpha_bar[t_r].view(-1, 1, 1, 1))  # (B, 4, h, w)
            loss_r = F.mse_loss(predict(x_r, t_r, [pairs[k % len(pairs)][0] for k in i_r]), eps_r)
            g_r = flat_grad(loss_r, params)  # (n,)

        # Eq. 1 and 5: on one noisy anchor picture, the original model predicts for the anchor, the trained one for the target
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
                grad, conflicts = projected if args.retain == "cp" else grad + g_r, conflicts + stats["conflict"]
            write_grad(params, grad)
            opt_unet.step()
            opt_unet.zero_grad()

        # Eq. 8, D's half: tell the anchor's views from the target's, as they were before the step above
        loss_d = loss_discriminator(disc, view_anchor, view_target.detach())
        write_grad(disc.parameters(), flat_grad(loss_d, disc.parameters()))
        opt_disc.step()

        # -- every tenth iteration: log, the only place that waits for the device
        if (step + 1) % 10 == 0 or step + 1 == steps:
            with torch.no_grad():
                hits = (disc(view_anchor) > 0).float().mean() + (disc(view_target) < 0).float().mean()
            log.append({"step": step, "loss_d": loss_d.item(), "disc_acc": hits.item() / 2})
            if train_unet:
                log[-1] |= {"loss_u": loss_u.item(), "norm_g": grad.norm().item()} | {k: v.item() for k, v in stats.items()}
                log[-1] |= {"loss_r": loss_r.item(), "conflict": float(conflicts) / 10} if stats else {}
                conflicts = 0  # a share of the last ten
            bar.set_postfix({k: f"{log[-1][k]:.3f}" for k in ("loss_d", "disc_acc", "loss_u", "cos") if k in log[-1]})
            if not all(map(math.isfinite, log[-1].values())):
                stop(f"not finite at iteration {step}: {log[-1]}; lower --lr and choose another --out")
            end = torch.tensor(float(bool(asked)), device=device)
            if world > 1:
                dist.all_reduce(end)
            if rank == 0:
                save_whole(out / "log.jsonl", text="".join(json.dumps(row) + "\n" for row in log))
                if end or (step + 1) % (10 * max(1, steps // 200)) == 0:
                    save_checkpoint(checkpoint, step + 1, trained, disc, (opt_unet, opt_disc))
            if end:
                if world > 1:
                    dist.barrier()  # until the first has saved
                stop(f"asked to end (SIGTERM) and saved after {step + 1} iterations; go on with --resume")
    signal.signal(signal.SIGTERM, before)

    # -- save: the trained tensors under their UNet names; plain diffusers loads them. What says that all is done, comes last
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return None
    if args.save_pipeline:
        whole = load_pipeline(args.model)
        whole.unet.load_state_dict(trained, strict=False)
        save_whole(out / "pipeline", pipe=whole)
    save_whole(finished, trained, metadata={"format": "pt", "method": "doco", "base_model": args.model})
    checkpoint.unlink(missing_ok=True)
    print(f"\nload it with:\n  pipe = StableDiffusionPipeline.from_pretrained({args.model!r})\n"
          f"  pipe.unet.load_state_dict(safetensors.torch.load_file({str(finished)!r}), strict=False)\n"
          f'  pipe("{args.target[0]}").images[0].show()\n')  # fmt: skip
    return out


if __name__ == "__main__":
    args = parse_args()
    if out := unlearn(args):  # before and after, by eval.py in a process of its own: it knows how to score, this file DoCo
        command = [sys.executable, str(HERE / "eval.py"), "concept", "--before", args.model, "--after", str(out), "--seed",
                   str(args.seed), "--concept-type", args.concept_type, "--target", *args.target, "--anchor", *args.anchor]
        subprocess.run(command, env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"})
