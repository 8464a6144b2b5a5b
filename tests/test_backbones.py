"""backbones.py against plain diffusers, on tiny models of each family."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel

import backbones
import common

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
CPU = torch.device("cpu")
# {family: (pipeline of diffusers, what its loading must be told)}
PIPELINES = {
    "ddpm": (DDPMPipeline, {}),
    "sd": (StableDiffusionPipeline, {"safety_checker": None}),
    "sdxl": (StableDiffusionXLPipeline, {}),
    "sd3": (StableDiffusion3Pipeline, {"text_encoder_3": None, "tokenizer_3": None}),
    "flux": (FluxPipeline, {"dtype": {"default": torch.float32, "text_encoder_2": torch.bfloat16}}),
}
WITH_PROMPT = ("sd", "sdxl", "sd3", "flux")
SIDES = {"ddpm": 16, "sd": 64, "sdxl": 16, "sd3": 16, "flux": 16}  # of an image, in pixels


@pytest.fixture(scope="module")
def folders(tiny, tiny_ddpm, tiny_sdxl, tiny_sd3, tiny_flux):
    return {"ddpm": tiny_ddpm, "sd": tiny, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


def plain(family, folder):
    """The pipeline by diffusers alone."""
    pipeline, told = PIPELINES[family]
    pipe = pipeline.from_pretrained(folder, **told)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded(folder, side=None):
    """The backbone, asked for images of that side."""
    backbone = backbones.load_backbone(str(folder))
    backbone.check_resolution(side)
    return backbone


SCHEDULER = "scheduler/scheduler_config.json"


def edited(folder, copy, file, **changes):
    """A copy of a model folder with changes in a file of JSON."""
    shutil.copytree(folder, copy)
    config = copy / file
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return copy


def random_like(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the noise schedule and the meaning of a prediction -----------------------------------------


def schedule(prediction_type):
    return None if prediction_type == "flow" else DDIMScheduler().alphas_cumprod


def test_coefficients_by_hand():
    alpha_bar = torch.tensor([0.64, 0.36])
    a, b = backbones.coefficients(torch.tensor([1, 0, 1]), alpha_bar)
    assert a.shape == b.shape == (3, 1, 1, 1)
    torch.testing.assert_close(a.flatten(), torch.tensor([0.6, 0.8, 0.6]))
    torch.testing.assert_close(b.flatten(), torch.tensor([0.8, 0.6, 0.8]))
    a, b = backbones.coefficients(torch.tensor([250.0, 1000.0]), None)  # s = 1 / 4 and 1
    assert a.flatten().tolist() == [0.75, 0] and b.flatten().tolist() == [0.25, 1]


def test_targets_and_predictions_by_hand():
    """x_0 = 2, eps = -1, a = 0.8, b = 0.6: x_t = 1, v = -2, the velocity of flow matching -3."""
    x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    for prediction_type, expected in zip(PREDICTION_TYPES, (-1, -2, -3), strict=True):
        target = backbones.prediction_target(prediction_type, x0, noise, 0.8, 0.6)
        torch.testing.assert_close(target, torch.full((1, 1, 1, 1), float(expected)))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predict_x0_inverts_prediction_target(prediction_type):
    x0, noise = random_like(2, 4, 3, 8, 8).double()
    t = torch.tensor([0, 10, 500, 999])
    alpha_bar = schedule(prediction_type)
    a, b = backbones.coefficients(t, None if alpha_bar is None else alpha_bar.double())
    xt = a * x0 + b * noise
    target = backbones.prediction_target(prediction_type, x0, noise, a, b)
    got = backbones.predict_x0(prediction_type, target, xt, a, b)
    torch.testing.assert_close(got, x0)
    # One sample at a time: no sample knows of another's timestep.
    for i in range(4):
        one = backbones.predict_x0(prediction_type, target[i], xt[i], a[i], b[i])
        torch.testing.assert_close(one, x0[i])


def test_targets_agree_with_diffusers():
    x0, noise = random_like(2, 1, 4, 8, 8)
    scheduler = DDIMScheduler()
    t = torch.tensor([321])
    a, b = backbones.coefficients(t, scheduler.alphas_cumprod)
    torch.testing.assert_close(a * x0 + b * noise, scheduler.add_noise(x0, noise, t))
    expected = scheduler.get_velocity(x0, noise, t)
    got = backbones.prediction_target("v_prediction", x0, noise, a, b)
    torch.testing.assert_close(got, expected)
    flow = FlowMatchEulerDiscreteScheduler()
    t = flow.timesteps[200:201]
    a, b = backbones.coefficients(t, None)
    torch.testing.assert_close(a * x0 + b * noise, flow.scale_noise(x0, t, noise))


# ---- deterministic sampling ---------------------------------------------------------------------


def reference_sampling(scheduler, predict, x, timesteps, **more):
    """scheduler.step of diffusers at each timestep."""
    for t in timesteps:
        x = scheduler.step(predict(x, t.expand(len(x))), t, x, **more).prev_sample
    return x


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_sampler_with_a_constant_prediction_agrees_with_diffusers(prediction_type):
    x, prediction = random_like(2, 1, 4, 8, 8)
    if prediction_type == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        config = {"clip_sample": False, "set_alpha_to_one": True}
        scheduler = DDIMScheduler(prediction_type=prediction_type, **config)
    scheduler.set_timesteps(5)

    def predict(x, t):
        return prediction

    expected = reference_sampling(scheduler, predict, x, scheduler.timesteps)
    how = (scheduler.timesteps, prediction_type, getattr(scheduler, "alphas_cumprod", None))
    got = backbones.sample_deterministic(predict, x, *how, clip=False)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def embeddings(family, pipe, prompt):
    """The condition of a prompt by diffusers alone."""
    if family == "ddpm":
        return {}
    if family == "sd":
        rows = pipe.encode_prompt(prompt, CPU, 1, False)[0]
        return {"encoder_hidden_states": rows}
    if family == "flux":
        rows, pooled, _ = pipe.encode_prompt(prompt, prompt)
        return {"encoder_hidden_states": rows.float(), "pooled_projections": pooled}
    if family == "sdxl":  # the empty prompt is what guidance subtracts
        rows, pooled = pipe.encode_prompt(prompt or "a cat")[0 if prompt else 1 :: 2]
        return {"encoder_hidden_states": rows, "text_embeds": pooled}
    rows, _, pooled, _ = pipe.encode_prompt(
        prompt, prompt, prompt, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": rows, "pooled_projections": pooled}


@torch.no_grad()
def network(family, pipe, xt, t, condition, guidance=1.0):
    """The network's prediction by diffusers alone. A condition of one row serves all samples."""
    n, _, h, w = xt.shape
    condition = {k: v.expand(n, *v.shape[1:]) for k, v in condition.items()}
    if family == "sd3":
        return pipe.transformer(xt, timestep=t, **condition).sample
    if family in ("ddpm", "sd"):
        return pipe.unet(xt, t, **condition).sample
    if family == "sdxl":
        size = (h * pipe.vae_scale_factor, w * pipe.vae_scale_factor)
        time_ids = pipe._get_add_time_ids(
            size, (0, 0), size, torch.float32, text_encoder_projection_dim=16
        )
        added = {"text_embeds": condition["text_embeds"], "time_ids": time_ids.expand(n, -1)}
        rows = condition["encoder_hidden_states"]
        return pipe.unet(xt, t, rows, added_cond_kwargs=added).sample
    places = torch.cartesian_prod(torch.arange(h // 2), torch.arange(w // 2))
    velocity = pipe.transformer(
        F.unfold(xt, 2, stride=2).transpose(1, 2),  # a token is a patch of 2x2
        timestep=t / 1000,
        guidance=torch.full((n,), guidance),
        img_ids=F.pad(places, (1, 0)).float(),  # 0, row, column
        txt_ids=torch.zeros(512, 3),
        **condition,
    ).sample
    return F.fold(velocity.transpose(1, 2), (h, w), 2, stride=2)


def generated(family, pipe, side, steps, guidance, prompt="a cat", **noise):
    """Latents by the whole call of diffusers' pipeline."""
    inputs = {"prompt": prompt}
    if family == "flux":  # T5's are in bf16, in which the pipeline would compute all
        rows, pooled = embeddings(family, pipe, prompt).values()
        inputs = {"prompt_embeds": rows, "pooled_prompt_embeds": pooled}
    if family == "flux" and "latents" in noise:
        noise = {"latents": F.unfold(noise["latents"], 2, stride=2).transpose(1, 2)}
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}
    z = pipe(height=side, width=side, **inputs, **call, **noise).images
    if family == "flux":
        z = F.fold(z.transpose(1, 2), (side // 2, side // 2), 2, stride=2)
    return z


# (family, prediction type); of a flow there is one
MODELS = [(family, "epsilon") for family in WITH_PROMPT] + [("sdxl", "v_prediction")]
OF_EPSILON = [("ddpm", "epsilon"), ("ddpm", "v_prediction"), ("sd", "epsilon")]
OF_EPSILON += [("sd", "v_prediction"), ("sdxl", "epsilon"), ("sdxl", "v_prediction")]


@pytest.fixture
def folder(folders, tmp_path, family, prediction_type):
    """The folder of a family, of a model that was trained to predict that."""
    if prediction_type == "epsilon":
        return folders[family]
    return edited(folders[family], tmp_path / "v", SCHEDULER, prediction_type="v_prediction")


@pytest.mark.parametrize(("family", "prediction_type"), OF_EPSILON)
def test_sampling_is_ddim_with_eta_0(folder, family, prediction_type):
    """From x_T of a whole sampler and from its middle; a DDPM's x0_hat is clipped to [-1, 1]."""
    pipe = plain(family, folder)
    config = {"steps_offset": 1, "set_alpha_to_one": True, "clip_sample": family == "ddpm"}
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
    scheduler.set_timesteps(4)
    backbone = loaded(folder)
    assert backbone.prediction_type == prediction_type
    condition = backbone.encode_prompts(["a cat"], CPU)["a cat"]
    timesteps = backbone.timesteps(4)
    assert torch.equal(timesteps, scheduler.timesteps)
    x = random_like(2, *backbone.latent_shape(backbone.check_resolution(None)))
    conditioned = embeddings(family, pipe, "a cat")

    def predict(x, t):
        return network(family, pipe, x, t, conditioned)

    for part in (timesteps, timesteps[2:]):
        # The noise is that of the clipped x0_hat: use_clipped_model_output.
        expected = reference_sampling(
            scheduler, predict, x, part, eta=0.0, use_clipped_model_output=True
        )
        got = backbone.sample(x, part, condition)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    if family == "ddpm":
        assert got.abs().max() <= 1
    else:
        assert got.abs().max() > 1  # latents are never clipped


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_sampling_of_a_flow_is_euler(folders, family):
    pipe = plain(family, folders[family])
    if family == "sd3":
        pipe.scheduler.set_timesteps(4)
    else:  # 16 tokens: 240 below the 256 where mu is 0.5, on the way to 1.15 at 4096
        mu = 0.5 - 240 * (1.15 - 0.5) / (4096 - 256)
        pipe.scheduler.set_timesteps(sigmas=np.array([1, 0.75, 0.5, 0.25]), mu=mu)
    backbone = loaded(folders[family], side=16)
    condition = backbone.encode_prompts(["a cat"], CPU)["a cat"]
    timesteps = backbone.timesteps(4)
    torch.testing.assert_close(timesteps, pipe.scheduler.timesteps)
    assert timesteps[0] == 1000
    x, conditioned = random_like(2, 4, 8, 8), embeddings(family, pipe, "a cat")

    def predict(x, t):
        return network(family, pipe, x, t, conditioned)

    expected = reference_sampling(pipe.scheduler, predict, x, pipe.scheduler.timesteps)
    got = backbone.sample(x, timesteps, condition)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "prediction_type"), MODELS)
def test_guided_sampling_is_that_of_the_pipeline(folder, family, prediction_type):
    """The whole call of diffusers, from the same noise. FLUX's guidance costs no second pass."""
    pipe, side = plain(family, folder), SIDES[family]
    if family in ("sd", "sdxl"):
        config = {"steps_offset": 1, "set_alpha_to_one": True, "clip_sample": False}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
    backbone, passes = loaded(folder, side), []
    backbone.net.register_forward_hook(lambda *args: passes.append(1))
    x = random_like(1, *backbone.latent_shape(side))
    expected = generated(family, pipe, side, 3, 4.0, latents=x)
    conditions = backbone.encode_prompts(["a cat", ""], CPU)
    timesteps = backbone.timesteps(3)
    before = backbone.sample(x, timesteps, conditions["a cat"])
    assert len(passes) == 3
    got = backbone.sample(x, timesteps, conditions["a cat"], conditions[""], guidance=4.0)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert len(passes) == (6 if family == "flux" else 9)
    assert not torch.allclose(got, before, atol=1e-3)
    with torch.no_grad():  # afterwards, as in a training step: no guidance
        again = backbone.predict(x, timesteps[:1], conditions["a cat"])
    expected = network(family, pipe, x, timesteps[:1], conditions["a cat"])
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_sampling_of_a_ddpm_is_that_of_the_ddim_pipeline(folders):
    pipe = plain("ddpm", folders["ddpm"])
    backbone = backbones.load_backbone(folders["ddpm"])
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=1)
    ddim = DDIMPipeline(pipe.unet, scheduler)
    ddim.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 5, "output_type": "np", "use_clipped_model_output": True}
    expected = ddim(generator=torch.Generator().manual_seed(3), **call).images
    got = backbone.sample(random_like(1, 3, 16, 16, seed=3), backbone.timesteps(5), {})
    image = (got[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    torch.testing.assert_close(image, torch.from_numpy(expected[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "prediction_type"), MODELS)
def test_generated_latents_are_those_of_the_pipeline(folder, family, prediction_type):
    """Prompt, guidance with the empty prompt, DPM-Solver++ or Euler, a generator with the seed."""
    pipe, side = plain(family, folder), SIDES[family]
    if family in ("sd", "sdxl"):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    seed = torch.Generator().manual_seed(5)
    expected = generated(family, pipe, side, 3, 6.0, generator=seed)
    backbone = loaded(folder, side)
    conditions = backbone.encode_prompts(["a cat", ""], CPU)
    got = backbone.generate_latents([conditions["a cat"]], conditions[""], [5], side, 3, 6.0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", WITH_PROMPT)
def test_generated_latents_follow_their_own_seed_and_prompt(folders, family):
    """The same image alone, in another batch and in another row of it; another prompt, another."""
    backbone, side = loaded(folders[family]), SIDES[family]
    conditions = backbone.encode_prompts(["a cat", "a dog", ""], CPU)
    cat, dog, null = (conditions[p] for p in ("a cat", "a dog", ""))
    how = {"resolution": side, "steps": 2, "guidance": 6.0}
    three = backbone.generate_latents([dog, cat, cat], null, [1, 2, 3], **how)
    one = backbone.generate_latents([cat], null, [2], **how)
    assert three.shape == (3, *backbone.latent_shape(side))
    torch.testing.assert_close(three[1:2], one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(three[1], three[2], atol=1e-2)
    other = backbone.generate_latents([dog], null, [2], **how)
    assert not torch.equal(one, other)
    large = backbone.generate_latents([cat], null, [2], 32, 2, 6.0)
    assert large.shape == (1, *backbone.latent_shape(32))


# ---- images and latents -------------------------------------------------------------------------


@pytest.mark.parametrize("family", WITH_PROMPT)
def test_encode_and_decode_by_hand(folders, family):
    """The mean of the VAE's posterior, shifted and scaled as the config says; decode inverts it."""
    pipe, backbone = plain(family, folders[family]), backbones.load_backbone(folders[family])
    vae, images = pipe.vae, random_like(2, 3, 32, 32).clamp(-1, 1)
    constants = {"sd": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "sd3": (0.5, 0.1)}
    scale, shift = constants.get(family, (0.3611, 0.1159))
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
    got = backbone.encode(images)
    torch.testing.assert_close(got, (mean - shift) * scale)
    assert got.shape == (2, *backbone.latent_shape(32))
    assert not got.requires_grad
    with torch.no_grad():
        expected = vae.decode(mean).sample
    torch.testing.assert_close(backbone.decode(got), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(backbone.encode(images), got)  # no draw from the posterior


def test_a_ddpm_denoises_pixels(folders):
    backbone = backbones.load_backbone(folders["ddpm"])
    images = random_like(2, 3, 16, 16)
    assert torch.equal(backbone.encode(images), images)
    assert torch.equal(backbone.decode(images), images)
    assert backbone.latent_shape(16) == (3, 16, 16)


# ---- conditions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PIPELINES)
def test_encode_prompts(folders, family):
    """Each prompt's condition as diffusers makes it; then the text encoders are gone."""
    pipe, backbone = plain(family, folders[family]), backbones.load_backbone(folders[family])
    prompts = ["", "a cat"]
    conditions = backbone.encode_prompts(prompts, CPU)
    assert list(conditions) == prompts
    for prompt in prompts:
        expected = embeddings(family, pipe, prompt)
        assert conditions[prompt].keys() == expected.keys()
        for name, rows in expected.items():
            assert torch.equal(conditions[prompt][name], rows) and len(rows) == 1
            assert not conditions[prompt][name].requires_grad
            assert conditions[prompt][name].dtype == torch.float32
    names = ("text_encoder", "text_encoder_2")
    encoders = [getattr(pipe, n) for n in names if hasattr(pipe, n)]
    assert len(encoders) == {"ddpm": 0, "sd": 1}.get(family, 2)
    assert backbone.encoder_fingerprints == [common.fingerprint(e) for e in encoders]
    assert all(getattr(backbone.pipe, name, None) is None for name in names)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_of_stable_diffusion_xl_is_what_the_config_says(folders, tmp_path, zeros):
    changes = {"force_zeros_for_empty_prompt": zeros}
    folder = edited(folders["sdxl"], tmp_path / "xl", "model_index.json", **changes)
    condition = loaded(folder).encode_prompts([""], CPU)[""]
    for name, rows in embeddings("sdxl", plain("sdxl", folder), "").items():
        assert torch.equal(condition[name], rows) and rows.any() != zeros


def test_stack_and_expand():
    conditions = [
        {"rows": torch.full((1, 2, 3), v), "pooled": torch.full((1, 4), v)} for v in (1, 2)
    ]
    stacked = backbones.stack_conditions(conditions)
    assert stacked["rows"][:, 0, 0].tolist() == stacked["pooled"][:, 0].tolist() == [1, 2]
    expanded = backbones.expand_condition(conditions[1], 3)
    assert expanded["rows"].shape == (3, 2, 3) and expanded["pooled"].shape == (3, 4)
    assert expanded["rows"].data_ptr() == conditions[1]["rows"].data_ptr()
    assert backbones.expand_condition(stacked, 2)["pooled"][:, 0].tolist() == [1, 2]  # as it is


@pytest.mark.parametrize("family", PIPELINES)
def test_predict(folders, family):
    """A row for all, or one row each: every sample by its own timestep and condition."""
    pipe, backbone = plain(family, folders[family]), backbones.load_backbone(folders[family])
    conditions = backbone.encode_prompts(["a cat", "a dog"], CPU)
    xt = random_like(2, *backbone.latent_shape(32))  # native of none; SDXL is told the size
    t = torch.tensor([700, 20])
    stacked = backbones.stack_conditions(list(conditions.values()))
    with torch.no_grad():
        got = backbone.predict(xt, t, stacked)
        same = backbone.predict(xt, t, conditions["a cat"])
        assert got.shape == xt.shape and got.dtype == torch.float32
        for i, prompt in enumerate(conditions):
            expected = network(family, pipe, xt[i : i + 1], t[i : i + 1], conditions[prompt])
            torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-4, atol=1e-4)
            alike = torch.allclose(same[i], got[i], rtol=1e-4, atol=1e-4)
            assert alike == (prompt == "a cat" or family == "ddpm")


def test_predictions_are_fp32_also_from_a_network_in_bf16(folders):
    """As autocast on a GPU makes it: the losses and their gradients need the precision."""
    backbone = backbones.load_backbone(folders["ddpm"])
    backbone.net.to(torch.bfloat16)
    with torch.no_grad():
        xt = random_like(1, 3, 16, 16).bfloat16()
        assert backbone.predict(xt, torch.tensor([500]), {}).dtype == torch.float32


# ---- what a family knows of itself --------------------------------------------------------------


def test_families(folders):
    every = [backbones.load_backbone(folders[f]) for f in PIPELINES]
    ddpm, sd, sdxl, sd3, flux = every
    assert tuple(map(type, every)) == backbones.FAMILIES
    assert [b.prediction_type for b in every] == ["epsilon"] * 3 + ["flow"] * 2
    assert [b.takes_prompt for b in every] == [False] + [True] * 4
    assert [b.shift for b in every] == [None, None, None, 3.0, flux.shift]
    assert sd3.alpha_bar is flux.alpha_bar is None
    assert torch.equal(ddpm.alpha_bar, DDIMScheduler().alphas_cumprod)
    assert torch.equal(sdxl.alpha_bar, sd.alpha_bar)
    assert all(b.net is b.pipe.unet for b in (ddpm, sd, sdxl))
    assert all(b.net is b.pipe.transformer for b in (sd3, flux))
    assert [b.small for b in every] == [True] * 4 + [False] and not sd3.has_t5
    for b in every:  # nothing is trained, nor in training mode, until a script says so
        assert not b.net.training and not any(p.requires_grad for p in b.net.parameters())
    assert [b.latent_shape(32) for b in every] == [(3, 32, 32), (4, 8, 8)] + [(4, 16, 16)] * 3
    assert [b.timesteps(50)[0] for b in (ddpm, sd, sdxl)] == [981] * 3  # 980 without the offset
    assert [b.sampling_steps for b in every] == [25, 15, 15, 25, 28]
    assert [b.guidance for b in every] == [None, 6.0, 5.0, 4.0, 3.5]


def test_large_models_take_more_steps(folders, tmp_path):
    """Side of the latents 32 in place of 8: as in the papers' models, and their guidance."""
    sizes = {"ddpm": "unet", "sd": "unet", "sdxl": "unet", "sd3": "transformer"}
    how = []
    for family, part in sizes.items():
        pipe = plain(family, folders[family])
        getattr(pipe, part).register_to_config(sample_size=65 if family == "ddpm" else 32)
        backbone = dict(zip(PIPELINES, backbones.FAMILIES, strict=True))[family](pipe)
        how.append((backbone.small, backbone.sampling_steps, backbone.guidance))
    assert how == [(False, 25, None), (False, 25, 6.0), (False, 25, 5.0), (False, 25, 7.0)]


# (side of the image, mu): 16, 256 and 4096 tokens; the last is native
@pytest.mark.parametrize(("side", "mu"), [(16, 0.459375), (64, 0.5), (None, 1.15)])
def test_the_shift_of_flux_grows_with_the_image(folders, side, mu):
    """Also in training: s becomes e^mu s / (1 + (e^mu - 1) s), as in the scheduler's steps."""
    backbone = loaded(folders["flux"], side)
    assert backbone.mu == pytest.approx(mu) and backbone.shift == pytest.approx(math.exp(mu))
    s, shift = torch.tensor([1, 0.75, 0.5, 0.25]), backbone.shift
    expected = 1000 * shift * s / (1 + (shift - 1) * s)
    torch.testing.assert_close(backbone.timesteps(4), expected)


def test_schnell_has_neither_guidance_nor_a_shift_that_grows(folders):
    """FLUX.1-schnell: distilled to four steps, without an input for the guidance."""
    pipe = plain("flux", folders["flux"])
    config = dict(pipe.transformer.config) | {"guidance_embeds": False}
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_config(config)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.register_modules(transformer=transformer, scheduler=scheduler)
    expected = generated("flux", pipe, 16, 4, 0.0, generator=torch.Generator().manual_seed(5))
    backbone = backbones.Flux(pipe)
    assert backbone.check_resolution(64) == 64 and backbone.shift == 1
    assert (backbone.sampling_steps, backbone.guidance) == (4, 0.0)
    assert backbone.timesteps(4).tolist() == [1000, 750, 500, 250]
    condition = backbone.encode_prompts(["a cat"], CPU)["a cat"]
    got = backbone.generate_latents([condition], condition, [5], 16, 4, 0.0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    noise = random_like(1, 4, 8, 8, seed=5)
    for guidance in (0.0, 3.5):
        same = backbone.sample(noise, backbone.timesteps(4), condition, condition, guidance)
        torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-4)


# (family, native resolution, another one that fits, those that do not)
RESOLUTIONS = [("ddpm", 16, 32, (1, 17)), ("sd", 64, 32, (2, 30)), ("sdxl", 16, 32, (4, 12))]
RESOLUTIONS += [("sd3", 16, 32, (1, 15)), ("flux", 256, 16, (2, 18))]


@pytest.mark.parametrize(("family", "native", "other", "wrong"), RESOLUTIONS)
def test_check_resolution(folders, family, native, other, wrong):
    backbone = backbones.load_backbone(folders[family])
    assert backbone.check_resolution(None) == native
    assert backbone.check_resolution(other) == other
    condition = backbone.encode_prompts([""], CPU)[""]
    with torch.no_grad():
        xt = random_like(1, *backbone.latent_shape(other))
        assert backbone.predict(xt, torch.tensor([500]), condition).shape == xt.shape
    for size in wrong:
        unit = backbone.resolution_unit
        with pytest.raises(SystemExit, match=f"--resolution {size} is no multiple of {unit}, "):
            backbone.check_resolution(size)


def test_stable_diffusion_3_needs_whole_patches(folders):
    """Latents of 7x7 and patches of 2x2: the network would return 6x6."""
    backbone = backbones.load_backbone(folders["sd3"])
    with pytest.raises(SystemExit, match="--resolution 14 is no multiple of 4"):
        backbone.check_resolution(14)


def test_fingerprint(folders, tiny, tmp_path):
    """Equal for equal models; another one for other weights of any part, or another schedule."""

    def of(folder):
        backbone = backbones.load_backbone(folder)
        backbone.encode_prompts([""], CPU)
        return backbone.fingerprint()

    first = of(tiny)
    assert of(tiny) == first
    seen = {first}
    for part in (
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
    ):
        folder = tmp_path / part.split("/")[0]
        shutil.copytree(tiny, folder)
        file = folder / f"{part}.safetensors"
        tensors = load_file(file)
        next(iter(tensors.values())).flatten()[0] += 1e-3
        save_file(tensors, file, {"format": "pt"})
        seen.add(of(folder))
    seen.add(of(edited(tiny, tmp_path / "schedule", SCHEDULER, beta_end=0.015)))
    assert len(seen) == 5


# ---- what is trained, and what a run leaves -----------------------------------------------------


def attentions(net):
    """[(attention, whether the prompt takes part in it)]."""
    layers = [m for m in net.modules() if isinstance(m, (Attention, FluxAttention))]
    if isinstance(net, UNet2DConditionModel):
        return [(layer, layer.is_cross_attention) for layer in layers]
    return [(layer, True) for layer in layers]  # of a DDPM, or of all tokens together


def names_of(net, parts):
    """The names of the parameters of some modules of a network."""
    ids = {id(p) for part in parts for p in part.parameters()}
    return {name for name, p in net.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("family", WITH_PROMPT)
def test_trainable_names_exactly_the_intended_weights(folders, family):
    """By the kinds of the layers, and not by their names."""
    net = loaded(folders[family]).net
    cross = [layer for layer, takes_prompt in attentions(net) if takes_prompt]
    if family in ("sd", "sdxl"):
        keys_values = [part for layer in cross for part in (layer.to_k, layer.to_v)]
    else:  # the text's own; FLUX's single blocks have none
        with_text = [layer for layer in cross if layer.added_kv_proj_dim is not None]
        keys_values = [part for a in with_text for part in (a.add_k_proj, a.add_v_proj)]
        assert len(with_text) == 2
    text = {  # what takes a prompt's embeddings
        "sd": lambda: keys_values,
        "sdxl": lambda: [*keys_values, net.add_embedding],
        "sd3": lambda: [net.context_embedder, net.time_text_embed.text_embedder],
        "flux": lambda: [net.context_embedder, net.time_text_embed.text_embedder],
    }[family]()
    expected = {"kv": names_of(net, keys_values), "text": names_of(net, text)}
    expected |= {"xattn": names_of(net, cross), "full": names_of(net, [net])}
    assert 0 < len(expected["kv"]) < len(expected["xattn"]) < len(expected["full"])
    assert 0 < len(expected["text"])
    default = {"sd": "kv", "sdxl": "text"}.get(family, "lora")
    assert backbones.load_backbone(str(folders[family])).train_method == default
    assert backbones.load_backbone(str(folders[family])).trainable.keys() == expected.keys()
    for method, names in expected.items():
        backbone = loaded(folders[family])
        trained = backbone.trainable_weights(method, rank=2, seed=0)
        with_gradient = {n for n, p in backbone.net.named_parameters() if p.requires_grad}
        assert trained.keys() == with_gradient == names, method
        assert all(p is backbone.net.get_parameter(n) for n, p in trained.items())


@pytest.mark.parametrize("family", WITH_PROMPT)
def test_a_lora_adapts_all_attention_and_starts_as_no_change(folders, family):
    backbone = loaded(folders[family])
    linear = {
        id(part)
        for layer, _ in attentions(backbone.net)
        for part in layer.modules()
        if isinstance(part, torch.nn.Linear)
    }
    expected = {name for name, part in backbone.net.named_modules() if id(part) in linear}
    condition = backbone.encode_prompts(["a cat"], CPU)["a cat"]
    xt, t = random_like(1, *backbone.latent_shape(SIDES[family])), torch.tensor([500])
    before = backbone.predict(xt, t, condition)
    params = backbone.add_lora(rank=2, seed=3)
    assert torch.equal(backbone.predict(xt, t, condition), before)
    ends = (".lora_A.default.weight", ".lora_B.default.weight")
    assert params.keys() == {name + end for name in expected for end in ends}
    assert {p.dtype for p in params.values()} == {torch.float32}
    assert {p.shape[0] for n, p in params.items() if "lora_A" in n} == {2}
    first = torch.cat([p.flatten() for n, p in params.items() if "lora_A" in n])
    assert first.std().item() == pytest.approx(1 / 2, rel=0.1)  # Gaussian, as wide as 1 / rank
    assert {n for n, p in backbone.net.named_parameters() if p.requires_grad} == params.keys()
    # Every LoRA layer counts in full, whatever its rank
    layers = [m for m in backbone.net.modules() if hasattr(m, "scaling")]
    assert {m.scaling["default"] for m in layers} == {1.0} and len(layers) == len(expected)
    for seed in (3, 4):
        other = loaded(folders[family]).add_lora(rank=2, seed=seed)
        assert all(torch.equal(other[n], p) for n, p in params.items()) == (seed == 3)


def random_run(folder, backbone, method):
    """Changes weights at random and saves them as a run does; returns what was trained."""
    trained = backbone.trainable_weights(method, rank=2, seed=0)
    g = torch.Generator().manual_seed(0)
    for p in trained.values():
        p.data += 0.2 * torch.randn(p.shape, generator=g)
    folder.mkdir()
    state = backbone.lora_state() if method == "lora" else trained
    file = folder / (backbones.LORA if method == "lora" else backbones.DELTA)
    save_file({name: p.detach().contiguous() for name, p in state.items()}, file)
    return trained


@pytest.mark.parametrize("method", ["lora", "kv", "text"])
@pytest.mark.parametrize("family", WITH_PROMPT)
def test_what_a_run_leaves_reloads(folders, tmp_path, family, method):
    """In plain diffusers, and by load_unlearned: the same prediction as of the trained network."""
    backbone, run = loaded(folders[family]), tmp_path / "run"
    condition = backbone.encode_prompts(["a cat"], CPU)["a cat"]
    inputs = random_like(2, *backbone.latent_shape(SIDES[family])), torch.tensor([700, 20])
    trained = random_run(run, backbone, method)
    with torch.no_grad():
        expected = backbone.predict(*inputs, condition)

    original, ours = plain(family, folders[family]), plain(family, folders[family])
    names = {n for n, _ in getattr(ours, backbone.net_name).named_parameters()}
    backbones.load_unlearned(ours, run)
    assert {n for n, _ in getattr(ours, backbone.net_name).named_parameters()} == names  # fused
    pipes = [ours]
    if method == "lora":
        state = backbone.lora_state()
        assert {backbone.lora_parameter(name) for name in state} == trained.keys()
        for name, p in state.items():
            assert torch.equal(p, trained[backbone.lora_parameter(name)])
        pipes.append(plain(family, folders[family]))
        pipes[1].load_lora_weights(run)
    for pipe in pipes:
        got = network(family, pipe, *inputs, condition)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    unchanged = network(family, original, *inputs, condition)
    assert not torch.allclose(expected, unchanged, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("family", "method"), [("ddpm", None), ("sd", "kv"), ("sdxl", "text"), ("sd3", "lora")]
)
def test_loading_lines_run_as_they_are(folders, tmp_path, monkeypatch, family, method):
    """In plain diffusers, in a folder of their own; Stable Diffusion 3 lacks T5."""
    backbone, run, prompt = loaded(folders[family]), tmp_path / "it's run", 'the cat\'s "toy"'
    if method is None:
        backbone.pipe.save_pretrained(run / "pipeline")
    else:
        random_run(run, backbone, method)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(backbones.loading_lines(backbone, str(folders[family]), run, prompt), namespace)
    assert Image.open("after.png").size == (SIDES[family], SIDES[family])
    net, expected = getattr(namespace["pipe"], backbone.net_name), backbone.net.state_dict()
    got = net.state_dict()
    assert got.keys() >= {n.replace("default", "default_0") for n in expected}
    for name, p in expected.items():
        assert torch.equal(got[name.replace("default", "default_0")], p), name


# ---- loading ------------------------------------------------------------------------------------


def test_is_embedded(tiny, monkeypatch):
    assert backbones.is_embedded(common.REPO / "emoji/sd")
    assert not backbones.is_embedded(tiny)
    assert not backbones.is_embedded(common.REPO)  # runs/ is there, too
    assert not backbones.is_embedded("CompVis/stable-diffusion-v1-4")
    monkeypatch.chdir(common.REPO / "emoji")
    assert backbones.is_embedded("sd") and backbones.is_embedded("../emoji/ddpm")


def one_line(*args, **kwargs):
    """The message with which load_pipeline fails."""
    with pytest.raises(SystemExit) as e:
        backbones.load_pipeline(*args, **kwargs)
    assert "\n" not in str(e.value) and e.value.code != 0
    return str(e.value)


def test_load_errors_are_one_line(tiny, tiny_ddpm, tmp_path):
    line = one_line("no/such-model-anywhere")
    assert "--model no/such-model-anywhere cannot be loaded (a diffusers folder or hub id" in line
    line = one_line(str(tmp_path))
    assert "no model_index.json there; expected a diffusers pipeline folder or a hub id" in line
    line = one_line(str(tiny_ddpm), (StableDiffusionPipeline,))
    assert line.endswith("is a DDPMPipeline; expected one of StableDiffusionPipeline")
    shutil.copytree(tiny_ddpm, tmp_path / "other")
    index = tmp_path / "other/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "LTXPipeline"}))
    line = one_line(str(tmp_path / "other"))
    names = ", ".join(pipeline.__name__ for pipeline, _ in PIPELINES.values())
    assert line.endswith(f"is a LTXPipeline; expected one of {names}")
    index.write_text("{")
    assert "cannot be loaded" in one_line(str(tmp_path / "other"))


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_weights_are_one_line(tiny_ddpm, tmp_path, damage):
    shutil.copytree(tiny_ddpm, tmp_path / "model")
    file = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    line = one_line(str(tmp_path / "model"))
    assert "cannot be loaded (a diffusers folder or hub id with .safetensors weights?): " in line


def test_a_pickle_is_not_opened(tiny_ddpm, tmp_path):
    """Neither beside nor in place of a .safetensors file; a pickle alone is explained."""
    model = tmp_path / "model"
    shutil.copytree(tiny_ddpm, model)
    file = model / "unet/diffusion_pytorch_model.safetensors"
    file.with_suffix(".bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    expected = load_file(file)
    pipe = backbones.load_pipeline(str(model))
    assert torch.equal(pipe.unet.conv_in.weight, expected["conv_in.weight"])
    file.unlink()
    line = one_line(str(model))
    assert "unet/diffusion_pytorch_model.bin is a pickle, which may run any code" in line
    assert "if you trust it, convert it once: python -c" in line
    assert not list(tmp_path.rglob("opened"))


def test_half_precision_files_load_as_fp32(tiny, tmp_path):
    """As on the hub: the weights lie there as fp16 alone."""
    plain("sd", tiny).to(dtype=torch.float16).save_pretrained(tmp_path / "fp16", variant="fp16")
    assert not list((tmp_path / "fp16").rglob("*model.safetensors"))
    backbone = backbones.load_backbone(str(tmp_path / "fp16"))
    parts = (backbone.pipe.unet, backbone.pipe.vae, backbone.pipe.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


def test_a_folder_without_subfolders_loads(tiny_ddpm, tmp_path):
    """google/ddpm-celebahq-256 keeps its UNet beside model_index.json."""
    flat = tmp_path / "flat"
    shutil.copytree(tiny_ddpm / "unet", flat)
    shutil.copy(tiny_ddpm / "model_index.json", flat)
    shutil.copy(tiny_ddpm / "scheduler/scheduler_config.json", flat)
    a, b = backbones.load_backbone(str(flat)), backbones.load_backbone(str(tiny_ddpm))
    assert a.fingerprint() == b.fingerprint()


@pytest.fixture(scope="module")
def sd3_with_t5(tiny_sd3, tmp_path_factory):
    pipe = plain("sd3", tiny_sd3)
    small = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    t5 = T5EncoderModel(T5Config(**small, vocab_size=len(pipe.tokenizer)))
    pipe.register_modules(text_encoder_3=t5, tokenizer_3=pipe.tokenizer)
    folder = tmp_path_factory.mktemp("tiny") / "t5"
    pipe.save_pretrained(folder)
    return folder


def test_t5_is_loaded_in_bfloat16(sd3_with_t5):
    pipe = backbones.load_pipeline(str(sd3_with_t5), dtype=torch.float32)
    assert pipe.text_encoder_3.dtype == torch.bfloat16
    others = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {p.dtype for part in others for p in part.parameters()} == {torch.float32}
    rows, *_ = pipe.encode_prompt("a cat", None, None, do_classifier_free_guidance=False)
    assert rows.dtype == torch.float32 and rows.shape[1] == 77 + 256
    assert rows[:, 77:].abs().max() > 0


def test_t5_takes_part_in_the_condition_and_leaves(sd3_with_t5, tiny_sd3):
    backbone = backbones.load_backbone(str(sd3_with_t5))
    assert backbone.has_t5
    rows = backbone.encode_prompts(["a cat"], CPU)["a cat"]["encoder_hidden_states"]
    without = backbones.load_backbone(str(tiny_sd3)).encode_prompts(["a cat"], CPU)["a cat"]
    n = without["encoder_hidden_states"].shape[1]
    assert rows[:, 77:].abs().max() > 0 and n in (77, 77 + 256)
    assert torch.equal(rows[:, :77], without["encoder_hidden_states"][:, :77])
    assert backbone.pipe.text_encoder_3 is None and len(backbone.encoder_fingerprints) == 3


def test_t5_of_flux_is_loaded_in_bfloat16(folders):
    pipe = backbones.load_pipeline(str(folders["flux"]), dtype=torch.float32)
    assert pipe.text_encoder_2.dtype == torch.bfloat16
    others = (pipe.transformer, pipe.vae, pipe.text_encoder)
    assert {p.dtype for part in others for p in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("with_checker", [False, True])
def test_safety_checker_is_loaded_only_when_asked_for(tiny, monkeypatch, with_checker):
    """A model folder that names one, as that of Stable Diffusion 1.4 does."""
    asked = {}
    load = StableDiffusionPipeline.from_pretrained
    index = backbones.DiffusionPipeline.load_config(tiny)
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    monkeypatch.setattr(backbones.DiffusionPipeline, "load_config", lambda model: index)

    def record(model, **kwargs):
        asked.update(kwargs)
        return load(model, **(kwargs | {"safety_checker": None}))

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", record)
    backbones.load_pipeline(str(tiny), safety_checker=with_checker)
    assert ("safety_checker" in asked) == (not with_checker)


def test_pickles_of_other_parts_do_not_matter(monkeypatch):
    """Only the components that are loaded are looked at, and only weights by diffusers' names."""
    files = ["v1-4.ckpt", "safety_checker/pytorch_model.bin", "unet/training_args.bin"]
    files += ["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"]
    monkeypatch.setattr(
        backbones, "HfApi", lambda: SimpleNamespace(list_repo_files=lambda m: files)
    )
    backbones.explain_pickles("some/model", "StableDiffusionPipeline", ["unet", "vae"], "")
