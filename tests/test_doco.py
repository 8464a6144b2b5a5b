"""doco.py on a tiny random model: prompts, flags, what a run changes, processes, bad input.

The equations are in test_doco_step.py, the training loop in test_doco_updates.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
import types
import weakref
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil

import common
import doco

ONE = common.Processes(0, 1, torch.device("cpu"))
CAT = ["--target", "Grumpy Cat", "--anchor", "Cat"]


@pytest.fixture
def quick(monkeypatch):
    """Anchor images of three sampling steps, for runs in this process."""
    monkeypatch.setitem(doco.SMALL_IMAGES, "sampling_steps", 3)


def weights(run):
    """{name: tensor} of a finished run."""
    return load_file(run / "delta.safetensors")


def same(a, b, **tolerance):
    """Asserts that two runs have the same weights: bitwise without a tolerance."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance or {"rtol": 0, "atol": 0})


def original_weights(folder):
    """{name: tensor} of a pipeline's UNet."""
    return StableDiffusionPipeline.from_pretrained(folder).unet.state_dict()


def log_rows(run):
    """The rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# ---- prompts ------------------------------------------------------------------------------------


def test_prompts_replace_the_anchor_whatever_its_case():
    pairs = doco.prompt_pairs(["Grumpy Cat"], ["Cat"])
    for anchor, targets in pairs:
        assert "Cat" in anchor and targets == [anchor.replace("Cat", "Grumpy Cat")]


def test_several_targets_take_turns():
    pairs = doco.prompt_pairs(["Snoopy", "Tom"], ["Dog", "Cat"])
    assert pairs[:3] == [("Dog", ["Snoopy"]), ("Cat", ["Tom"]), ("a Dog", ["a Snoopy"])]
    one_anchor = doco.prompt_pairs(["Snoopy", "Tom"], ["toon"])
    assert one_anchor[:2] == [("toon", ["Snoopy"]), ("toon", ["Tom"])]


def test_styles_have_three_target_prompts():
    anchor, targets = doco.prompt_pairs(["Van Gogh"], ["painting"], "style")[0]
    assert anchor == "a painting of a cat"
    assert targets == [
        "a painting of a cat, in the style of Van Gogh",
        "a cat, in the style of Van Gogh",
        "in Van Gogh's style, a painting of a cat",
    ]
    assert doco.prompt_pairs(["twemoji"], ["emoji"], "style")[0][0] == "an emoji of a cat"


def test_prompts_file_replaces_whole_words_and_serves_each_anchor(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a man and a woman\n\na dog\n")
    pairs = doco.prompt_pairs(["LeBron James", "Snoopy"], ["man", "dog"], prompts=file)
    assert pairs == [("a man and a woman", ["a LeBron James and a woman"]), ("a dog", ["a Snoopy"])]


def test_a_name_is_no_regular_expression(tmp_path):
    """Neither as the anchor nor as the target: "C++" and "\\1" are names like others."""
    (tmp_path / "prompts.txt").write_text("code in C++ (draft)\n")
    pairs = doco.prompt_pairs([r"\1"], ["C++ (draft)"], prompts=tmp_path / "prompts.txt")
    assert pairs == [("code in C++ (draft)", [r"code in \1"])]


@pytest.mark.parametrize(
    ("n_lines", "n_targets", "n_images"),
    [(200, 6, 1000), (1000, 2, 1000), (64, 2, 64), (12, 6, 64)],
)
def test_no_target_is_left_out_where_images_are_few(tmp_path, n_lines, n_targets, n_images):
    """Listed target by target, the sixth of six would get no image at all."""
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"a cat number {k}\n" for k in range(n_lines)))
    names = [f"Tom{k}" for k in range(n_targets)]
    pairs = doco.prompt_pairs(names, ["cat"], prompts=file)
    assert len(pairs) == n_lines * n_targets
    of_images = [pairs[j % len(pairs)][1][0] for j in range(n_images)]
    per_target = [sum(name in prompt for prompt in of_images) for name in names]
    assert max(per_target) - min(per_target) <= 1 and sum(per_target) == n_images


def test_pairs_without_an_image_are_named_and_targets_without_one_are_refused(capsys):
    pairs = [("a", ["b"])] * 10
    doco.check_coverage(pairs, 10, 2)
    doco.check_coverage(pairs, 8, 2, warn=False)
    assert capsys.readouterr().err == ""
    doco.check_coverage(pairs, 8, 2)
    message = "2 of 10 pairs of prompt and target are not trained, for there are 8 anchor images"
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="3 targets but 2 anchor images; give fewer --target"):
        doco.check_coverage(pairs, 2, 3)


def test_other_models_are_not_asked_for_emoji():
    own = doco.prompt_pairs(["Snoopy"], ["Dog"], emoji=True)
    other = doco.prompt_pairs(["Snoopy"], ["Dog"], emoji=False)
    assert sum("emoji" in anchor for anchor, _ in own) == 2 and len(own) == 12
    assert not any("emoji" in anchor for anchor, _ in other) and len(other) == 10


@pytest.mark.parametrize(
    ("targets", "anchors", "text", "message"),
    [
        (["Cat"], ["cat"], None, "--target and --anchor are both 'Cat'"),
        ([" "], ["cat"], None, "--target and --anchor must not be empty"),
        (["Tom"], [""], None, "--target and --anchor must not be empty"),
        (["A", "B"], ["C", "D", "E"], None, "2 targets but 3 anchors; give one --anchor"),
        (["Tom"], ["cat"], "\n \n", "is empty; expected one anchor prompt per line"),
        (["Tom"], ["cat"], "a cat\na dog\n", "'a dog' does not contain the anchor 'cat'"),
        (["Tom"], ["cat"], "a caterpillar\n", "does not contain the anchor 'cat'"),
        (["Tom", "B"], ["cat", "horse"], "a cat\n", "does not contain the anchor 'horse'"),
    ],
)
def test_bad_prompts_are_one_line(tmp_path, targets, anchors, text, message):
    file = None
    if text is not None:
        file = tmp_path / "prompts.txt"
        file.write_text(text)
    with pytest.raises(SystemExit) as e:
        doco.prompt_pairs(targets, anchors, prompts=file)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_missing_prompts_file_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no such file"):
        doco.prompt_pairs(["Tom"], ["cat"], prompts=tmp_path / "none.txt")


# ---- flags and presets --------------------------------------------------------------------------


def model(small, net_name="unet"):
    """What fill_defaults asks of a model."""
    how = {"sampling_steps": 15 if small else 25, "guidance": 6.0}
    how["train_method"] = "lora" if net_name == "transformer" else "kv"
    return types.SimpleNamespace(small=small, net_name=net_name, **how)


def filled(*flags, small=True, processes=ONE, net_name="unet"):
    """(flags with their defaults, settings of the anchor images) of a command line."""
    args = doco.parse_args([*CAT, *flags])
    return doco.fill_defaults(args, model(small, net_name), processes)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("net_name", ["unet", "transformer"])
def test_without_flags_the_preset_holds(small, net_name):
    """A transformer gets a LoRA, with a rate of its own; a UNet keys and values."""
    args, images = filled(small=small, net_name=net_name)
    preset = doco.SMALL if small else doco.PAPER
    if net_name == "transformer":
        preset = preset | doco.LORA_PRESET
    assert {name: getattr(args, name) for name in preset} == preset
    assert args.train_method == ("lora" if net_name == "transformer" else "kv")
    n = (doco.SMALL_IMAGES if small else doco.PAPER_IMAGES)["num_images"]
    assert images == {
        "num_images": n,
        "sampling_steps": 15 if small else 25,
        "guidance": 6.0,
    }


def test_a_method_that_is_given_is_kept_and_brings_its_rate():
    args, _ = filled("--train-method", "xattn", net_name="transformer")
    assert (args.train_method, args.lr) == ("xattn", doco.SMALL["lr"])
    args, _ = filled("--train-method", "lora")
    assert (args.train_method, args.lr) == ("lora", doco.LORA_PRESET["lr"])


def test_flags_replace_the_preset_and_the_warm_up_keeps_its_part():
    args, images = filled("--steps", "10", "--lr", "0.5", "--batch-size", "3", small=False)
    assert (args.steps, args.warmup_steps, args.lr, args.batch_size) == (10, 5, 0.5, 3)
    assert args.disc_lr == doco.PAPER["disc_lr"]
    assert images["num_images"] == 30  # no more than the steps look at
    args, _ = filled("--steps", "10", "--warmup-steps", "0", "--disc-lr", "0.25")
    assert (args.steps, args.warmup_steps, args.disc_lr) == (10, 0, 0.25)
    args, _ = filled("--warmup-steps", "7")
    assert (args.steps, args.warmup_steps) == (doco.SMALL["steps"], 7)


def test_small_preset_counts_steps_per_target_and_twice_for_a_style():
    argv = ["--target", "twemoji", "noto", "--anchor", "emoji", "--concept-type", "style"]
    typed = doco.parse_args(argv)
    args, _ = doco.fill_defaults(typed, model(True), ONE)
    steps, warmup_steps = doco.SMALL["steps"], doco.SMALL["warmup_steps"]
    assert (args.steps, args.warmup_steps) == (4 * steps, 4 * warmup_steps)
    assert (args.lr, args.disc_lr) == (doco.SMALL["lr"], 5 * doco.SMALL["disc_lr"])
    assert typed.steps is None  # what was typed stays as it is
    args, _ = doco.fill_defaults(typed, model(False), ONE)
    assert (args.steps, args.disc_lr) == (doco.PAPER["steps"], 5 * doco.PAPER["disc_lr"])
    args, _ = doco.fill_defaults(doco.parse_args([*argv, "--disc-lr", "1e-3"]), model(True), ONE)
    assert args.disc_lr == 1e-3  # a flag is taken as it is


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0 cannot be split over 1 processes"),
        (["--steps", "5", "--warmup-steps", "9"], "--steps 5 --warmup-steps 9: expected"),
        (["--warmup-steps", "-1"], "--warmup-steps -1: expected"),
        (["--steps", "0"], "--steps 0 --warmup-steps 0: expected at least one step"),
        (["--lr", "-1"], "--lr -1 --disc-lr 0.0002: expected positive learning rates"),
        (["--disc-lr", "0"], "expected positive learning rates"),
        (["--lr", "nan"], "expected positive learning rates"),
    ],
)
def test_bad_values_are_one_line(flags, message):
    with pytest.raises(SystemExit) as e:
        filled(*flags)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_batch_that_cannot_be_split_is_one_line():
    two = common.Processes(0, 2, torch.device("cpu"))
    with pytest.raises(SystemExit, match="--batch-size 3 cannot be split over 2 processes"):
        filled("--batch-size", "3", processes=two)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stride", "0", "--disc-input", "xprev"], "--stride 0: expected 1 to 999 timesteps"),
        (["--stride", "1000", "--disc-input", "xprev"], "--stride 1000: expected 1 to 999"),
        (["--stride", "20"], "--stride 20 goes with --disc-input xprev, not x0"),
        (
            ["--project", "step", "--retain", "l2"],
            "--project step goes with --retain cp or distill, not with",
        ),
        (["--project", "step", "--retain", "none"], "--project step goes with --retain cp"),
        (["--retain-weight", "2"], "--retain-weight 2 goes with --retain distill"),
        (
            ["--retain", "distill", "--retain-weight", "0"],
            "--retain-weight 0: expected a positive number",
        ),
        (
            ["--retain-prompts", "vocabulary"],
            "--retain-prompts goes with --retain distill or --null-space",
        ),
        (["--retain", "distill", "--retain-prompts", "no.txt"], "--retain-prompts no.txt: no such"),
        (["--null-space", "0"], "--null-space 0: expected a fraction in (0, 1]"),
        (["--null-space", "1.5"], "--null-space 1.5: expected a fraction in (0, 1]"),
        (["--null-space", "0.9", "--shard"], "which needs no --shard; leave that out"),
        (
            ["--null-space", "0.9", "--train-method", "xattn"],
            "--null-space goes with --train-method kv",
        ),
        (
            ["--init", "tests", "--null-space", "0.9", "--retain-prompts", "vocabulary"],
            "--retain-prompts vocabulary would bring back what --init unlearned; give a file",
        ),
        (["--init", "tests"], "--init tests: no delta.safetensors there"),
        (["--model", "tests"], "--model tests: no model_index.json there"),
        (["--resolution", "30"], "--resolution 30"),
        (["--resolution", "-64"], "--resolution -64"),
        (["--resolution", "8"], "--resolution 8: expected at least 32"),
        (
            ["--lam", "0.5", "--retain", "l2"],
            "--lam 0.5 goes with --retain cp or distill, not with --retain l2",
        ),
        (["--init", "TRUNCATED"], "is corrupted"),
        (["--init", "FOREIGN"], "which is not trained here; repeat its --model"),
        (["--init", "OTHER SHAPE"], "which is not trained here; repeat its --model"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, monkeypatch, quick, flags, message):
    """Of unlearn() as a whole: what needs a model, a file, or several flags."""
    monkeypatch.chdir(common.REPO)
    key = next(n for n in original_weights(tiny) if "attn2.to_k" in n)
    names = {"TRUNCATED": key, "FOREIGN": "mid_block.attentions.0", "OTHER SHAPE": key}
    for folder, name in names.items():
        (tmp_path / folder).mkdir()
        save_file({name: torch.zeros(3)}, tmp_path / folder / "delta.safetensors")
    (tmp_path / "TRUNCATED/delta.safetensors").write_bytes(b"half")
    flags = [str(tmp_path / f) if f in names else f for f in flags]
    argv = ["--model", str(tiny), *CAT, "--out", str(tmp_path / "out")]
    argv += ["--steps", "2", "--batch-size", "2"]
    with pytest.raises(SystemExit) as e:
        doco.unlearn(doco.parse_args([*argv, *flags]))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_unknown_choices_are_refused(capsys):
    choices = {"--disc-input": "x7", "--retain": "l1", "--project": "both", "--train-method": "q"}
    for flag, value in choices.items():
        with pytest.raises(SystemExit) as e:
            doco.parse_args([*CAT, flag, value])
        assert e.value.code == 2 and flag in capsys.readouterr().err


def test_help_shows_every_default(capsys):
    """One flag, one value: none of them takes the pairs of numbers that it once took."""
    with pytest.raises(SystemExit):
        doco.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Eq. 10 gradient surgery" in text  # the docstring, as it stands
    for default in ("(default: 1.0)", "(default: x0)", "(default: cp)", "(default: 16)"):
        assert default in text
    for preset in (doco.PAPER, doco.SMALL):
        for value in (preset["steps"], f"{preset['lr']:g}".replace("e-0", "e-")):
            assert str(value).replace("0.00015", "1.5e-4") in text, value
    for flag in ("--steps", "--lr", "--disc-lr", "--warmup-steps"):
        with pytest.raises(SystemExit):
            doco.parse_args([*CAT, flag, "1", "2"])


# ---- the run ------------------------------------------------------------------------------------


def test_only_k_and_v_change_and_plain_diffusers_loads_them(tiny, unlearn, quick, capsys):
    run = unlearn("--steps", "6", "--warmup-steps", "2", "--save-pipeline")
    delta, original = weights(run), original_weights(tiny)
    assert delta and all(".attn2.to_k." in n or ".attn2.to_v." in n for n in delta)
    assert all(not torch.equal(delta[n], original[n]) for n in delta)
    pipe = StableDiffusionPipeline.from_pretrained(tiny)
    assert not pipe.unet.load_state_dict(delta, strict=False).unexpected_keys
    for name, p in original_weights(run / "pipeline").items():
        assert torch.equal(p, delta.get(name, original[name]))
    names = {"loss_d", "disc_acc", "loss_u", "loss_r", "cos", "conflict", "cos_step", "norm_g"}
    assert names <= log_rows(run)[-1].keys()
    record = json.loads((run / "args.json").read_text())
    assert record["torch"] == torch.__version__ and record["settings"]["warmup_steps"] == 2
    assert not list(run.glob("checkpoint*"))

    # The lines that it prints work: they sample with the unlearned model.
    printed = capsys.readouterr().out
    lines = printed.split("load it with:\n\n")[1].split("\n\n\n")[0]
    namespace = {}
    exec(lines.split("\npipe({")[0].split("\npipe('")[0], namespace)
    loaded = namespace["pipe"].unet.state_dict()
    assert all(torch.equal(loaded[name], delta[name]) for name in delta)


@pytest.mark.slow
def test_folder_with_half_precision_files_and_a_safety_checker(tiny, unlearn, tmp_path, quick):
    """As on the hub: fp16 files, and a safety checker, which --save-pipeline retains."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny, dtype=torch.float16)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    small = {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 16} | layers
    vision = small | {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=small, vision_config=vision, projection_dim=16)
    size = {"height": 32, "width": 32}
    pipe.register_modules(
        safety_checker=StableDiffusionSafetyChecker(config).half(),
        feature_extractor=CLIPImageProcessorPil(size=size, crop_size=size),
    )
    folder = tmp_path / "fp16"
    pipe.save_pretrained(folder, variant="fp16")
    assert not list(folder.rglob("model.safetensors"))
    assert list(folder.rglob("diffusion_pytorch_model.fp16.safetensors"))
    run = unlearn("--steps", "2", "--warmup-steps", "1", "--save-pipeline", model=folder)
    assert all(t.dtype == torch.float32 for t in weights(run).values())
    assert StableDiffusionPipeline.from_pretrained(run / "pipeline").safety_checker is not None


def test_text_encoder_and_vae_leave_the_memory(unlearn, monkeypatch, quick):
    parts, alive = [], []
    load_backbone, doco_step = doco.load_backbone, doco.doco_step

    def load(*args):
        backbone = load_backbone(*args)
        parts.extend([weakref.ref(backbone.pipe.text_encoder), weakref.ref(backbone.pipe.vae)])
        return backbone

    def step(*args, **kwargs):
        alive.append([part() is not None for part in parts])
        return doco_step(*args, **kwargs)

    monkeypatch.setattr(doco, "load_backbone", load)
    monkeypatch.setattr(doco, "doco_step", step)
    unlearn("--steps", "1", "--warmup-steps", "1")
    assert alive == [[False, False]]


@pytest.mark.parametrize("method", ["xattn", pytest.param("full", marks=pytest.mark.slow)])
def test_train_method(tiny, unlearn, quick, method):
    run = unlearn("--steps", "2", "--warmup-steps", "1", "--train-method", method)
    names = original_weights(tiny).keys()
    wanted = names if method == "full" else {n for n in names if ".attn2." in n}
    assert weights(run).keys() == wanted


def test_warm_up_alone_changes_nothing_and_init_goes_on_from_an_earlier_run(tiny, unlearn, quick):
    """--init loads the earlier weights; the anchor stays the original model's."""
    earlier = unlearn("--steps", "3", "--warmup-steps", "0", out="earlier")
    alone = ("--steps", "2", "--warmup-steps", "2")
    later = unlearn(*alone, "--init", str(earlier), out="later", target="Crying Cat")
    same(earlier, later)
    original = original_weights(tiny)
    assert not all(torch.equal(p, original[n]) for n, p in weights(later).items())
    untouched = unlearn(*alone, out="untouched")
    assert all(torch.equal(p, original[n]) for n, p in weights(untouched).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--disc-input", "xprev", "--stride", "20"],
        ["--disc-input", "xprev"],
        ["--retain", "none"],
        ["--retain", "l2"],
        ["--lam", "0.5"],
        ["--project", "step"],
        ["--train-method", "xattn"],
        ["--resolution", "32"],
        ["--disc-lr", "1e-2"],
    ],
)
def test_every_switch_changes_the_result(unlearn, quick, flags):
    steps = ("--steps", "6", "--warmup-steps", "1")
    plain, other = unlearn(*steps, out="plain"), unlearn(*steps, *flags, out="other")
    plain, other = weights(plain), weights(other)
    assert any(not torch.equal(plain[n], other[n]) for n in plain)


def test_same_seed_same_weights_other_seed_others(unlearn, quick):
    steps = ("--steps", "3", "--warmup-steps", "1")
    runs = [unlearn(*steps, "--seed", seed, out=f"{i}") for i, seed in enumerate("001")]
    same(runs[0], runs[1])
    with pytest.raises(AssertionError):
        same(runs[0], runs[2])


def test_images_are_those_of_the_seed_and_serve_a_resumed_run(tiny, unlearn, tmp_path, quick):
    """The cache is used again where its inputs are the same: the images are not sampled twice."""
    run = unlearn("--steps", "2", "--warmup-steps", "1")
    cache = run / "anchor_latents.safetensors"
    latents = load_file(cache)["latents"]
    assert latents.shape == (8, 4, 16, 16)
    (run / "delta.safetensors").unlink()
    changed = cache.stat().st_mtime_ns
    unlearn("--steps", "2", "--warmup-steps", "1", "--resume")
    assert cache.stat().st_mtime_ns == changed


def test_a_finished_or_different_run_is_never_overwritten(unlearn, quick):
    steps = ("--steps", "2", "--warmup-steps", "1")
    run = unlearn(*steps)
    changed = (run / "delta.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="already holds a run"):
        unlearn(*steps)
    with pytest.raises(SystemExit, match=r"other settings \(seed\)"):
        unlearn(*steps, "--resume", "--seed", "1")
    assert unlearn(*steps, "--resume") == run  # --resume of a finished run: nothing to do
    assert (run / "delta.safetensors").stat().st_mtime_ns == changed


def test_models_that_predict_something_else_are_refused(tiny, unlearn, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(tiny)
    pipe.scheduler.register_to_config(prediction_type="sample")
    pipe.save_pretrained(tmp_path / "x0")
    with pytest.raises(SystemExit, match="predicts sample; expected epsilon, v_prediction or flow"):
        unlearn("--steps", "1", model=tmp_path / "x0")


# ---- processes and interruptions ----------------------------------------------------------------


def launch(processes, folder, *flags, program="doco"):
    """doco.py or instance_unlearn.py under torchrun, without its evaluation."""
    script = folder / "launch.py"
    script.write_text(f"import sys, {program} as m; m.unlearn(m.parse_args(sys.argv[1:]))")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(processes), str(script), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(common.REPO)}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """The same 15 steps by one process and by two: two run folders."""
    folder = tmp_path_factory.mktemp("both")
    argv = ["--model", str(tiny), *CAT, "--batch-size", "4", "--seed", "3"]
    argv += ["--steps", "15", "--warmup-steps", "2"]
    doco.unlearn(doco.parse_args([*argv, "--out", str(folder / "one")]))
    result = launch(2, folder, *argv, "--out", str(folder / "two"))
    assert result.returncode == 0, result.stderr
    return folder / "one", folder / "two"


@pytest.mark.slow
def test_two_processes_equal_one(both):
    same(*both, rtol=0, atol=1e-5)  # 13 AdamW steps of 1.5e-4 each


@pytest.mark.slow
def test_log_is_of_the_whole_batch(both):
    """Losses are means over the images of all ranks."""
    one, two = map(log_rows, both)
    assert [row["step"] for row in one] == [9, 14]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and {"loss_d", "loss_u", "loss_r", "cos_step"} <= a.keys()
        for name in a:
            tolerance = 1e-4 * (1 + abs(a[name]))
            assert abs(a[name] - b[name]) < tolerance, (name, a, b)


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(tiny, tmp_path, unlearn):
    flags = ["--steps", "30", "--warmup-steps", "10", "--resolution", "32"]
    whole = unlearn(*flags, out="whole")
    argv = ["--model", str(tiny), *CAT, "--batch-size", "4", "--out", str(tmp_path / "cut")]
    command = [sys.executable, str(common.REPO / "doco.py"), *argv, *flags]
    program = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "cut/checkpoint.safetensors"
    while not checkpoint.exists() and program.poll() is None:
        time.sleep(0.02)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert checkpoint.exists() and not (tmp_path / "cut/delta.safetensors").exists()
    same(whole, unlearn(*flags, "--resume", out="cut"))


def test_braces_in_a_file_of_prompts_stand_for_any_anchor(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("{}, in the style of glass\na photo of a {}\n")
    pairs = doco.prompt_pairs(["Snoopy", "Tom"], ["dog", "cat"], prompts=file)
    assert pairs[:2] == [
        ("dog, in the style of glass", ["Snoopy, in the style of glass"]),
        ("cat, in the style of glass", ["Tom, in the style of glass"]),
    ]
    assert pairs[2:] == [
        ("a photo of a dog", ["a photo of a Snoopy"]),
        ("a photo of a cat", ["a photo of a Tom"]),
    ]


def test_prompts_that_fill_all_dimensions_leave_no_null_space():
    conditions = {p: {"encoder_hidden_states": torch.randn(1, 5, 8)} for p in ("", "cat", "tree")}
    how = ([("cat", ["Grumpy Cat"])], ["tree"], conditions)
    one = SimpleNamespace(rank=0)
    with pytest.raises(
        SystemExit, match="3 prompts fill all dimensions of the embeddings, 8; give"
    ):
        doco.null_space_projector([torch.zeros(4, 8)], *how, SimpleNamespace(null_space=1.0), one)
    off = SimpleNamespace(null_space=None)
    assert doco.null_space_projector([torch.zeros(4, 8)], *how, off, one)() is None


def test_words_of_the_vocabulary_are_whole_and_the_most_frequent():
    """CLIP's numbers follow the frequency; what does not end a word, or is short, is no word."""
    vocabulary = {
        "the</w>": 5,
        "ing": 1,
        "cat</w>": 2,
        "a</w>": 0,
        "<|endoftext|>": 9,
        "dog</w>": 7,
    }
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary)
    assert doco.read_retain_prompts("vocabulary", ["Tom"], tokenizer) == ["cat", "the", "dog"]
    many = {f"{a}{b}{c}</w>": n for n, (a, b, c) in enumerate(product(ascii_lowercase, repeat=3))}
    tokenizer = SimpleNamespace(get_vocab=lambda: many)
    assert (
        doco.read_retain_prompts("vocabulary", ["Tom"], tokenizer) == [w[:3] for w in many][:1024]
    )
    assert doco.read_retain_prompts("vocabulary", ["Dog"], tokenizer)[:1] == ["aaa"]
    assert doco.read_retain_prompts(None, ["Tom"]) == []


def test_retained_prompts_do_not_name_a_target(tmp_path):
    """Whole words alone, in any case; each line once; and none left is a mistake."""
    file = tmp_path / "retained.txt"
    file.write_text("a Panda in the snow\nbear\npandas\nbear\nfox\n")
    assert doco.read_retain_prompts(file, ["panda", "fox"]) == ["bear", "pandas"]
    with pytest.raises(SystemExit, match="--retain-prompts vocabulary: no such file"):
        doco.read_retain_prompts(Path("vocabulary"), ["panda"])  # of a script that reads files only
    with pytest.raises(SystemExit, match="no prompt is left that does not name a target"):
        doco.read_retain_prompts(file, ["panda", "fox", "bear", "pandas"])


def test_a_model_that_takes_all_prompts_for_the_target_is_an_error():
    """Of the network, only what it predicts is looked at: here, the same for all but the anchor."""
    same = {"encoder_hidden_states": torch.zeros(1, 5, 8)}
    conditions = {p: same for p in ("feline", "mouser", "Tom")}
    conditions["cat"] = {"encoder_hidden_states": torch.ones(1, 5, 8)}

    seen = []

    def predict(xt, t, condition):
        seen.append(xt)
        return xt + condition["encoder_hidden_states"].mean()

    backbone = SimpleNamespace(predict=predict, alpha_bar=torch.linspace(0.99, 0.01, 1000))
    how = ([("cat", ["Tom"])], torch.zeros(2, 4, 8, 8), conditions)
    for seed in (0, 1):
        with pytest.raises(SystemExit, match="takes every prompt for the target; expected others"):
            doco.choose_retained(
                backbone, ["feline", "mouser"], *how, seed, SimpleNamespace(rank=0)
            )
    assert len(seen) == 8 and torch.equal(seen[0], seen[3])  # the same noise for all prompts
    assert not torch.equal(seen[0], seen[4])  # and another one for another seed


def test_embeddings_of_prompts_that_are_not_retained_leave_the_memory(tiny, tmp_path, monkeypatch):
    file = tmp_path / "retained.txt"
    file.write_text("\n".join(f"a {word}" for word in ("tree", "house", "dog")))
    seen = {}

    def train(backbone, trained, latents, pairs, retained, conditions, *rest):
        seen.update(retained=retained, prompts=set(conditions), pairs=pairs)

    monkeypatch.setattr(doco, "train", train)
    monkeypatch.setattr(doco, "N_RETAINED", 2)
    monkeypatch.setitem(doco.SMALL_IMAGES, "sampling_steps", 2)
    argv = ["--model", str(tiny), *CAT, "--out", str(tmp_path / "out"), "--steps", "2"]
    argv += ["--batch-size", "2", "--retain", "distill", "--retain-prompts", str(file)]
    doco.unlearn(doco.parse_args(argv))
    used = {p for anchor, targets in seen["pairs"] for p in (anchor, *targets)}
    assert len(seen["retained"]) == 2 and seen["prompts"] == {"", *used, *seen["retained"]}
