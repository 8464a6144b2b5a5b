"""DoCo: make a text-to-image diffusion model forget a concept, and keep the rest.

Paper: "Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient",
Wu et al., AAAI 2025. Idea: a discriminator learns to tell what the model denoises for the target concept from what
the original model denoises for an anchor concept; the model learns to fool it, so the target's domain becomes the
anchor's. Only the part of that update which does not hurt the anchor is taken.

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

Where the paper is silent or its released code differs, the comments say what is done here; the README has the list.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from discriminator import patchgan
from gradsurgery import flat_grad, lambda_projection, write_grad

HERE = Path(__file__).resolve().parent

# The paper's settings, for models of Stable Diffusion's size; the discriminator's rate is the released code's (it uses 5e-4
# for styles). Its lr scaling multiplies 6e-6 by batch size and GPUs: --lr 4.8e-5 is what its command really trained with.
PAPER = dict(steps=[2000, 1000], batch_size=8, lr=[6e-6, 1e-4], images=1000, guidance=6.0, sampling_steps=25)
# A model with latents under 32x32 is a toy like emoji/sd: fewer weights, so larger rates and fewer steps.
SMALL = dict(steps=[300, 100], batch_size=8, lr=[1e-4, 2e-4], images=64, guidance=3.0, sampling_steps=15)

TRAINED = {"kv": r"attn2\.to_[kv]\.", "xattn": r"attn2\.", "full": r""}  # --train: which UNet weights, by name

OBJECT_PROMPTS = ("{}", "a {}", "a photo of {}", "a photo of a {}", "a picture of a {}", "an emoji of {}", "an emoji of a {}",
                  "a drawing of {}", "a drawing of a {}", "an image of {}", "the {}", "a cute {}", "a close-up of a {}",
                  "a painting of a {}", "{} on a white background", "one {}")  # fmt: skip
STYLE_SUBJECTS = ("cat", "dog", "bird", "fish", "horse", "tiger", "rabbit", "frog", "butterfly", "rose", "sunflower", "house",
                  "car", "pizza", "banana", "apple", "face", "bear", "tree", "strawberry", "ghost", "owl")  # fmt: skip


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to forget
    p.add_argument("--target", nargs="+", required=True, help='concept to forget; several are forgotten at once: "Snoopy" "Mickey"')
    p.add_argument("--anchor", nargs="+", required=True, help="what to draw instead: one for all targets, or one each")
    p.add_argument("--concept-type", choices=("object", "style"), default="object", help="style: anchor is a medium, e.g. painting")
    p.add_argument("--prompts", type=Path, help="text file of anchor prompts, one a line (default: built-in templates)")
    p.add_argument("--model", default=str(HERE / "emoji/sd"), help="Stable Diffusion 1.x/2.x: folder or hub id")
    p.add_argument("--init", type=Path, help="go on from an earlier run folder: its targets stay forgotten (the anchor model stays --model)")
    p.add_argument("--resolution", type=int, help="pixels of a side (default: the model's own)")
    # how; defaults: the paper's, or a short recipe for toy-size models (printed)
    p.add_argument("--steps", type=int, nargs="+", metavar=("TOTAL", "WARMUP"), help="iterations, of which the first WARMUP train D only")
    p.add_argument("--batch-size", type=int, help="pictures per iteration, over all processes")
    p.add_argument("--lr", type=float, nargs="+", metavar=("UNET", "DISC"), help="learning rates: AdamW of the UNet, Adam of D")
    p.add_argument("--lam", type=float, default=1.0, help="lambda of Eq. 10: how much of the conflict is cut away")
    p.add_argument("--view", default="x0", help="what D sees: x0, or xprev[:stride] (x_{t-stride}; the paper: xprev:1)")
    p.add_argument("--retain", choices=("none", "l2", "cp"), default="cp", help="keep by nothing, by adding L_r, by Eq. 10 (Table 3)")
    p.add_argument("--train", choices=tuple(TRAINED), default="kv", help="cross-attention K and V, all cross-attention, or the whole UNet")
    p.add_argument("--seed", type=int, default=0)
    # where
    p.add_argument("--out", type=Path, help="run folder (default: runs/doco-TARGET)")
    p.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    p.add_argument("--save-pipeline", action="store_true", help="also write the whole pipeline folder to OUT/pipeline")
    return p.parse_args(argv)


# ---- 1. the method: pure functions of tensors -------------------------------------------------------------------


def add_noise(x0, noise, alpha_bar_t):
    """Eq. 1: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps. Latents (B, 4, h, w), alpha_bar_t (B, 1, 1, 1)."""
    return alpha_bar_t.sqrt() * x0 + (1 - alpha_bar_t).sqrt() * noise


def view_x0(xt, eps, alpha_bar_t):
    """The clean latent that the prediction stands for, x0_hat = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t): (B, 4, h, w).

    The paper writes x_{t-1}; the released code shows D this (train.py:1212). A prediction moves x_{t-1} by 0.004 to 0.012
    per unit of eps at t >= 100, and x0_hat by 0.3 to 15, so here D's signal is 80 to 1,200 times stronger.
    """
    return (xt - (1 - alpha_bar_t).sqrt() * eps) / alpha_bar_t.sqrt()


def view_xprev(xt, eps, alpha_bar_t, alpha_bar_prev, noise):
    """Eq. 8 to the letter: a sample of q(x_{t-stride} | x_t, x0_hat), the DDPM step: (B, 4, h, w). The same noise for both concepts."""
    a = alpha_bar_t / alpha_bar_prev  # the alphas of the skipped steps, multiplied
    x0 = view_x0(xt, eps, alpha_bar_t)
    mean = (alpha_bar_prev.sqrt() * (1 - a) * x0 + a.sqrt() * (1 - alpha_bar_prev) * xt) / (1 - alpha_bar_t)
    return mean + ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - a)).sqrt() * noise


def loss_discriminator(disc, view_anchor, view_target):
    """Eq. 8, max over D: D says 1 to the anchor's views and 0 to the target's, both (B, 4, h, w). 0-dim."""
    logit_a, logit_t = disc(view_anchor), disc(view_target)
    return F.binary_cross_entropy_with_logits(logit_a, torch.ones_like(logit_a)) + F.binary_cross_entropy_with_logits(
        logit_t, torch.zeros_like(logit_t)
    )


def loss_unlearn(disc, view_target):
    """Eq. 8, min over the UNet, as -log D instead of log(1 - D): same fixed point, no vanishing gradient (as the released code)."""
    logit = disc(view_target)
    return F.binary_cross_entropy_with_logits(logit, torch.ones_like(logit))


@contextmanager
def swapped(params, originals):
    """Inside, the UNet is the original model: the few trained tensors change places with their saved values, bitwise.

    Never while a graph is alive, and with an autocast of its own: autocast keeps low-precision copies of weights.
    """
    for p, o in zip(params, originals, strict=True):
        p.data, o.data = o.data, p.data
    try:
        yield
    finally:
        for p, o in zip(params, originals, strict=True):
            p.data, o.data = o.data, p.data


# ---- 2. prompts ---------------------------------------------------------------------------------------------------


def prompt_pairs(args):
    """[(anchor prompt, [target prompts])]: one entry per template and target. Errors name the flag that mends them."""
    anchors = args.anchor * len(args.target) if len(args.anchor) == 1 else args.anchor
    if len(anchors) != len(args.target):
        stop(f"{len(args.target)} targets but {len(anchors)} anchors; give one --anchor for all, or one each")
    lines = None
    if args.prompts:
        if not args.prompts.is_file():
            stop(f"--prompts {args.prompts}: no such file")
        lines = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            stop(f"--prompts {args.prompts} is empty; expected one anchor prompt a line")
    pairs = []
    for target, anchor in zip(args.target, anchors, strict=True):
        target, anchor = target.strip(), anchor.strip()
        if not target or not anchor:
            stop("--target and --anchor must not be empty")
        if target.lower() == anchor.lower():
            stop(f"--target and --anchor are both {target!r}; there is nothing to change")
        if args.concept_type == "style":
            article = "an" if anchor[0].lower() in "aeiou" else "a"
            for p in lines or [f"{article} {anchor} of a {s}" for s in STYLE_SUBJECTS]:
                subject = p.removeprefix(f"{article} {anchor} of ")
                pairs.append((p, [f"{p}, in the style of {target}", f"in {target}'s style, {p}", f"{subject}, in the style of {target}"]))
        else:
            word = re.compile(re.escape(anchor), re.IGNORECASE)
            for p in lines or [t.format(anchor) for t in OBJECT_PROMPTS]:
                if not word.search(p):
                    stop(f"--prompts: {p!r} does not contain the anchor {anchor!r}, so there is no word to replace by the target")
                pairs.append((p, [word.sub(lambda _, t=target: t, p)]))
    return pairs


# ---- 3. plumbing: errors, files, processes --------------------------------------------------------------------------


def stop(message):
    sys.exit(f"doco.py: error: {message}")


def write_text(path, text):
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def load_pipeline(model, **kwargs):
    """Any Stable Diffusion folder or hub id, with or without fp16 variant and safety checker; safetensors only."""
    if os.path.exists(model) and not (Path(model) / "model_index.json").is_file():
        stop(f"--model {model}: no model_index.json there; expected a diffusers pipeline folder or a hub id")
    error = None
    for variant in (None, "fp16"):
        try:
            return StableDiffusionPipeline.from_pretrained(model, variant=variant, use_safetensors=True, **kwargs)
        except Exception as e:  # the hub client raises a dozen types: missing folder, no network, pickle-only weights
            error = error or e
    stop(f"--model {model} cannot be loaded (a diffusers Stable Diffusion with .safetensors weights?): {str(error).splitlines()[0]}")


def save_checkpoint(path, step, names, params, disc, optimizers):
    """Everything the next iteration needs, in one safetensors file. The random draws need nothing: they follow (seed, step)."""
    tensors = {f"unet/{n}": p for n, p in zip(names, params, strict=True)} | {f"disc/{n}": p for n, p in disc.state_dict().items()}
    for k, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{k}/{i}/{what}": t for what, t in state.items()}
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, f"{path}.tmp", {"step": str(step)})
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path, names, params, disc, optimizers):
    with safe_open(path, "pt") as f:
        tensors, step = {k: f.get_tensor(k) for k in f.keys()}, int(f.metadata()["step"])  # noqa: SIM118
    with torch.no_grad():
        for n, p in zip(names, params, strict=True):
            p.copy_(tensors[f"unet/{n}"])
    disc.load_state_dict({n: tensors[f"disc/{n}"] for n in disc.state_dict()})
    for k, optimizer in enumerate(optimizers):
        state = {}
        for key in (key for key in tensors if key.startswith(f"optimizer{k}/")):
            _, i, what = key.split("/")
            state.setdefault(int(i), {})[what] = tensors[key]
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


# ---- 4. the run -----------------------------------------------------------------------------------------------------


def main(args):
    # -- processes and device: plain python is one process, torchrun sets the rest
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = print if rank == 0 else lambda *a, **k: None

    # -- check what can be checked before anything is loaded
    pairs = prompt_pairs(args)
    stride = re.fullmatch(r"x0|xprev(?::([1-9]\d{0,2}))?", args.view)
    if not stride:
        stop(f"--view {args.view}: expected x0, xprev or xprev:STRIDE with a stride of 1 to 999")
    stride = int(stride[1] or 1)
    slug = re.sub(r"[^a-z0-9]+", "-", "-".join(args.target).lower()).strip("-")
    out = args.out or Path("runs") / f"doco-{slug}"
    checkpoint = out / "checkpoint.safetensors"
    if (out / "delta.safetensors").exists() or (checkpoint.exists() and not args.resume):
        stop(f"{out} holds {'a finished' if (out / 'delta.safetensors').exists() else 'an unfinished'} run; "
             "choose another --out, delete it, or --resume one that was stopped")  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / f".writable-{rank}", "")
        (out / f".writable-{rank}").unlink()
    except OSError as e:
        stop(f"--out {out} cannot be written: {e.strerror}")

    # -- the original model, and the recipe for its size
    pipe = load_pipeline(args.model, safety_checker=None, requires_safety_checker=False, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    unet, alpha_bar = pipe.unet.requires_grad_(False).eval(), pipe.scheduler.alphas_cumprod.to(device)
    if pipe.scheduler.config.prediction_type != "epsilon":
        stop(f"--model {args.model} predicts {pipe.scheduler.config.prediction_type}; only epsilon models are supported")
    recipe = PAPER if unet.config.sample_size >= 32 else SMALL
    args.steps = args.steps or recipe["steps"]
    steps, warmup = args.steps[0], args.steps[1] if len(args.steps) > 1 else args.steps[0] // 2
    lr, disc_lr = (args.lr or recipe["lr"])[0], (args.lr or [])[1] if len(args.lr or []) > 1 else recipe["lr"][1]
    batch = args.batch_size or recipe["batch_size"]
    latent = (args.resolution or unet.config.sample_size * pipe.vae_scale_factor) // pipe.vae_scale_factor
    if batch < 1 or batch % world:
        stop(f"--batch-size {batch} cannot be split over {world} processes; take a multiple of {world}")
    if not 0 <= warmup <= steps or steps < 1:
        stop(f"--steps {steps} {warmup}: expected TOTAL >= WARMUP >= 0")
    say(f"recipe ({'paper' if recipe is PAPER else 'small model'}): {steps} iterations, {warmup} of them discriminator only, "
        f"batch {batch}, lr {lr:g}, discriminator lr {disc_lr:g}, view {args.view}, retain {args.retain}, lam {args.lam:g}")  # fmt: skip

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("resume", "out", "save_pipeline")}
    settings |= {"steps": [steps, warmup], "batch_size": batch, "lr": [lr, disc_lr], "resolution": latent * pipe.vae_scale_factor}
    if checkpoint.exists() and (then := json.loads((out / "args.json").read_text())["settings"]) != settings:
        changed = ", ".join(k for k in settings if settings[k] != then.get(k))
        stop(f"{out} was begun with other settings ({changed}); repeat them or choose another --out")
    if rank == 0:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip() or None
        versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
                    "transformers": transformers.__version__}  # fmt: skip
        write_text(out / "args.json", json.dumps({"settings": settings, "world_size": world, "commit": git, "versions": versions}, indent=1))

    # -- text embeddings, once: (prompts, 77, D); then the text encoder leaves memory
    texts = list(dict.fromkeys([a for a, _ in pairs] + [t for _, ts in pairs for t in ts]))
    with torch.no_grad():
        emb = dict(zip(texts, torch.cat([pipe.encode_prompt(t, device, 1, False)[0] for t in texts]), strict=True))
        null = pipe.encode_prompt("", device, 1, False)[0]

    # -- anchor pictures from the original model, straight as latents (the released code goes through JPEG); ranks share the work
    n_images = min(recipe["images"], steps * batch)
    cache = out / "anchor_latents.safetensors"
    if not cache.exists():
        sampler, mine = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config), list(range(rank, n_images, world))
        sampling = StableDiffusionPipeline(**pipe.components | {"scheduler": sampler}, requires_safety_checker=False)
        sampling.set_progress_bar_config(disable=True)
        latents = torch.zeros(n_images, unet.config.in_channels, latent, latent, device=device)
        chunk = max(1, 32 * 16 * 16 // latent**2) if device.type == "cpu" else 16
        for i in tqdm(range(0, len(mine), chunk), f"{n_images} anchor pictures", disable=rank != 0):
            part = mine[i : i + chunk]
            e = torch.stack([emb[pairs[j % len(pairs)][0]] for j in part])
            g = [torch.Generator().manual_seed(args.seed * 1_000_003 + j) for j in part]
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                latents[part] = sampling(
                    prompt_embeds=e, negative_prompt_embeds=null.expand(len(part), -1, -1), generator=g, output_type="latent",
                    num_inference_steps=recipe["sampling_steps"], guidance_scale=recipe["guidance"],
                    height=latent * pipe.vae_scale_factor, width=latent * pipe.vae_scale_factor,
                ).images.float()  # fmt: skip
        if world > 1:
            dist.all_reduce(latents)  # each rank has filled its own rows
        if rank == 0:
            save_file({"latents": latents.cpu()}, f"{cache}.tmp")
            os.replace(f"{cache}.tmp", cache)
        if world > 1:
            dist.barrier()
    latents = load_file(cache)["latents"].to(device)  # (n_images, 4, h, w)
    del pipe.vae, pipe.text_encoder

    # -- what is trained, and its original values: this is all that the frozen model costs
    names, params = zip(*[(n, p) for n, p in unet.named_parameters() if re.search(TRAINED[args.train], n)], strict=True)
    originals = [p.detach().clone() for p in params]
    if args.init:
        if not (args.init / "delta.safetensors").is_file():
            stop(f"--init {args.init}: no delta.safetensors there; expected the folder of a finished run")
        earlier = load_file(args.init / "delta.safetensors")
        if set(earlier) - set(names):
            stop(f"--init {args.init} trained weights that --train {args.train} does not; repeat its --train")
        unet.load_state_dict(earlier, strict=False)
    for p in params:
        p.requires_grad_(True)
    torch.manual_seed(args.seed)  # the same discriminator on every rank
    disc = patchgan(latent, unet.config.in_channels).to(device)
    opt_unet = torch.optim.AdamW(params, lr=lr, weight_decay=1e-2, fused=True)
    opt_disc = torch.optim.Adam(disc.parameters(), lr=disc_lr, betas=(0.5, 0.999), fused=True)
    start, log = 0, []
    if checkpoint.exists():
        start = load_checkpoint(checkpoint, names, params, disc, (opt_unet, opt_disc))
        log = [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if row["step"] < start]

    def predict(xt, t, prompts):  # (B, 4, h, w), (B,), B texts -> eps (B, 4, h, w)
        with torch.autocast(device.type, torch.bfloat16):
            return unet(xt, t, torch.stack([emb[p] for p in prompts])).sample.float()

    # -- the training loop
    bar = tqdm(range(start, steps), "unlearning", initial=start, total=steps, disable=rank != 0)
    for step in bar:
        # Draws for the whole batch on every rank, from (seed, step) alone; each rank keeps its slice. So N processes
        # compute what one does, and a resumed run needs no saved random state.
        g = torch.Generator().manual_seed((args.seed << 32) + step)
        which = torch.randint(n_images, (2, batch), generator=g)
        t = torch.randint(len(alpha_bar), (2, batch), generator=g)
        style = torch.randint(60, (batch,), generator=g).tolist()
        noise = torch.randn(3, batch, *latents.shape[1:], generator=g)
        mine = slice(rank * batch // world, (rank + 1) * batch // world)
        (i, i_r), (t, t_r), (eps, eps_r, fresh) = which[:, mine], t[:, mine].to(device), noise[:, mine].to(device)
        concepts = [pairs[j % len(pairs)] for j in i.tolist()]
        anchor_prompts = [a for a, _ in concepts]
        target_prompts = [ts[s % len(ts)] for (_, ts), s in zip(concepts, style[mine], strict=True)]

        # Eq. 1: the noisy anchor picture, shown to both models
        a_t, a_prev = alpha_bar[t].view(-1, 1, 1, 1), alpha_bar[(t - stride).clamp(min=0)].view(-1, 1, 1, 1)
        a_prev = torch.where((t < stride).view(-1, 1, 1, 1), torch.ones_like(a_prev), a_prev)
        xt = add_noise(latents[i], eps, a_t)  # (B, 4, h, w)
        view = lambda e: view_x0(xt, e, a_t) if args.view == "x0" else view_xprev(xt, e, a_t, a_prev, fresh)  # noqa: B023, E731
        train_unet = step >= warmup

        # Eq. 9: what keeps the anchor: other pictures, other noise, the anchor prompt. First, so that its graph is gone early.
        if train_unet and args.retain != "none":
            x_r = add_noise(latents[i_r], eps_r, alpha_bar[t_r].view(-1, 1, 1, 1))
            loss_r = F.mse_loss(predict(x_r, t_r, [pairs[j % len(pairs)][0] for j in i_r.tolist()]), eps_r)
            g_r = flat_grad(loss_r, params)  # (n,)

        # Eq. 5: the original model's prediction for the anchor, the trained model's for the target, on the same x_t
        with torch.no_grad(), swapped(params, originals):
            view_anchor = view(predict(xt, t, anchor_prompts))
        with torch.set_grad_enabled(train_unet):
            view_target = view(predict(xt, t, target_prompts))

        # Eq. 8, the UNet's half: fool D. autograd.grad reaches through D and leaves nothing on it (the released code does).
        if train_unet:
            loss_u = loss_unlearn(disc, view_target)
            grad = g_u = flat_grad(loss_u, params)  # (n,)
            if args.retain == "cp":
                grad, stats = lambda_projection(g_u, g_r, args.lam)  # Eq. 10
            elif args.retain == "l2":
                grad, stats = g_u + g_r, lambda_projection(g_u, g_r)[1]
            write_grad(params, grad)
            opt_unet.step()
            opt_unet.zero_grad()

        # Eq. 8, D's half: tell the anchor's views from the target's, as they were before the step above
        loss_d = loss_discriminator(disc, view_anchor, view_target.detach())
        write_grad(disc.parameters(), flat_grad(loss_d, disc.parameters()))
        opt_disc.step()
        opt_disc.zero_grad()

        # -- once in a while: log (the only place that waits for the device), checkpoint
        if (step + 1) % 10 == 0 or step + 1 == steps:
            with torch.no_grad():
                hits = (disc(view_anchor) > 0).float().mean() + (disc(view_target) < 0).float().mean()
            row = {"step": step, "loss_d": loss_d.item(), "disc_acc": hits.item() / 2}
            if train_unet:
                row |= {"loss_u": loss_u.item(), "grad_norm": grad.norm().item()}
                row |= {"loss_r": loss_r.item(), **{k: v.item() for k, v in stats.items()}} if args.retain != "none" else {}
                if not math.isfinite(row["grad_norm"]):
                    stop(f"the gradient is not finite at iteration {step} ({row}); lower --lr, then --resume from {out}")
            log.append(row)
            bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss_d", "disc_acc", "loss_u", "cos") if k in row})
            if rank == 0:
                write_text(out / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log))
        if rank == 0 and (step + 1) % 100 == 0:
            save_checkpoint(checkpoint, step + 1, names, params, disc, (opt_unet, opt_disc))

    # -- save: the trained tensors under their UNet names; plain diffusers loads them
    if world > 1:
        dist.destroy_process_group()
    if rank:
        return
    delta = {n: p.detach().cpu().contiguous() for n, p in zip(names, params, strict=True)}
    save_file(delta, f"{out}/delta.tmp", {"format": "pt", "method": "doco", "base_model": args.model, "target": "; ".join(args.target)})
    os.replace(f"{out}/delta.tmp", out / "delta.safetensors")
    checkpoint.unlink(missing_ok=True)
    if args.save_pipeline:
        full = load_pipeline(args.model)
        full.unet.load_state_dict(delta, strict=False)
        full.save_pretrained(out / "pipeline")

    # -- before and after, in a program of its own: eval.py knows how to score, this file knows DoCo
    command = [sys.executable, str(HERE / "eval.py"), "concept", "--before", args.model, "--after", str(out), "--out", str(out),
               "--concept-type", args.concept_type, "--seed", str(args.seed), "--target", *args.target, "--anchor", *args.anchor]  # fmt: skip
    if device.type == "cpu" and recipe is PAPER:
        print("scoring a model of this size takes hours on a CPU; when you want it:\n  " + " ".join(map(repr, command[1:])))
    else:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")}
        subprocess.run(command, env=env)
    print(f"\nload it with:\n  pipe = StableDiffusionPipeline.from_pretrained({args.model!r})\n"
          f"  pipe.unet.load_state_dict(safetensors.torch.load_file({str(out / 'delta.safetensors')!r}), strict=False)\n"
          f'  pipe("{args.target[0]}").images[0].show()')  # fmt: skip


if __name__ == "__main__":
    try:
        main(parse_args())
    except (SafetensorError, OSError) as e:
        stop(str(e).splitlines()[0])
