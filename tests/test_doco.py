"""doco.py on a tiny random model: the equations by hand, what changes and what does not, processes, resume, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil

import doco
from discriminator import patchgan
from gradsurgery import flat_grad

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def same(a, b, **tolerance):
    a, b = load_file(a / "delta.safetensors"), load_file(b / "delta.safetensors")
    assert a.keys() == b.keys()
    for n in a:
        torch.testing.assert_close(a[n], b[n], **tolerance or dict(rtol=0, atol=0))


# ---- the equations ----------------------------------------------------------------------------------------------


def test_noise_and_views_agree_with_diffusers():
    scheduler = DDPMScheduler(**SCHEDULE)
    x0, noise = torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([980, 500, 20])
    a_t = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    xt = doco.add_noise(x0, noise, a_t)
    torch.testing.assert_close(xt, scheduler.add_noise(x0, noise, t))
    eps = torch.randn_like(xt)
    for stride in (1, 20):
        scheduler.set_timesteps(1000 // stride)
        a_prev = scheduler.alphas_cumprod[t - stride].view(-1, 1, 1, 1)
        for i, s in enumerate(t):
            ours = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7))
            step = scheduler.step(eps[i : i + 1], s, xt[i : i + 1], generator=torch.Generator().manual_seed(7))
            j = slice(i, i + 1)
            torch.testing.assert_close(doco.view_x0(xt[j], eps[j], a_t[j]), step.pred_original_sample, rtol=1e-4, atol=1e-4)
            got = doco.view_xprev(xt[j], eps[j], a_t[j], a_prev[j], ours)
            torch.testing.assert_close(got, step.prev_sample, rtol=1e-4, atol=1e-4)


def test_last_step_of_xprev_is_the_clean_latent():
    xt, eps, noise = torch.randn(3, 1, 4, 8, 8)
    a = torch.full((1, 1, 1, 1), 0.9)
    torch.testing.assert_close(doco.view_xprev(xt, eps, a, torch.ones_like(a), noise), doco.view_x0(xt, eps, a))


def test_losses_by_hand():
    def disc(x):
        return x.mean((1, 2, 3), keepdim=True)  # logits that can be read off

    anchor, target = torch.full((2, 4, 2, 2), 0.5), torch.full((2, 4, 2, 2), -1.5)
    sigmoid = lambda v: 1 / (1 + torch.tensor(-v).exp())  # noqa: E731
    torch.testing.assert_close(doco.loss_discriminator(disc, anchor, target), -sigmoid(0.5).log() - (1 - sigmoid(-1.5)).log())
    torch.testing.assert_close(doco.loss_unlearn(disc, target), -sigmoid(-1.5).log())


def test_unlearning_loss_leaves_nothing_on_the_discriminator():
    disc, w = patchgan(16), torch.ones(1, requires_grad=True)
    x = torch.randn(2, 4, 16, 16)
    flat_grad(doco.loss_unlearn(disc, x * w), [w])
    assert all(p.grad is None for p in disc.parameters())


def test_swap_gives_the_original_prediction_bitwise(tiny):
    unet = StableDiffusionPipeline.from_pretrained(tiny).unet
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 77, 32)
    params = [p for n, p in unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n]
    originals = [p.detach().clone() for p in params]
    with torch.no_grad():
        before = unet(*inputs).sample
        for p in params:
            p.add_(torch.randn_like(p))
        changed = unet(*inputs).sample
        doco.swap(params, originals)
        assert torch.equal(unet(*inputs).sample, before)
        doco.swap(params, originals)
        assert torch.equal(unet(*inputs).sample, changed) and not torch.equal(changed, before)


# ---- prompts ----------------------------------------------------------------------------------------------------


def test_prompts_replace_the_anchor_whatever_its_case():
    pairs = doco.prompt_pairs(doco.parse_args(["--target", "Grumpy Cat", "--anchor", "Cat"]))
    assert all("cat" in a.lower() and ts == [a.replace("Cat", "Grumpy Cat")] for a, ts in pairs)


def test_several_targets_and_styles(tmp_path):
    args = doco.parse_args(["--target", "Snoopy", "Tom", "--anchor", "Dog", "Cat"])
    text = str(doco.prompt_pairs(args))
    assert "a photo of a Snoopy" in text and "a photo of a Tom" in text
    args = doco.parse_args(["--target", "Van Gogh", "--anchor", "painting", "--concept-type", "style"])
    anchor, targets = doco.prompt_pairs(args)[0]
    assert anchor.startswith("a painting of a ") and any(t.endswith("in the style of Van Gogh") for t in targets)


def test_prompts_file_replaces_whole_words_and_serves_each_anchor(tmp_path):
    (tmp_path / "prompts.txt").write_text("a man and a woman\na dog\n")
    argv = ["--target", "LeBron James", "Snoopy", "--anchor", "man", "dog", "--prompts", str(tmp_path / "prompts.txt")]
    pairs = doco.prompt_pairs(doco.parse_args(argv))
    assert pairs == [("a man and a woman", ["a LeBron James and a woman"]), ("a dog", ["a Snoopy"])]


# ---- the run ----------------------------------------------------------------------------------------------------


def test_only_k_and_v_change_and_plain_diffusers_loads_them(tiny, unlearn):
    run = unlearn("--steps", "6", "2", "--save-pipeline")
    delta, original = load_file(run / "delta.safetensors"), StableDiffusionPipeline.from_pretrained(tiny).unet.state_dict()
    assert delta and all(".attn2.to_k." in n or ".attn2.to_v." in n for n in delta)
    assert all(not torch.equal(delta[n], original[n]) for n in delta)
    pipe = StableDiffusionPipeline.from_pretrained(tiny)
    assert not pipe.unet.load_state_dict(delta, strict=False).unexpected_keys
    whole = StableDiffusionPipeline.from_pretrained(run / "pipeline").unet.state_dict()
    for n, p in original.items():
        assert torch.equal(whole[n], delta.get(n, p))
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {"loss_d", "disc_acc", "loss_u", "loss_r", "cos", "conflict"} <= rows[-1].keys()
    assert json.loads((run / "args.json").read_text())["torch"] == torch.__version__


def test_folder_with_half_precision_files_and_a_safety_checker(tiny, unlearn, tmp_path):
    """As SD v1.4 lies on the hub: fp16 files, and a safety checker that unlearning leaves out and --save-pipeline keeps."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny, dtype=torch.float16)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=16)
    config = CLIPConfig(text_config=small, vision_config=small | dict(image_size=32, patch_size=16), projection_dim=16)
    size = {"height": 32, "width": 32}
    pipe.register_modules(safety_checker=StableDiffusionSafetyChecker(config).half(),
                          feature_extractor=CLIPImageProcessorPil(size=size, crop_size=size))  # fmt: skip
    folder = tmp_path / "fp16"
    pipe.save_pretrained(folder, variant="fp16")
    assert not list(folder.rglob("model.safetensors")) and list(folder.rglob("diffusion_pytorch_model.fp16.safetensors"))
    run = unlearn("--steps", "2", "1", "--save-pipeline", model=folder)
    assert all(t.dtype == torch.float32 for t in load_file(run / "delta.safetensors").values())
    assert StableDiffusionPipeline.from_pretrained(run / "pipeline").safety_checker is not None


def test_text_encoder_and_vae_leave_the_memory(unlearn, monkeypatch):
    parts, alive, load, write = [], [], doco.load_pipeline, doco.write_grad

    def watch(*args, **kwargs):
        pipe = load(*args, **kwargs)
        parts.extend(weakref.ref(part) for part in (pipe.text_encoder, pipe.vae))
        return pipe

    monkeypatch.setattr(doco, "load_pipeline", watch)
    monkeypatch.setattr(doco, "write_grad", lambda *a: (alive.append([part() is not None for part in parts]), write(*a)))
    unlearn("--steps", "2", "1")
    assert alive and alive[0] == [False, False]


def test_train_full_changes_the_whole_unet(tiny, unlearn):
    delta = load_file(unlearn("--steps", "2", "1", "--train", "full") / "delta.safetensors")
    assert delta.keys() == StableDiffusionPipeline.from_pretrained(tiny).unet.state_dict().keys()


def test_warmup_trains_the_discriminator_only(tiny, unlearn):
    run = unlearn("--steps", "3", "3")
    original = StableDiffusionPipeline.from_pretrained(tiny).unet.state_dict()
    assert all(torch.equal(p, original[n]) for n, p in load_file(run / "delta.safetensors").items())


def test_small_recipe_counts_iterations_per_target_and_twice_for_a_style(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(doco.SMALL, "steps", [2, 1])
    argv = ["--model", str(tiny), "--target", "twemoji", "noto", "--anchor", "emoji", "--out", str(tmp_path / "run")]
    run = doco.unlearn(doco.parse_args([*argv, "--concept-type", "style", "--batch-size", "2"]))
    settings = json.loads((run / "args.json").read_text())["settings"]
    lr, disc_lr = doco.SMALL["lr"]
    assert settings["steps"] == [8, 4] and settings["lr"] == [lr, 5 * disc_lr]


SWITCHES = [["--view", "xprev:20"], ["--retain", "none"], ["--retain", "l2"], ["--lam", "0.5"], ["--train", "xattn"]]


@pytest.mark.parametrize("flags", SWITCHES)
def test_every_switch_changes_the_result(unlearn, flags):
    plain, other = unlearn("--steps", "6", "1", out="plain"), unlearn("--steps", "6", "1", *flags, out="other")
    plain, other = (load_file(r / "delta.safetensors") for r in (plain, other))
    assert any(not torch.equal(plain[n], other[n]) for n in plain)


def test_same_seed_same_weights_other_seed_others(unlearn):
    runs = [unlearn("--steps", "4", "1", "--seed", s, out=f"{i}") for i, s in enumerate("001")]
    same(runs[0], runs[1])
    with pytest.raises(AssertionError):
        same(runs[0], runs[2])


def test_every_draw_follows_the_seed(unlearn, monkeypatch):
    """Also those of the training steps: the generator looks at the lower 32 bits of its seed alone."""
    drawn, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: (drawn.append(randint(*a, **k)), drawn[-1])[1])
    for seed in "01":
        unlearn("--steps", "2", "1", "--seed", seed, out=seed)
    first, second = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert first and not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_init_goes_on_from_an_earlier_run(tiny, unlearn):
    first = unlearn("--steps", "4", "1", out="first")
    second = unlearn("--steps", "2", "2", "--init", str(first), out="second", target="Crying Cat")
    same(first, second)  # a run of warm-up alone changes nothing


def launch(processes, folder, *flags):
    """The real program under torchrun, without the scoring."""
    script = folder / "launch.py"
    script.write_text("import sys, doco; doco.unlearn(doco.parse_args(sys.argv[1:]))")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(doco.REPO)}
    return subprocess.run([*torchrun, str(script), *flags], env=env, capture_output=True, text=True)


def test_two_processes_equal_one(tiny, tmp_path, unlearn):
    flags = ["--steps", "5", "2", "--seed", "3"]
    one = unlearn(*flags, out="one")
    argv = ["--model", str(tiny), "--target", "Grumpy Cat", "--anchor", "Cat", "--batch-size", "4"]
    result = launch(2, tmp_path, *argv, "--out", str(tmp_path / "two"), *flags)
    assert result.returncode == 0, result.stderr
    same(one, tmp_path / "two", rtol=0, atol=2e-6)  # three Adam steps of 1e-4 each


def test_killed_and_resumed_equals_undisturbed(tiny, tmp_path, unlearn):
    flags = ["--steps", "60", "10"]
    whole = unlearn(*flags, out="whole")
    argv = ["--model", str(tiny), "--target", "Grumpy Cat", "--anchor", "Cat", "--batch-size", "4"]
    argv += ["--out", str(tmp_path / "cut")]
    program = subprocess.Popen([sys.executable, str(doco.REPO / "doco.py"), *argv, *flags], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "cut/checkpoint.safetensors"
    while not checkpoint.exists() and program.poll() is None:
        time.sleep(0.02)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert checkpoint.exists() and not (tmp_path / "cut/delta.safetensors").exists()
    same(whole, unlearn(*flags, "--resume", out="cut"))


# ---- bad input: one line, what was seen, which flag mends it ----------------------------------------------------


@pytest.mark.parametrize(("flags", "says"), [
    (["--target", "Cat"], "--target and --anchor are both 'Cat'"),
    (["--target", " "], "must not be empty"),
    (["--target", "A", "B", "--anchor", "C", "D", "E"], "2 targets but 3 anchors"),
    (["--model", "no/such-model-anywhere"], "--model no/such-model-anywhere cannot be loaded"),
    (["--model", "tests"], "no model_index.json"),
    (["--prompts", "no-such-file.txt"], "no such file"),
    (["--prompts", "EMPTY"], "is empty"),
    (["--prompts", "DOGS"], "does not contain the anchor"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--steps", "5", "9"], "TOTAL >= WARMUP"),
    (["--steps", "5", "2", "1"], "TOTAL >= WARMUP"),
    (["--steps", "0"], "TOTAL >= WARMUP"),
    (["--lr", "-1"], "expected one or two positive rates"),
    (["--lr", "1e-4", "0"], "expected one or two positive rates"),
    (["--resolution", "30"], "expected a multiple of 4"),
    (["--resolution", "16"], "at least 32"),
    (["--view", "x7"], "--view x7"),
    (["--view", "xprev:0"], "--view xprev:0"),
    (["--init", "tests"], "no delta.safetensors"),
    (["--init", "TRUNCATED"], "is corrupted"),
    (["--init", "FOREIGN"], "trained weights that are not trained here"),
    (["--out", "/proc/nowhere"], "cannot be written"),
])  # fmt: skip
def test_bad_input_is_one_line(tiny, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(doco.REPO)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "dogs.txt").write_text("a photo of a dog\n")
    for name, shape in (("truncated", 1), ("foreign", 3)):
        (tmp_path / name).mkdir()
        save_file({"mid_block.attentions.0": torch.zeros(shape)}, tmp_path / name / "delta.safetensors")
    (tmp_path / "truncated/delta.safetensors").write_bytes(b"half")
    files = {"EMPTY": "empty.txt", "DOGS": "dogs.txt", "TRUNCATED": "truncated", "FOREIGN": "foreign"}
    flags = [str(tmp_path / files[f]) if f in files else f for f in flags]
    argv = ["--model", str(tiny), "--target", "Grumpy Cat", "--anchor", "Cat", "--out", str(tmp_path / "out"), "--steps", "2"]
    with pytest.raises(SystemExit) as e:
        doco.unlearn(doco.parse_args([*argv, *flags]))
    assert says in str(e.value) and "\n" not in str(e.value) and e.value.code != 0


def test_a_batch_that_cannot_be_split_is_one_line(tiny, tmp_path, monkeypatch):
    argv = ["--model", str(tiny), "--target", "A", "--anchor", "B", "--batch-size", "3", "--out", str(tmp_path / "x")]
    result = launch(2, tmp_path, *argv)
    assert result.returncode != 0 and "--batch-size 3 cannot be split over 2 processes" in result.stderr


def test_a_finished_or_different_run_is_never_overwritten(unlearn, tmp_path):
    unlearn("--steps", "2", "1")
    with pytest.raises(SystemExit, match="already holds a run"):
        unlearn("--steps", "2", "1")
    with pytest.raises(SystemExit, match=r"other settings \(seed\)"):
        unlearn("--steps", "2", "1", "--resume", "--seed", "1")


# ---- several targets, few images -----------------------------------------------------------------------------------


def lines(n, word):
    return "".join(f"a {word} number {k}\n" for k in range(n))


@pytest.mark.parametrize(("n_lines", "targets", "images"), [(200, 6, 1000), (1000, 2, 1000), (64, 2, 64), (12, 6, 64)])
def test_no_target_is_left_out_where_images_are_few(tmp_path, n_lines, targets, images):
    """Listed target by target, the sixth of six would get no image at all, and the second of two none."""
    (tmp_path / "prompts.txt").write_text(lines(n_lines, "cat"))
    names = [f"Tom{k}" for k in range(targets)]
    argv = ["--target", *names, "--anchor", "cat", "--prompts", str(tmp_path / "prompts.txt")]
    pairs = doco.prompt_pairs(doco.parse_args(argv))
    assert len(pairs) == n_lines * targets
    per_target = [sum(name in pairs[j % len(pairs)][1][0] for j in range(images)) for name in names]
    assert max(per_target) - min(per_target) <= 1 and sum(per_target) == images


def test_pairs_without_an_image_are_named_and_targets_without_one_are_refused(capsys):
    pairs = [("a", ["b"])] * 10
    doco.check_coverage(pairs, 10, 2)
    assert capsys.readouterr().err == ""
    doco.check_coverage(pairs, 8, 2)
    says = "warning: 2 of 10 pairs of prompt and target are not trained, for there are 8 anchor images"
    assert says in capsys.readouterr().err
    with pytest.raises(SystemExit, match="3 targets but 2 anchor images; give fewer --target at once"):
        doco.check_coverage(pairs, 2, 3)


def test_other_models_are_not_asked_for_emoji():
    argv = ["--target", "Snoopy", "--anchor", "Dog"]
    own = doco.prompt_pairs(doco.parse_args(argv))
    other = doco.prompt_pairs(doco.parse_args([*argv, "--model", "CompVis/stable-diffusion-v1-4"]))
    assert sum("emoji" in a for a, _ in own) == 2 and len(own) == 12
    assert not any("emoji" in a for a, _ in other) and len(other) == 10


def test_project_step_goes_with_eq_10(tiny, tmp_path):
    argv = ["--model", str(tiny), "--target", "A", "--anchor", "B", "--out", str(tmp_path / "x"), "--project", "step"]
    with pytest.raises(SystemExit, match="--project step goes with --retain cp, not with --retain l2"):
        doco.unlearn(doco.parse_args([*argv, "--retain", "l2"]))


def test_log_is_of_the_whole_batch(tiny, tmp_path, unlearn):
    """Losses are means over all ranks' images, and conflict is the fraction of the iterations since the last row."""
    flags = ["--steps", "15", "2", "--seed", "3"]
    one = unlearn(*flags, out="one")
    argv = ["--model", str(tiny), "--target", "Grumpy Cat", "--anchor", "Cat", "--batch-size", "4"]
    result = launch(2, tmp_path, *argv, "--out", str(tmp_path / "two"), *flags)
    assert result.returncode == 0, result.stderr
    a, b = ([json.loads(row) for row in (run / "log.jsonl").read_text().splitlines()] for run in (one, tmp_path / "two"))
    assert [row["step"] for row in a] == [9, 14]
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and {"loss_d", "loss_u", "loss_r", "cos_step"} <= x.keys()
        assert all(abs(x[k] - y[k]) < 1e-4 * (1 + abs(x[k])) for k in x), (x, y)
    assert {round(row["conflict"] * n, 6) for row, n in zip(a, (8, 5), strict=True)} <= set(range(9))
