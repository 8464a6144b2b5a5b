"""Model families: what each diffusers pipeline needs beside the two papers' methods.

    DDPM               unconditional, in pixels; predicts epsilon
    StableDiffusion    1.x and 2.x: latents, one text encoder; predicts epsilon or v
    StableDiffusion3   latents, up to three text encoders; flow matching: predicts a velocity

load_backbone(model) returns one of them. All have the attributes and methods below, so that the
training loops never ask which family it is:

    net, prediction_type, alpha_bar, latent_shape      the network and what it computes
    encode_prompts, predict                            conditions on a prompt; runs the network
    encode, decode                                     images to what the network denoises, and back
    sample                                             deterministic sampling

The noise schedule and the meaning of a prediction are pure functions of tensors, in section 1.
Weights are read from .safetensors alone, and no code of a model folder is executed.
"""

import math
import os
from pathlib import Path

# Without torchvision, which nothing here needs, transformers warns of each image processor that
# diffusers imports. The variable must be set before that.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from huggingface_hub import HfApi

from common import REPO, fail, fingerprint, first_line

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


# ---- 1. the noise schedule and the meaning of a prediction --------------------------------------


def coefficients(t, alpha_bar):
    """a and b of x_t = a x_0 + b eps, for timesteps t (B,): two tensors (B, 1, 1, 1).

    DDPM and Stable Diffusion 1/2: a = sqrt(alpha_bar_t), b = sqrt(1 - alpha_bar_t), with alpha_bar
    (1000,). Flow matching, where alpha_bar is None: a = 1 - s, b = s, with s = t / 1000.
    """
    if alpha_bar is None:
        a, b = 1 - t / 1000, t / 1000
    else:
        a, b = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
    return a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)


def prediction_target(prediction_type, x0, noise, a, b):
    """The regression target of the network at x_t = a x_0 + b eps, (B, C, H, W).

    "epsilon": the noise eps. "v_prediction": v = a eps - b x_0 (Salimans and Ho 2022). "flow": the
    velocity eps - x_0 of the straight path from x_0 to eps.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "flow":
        return noise - x0
    return a * noise - b * x0


def predict_x0(prediction_type, prediction, xt, a, b):
    """x0_hat, the x_0 that a prediction implies at x_t, (B, C, H, W): inverts prediction_target."""
    if prediction_type == "epsilon":
        return (xt - b * prediction) / a
    if prediction_type == "flow":
        return xt - b * prediction
    return a * xt - b * prediction


@torch.no_grad()
def sample_deterministic(predict, x, timesteps, prediction_type, alpha_bar, clip):
    """DDIM without noise (flow matching: Euler) from x (B, C, H, W) at timesteps[0] to x_0.

    predict: (x_t, t (B,)) -> prediction. timesteps: decreasing, a tensor (S,) on the device of x.
    clip: clamps x0_hat to [-1, 1] at each step; for pixels, never for latents.
    """
    for i, t in enumerate(timesteps):
        a, b = coefficients(t.view(1), alpha_bar)
        x0_hat = predict_x0(prediction_type, predict(x, t.expand(len(x))), x, a, b)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        a_next, b_next = 1, 0  # after the last step: x_0 itself
        if i + 1 < len(timesteps):
            a_next, b_next = coefficients(timesteps[i + 1].view(1), alpha_bar)
        # The noise that x0_hat implies is (x - a x0_hat) / b; the next x has b_next of it
        x = a_next * x0_hat + b_next * (x - a * x0_hat) / b
    return x


# ---- 2. conditions ------------------------------------------------------------------------------
# A condition is a dict of keyword arguments of the network, tensors of (1, ...) or (B, ...) rows.


def stack_conditions(conditions):
    """[B conditions of one row each] -> one condition of B rows."""
    return {k: torch.cat([c[k] for c in conditions]) for k in conditions[0]}


def expand_condition(condition, n):
    """A condition of one row -> the same row n times, without a copy."""
    return {k: v.expand(n, *v.shape[1:]) for k, v in condition.items()}


# ---- 3. the families ----------------------------------------------------------------------------


class Backbone:
    """A diffusers pipeline of one family, on the CPU until .to(device). See the subclasses."""

    pipeline_class = None  # of diffusers
    net_name = "unet"  # the component that is trained
    lora_targets = None  # attention projections that a LoRA adapts; None: the network trains whole
    takes_prompt = True
    shift = None  # of the timesteps towards noise, in the training of a flow-matching model

    def __init__(self, pipe):
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.net = getattr(pipe, self.net_name).requires_grad_(False).eval()
        self.device = torch.device("cpu")
        self.prediction_type = pipe.scheduler.config.get("prediction_type")
        # (1000,), alpha_t of the papers; None for flow matching
        self.alpha_bar = getattr(pipe.scheduler, "alphas_cumprod", None)
        self.scale_factor = getattr(pipe, "vae_scale_factor", 1)  # pixels per latent, on a side
        self.sample_size = self.net.config.sample_size  # side of a latent at the native resolution
        self.small = self.sample_size < 32
        self.encoder_fingerprints = []

    @property
    def resolution_unit(self):
        """Sides of images, in pixels, must be multiples of it."""
        return self.scale_factor

    def latent_shape(self, resolution):
        """(C, h, w) of what the network denoises, for images of resolution x resolution pixels."""
        side = resolution // self.scale_factor
        return (self.net.config.in_channels, side, side)

    def check_resolution(self, resolution):
        """The resolution, or the native one for None; fails if the network cannot take it."""
        resolution = resolution or self.sample_size * self.scale_factor
        if resolution < self.resolution_unit or resolution % self.resolution_unit:
            unit = self.resolution_unit
            fail(f"--resolution {resolution} is no multiple of {unit}, as this model needs")
        return resolution

    def fingerprint(self):
        """Of all weights and the noise schedule: equal for equal models."""
        vae = getattr(self.pipe, "vae", None)
        return fingerprint(self.net, vae, self.encoder_fingerprints, self.alpha_bar)

    def to(self, device):
        """Moves network, VAE and noise schedule to a device; returns self."""
        self.device = device
        self.pipe.to(device)
        if self.alpha_bar is not None:
            self.alpha_bar = self.alpha_bar.to(device)
        return self

    @torch.no_grad()
    def encode_prompts(self, prompts, device):
        """{prompt: condition of one row}, for the given prompts. Then drops the text encoders.

        They leave the memory before the network comes to the device: Stable Diffusion 3's T5 alone
        is larger than its transformer.
        """
        encoders = [n for n in TEXT_ENCODERS if getattr(self.pipe, n, None) is not None]
        for name in encoders:
            getattr(self.pipe, name).to(device)
        conditions = {prompt: self._condition(prompt, device) for prompt in prompts}
        self.encoder_fingerprints = [fingerprint(getattr(self.pipe, name)) for name in encoders]
        for name in encoders:
            setattr(self.pipe, name, None)
        return conditions

    def predict(self, xt, t, condition):
        """The network's prediction at x_t (B, C, h, w), timesteps t (B,) -> (B, C, h, w), fp32.

        condition: of one row, or of B. On a GPU in bf16 (autocast; the weights stay fp32).
        """
        bf16 = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            condition = expand_condition(condition, len(xt))
            return self.net(xt, timestep=t, **condition).sample.float()

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), scaled as the network expects."""
        vae = self.pipe.vae
        z = vae.encode(images.to(self.device)).latent_dist.mode()
        return (z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        """Latents (B, C, h, w) -> images (B, 3, H, W), about [-1, 1]: the inverse of encode."""
        vae = self.pipe.vae
        z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        return vae.decode(z).sample

    def timesteps(self, steps):
        """The decreasing timesteps of DDIM, (steps,): for 50 steps, 981, 961, ..., 1."""
        # steps_offset=1, as in Stable Diffusion's configs. DDPM's have 0: 980, 960, ..., 0.
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config, steps_offset=1)
        scheduler.set_timesteps(steps)
        return scheduler.timesteps.to(self.device)

    @torch.no_grad()
    def sample(self, x, timesteps, condition, null_condition=None, guidance=1.0):
        """Deterministic sampling from x (B, C, h, w), as noisy as timesteps[0], to x_0.

        With classifier-free guidance if null_condition, that of the empty prompt, is given.
        """

        def guided(x, t):
            """The prediction that classifier-free guidance makes of two (Ho and Salimans 2021)."""
            prediction = self.predict(x, t, condition)
            if null_condition is None:
                return prediction
            unconditional = self.predict(x, t, null_condition)
            return unconditional + guidance * (prediction - unconditional)

        clip = not self.takes_prompt  # pixels
        return sample_deterministic(
            guided, x, timesteps, self.prediction_type, self.alpha_bar, clip
        )


class DDPM(Backbone):
    """DDPMPipeline: pixels in, pixels out, no prompt."""

    pipeline_class = DDPMPipeline
    takes_prompt = False

    def __init__(self, pipe):
        super().__init__(pipe)
        self.small = self.sample_size <= 64

    @property
    def resolution_unit(self):
        """All blocks but the last halve the sides."""
        return 2 ** (len(self.net.config.block_out_channels) - 1)

    def _condition(self, prompt, device):
        """A DDPM is unconditional."""
        return {}

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1], on the device: a DDPM works in pixels."""
        return images.to(self.device)

    def decode(self, latents):
        """The images themselves."""
        return latents


class StableDiffusion(Backbone):
    """StableDiffusionPipeline, 1.x and 2.x."""

    pipeline_class = StableDiffusionPipeline
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")

    @property
    def resolution_unit(self):
        """diffusers' pipeline takes multiples of 8, whatever the VAE."""
        return math.lcm(self.scale_factor, 8)

    def _condition(self, prompt, device):
        """Embeddings of the prompt's tokens, (1, 77, D)."""
        return {"encoder_hidden_states": self.pipe.encode_prompt(prompt, device, 1, False)[0]}

    @torch.no_grad()
    def generate_latents(self, conditions, null, seeds, resolution, steps, guidance):
        """Latents (B, 4, h, w) by DPM-Solver++ with guidance; image j follows seeds[j] alone.

        conditions: [B conditions of one row]; null: that of the empty prompt.
        """
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        embeddings = stack_conditions(conditions)["encoder_hidden_states"]  # (B, L, D)
        bf16 = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            output = self.pipe(
                prompt_embeds=embeddings,
                negative_prompt_embeds=null["encoder_hidden_states"].expand_as(embeddings),
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                height=resolution,
                width=resolution,
                output_type="latent",
            )
        return output.images.float()


class StableDiffusion3(Backbone):
    """StableDiffusion3Pipeline: a transformer trained by flow matching."""

    pipeline_class = StableDiffusion3Pipeline
    net_name = "transformer"
    lora_targets = tuple(
        f"attn.{name}"
        for name in (
            *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
            *("to_k", "to_out.0", "to_q", "to_v"),
        )
    )

    def __init__(self, pipe):
        super().__init__(pipe)
        self.prediction_type = "flow"
        self.shift = pipe.scheduler.config.shift
        self.has_t5 = pipe.text_encoder_3 is not None

    @property
    def resolution_unit(self):
        """The transformer cuts latents into patches."""
        return self.scale_factor * self.net.config.patch_size

    def _condition(self, prompt, device):
        """Embeddings of the tokens (1, L, D) by all text encoders, and CLIP's pooled (1, P)."""
        rows, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": rows, "pooled_projections": pooled}

    def timesteps(self, steps):
        """The scheduler's own, shifted towards noise; floats (steps,), from 1000."""
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.timesteps.to(self.device)


FAMILIES = (DDPM, StableDiffusion, StableDiffusion3)


# ---- 4. loading: safetensors only ---------------------------------------------------------------


def load_backbone(model, families=FAMILIES):
    """The Backbone of a pipeline folder or hub id: weights in fp32, on the CPU, or one line."""
    classes = {family.pipeline_class: family for family in families}
    pipe = load_pipeline(model, tuple(classes), dtype=torch.float32)
    return classes[type(pipe)](pipe)


def is_embedded(model):
    """True for the models in emoji/: emoji prompts and evaluation networks are for them alone."""
    return os.path.exists(model) and Path(model).resolve().is_relative_to(REPO / "emoji")


def load_pipeline(model, classes=None, safety_checker=False, **kwargs):
    """A diffusers pipeline of one of the classes (default: FAMILIES'), from a folder or a hub id.

    Without its safety checker, unless asked for: unlearning does not need it. Weights in half
    precision (variant fp16) are found too. Fails with one line: the hub client raises a dozen types
    of exceptions.
    """
    classes = classes or tuple(family.pipeline_class for family in FAMILIES)
    names = ", ".join(c.__name__ for c in classes)
    if os.path.exists(model) and not (Path(model) / "model_index.json").is_file():
        fail(
            f"--model {model}: no model_index.json there; "
            f"expected a diffusers pipeline folder or a hub id"
        )
    errors, pipeline_class, wanted = [], classes[0], []
    for variant in (None, "fp16"):
        try:
            index = DiffusionPipeline.load_config(model)
            known = [c for c in classes if c.__name__ == index["_class_name"]]
            if not known:
                fail(f"--model {model} is a {index['_class_name']}; expected one of {names}")
            pipeline_class = known[0]
            # diffusers must be told of components that a folder lacks, such as T5
            missing = ([None, None], (None, None))
            absent = {part: None for part, source in index.items() if source in missing}
            if pipeline_class is StableDiffusionPipeline and not safety_checker:
                absent |= {"safety_checker": None, "requires_safety_checker": False}
            has_t5 = "text_encoder_3" in index.keys() - absent.keys()
            if has_t5 and isinstance(kwargs.get("dtype"), torch.dtype):
                # T5 has 4.8 billion weights, 19 GB in fp32; fp16 overflows in it
                kwargs["dtype"] = {"default": kwargs["dtype"], "text_encoder_3": torch.bfloat16}
            wanted = [part for part in index if part not in absent]
            return pipeline_class.from_pretrained(
                model, variant=variant, use_safetensors=True, **absent, **kwargs
            )
        except Exception as e:
            errors.append(first_line(e))
    explain_pickles(model, pipeline_class.__name__, wanted, errors[0])
    fail(
        f"--model {model} cannot be loaded "
        f"(a diffusers folder or hub id with .safetensors weights?): {errors[0]}"
    )


def explain_pickles(model, pipeline, components, error):
    """Fails with the way out if a component has pickled weights alone.

    Opening a pickle may run any code, so converting it is the user's decision.
    """
    if os.path.exists(model):
        paths = sorted(Path(model).rglob("*"))
        files = [f.relative_to(model).as_posix() for f in paths if f.is_file()]
    else:
        try:
            files = HfApi().list_repo_files(str(model))
        except Exception:  # no network, no such repository: the error of the loading says so
            return
    folders = {".", *components}  # an old DDPM has its files beside model_index.json
    weights = {}  # {(folder, suffix): file}
    for f in files:
        if str(Path(f).parent) in folders:
            weights[str(Path(f).parent), Path(f).suffix] = f
    for (folder, suffix), name in weights.items():
        known_names = ("diffusion_pytorch_model", "pytorch_model", "model")
        known = name.split("/")[-1].startswith(known_names)
        if suffix == ".bin" and known and (folder, ".safetensors") not in weights:
            code = (
                f"from diffusers import {pipeline}; "
                f"{pipeline}.from_pretrained({str(model)!r}).save_pretrained('converted')"
            )
            fail(
                f"--model {model}: {name} is a pickle, which may run any code, and there is no "
                f".safetensors beside it; if you trust it, convert it once: "
                f'python -c "{code}", then --model converted ({error})'
            )
