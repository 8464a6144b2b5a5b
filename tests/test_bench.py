"""experiments/bench.py: real sizes as published, a step costs its passes, the table comes out."""

import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch.nn.modules.module import register_module_forward_hook

from common import REPO
from experiments import bench

CPU = torch.device("cpu")


def run_bench(*flags):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "experiments.bench", *map(str, flags)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True)


@pytest.mark.slow
def test_sizes_are_the_published_ones():
    """The numbers of weights, on the meta device: shapes without memory."""
    # A scheduler of XL and T5 of FLUX compute tables when they are made: not on the meta device
    archs = set(bench.ARCHS) - {"sdxl", "flux-dev-reduced"}
    with torch.device("meta"):
        models = {arch: bench.assemble(arch) for arch in archs}
    sd, sd3, ddpm = (models[name] for name in ("sd-v1-4", "sd3-medium", "ddpm-celebahq-256"))
    assert bench.count(sd.unet.parameters()) == 859_520_964
    assert bench.count(sd.vae.parameters()) == 83_653_863
    assert bench.count(sd.text_encoder.parameters()) == 123_060_480
    assert bench.count(ddpm.unet.parameters()) == 113_673_219
    assert 2.02e9 < bench.count(sd3.transformer.parameters()) < 2.04e9
    assert 2.2e9 < bench.count(models["sd3.5-medium"].transformer.parameters()) < 2.6e9
    assert sd.safety_checker is not None and sd.feature_extractor is not None


def count_passes(step):
    """The batch sizes of the network's forward passes during step()."""
    batches = []

    def note(module, inputs, output):
        """A forward hook of all modules."""
        if isinstance(module, (UNet2DConditionModel, UNet2DModel)):
            batches.append(len(inputs[0]))

    hook = register_module_forward_hook(note)
    try:
        step()
    finally:
        hook.remove()
    return batches


@pytest.mark.parametrize(("what", "passes"), [("doco", 3), ("instance", 2)])
def test_a_step_runs_the_network_as_often_as_it_must(what, passes, tiny, tiny_ddpm):
    """Ours has the bare passes; the naive baseline one of twice the batch, and the original's."""
    model = tiny if what == "doco" else tiny_ddpm
    args = bench.parse_args([what, "--model", str(model), "--batch-size", "2"])
    loaded = bench.load(args, CPU)
    for way in ("ours", "passes"):
        step = bench.make_step(way, loaded, None)
        assert count_passes(step) == [2] * passes, way
    step = bench.make_step("distill", loaded, None)  # M_init's second pass is one with its first
    assert count_passes(step) == ([4, 2, 2] if what == "doco" else [2, 2, 2])
    step = bench.make_step("naive", loaded, loaded.backbone)
    assert count_passes(step) == ([4, 2] if what == "doco" else [4])


@pytest.mark.parametrize("what", ["doco", "instance"])
def test_the_ways_change_no_weight(what, tiny, tiny_ddpm):
    """They share one model; each leaves it, original weights included, as it was."""
    model = tiny if what == "doco" else tiny_ddpm
    args = bench.parse_args([what, "--model", str(model), "--batch-size", "2"])
    loaded = bench.load(args, CPU)
    before = [p.detach().clone() for p in loaded.params]
    for way in bench.WAYS:
        bench.make_step(way, loaded, loaded.backbone)()
        assert all(p.equal(q) for p, q in zip(loaded.params, before, strict=True)), way


def test_surgery_per_tensor_by_hand():
    """Of a conflict, the component along the retain gradient goes: (1, -1) and (0, 2) -> (1, 0)."""
    g_f, g_r = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0])
    assert bench.surgery_per_tensor(g_f, g_r, add_retain=False).tolist() == [1, 0]
    assert bench.surgery_per_tensor(g_f, g_r, add_retain=True).tolist() == [1, 2]
    assert bench.surgery_per_tensor(-g_f, g_r, add_retain=False).tolist() == [-1, 1]


def test_ways_take_turns():
    """In their order, as often as asked for."""
    calls = []
    steps = {way: lambda way=way: calls.append(way) for way in "ab"}
    seconds = bench.interleave(steps, 3, CPU)
    assert calls == ["a", "b"] * 3
    assert all(len(times) == 3 and min(times) >= 0 for times in seconds.values())


def test_the_flags_of_the_training_reach_the_network(tiny_sdxl):
    """What is trained, in which precision the rest is held, and whether activations are kept."""
    flags = ["doco", "--model", str(tiny_sdxl), "--batch-size", "1"]
    plain = bench.load(bench.parse_args(flags), CPU)
    more = ["--train-method", "kv", "--mixed-precision", "bf16", "--gradient-checkpointing"]
    other = bench.load(bench.parse_args([*flags, *more]), CPU)
    assert 0 < len(other.params) < len(plain.params)  # without add_embedding
    assert {p.dtype for p in other.params} == {torch.float32}
    assert {p.dtype for p in plain.backbone.net.parameters()} == {torch.float32}
    assert {p.dtype for p in other.backbone.net.parameters()} == {torch.float32, torch.bfloat16}
    nets = [loaded.backbone.net for loaded in (plain, other)]
    assert [net.is_gradient_checkpointing for net in nets] == [False, True]
    for way in bench.WAYS:
        bench.make_step(way, other, other.backbone)()


def test_what_was_freed_before_is_no_memory_of_a_step(tiny):
    """Such as the model that --arch has built: the peak of the process was higher then."""
    flags = ["doco", "--model", str(tiny), "--batch-size", "1", "--steps", "2"]
    args = bench.parse_args([*flags, "--only", "passes"])
    freed = torch.ones(2 * 10**8)  # 800 MB
    del freed
    assert 0 < bench.measure_memory(args, CPU) < 4 * 10**8


def test_lora_of_stable_diffusion_3(tiny_sd3):
    """Flow matching and two conditions: a step of ours runs there too."""
    args = bench.parse_args(["instance", "--model", str(tiny_sd3), "--batch-size", "2"])
    loaded = bench.load(args, CPU)
    assert loaded.condition.keys() == {"encoder_hidden_states", "pooled_projections"}
    bench.make_step("ours", loaded, None)()


def test_flat_folder(tiny_ddpm, tmp_path):
    """An old DDPM has its files beside model_index.json; --resolution must fit the network."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(tiny_ddpm / "unet" / name, tmp_path)
    shutil.copy(tiny_ddpm / "scheduler/scheduler_config.json", tmp_path)
    shutil.copy(tiny_ddpm / "model_index.json", tmp_path)
    flags = ["instance", "--model", str(tmp_path)]
    assert bench.load(bench.parse_args(flags), CPU).shape == (3, 16, 16)
    args = bench.parse_args([*flags, "--resolution", "32"])
    assert bench.load(args, CPU).shape == (3, 32, 32)


def test_bad_numbers_are_one_line():
    """Before a model is loaded."""
    with pytest.raises(SystemExit, match="expected at least 2 and 1"):
        bench.main(bench.parse_args(["doco", "--steps", "1"]))
    with pytest.raises(SystemExit, match="build needs --arch and --out"):
        bench.main(bench.parse_args(["build", "--arch", "sd-v1-4"]))
    with pytest.raises(SystemExit, match="surgery needs --out"):
        bench.main(bench.parse_args(["surgery"]))


def test_surgery_by_length(tmp_path, monkeypatch, capsys):
    """A row per length, to 1e9, and a figure."""
    monkeypatch.setattr(bench, "seconds_of_surgery", lambda surgery, n, device: 1e-9 * n)
    bench.main(bench.parse_args(["surgery", "--out", str(tmp_path / "surgery.png")]))
    assert "| 1,000,000,000 | 1000.00 | 1000.00 |" in capsys.readouterr().out
    assert (tmp_path / "surgery.png").stat().st_size > 1000


@pytest.mark.slow
def test_table(tiny, monkeypatch, capsys):
    """A row per way, with a time and a memory, of which a process of its own has the peak."""
    monkeypatch.setattr(bench, "WAYS", ("ours", "naive"))
    flags = ["doco", "--model", str(tiny), "--batch-size", "2", "--steps", "3"]
    bench.main(bench.parse_args(flags))
    text, rows = capsys.readouterr().out, {}
    for line in text.splitlines():
        if line.startswith("| "):
            _, name, *cells, _ = line.split("|")
            rows[name.strip()] = cells
    assert rows.keys() == {"way", *bench.WAYS}
    assert "gradient surgery alone" in text
    for way in bench.WAYS:
        assert float(rows[way][0]) > 0 and float(rows[way][2]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["no/such-folder", "tests"])
def test_missing_model_is_one_line(model):
    """The flag and the path, no traceback."""
    done = run_bench("doco", "--model", model)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"bench.py: error: --model {model}")
    assert "Traceback" not in done.stderr
