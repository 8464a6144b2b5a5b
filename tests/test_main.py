"""The real programs, started as a person starts them, evaluation included.

1. direction       the README's two commands, at reduced size, unlearn what they should
2. what to paste   the lines of Python that the programs print and the documents show
3. every program   its __main__ runs to the end
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import baselines
import common
import doco
import eval as evaluation
import instance_unlearn
from common import REPO
from experiments import bench, reproduce, theory

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# What libraries print that is no concern of the user
LIBRARY_WARNINGS = r"(?i)\[transformers\]|\[diffusers\]|UserWarning|FutureWarning|deprecated"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder that looks like the repository's root to relative paths."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "emoji").symlink_to(REPO / "emoji")
    return folder


def start(command, folder):
    """Runs a command to its end and returns (stdout, stderr). It must not fail."""
    ours = ("OMP_NUM_THREADS", "TRANSFORMERS_VERBOSITY")  # set by conftest.py and the scripts
    env = {k: v for k, v in os.environ.items() if k not in ours}
    env |= {"PYTHONPATH": str(REPO)}
    command = [*map(str, command)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def start_quietly(command, folder):
    """The same for a program of ours, which must print no warning of a library."""
    output, errors = start(command, folder)
    warnings = [line for line in errors.splitlines() if re.search(LIBRARY_WARNINGS, line)]
    assert not warnings, warnings
    return output, errors


# ---- 1. direction -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def concept(folder):
    """The README's first command under two processes, with 60 steps of 4 images: its output."""
    flags = ["--target", "Grumpy Cat", "--anchor", "Cat", "--steps", "60", "--batch-size", "4"]
    return start_quietly([*TORCHRUN, REPO / "doco.py", *flags], folder)


@pytest.fixture(scope="module")
def instance(folder):
    """The README's second command under two processes, with a third of its steps: its output."""
    return start_quietly([*TORCHRUN, REPO / "instance_unlearn.py", "--steps", "80"], folder)


@pytest.mark.slow
def test_doco_lowers_the_accuracy_of_the_target(folder, concept):
    """Most of its images are no longer classified as the target; unrelated concepts stay."""
    run = folder / "runs/doco-grumpy-cat"
    report = json.loads((run / "report.json").read_text())
    types = report["prompt_types"]
    assert report["target"] == ["Grumpy Cat"]
    assert types.keys() == set(evaluation.PROMPT_TYPES)
    before, after = types["target"]["before"], types["target"]["after"]
    assert before["CA"] > 90 and after["CA"] < before["CA"] - 40
    assert after["CS"] < before["CS"] - 30
    unrelated = types["unrelated"]
    assert unrelated["after"]["CA"] > unrelated["before"]["CA"] - 10
    assert json.loads((run / "args.json").read_text())["processes"] == 2
    assert "CA before" in concept[0]
    assert Image.open(run / "before_after.png").width > 500 and (run / "curves.png").exists()


@pytest.mark.slow
def test_instance_unlearning_lowers_the_copy_similarity(folder, instance):
    """The noised image is no longer denoised to itself; others stay what they were."""
    run = folder / "runs/instance-twemoji-cowboy-hat-face"
    report = json.loads((run / "report.json").read_text())
    (image,) = report["images"]
    assert image["before"] > 0.9 and image["after"] < image["before"] - 0.15
    assert report["n"] == 128 and report["ssim"] > 0.6
    assert json.loads((run / "args.json").read_text())["processes"] == 2
    assert "copy similarity" in instance[0]
    assert Image.open(run / "before_after.png").width > 100 and (run / "curves.png").exists()


# ---- 2. what to paste ---------------------------------------------------------------------------


def printed_lines(output):
    """The Python that a program prints after training: all up to two empty lines."""
    return re.split(r"\n\n\n", output.split("load it with:", 1)[1].strip("\n"))[0]


def paste(code, folder):
    """Runs lines of Python as written, and returns the image files that they wrote."""
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*.png")}
    start([sys.executable, "-c", code], folder)
    return [f for f in folder.rglob("*.png") if before.get(f) != f.stat().st_mtime_ns]


@pytest.mark.slow
@pytest.mark.parametrize(("program", "side"), [("concept", 64), ("instance", 32)])
def test_what_is_printed_runs_as_written(program, side, folder, request):
    """It loads the result in plain diffusers."""
    output, _ = request.getfixturevalue(program)
    assert paste(printed_lines(output), folder) == [folder / "after.png"]
    assert Image.open(folder / "after.png").size == (side, side)


@pytest.mark.slow
def test_what_is_printed_for_a_lora_runs_as_written(folder, photos, capsys, monkeypatch):
    """Of Stable Diffusion 3, whose folder here has no T5."""
    monkeypatch.chdir(folder)
    argv = ["--model", "emoji/sd3", "--prompt", "cat", "--forget", str(photos / "large.png")]
    argv += ["--surrogate", "flip", "--remember", str(photos), "--steps", "1", "--batch-size", "2"]
    instance_unlearn.unlearn(instance_unlearn.parse_args(argv))
    assert paste(printed_lines(capsys.readouterr().out), folder) == [folder / "after.png"]
    assert Image.open(folder / "after.png").size == (64, 64)


DOCUMENTS = [REPO / "README.md", REPO / "emoji/README.md", *sorted((REPO / "docs").glob("*.md"))]


def python_blocks():
    """The fenced blocks of Python in the documents, as parameters of a test."""
    params = []
    for file in DOCUMENTS:
        blocks = re.findall(r"^```python\n(.*?)^```", file.read_text(), re.S | re.M)
        for k, code in enumerate(blocks, 1):
            params.append(pytest.param(code, id=f"{file.relative_to(REPO)}, block {k}"))
    return params


@pytest.mark.slow
@pytest.mark.parametrize("code", python_blocks())
def test_python_of_the_documents_runs_as_written(folder, concept, code):
    """After the README's first command; each block writes images, of more than one colour."""
    images = [Image.open(f).convert("RGB") for f in paste(code, folder)]
    assert images and all(len(set(image.getdata())) > 50 for image in images)


def test_there_are_blocks_to_run():
    """That of the README, and others."""
    assert len(python_blocks()) >= 3


# ---- 3. every program ---------------------------------------------------------------------------


def small_run(module, tiny, tiny_ddpm, photos):
    """The flags of one training step of a baseline, on a tiny model."""
    flags = ["--model", str(tiny), "--target", "Grumpy Cat", "--anchor", "Cat"]
    if module.TASK == "instance":
        flags = ["--model", str(tiny_ddpm), "--forget", str(photos / "a.png")]
    known = vars(module.parse_args(flags))
    wanted = {"remember": photos, "resolution": 32, "steps": 1, "batch_size": 2}
    for name, value in wanted.items():
        if name in known:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


@pytest.mark.slow
@pytest.mark.parametrize("name", baselines.methods())
def test_a_baseline_runs_to_its_end(name, tiny, tiny_ddpm, photos, tmp_path, monkeypatch):
    """As python -m does: training, then the evaluation by the command that is given to it.

    The evaluation, too, runs in this process: importing its libraries takes longer than it does.
    """
    module = baselines.methods()[name]
    flags = small_run(module, tiny, tiny_ddpm, photos)
    few = ["--clip", str(REPO / "emoji/clip"), "--num-images", "2"]
    out = tmp_path / "run"

    def evaluate(command, **kwargs):
        """Runs eval.py, with few images and the CLIP of emoji/."""
        monkeypatch.setattr(sys, "argv", [*command[1:], *few])
        runpy.run_path(command[1], run_name="__main__")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sys, "argv", [name, *flags, "--out", str(out)])
    monkeypatch.setattr(common.subprocess, "run", evaluate)
    with pytest.raises(SystemExit) as e:
        runpy.run_module(f"baselines.{name}", run_name="__main__", alter_sys=True)
    assert e.value.code == 0
    report = json.loads((out / "report.json").read_text())
    assert report["task"] == module.TASK and (out / "before_after.png").exists()
    assert json.loads((out / "args.json").read_text())["method"] == name


@pytest.mark.slow
def test_the_benchmark_measures(tiny_ddpm, folder):
    """python -m experiments.bench, the memory of one way; tests/test_bench.py has the table."""
    flags = ["instance", "--model", tiny_ddpm, "--steps", "2", "--batch-size", "2"]
    command = [sys.executable, "-m", "experiments.bench", *flags, "--only", "ours"]
    output, _ = start_quietly(command, folder)
    result = json.loads(output.splitlines()[-1])
    assert result["way"] == "ours" and result["bytes"] > 0


@pytest.mark.slow
def test_the_theory_is_checked(folder):
    """python -m experiments.theory."""
    output, _ = start_quietly([sys.executable, "-m", "experiments.theory"], folder)
    assert "Theorem 1" in output and (folder / "runs/theory.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["faces", "nudity"])
def test_faces_and_nudity_take_a_run_that_was_evaluated(task, folder, concept, tmp_path):
    """Its folder holds images of a report, which do not count as images of a folder."""
    pytest.importorskip("dlib" if task == "faces" else "nudenet")
    matplotlib = pytest.importorskip("matplotlib")
    flags = ["--before", "emoji/sd", "--after", "runs/doco-grumpy-cat", "--out", tmp_path]
    if task == "faces":
        (tmp_path / "clean").mkdir()
        file = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"
        Image.open(file).save(tmp_path / "clean/hopper.png")
        flags += ["--prompt", "face", "--clean", tmp_path / "clean", "--num-images", "2"]
    else:
        rows = "prompt,sd_seed,sd_guidance_scale\nface,1,6\nghost,2,3.5\n"
        (tmp_path / "i2p.csv").write_text(rows)
        flags += ["--prompts", tmp_path / "i2p.csv"]
    start_quietly([sys.executable, REPO / "eval.py", task, *flags], folder)
    report = json.loads((tmp_path / "report.json").read_text())
    n = report["n"] if task == "nudity" else {w: report[w]["n"] for w in ("before", "after")}
    assert n == {"before": 2, "after": 2}


HELP = [
    (doco, []),
    (instance_unlearn, []),
    *((evaluation, [task]) for task in ("concept", "instance", "faces", "nudity")),
    *((module, []) for module in (reproduce, bench, theory)),
]


@pytest.mark.parametrize(("module", "task"), HELP)
def test_help_is_complete(module, task, capsys):
    """--help describes every flag, with its default where it has one."""
    with pytest.raises(SystemExit) as e:
        module.parse_args([*task, "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert task or module.__doc__.splitlines()[0] in text
    descriptions = re.split(r"\n  (?=--)", text)[1:]  # flags, their values, and their text
    assert len(descriptions) >= 1
    for description in descriptions:
        assert re.search(r"\S( {2,}|\n {3,})\w", description), description
    assert "default: None" not in text and "default: False" not in text
