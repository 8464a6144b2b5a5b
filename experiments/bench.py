"""How long does a step take, and how much memory? The loops of doco.py and instance_unlearn.py against the passes they need.

    python bench.py doco                                                         # on emoji/sd
    python bench.py instance                                                     # on emoji/ddpm
    python bench.py doco --arch sd-v1-4 --batch-size 1 --steps 3                 # random weights at the real size, no download
    python bench.py instance --arch ddpm-celebahq-256 --batch-size 1 --steps 3
    python bench.py instance --arch sd3-medium --batch-size 1 --steps 2
    python bench.py build --arch sd-v1-4 --out runs/sd-v1-4                      # the folder alone, with all that a hub's has

Three ways, in turns within one process, so that a busy machine slows all of them alike; medians over the steps:

    ours    the loop of the script itself; this file only looks at the clock between its iterations
    passes  the bare passes of the network that a step needs, forward and backward, and nothing else
    plain   the straightforward way, as in DoCo's released code: a second network for the original model, pictures to forget and
            to keep in one pass forward, two ways back through its retained graph, surgery tensor by tensor

and the surgery alone, on vectors as long as what is trained. Peak memory is that of a process of its own for each way, during
its steps: on a GPU what torch allocates, elsewhere what the process holds, less what Python and its libraries hold alone.
"""

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

import doco
import instance_unlearn
from common import fail, load_pipeline
from discriminator import patchgan
from gradsurgery import forget_only, lambda_projection

HERE = Path(__file__).resolve().parent
ARCHS = ("sd-v1-4", "sd3-medium", "ddpm-celebahq-256")
WAYS = ("ours", "passes", "plain")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("doco", "instance", "build"))
    p.add_argument("--model", help="folder or hub id (default: emoji/sd, emoji/ddpm)")
    p.add_argument("--arch", choices=ARCHS, help="in place of --model: random weights in the shapes of that model")
    p.add_argument("--resolution", type=int, help="pixels of a side (default: the model's own)")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--only", choices=WAYS, help="one way alone, for its memory; prints a line of JSON")
    p.add_argument("--out", type=Path, help="of build: the folder")
    return p.parse_args(argv)


# ---- 1. the papers' models with random weights, from their published configurations ---------------------------------


def clip_text(cls, tokenizer, hidden, layers, heads, projection, act="quick_gelu"):
    config = CLIPTextConfig(vocab_size=49408, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
                            num_attention_heads=heads, projection_dim=projection, hidden_act=act,
                            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    return cls(config)


def vae(**kwargs):
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                         block_out_channels=(128, 256, 512, 512), layers_per_block=2, **kwargs)  # fmt: skip


def assemble(arch, safety=True):
    """A pipeline of the real size. The tokenizer is emoji/sd's, whose ids are below the 49,408 of the text encoder."""
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "emoji/sd", subfolder="tokenizer")
    if arch == "ddpm-celebahq-256":
        down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
        down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
        unet = UNet2DModel(sample_size=256, block_out_channels=(128, 128, 256, 256, 512, 512), layers_per_block=2,
                           down_block_types=down, up_block_types=up, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
                           norm_eps=1e-6, attention_head_dim=None)  # fmt: skip
        return DDPMPipeline(unet, DDPMScheduler())
    if arch == "sd-v1-4":
        scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                                  steps_offset=1)  # fmt: skip
        scheduler.register_to_config(clip_sample=False)  # as in the hub's folder
        checker = StableDiffusionSafetyChecker(CLIPConfig(
            projection_dim=768, vision_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                                   num_attention_heads=16, patch_size=14))) if safety else None  # fmt: skip
        return StableDiffusionPipeline(
            vae=vae(sample_size=512), text_encoder=clip_text(CLIPTextModel, tokenizer, 768, 12, 12, 768), tokenizer=tokenizer,
            unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8), scheduler=scheduler,
            safety_checker=checker, feature_extractor=CLIPImageProcessorPil() if safety else None,
            requires_safety_checker=safety)  # fmt: skip
    transformer = SD3Transformer2DModel(sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
                                        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
                                        pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192)  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokenizer,
        vae=vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609,
                scaling_factor=1.5305, sample_size=1024),
        text_encoder=clip_text(CLIPTextModelWithProjection, tokenizer, 768, 12, 12, 768), tokenizer_2=tokenizer,
        text_encoder_2=clip_text(CLIPTextModelWithProjection, tokenizer, 1280, 32, 20, 1280, "gelu"),
        text_encoder_3=None, tokenizer_3=None)  # fmt: skip


def build(arch, folder, safety=True):
    """Writes a pipeline folder of the real size with random weights, in half precision as on the hub."""
    torch.manual_seed(0)
    assemble(arch, safety).to(torch.float16).save_pretrained(folder)
    return folder


# ---- 2. the three ways ------------------------------------------------------------------------------------------------


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident():
    """Bytes that the process holds at most since the last forget_peak(), on Linux."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back first
        Path("/proc/self/clear_refs").write_text("5")


def peak():
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident()


def take_turns(script, before_each, record, device):
    """Lets the script's own training loop run, and before each of its iterations calls before_each(). Times go to record."""

    class Turns(tqdm):
        def __iter__(self):
            for i, item in enumerate(super().__iter__()):
                if self.desc.startswith("unlearning"):
                    before_each(i)
                    began = now(device)
                    yield item  # one iteration of the script
                    record(now(device) - began)
                else:
                    yield item

    script.tqdm = Turns


def network(args, device):
    """The network that is trained, its trained weights, and what it takes beside the noisy picture, for a batch of n."""
    pipe = load_pipeline(args.model, dtype=torch.float32)
    net = (pipe.transformer if hasattr(pipe, "transformer") else pipe.unet).requires_grad_(False).eval().to(device)
    conditions = {}
    if isinstance(net, UNet2DConditionModel):
        conditions = {"encoder_hidden_states": torch.randn(1, 77, net.config.cross_attention_dim, device=device)}
    elif isinstance(net, SD3Transformer2DModel):
        conditions = {"encoder_hidden_states": torch.randn(1, 333, net.config.joint_attention_dim, device=device),
                      "pooled_projections": torch.randn(1, net.config.pooled_projection_dim, device=device)}  # fmt: skip
    if args.what == "doco":
        params = [p.requires_grad_() for n, p in net.named_parameters() if re.search(doco.TRAINED["kv"], n)]
    elif isinstance(net, UNet2DModel):
        params = list(net.requires_grad_().parameters())
    else:
        config = instance_unlearn.LoraConfig(r=16, lora_alpha=16, target_modules=instance_unlearn.LORA[type(pipe).__name__])
        net.add_adapter(config)
        params = [p for p in net.parameters() if p.requires_grad]
    side = args.resolution // getattr(pipe, "vae_scale_factor", 1) if args.resolution else net.config.sample_size
    shape = (net.config.in_channels, side, side)

    def predict(net, x, t):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return net(x, timestep=t, **{k: v.expand(len(x), *v.shape[1:]) for k, v in conditions.items()}).sample.float()

    return net, params, shape, predict


def bare_passes(args, device, parts):
    """A step's passes of the network and nothing else: doco 3 forward and 2 back, instance 2 and 2. parts: of network()."""
    net, params, shape, predict = parts
    x, t = torch.randn(args.batch_size, *shape, device=device), torch.full((args.batch_size,), 500, device=device)

    def step():
        if args.what == "doco":
            with torch.no_grad():
                predict(net, x, t)
        for _ in range(2):
            torch.autograd.grad(predict(net, x, t).square().mean(), params)

    return step


def plain_step(args, device, parts, second=True):
    """DoCo's released way, with exact Eq. 10; for one picture, the same without the second network and the discriminator."""
    net, params, shape, predict = parts
    is_doco = args.what == "doco"
    # For the time alone, the network itself serves as the original: lr is 0, the work is the same
    original = network(args, device)[0].requires_grad_(False) if is_doco and second else net
    x, t = torch.randn(2 * args.batch_size, *shape, device=device), torch.full((2 * args.batch_size,), 500, device=device)
    optimizer, eps = torch.optim.AdamW(params, lr=0.0), torch.randn_like(x[: args.batch_size])
    disc = patchgan(shape[1], shape[0]).to(device) if is_doco else None
    opt_disc = torch.optim.Adam(disc.parameters(), lr=0.0) if is_doco else None

    def step():
        says, says_r = predict(net, x, t).chunk(2)
        loss_r = F.mse_loss(says_r, eps)
        if is_doco:
            with torch.no_grad():
                anchor = predict(original, x[: args.batch_size], t[: args.batch_size])
            loss_f = doco.loss_unlearn(disc, says)
        else:
            loss_f = F.mse_loss(says, eps)
        grads = []
        for loss in (loss_r, loss_f):
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            grads.append([p.grad.clone() for p in params])
        for p, g_r, g_f in zip(params, *grads, strict=True):
            dot = (g_r * g_f).sum()
            p.grad = g_f - dot / g_r.square().sum() * g_r if dot < 0 else g_f
            p.grad = p.grad if is_doco else p.grad + g_r
        optimizer.step()
        if is_doco:
            opt_disc.zero_grad()
            doco.loss_discriminator(disc, anchor, says.detach()).backward()
            opt_disc.step()

    return step


def pixels_of(model):
    """The side of the model's own images, from the configs of a folder (also a flat one, as old DDPMs have it) or hub id."""
    index = DiffusionPipeline.load_config(model)
    part = "transformer" if "transformer" in index else "unet"
    try:
        side = UNet2DModel.load_config(model, subfolder=part)["sample_size"]
    except OSError:  # a flat folder: the network's files lie beside model_index.json
        side = UNet2DModel.load_config(model)["sample_size"]
    if "vae" in index:
        side *= 2 ** (len(AutoencoderKL.load_config(model, subfolder="vae")["block_out_channels"]) - 1)
    return side


def run_script(args, before_each, record, device):
    """The script itself, in a folder of its own, for args.steps iterations; random latents stand for the sampled images."""
    script = doco if args.what == "doco" else instance_unlearn
    take_turns(script, before_each, record, device)
    doco.sample_anchor_latents = lambda pipe, emb, pairs, n, size, *_: torch.randn(n, pipe.unet.config.in_channels, size, size)
    instance_unlearn.draw_pool = lambda draw, n, shape, *_: torch.randn(n, *shape)
    with tempfile.TemporaryDirectory() as folder:
        out, side = Path(folder) / "run", args.resolution or pixels_of(args.model)
        common = ["--model", str(args.model), "--batch-size", str(args.batch_size), "--out", str(out)]
        common += ["--resolution", str(side)]
        if args.what == "doco":
            what = ["--target", "Grumpy Cat", "--anchor", "Cat", "--steps", str(args.steps), "0"]
        else:
            picture = Path(folder) / "picture.png"
            instance_unlearn.to_image(torch.rand(3, side, side) * 2 - 1).save(picture)
            what = ["--forget", str(picture), "--surrogate", "flip", "--remember", f"generate:{args.batch_size}",
                    "--steps", str(args.steps)]  # fmt: skip
        script.unlearn(script.parse_args([*what, *common]))


# ---- 3. the table -----------------------------------------------------------------------------------------------------


def only(args, device):
    """One way alone: its seconds per step and its peak memory, as a dict."""
    base, times = (0 if device.type == "cuda" else resident()), []
    if args.only == "ours":
        run_script(args, lambda i: forget_peak() if i == 0 else None, times.append, device)
    else:
        step = (bare_passes if args.only == "passes" else plain_step)(args, device, network(args, device))
        forget_peak()
        for _ in range(args.steps):
            began = now(device)
            step()
            times.append(now(device) - began)
    return {"way": args.only, "seconds": times, "bytes": peak() - base}


def count(params):
    return sum(p.numel() for p in params)


def time_surgery(args, params, device):
    """Median seconds of one surgery on vectors as long as what is trained."""
    g_f, g_r = (torch.randn(count(params), device=device) for _ in range(2))
    times = []
    for _ in range(7):
        began = now(device)
        lambda_projection(g_f, g_r) if args.what == "doco" else forget_only(g_f, g_r)
        times.append(now(device) - began)
    return statistics.median(times)


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.what == "build":
        if not args.arch or not args.out:
            fail("build needs --arch and --out")
        print(build(args.arch, args.out))
        return
    if args.only:
        print(json.dumps(only(args, device)))
        return
    if args.steps < 2 or args.batch_size < 1:
        fail(f"--steps {args.steps} --batch-size {args.batch_size}: expected at least 2 and 1; the first step warms up")
    with tempfile.TemporaryDirectory() as folder:
        if args.arch:
            args.model = build(args.arch, Path(folder) / args.arch, safety=False)
        args.model = args.model or HERE / ("emoji/sd" if args.what == "doco" else "emoji/ddpm")

        # -- time: all three in turns; the first round warms up
        parts, seconds = network(args, device), {way: [] for way in WAYS}
        passes, plain = bare_passes(args, device, parts), plain_step(args, device, parts, second=False)

        def others(_):
            for way, step in (("passes", passes), ("plain", plain)):
                began = now(device)
                step()
                seconds[way].append(now(device) - began)

        run_script(args, others, seconds["ours"].append, device)
        median = {way: statistics.median(s[1:] or s) for way, s in seconds.items()}
        surgery, trained, whole = time_surgery(args, parts[1], device), count(parts[1]), count(parts[0].parameters())
        parts = passes = plain = None  # out of memory

        # -- memory: one process each
        held = {}
        for way in WAYS:
            command = [sys.executable, __file__, args.what, "--model", str(args.model), "--only", way, "--steps", "2",
                       "--batch-size", str(args.batch_size)]  # fmt: skip
            command += ["--resolution", str(args.resolution)] if args.resolution else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                fail(f"--only {way} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            held[way] = json.loads(done.stdout.strip().splitlines()[-1])["bytes"]

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    what = f"{args.what} on {args.arch or args.model}" + (f", {args.resolution} pixels" if args.resolution else "")
    print(f"\n{what}: {whole / 1e6:.1f} M weights, {trained / 1e6:.2f} M trained, batch "
          f"{args.batch_size}, medians of {max(1, args.steps - 1)} steps; {name}\n")  # fmt: skip
    print("| way | seconds a step | ours takes | peak memory, GB | ours takes |\n|---|---|---|---|---|")
    for way in WAYS:
        print(f"| {way} | {median[way]:.3f} | {median['ours'] / median[way]:.2f} × | {held[way] / 1e9:.2f} | "
              f"{held['ours'] / held[way]:.2f} × |")  # fmt: skip
    print(f"\nsurgery alone: {surgery * 1e3:.2f} ms, {100 * surgery / median['ours']:.2f} % of a step")


if __name__ == "__main__":
    main(parse_args())
