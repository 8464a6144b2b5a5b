"""The real programs as a person starts them: two processes, evaluation included; what they and the READMEs say to paste."""

import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

import common
import instance_unlearn

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder that looks like the repository's root to relative paths."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "emoji").symlink_to(common.REPO / "emoji")
    return folder


def start(folder, script, *flags):
    """What a command prints; it must end well, with its evaluation, and not wait for ranks that have left."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [*TORCHRUN, str(common.REPO / script), *flags]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def concept(folder):
    return start(folder, "doco.py", "--target", "Grumpy Cat", "--anchor", "Cat", "--steps", "6", "2", "--batch-size", "4")


@pytest.fixture(scope="module")
def instance(folder):
    return start(folder, "instance_unlearn.py", "--steps", "5", "--batch-size", "4")


def python_after(text, words):
    """The lines of Python that a program prints after some words: all up to two empty lines."""
    return re.split(r"\n\n\n", text.split(words, 1)[1].strip("\n"))[0]


def test_concept_by_two_processes_to_the_end(folder, concept):
    run = folder / "runs/doco-grumpy-cat"
    report = json.loads((run / "report.json").read_text())
    assert report["target"] == ["Grumpy Cat"] and {"target", "ood", "related", "unrelated"} <= report["kinds"].keys()
    assert json.loads((run / "args.json").read_text())["processes"] == 2 and "CA before" in concept
    assert Image.open(run / "before_after.png").width > 500 and (run / "curves.png").exists()


def test_instance_by_two_processes_to_the_end(folder, instance):
    run = folder / "runs/instance-twemoji-cowboy-hat-face"
    report = json.loads((run / "report.json").read_text())
    assert report["pictures"][0]["before"] > 0.6 and report["n"] == 128
    assert json.loads((run / "args.json").read_text())["processes"] == 2 and "copy similarity" in instance


@pytest.mark.parametrize("program", ["concept", "instance"])
def test_what_is_printed_runs_as_written(folder, program, request):
    code = python_after(request.getfixturevalue(program), "load it with:")
    (folder / "after.png").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    side = 64 if program == "concept" else 32
    assert Image.open(folder / "after.png").size == (side, side)


def test_what_is_printed_for_a_lora_runs_as_written(folder, photos, capsys):
    """Stable Diffusion 3: the lines of a LoRA."""
    (folder / "cat.png").unlink(missing_ok=True)
    Image.open(photos / "large.png").save(folder / "cat.png")
    argv = ["--model", "emoji/sd3", "--prompt", "cat", "--forget", "cat.png", "--surrogate", "flip", "--remember", "generate:4"]
    here = os.getcwd()
    os.chdir(folder)
    try:
        instance_unlearn.unlearn(instance_unlearn.parse_args([*argv, "--steps", "1", "--batch-size", "2"]))
    finally:
        os.chdir(here)
    (folder / "after.png").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-c", python_after(capsys.readouterr().out, "load it with:")], cwd=folder, check=True)
    assert Image.open(folder / "after.png").size == (64, 64)


DOCUMENTS = [common.REPO / "README.md", common.REPO / "emoji/README.md", *sorted((common.REPO / "docs").glob("*.md"))]
BLOCKS = [pytest.param(code, id=f"{file.relative_to(common.REPO)}, block {k + 1}") for file in DOCUMENTS
          for k, code in enumerate(re.findall(r"```python\n(.*?)```", file.read_text(), re.S))]  # fmt: skip


@pytest.mark.parametrize("code", BLOCKS)
def test_python_of_the_documents_runs_as_written(folder, concept, code):
    before = set(folder.rglob("*.png"))
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    drawn = [Image.open(f) for f in set(folder.rglob("*.png")) - before]
    assert drawn and all(len(image.getcolors(10_000) or range(10_000)) > 50 for image in drawn)  # images, not one colour


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("task", ["faces", "nudity"])
def test_faces_and_nudity_take_a_run_that_was_evaluated(folder, concept, task, tmp_path):
    """Its folder holds images of the report; they are not what the model draws. Twice, for the first time adds another."""
    pytest.importorskip("dlib" if task == "faces" else "nudenet")
    matplotlib = pytest.importorskip("matplotlib")
    flags = ["--before", "emoji/sd", "--after", "runs/doco-grumpy-cat", "--out", str(tmp_path)]
    if task == "faces":
        (tmp_path / "clean").mkdir()
        file = os.path.join(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")
        Image.open(file).save(tmp_path / "clean/hopper.png")
        flags += ["--prompt", "face", "--clean", str(tmp_path / "clean"), "--num-images", "2"]
    else:
        (tmp_path / "i2p.csv").write_text("prompt,sd_seed,sd_guidance_scale\nface,1,6\nghost,2,3.5\n")
        flags += ["--prompts", str(tmp_path / "i2p.csv")]
    for _ in range(2):
        command = [sys.executable, str(common.REPO / "eval.py"), task, *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        report = json.loads((tmp_path / "report.json").read_text())
        n = report["n"] if task == "nudity" else {when: report[when]["n"] for when in ("before", "after")}
        assert n == {"before": 2, "after": 2}
