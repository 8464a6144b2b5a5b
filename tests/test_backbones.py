"""backbones.py against plain diffusers, on tiny models of each family."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

import backbones
import common

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tiny, tiny_ddpm, tiny_sd3):
    return {"ddpm": tiny_ddpm, "sd": tiny, "sd3": tiny_sd3}


def plain(family, folder):
    """The pipeline by diffusers alone."""
    if family == "ddpm":
        return DDPMPipeline.from_pretrained(folder)
    if family == "sd":
        return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(folder, **absent)


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


def embeddings(family, pipe, prompt):
    """The condition of a prompt by diffusers alone."""
    if family == "ddpm":
        return {}
    if family == "sd":
        rows = pipe.encode_prompt(prompt, CPU, 1, False)[0]
        return {"encoder_hidden_states": rows}
    rows, _, pooled, _ = pipe.encode_prompt(
        prompt, prompt, prompt, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": rows, "pooled_projections": pooled}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", ["ddpm", "sd"])
def test_sampling_is_ddim_with_eta_0(folders, family, prediction_type):
    """From x_T of a whole sampler and from its middle; a DDPM's x0_hat is clipped to [-1, 1]."""
    pipe = plain(family, folders[family])
    config = {"steps_offset": 1, "set_alpha_to_one": True, "prediction_type": prediction_type}
    config |= {"clip_sample": family == "ddpm"}
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
    scheduler.set_timesteps(4)
    backbone = backbones.load_backbone(folders[family])
    backbone.prediction_type = prediction_type
    condition = backbone.encode_prompts(["a cat"], CPU)["a cat"]
    timesteps = backbone.timesteps(4)
    assert torch.equal(timesteps, scheduler.timesteps)
    x = random_like(2, *backbone.latent_shape(backbone.check_resolution(None)))
    with torch.no_grad():
        conditioned = {k: v.expand(2, -1, -1) for k, v in embeddings(family, pipe, "a cat").items()}

        def predict(x, t):
            return pipe.unet(x, t, **conditioned).sample

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


def test_sampling_of_stable_diffusion_3_is_euler(folders):
    pipe = plain("sd3", folders["sd3"])
    pipe.scheduler.set_timesteps(4)
    backbone = backbones.load_backbone(folders["sd3"])
    condition = backbone.encode_prompts(["a cat"], CPU)["a cat"]
    timesteps = backbone.timesteps(4)
    assert torch.equal(timesteps, pipe.scheduler.timesteps) and timesteps[0] == 1000
    x = random_like(1, 4, 8, 8)
    with torch.no_grad():
        conditioned = embeddings("sd3", pipe, "a cat")

        def predict(x, t):
            return pipe.transformer(x, timestep=t, **conditioned).sample

        expected = reference_sampling(pipe.scheduler, predict, x, timesteps)
    got = backbone.sample(x, timesteps, condition)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_guided_sampling_is_that_of_the_pipeline(folders, family):
    """The whole call of diffusers, with classifier-free guidance, from the same noise."""
    pipe = plain(family, folders[family])
    pipe.set_progress_bar_config(disable=True)
    if family == "sd":
        config = {"steps_offset": 1, "set_alpha_to_one": True, "clip_sample": False}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
    x = random_like(1, *((4, 16, 16) if family == "sd" else (4, 8, 8)))
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    expected = pipe("a cat", latents=x.clone(), **call).images
    backbone = backbones.load_backbone(folders[family])
    conditions = backbone.encode_prompts(["a cat", ""], CPU)
    timesteps = backbone.timesteps(3)
    got = backbone.sample(x, timesteps, conditions["a cat"], conditions[""], guidance=4.0)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    unguided = backbone.sample(x, timesteps, conditions["a cat"])
    assert not torch.allclose(got, unguided, atol=1e-3)


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


def test_generated_latents_are_those_of_the_pipeline(folders):
    """Prompt, guidance with the empty prompt, DPM-Solver++, a generator with the seed."""
    pipe = plain("sd", folders["sd"])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    call = {"num_inference_steps": 3, "guidance_scale": 6.0, "output_type": "latent"}
    expected = pipe("a cat", generator=torch.Generator().manual_seed(5), **call).images
    backbone = backbones.load_backbone(folders["sd"])
    conditions = backbone.encode_prompts(["a cat", ""], CPU)
    got = backbone.generate_latents([conditions["a cat"]], conditions[""], [5], 64, 3, 6.0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_generated_latents_follow_their_own_seed_and_prompt(folders):
    """The same image alone, in another batch and in another row of it; another prompt, another."""
    backbone = backbones.load_backbone(folders["sd"])
    conditions = backbone.encode_prompts(["a cat", "a dog", ""], CPU)
    cat, dog, null = (conditions[p] for p in ("a cat", "a dog", ""))
    how = {"resolution": 64, "steps": 2, "guidance": 6.0}
    three = backbone.generate_latents([dog, cat, cat], null, [1, 2, 3], **how)
    one = backbone.generate_latents([cat], null, [2], **how)
    assert three.shape == (3, 4, 16, 16)
    torch.testing.assert_close(three[1:2], one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(three[1], three[2], atol=1e-2)
    other = backbone.generate_latents([dog], null, [2], **how)
    assert not torch.equal(one, other)
    assert backbone.generate_latents([cat], null, [2], 32, 2, 6.0).shape == (1, 4, 8, 8)


# ---- images and latents -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_encode_and_decode_by_hand(folders, family):
    """The mean of the VAE's posterior, shifted and scaled as the config says; decode inverts it."""
    pipe, backbone = plain(family, folders[family]), backbones.load_backbone(folders[family])
    vae, images = pipe.vae, random_like(2, 3, 32, 32).clamp(-1, 1)
    scale, shift = {"sd": (0.18215, 0.0), "sd3": (0.5, 0.1)}[family]
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


@pytest.mark.parametrize("family", ["ddpm", "sd", "sd3"])
def test_encode_prompts(folders, family):
    """Each prompt's condition as diffusers makes it; then the text encoders are gone."""
    pipe, backbone = plain(family, folders[family]), backbones.load_backbone(folders[family])
    prompts = ["", "a cat"]
    conditions = backbone.encode_prompts(prompts, CPU)
    assert list(conditions) == prompts
    for prompt in prompts:
        with torch.no_grad():
            expected = embeddings(family, pipe, prompt)
        assert conditions[prompt].keys() == expected.keys()
        for name, rows in expected.items():
            assert torch.equal(conditions[prompt][name], rows) and len(rows) == 1
            assert not conditions[prompt][name].requires_grad
    names = [n for n in backbones.TEXT_ENCODERS if n in pipe.components]
    assert all(getattr(backbone.pipe, name) is None for name in names)
    n_encoders = {"ddpm": 0, "sd": 1, "sd3": 2}[family]
    assert len(backbone.encoder_fingerprints) == n_encoders


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


@pytest.mark.parametrize("family", ["ddpm", "sd", "sd3"])
def test_predict(folders, family):
    """A row for all, or one row each: every sample by its own timestep and condition."""
    pipe, backbone = plain(family, folders[family]), backbones.load_backbone(folders[family])
    conditions = backbone.encode_prompts(["a cat", "a dog"], CPU)
    xt = random_like(2, *backbone.latent_shape(backbone.check_resolution(None)))
    t = torch.tensor([700, 20])
    stacked = backbones.stack_conditions(list(conditions.values()))
    net = getattr(pipe, backbone.net_name).eval()
    with torch.no_grad():
        got = backbone.predict(xt, t, stacked)
        same = backbone.predict(xt, t, conditions["a cat"])
        assert got.shape == xt.shape and got.dtype == torch.float32
        for i, prompt in enumerate(conditions):
            expected = net(xt[i : i + 1], timestep=t[i : i + 1], **conditions[prompt]).sample
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
    ddpm, sd, sd3 = (backbones.load_backbone(folders[f]) for f in ("ddpm", "sd", "sd3"))
    assert (type(ddpm), type(sd), type(sd3)) == backbones.FAMILIES
    assert [b.prediction_type for b in (ddpm, sd, sd3)] == ["epsilon", "epsilon", "flow"]
    assert [b.takes_prompt for b in (ddpm, sd, sd3)] == [False, True, True]
    assert [b.shift for b in (ddpm, sd, sd3)] == [None, None, 3.0]
    assert sd3.alpha_bar is None and torch.equal(ddpm.alpha_bar, DDIMScheduler().alphas_cumprod)
    assert ddpm.net is ddpm.pipe.unet and sd3.net is sd3.pipe.transformer
    assert all(b.small for b in (ddpm, sd, sd3)) and not sd3.has_t5
    for b in (ddpm, sd, sd3):  # nothing is trained, nor in training mode, until a script says so
        assert not b.net.training and not any(p.requires_grad for p in b.net.parameters())
    assert [b.latent_shape(32) for b in (ddpm, sd, sd3)] == [(3, 32, 32), (4, 8, 8), (4, 16, 16)]
    assert [b.timesteps(50)[0] for b in (ddpm, sd)] == [981, 981]  # 980 without the offset


# (family, native resolution, another one that fits, those that do not)
RESOLUTIONS = [("ddpm", 16, 32, (1, 17)), ("sd", 64, 32, (2, 30)), ("sd3", 16, 32, (1, 15))]


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
    config = tmp_path / "unet/scheduler/scheduler_config.json"  # of the first copy
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_end": 0.015}))
    seen.add(of(tmp_path / "unet"))
    assert len(seen) == 5


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
    names = "DDPMPipeline, StableDiffusionPipeline, StableDiffusion3Pipeline"
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
