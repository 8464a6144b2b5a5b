"""Short runs of every script give the weights that they gave before, bitwise: golden.json.

A change of the code that is meant to change no figure keeps these hashes; then no table has to be
run again. The slow tests run a few of the cases, this line all of them:

    python -m pytest -n 2 -m golden tests/test_golden.py

A change that is meant to change figures records them anew, in a commit of its own:

    python -m tests.test_golden esd spm > golden.new      # these cases; without names, all of them
    mv golden.new tests/golden.json

Bits depend on the processor. On another one than golden.json names, the length of the change of the
weights is compared instead.
"""

import contextlib
import hashlib
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common import REPO

GOLDEN = REPO / "tests/golden.json"
RESULTS = {  # file of a run -> the weights that training began with
    "delta.safetensors": "emoji/sd/unet",
    "pytorch_lora_weights.safetensors": None,
    "pipeline/unet/diffusion_pytorch_model.safetensors": "emoji/ddpm/unet",
}
CAT = "--target Grumpy_Cat --anchor Cat --batch-size 2"
COWBOY = "emoji/creatures/twemoji-cowboy-hat-face.png"
NERD = "emoji/creatures/noto-nerd-face.png"

# name: (module, flags). PIZZA is a 64x64 image of twemoji's pizza; an underscore is a space.
CASES = {
    "doco": ("doco", f"{CAT} --steps 12 --warmup-steps 4"),
    "doco-style": (
        "doco",
        "--target twemoji --anchor emoji --concept-type style --disc-input xprev --stride 20 "
        "--retain l2 --train-method xattn --steps 10 --warmup-steps 2 --batch-size 2",
    ),
    "doco-step": (
        "doco",
        "--target Grumpy_Cat pizza --anchor Cat food --project step --lam 0.5 --train-method full "
        "--steps 10 --warmup-steps 2 --lr 1e-4 --disc-lr 3e-4 --batch-size 2",
    ),
    "doco-none": (
        "doco",
        f"{CAT} --retain none --disc-input xprev --steps 10 --warmup-steps 1 --seed 3",
    ),
    "doco-distill": (
        "doco",
        f"{CAT} --retain distill --retain-weight 0.5 --retain-prompts vocabulary --steps 8 "
        "--warmup-steps 2",
    ),
    "doco-null-space": (
        "doco",
        f"{CAT} --null-space 0.9 --retain-prompts experiments/retain-prompts.txt --steps 6",
    ),
    "instance": ("instance_unlearn", "--steps 10"),
    "instance-distill": (
        "instance_unlearn",
        "--remember-loss distill --remember noise --num-remember 20 --steps 6 --batch-size 4",
    ),
    "instance-two": (
        "instance_unlearn",
        f"--forget {COWBOY} {NERD} --surrogate flip noise --noise-sigma 50 --constant-lambda 0.97 "
        "--surgery both --timestep-sampling uniform --lr-scheduler constant --remember generated "
        "--num-remember 20 --steps 6 --batch-size 4 --seed 2",
    ),
    "instance-random": (
        "instance_unlearn",
        f"--forget {NERD} --surrogate random --surgery none --steps 6 --batch-size 4",
    ),
    "instance-sd": (
        "instance_unlearn",
        "--model emoji/sd --forget PIZZA --prompt pizza --surrogate sdedit --strength 0.6 "
        "--surrogate-prompt cat --remember generated --num-remember 16 --steps 6 --batch-size 2",
    ),
    "instance-sd3": (
        "instance_unlearn",
        "--model emoji/sd3 --forget PIZZA --prompt pizza --remember generated --num-remember 16 "
        "--steps 6 --batch-size 2 --rank 4",
    ),
    "conabl": ("baselines.conabl", f"{CAT} --steps 10"),
    "esd": ("baselines.esd", f"{CAT} --steps 10"),
    "forget_me_not": ("baselines.forget_me_not", f"{CAT} --steps 10"),
    "spm": ("baselines.spm", f"{CAT} --steps 6"),
    "speed": ("baselines.speed", "--target Grumpy_Cat --anchor Cat"),
    "uce": ("baselines.uce", "--target Grumpy_Cat --anchor Cat"),
    "duo": ("baselines.duo", f"--forget {COWBOY} --steps 6 --batch-size 4"),
    "erasediff": ("baselines.erasediff", f"--forget {COWBOY} --steps 6 --batch-size 4"),
    "neggrad": ("baselines.neggrad", f"--forget {COWBOY} --steps 6 --batch-size 4"),
    "neggrad-ascent": (
        "baselines.neggrad",
        f"--forget {COWBOY} {NERD} --steps 4 --batch-size 4 --ascent --lr-scheduler linear "
        "--timestep-sampling stratified",
    ),
    "siss": ("baselines.siss", f"--forget {COWBOY} --steps 6 --batch-size 8"),
    "siss-full": ("baselines.siss", f"--forget {COWBOY} --steps 6 --batch-size 4 --full-range"),
}
# What the slow tests run; every training step is also tested by hand, in files of its own
IN_THE_SLOW_TESTS = ("doco", "doco-style", "doco-distill", "instance", "instance-distill")
IN_THE_SLOW_TESTS += ("conabl", "uce", "duo", "siss")
# name: flags of eval.py; the figures of its report, too, are golden
EVALUATIONS = {
    "doco": "concept --before emoji/sd --target Grumpy_Cat --anchor Cat --unrelated dog pizza "
    "--num-images 2",
    "instance": f"instance --before emoji/ddpm --forget {COWBOY} --real emoji/creatures "
    "--num-images 8",
    "instance-sd3": "instance --before emoji/sd3 --forget PIZZA --prompt pizza --num-images 4",
}


def split(flags, pizza):
    """The flags as a list."""
    return [str(pizza) if f == "PIZZA" else f.replace("_", " ") for f in flags.split()]


def write_pizza(path):
    """twemoji's pizza, 64x64, off the sheet of emoji/images."""
    names = [e["name"] for e in json.loads((REPO / "emoji/images/emoji.json").read_text())["emoji"]]
    row, column = divmod(names.index("pizza"), 20)
    box = (64 * column, 64 * row, 64 * column + 64, 64 * row + 64)
    with Image.open(REPO / "emoji/images/twemoji.png") as sheet:
        sheet.convert("RGB").crop(box).save(path)


def run(name, folder):
    """Trains a case in this process; returns its run folder."""
    write_pizza(folder / "pizza.png")
    module, flags = CASES[name]
    script = importlib.import_module(module)
    argv = [*split(flags, folder / "pizza.png"), "--out", str(folder / name)]
    script.unlearn(script.parse_args(argv))
    return folder / name


def result(out):
    """{"sha256", "change"} of a run folder's weights."""
    file, base = next((f, b) for f, b in RESULTS.items() if (out / f).exists())
    sha, squares = hashlib.sha256(), 0.0
    if base:
        original = load_file(REPO / base / "diffusion_pytorch_model.safetensors")
    for name, tensor in sorted(load_file(out / file).items()):
        values = tensor.contiguous().numpy().tobytes()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + values)
        if base:
            squares += (tensor.double() - original[name].double()).square().sum().item()
        elif "lora_B" in name:  # these begin with 0
            squares += tensor.double().square().sum().item()
    return {"sha256": sha.hexdigest(), "change": float(f"{squares**0.5:.6g}")}


def evaluate(name, out, folder):
    """The figures of eval.py for a run folder, as golden.json has them."""
    flags = split(EVALUATIONS[name], folder / "pizza.png")
    command = [sys.executable, "eval.py", *flags, "--after", str(out)]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    report = json.loads((out / "report.json").read_text())
    if report["task"] == "concept":
        types = report["prompt_types"].items()
        return {name: {when: row[when] for when in ("before", "after")} for name, row in types}
    figures = {k: report[k] for k in ("ssim", "distance", "fid_pre", "fid_real")}
    keys = ("before", "after", "between")
    return figures | {"images": [{k: row[k] for k in keys if k in row} for row in report["images"]]}


def cpu():
    """What the bits depend on: maker and instruction set."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = next((line for line in text.splitlines() if line.startswith("model name")), ":unknown")
    return f"{model.split(':')[1].strip()}, {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture
def one_thread():
    """Sums in one order: the number of threads decides it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(name):
    """A case with its markers: without any it would be a fast test."""
    marks = [pytest.mark.golden]
    marks += [pytest.mark.slow] if name in IN_THE_SLOW_TESTS else []
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [case(name) for name in CASES])
def test_weights_are_the_golden_ones(name, tmp_path, one_thread, monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    golden = json.loads(GOLDEN.read_text())
    expected = golden["runs"][name]
    out = run(name, tmp_path)
    new = result(out)
    if cpu() == golden["cpu"]:
        assert new["sha256"] == expected["sha256"]
    assert new["change"] == pytest.approx(expected["change"], rel=0.02)
    if name in EVALUATIONS and cpu() == golden["cpu"]:
        assert evaluate(name, out, tmp_path) == expected["figures"]


def test_every_script_and_baseline_is_golden():
    baselines = {f"baselines.{f.stem}" for f in (REPO / "baselines").glob("[a-z]*.py")}
    assert {module for module, _ in CASES.values()} == baselines | {"doco", "instance_unlearn"}
    assert json.loads(GOLDEN.read_text())["runs"].keys() == CASES.keys()


if __name__ == "__main__":
    torch.set_num_threads(1)
    before = json.loads(GOLDEN.read_text())
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: before["runs"][name] for name in CASES if name in before["runs"]}
        for case in sys.argv[1:] or CASES:
            with contextlib.redirect_stdout(sys.stderr):  # only the file goes to stdout
                runs[case] = result(run(case, Path(folder)))
            if case in EVALUATIONS:
                runs[case]["figures"] = evaluate(case, Path(folder) / case, Path(folder))
    print(json.dumps(before | {"cpu": cpu(), "runs": runs}, indent=1))
