"""The time and the memory of a training step: ours, the least it could take, and a naive baseline.

    python -m experiments.bench doco                          # on emoji/sd
    python -m experiments.bench instance                      # on emoji/ddpm
    python -m experiments.bench doco --arch sd-v1-4 --batch-size 1 --steps 3
    python -m experiments.bench instance --arch ddpm-celebahq-256 --batch-size 1 --steps 3
    python -m experiments.bench instance --arch sd3-medium --batch-size 1 --steps 2
    python -m experiments.bench doco --arch sdxl --batch-size 1 --resolution 512 --steps 2 \\
        --only ours --mixed-precision bf16 --gradient-checkpointing      # memory of one way alone
    python -m experiments.bench build --arch sd-v1-4 --out runs/sd-v1-4      # the folder alone
    python -m experiments.bench surgery --out docs/surgery.png      # the gradient surgery by length

--arch builds a model of the real size with random weights, from its published configuration: time
and memory do not depend on the values of the weights, and nothing is downloaded. Four ways:

    ours    doco_step or instance_step, and the steps of the optimizers
    distill the same with --retain distill or --remember-loss distill
    passes  the passes of the network that such a step needs, forward and backward, and nothing else
    naive   as in DoCo's released code: a second network for the original model, images to unlearn
            and to retain in one forward pass, two backward passes through its graph, which stays
            in memory, and gradient surgery tensor by tensor

All on random tensors, with learning rates of 0. The ways take turns within one process, so that a
busy machine slows all of them alike; the report has medians over steps, and the gradient surgery
alone, on vectors as long as what is trained. Peak memory is that of a process per way, during its
steps: on a GPU what torch allocates, elsewhere (Linux) what the process holds, less what Python and
its libraries hold before the model is loaded.
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
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import doco
import instance_unlearn
from backbones import TRAINABLE, coefficients, load_backbone, stack_conditions
from common import REPO, HelpFormatter, Processes, fail, use_memory_flags
from discriminator import patchgan
from gradsurgery import forget_only, lambda_projection, write_grad
from metrics import display_path
from plots import new_figure, save

WAYS = ("ours", "distill", "passes", "naive")


# ---- 1. the papers' models with random weights, from their published configurations -------------


def clip_text(cls, tokenizer, hidden, layers, heads, act="quick_gelu"):
    """A CLIP text encoder with random weights.

    hidden: its width, also that of its projection. act: the activation, quick_gelu in OpenAI's.
    """
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=hidden,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return cls(config)


def vae(**options):
    """The autoencoder of Stable Diffusion, 84 million weights. options: of AutoencoderKL."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        **options,
    )


def ddpm_celebahq_256(tokenizer, safety):
    """google/ddpm-celebahq-256: 114 million weights, pixels of 256x256. Takes no prompt.

    The last five options are of its config.json and not the defaults of today.
    """
    down = ["DownBlock2D"] * 6
    down[4] = "AttnDownBlock2D"
    up = ["UpBlock2D"] * 6
    up[1] = "AttnUpBlock2D"
    unet = UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        layers_per_block=2,
        down_block_types=down,
        up_block_types=up,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    return DDPMPipeline(unet, DDPMScheduler())


def safety_checker():
    """The safety checker of Stable Diffusion 1.x, a CLIP ViT-L/14."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    return StableDiffusionSafetyChecker(CLIPConfig(projection_dim=768, vision_config=vision))


def sd_v1_4(tokenizer, safety):
    """CompVis/stable-diffusion-v1-4: a UNet of 860 million weights, latents of 64x64.

    attention_head_dim is the number of heads here, 8: a mistake of diffusers that lives on in the
    configurations of the hub.
    """
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    scheduler.register_to_config(clip_sample=False)  # as in the hub's folder
    return StableDiffusionPipeline(
        vae=vae(sample_size=512),
        text_encoder=clip_text(CLIPTextModel, tokenizer, 768, 12, 12),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=scheduler,
        safety_checker=safety_checker() if safety else None,
        feature_extractor=CLIPImageProcessorPil() if safety else None,
        requires_safety_checker=safety,
    )


def sd35_medium(tokenizer, safety):
    """stabilityai/stable-diffusion-3.5-medium: 2.5 billion weights, latents of 128x128.

    In its first 13 blocks the image has a second attention, to itself alone. Without T5.
    """
    more = {"pos_embed_max_size": 384, "qk_norm": "rms_norm"}
    return sd3_medium(tokenizer, safety, dual_attention_layers=tuple(range(13)), **more)


def sd3_medium(tokenizer, safety, **options):
    """stabilityai/stable-diffusion-3-medium: 2 billion weights, latents of 128x128.

    Without T5, which a step does not use: diffusers fills its rows of the condition with zeros.
    options: of the transformer.
    """
    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        **({"pos_embed_max_size": 192} | options),
    )
    autoencoder = vae(
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5305,
        sample_size=1024,
    )
    encoder = CLIPTextModelWithProjection
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder,
        tokenizer=tokenizer,
        text_encoder=clip_text(encoder, tokenizer, 768, 12, 12),
        tokenizer_2=tokenizer,
        text_encoder_2=clip_text(encoder, tokenizer, 1280, 32, 20, "gelu"),
        tokenizer_3=None,
        text_encoder_3=None,
    )


def sdxl(tokenizer, safety):
    """stabilityai/stable-diffusion-xl-base-1.0: 2.6 billion weights, latents of 128x128."""
    # No attention at the full resolution, ten transformer layers at a quarter of it.
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=down,
        up_block_types=up,
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    # Only its noise schedule counts here: the images come from DPM-Solver++.
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.register_to_config(clip_sample=False)  # as in the hub's folder
    with_pooled = CLIPTextModelWithProjection  # its pooled embedding is part of the condition
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=vae(sample_size=1024, scaling_factor=0.13025),
        tokenizer=tokenizer,
        text_encoder=clip_text(CLIPTextModel, tokenizer, 768, 12, 12),
        tokenizer_2=tokenizer,
        text_encoder_2=clip_text(with_pooled, tokenizer, 1280, 32, 20, "gelu"),
        scheduler=scheduler,
    )


def flux_dev_reduced(tokenizer, safety):
    """black-forest-labs/FLUX.1-dev with 2 of 19 double blocks, 4 of 38 single ones.

    1.3 of 12 billion weights, latents of 128x128; T5 has one of its 24 layers. Every other
    dimension is the real one. T5's tokenizer spells, as its vocabulary is on the hub alone.
    """
    transformer = FluxTransformer2DModel(num_layers=2, num_single_layers=4, guidance_embeds=True)
    # A unigram vocabulary: tokens and their log-probabilities.
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    # T5 v1.1 XXL, the encoder.
    t5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 1}
    t5 |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
    # 16 channels, where Stable Diffusion has 4.
    autoencoder = vae(
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        sample_size=1024,
    )
    return FluxPipeline(
        transformer=transformer,
        vae=autoencoder,
        tokenizer=tokenizer,
        text_encoder=clip_text(CLIPTextModel, tokenizer, 768, 12, 12),
        tokenizer_2=T5TokenizerFast(vocab=special + letters, extra_ids=0),
        text_encoder_2=T5EncoderModel(T5Config(**t5)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


ARCHS = {
    "sd-v1-4": sd_v1_4,
    "sdxl": sdxl,
    "sd3-medium": sd3_medium,
    "sd3.5-medium": sd35_medium,
    "flux-dev-reduced": flux_dev_reduced,
    "ddpm-celebahq-256": ddpm_celebahq_256,
}


def assemble(arch, safety=True):
    """A pipeline of the real size, with random weights of PyTorch's own initialisation.

    safety: with its safety checker, where it has one. The tokenizer is that of emoji/sd: its ids
    are below the 49,408 of CLIP's vocabulary.
    """
    tokenizer = CLIPTokenizer.from_pretrained(REPO / "emoji/sd", subfolder="tokenizer")
    return ARCHS[arch](tokenizer, safety)


def build(arch, folder, safety=True):
    """Writes a pipeline folder of the real size, in half precision as on the hub. Returns it.

    Sizes on disk: DDPM 0.2 GB, Stable Diffusion 2.7 (without safety checker 2.1), SD 3 about 6,
    Stable Diffusion XL 7.
    """
    torch.manual_seed(0)
    assemble(arch, safety).to(torch.float16).save_pretrained(folder)
    return folder


# ---- 2. the three ways --------------------------------------------------------------------------

# A way is a function without arguments that does one step; everything it needs is made beforehand.
# Nothing of a step is repeated here but what the scripts' own loops do around doco_step and
# instance_step: the steps of the optimizers. Left out are the reading of images, random numbers,
# the log and checkpoints.

# what: "doco" or "instance". backbone: on the device, without VAE and text encoders. params: what
# is trained. condition: on a prompt, of one row. shape: of a latent, (C, h, w). batch_size: of the
# images to unlearn; there are as many to retain.
Bench = namedtuple("Bench", "what backbone params condition shape batch_size")


def load(args, device):
    """Loads a model as the script does, and makes trainable what it trains. Returns a Bench.

    doco: by --train-method. instance: a LoRA, or the whole network of a DDPM.
    """
    backbone = load_backbone(args.model)
    resolution = backbone.check_resolution(args.resolution)
    condition = backbone.encode_prompts([""], device)[""]
    processes = Processes(rank=0, world=1, device=device)
    if args.what == "doco":
        settings = doco.parse_args(["--target", "a", "--anchor", "b"])
        settings.train_method = args.train_method
        settings, _ = doco.fill_defaults(settings, backbone, processes)
        backbone.trainable_weights(settings.train_method, settings.rank, settings.seed)
    else:
        settings = instance_unlearn.parse_args(["--forget", "image.png"])
        instance_unlearn.trainable_weights(backbone, settings)
    # In the scripts' order: what is trained by now keeps its precision.
    backbone.to(device, args.mixed_precision or "no")
    backbone.pipe = None  # frees the VAE, as the scripts do: a step needs the network alone
    # Activations are kept, or computed again in the backward pass.
    settings.gradient_checkpointing = args.gradient_checkpointing
    params = list(use_memory_flags(backbone.net, settings, processes).values())
    shape = backbone.latent_shape(resolution)
    return Bench(args.what, backbone, params, condition, shape, args.batch_size)


def random_batch(bench, n):
    """Latents (n, C, h, w), noise of the same shape, and timesteps (n,): 500 for all.

    Random latents: what a pass costs does not depend on what the image shows.
    """
    device = bench.backbone.device
    x0, noise = torch.randn(2, n, *bench.shape, device=device)
    return x0, noise, torch.full((n,), 500, device=device)


def model_optimizer(params):
    """The optimizer of the scripts, with a learning rate of 0.

    It does the work of a real one and changes nothing: random gradients would soon make the weights
    infinite, and the ways share one model.
    """
    return torch.optim.AdamW(params, lr=0.0, fused=True)


def disc_and_optimizer(bench):
    """The discriminator of DoCo, and its optimizer."""
    disc = patchgan(bench.shape[-1], bench.shape[0]).to(bench.backbone.device)
    return disc, torch.optim.Adam(disc.parameters(), lr=0.0, fused=True)


def original_predictor(bench, predict):
    """M_init as in doco.train and instance_unlearn.train: the same network with other weights."""
    originals = [p.detach().clone() for p in bench.params]

    def predict_original(*inputs):
        """The prediction of `predict` with the original weights."""
        doco.swap_weights(bench.params, originals)
        prediction = predict(*inputs)
        doco.swap_weights(bench.params, originals)
        return prediction

    return predict_original


def doco_way(bench, retain="cp"):
    """A step of doco.py, after its warm-up: three forward and two backward passes.

    The original model is the trained one with other weights, so that one network is in memory.
    """
    backbone, params = bench.backbone, bench.params
    optimizer = model_optimizer(params)
    disc, opt_disc = disc_and_optimizer(bench)
    predict_original = original_predictor(bench, backbone.predict)
    rows = stack_conditions([bench.condition] * bench.batch_size)  # as the script has them
    both = stack_conditions([bench.condition] * 2 * bench.batch_size)
    x0, noise, t = random_batch(bench, bench.batch_size)
    batch_f = doco.ForgetBatch(x0, noise, t, rows, rows, noise)
    batch_r = doco.RetainBatch(x0, noise, t, rows, both)

    def step():
        """Gradients and both optimizers' steps."""
        update = doco.doco_step(
            backbone.predict,
            predict_original,
            disc,
            params,
            backbone.alpha_bar,
            [(batch_f, batch_r)],
            backbone.prediction_type,
            retain=retain,
        )
        doco.optimizer_step(optimizer, params, update.g)
        write_grad(disc.parameters(), update.g_d)
        opt_disc.step()

    return step


def instance_way(bench, remember_loss="noise"):
    """A step of instance_unlearn.py for one image to unlearn: two forward, two backward passes.

    With "distill", a forward pass more.
    """
    backbone, params = bench.backbone, bench.params
    optimizer = model_optimizer(params)
    x0, noise, t = random_batch(bench, bench.batch_size)
    a, b = coefficients(t, backbone.alpha_bar)
    lam_t = instance_unlearn.lambda_t(t, 5e-5, None)  # the paper's beta; any number would do

    def predict(xt, t):
        """The model, conditioned on the empty prompt."""
        return backbone.predict(xt, t, bench.condition)

    is_distilled = remember_loss == "distill"
    predict_original = original_predictor(bench, predict) if is_distilled else None

    def step():
        """The gradient and the optimizer's step."""
        g, _ = instance_unlearn.instance_step(
            predict,
            params,
            x0,
            [(x0, -x0)],
            noise,
            t,
            a,
            b,
            lam_t,
            backbone.prediction_type,
            predict_original=predict_original,
        )
        write_grad(params, g)
        optimizer.step()

    return step


def bare_passes(bench):
    """The passes that a step cannot do without, and nothing else: a lower bound.

    doco: three forward (retain, anchor, target) and two backward; instance: two and two.
    """
    x0, _, t = random_batch(bench, bench.batch_size)

    def step():
        """The passes, one after another: each graph is freed before the next one is built."""
        if bench.what == "doco":
            with torch.no_grad():
                bench.backbone.predict(x0, t, bench.condition)
        for _ in range(2):
            loss = bench.backbone.predict(x0, t, bench.condition).square().mean()
            torch.autograd.grad(loss, bench.params)

    return step


def surgery_per_tensor(g_f, g_r, add_retain):
    """Projects the gradient of one tensor where it conflicts, with the exact Eq. 10 of DoCo.

    `if` reads a value from the device: on a GPU, a wait per tensor.
    """
    dot = (g_r * g_f).sum()
    if dot < 0:
        g_f = g_f - dot / g_r.square().sum() * g_r
    return g_f + g_r if add_retain else g_f


def naive_step(bench, original):
    """The step of DoCo's released code; for instances, the same without second network and D.

    One forward pass of twice the batch in place of two. It holds the activations of both halves at
    once, and each backward pass goes through the whole graph, zeros of the other half included.
    original: the backbone of the second network, for doco.
    """
    backbone, params, n = bench.backbone, bench.params, bench.batch_size
    is_doco = bench.what == "doco"
    x0, noise, t = random_batch(bench, 2 * n)  # images to unlearn and to retain, in one batch
    optimizer = model_optimizer(params)
    if is_doco:
        disc, opt_disc = disc_and_optimizer(bench)

    def step():
        """Both losses from one forward pass; retain_graph keeps its graph for the second one."""
        eps_f, eps_r = backbone.predict(x0, t, bench.condition).chunk(2)
        loss_r = F.mse_loss(eps_r, noise[n:])
        if is_doco:  # the discriminator is shown the predictions: half of the batch, as ours
            with torch.no_grad():
                eps_anchor = original.predict(x0[:n], t[:n], bench.condition)
            loss_f = doco.loss_unlearn(disc(eps_f))
        else:
            loss_f = F.mse_loss(eps_f, noise[:n])
        gradients = []  # two copies of all gradients, list by list
        for loss in (loss_r, loss_f):
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            gradients.append([p.grad.clone() for p in params])
        for p, g_r, g_f in zip(params, *gradients, strict=True):
            p.grad = surgery_per_tensor(g_f, g_r, add_retain=not is_doco)
        optimizer.step()
        if is_doco:
            opt_disc.zero_grad()
            logits_anchor, logits_target = disc(eps_anchor), disc(eps_f.detach())
            doco.loss_discriminator(logits_anchor, logits_target).backward()
            opt_disc.step()

    return step


def make_step(way, bench, original):
    """The step of a way: a function without arguments. original: see naive_step."""
    if way == "passes":
        return bare_passes(bench)
    if way == "naive":
        return naive_step(bench, original)
    if bench.what == "doco":
        return doco_way(bench, "distill" if way == "distill" else "cp")
    return instance_way(bench, "distill" if way == "distill" else "noise")


# ---- 3. time and memory -------------------------------------------------------------------------


def seconds_of(step, device):
    """The seconds of one call; on a GPU, until its work is done."""
    began = now(device)
    step()
    return now(device) - began


def now(device):
    """A clock in seconds that waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleave(steps, n, device):
    """{way: [n seconds]} of {way: step}: one step of each way, n times in turn.

    One way after the other would compare hours as much as ways, where others use the machine too.
    """
    seconds = {way: [] for way in steps}
    for _ in range(n):
        for way, step in steps.items():
            seconds[way].append(seconds_of(step, device))
    return seconds


def resident():
    """The most bytes that this process held since the last reset_peak_memory(), on Linux.

    VmHWM is the kernel's "high water mark" of the resident set size.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        fail("memory is measured on Linux or on a GPU")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def reset_peak_memory(device):
    """Starts a new measurement of peak_memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # first, what was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # 5: VmHWM falls to the present size


def peak_memory(device):
    """Bytes, the most since the last reset_peak_memory()."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident()


# ---- 4. the report ------------------------------------------------------------------------------


def count(params):
    """The number of weights."""
    return sum(p.numel() for p in params)


def measure_memory(args, device):
    """The peak memory of the steps of args.only in this process, in bytes.

    Without what Python and the libraries hold; with the weights, gradients, optimizer states and
    activations. Building the model needs more than a step, so the measurement starts after it.
    """
    # From here on: --arch has just built the whole model in this process, in fp32.
    reset_peak_memory(device)
    base = 0 if device.type == "cuda" else resident()
    bench = load(args, device)
    second = args.only == "naive" and args.what == "doco"
    original = load(args, device).backbone if second else None
    step = make_step(args.only, bench, original)
    reset_peak_memory(device)
    for _ in range(args.steps):
        step()
    return peak_memory(device) - base


def memory_in_child(args, way):
    """measure_memory in a process of its own: another way leaves no memory behind."""
    command = [sys.executable, "-m", "experiments.bench", args.what, "--only", way]
    command += ["--model", str(args.model), "--batch-size", str(args.batch_size), "--steps", "2"]
    for name in ("resolution", "train_method", "mixed_precision"):
        if value := getattr(args, name):
            command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        fail(f"--only {way} failed: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["bytes"]


def time_surgery(bench, device):
    """Median seconds of the gradient surgery on vectors (n,) as long as what is trained."""
    surgery = lambda_projection if bench.what == "doco" else forget_only
    return seconds_of_surgery(surgery, count(bench.params), device)


def seconds_of_surgery(surgery, n, device):
    """Median seconds on vectors (n,).

    They are read for a few inner products and a weighted sum, no more; so the time does not depend
    on what is in them.
    """
    g_f, g_r = torch.randn(2, n, device=device)

    def step():
        """One surgery."""
        surgery(g_f, g_r)

    return statistics.median(seconds_of(step, device) for _ in range(7))


def report_surgery(args, device):
    """Prints and plots the seconds of Eq. 10 (DoCo) and Eq. 13 (instances) by vector length."""
    methods = {"Eq. 10, DoCo": lambda_projection, "Eq. 13, instances": forget_only}
    # A LoRA of a small model to all of Stable Diffusion 3. The last takes 16 GB: two gradients, the
    # component that is taken off, the result.
    lengths = [10**k for k in range(5, 10)]
    print(f"| trained weights | {' | '.join(f'{name}, ms' for name in methods)} |")
    print("|---|---|---|")
    # The figure is made first, so that a missing library costs no measurement.
    figure = new_figure(480, 320, layout="constrained")
    axes = figure.subplots()
    seconds = {name: [] for name in methods}
    for n in lengths:
        for name, surgery in methods.items():
            seconds[name].append(seconds_of_surgery(surgery, n, device))
        print(f"| {n:,} | {' | '.join(f'{1e3 * s[-1]:.2f}' for s in seconds.values())} |")
    # Both axes logarithmic: what grows in proportion to the length has a slope of one.
    for name, values in seconds.items():
        axes.loglog(lengths, values, marker="o", label=name)
    # Short vectors stay in the processor's cache: they lie below the line through the longest.
    slope = seconds["Eq. 10, DoCo"][-1] / lengths[-1]
    axes.loglog(lengths, [slope * n for n in lengths], color="gray", ls=":", label="linear")
    axes.set_xlabel("trained weights")
    axes.set_ylabel("seconds per step")
    axes.legend()
    save(figure, args.out)


def measure_time(args, device):
    """({way: median seconds}, seconds of the surgery, number of weights, of trained ones).

    For the time alone, the trained network serves as the original one of the naive baseline: a
    second network would compute the same.
    """
    bench = load(args, device)
    steps = {way: make_step(way, bench, bench.backbone) for way in WAYS}
    seconds = interleave(steps, args.steps, device)
    medians = {way: statistics.median(s[1:]) for way, s in seconds.items()}  # the first warms up
    sizes = count(bench.backbone.net.parameters()), count(bench.params)
    return medians, time_surgery(bench, device), *sizes


def report(args, device):
    """Prints the table: a row per way, and how much more or less time and memory ours takes."""
    median, surgery, n_weights, n_trained = measure_time(args, device)
    memory = {way: memory_in_child(args, way) for way in WAYS}

    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    model = f"{args.what} on {args.arch or display_path(args.model)}"
    if args.resolution:
        model += f", {args.resolution} pixels"
    print(
        f"\n{model}: {n_weights / 1e6:.1f} M weights, {n_trained / 1e6:.2f} M trained, batch size "
        f"{args.batch_size}, medians of {args.steps - 1} steps; {name}\n"
    )
    print("| way | seconds per step | ours takes | peak memory, GB | ours takes |")
    print("|---|---|---|---|---|")
    for way in WAYS:
        times, bytes_ = median["ours"] / median[way], memory["ours"] / memory[way]
        print(f"| {way} | {median[way]:.3f} | {times:.2f} × | ", end="")
        print(f"{memory[way] / 1e9:.2f} | {bytes_:.2f} × |")
    percent = 100 * surgery / median["ours"]
    print(f"\ngradient surgery alone: {surgery * 1e3:.2f} ms, {percent:.2f} % of a step")


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.bench", description=__doc__, formatter_class=HelpFormatter
    )
    help_text = "whose step; build: a model; surgery: the time of Eq. 10 and 13 by length"
    p.add_argument("what", choices=("doco", "instance", "build", "surgery"), help=help_text)
    add = p.add_argument_group("model").add_argument
    add("--model", help="folder or hub id (without it: emoji/sd, emoji/ddpm)")
    add("--arch", choices=ARCHS, help="in place of --model: random weights, shapes of that model")
    add("--resolution", type=int, help="side of an image in pixels (without it: the model's own)")
    add = p.add_argument_group("training, as of the scripts").add_argument
    add("--train-method", choices=(*TRAINABLE, "lora"), help="of doco (without it: its default)")
    add("--mixed-precision", choices=("no", "bf16"), help="without it: no")
    add("--gradient-checkpointing", action="store_true", help="less memory, more passes")
    add = p.add_argument_group("measurement").add_argument
    add("--batch-size", type=int, default=8, help="images per step")
    add("--steps", type=int, default=20, help="of each way; the first one warms up")
    add("--only", choices=WAYS, help="the memory of one way, in bytes, as a line of JSON")
    add("--out", type=Path, help="of build: the folder; of surgery: the figure")
    return p.parse_args(argv)


def main(args):
    """Builds a model, measures the memory of one way, or prints the report on all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.what == "build":
        if not args.arch or not args.out:
            fail("build needs --arch and --out")
        print(build(args.arch, args.out))
        return
    if args.what == "surgery":
        if not args.out:
            fail("surgery needs --out, the figure's file")
        report_surgery(args, device)
        return
    if args.steps < 2 or args.batch_size < 1:
        fail(
            f"--steps {args.steps} --batch-size {args.batch_size}: expected at least 2 and 1; "
            f"the first step warms up"
        )
    with tempfile.TemporaryDirectory() as folder:
        if args.arch:
            args.model = build(args.arch, Path(folder) / args.arch, safety=False)
        embedded = REPO / ("emoji/sd" if args.what == "doco" else "emoji/ddpm")
        args.model = str(args.model or embedded)
        # One device, one process: sharing a step among GPUs costs an all_reduce, not measured here.
        if args.only:
            print(json.dumps({"way": args.only, "bytes": measure_memory(args, device)}))
        else:
            report(args, device)


if __name__ == "__main__":
    main(parse_args())
