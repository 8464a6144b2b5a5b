"""instance_unlearn.py on tiny random models: surrogates, what is remembered, whole runs, bad input.

The step itself and the training loop are recomputed in test_instance_step.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file

import backbones
import common
import instance_unlearn


def weights(run):
    """{name: tensor} of a run's result: the LoRA, or the UNet of the pipeline."""
    lora = run / "pytorch_lora_weights.safetensors"
    unet = run / "pipeline/unet/diffusion_pytorch_model.safetensors"
    return load_file(lora if lora.exists() else unet)


def assert_same(a, b, rtol=0.0, atol=0.0):
    """Two runs have the same weights, bitwise unless a tolerance is given."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


def differ(a, b):
    """Two runs have different weights."""
    a, b = weights(a), weights(b)
    return any(not torch.equal(a[name], b[name]) for name in a)


def all_differ(runs):
    """No two of the runs have the same weights."""
    return all(differ(a, b) for i, a in enumerate(runs) for b in runs[:i])


def pixels(path):
    """An image file as (3, H, W) in [-1, 1]."""
    return common.to_tensor(Image.open(path))


def read_log(run):
    """The rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# ---- near-duplicates in the remember set --------------------------------------------------------


def test_near_duplicates_are_dropped():
    x_f = torch.zeros(1, 1, 2, 2)
    samples = torch.tensor([0.1, 1.0, 1.1, 0.9, 0.5]).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    left = instance_unlearn.drop_near_duplicates(samples, x_f, samples)
    assert left[:, 0, 0, 0].tolist() == pytest.approx([1.0, 1.1, 0.9])


@pytest.mark.parametrize("copies", [18, 50, 80, 100])
def test_near_duplicates_are_dropped_however_often_they_are_sampled(copies):
    """The threshold comes from other samples: of a set that is full of copies, none is left."""
    drop, g = instance_unlearn.drop_near_duplicates, torch.Generator().manual_seed(0)
    x_f = torch.randn(1, 4, 8, 8, generator=g)
    others = torch.randn(100, 4, 8, 8, generator=g)
    noise = torch.randn(copies, 4, 8, 8, generator=g)
    samples = torch.cat([x_f + 0.1 * noise, others[copies:]])
    reference = torch.randn(16, 4, 8, 8, generator=g)
    assert torch.equal(drop(samples, x_f, reference), others[copies:])
    # A DDPM has no prompt to leave empty: its own samples are the reference, with a floor.
    floor = 0.15 * x_f.numel() ** 0.5
    assert torch.equal(drop(samples, x_f, samples, floor), others[copies:])


def test_a_sample_near_any_of_the_images_to_forget_is_dropped():
    x_f = torch.tensor([0.0, 10.0]).view(2, 1, 1, 1)
    samples = torch.tensor([0.1, 5.0, 9.9]).view(3, 1, 1, 1)
    left = instance_unlearn.drop_near_duplicates(samples, x_f, samples)
    assert left.flatten().tolist() == [5.0]


def test_dropped_samples_are_reported(capsys):
    report = instance_unlearn.report_dropped
    report(100, 100)
    assert capsys.readouterr() == ("", "")
    report(100, 81)
    line = "19 of 100 samples show an image to forget and are dropped\n"
    assert capsys.readouterr() == (line, "")
    report(100, 20)
    warning = capsys.readouterr().err
    assert "warning: most samples of the model show an image to forget; 20 are left" in warning
    assert "--num-remember 400" in warning
    report(100, 20, rank=1)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit, match="--remember generated: all 100 samples show an image"):
        report(100, 0)


# ---- files to remember --------------------------------------------------------------------------


def test_image_to_forget_is_not_remembered(photos, tmp_path):
    """Not as another file of the same pixels, not as a JPEG, not at four times the size."""
    for f in photos.iterdir():
        shutil.copy(f, tmp_path)
    image = Image.open(photos / "a.png")
    image.save(tmp_path / "again.png", compress_level=1)
    image.save(tmp_path / "again.jpg", quality=90, subsampling=0)
    assert (photos / "a.png").read_bytes() != (tmp_path / "again.png").read_bytes()
    files = common.list_images(tmp_path)
    assert len(files) == 7

    def names_left(forget):
        left = instance_unlearn.drop_forget_files(files, pixels(forget)[None], 16)
        return [f.name for f in left]

    assert names_left(photos / "a.png") == ["b.png", "c.png", "d.png", "large.png"]
    # Resized by another filter than ours.
    small = tmp_path / "small.png"
    Image.open(photos / "large.png").resize((16, 16), Image.BICUBIC).save(small)
    expected = ["a.png", "again.jpg", "again.png", "b.png", "c.png", "d.png"]
    assert names_left(small) == expected


def test_emoji_that_look_alike_are_told_apart():
    """The nearest two of all different emoji: one is forgotten, the other stays."""
    folder = common.REPO / "emoji/creatures"
    one = folder / "fluent-grinning-cat.png"
    other = folder / "fluent-grinning-cat-with-smiling-eyes.png"
    assert instance_unlearn.drop_forget_files([one, other], pixels(one)[None], 32) == [other]


def test_images_are_read_upright(tmp_path):
    image = Image.new("RGB", (32, 32), "red")
    image.paste("blue", (0, 0, 32, 8))  # a blue strip above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    image.rotate(90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    x = common.read_cropped(tmp_path / "turned.jpg", 32)
    red, _, blue = x
    assert blue[3, 16] > 0.5 > red[3, 16]
    assert red[20, 16] > 0.5 > blue[20, 16]
    torch.testing.assert_close(common.read_exact(tmp_path / "turned.jpg", 32, "--forget"), x)


def test_images_are_read_on_white_and_in_16_bits(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((4, 4), (255, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    x = common.read_cropped(tmp_path / "clear.png", 8)
    assert x[:, 0, 0].tolist() == [1, 1, 1]
    assert x[:, 4, 4].tolist() == [1, -1, -1]
    clear.quantize(4).save(tmp_path / "palette.png")
    x = common.read_cropped(tmp_path / "palette.png", 8)
    assert x[:, 0, 0].tolist() == [1, 1, 1]
    Image.new("I;16", (8, 8), 32896).save(tmp_path / "grey16.png")  # 128 of 255
    x = common.read_cropped(tmp_path / "grey16.png", 8)
    assert x[0, 0, 0].item() == pytest.approx(128 / 127.5 - 1, abs=0.01)


def test_an_image_of_a_data_set_is_cropped_to_its_centre(tmp_path):
    wide = Image.new("RGB", (32, 16), "red")
    wide.paste("blue", (8, 0, 24, 16))
    wide.save(tmp_path / "wide.png")
    x = common.read_cropped(tmp_path / "wide.png", 16)
    assert x.shape == (3, 16, 16) and (x[2] == 1).all() and (x[0] == -1).all()


# ---- surrogates ---------------------------------------------------------------------------------

SURROGATES = {
    "flip": ["flip"],
    "noise": ["noise", "--noise-sigma", "50"],
    "sdedit": ["sdedit", "--strength", "0.3"],
    "file": ["FILE"],
    "random": ["random"],
}


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("model", ["ddpm", pytest.param("sd3", marks=pytest.mark.slow)])
def test_surrogate_is_written_beside_the_result(forget, photos, model, kind):
    original, edited = pixels(photos / "a.png"), photos / "b.png"
    flags = [str(edited) if f == "FILE" else f for f in SURROGATES[kind]]
    if model == "sd3":
        flags += ["--remember", "generated", "--num-remember", "4"]
    run = forget("--steps", "1", "--surrogate", *flags, model=model)
    file = run / "surrogate-0.png"
    if kind == "random":
        assert not file.exists()
        return
    surrogate = pixels(file)
    assert not torch.equal(surrogate, original)
    if model == "ddpm":  # pixels: exact
        if kind == "flip":
            assert torch.equal(surrogate, original.flip(-1))
        if kind == "file":
            assert torch.equal(surrogate, pixels(edited))
        if kind == "noise":
            inner = original.abs() < 0.3  # not clipped there
            assert 35 < (surrogate - original)[inner].std() * 127.5 < 65


def test_sdedit_by_hand(forget, photos, tiny_ddpm):
    """Noise of its own seed up to --strength, then DDIM: the 10 of 50 timesteps below 200."""
    flags = ["--surrogate", "sdedit", "--strength", "0.2", "--steps", "1", "--seed", "3"]
    run = forget(*flags)
    pipe = DDPMPipeline.from_pretrained(tiny_ddpm)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=1)
    scheduler.set_timesteps(50)
    late = [t for t in scheduler.timesteps if t <= 200]
    assert len(late) == 10
    g = torch.Generator().manual_seed(3 * 1_000_003 + 900_000)
    original = pixels(photos / "a.png")[None]
    noise = torch.randn(1, 3, 16, 16, generator=g)
    x = scheduler.add_noise(original, noise, late[0])
    with torch.no_grad():
        for t in late:
            prediction = pipe.unet(x, t).sample
            x = scheduler.step(prediction, t, x, use_clipped_model_output=True).prev_sample
    difference = pixels(run / "surrogate-0.png") - x[0]
    assert difference.abs().max() * 127.5 < 1  # rounded to 8 bits


@pytest.mark.slow
def test_each_surrogate_leads_elsewhere(forget, photos):
    kinds = ("flip", "random", str(photos / "b.png"))
    runs = [forget("--steps", "3", "--surrogate", s, out=str(i)) for i, s in enumerate(kinds)]
    assert all_differ(runs)


@pytest.mark.slow
def test_prompt_of_the_surrogate(forget):
    """sdedit follows --surrogate-prompt, and without it --prompt."""
    flags = ["--steps", "1", "--surrogate", "sdedit", "--prompt", "a cat"]
    surrogates = []
    for prompt in ("a dog", "pizza", "a cat", None):
        more = ["--surrogate-prompt", prompt] if prompt else []
        run = forget(*flags, *more, out=str(prompt), model="sd3")
        surrogates.append(pixels(run / "surrogate-0.png"))
    dog, pizza, cat, default = surrogates
    assert torch.equal(cat, default)
    assert not torch.equal(dog, pizza) and not torch.equal(dog, cat)


def test_generated_images_are_saved_for_a_resumed_run(forget):
    flags = ["--remember", "generated", "--num-remember", "5"]
    run = forget("--steps", "1", *flags, "--surrogate", "flip")
    assert load_file(run / "remember.safetensors")["remember"].shape == (5, 3, 16, 16)


def test_noise_to_remember_is_gaussian_and_follows_the_seed(forget):
    """Nothing is read or cached."""
    flags = ["--remember", "noise", "--remember-loss", "distill", "--num-remember", "500"]
    seen, batches = {}, instance_unlearn.instance_step

    for seed in ("0", "1"):
        images = []

        def record(predict, params, x_r, *args, images=images, **kwargs):
            images.append(x_r)
            return batches(predict, params, x_r, *args, **kwargs)

        with pytest.MonkeyPatch.context() as m:
            m.setattr(instance_unlearn, "instance_step", record)
            how = ["--surrogate", "flip", "--steps", "3", "--batch-size", "64", "--seed", seed]
            run = forget(*how, *flags, out=seed)
        assert not (run / "remember.safetensors").exists()
        seen[seed] = torch.cat(images)
    assert seen["0"].mean().abs() < 0.02 and (seen["0"].std() - 1).abs() < 0.02
    assert not torch.equal(seen["0"], seen["1"])


# ---- does it unlearn ----------------------------------------------------------------------------


def loss_towards(folder, x_f, x_s):
    """Eq. 11 at eight noise levels, of the model that plain diffusers loads from a folder."""
    pipe = DDPMPipeline.from_pretrained(folder)
    t, g = torch.arange(200, 1000, 100), torch.Generator().manual_seed(0)
    alpha_bar = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    xt = alpha_bar.sqrt() * x_f + (1 - alpha_bar).sqrt() * torch.randn(8, 3, 16, 16, generator=g)
    noise_s = (xt - alpha_bar.sqrt() * x_s) / (1 - alpha_bar).sqrt()
    with torch.no_grad():
        return (pipe.unet(xt, t).sample - noise_s).square().mean().item()


UNLEARN = ["--steps", "60", "--lr", "2e-3", "--constant-lambda", "0.5"]


@pytest.mark.slow
def test_an_unlearned_image_moves_to_its_surrogate(forget, photos, tiny_ddpm):
    """The forget loss falls by more than half."""
    run = forget(*UNLEARN, "--surrogate", str(photos / "b.png"))
    images = pixels(photos / "a.png")[None], pixels(photos / "b.png")[None]
    assert loss_towards(run / "pipeline", *images) < 0.5 * loss_towards(tiny_ddpm, *images)


@pytest.mark.slow
def test_an_image_unlearned_earlier_stays_unlearned(forget, photos):
    """While the second image is unlearned, the loss of the first hardly rises."""
    first = forget(*UNLEARN, "--surrogate", str(photos / "b.png"), out="first")
    two = [photos / "a.png", photos / "c.png"]
    both = forget(*UNLEARN, "--surrogate", str(photos / "b.png"), "flip", images=two, out="both")
    images = pixels(photos / "a.png")[None], pixels(photos / "b.png")[None]
    ratio = loss_towards(both / "pipeline", *images) / loss_towards(first / "pipeline", *images)
    assert ratio < 1.28  # 1.21; without the earlier image in later steps, 1.35


# ---- the run ------------------------------------------------------------------------------------


def test_log_has_a_row_per_step_and_images_come_one_after_another(forget, photos):
    images = [photos / "a.png", photos / "b.png"]
    flags = ["--surrogate", "flip", "noise", "--noise-sigma", "20"]
    run = forget("--steps", "7", *flags, images=images)
    rows = read_log(run)
    assert [row["step"] for row in rows] == list(range(14))
    assert [row["image"] for row in rows] == [0] * 7 + [1] * 7
    expected = {"step", "image", "loss_r", "loss_f", "cos", "conflict", "norm_f", "norm_r"}
    assert all(row.keys() == expected for row in rows)
    assert (run / "surrogate-0.png").exists() and (run / "surrogate-1.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--beta", "5e-4"], ["--constant-lambda", "0.5"], ["--seed", "1"], ["--lr", "1e-3"]],
)
def test_every_switch_changes_the_result(forget, flags):
    shared = ["--steps", "4", "--surrogate", "flip", "--lr", "1e-2"]
    assert differ(forget(*shared, out="plain"), forget(*shared, *flags, out="other"))


@pytest.fixture
def learning_rates(monkeypatch):
    """The learning rate of each step of an AdamW, as a list that grows."""
    rates, step = [], torch.optim.AdamW.step

    def record(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return rates


def test_small_models_have_both_remedies(forget, photos, learning_rates, monkeypatch):
    """The learning rate falls to 0 for each image, and the timesteps of a batch are stratified."""
    stratified, sample = [], instance_unlearn.sample_timesteps

    def record(n, generator, shift=None, stratified_=False):
        stratified.append(stratified_)
        return sample(n, generator, shift, stratified_)

    monkeypatch.setattr(instance_unlearn, "sample_timesteps", record)
    two = [photos / "a.png", photos / "b.png"]
    shared = ["--lr", "1e-3", "--surrogate", "flip"]
    forget("--steps", "4", *shared, images=two)
    assert learning_rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4] * 2)
    assert stratified == [True] * 8
    learning_rates.clear()
    flags = ["--lr-scheduler", "constant", "--timestep-sampling", "uniform"]
    forget("--steps", "3", *shared, *flags, out="constant")
    assert learning_rates == [1e-3] * 3
    assert stratified[8:] == [False] * 3


def test_models_of_the_papers_size_have_no_remedy(forget, photos, tmp_path, learning_rates):
    unet = UNet2DModel(
        sample_size=72,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "large")
    image = tmp_path / "image.png"
    Image.open(photos / "large.png").resize((72, 72)).save(image)
    flags = ["--steps", "3", "--surrogate", "flip"]
    run = forget(*flags, model=tmp_path / "large", images=[image])
    assert learning_rates == [5e-6] * 3
    settings = json.loads((run / "args.json").read_text())["settings"]
    assert settings["timestep_sampling"] == "uniform" and settings["beta"] == 5e-5


PRESETS = {  # (steps, learning rate, beta, schedule, timesteps), of the paper and of small models
    "ddpm": ((240, 5e-6, 5e-5, "constant", "uniform"), (240, 6e-5, 5e-5, "linear", "stratified")),
    "sd3": ((100, 1e-5, 2e-4, "constant", "uniform"), (100, 1e-3, 2e-4, "linear", "stratified")),
}


@pytest.mark.parametrize("model", PRESETS)
def test_defaults_are_those_of_the_models_size_and_given_flags_stay(tiny_ddpm, tiny_sd3, model):
    backbone = backbones.load_backbone({"ddpm": tiny_ddpm, "sd3": tiny_sd3}[model])
    processes = common.Processes(0, 1, torch.device("cpu"))
    names = ("steps", "lr", "beta", "lr_scheduler", "timestep_sampling")
    for small, expected in zip((False, True), PRESETS[model], strict=True):
        backbone.small = small
        typed = instance_unlearn.parse_args(["--forget", "a", "b", "--model", "x"])
        args, _ = instance_unlearn.fill_defaults(typed, backbone, processes)
        assert tuple(getattr(args, n) for n in names) == expected
        assert args.surrogate == ["sdedit"] * 2 and args.strength == 0.7
        assert args.remember == "generated" and args.num_remember == 100
        assert typed.steps is None  # what was typed stays as it was
        flags = ["--steps", "7", "--lr", "0.5", "--beta", "0", "--lr-scheduler", "linear"]
        typed = instance_unlearn.parse_args(["--forget", "a", "--model", "x", *flags])
        args, _ = instance_unlearn.fill_defaults(typed, backbone, processes)
        assert (args.steps, args.lr, args.beta, args.lr_scheduler) == (7, 0.5, 0, "linear")


@pytest.mark.slow
def test_surgery_matters_once_the_gradients_conflict(forget, photos):
    shared = ["--steps", "30", "--lr", "1e-2", "--constant-lambda", "0.5"]
    shared += ["--surrogate", str(photos / "b.png")]
    runs = [forget(*shared, "--surgery", s, out=s) for s in ("none", "forget", "both")]
    assert any(row["conflict"] for row in read_log(runs[0]))
    assert all_differ(runs)


def test_ddpm_is_saved_as_a_pipeline(forget, tiny_ddpm, tmp_path):
    """Also from a folder without subfolders, such as that of google/ddpm-celebahq-256."""
    flat = tmp_path / "flat"
    shutil.copytree(tiny_ddpm / "unet", flat)
    shutil.copy(tiny_ddpm / "model_index.json", flat)
    shutil.copy(tiny_ddpm / "scheduler/scheduler_config.json", flat)
    flags = ["--steps", "2", "--surrogate", "flip"]
    a, b = forget(*flags, model=flat, out="a"), forget(*flags, model="ddpm", out="b")
    assert_same(a, b)
    original = DDPMPipeline.from_pretrained(tiny_ddpm).unet.state_dict()
    changed = DDPMPipeline.from_pretrained(a / "pipeline").unet.state_dict()
    n_changed = sum(not torch.equal(p, original[name]) for name, p in changed.items())
    assert n_changed > 0.9 * len(original)
    assert not (a / "checkpoint.safetensors").exists()


FAMILIES = {
    "sd": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
}


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
def test_lora_reloads_in_plain_diffusers(
    forget, tiny, tiny_sdxl, tiny_sd3, tiny_flux, model, monkeypatch
):
    """The LoRA, and the pipeline that it is fused into, generate what the trained network does."""
    nets, state_dict = [], backbones.get_peft_model_state_dict

    def record(net):
        nets.append(net)
        return state_dict(net)

    monkeypatch.setattr(backbones, "get_peft_model_state_dict", record)
    flags = ["--remember", "generated", "--num-remember", "4", "--surrogate", "flip"]
    flags += ["--steps", "4", "--lr", "1e-2", "--save-pipeline", "--prompt", "a cat"]
    side = 64 if model == "sd" else 16
    base = {"sd": tiny, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}[model]
    run = forget(*flags, "--resolution", str(side), model=model if model == "sd" else base)

    told = {"text_encoder_3": None, "tokenizer_3": None} if model == "sd3" else {}
    told |= {"dtype": torch.float32}  # FLUX's T5 is saved in bfloat16, as it was loaded
    load = FAMILIES[model].from_pretrained

    def generate(pipe):
        pipe.set_progress_bar_config(disable=True)
        g = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 3, "output_type": "np", "height": side, "width": side}
        output = pipe("a cat", generator=g, **call)
        return torch.from_numpy(output.images)

    pipe = load(base, **told)
    original = generate(pipe)
    pipe.register_modules(**{"unet" if hasattr(pipe, "unet") else "transformer": nets[0]})
    trained = generate(pipe)
    loaded = load(base, **told)
    loaded.load_lora_weights(run)
    torch.testing.assert_close(generate(loaded), trained, rtol=0, atol=1e-5)
    fused = load(run / "pipeline", **told)
    torch.testing.assert_close(generate(fused), trained, rtol=0, atol=1e-4)
    assert (trained - original).abs().max() > 1e-3


@pytest.mark.slow
def test_latent_model_remembers_files(forget):
    """Files are encoded when they are needed, by the one part of the pipeline that stays."""
    kinds = ("flip", "random")
    a, b = (forget("--steps", "2", "--surrogate", s, model="sd", out=s) for s in kinds)
    assert differ(a, b)
    assert all(name.startswith("unet.") for name in weights(a))


# ---- several processes, interrupted runs --------------------------------------------------------


def launch(processes, folder, *flags):
    """The real program under torchrun, without the evaluation."""
    script = folder / "launch.py"
    script.write_text("import sys, instance_unlearn as m; m.unlearn(m.parse_args(sys.argv[1:]))")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(processes), str(script), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(common.REPO)}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ddpm", "sd3"])
def test_two_processes_equal_one(forget, tiny_ddpm, tiny_sd3, photos, tmp_path, model):
    flags = ["--steps", "3", "--seed", "3", "--surrogate", "sdedit", "--strength", "0.5"]
    if model == "ddpm":
        flags += ["--remember", str(photos)]
    else:
        flags += ["--remember", "generated", "--num-remember", "5"]
    one = forget(*flags, model=model, out="one")
    folder = tiny_ddpm if model == "ddpm" else tiny_sd3
    argv = ["--model", str(folder), "--forget", str(photos / "a.png"), "--batch-size", "4"]
    result = launch(2, tmp_path, *argv, "--out", str(tmp_path / "two"), *flags)
    assert result.returncode == 0, result.stderr
    # Adam's first steps are lr * sign(g) wherever g is far above its epsilon: rounding shows as a
    # small part of lr.
    assert_same(one, tmp_path / "two", atol=2e-5 if model == "ddpm" else 2e-4)


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(forget, tiny_ddpm, photos, tmp_path):
    flags = ["--steps", "40", "--surrogate", "flip", "noise", "--noise-sigma", "50"]
    images = [photos / "a.png", photos / "b.png"]
    whole = forget(*flags, out="whole", images=images)
    argv = ["--model", str(tiny_ddpm), "--forget", *map(str, images), "--remember", str(photos)]
    argv += ["--batch-size", "4", "--out", str(tmp_path / "cut"), *flags]
    command = [sys.executable, str(common.REPO / "instance_unlearn.py"), *argv]
    program = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "cut/checkpoint.safetensors"
    while not checkpoint.exists() and program.poll() is None:
        time.sleep(0.02)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert checkpoint.exists() and not (tmp_path / "cut/pipeline").exists()
    assert_same(whole, forget(*flags, "--resume", out="cut", images=images))


# ---- bad input: one line, what was seen, which flag mends it ------------------------------------

# (flags, a part of the line). Words in capitals are files made by the test.
BAD_INPUT = [
    (["--forget", "missing.png"], "--forget missing.png cannot be read"),
    (["--forget", "TRUNCATED"], "truncated.png cannot be read"),
    (["--forget", "TEXT"], "text.png cannot be read"),
    (["--forget", "GREY"], "has mode L; expected RGB"),
    (["--forget", "RGBA"], "has mode RGBA; expected RGB"),
    (["--forget", "LARGE"], "is 64x64; expected 16x16"),
    (["--surrogate", "GREY"], "--surrogate"),
    (["--surrogate", "no-such-kind"], "--surrogate no-such-kind: no such file; expected"),
    (["--surrogate", "flip", "flip"], "1 images but 2 surrogates"),
    (["--surrogate", "sdedit", "--strength", "1.5"], "--strength 1.5: expected a number in (0, 1]"),
    (["--surrogate", "sdedit", "--strength", "0"], "--strength 0.0: expected a number in (0, 1]"),
    (["--surrogate", "sdedit", "--strength", "1e-4"], "for one step of the sampler at least"),
    (["--surrogate", "noise", "--noise-sigma", "-1"], "--noise-sigma -1.0: expected 0 or more"),
    (["--remember", "EMPTY"], "no images there; expected a folder"),
    (["--remember", "missing"], "--remember missing: no images there"),
    (["--remember", "generated", "--num-remember", "0"], "--num-remember 0: expected at least 1"),
    (["--remember", "ONLY"], "every image there shows one to forget; expected others"),
    (["--prompt", "a cat"], "is unconditional, it takes no prompt"),
    (
        ["--surrogate", "sdedit", "--surrogate-prompt", "a cat"],
        "is unconditional, it takes no prompt",
    ),
    (["--model", "no/such-model-anywhere"], "--model no/such-model-anywhere cannot be loaded"),
    (["--model", "tests"], "no model_index.json"),
    (["--resolution", "15"], "--resolution 15 is no multiple of 2"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--steps", "0"], "expected at least one step"),
    (["--beta", "0.01"], "lambda in [0, 1]"),
    (["--beta", "-0.00001"], "lambda in [0, 1]"),
    (["--lr", "0"], "a positive rate"),
    (["--lr", "nan"], "a positive rate"),
    (["--rank", "0"], "--rank 0"),
    (["--constant-lambda", "1.5"], "expected a number in [0, 1]"),
    (["--strength", "0.5"], "--strength has no effect with these flags"),
    (["--surrogate-prompt", "a cat"], "--surrogate-prompt has no effect with these flags"),
    (["--noise-sigma", "50"], "--noise-sigma has no effect with these flags"),
    (["--num-remember", "5"], "--num-remember has no effect with these flags"),
    (["--remember", "noise"], "--remember noise goes with --remember-loss distill"),
    (["--beta", "1e-4", "--constant-lambda", "0.5"], "--beta has no effect with these flags"),
    (["--out", "/proc/nowhere"], "cannot be written"),
]


@pytest.fixture
def bad_files(photos, tmp_path):
    """{word of BAD_INPUT: file or folder}."""
    folder, image = tmp_path / "bad", Image.open(photos / "a.png")
    (folder / "empty").mkdir(parents=True)
    (folder / "only").mkdir()
    (folder / "truncated.png").write_bytes((photos / "a.png").read_bytes()[:60])
    (folder / "text.png").write_text("not an image")
    image.convert("L").save(folder / "grey.png")
    image.convert("RGBA").save(folder / "rgba.png")
    image.save(folder / "only/same.png")
    files = {"TRUNCATED": "truncated.png", "TEXT": "text.png", "GREY": "grey.png"}
    files |= {"RGBA": "rgba.png", "EMPTY": "empty", "ONLY": "only"}
    return {k: str(folder / v) for k, v in files.items()} | {"LARGE": str(photos / "large.png")}


@pytest.mark.parametrize(("flags", "expected"), BAD_INPUT, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_line(forget, bad_files, monkeypatch, flags, expected):
    monkeypatch.chdir(common.REPO)
    flags = [bad_files.get(f, f) for f in flags]
    if "--surrogate" not in flags:
        flags += ["--surrogate", "flip"]
    with pytest.raises(SystemExit) as e:
        forget("--steps", "1", *flags)
    assert expected in str(e.value)
    assert "\n" not in str(e.value) and e.value.code != 0


def test_missing_forget_is_one_line(tiny_ddpm):
    args = instance_unlearn.parse_args(["--model", str(tiny_ddpm)])
    with pytest.raises(SystemExit, match="--forget is missing: which image"):
        instance_unlearn.unlearn(args)


def test_a_prediction_type_without_a_formula_is_one_line(forget, tiny_ddpm, tmp_path):
    shutil.copytree(tiny_ddpm, tmp_path / "model")
    config = tmp_path / "model/scheduler/scheduler_config.json"
    changed = json.loads(config.read_text()) | {"prediction_type": "sample"}
    config.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match="predicts sample; expected epsilon, v_prediction or flow"):
        forget("--steps", "1", "--surrogate", "flip", model=tmp_path / "model")


def test_a_broken_image_to_remember_is_one_line(forget, photos, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/x.png").write_bytes((photos / "b.png").read_bytes()[:60])
    with pytest.raises(SystemExit, match=r"--remember .*x\.png cannot be read"):
        forget("--steps", "1", "--surrogate", "flip", "--remember", str(tmp_path / "set"))


def test_a_finished_or_different_run_is_never_overwritten(forget):
    flags = ["--steps", "1", "--surrogate", "flip"]
    forget(*flags)
    with pytest.raises(SystemExit, match="already holds a run"):
        forget(*flags)
    with pytest.raises(SystemExit, match=r"other settings \(seed\)"):
        forget(*flags, "--resume", "--seed", "1")


# ---- defaults and memory ------------------------------------------------------------------------


@pytest.mark.slow
def test_another_small_model_does_not_learn_emoji(tiny_ddpm, photos, tmp_path):
    """The emoji are the default of the model in emoji/ alone; others generate their own images."""
    argv = ["--model", str(tiny_ddpm), "--forget", str(photos / "a.png"), "--surrogate", "flip"]
    argv += ["--steps", "1", "--batch-size", "2", "--out", str(tmp_path / "run")]
    run = instance_unlearn.unlearn(instance_unlearn.parse_args(argv))
    settings = json.loads((run / "args.json").read_text())["settings"]
    assert settings["remember"] == "generated" and settings["num_remember"] == 100


def test_defaults_of_the_embedded_model_are_its_own(monkeypatch):
    monkeypatch.chdir(common.REPO)
    for argv in ([], ["--model", "emoji/ddpm"], ["--model", "./emoji/../emoji/ddpm/"]):
        args = instance_unlearn.parse_args(argv)
        assert args.forget == [common.REPO / "emoji/creatures/twemoji-cowboy-hat-face.png"]
        assert args.remember == str(common.REPO / "emoji/creatures")
        assert args.forget[0].exists()
    args = instance_unlearn.parse_args(["--remember", "generated", "--forget", "x.png"])
    assert args.remember == "generated" and [str(f) for f in args.forget] == ["x.png"]
    assert instance_unlearn.parse_args(["--model", "emoji/sd3"]).remember == "generated"


def test_text_encoders_are_gone_before_the_network_is_trained(forget, monkeypatch):
    parts, alive = [], []
    load, write = backbones.load_pipeline, instance_unlearn.write_grad

    def watch(*args, **kwargs):
        pipe = load(*args, **kwargs)
        parts.extend(weakref.ref(getattr(pipe, n)) for n in ("text_encoder", "text_encoder_2"))
        return pipe

    def record(*args):
        alive.append([part() is not None for part in parts])
        write(*args)

    monkeypatch.setattr(backbones, "load_pipeline", watch)
    monkeypatch.setattr(instance_unlearn, "write_grad", record)
    forget("--steps", "1", "--surrogate", "flip", model="sd3")
    assert alive == [[False, False]]
