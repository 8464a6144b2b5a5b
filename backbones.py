"""Model families: what each diffusers pipeline needs beside the two papers' methods.

    DDPM               unconditional, in pixels; predicts epsilon
    StableDiffusion    1.x and 2.x: latents, one text encoder; predicts epsilon or v
    StableDiffusionXL  latents, two text encoders, told the size of the image; epsilon or v
    StableDiffusion3   3 and 3.5: a transformer, up to three text encoders; predicts a velocity
    Flux               FLUX.1: the same with T5 and CLIP; guidance is an input of the network

load_backbone(model) returns one of them. All have the attributes and methods below, so that the
training loops never ask which family it is:

    net, prediction_type, alpha_bar, latent_shape      the network and what it computes
    trainable, train_method, lora_targets, add_lora    what of it can be trained
    encode_prompts, predict                            conditions on a prompt; runs the network
    encode, decode                                     images to what the network denoises, and back
    sample, generate_latents                           from noise, or from a prompt and a seed

The noise schedule and the meaning of a prediction are pure functions of tensors, in section 1.
Weights are read from .safetensors alone, and no code of a model folder is executed.
"""

import math
import os
import re
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
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import cast_training_params
from huggingface_hub import HfApi
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

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


def sample_timesteps(n, generator, shift=None, stratified=False):
    """n timesteps (n,): independent, or stratified, one from each of n equal quantiles.

    Stratified timesteps have the same distribution, but a mean over the batch varies less. With
    shift None: uniform on 0 .. 999. For flow matching, shift is the scheduler's: logit-normal times
    shifted towards noise, as Stable Diffusion 3 was trained (Esser et al. 2024), in [1, 1000]. In
    instance unlearning the velocity towards the surrogate grows as 1 / s; with uniform times, one
    sample near s = 0 would outweigh all others.
    """
    u = torch.rand(n, generator=generator)  # (n,), uniform on [0, 1): a quantile of each sample
    if stratified:
        u = (torch.arange(n) + u) / n  # sample i lies in [i / n, (i + 1) / n)
    if shift is None:
        return (1000 * u).long().clamp(max=999)  # rounding may lift u to 1
    s = torch.special.ndtri(u).sigmoid()  # a normal sample by its quantile, then logit-normal
    return (1000 * shift * s / (1 + (shift - 1) * s)).clamp(min=1)


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

# What `trainable` of a UNet names, as regular expressions on the names of its weights. attn2 is the
# cross-attention, where the prompt enters. "kv", its keys and values, are 2 % of Stable Diffusion's
# UNet; the released code of DoCo trains them, the paper does not say. "text": all layers that take
# a prompt's embeddings; in Stable Diffusion 1.x and 2.x these are the same.
KEYS_VALUES = r"attn2\.to_[kv]\."
TRAINABLE = {"kv": KEYS_VALUES, "text": KEYS_VALUES, "xattn": r"attn2\.", "full": r""}
# In a transformer the tokens of text and image attend to each other, in one attention. "kv": the
# keys and values of the text there, which has weights of its own; "xattn": all of that attention.
JOINT_TRAINABLE = {
    "kv": r"attn\.add_[kv]_proj\.",
    "text": r"^context_embedder\.|\.text_embedder\.",
    "xattn": r"\.attn\.",
    "full": r"",
}
JOINT_LORA_TARGETS = tuple(
    f"attn.{name}"
    for name in (
        *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
        *("to_k", "to_out.0", "to_q", "to_v"),
    )
)


class Backbone:
    """A diffusers pipeline of one family, on the CPU until .to(device). See the subclasses."""

    pipeline_class = None  # of diffusers
    net_name = "unet"  # the component that is trained
    trainable = TRAINABLE  # {name: regular expression on the names of weights}
    train_method = "kv"  # of these, what doco.py trains by default; "lora" adds a LoRA
    lora_targets = None  # attention projections that a LoRA adapts; None: the network trains whole
    takes_prompt = True
    # What a condition consists of: {argument of the network: argument of the pipeline}
    condition_names = {"encoder_hidden_states": "prompt_embeds"}
    shift = None  # of the timesteps towards noise, in the training of a flow-matching model

    def __init__(self, pipe):
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.net = getattr(pipe, self.net_name).requires_grad_(False).eval()
        self.device, self.bf16 = torch.device("cpu"), False
        self.prediction_type = pipe.scheduler.config.get("prediction_type")
        # (1000,), alpha_t of the papers; None for flow matching
        self.alpha_bar = getattr(pipe.scheduler, "alphas_cumprod", None)
        self.scale_factor = getattr(pipe, "vae_scale_factor", 1)  # pixels per latent, on a side
        # Side of a latent at the native resolution; FLUX's network has no such entry
        own = self.net.config.get("sample_size")
        self.sample_size = own or pipe.default_sample_size
        self.small = self.sample_size < 32
        # How images are generated: steps of the sampler, classifier-free guidance
        self.sampling_steps, self.guidance = 15 if self.small else 25, 6.0
        # Guidance of sample(), by DDIM or Euler, for instance_unlearn.py; its paper gives none
        self.sample_guidance = 4.0 if self.small else 7.0
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

    def to(self, device, mixed_precision="no"):
        """Moves network, VAE and noise schedule to a device; returns self.

        mixed_precision "bf16": passes run in bf16, and what is not trained by now is held in bf16,
        half the memory. What is trained stays in fp32, where a step of 1e-6 is no rounding error.
        """
        self.device = device
        self.bf16 = mixed_precision == "bf16"
        if self.bf16:
            for p in self.net.parameters():
                p.data = p.data if p.requires_grad else p.data.bfloat16()
        self.pipe.to(device)
        if self.alpha_bar is not None:
            self.alpha_bar = self.alpha_bar.to(device)
        return self

    def trainable_weights(self, method, rank, seed):
        """{name: parameter} of what is trained: a LoRA for "lora", else by a key of `trainable`."""
        if method == "lora":
            return self.add_lora(rank, seed)
        weights = self.net.named_parameters()
        trained = {n: p for n, p in weights if re.search(self.trainable[method], n)}
        for p in trained.values():
            p.requires_grad_()
        return trained

    def add_lora(self, rank, seed):
        """Adds a LoRA to the network; returns its weights in fp32, {name: parameter}, to train."""
        torch.manual_seed(seed)  # the same LoRA on every rank
        # alpha = rank: the LoRA is added with weight 1, whatever its rank.
        self.net.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=rank,
                init_lora_weights="gaussian",
                target_modules=list(self.lora_targets),
            )
        )
        cast_training_params(self.net)
        return {n: p for n, p in self.net.named_parameters() if p.requires_grad}

    def lora_state(self):
        """The LoRA's tensors by the names that pipe.load_lora_weights expects."""
        weights = get_peft_model_state_dict(self.net)
        return {f"{self.net_name}.{name}": p for name, p in weights.items()}

    def lora_parameter(self, name):
        """The network's parameter, of a name in lora_state()."""
        return name.removeprefix(f"{self.net_name}.").replace(".weight", ".default.weight")

    def embed(self, texts, device):
        """Embeddings of texts, {argument of the pipeline: (n, ...)}."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_prompts(self, prompts, device):
        """{prompt: condition of one row}, for the given prompts. Then drops the text encoders.

        They leave the memory before the network comes to the device: Stable Diffusion 3's T5 alone
        is larger than its transformer.
        """
        encoders = [n for n in TEXT_ENCODERS if getattr(self.pipe, n, None) is not None]
        for name in encoders:
            getattr(self.pipe, name).to(device)
        conditions = {}
        for prompt in prompts:
            parts = self.embed([prompt], device)
            names = self.condition_names.items()
            conditions[prompt] = {name: parts[argument] for name, argument in names}
        self.encoder_fingerprints = [fingerprint(getattr(self.pipe, name)) for name in encoders]
        for name in encoders:
            setattr(self.pipe, name, None)
        return conditions

    def predict(self, xt, t, condition):
        """The network's prediction at x_t (B, C, h, w), timesteps t (B,) -> (B, C, h, w), fp32.

        condition: of one row, or of B. In bf16 where .to() was told so, by autocast.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.run_net(xt, t, expand_condition(condition, len(xt))).float()

    def run_net(self, xt, t, condition):
        """The network's own call. condition: of B rows."""
        return self.net(xt, timestep=t, **condition).sample

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

    def guided(self, condition, null_condition=None, guidance=1.0):
        """The network as a sampler sees it: a function (x_t, t (B,)) -> prediction.

        With classifier-free guidance (Ho and Salimans 2021) if null_condition, that of the empty
        prompt, is given: it makes one prediction of two.
        """

        def predict(x, t):
            """The prediction, guided."""
            prediction = self.predict(x, t, condition)
            if null_condition is None:
                return prediction
            unconditional = self.predict(x, t, null_condition)
            return unconditional + guidance * (prediction - unconditional)

        return predict

    @torch.no_grad()
    def sample(self, x, timesteps, condition, null_condition=None, guidance=1.0):
        """Deterministic sampling from x (B, C, h, w), as noisy as timesteps[0], to x_0."""
        return self.sample_by(self.guided(condition, null_condition, guidance), x, timesteps)

    def sample_by(self, predict, x, timesteps):
        """sample() with any function (x_t, t (B,)) -> prediction in place of the network."""
        clip = not self.takes_prompt  # pixels
        return sample_deterministic(
            predict, x, timesteps, self.prediction_type, self.alpha_bar, clip
        )

    def image_scheduler(self):
        """The scheduler that generates images: of an epsilon or v model, DPM-Solver++."""
        return DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)

    @torch.no_grad()
    def generate_latents(self, conditions, null, seeds, resolution, steps, guidance):
        """Latents (B, C, h, w) by diffusers' pipeline; image j follows seeds[j] alone.

        conditions: [B conditions of one row]; null: that of the empty prompt.
        """
        self.pipe.scheduler = self.image_scheduler()
        rows, embeddings = stack_conditions(conditions), {}
        for name, argument in self.condition_names.items():
            embeddings[argument] = rows[name]
            embeddings[f"negative_{argument}"] = null[name].expand_as(rows[name])
        bf16 = self.bf16 or self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            output = self.pipe(
                **embeddings,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                height=resolution,
                width=resolution,
                output_type="latent",
            )
        return output.images.float()


class DDPM(Backbone):
    """DDPMPipeline: pixels in, pixels out, no prompt."""

    pipeline_class = DDPMPipeline
    takes_prompt = False
    condition_names = {}

    def __init__(self, pipe):
        super().__init__(pipe)
        self.small = self.sample_size <= 64
        self.sampling_steps, self.guidance = 25, None

    @property
    def resolution_unit(self):
        """All blocks but the last halve the sides."""
        return 2 ** (len(self.net.config.block_out_channels) - 1)

    def embed(self, texts, device):
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

    def embed(self, texts, device):
        """Embeddings of the tokens, (n, 77, D)."""
        return {"prompt_embeds": self.pipe.encode_prompt(texts, device, 1, False)[0]}


class StableDiffusionXL(StableDiffusion):
    """StableDiffusionXLPipeline: two text encoders; the network is told the size of the image."""

    pipeline_class = StableDiffusionXLPipeline
    # The pooled embedding enters beside the timestep, through two layers of its own: what a prompt
    # means reaches the network past K and V.
    trainable = TRAINABLE | {"text": KEYS_VALUES + r"|add_embedding\."}
    train_method = "text"
    condition_names = {
        "encoder_hidden_states": "prompt_embeds",
        "text_embeds": "pooled_prompt_embeds",
    }

    def __init__(self, pipe):
        super().__init__(pipe)
        self.guidance = self.sample_guidance = 5.0

    def embed(self, texts, device):
        """Tokens of both encoders side by side (n, 77, D), and the second's pooled (n, P).

        The empty prompt, which guidance subtracts, is zeros where the model's configuration says
        so: it was trained that way.
        """
        rows, _, pooled, _ = self.pipe.encode_prompt(texts, None, device, 1, False)
        if self.pipe.config.force_zeros_for_empty_prompt:
            keep = torch.tensor([bool(text) for text in texts], device=rows.device)
            rows, pooled = rows * keep.view(-1, 1, 1), pooled * keep.view(-1, 1)
        return {"prompt_embeds": rows, "pooled_prompt_embeds": pooled}

    def run_net(self, xt, t, condition):
        """With the size of the image before cropping, the crop's corner, and the size in the end.

        Training images were cropped and scaled; an image as it is has the same size twice, and no
        crop.
        """
        height, width = (side * self.scale_factor for side in xt.shape[-2:])
        time_ids = xt.new_tensor([height, width, 0, 0, height, width]).expand(len(xt), 6)
        added = {"text_embeds": condition["text_embeds"], "time_ids": time_ids}
        rows = condition["encoder_hidden_states"]
        return self.net(xt, t, rows, added_cond_kwargs=added).sample


class FlowMatching(Backbone):
    """What the transformers trained by flow matching share: they predict a velocity."""

    net_name = "transformer"
    trainable = JOINT_TRAINABLE
    # The text's tokens change from block to block: the whole attention has a part in a concept.
    train_method = "lora"
    lora_targets = JOINT_LORA_TARGETS
    condition_names = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
    }

    def __init__(self, pipe):
        super().__init__(pipe)
        self.prediction_type = "flow"
        self.shift = pipe.scheduler.config.shift

    def image_scheduler(self):
        """Its own, Euler's method."""
        return self.pipe.scheduler

    def timesteps(self, steps):
        """The scheduler's own, shifted towards noise; floats (steps,), from 1000."""
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.timesteps.to(self.device)


class StableDiffusion3(FlowMatching):
    """StableDiffusion3Pipeline, 3 and 3.5, with or without T5."""

    pipeline_class = StableDiffusion3Pipeline

    def __init__(self, pipe):
        super().__init__(pipe)
        self.sampling_steps, self.guidance = 25, self.sample_guidance
        self.has_t5 = pipe.text_encoder_3 is not None

    @property
    def resolution_unit(self):
        """The transformer cuts latents into patches."""
        return self.scale_factor * self.net.config.patch_size

    def embed(self, texts, device):
        """Embeddings of the tokens (n, L, D) by all text encoders, and CLIP's pooled (n, P)."""
        rows, _, pooled, _ = self.pipe.encode_prompt(
            texts, None, None, device=device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": rows, "pooled_prompt_embeds": pooled}


class Flux(FlowMatching):
    """FluxPipeline: FLUX.1 dev and schnell.

    Guidance is distilled into the network. dev takes its scale as an input, of which a training
    step sees 1, no guidance: the velocity that Eq. 9 is about. schnell has no guidance at all. How
    they were trained is not published: timesteps are those of Stable Diffusion 3, with the shift of
    FLUX's own sampler.
    """

    pipeline_class = FluxPipeline
    scale = 1.0  # of guidance, what the network is told

    def __init__(self, pipe):
        super().__init__(pipe)
        guided = self.net.config.guidance_embeds
        self.sampling_steps, self.guidance = (28, 3.5) if guided else (4, 0.0)
        self.sample_guidance = self.guidance

    @property
    def resolution_unit(self):
        """Latents are cut into patches of 2x2."""
        return self.scale_factor * 2

    def latent_shape(self, resolution):
        """(C, h, w): in_channels counts the four latents of a patch."""
        channels, *sides = super().latent_shape(resolution)
        return (channels // 4, *sides)

    def check_resolution(self, resolution):
        """As for all. dev shifts its timesteps further towards noise, the larger the image is."""
        resolution = super().check_resolution(resolution)
        config = self.pipe.scheduler.config
        if config.use_dynamic_shifting:
            tokens = (resolution // self.resolution_unit) ** 2
            limits = config.base_image_seq_len, config.max_image_seq_len
            self.mu = calculate_shift(tokens, *limits, config.base_shift, config.max_shift)
            self.shift = math.exp(self.mu)
        return resolution

    def embed(self, texts, device):
        """T5's embeddings of the tokens (n, 512, D), and CLIP's pooled (n, P)."""
        rows, pooled, _ = self.pipe.encode_prompt(texts, None, device)
        return {"prompt_embeds": rows.float(), "pooled_prompt_embeds": pooled.float()}

    def run_net(self, xt, t, condition):
        """The network's call on packed latents: a token is a patch of 2x2 latents."""
        n, channels, h, w = xt.shape
        like = (xt.device, xt.dtype)
        tokens = FluxPipeline._pack_latents(xt, n, channels, h, w)  # (B, h w / 4, 4 C)
        guided = self.net.config.guidance_embeds
        velocity = self.net(
            tokens,
            timestep=t / 1000,
            guidance=xt.new_full((n,), self.scale) if guided else None,
            img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, *like),
            txt_ids=xt.new_zeros(condition["encoder_hidden_states"].shape[1], 3),
            **condition,
        ).sample
        return self.unpack(velocity, h * self.scale_factor)

    def unpack(self, tokens, resolution):
        """(B, h w / 4, 4 C) -> (B, C, h, w)."""
        return FluxPipeline._unpack_latents(tokens, resolution, resolution, self.scale_factor)

    def timesteps(self, steps):
        """The scheduler's own, for the resolution that check_resolution was asked for."""
        scheduler = self.pipe.scheduler
        sigmas = torch.linspace(1, 1 / steps, steps).tolist()
        more = {"mu": self.mu} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(sigmas=sigmas, **more)
        return scheduler.timesteps.to(self.device)

    def guided(self, condition, null_condition=None, guidance=1.0):
        """As for all, but the guidance is told to the network: one pass in place of two."""

        def predict(x, t):
            """The prediction, guided."""
            self.scale = guidance
            prediction = self.predict(x, t, condition)
            self.scale = Flux.scale
            return prediction

        return predict

    def generate_latents(self, conditions, null, seeds, resolution, steps, guidance):
        """As for all; diffusers' pipeline returns packed latents."""
        how = (seeds, resolution, steps, guidance)
        return self.unpack(super().generate_latents(conditions, null, *how), resolution)


FAMILIES = (DDPM, StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)


# ---- 4. loading: safetensors only ---------------------------------------------------------------


def load_backbone(model, families=FAMILIES, why=""):
    """The Backbone of a pipeline folder or hub id: weights in fp32, on the CPU, or one line.

    why: no other families; for that line.
    """
    classes = {family.pipeline_class: family for family in families}
    pipe = load_pipeline(model, tuple(classes), why=why, dtype=torch.float32)
    backbone = classes[type(pipe)](pipe)
    if backbone.prediction_type not in ("epsilon", "v_prediction", "flow"):
        fail(
            f"--model {model} predicts {backbone.prediction_type}; "
            f"expected epsilon, v_prediction or flow matching"
        )
    return backbone


def is_embedded(model):
    """True for the models in emoji/: emoji prompts and evaluation networks are for them alone."""
    return os.path.exists(model) and Path(model).resolve().is_relative_to(REPO / "emoji")


def load_pipeline(model, classes=None, safety_checker=False, why="", **kwargs):
    """A diffusers pipeline of one of the classes (default: FAMILIES'), from a folder or a hub id.

    Without its safety checker, unless asked for: unlearning does not need it. Weights in half
    precision (variant fp16) are found too. Fails with one line: the hub client raises a dozen types
    of exceptions.
    """
    classes = classes or tuple(family.pipeline_class for family in FAMILIES)
    names = ", ".join(c.__name__ for c in classes) + (f": {why}" if why else "")
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
            sources = {p: source for p, source in index.items() if isinstance(source, list | tuple)}
            t5 = [p for p, source in sources.items() if source[1] == "T5EncoderModel"]
            if t5 and isinstance(kwargs.get("dtype"), torch.dtype):
                # T5 has 4.8 billion weights, 19 GB in fp32; fp16 overflows in it
                kwargs["dtype"] = {"default": kwargs["dtype"], t5[0]: torch.bfloat16}
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


# ---- 5. what a run leaves -----------------------------------------------------------------------

LORA, DELTA = "pytorch_lora_weights.safetensors", "delta.safetensors"  # a LoRA; changed weights


def load_unlearned(pipe, folder):
    """Loads the LoRA or the changed weights of a run folder into a pipeline; a LoRA is fused."""
    if (folder / LORA).is_file():
        pipe.load_lora_weights(load_file(folder / LORA))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    else:
        net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        net.load_state_dict(load_file(folder / DELTA), strict=False)


def loading_lines(backbone, model, out, prompt):
    """The lines of Python that load a run folder in plain diffusers and generate an image."""
    family = backbone.pipeline_class.__name__
    if not backbone.takes_prompt:
        return f"""
from diffusers import {family}

pipe = {family}.from_pretrained({str(out / "pipeline")!r})
pipe(num_inference_steps=50).images[0].save("after.png")
"""
    absent = ""  # diffusers must be told of a component that the folder lacks
    if isinstance(backbone, StableDiffusion3) and not backbone.has_t5:
        absent = "text_encoder_3=None, tokenizer_3=None, "
    more, load = "", f"pipe.load_lora_weights({str(out)!r})"
    if (out / DELTA).is_file():
        more = "from safetensors.torch import load_file\n"
        weights = f"load_file({str(out / DELTA)!r})"
        load = f"pipe.{backbone.net_name}.load_state_dict({weights}, strict=False)"
    return f"""
import torch
from diffusers import {family}
{more}
pipe = {family}.from_pretrained({model!r}, {absent}dtype=torch.float32)
{load}
pipe({prompt!r}).images[0].save("after.png")
"""
