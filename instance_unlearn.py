"""Prompt-free instance unlearning: make a diffusion model forget one picture that no prompt can name, and keep the rest.

Paper: "Unlearning the Unpromptable: Prompt-free Instance Unlearning in Diffusion Models", Lee et al., arXiv 2603.10445.
The picture x^f is pulled towards a surrogate x^s, an edited copy of it: from the noisy picture, the model is taught the noise
that would have led there from the surrogate. Other pictures x^r are remembered, and the forget gradient yields to theirs.

    x_t  = sqrt(a_t) x_0 + sqrt(1 - a_t) eps                                   Eq. 1      of x^r and x^f: same eps, same t
    L_r  = |eps - M(x_t^r, t)|^2                                               Eq. 8      remember
    eps' = (x_t^f - sqrt(a_t) x^s) / sqrt(1 - a_t)                             Eq. 10     the surrogate's noise, same x_t^f
    L_f  = |eps' - M(x_t^f, t)|^2                                              Eq. 11     forget
    g_r  = lambda grad L_r,  g_f = (1 - lambda) grad L_f,  lambda = 1 - beta t Eq. 12     late (noisy) timesteps forget
    g    = g_r + g_f', g_f' = g_f without its part along g_r if g_r . g_f < 0  Eq. 13     Algorithm 1, lines 15 to 20

Flow matching (Stable Diffusion 3), the same idea: x_t = (1 - s) x_0 + s eps with s = t / 1000, and M says v = eps - x_0.
Keep x_t^f; the noise that leads to it from the surrogate is eps' = (x_t^f - (1 - s) x^s) / s, Eq. 10 with other coefficients.
So v' = eps' - x^s = (x_t^f - x^s) / s, and a model that follows v' for the time s lands on x_t^f - s v' = x^s.

Run it (the first line needs nothing but this repository; it uses the small model in emoji/ddpm):

    torchrun instance_unlearn.py
    torchrun instance_unlearn.py --model google/ddpm-celebahq-256 --forget face.png --surrogate edited.png --remember celebahq/
    torchrun instance_unlearn.py --model stabilityai/stable-diffusion-3-medium-diffusers --prompt "the flag of Japan" \\
        --forget wrong.png --surrogate painted.png
"""

import argparse
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, DDPMPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
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
    fingerprint_files,
    git_commit,
    is_embedded,
    load_or_fail,
    load_pipeline,
    lock_run_dir,
    make_run_dir,
    read_cache,
    run_name,
)
from gradsurgery import flat_grad, forget_only, pcgrad, write_grad

PICTURE = REPO / "emoji/creatures/twemoji-cowboy-hat-face.png"  # what the first command forgets
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")

# The paper's settings: a DDPM is trained whole, Stable Diffusion by LoRA. Rank, guidance and sampling steps are not in it.
PAPER = {"ddpm": dict(steps=240, lr=5e-6, beta=5e-5, sampling_steps=50),
         "lora": dict(steps=100, lr=1e-5, beta=2e-4, guidance=7.0, sampling_steps=28)}  # fmt: skip
# For small models like emoji/ddpm and emoji/sd3 (64 pixels, latents of 16x16 or less): larger rates, falling to 0 for each
# picture, and timesteps spread over each batch. Neither remedy is in the paper; the baselines can have both.
SMALL = {"ddpm": dict(steps=240, lr=6e-5, beta=5e-5, sampling_steps=50),
         "lora": dict(steps=100, lr=1e-3, beta=2e-4, guidance=4.0, sampling_steps=15)}  # fmt: skip
LORA = {"StableDiffusionPipeline": ["to_k", "to_q", "to_v", "to_out.0"],
        "StableDiffusion3Pipeline": [f"attn.{n}" for n in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k",
                                                           "to_out.0", "to_q", "to_v")]}  # fmt: skip


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(REPO / "emoji/ddpm"), help="DDPM, Stable Diffusion 1.x/2.x or 3: folder or hub id")
    p.add_argument("--forget", nargs="+", type=Path, metavar="FILE", help="picture to forget; several: one after another")
    p.add_argument("--prompt", help="the prompt that draws it (Stable Diffusion; default: the empty one)")
    p.add_argument("--surrogate", nargs="+", default=["sdedit"], metavar="FILE|KIND", help="one for all or one each: "
                   "an edited file, sdedit:STRENGTH, flip, noise:SIGMA (of 255), random")  # fmt: skip
    p.add_argument("--surrogate-prompt", help="prompt of sdedit (default: --prompt)")
    p.add_argument("--remember", help="folder of pictures, or generate:N "
                   "(default: generate:100; emoji/ddpm: emoji/creatures)")  # fmt: skip
    p.add_argument("--resolution", type=int, help="pixels of a side (default: the model's own)")
    p.add_argument("--steps", type=int, help="updates per picture to forget")
    p.add_argument("--batch-size", type=int, default=8, help="remember pictures per update, over all processes")
    p.add_argument("--lr", type=float, help="learning rate (default: the paper's 5e-6, LoRA 1e-5; small models 6e-5, 1e-3)")
    p.add_argument("--lr-scheduler", choices=("constant", "linear"), help="linear: falls to 0 for each picture "
                   "(default: constant, as in the paper; small models: linear)")  # fmt: skip
    p.add_argument("--timestep-sampling", choices=("uniform", "stratified"), help="timesteps of a batch: "
                   "independent, as in the paper, or one from each n-th of their range (default for small models)")  # fmt: skip
    p.add_argument("--beta", type=float, help="Eq. 12: lambda(t) = 1 - beta t, t from 0 to 1000")
    p.add_argument("--constant-lambda", type=float, help="Table III: the same lambda at every t, in place of --beta")
    p.add_argument("--surgery", choices=("none", "forget", "both"), default="forget", help="Table IV: what is projected")
    p.add_argument("--rank", type=int, default=16, help="of the LoRA")
    p.add_argument("--compile", action="store_true", help="torch.compile the network, which takes minutes at first")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, passes forward twice; same weights")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="run folder (default: runs/instance-PICTURE)")
    p.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    p.add_argument("--save-pipeline", action="store_true", help="LoRA: also write the fused pipeline to OUT/pipeline")
    return p.parse_args(argv)


# ---- 1. the method: pure functions of tensors -------------------------------------------------------------------


def coefficients(t, alpha_bar):
    """The a and b of x_t = a x_0 + b eps, for t (B,) -> (B, 1, 1, 1) each. Eq. 1; of flow matching where alpha_bar is None."""
    if alpha_bar is None:
        a, b = 1 - t / 1000, t / 1000
    else:
        a, b = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
    return a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)


def draw_times(n, shift, generator, stratified=True):
    """n timesteps (n,): independent draws, as in Algorithm 1, or one from each n-th of their distribution (stratified).

    Stratified draws are the same on average, with less noise. Uniform on 0..999 where shift is None, as in Algorithm 1. Flow
    matching: logit-normal and shifted towards noise, in [1, 1000], as Stable Diffusion 3 was trained (Esser et al. 2024), for
    the velocity to the surrogate grows as 1 / s: with uniform times, a draw near s = 0 drowns all others.
    """
    u = torch.rand(n, generator=generator)
    if stratified:
        u = (torch.arange(n) + u) / n
    if shift is None:
        return (1000 * u).long().clamp(max=999)  # rounding may lift u to 1
    s = torch.special.ndtri(u).sigmoid()
    return (1000 * shift * s / (1 + (shift - 1) * s)).clamp(min=1)


def surrogate_noise(xt, x_s, a, b):
    """Eq. 10: the noise that would have led from the surrogate x_s to the noisy picture xt, (B, C, H, W)."""
    return (xt - a * x_s) / b


def answer(kind, x0, noise, a, b):
    """What a perfect model says of a x0 + b noise, (B, C, H, W): the noise, the velocity of flow matching, or DDIM's v."""
    return noise if kind == "epsilon" else noise - x0 if kind == "flow" else a * noise - b * x0


def picture_of(kind, says, xt, a, b):
    """The inverse of answer(): which x_0 the model sees in xt when it says that, (B, C, H, W)."""
    return (xt - b * says) / a if kind == "epsilon" else xt - b * says if kind == "flow" else a * xt - b * says


def lambda_t(t, beta, constant=None):
    """Eq. 12: the weight of remembering, 1 - beta t, for t (B,) in [0, 1000] -> (B,). The rest, beta t, is for forgetting."""
    return 1 - beta * t if constant is None else torch.full_like(t, constant, dtype=torch.float32)


def per_picture(says, wanted):
    """Squared error per picture, (B, C, H, W) -> (B,): the mean over pixels, so that its scale does not grow with them."""
    return (says - wanted).square().mean((1, 2, 3))


SURGERY = {"none": lambda g_f, g_r: (g_r + g_f, forget_only(g_f, g_r)[1]), "forget": forget_only, "both": pcgrad}


def denoise(predict, x, times, kind, alpha_bar, clip):
    """Draws by DDIM without noise (flow matching: Euler) from x at times[0], (B, C, H, W), to x_0. Times fall to the last."""
    for i, t in enumerate(times):
        a, b = coefficients(t.view(1), alpha_bar)
        x0 = picture_of(kind, predict(x, t.expand(len(x))), x, a, b)
        if clip:
            x0 = x0.clamp(-1, 1)
        last = i + 1 == len(times)
        a_next, b_next = (1, 0) if last else coefficients(times[i + 1].view(1), alpha_bar)
        x = a_next * x0 + b_next * (x - a * x0) / b
    return x


def leave_out(pool, x_f, reference, floor=0):
    """What the model drew, (n, C, h, w), without what shows a picture to forget, x_f (K, C, h, w): that must not be remembered.

    It goes by distance, under 0.6 of the upper quartile of the distances to reference, (m, C, h, w). These are other samples of
    the model, from the empty prompt where it takes prompts: a threshold from the pool itself would fall with every copy in it.
    A DDPM takes none, its reference is the pool; so the threshold does not fall below floor.
    """
    usual = torch.cdist(reference.flatten(1), x_f.flatten(1)).quantile(0.75, dim=0)  # (K,)
    distance = torch.cdist(pool.flatten(1), x_f.flatten(1))  # (n, K)
    return pool[(distance >= (0.6 * usual).clamp(min=floor)).all(1)]


def say_left_out(n, kept, rank=0):
    """Says how many of n samples were left out; a warning where most were, an error where all were."""
    if rank == 0 and 0 < kept < n:
        print(f"{n - kept} of {n} show a picture to forget and are left out")
    if rank == 0 and 0 < kept < n / 2:
        print(f"warning: most of what the model draws shows a picture to forget; {kept} are left to remember, more would be "
              f"better: --remember generate:{4 * n} or a folder", file=sys.stderr)  # fmt: skip
    if kept == 0:
        fail(f"--remember generate:{n}: every sample shows a picture to forget; expected a folder of others")


# ---- 2. pictures ------------------------------------------------------------------------------------------------


def to_tensor(image):
    """PIL RGB -> (3, H, W) in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


def to_image(x):
    """(3, H, W) in [-1, 1] -> PIL RGB."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().cpu()
    return Image.frombytes("RGB", (x.shape[1], x.shape[0]), bytes(x.flatten().tolist()))


def open_image(path, flag, about=None):
    """PIL picture, upright and loaded; one line where it is missing, truncated or no picture: PIL raises half a dozen types.

    about: where a small version is enough, its side; a large JPEG is then decoded at an eighth of its size, which is faster.
    """
    try:
        with Image.open(path) as image:
            if about:
                image.draft("RGB", (about, about))
            image.load()
            return ImageOps.exif_transpose(image)  # a camera held on its side says so here alone
    except Exception as e:
        fail(f"{flag} {path} cannot be read: {e}")


def to_rgb(image):
    """Any PIL picture in 8-bit RGB: transparency on white, 16-bit grey scaled to 8 (PIL alone gives black and white)."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_exact(path, size, flag):
    """A picture to forget or its surrogate, (3, size, size): exactly what the model draws, so nothing is guessed or resized."""
    image = open_image(path, flag)
    if image.mode != "RGB":
        fail(f"{flag} {path} has mode {image.mode}; expected RGB (no grey, no palette, no transparency)")
    if image.size != (size, size):
        fail(f"{flag} {path} is {image.width}x{image.height}; expected {size}x{size}, or the --resolution that fits it")
    return to_tensor(image)


def read_any(path, size, flag="--remember", about=None):
    """A picture to remember, (3, size, size): the middle square, resized. Data sets come in all sizes and modes."""
    image = to_rgb(open_image(path, flag, about))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return to_tensor(square if side == size else square.resize((size, size), Image.LANCZOS))


def list_images(folder):
    """The png, jpg and webp files below a folder, sorted; an empty list where there is no such folder."""
    return sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in ENDINGS)


def without_forgotten(files, forget, size):
    """The files that show none of the pictures to forget (K, 3, size, size), whatever their format and resolution.

    Two pictures are the same where their pixels differ by 0.055 or less of [-1, 1], root mean square: another resampling filter
    or a JPEG of quality 75 stays below that, and of all pairs of different emoji the nearest is at 0.061. Thumbnails of 16x16
    decide for nearly all; 30,000 pictures of 256x256 take a minute or two.
    """
    small = torch.nn.functional.interpolate(forget, (16, 16), mode="area")
    distance = lambda x, y: (x - y).square().mean((1, 2, 3)).sqrt().min()  # noqa: E731, root mean square to the nearest
    kept = []
    for f in tqdm(files, "comparing with --forget", disable=len(files) < 1000):
        near = distance(read_any(f, 16, about=64), small) < 0.15
        if not (near and distance(read_any(f, size), forget) <= 0.055):
            kept.append(f)
    return kept


# ---- 3. checkpoints -----------------------------------------------------------------------------------------------


def save_checkpoint(path, step, trained, optimizer):
    """All that the next update needs, in one file. Random draws need nothing: they follow (seed, step)."""
    tensors = {f"net/{n}": p for n, p in trained.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{i}/{moment}": t for moment, t in state.items()}
    atomic_save(path, tensors, metadata={"step": str(step)})


def load_checkpoint(path, trained, optimizer):
    """Puts everything back and returns the number of updates done."""
    tensors, state = load_file(path), {}
    for n, p in trained.items():
        p.data.copy_(tensors.pop(f"net/{n}"))
    for name, t in tensors.items():
        _, i, moment = name.split("/")
        state.setdefault(int(i), {})[moment] = t
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return checkpoint_step(path)


def draw_pool(draw, n, shape, device, first_seed, label, rank=0, world=1):
    """n samples of the model, (n, *shape), each from its own seed, whatever the number of ranks, which share the work."""
    pool = torch.zeros(n, *shape, device=device)
    chunks = [range(i, min(i + 16, n)) for i in range(0, n, 16)]
    for chunk in tqdm(chunks[rank::world], label, disable=rank > 0):
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(first_seed + j)) for j in chunk]
        pool[list(chunk)] = draw(torch.stack(noise).to(device))
    if world > 1:
        dist.all_reduce(pool)  # each rank has filled its own rows
    return pool


def save_pipeline(args, out, lora):
    """OUT/pipeline: the whole model with the LoRA fused into it, for tools that take folders. After the LoRA is saved."""
    pipe = load_pipeline(args.model, safety_checker=True, dtype=torch.float32)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    atomic_save(out / "pipeline", pipe=pipe)


# ---- 4. the run ---------------------------------------------------------------------------------------------------


def unlearn(args):
    """Runs Algorithm 1 and returns the run folder (None on all ranks but the first). Bad input ends it with one line."""
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
    if args.forget is None:
        if Path(args.model).resolve() != REPO / "emoji/ddpm":
            fail("--forget is missing: which picture?")
        args.forget = [PICTURE]
    surrogates = args.surrogate * len(args.forget) if len(args.surrogate) == 1 else args.surrogate
    if len(surrogates) != len(args.forget):
        fail(f"{len(args.forget)} pictures but {len(surrogates)} surrogates; give one --surrogate for all, or one each")
    kinds = [re.fullmatch(r"(sdedit|noise)(?::(\d*\.?\d+))?|(flip|random)", s) for s in surrogates]
    out = args.out or Path("runs") / run_name("instance", [f.stem for f in args.forget])
    log_file, checkpoint = out / "log.jsonl", out / "checkpoint.safetensors"
    lora_file, pipeline = out / "pytorch_lora_weights.safetensors", out / "pipeline"
    make_run_dir(out)
    begun = load_or_fail(checkpoint, lambda: checkpoint_step(checkpoint))
    agree({f.name: f.exists() for f in (pipeline, lora_file)} | {checkpoint.name: begun}, out)
    if (pipeline.exists() or lora_file.exists() or begun is not None) and not args.resume:
        fail(f"{out} already holds a run; choose another --out, or --resume one that was stopped")
    lock = lock_run_dir(out) if rank == 0 else None  # noqa: F841, until this function returns

    # -- the model, and the recipe for its size
    pipe = load_pipeline(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    family, ddpm = type(pipe).__name__, isinstance(pipe, DDPMPipeline)
    net = (pipe.transformer if family == "StableDiffusion3Pipeline" else pipe.unet).requires_grad_(False).eval()
    flow = family == "StableDiffusion3Pipeline"
    shift = pipe.scheduler.config.shift if flow else None
    kind = "flow" if flow else pipe.scheduler.config.prediction_type
    alpha_bar = None if flow else pipe.scheduler.alphas_cumprod.to(device)  # (1000,)
    finished = pipeline if ddpm else lora_file
    if kind not in ("flow", "epsilon", "v_prediction"):
        fail(f"--model {args.model} predicts {kind}; expected epsilon, v_prediction or flow matching")
    if ddpm and (args.prompt or args.surrogate_prompt):
        fail(f"--prompt {args.prompt or args.surrogate_prompt!r}: {args.model} is unconditional, it takes no prompt")
    absent = "text_encoder_3=None, tokenizer_3=None, " if flow and pipe.text_encoder_3 is None else ""  # diffusers must be told
    scale = 1 if ddpm else pipe.vae_scale_factor
    small = net.config.sample_size <= 64 if ddpm else net.config.sample_size < 32
    recipe = (SMALL if small else PAPER)["ddpm" if ddpm else "lora"]
    size = args.resolution or net.config.sample_size * scale
    if args.remember is None:
        args.remember = str(REPO / "emoji/creatures") if is_embedded(args.model) and ddpm else "generate:100"
    steps, lr, beta = (recipe[k] if (v := getattr(args, k)) is None else v for k in ("steps", "lr", "beta"))
    scheduler = args.lr_scheduler or ("linear" if small else "constant")
    sampling, batch = args.timestep_sampling or ("stratified" if small else "uniform"), args.batch_size
    if batch < 1 or batch % world:
        fail(f"--batch-size {batch} cannot be split over {world} processes; take a positive multiple of {world}")
    if not lr > 0 or args.rank < 1:
        fail(f"--lr {lr:g} --rank {args.rank}: expected a positive rate and rank")
    if steps < 1 or not 0 <= beta <= 1e-3 or not 0 <= (args.constant_lambda or 0) <= 1:
        fail(f"--steps {steps} --beta {beta:g} --constant-lambda {args.constant_lambda}: expected steps > 0, lambda in [0, 1]")
    unit = 2 ** (len(net.config.block_out_channels) - 1) if ddpm else scale
    if size < unit or size % unit:
        fail(f"--resolution {size} is no multiple of {unit}, as this model needs")
    generated = re.fullmatch(r"generate:(\d+)", args.remember)
    files = [] if generated else list_images(args.remember)
    if not (int(generated[1]) if generated else files):
        fail(f"--remember {args.remember}: no pictures there; expected a folder of png, jpg or webp files, or generate:N")
    pixels_f = torch.stack([read_exact(f, size, "--forget") for f in args.forget])  # (K, 3, size, size) in [-1, 1]

    # -- what the network is given beside x_t and t, and what it answers
    @torch.no_grad()
    def condition(prompt):
        if ddpm:
            return {}
        if flow:
            rows, _, pooled, _ = pipe.encode_prompt(prompt, None, None, device=device, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": rows, "pooled_projections": pooled}
        return {"encoder_hidden_states": pipe.encode_prompt(prompt, device, 1, False)[0]}

    def predict(xt, t, cond):  # (B, C, H, W), (B,), one prompt -> (B, C, H, W)
        with amp():
            return net(xt, timestep=t, **{k: v.expand(len(xt), *v.shape[1:]) for k, v in cond.items()}).sample.float()

    # Text first: Stable Diffusion 3's T5 alone is larger than the transformer. It is loaded in bfloat16, and gone before the
    # network comes to the device.
    encoders = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name, None) is not None]
    for name in encoders:
        getattr(pipe, name).to(device)
    cond, null = condition(args.prompt or ""), condition("")
    edit = condition(args.surrogate_prompt or args.prompt or "")
    of_encoders = [fingerprint(getattr(pipe, name)) for name in encoders]
    for name in encoders:
        setattr(pipe, name, None)
    pipe.to(device)

    # -- a run may go on with the settings that it began with, and with the same contents of what its flags name
    resolved = {"steps": steps, "lr": lr, "beta": beta, "resolution": size, "surrogate": surrogates, "lr_scheduler": scheduler,
                "timestep_sampling": sampling}  # fmt: skip
    resumable = ("resume", "out", "save_pipeline", "gradient_checkpointing")  # these may change
    settings = {k: [str(x) for x in v] if isinstance(v, list) else v for k, v in (vars(args) | resolved).items()
                if k not in resumable}  # fmt: skip
    settings["contents of --model"] = fingerprint(net, getattr(pipe, "vae", None), of_encoders, alpha_bar, recipe)
    settings["contents of --forget"] = fingerprint(*args.forget)
    settings["contents of --surrogate"] = fingerprint(*(Path(s) for s, k in zip(surrogates, kinds, strict=True)
                                                        if k is None and Path(s).is_file()))  # fmt: skip
    settings["contents of --remember"] = fingerprint_files(files)
    agree({k: v for k, v in settings.items() if k.startswith("contents of")}, out)
    record = out / "args.json"
    if (begun is not None or finished.exists()) and record.exists():
        then = load_or_fail(record, lambda: json.loads(record.read_text())["settings"])
        if changed := [k for k in settings if settings[k] != then.get(k)]:
            fail(f"{out} was begun with other settings ({', '.join(changed)}); repeat them or choose another --out")
    if finished.exists():  # training had finished; its evaluation, or the writing of its pipeline, was interrupted
        if rank == 0 and args.save_pipeline and not pipeline.exists():
            save_pipeline(args, out, load_file(lora_file))
        return close(rank, world, out)
    if rank == 0:
        weight = f"beta {beta:g}" if args.constant_lambda is None else f"lambda {args.constant_lambda:g}"
        print(f"{'small-model' if small else 'paper'} recipe for {family}: {steps} updates a picture, batch {batch}, "
              f"lr {lr:g} {scheduler}, {sampling} timesteps, {weight}, surgery {args.surgery}")
        about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "commit": git_commit(), "processes": world}
        atomic_save(record, text=json.dumps(about | {"settings": settings}, indent=1))

    sampler = pipe.scheduler if flow else DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=1, clip_sample=ddpm)
    sampler.set_timesteps(recipe["sampling_steps"])
    times = sampler.timesteps.to(device)  # falling from about 1000, where all is noise

    @torch.no_grad()
    def draw(x, times, cond):  # (B, C, H, W), as noisy as times[0] -> pictures or latents of the same shape
        def guided(x, t):  # classifier-free guidance
            y = predict(x, t, cond)
            return y if ddpm else (n := predict(x, t, null)) + recipe["guidance"] * (y - n)

        return denoise(guided, x, times, kind, alpha_bar, clip=ddpm)

    @torch.no_grad()
    def encode(x):  # (B, 3, H, W) in [-1, 1] -> what the network draws: pixels, or scaled latents (B, C, h, w)
        if ddpm:
            return x.to(device)
        z = pipe.vae.encode(x.to(device)).latent_dist.mode()
        return (z - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode(z):  # the inverse of encode
        if ddpm:
            return z
        return pipe.vae.decode(z / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)).sample

    # -- x^f: the pictures to forget
    x_f = encode(pixels_f)  # (K, C, h, w)

    # -- x^r: the pictures to remember, from a folder (less those to forget) or drawn by the model, the ranks sharing the work
    if generated:
        n = int(generated[1])
        cache, key = out / "remember.safetensors", fingerprint(
            settings["contents of --model"], args.prompt, args.seed, n, x_f.shape)  # fmt: skip
        pool = read_cache(cache, "remember", key, rank, world, device)
        if pool is None:
            share = (x_f.shape[1:], device, args.seed * 1_000_003)
            pool = draw_pool(lambda x: draw(x, times, cond), n, *share, f"{n} pictures to remember", rank, world)
            if not ddpm:  # 16 more, of no prompt, to which leave_out compares
                seed, label = share[2] + 800_000, "16 of no prompt"
                none = draw_pool(lambda x: draw(x, times, null), 16, *share[:2], seed, label, rank, world)
                pool = torch.cat([pool, none])
            if rank == 0:
                atomic_save(cache, {"remember": pool}, metadata={"key": key})
        # Pixels of a DDPM: what differs by less than 0.15 of [-1, 1], root mean square, is a copy whatever else is drawn
        pool = leave_out(pool[:n], x_f, pool if ddpm else pool[n:], 0.15 * x_f[0].numel() ** 0.5 if ddpm else 0)
        n_remember = len(pool)
        say_left_out(n, n_remember, rank)
    else:
        files, pool = without_forgotten(files, pixels_f, size), None
        n_remember = len(files)
        if n_remember < 1:
            fail(f"--remember {args.remember}: every picture there shows one to forget; expected a folder that has others")

    def remember(indices):  # a batch (B, C, h, w); files are read when needed: a data set may be larger than the memory
        if pool is not None:
            return pool[indices]
        return encode(torch.stack([read_any(files[j], size) for j in indices]))

    # -- x^s: the surrogates, written beside the result
    x_s = []
    for k, (name, kind_of) in enumerate(zip(surrogates, kinds, strict=True)):
        x, g = x_f[k : k + 1], torch.Generator().manual_seed(args.seed * 1_000_003 + 900_000 + k)
        if kind_of is None:
            x = encode(read_exact(name, size, "--surrogate")[None])
        elif kind_of[1] == "sdedit":  # the model itself edits: to the noise level STRENGTH and back (Meng et al. 2022)
            strength = float(kind_of[2] or 0.7)
            if not times[-1] / 1000 <= strength <= 1:
                fail(f"--surrogate {name}: expected a strength in (0, 1]")
            below = times[times <= 1000 * strength]
            a, b = coefficients(below[:1], alpha_bar)
            x = draw(a * x + b * torch.randn(x.shape, generator=g).to(device), below, edit)
        elif kind_of[1] == "noise":  # Table V: sigma 50 or 150 of 255, not clipped to what a file could hold
            pixels = decode(x)
            x = encode(pixels + float(kind_of[2] or 150) / 127.5 * torch.randn(pixels.shape, generator=g).to(device))
        elif kind_of[3] == "flip":
            x = encode(decode(x).flip(-1))
        x_s.append(None if kind_of and kind_of[3] == "random" else x[0])
        if rank == 0 and x_s[k] is not None:
            to_image(decode(x)[0]).save(out / f"surrogate-{k}.png")
    keep_vae = pool is None and not ddpm
    if not ddpm:  # text encoders and VAE leave the memory (the VAE stays where files are read on the way)
        pipe = argparse.Namespace(vae=pipe.vae if keep_vae else None)

    # -- what is trained: the whole DDPM, or a LoRA
    if ddpm:
        trained = dict(net.requires_grad_().named_parameters())
    else:
        torch.manual_seed(args.seed)  # the same LoRA on every rank
        config = LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=LORA[family])
        net.add_adapter(config)
        cast_training_params(net)
        trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    params = list(trained.values())
    if args.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    if args.compile:
        net.compile()
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0, fused=True)
    start, log, recent = 0, [], []
    if begun is not None:
        start = load_or_fail(checkpoint, lambda: load_checkpoint(checkpoint, trained, optimizer))
        log = [row for row in map(json.loads, log_file.read_text().splitlines()) if row["step"] < start]

    # -- Algorithm 1: the outer loop is over the pictures (step // steps), the inner one over the updates. Asked to end
    # (SIGTERM), it saves at the next tenth update, on all ranks at once.
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    bar = tqdm(range(start, total := steps * len(x_f)), "unlearning", initial=start, total=total, disable=rank > 0)
    for step in bar:
        # Draws for the whole batch on every rank, from (seed, step) alone; each rank keeps its slice: N processes compute
        # what one does, and a resumed run needs no saved random state.
        k, g = step // steps, torch.Generator().manual_seed(args.seed * 1_000_003 + 100_000 + step)
        mine = slice(rank * batch // world, (rank + 1) * batch // world)
        i_r, i_s = torch.randint(n_remember, (2, batch), generator=g)[:, mine].tolist()
        t = draw_times(batch, shift, g, sampling == "stratified")[mine].to(device)
        eps = torch.randn(batch, *x_f.shape[1:], generator=g)[mine].to(device)
        a, b = coefficients(t, alpha_bar)
        lam = lambda_t(t, beta, args.constant_lambda)  # (B,)

        # Eq. 8: remember. Its gradient is taken at once, so that its graph is gone before the next pass.
        x_r = remember(i_r)
        error_r = per_picture(predict(a * x_r + b * eps, t, cond), answer(kind, x_r, eps, a, b))
        g_r = flat_grad((lam * error_r).mean(), params)  # (n,), Eq. 12

        # Eq. 10 and 11: forget, at the same noise and timesteps. Its picture keeps x_t^f, its answer aims at the surrogate.
        # Not in Algorithm 1: the pictures forgotten before take part, in turn; left to themselves, they come back.
        g_f, fresh = 0, remember(i_s) if any(x is None for x in x_s) else None
        current = [k] * batch
        for who in ([j % k for j in range(step, step + batch)], current) if k else (current,):
            target = torch.stack([fresh[n] if x_s[j] is None else x_s[j] for n, j in enumerate(who[mine])])  # (B, C, h, w)
            xt_f = a * x_f[who[mine]] + b * eps
            eps_s = surrogate_noise(xt_f, target, a, b)
            error_f = per_picture(predict(xt_f, t, cond), answer(kind, target, eps_s, a, b))
            g_f = g_f + flat_grad(((1 - lam) * error_f).mean(), params)  # (n,), Eq. 12

        # Eq. 13 and line 21
        grad, stats = SURGERY[args.surgery](g_f, g_r)
        write_grad(params, grad)
        if scheduler == "linear":  # not in Algorithm 1: at a constant rate, the gradient's noise alone moves a small model far
            optimizer.param_groups[0]["lr"] = lr * (1 - step % steps / steps)
        optimizer.step()

        # -- log: every update is kept, and read from the device at every tenth
        recent.append(torch.stack([error_r.mean(), error_f.mean(), *stats.values()]).detach())
        if (step + 1) % 10 == 0 or step + 1 == total:
            rows = torch.stack(recent)
            if world > 1:
                dist.all_reduce(rows)
            for j, row in enumerate((rows / world).tolist(), step + 1 - len(recent)):
                values = dict(zip(("loss_r", "loss_f", *stats), row, strict=True))
                log.append({"step": j, "picture": j // steps} | values)
                if not all(map(math.isfinite, values.values())):
                    fail(f"not finite at update {j}: {log[-1]}; lower --lr and choose another --out")
            recent, last = [], log[-1]
            bar.set_postfix({key: f"{last[key]:.3f}" for key in ("loss_r", "loss_f", "cos")})
            end = torch.tensor(float(bool(asked)), device=device)
            if world > 1:
                dist.all_reduce(end)
            if rank == 0:
                atomic_save(log_file, text="".join(json.dumps(row) + "\n" for row in log))
                if end or (step + 1) % (10 * max(1, total // 200)) == 0:
                    save_checkpoint(checkpoint, step + 1, trained, optimizer)
            if end:
                if world > 1:
                    dist.barrier()  # until the first has saved
                fail(f"asked to end (SIGTERM) and saved after {step + 1} updates; go on with --resume")
    signal.signal(signal.SIGTERM, before)

    # -- save: plain diffusers loads it
    if rank == 0:
        if ddpm:
            atomic_save(pipeline, pipe=pipe)
        else:
            lora = {f"{'transformer' if flow else 'unet'}.{n}": p for n, p in get_peft_model_state_dict(net).items()}
            atomic_save(lora_file, lora, metadata={"format": "pt"})
        checkpoint.unlink(missing_ok=True)
        print(f"\nload it with:\n{loading_lines(args, family, out, absent)}\n")
        if args.save_pipeline and not ddpm:
            save_pipeline(args, out, load_file(lora_file))
    return close(rank, world, out)


def loading_lines(args, family, out, absent):
    """The lines of Python that load the result in plain diffusers and draw a picture."""
    if family == "DDPMPipeline":
        return f"""
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained({str(out / 'pipeline')!r})
pipe(num_inference_steps=50).images[0].save("after.png")
"""
    return f"""
import torch
from diffusers import {family}

pipe = {family}.from_pretrained({args.model!r}, {absent}dtype=torch.float32)
pipe.load_lora_weights({str(out)!r})
pipe({args.prompt or ""!r}).images[0].save("after.png")
"""


if __name__ == "__main__":
    args = parse_args()
    if out := unlearn(args):  # evaluated in a separate process: eval.py knows how
        known = {"--prompt": args.prompt, "--real": args.remember if len(list_images(args.remember)) > 1 else None,
                 "--resolution": args.resolution}  # fmt: skip
        flags = [x for k, v in known.items() if v for x in (k, v)]
        sys.exit(evaluate_run("instance", args.model, out, "--seed", args.seed, "--forget", *args.forget, *flags))
