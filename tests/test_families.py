"""The three programs on a tiny model of each family: what they leave loads in plain diffusers.

The numbers of a training are checked in test_doco_updates.py, what a family is in
test_backbones.py.
"""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from test_doco import launch

import common
import doco
import eval as evaluation
import instance_unlearn
from baselines import uce

FAMILIES = ("sdxl", "sd3", "flux")
CAT = ["--target", "Grumpy Cat", "--anchor", "Cat"]
SHORT = ["--steps", "3", "--warmup-steps", "1", "--batch-size", "2"]
# FLUX has no native size that a tiny one could differ in: it is told one
SIZE = {"flux": ["--resolution", "16"]}


@pytest.fixture(scope="module")
def folders(tiny, tiny_sdxl, tiny_sd3, tiny_flux):
    return {"sd": tiny, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Anchor images of three sampling steps."""
    for images in (doco.SMALL_IMAGES, doco.PAPER_IMAGES):
        monkeypatch.setitem(images, "sampling_steps", 3)


def unlearn(folders, family, out, *flags):
    """A short run of doco.py; returns its folder."""
    argv = ["--model", folders[family], *CAT, *SHORT, *SIZE.get(family, []), "--out", out, *flags]
    return doco.unlearn(doco.parse_args(list(map(str, argv))))


def plain(folder, family):
    """The pipeline by diffusers alone."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)


def latents_of(pipe, family):
    """A latent of a pipeline, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16} if family == "flux" else {}
    call = {"num_inference_steps": 2, "output_type": "latent"} | size
    return pipe("Grumpy Cat", generator=torch.Generator().manual_seed(0), **call).images


@pytest.mark.parametrize("family", ["sd", *FAMILIES])
def test_a_lora_loads_in_plain_diffusers_and_so_does_the_pipeline(folders, tmp_path, family):
    flags = ["--train-method", "lora", "--lr", "0.1", "--rank", "4", "--save-pipeline"]
    run = unlearn(folders, family, tmp_path / "run", *flags)
    assert {f.name for f in run.iterdir()} >= {"pytorch_lora_weights.safetensors", "pipeline"}
    assert not (run / "delta.safetensors").exists()
    pipe = plain(folders[family], family)
    before = latents_of(pipe, family)
    pipe.load_lora_weights(run)
    after = latents_of(pipe, family)
    assert not torch.allclose(before, after, atol=1e-2)
    fused = latents_of(plain(run / "pipeline", family), family)
    torch.testing.assert_close(fused, after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_load_in_plain_diffusers(folders, tmp_path, family):
    """Of the text alone, and the exact weights: no other tensor is in the file."""
    run = unlearn(folders, family, tmp_path / "run", "--train-method", "kv", "--lr", "0.1")
    delta = load_file(run / "delta.safetensors")
    part = "attn2.to_" if family == "sdxl" else "attn.add_"
    assert delta and all(part in name for name in delta)
    pipe = plain(folders[family], family)
    before = latents_of(pipe, family)
    net = pipe.unet if family == "sdxl" else pipe.transformer
    result = net.load_state_dict(delta, strict=False)
    assert not result.unexpected_keys
    assert not torch.allclose(before, latents_of(pipe, family), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_distill_with_prompts_runs(folders, tmp_path, family):
    """Prompts to be retained are chosen by the embeddings and predictions of every family."""
    (tmp_path / "others.txt").write_text("one tree\na yellow submarine\n")
    flags = ["--retain", "distill", "--retain-prompts", tmp_path / "others.txt"]
    run = unlearn(folders, family, tmp_path / "run", *flags)
    row = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert row["share_r"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_earlier_lora_is_where_a_run_begins(folders, tmp_path, family):
    """After a warm-up alone the weights are the earlier ones: nothing of them is lost."""
    flags = ["--train-method", "lora", "--rank", "2"]
    first = unlearn(folders, family, tmp_path / "first", *flags)
    warm_up = ["--init", first, "--warmup-steps", "3"]
    second = unlearn(folders, family, tmp_path / "second", *flags, *warm_up)
    a, b = (load_file(run / "pytorch_lora_weights.safetensors") for run in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(SystemExit, match="not trained here; repeat its --model, --train-method"):
        unlearn(folders, family, tmp_path / "third", "--train-method", "kv", "--init", first)


def test_uce_edits_what_takes_the_text_of_xl(folders, tmp_path):
    """With next to no regularization, K and V of the target are the anchor's.

    So is what the pooled embedding adds to the timestep; no other weight changes.
    """
    argv = ["--model", folders["sdxl"], *CAT, "--lamb", "1e-6", "--out", tmp_path / "run"]
    run = uce.unlearn(uce.parse_args(list(map(str, argv))))
    delta, pipe = load_file(run / "delta.safetensors"), plain(folders["sdxl"], "sdxl")
    rows, pooled = {}, {}
    for prompt in ("Grumpy Cat", "Cat"):
        embeddings, _, all_pooled, _ = pipe.encode_prompt(prompt, None, "cpu", 1, False)
        length = len(pipe.tokenizer(prompt).input_ids)
        rows[prompt] = embeddings[0, length - 2].detach()  # of the last word, "cat"
        pooled[prompt] = all_pooled[0].detach()
    layers = {name.split(".")[-2] for name in delta}
    assert layers == {"to_k", "to_v", "linear_1"}
    for name, weight in delta.items():
        vectors = pooled if "linear_1" in name else rows
        n = len(vectors["Cat"])
        original, weight = pipe.unet.get_parameter(name)[:, :n], weight[:, :n]
        before = (original @ (vectors["Grumpy Cat"] - vectors["Cat"])).norm()
        after = (weight @ vectors["Grumpy Cat"] - original @ vectors["Cat"]).norm()
        assert after < 0.2 * before, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_evaluated(folders, tmp_path, family):
    run = unlearn(folders, family, tmp_path / "run", "--lr", "0.1")
    argv = ["concept", "--before", folders[family], "--after", run, *CAT, *SIZE.get(family, [])]
    argv += ["--clip", common.REPO / "emoji/clip", "--num-images", "2"]
    evaluation.evaluate(evaluation.parse_args(list(map(str, argv))))
    report = json.loads((run / "report.json").read_text())
    assert report["prompt_types"]["target"]["after"]["FID"] > 0
    expected = {"sdxl": 5.0, "sd3": 4.0, "flux": 3.5}[family]
    assert report["guidance"] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_unlearned(folders, photos, tmp_path, family):
    """instance_unlearn.py: a LoRA; the surrogate and the images to remember are the model's."""
    argv = ["--model", folders[family], "--forget", photos / "a.png", "--prompt", "a cat"]
    argv += ["--steps", "2", "--batch-size", "2", "--num-remember", "4", *SIZE.get(family, [])]
    args = instance_unlearn.parse_args(list(map(str, [*argv, "--out", tmp_path / "run"])))
    run = instance_unlearn.unlearn(args)
    lora = load_file(run / "pytorch_lora_weights.safetensors")
    name = "unet." if family == "sdxl" else "transformer."
    assert all(key.startswith(name) for key in lora)
    assert (run / "surrogate-0.png").exists()


BAD = [
    ("sd3", ["--disc-input", "xprev"], "flow matching has no posterior"),
    ("flux", ["--null-space", "0.9"], "the keys and values of a transformer see more"),
    ("sdxl", ["--null-space", "0.9", "--train-method", "lora"], "--null-space goes with"),
    ("sd3", ["--train-method", "kv", "--rank", "4"], "--rank 4 goes with --train-method lora"),
    ("sd3", ["--rank", "0"], "--rank 0: expected at least 1"),
    ("sd", ["--shard"], "--shard: one process; expected several"),
    ("flux", ["--resolution", "18"], "--resolution 18 is no multiple of 4"),
    ("sd3", ["--resolution", "8"], "--resolution 8: expected at least 16"),
]


@pytest.mark.parametrize(("family", "flags", "message"), BAD)
def test_bad_input_is_one_line(folders, tmp_path, family, flags, message):
    with pytest.raises(SystemExit) as caught:
        unlearn(folders, family, tmp_path / "run", *flags)
    text = str(caught.value)
    assert message in text and "\n" not in text


def test_a_ddpm_has_no_concepts(tiny_ddpm, tmp_path):
    argv = ["concept", "--before", tiny_ddpm, "--after", tiny_ddpm, *CAT]
    with pytest.raises(SystemExit, match="is a DDPM, which takes no prompt"):
        evaluation.evaluate(evaluation.parse_args(list(map(str, argv))))
    with pytest.raises(SystemExit, match="is a DDPMPipeline; expected one of StableDiffusion"):
        unlearn({"ddpm": tiny_ddpm}, "ddpm", tmp_path / "run")


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("retain", ["cp", "none"])
def test_micro_batches_are_the_step_of_the_whole_batch(folders, tmp_path, family, retain):
    """Losses of the log, and weights after a step of AdamW, of which a millionth may differ."""
    argv = ["--batch-size", "4", "--steps", "2", "--retain", retain, "--lr", "1e-3"]
    whole = unlearn(folders, family, tmp_path / "whole", *argv)
    parts = unlearn(
        folders, family, tmp_path / "parts", *argv, "--gradient-accumulation-steps", "2"
    )
    file = doco.RESULTS[family == "sd3"]
    a, b = load_file(whole / file), load_file(parts / file)
    # A gradient that is rounding alone, as A's of a LoRA with B = 0, moves by its sign
    n_far = sum((~torch.isclose(a[n], b[n], rtol=0, atol=1e-6)).sum().item() for n in a)
    assert n_far <= 0.01 * sum(x.numel() for x in a.values())
    rows = [json.loads((run / "log.jsonl").read_text().splitlines()[-1]) for run in (whole, parts)]
    for name, value in rows[0].items():
        assert value == pytest.approx(rows[1][name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("family", ["sd", *FAMILIES])
def test_frozen_weights_in_half_precision(folders, tmp_path, monkeypatch, family):
    """What is trained stays in fp32: after a warm-up alone it is what the folder holds."""
    nets, train = [], doco.train
    monkeypatch.setattr(doco, "train", lambda b, *more: (nets.append(b.net), train(b, *more)))
    flags = ["--train-method", "kv", "--mixed-precision", "bf16"]
    run = unlearn(folders, family, tmp_path / "warm-up", *flags, "--warmup-steps", "3")
    for p in nets[0].parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    original = getattr(plain(folders[family], family), "unet", None)
    original = original or plain(folders[family], family).transformer
    delta, weights = load_file(run / "delta.safetensors"), original.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in delta.items())
    exact = unlearn(folders, family, tmp_path / "exact", *flags[:2], "--lr", "1e-3")
    mixed = unlearn(folders, family, tmp_path / "mixed", *flags, "--lr", "1e-3")
    rows = [json.loads((r / "log.jsonl").read_text().splitlines()[-1]) for r in (exact, mixed)]
    for name in ("loss_d", "loss_u", "loss_r"):
        assert rows[0][name] != rows[1][name]
        assert rows[0][name] == pytest.approx(rows[1][name], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_equal_one(folders, tmp_path, family):
    argv = ["--model", folders[family], *CAT, *SIZE.get(family, []), "--batch-size", "4"]
    argv += ["--steps", "12", "--warmup-steps", "2", "--lr", "1e-3"]
    argv = list(map(str, argv))
    # Both under torchrun, where images have the full number of sampling steps
    for processes, more in ((1, []), (2, ["--gradient-accumulation-steps", "2"])):
        out = tmp_path / ("one", "two")[processes - 1]
        result = launch(processes, tmp_path, *argv, *more, "--out", str(out))
        assert result.returncode == 0, result.stderr
    file = doco.RESULTS[family != "sdxl"]
    a, b = (load_file(tmp_path / name / file) for name in ("one", "two"))
    assert a.keys() == b.keys()
    for name in a:
        # Sampling differs in the last digits, and Adam's first steps do not see their size
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_sharded_run_equals_the_whole_one(folders, tmp_path):
    """Two processes with half of the weights each leave what two with all of them leave."""
    argv = ["--model", folders["sd"], *CAT, "--batch-size", "4", "--gradient-checkpointing"]
    argv += ["--train-method", "full", "--retain", "distill", "--steps", "12", "--lr", "1e-3"]
    check_shards(tmp_path, map(str, argv), "delta.safetensors")


@pytest.mark.slow
def test_a_sharded_run_on_an_image_equals_the_whole_one(folders, photos, tmp_path):
    argv = ["--model", folders["sd3"], "--forget", photos / "a.png", "--prompt", "a cat"]
    argv += ["--steps", "5", "--batch-size", "2", "--num-remember", "4"]
    check_shards(tmp_path, map(str, argv), "pytorch_lora_weights.safetensors", "instance_unlearn")


def check_shards(folder, argv, file, program="doco"):
    """Compares the weights and the logs of a program with --shard and without, on two processes."""
    argv = list(argv)
    for name, more in (("whole", []), ("sharded", ["--shard"])):
        result = launch(2, folder, *argv, *more, "--out", str(folder / name), program=program)
        assert result.returncode == 0, result.stderr
    a, b = (load_file(folder / name / file) for name in ("whole", "sharded"))
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    # A gradient that is rounding alone moves by its sign, in Adam
    n_far = sum((~torch.isclose(a[n], b[n], rtol=0, atol=1e-5)).sum().item() for n in a)
    assert n_far <= 0.01 * sum(x.numel() for x in a.values())
    logs = [(folder / name / "log.jsonl").read_text().splitlines() for name in ("whole", "sharded")]
    for row_a, row_b in zip(*logs, strict=True):
        assert json.loads(row_a) == pytest.approx(json.loads(row_b), rel=1e-3, abs=1e-5)
