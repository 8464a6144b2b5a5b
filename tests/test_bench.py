"""bench.py: the real sizes are the published ones, a step costs the passes that it says, and the table comes out."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import bench
import doco
import instance_unlearn


def test_sizes_are_the_published_ones():
    with torch.device("meta"):  # shapes without memory
        sd, sd3, ddpm = (bench.assemble(arch) for arch in bench.ARCHS)
    assert bench.count(sd.unet.parameters()) == 859_520_964
    assert bench.count(sd.vae.parameters()) == 83_653_863
    assert bench.count(sd.text_encoder.parameters()) == 123_060_480
    assert bench.count(ddpm.unet.parameters()) == 113_673_219
    assert 2.02e9 < bench.count(sd3.transformer.parameters()) < 2.04e9
    assert sd.safety_checker is not None and sd.feature_extractor is not None


@pytest.mark.parametrize(("what", "passes"), (("doco", 3), ("instance", 2)))
def test_a_step_runs_the_network_as_often_as_it_must(what, passes, tiny, tiny_ddpm, monkeypatch):
    script = doco if what == "doco" else instance_unlearn
    monkeypatch.setattr(script, "tqdm", script.tqdm)  # run_script replaces these
    monkeypatch.setattr(doco, "sample_anchor_latents", doco.sample_anchor_latents)
    monkeypatch.setattr(instance_unlearn, "draw_pool", instance_unlearn.draw_pool)
    flags = [what, "--batch-size", "2", "--steps", "3"]
    args = bench.parse_args([*flags, "--model", str(tiny if what == "doco" else tiny_ddpm)])
    calls, marks, device = [], [], torch.device("cpu")
    kinds = (bench.UNet2DConditionModel, bench.UNet2DModel)
    hook = register_module_forward_hook(lambda module, x, y: calls.append(len(x[0])) if isinstance(module, kinds) else None)
    try:
        bench.run_script(args, lambda i: marks.append(len(calls)), lambda seconds: marks.append(len(calls)), device)
        step = bench.bare_passes(args, device, bench.network(args, device))
        marks += [len(calls)]
        step()
    finally:
        hook.remove()
    assert [b - a for a, b in zip(marks[:6:2], marks[1:6:2], strict=True)] == [passes] * 3
    assert len(calls) - marks[-1] == passes and set(calls[-passes:]) == {2}


def test_table(tiny):
    command = [sys.executable, "bench.py", "doco", "--model", str(tiny), "--batch-size", "2", "--steps", "3"]
    text = subprocess.run(command, cwd=bench.HERE, capture_output=True, text=True, check=True).stdout
    rows = {line.split("|")[1].strip(): line.split("|")[2:6] for line in text.splitlines() if line.startswith("| ")}
    assert rows.keys() == {"way", *bench.WAYS} and "surgery alone" in text
    assert all(float(rows[way][0]) > 0 and float(rows[way][2]) > 0 for way in bench.WAYS)


def test_flat_folder_and_hub_id(tiny_ddpm, tmp_path, monkeypatch):
    """The size of a model is read as diffusers reads it: from a hub id, a folder, or an old folder without subfolders."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(tiny_ddpm / "unet" / name, tmp_path)
    shutil.copy(tiny_ddpm / "scheduler/scheduler_config.json", tmp_path)
    shutil.copy(tiny_ddpm / "model_index.json", tmp_path)
    assert bench.pixels_of(str(tiny_ddpm)) == bench.pixels_of(str(tmp_path)) == 16
    assert bench.pixels_of(str(doco.REPO / "emoji/sd")) == 64
    args = bench.parse_args(["instance", "--model", str(tmp_path), "--batch-size", "2", "--steps", "2"])
    monkeypatch.setattr(instance_unlearn, "tqdm", instance_unlearn.tqdm)
    for script, name in ((doco, "sample_anchor_latents"), (instance_unlearn, "draw_pool")):
        monkeypatch.setattr(script, name, getattr(script, name))  # put back afterwards
    times = []
    bench.run_script(args, lambda i: None, times.append, torch.device("cpu"))
    assert len(times) == 2


@pytest.mark.parametrize("model", ["no/such-folder", "tests"])
def test_missing_model_is_one_line(model):
    command = [sys.executable, "bench.py", "doco", "--model", model]
    done = subprocess.run(command, cwd=bench.HERE, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"bench.py: error: --model {model}") and "Traceback" not in done.stderr
