"""instance_unlearn.py on tiny random models: the equations by hand, each switch, processes, resume, formats, bad input."""

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
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

import common
import instance_unlearn as method
from gradsurgery import forget_only, pcgrad

KINDS = ("epsilon", "v_prediction", "flow")


def weights(run):
    lora = run / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.exists() else run / "pipeline/unet/diffusion_pytorch_model.safetensors")


def same(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for n in a:
        torch.testing.assert_close(a[n], b[n], **tolerance or dict(rtol=0, atol=0))


def differ(a, b):
    a, b = weights(a), weights(b)
    return any(not torch.equal(a[n], b[n]) for n in a)


# ---- the equations ----------------------------------------------------------------------------------------------


def test_surrogate_noise_by_hand():
    """Eq. 10 at sqrt(a_t) = 0.8: x_t^f = 0.8 * 1 + 0.6 * 0.5 = 1.1, so eps' = (1.1 - 0.8 * 0.5) / 0.6 = 7 / 6."""
    alpha_bar = torch.tensor([0.64])
    a, b = method.coefficients(torch.tensor([0]), alpha_bar)
    xt = a * 1.0 + b * 0.5
    torch.testing.assert_close(method.surrogate_noise(xt, torch.full((1, 1, 1, 1), 0.5), a, b), torch.full((1, 1, 1, 1), 7 / 6))


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_xt_and_aiming_at_the_surrogate(kind):
    x_f, x_s, eps = torch.randn(3, 2, 3, 4, 4)
    alpha_bar = None if kind == "flow" else torch.linspace(0.999, 0.01, 1000)
    a, b = method.coefficients(torch.tensor([400, 900]), alpha_bar)
    xt = a * x_f + b * eps
    noise = method.surrogate_noise(xt, x_s, a, b)
    torch.testing.assert_close(a * x_s + b * noise, xt)  # the same noisy picture, from the surrogate
    torch.testing.assert_close(method.surrogate_noise(xt, x_f, a, b), eps, rtol=1e-3, atol=1e-3)  # x^s = x^f: nothing changes
    torch.testing.assert_close(method.picture_of(kind, method.answer(kind, x_s, noise, a, b), xt, a, b), x_s)
    if kind == "flow":
        torch.testing.assert_close(method.answer(kind, x_s, noise, a, b), (xt - x_s) / b)  # as the docstring derives it


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_follows_the_target_lands_on_the_surrogate(kind):
    x_f, x_s, eps = torch.randn(3, 1, 3, 4, 4)
    alpha_bar = None if kind == "flow" else torch.linspace(0.999, 0.01, 1000)

    def perfect(x, t):
        a, b = method.coefficients(t, alpha_bar)
        return method.answer(kind, x_s, method.surrogate_noise(x, x_s, a, b), a, b)

    times = torch.tensor([700, 450, 300, 40])
    a, b = method.coefficients(times[:1], alpha_bar)
    end = method.denoise(perfect, a * x_f + b * eps, times, kind, alpha_bar, clip=False)
    torch.testing.assert_close(end, x_s, rtol=1e-4, atol=1e-4)


def test_denoise_agrees_with_diffusers():
    x, says = torch.randn(2, 1, 4, 8, 8)
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, prediction_type=kind)
        scheduler.set_timesteps(5)
        expected = x
        for t in scheduler.timesteps:
            expected = scheduler.step(says, t, expected).prev_sample
        got = method.denoise(lambda x, t: says, x, scheduler.timesteps, kind, scheduler.alphas_cumprod, clip=False)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    expected = x
    for t in scheduler.timesteps:
        expected = scheduler.step(says, t, expected).prev_sample
    got = method.denoise(lambda x, t: says, x, scheduler.timesteps, "flow", None, clip=False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_velocity_of_flow_and_v_agree_with_diffusers():
    x0, noise = torch.randn(2, 1, 4, 8, 8)
    scheduler = DDIMScheduler()
    a, b = method.coefficients(torch.tensor([321]), scheduler.alphas_cumprod)
    expected = scheduler.get_velocity(x0, noise, torch.tensor([321]))
    torch.testing.assert_close(method.answer("v_prediction", x0, noise, a, b), expected)
    flow = FlowMatchEulerDiscreteScheduler()
    t = flow.timesteps[200:201]
    a, b = method.coefficients(t, None)
    torch.testing.assert_close(a * x0 + b * noise, flow.scale_noise(x0, t, noise))


def test_lambda_of_t():
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(method.lambda_t(t, 5e-5), torch.tensor([1.0, 0.975, 0.95005]))
    torch.testing.assert_close(method.lambda_t(torch.tensor([1000.0]), 2e-4), torch.tensor([0.8]))
    torch.testing.assert_close(method.lambda_t(t, 5e-5, constant=0.95), torch.full((3,), 0.95))


def test_each_surgery_by_hand():
    g_f, g_r = torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 0.0])  # in conflict
    results = {name: surgery(g_f, g_r)[0] for name, surgery in method.SURGERY.items()}
    torch.testing.assert_close(results["none"], torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(results["forget"], torch.tensor([-2.0, 1.0]))  # g_f' = (0, 1)
    torch.testing.assert_close(results["both"], torch.tensor([-1.0, 2.0]))  # and g_r' = (-1, 1)
    for name, surgery in method.SURGERY.items():  # no conflict: all three add
        torch.testing.assert_close(surgery(g_f, -g_r)[0], g_f - g_r, msg=name)
    assert method.SURGERY["forget"] is forget_only and method.SURGERY["both"] is pcgrad


def test_times_are_spread_over_their_distribution(monkeypatch):
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        assert (method.draw_times(8, None, g) // 125).tolist() == list(range(8))  # one from each eighth of 0..999
    t = torch.cat([method.draw_times(4, None, g) for _ in range(4000)])
    assert t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 5
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 1 - 2**-24))
    assert method.draw_times(8, None, None)[-1] == 999  # 7 + (1 - 2^-24) is 8 in float32


def test_times_of_flow_matching_are_those_it_was_trained_on():
    for shift, median in ((1.0, 500), (3.0, 750)):  # 3 * 0.5 / (1 + 2 * 0.5) = 0.75
        t = method.draw_times(4001, shift, torch.Generator().manual_seed(0))
        assert 1 <= t.min() and t.max() <= 1000 and abs(t.median() - median) < 1
        logit = torch.logit(t / 1000 / (shift - (shift - 1) * t / 1000))
        assert abs(logit.mean()) < 0.01 and abs(logit.std() - 1) < 0.02


def test_what_shows_a_picture_to_forget_is_left_out():
    x_f = torch.zeros(1, 1, 2, 2)
    pool = torch.tensor([0.1, 1.0, 1.1, 0.9, 0.5]).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    assert method.leave_out(pool, x_f, pool)[:, 0, 0, 0].tolist() == pytest.approx([1.0, 1.1, 0.9])


@pytest.mark.parametrize("copies", [18, 50, 80, 100])
def test_what_shows_a_picture_to_forget_is_left_out_however_often_it_is_drawn(copies):
    """The threshold comes from other samples: of a pool that is full of copies, none is kept."""
    g = torch.Generator().manual_seed(0)
    x_f, others = torch.randn(1, 4, 8, 8, generator=g), torch.randn(100, 4, 8, 8, generator=g)
    pool = torch.cat([x_f + 0.1 * torch.randn(copies, 4, 8, 8, generator=g), others[copies:]])
    kept = method.leave_out(pool, x_f, torch.randn(16, 4, 8, 8, generator=g))
    assert torch.equal(kept, others[copies:])
    # A DDPM has no prompt to leave empty: its own samples are the reference, and the threshold has a floor
    assert torch.equal(method.leave_out(pool, x_f, pool, floor=0.15 * x_f.numel() ** 0.5), others[copies:])


def test_what_was_left_out_is_said(capsys):
    method.say_left_out(100, 100)
    assert capsys.readouterr() == ("", "")
    method.say_left_out(100, 81)
    assert capsys.readouterr() == ("19 of 100 show a picture to forget and are left out\n", "")
    method.say_left_out(100, 20)
    assert "warning: most of what the model draws shows a picture to forget; 20 are left" in capsys.readouterr().err
    method.say_left_out(100, 20, rank=1)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit, match="--remember generate:100: every sample shows a picture to forget"):
        method.say_left_out(100, 0)


# ---- surrogates and what is remembered --------------------------------------------------------------------------


def pixels(path):
    return method.to_tensor(Image.open(path))


@pytest.mark.parametrize("model", ["ddpm", "sd3"])
def test_each_surrogate_is_written_beside_the_result(forget, photos, model):
    original = pixels(photos / "a.png")
    for name in ("flip", "noise:50", "sdedit:0.3", str(photos / "b.png"), "random"):
        run = forget("--steps", "1", "--surrogate", name, "--remember", "generate:4", model=model, out=name.split("/")[-1])
        if name == "random":
            assert not (run / "surrogate-0.png").exists()
            continue
        surrogate = pixels(run / "surrogate-0.png")
        if model == "ddpm":  # pixels: exact
            if name == "flip":
                assert torch.equal(surrogate, original.flip(-1))
            if name.endswith("b.png"):
                assert torch.equal(surrogate, pixels(photos / "b.png"))
            if name.startswith("noise"):
                inner = original.abs() < 0.3  # not clipped there
                assert 35 < (surrogate - original)[inner].std() * 127.5 < 65
        assert not torch.equal(surrogate, original)


def test_each_surrogate_leads_elsewhere(forget, photos):
    kinds = ("flip", "random", str(photos / "b.png"))
    runs = [forget("--steps", "3", "--surrogate", s, out=str(i)) for i, s in enumerate(kinds)]
    assert differ(runs[0], runs[1]) and differ(runs[1], runs[2]) and differ(runs[0], runs[2])


def test_the_picture_to_forget_is_not_remembered(photos, tmp_path):
    """Not as another file of the same pixels, not as a JPEG, not at four times the size; others stay."""
    for f in photos.iterdir():
        shutil.copy(f, tmp_path)
    image = Image.open(photos / "a.png")
    image.save(tmp_path / "again.png", compress_level=1)
    image.save(tmp_path / "again.jpg", quality=90, subsampling=0)
    files = method.list_images(tmp_path)
    assert len(files) == 7
    kept = method.without_forgotten(files, pixels(photos / "a.png")[None], 16)
    assert [f.name for f in kept] == ["b.png", "c.png", "d.png", "large.png"]
    Image.open(photos / "large.png").resize((16, 16), Image.BICUBIC).save(tmp_path / "small.png")  # by another filter than ours
    kept = method.without_forgotten(files, pixels(tmp_path / "small.png")[None], 16)
    assert [f.name for f in kept] == ["a.png", "again.jpg", "again.png", "b.png", "c.png", "d.png"]
    assert not (photos / "a.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_emoji_that_look_alike_are_told_apart():
    """The nearest two of all different emoji: one is forgotten, the other stays."""
    folder = method.REPO / "emoji/creatures"
    one, other = (folder / f"fluent-{n}.png" for n in ("grinning-cat", "grinning-cat-with-smiling-eyes"))
    assert method.without_forgotten([one, other], pixels(one)[None], 32) == [other]


def test_pictures_are_read_upright_on_white_and_in_16_bits(tmp_path):
    quarters = Image.new("RGB", (32, 32), "red")
    quarters.paste("blue", (0, 0, 32, 8))  # a blue strip above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    quarters.rotate(90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    x = method.read_any(tmp_path / "turned.jpg", 32)
    assert x[2, 3, 16] > 0.5 > x[0, 3, 16] and x[0, 20, 16] > 0.5 > x[2, 20, 16]
    torch.testing.assert_close(method.read_exact(tmp_path / "turned.jpg", 32, "--forget"), x)

    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((4, 4), (255, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    x = method.read_any(tmp_path / "clear.png", 8)
    assert x[:, 0, 0].tolist() == [1, 1, 1] and x[:, 4, 4].tolist() == [1, -1, -1]
    clear.quantize(4).save(tmp_path / "palette.png")
    assert method.read_any(tmp_path / "palette.png", 8)[:, 0, 0].tolist() == [1, 1, 1]

    Image.new("I;16", (8, 8), 32896).save(tmp_path / "grey16.png")  # 128 of 255
    assert method.read_any(tmp_path / "grey16.png", 8)[0, 0, 0].item() == pytest.approx(128 / 127.5 - 1, abs=0.01)


def test_generated_pictures_are_kept_for_a_resumed_run(forget):
    run = forget("--steps", "1", "--remember", "generate:5", "--surrogate", "flip")
    assert load_file(run / "remember.safetensors")["remember"].shape == (5, 3, 16, 16)


def test_updates_by_hand(forget, photos, tiny_ddpm, monkeypatch):
    """The gradient of the first update of two pictures, written out sample by sample from Algorithm 1 and Eq. 1 to 13."""
    seen = []
    write = method.write_grad
    monkeypatch.setattr(method, "write_grad", lambda ps, g: (seen.append(([p.clone() for p in ps], g)), write(ps, g)))
    two = [photos / "a.png", photos / "c.png"]
    forget("--steps", "1", "--lr", "1e-3", "--beta", "9e-4", "--surrogate", str(photos / "b.png"), "flip", picture=two)
    x_f = [pixels(p) for p in two]
    x_s = [pixels(photos / "b.png"), x_f[1].flip(-1)]
    pool = [method.read_any(photos / name, 16) for name in ("b.png", "d.png", "large.png")]
    pipe = DDPMPipeline.from_pretrained(tiny_ddpm)
    net, alpha_bar = pipe.unet, pipe.scheduler.alphas_cumprod
    for k, (weights_then, got) in enumerate(seen):
        for p, w in zip(net.parameters(), weights_then, strict=True):
            p.data.copy_(w)
        g = torch.Generator().manual_seed(100_000 + k)  # the draws, in their order: picture, (unused), time, noise
        i_r = torch.randint(3, (2, 4), generator=g)[0].tolist()
        times, eps = method.draw_times(4, None, g), torch.randn(4, 3, 16, 16, generator=g)
        losses = {"r": 0, "f": 0}
        for n in range(4):
            t, e, j = times[n], eps[n], i_r[n]
            a, s, lam = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt(), 1 - 9e-4 * t.item()
            says = lambda x: net(x[None], t).sample[0]  # noqa: E731, B023
            losses["r"] += lam * (e - says(a * pool[j] + s * e)).square().mean() / 4  # Eq. 1, 8
            for f in {0, k}:  # the second picture's update holds the first one too
                xt = a * x_f[f] + s * e
                losses["f"] += (1 - lam) * ((xt - a * x_s[f]) / s - says(xt)).square().mean() / 4  # Eq. 10, 11
        g_r, g_f = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())]) for loss in losses.values())
        if g_f @ g_r < 0:
            g_f = g_f - (g_f @ g_r) / (g_r @ g_r) * g_r  # Eq. 13
        torch.testing.assert_close(got, g_r + g_f, rtol=1e-3, atol=1e-4 * got.abs().max().item())
    assert len(seen) == 2


def test_a_forgotten_picture_moves_to_its_surrogate(forget, photos, tiny_ddpm):
    """The forget loss falls by more than half, at every noise level, on the model that plain diffusers loads."""
    run = forget("--steps", "60", "--lr", "2e-3", "--constant-lambda", "0.5", "--surrogate", str(photos / "b.png"))
    x_f, x_s = pixels(photos / "a.png")[None], pixels(photos / "b.png")[None]
    losses = []
    for folder in (tiny_ddpm, run / "pipeline"):
        pipe = DDPMPipeline.from_pretrained(folder)
        t, g = torch.arange(200, 1000, 100), torch.Generator().manual_seed(0)
        a, b = method.coefficients(t, pipe.scheduler.alphas_cumprod)
        xt = a * x_f + b * torch.randn(8, 3, 16, 16, generator=g)
        with torch.no_grad():
            says = pipe.unet(xt, t).sample
        losses.append(method.per_picture(says, method.surrogate_noise(xt, x_s, a, b)).mean())
    assert losses[1] < 0.5 * losses[0]


def test_a_picture_forgotten_earlier_stays_forgotten(forget, photos):
    """While the second picture is forgotten, the loss of the first hardly rises."""
    flags = ["--lr", "2e-3", "--constant-lambda", "0.5", "--steps", "60"]
    first = forget(*flags, "--surrogate", str(photos / "b.png"), out="first")
    two = [photos / "a.png", photos / "c.png"]
    both = forget(*flags, "--surrogate", str(photos / "b.png"), "flip", picture=two, out="both")
    x_f, x_s = pixels(photos / "a.png")[None], pixels(photos / "b.png")[None]
    losses = []
    for run in (first, both):
        pipe = DDPMPipeline.from_pretrained(run / "pipeline")
        t, g = torch.arange(200, 1000, 100), torch.Generator().manual_seed(0)
        a, b = method.coefficients(t, pipe.scheduler.alphas_cumprod)
        xt = a * x_f + b * torch.randn(8, 3, 16, 16, generator=g)
        with torch.no_grad():
            losses.append(method.per_picture(pipe.unet(xt, t).sample, method.surrogate_noise(xt, x_s, a, b)).mean().item())
    assert losses[1] < 1.28 * losses[0]  # 1.21; without it, 1.35


# ---- the run ----------------------------------------------------------------------------------------------------


def test_log_has_a_line_per_update_and_several_pictures_come_one_after_another(forget, photos):
    pictures = [photos / "a.png", photos / "b.png"]
    run = forget("--steps", "7", "--surrogate", "flip", "noise:20", picture=pictures)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(14)) and [r["picture"] for r in rows] == [0] * 7 + [1] * 7
    assert {"loss_r", "loss_f", "cos", "conflict", "norm_f", "norm_r"} <= rows[0].keys()
    assert (run / "surrogate-0.png").exists() and (run / "surrogate-1.png").exists()


@pytest.mark.parametrize("flags", [["--beta", "5e-4"], ["--constant-lambda", "0.5"], ["--seed", "1"], ["--lr", "1e-3"]])
def test_every_switch_changes_the_result(forget, flags):
    common = ["--steps", "4", "--surrogate", "flip", "--lr", "1e-2"]
    assert differ(forget(*common, out="plain"), forget(*common, *flags, out="other"))


def test_both_remedies_are_the_small_recipe_alone(forget, photos, tmp_path, monkeypatch):
    """The rate falls for each picture, and a batch's timesteps are stratified; at the papers' size, neither."""
    rates = []
    step = torch.optim.AdamW.step
    spy = lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1]  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    forget("--steps", "4", "--lr", "1e-3", "--surrogate", "flip", picture=[photos / "a.png", photos / "b.png"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4] * 2)
    rates.clear()
    forget("--steps", "3", "--surrogate", "flip", "--lr", "1e-3", "--lr-scheduler", "constant", out="constant")
    assert rates == [1e-3] * 3
    rates.clear()

    unet = UNet2DModel(sample_size=72, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "large")
    Image.open(photos / "large.png").resize((72, 72)).save(tmp_path / "picture.png")
    stratified, draw = [], method.draw_times
    monkeypatch.setattr(method, "draw_times", lambda n, s, g, spread: (stratified.append(spread), draw(n, s, g, spread))[1])
    forget("--steps", "3", "--surrogate", "flip", out="paper", model=tmp_path / "large", picture=[tmp_path / "picture.png"])
    assert rates == [5e-6] * 3 and stratified == [False] * 3
    forget("--steps", "3", "--surrogate", "flip", out="small")
    assert stratified[3:] == [True] * 3


def test_independent_timesteps_are_independent():
    g = torch.Generator().manual_seed(0)
    t = torch.stack([method.draw_times(8, None, g, stratified=False) for _ in range(500)])
    assert t.min() >= 0 and t.max() <= 999 and abs(t.float().mean() - 499.5) < 15
    eighths = torch.stack([torch.bincount(row // 125, minlength=8) for row in t])
    assert (eighths > 1).any(1).float().mean() > 0.9  # stratified, none would hold two


def test_surgery_matters_once_the_gradients_conflict(forget, photos):
    common = ["--steps", "30", "--surrogate", str(photos / "b.png"), "--lr", "1e-2", "--constant-lambda", "0.5"]
    runs = [forget(*common, "--surgery", s, out=s) for s in method.SURGERY]
    assert any(json.loads(line)["conflict"] for line in (runs[0] / "log.jsonl").read_text().splitlines())
    assert differ(runs[0], runs[1]) and differ(runs[1], runs[2]) and differ(runs[0], runs[2])


def test_ddpm_is_saved_as_a_pipeline_and_a_folder_without_subfolders_loads(forget, tiny_ddpm, tmp_path):
    """google/ddpm-celebahq-256 keeps its UNet beside model_index.json."""
    flat = tmp_path / "flat"
    shutil.copytree(tiny_ddpm / "unet", flat)
    shutil.copy(tiny_ddpm / "model_index.json", flat)
    shutil.copy(tiny_ddpm / "scheduler/scheduler_config.json", flat)
    a, b = (forget("--steps", "2", "--surrogate", "flip", model=m, out=str(i)) for i, m in enumerate((flat, "ddpm")))
    same(a, b)
    original = DDPMPipeline.from_pretrained(tiny_ddpm).unet.state_dict()
    changed = DDPMPipeline.from_pretrained(a / "pipeline").unet.state_dict()
    assert sum(not torch.equal(p, original[n]) for n, p in changed.items()) > 0.9 * len(original)


@pytest.mark.parametrize(("model", "family"), [("sd", StableDiffusionPipeline), ("sd3", StableDiffusion3Pipeline)])
def test_lora_reloads_in_plain_diffusers_and_gives_the_same_picture(forget, tiny, tiny_sd3, model, family, monkeypatch):
    nets = []
    inner = method.get_peft_model_state_dict
    monkeypatch.setattr(method, "get_peft_model_state_dict", lambda net: (nets.append(net), inner(net))[1])
    flags = ["--remember", "generate:4", "--surrogate", "flip", "--steps", "4", "--lr", "1e-2", "--save-pipeline"]
    run = forget(*flags, "--prompt", "a cat", model=model)
    none = dict(text_encoder_3=None, tokenizer_3=None) if model == "sd3" else {}
    base = {"sd": tiny, "sd3": tiny_sd3}[model]
    name = "unet" if model == "sd" else "transformer"

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        g = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe("a cat", generator=g, num_inference_steps=3, output_type="np").images)

    before = family.from_pretrained(base, **none)
    original = draw(before)
    before.register_modules(**{name: nets[0]})
    trained = draw(before)
    loaded = family.from_pretrained(base, **none)
    loaded.load_lora_weights(run)
    fused = family.from_pretrained(run / "pipeline", **none)
    torch.testing.assert_close(draw(loaded), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(fused), trained, rtol=0, atol=1e-4)
    assert (trained - original).abs().max() > 1e-3


def test_latent_model_remembers_files(forget):
    """Files are encoded on the way, by the one part of the pipeline that stays."""
    a, b = (forget("--steps", "2", "--surrogate", s, model="sd", out=s) for s in ("flip", "random"))
    assert differ(a, b) and all(n.startswith("unet.") for n in weights(a))


def launch(processes, folder, *flags):
    """The real program under torchrun, without the scoring."""
    script = folder / "launch.py"
    script.write_text("import sys, instance_unlearn as m; m.unlearn(m.parse_args(sys.argv[1:]))")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(method.REPO)}
    return subprocess.run([*torchrun, str(script), *flags], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("model", ["ddpm", "sd3"])
def test_two_processes_equal_one(forget, tiny_ddpm, tiny_sd3, photos, tmp_path, model):
    remember = ["--remember", str(photos) if model == "ddpm" else "generate:5"]
    flags = ["--steps", "3", "--seed", "3", "--surrogate", "sdedit:0.5", *remember]
    one = forget(*flags, model=model, out="one")
    argv = ["--model", str(tiny_ddpm if model == "ddpm" else tiny_sd3), "--forget", str(photos / "a.png"), "--batch-size", "4"]
    result = launch(2, tmp_path, *argv, "--out", str(tmp_path / "two"), *flags)
    assert result.returncode == 0, result.stderr
    # Adam's first steps are lr * sign(g) wherever g is far above its epsilon: rounding shows as a small part of lr
    same(one, tmp_path / "two", rtol=0, atol=2e-5 if model == "ddpm" else 2e-4)


def test_killed_and_resumed_equals_undisturbed(forget, tiny_ddpm, photos, tmp_path):
    flags = ["--steps", "40", "--surrogate", "flip", "noise:50"]
    pictures = [photos / "a.png", photos / "b.png"]
    whole = forget(*flags, out="whole", picture=pictures)
    argv = ["--model", str(tiny_ddpm), "--forget", *map(str, pictures), "--remember", str(photos), "--batch-size", "4"]
    argv += ["--out", str(tmp_path / "cut"), *flags]
    program = subprocess.Popen([sys.executable, str(method.REPO / "instance_unlearn.py"), *argv], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "cut/checkpoint.safetensors"
    while not checkpoint.exists() and program.poll() is None:
        time.sleep(0.02)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert checkpoint.exists() and not (tmp_path / "cut/pipeline").exists()
    same(whole, forget(*flags, "--resume", out="cut", picture=pictures))


# ---- bad input: one line, what was seen, which flag mends it ----------------------------------------------------


@pytest.mark.parametrize(("flags", "says"), [
    (["--forget", "missing.png"], "--forget missing.png cannot be read"),
    (["--forget", "TRUNCATED"], "truncated.png cannot be read"),
    (["--forget", "TEXT"], "text.png cannot be read"),
    (["--forget", "GREY"], "has mode L; expected RGB"),
    (["--forget", "RGBA"], "has mode RGBA; expected RGB"),
    (["--forget", "LARGE"], "is 64x64; expected 16x16"),
    (["--surrogate", "GREY"], "--surrogate"),
    (["--surrogate", "no-such-kind"], "--surrogate no-such-kind cannot be read"),
    (["--surrogate", "flip", "flip"], "1 pictures but 2 surrogates"),
    (["--surrogate", "sdedit:1.5"], "expected a strength in (0, 1]"),
    (["--remember", "EMPTY"], "no pictures there"),
    (["--remember", "generate:0"], "no pictures there"),
    (["--prompt", "a cat"], "is unconditional, it takes no prompt"),
    (["--model", "no/such-model-anywhere"], "--model no/such-model-anywhere cannot be loaded"),
    (["--model", "tests"], "no model_index.json"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--steps", "0"], "expected steps > 0"),
    (["--beta", "0.01"], "lambda in [0, 1]"),
    (["--lr", "0"], "expected a positive rate"),
    (["--rank", "0"], "expected a positive rate and rank"),
    (["--constant-lambda", "1.5"], "lambda in [0, 1]"),
    (["--out", "/proc/nowhere"], "cannot be written"),
])  # fmt: skip
def test_bad_input_is_one_line(forget, photos, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(method.REPO)
    bad = tmp_path / "bad"
    (bad / "empty").mkdir(parents=True)
    image = Image.open(photos / "a.png")
    (bad / "truncated.png").write_bytes((photos / "a.png").read_bytes()[:60])
    (bad / "text.png").write_text("not a picture")
    image.convert("L").save(bad / "grey.png")
    image.convert("RGBA").save(bad / "rgba.png")
    names = {"TRUNCATED": "truncated.png", "TEXT": "text.png", "GREY": "grey.png", "RGBA": "rgba.png", "EMPTY": "empty"}
    flags = [str(bad / names[f]) if f in names else str(photos / "large.png") if f == "LARGE" else f for f in flags]
    with pytest.raises(SystemExit) as e:
        forget("--steps", "1", *([] if "--surrogate" in flags else ["--surrogate", "flip"]), *flags)
    assert says in str(e.value) and "\n" not in str(e.value) and e.value.code != 0


def test_a_broken_picture_to_remember_is_one_line(forget, photos, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/x.png").write_bytes((photos / "b.png").read_bytes()[:60])
    with pytest.raises(SystemExit, match=r"--remember .*x\.png cannot be read"):
        forget("--steps", "1", "--surrogate", "flip", "--remember", str(tmp_path / "set"))


def test_a_finished_or_different_run_is_never_overwritten(forget):
    forget("--steps", "1", "--surrogate", "flip")
    with pytest.raises(SystemExit, match="already holds a run"):
        forget("--steps", "1", "--surrogate", "flip")
    with pytest.raises(SystemExit, match=r"other settings \(seed\)"):
        forget("--steps", "1", "--surrogate", "flip", "--resume", "--seed", "1")


def test_a_users_own_small_model_is_not_taught_emoji(tiny_ddpm, photos, tmp_path):
    """The emoji's images are the default of the model in emoji/ alone; any other draws what it is to remember."""
    argv = ["--model", str(tiny_ddpm), "--forget", str(photos / "a.png"), "--surrogate", "flip", "--steps", "1"]
    run = method.unlearn(method.parse_args([*argv, "--batch-size", "2", "--out", str(tmp_path / "run")]))
    assert json.loads((run / "args.json").read_text())["settings"]["remember"] == "generate:100"


def test_text_encoders_are_gone_before_the_network_is_trained(forget, monkeypatch):
    """Also T5, which is larger than all the rest: it is loaded in bfloat16."""
    parts, alive, load, write = [], [], method.load_pipeline, method.write_grad

    def watch(*args, **kwargs):
        pipe = load(*args, **kwargs)
        parts.extend(weakref.ref(getattr(pipe, name)) for name in ("text_encoder", "text_encoder_2"))
        return pipe

    monkeypatch.setattr(method, "load_pipeline", watch)
    monkeypatch.setattr(method, "write_grad", lambda *a: (alive.append([part() is not None for part in parts]), write(*a)))
    forget("--steps", "1", "--surrogate", "flip", "--remember", "generate:2", model="sd3")
    assert alive == [[False, False]]


def test_t5_is_loaded_in_bfloat16(tiny_sd3, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
    small = dict(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=len(pipe.tokenizer))
    pipe.register_modules(text_encoder_3=T5EncoderModel(T5Config(**small)), tokenizer_3=pipe.tokenizer)
    pipe.save_pretrained(tmp_path / "t5")
    pipe = common.load_pipeline(str(tmp_path / "t5"), dtype=torch.float32)
    assert pipe.text_encoder_3.dtype == torch.bfloat16
    assert {p.dtype for m in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2) for p in m.parameters()} == {
        torch.float32
    }
    rows, *_ = pipe.encode_prompt("a cat", None, None, do_classifier_free_guidance=False)
    assert rows.dtype == torch.float32 and rows.shape[1] == 77 + 256 and rows[:, 77:].abs().max() > 0
