"""reproduce.py: every command parses, a table is made by the real commands and goes on where it stopped, cells are right."""

import inspect
import json
import re
import shlex
import statistics
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import eval as evaluation
import reproduce


def printed(capsys, *flags):
    reproduce.main(reproduce.parse_args([*flags, "--dry-run"]))
    return [line for line in capsys.readouterr().out.splitlines() if line]


@pytest.mark.parametrize("paper", [[], ["--paper"]])
def test_every_command_parses(capsys, paper):
    lines = printed(capsys, "all", *paper)
    assert len(lines) > 2 * 40 * (6 if paper else 3) / 2
    for line in lines:
        _, script, *flags = shlex.split(line)
        (evaluation if script == "eval.py" else reproduce.SCRIPTS[script]).parse_args(flags)
    sizes = ("CompVis/stable-diffusion-v1-4", "google/ddpm-celebahq-256", "--num-images 10000", "imagenet")
    assert all(any(size in line for line in lines) == bool(paper) for size in sizes)


def test_two_rows_never_share_a_folder(capsys):
    """But a row that stands in several tables is run once."""
    folders = {}
    for line in printed(capsys, "all"):
        if "--out" in (words := shlex.split(line)):
            assert folders.setdefault(words[words.index("--out") + 1], line) == line


def test_first_of_the_rates_tried_is_the_default():
    for label, (flag, value, *others) in reproduce.TRIED.items():
        name, *_ = reproduce.RIVALS[label]
        module = reproduce.SCRIPTS[f"baselines/{name}.py"]
        if hasattr(module, "SMALL"):
            assert module.SMALL["lr"] == float(value) and flag == "--lr"
        else:  # the small model's default is said by the help
            source = inspect.getsource(module.parse_args)
            assert float(re.search(rf'"{flag}".*for small models ([0-9.e-]+)', source)[1]) == float(value), label
        assert others and value not in others


@pytest.mark.parametrize("rates", ["doco-rates", "instance-rates"])
def test_rates_are_of_the_small_models_and_one_seed(capsys, rates):
    lines = printed(capsys, rates)
    tries = sum(len(values) - 1 for values in reproduce.TRIED.values()) + 3  # and ESD-u
    if rates == "instance-rates":
        tries = 2 * sum(map(len, reproduce.TRIED_RATES.values()))
    assert len(lines) == 2 * tries and all("--seed 0" in line for line in lines)
    with pytest.raises(SystemExit, match="without --paper"):
        printed(capsys, rates, "--paper")


def test_every_method_has_the_same_number_of_tries_and_both_recipes():
    tries, rows = {}, reproduce.instance_rates(SimpleNamespace(paper=False, runs=None))[0].blocks
    for heading, _, block in rows:
        name, recipe = heading.split(", 240 updates of 8, ")
        tries[name, recipe] = len(block)
        for label, job in block:
            assert all(flag in job.flags for flag in (*reproduce.RECIPES[recipe], label.split()[1])), label
    assert len(set(tries.values())) == 1 and len(tries) == 2 * 5
    assert tries.keys() == reproduce.CHOSEN.keys()
    for (name, recipe), rate in reproduce.CHOSEN.items():
        assert rate in reproduce.TRIED_RATES[name], (name, recipe)


def test_blocks_of_equal_recipes_differ_in_the_method_alone():
    for recipe, flags in reproduce.RECIPES.items():
        rows = reproduce.equal_rows(SimpleNamespace(paper=False, runs=None), "one", recipe)
        assert [label for label, _ in rows][-1] == "ours" and len(rows) == 7
        for _, job in rows:
            args = reproduce.SCRIPTS[job.script].parse_args([str(f) for f in job.flags] + ([] if "--forget" in job.flags else
                                                            ["--forget", "x.png"]))  # fmt: skip
            assert [args.lr_scheduler, args.timestep_sampling] == [flags[1], flags[3]] and args.lr is not None
            assert (args.steps or 240) == 240 and args.batch_size == 8


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--seeds", "-1"], ["--num-images", "1"]])
def test_bad_input_is_one_line(flags):
    with pytest.raises(SystemExit, match="expected at least 1 seed and 2 images"):
        reproduce.main(reproduce.parse_args(["all", *flags, "--dry-run"]))


@pytest.fixture
def small(tmp_path):
    """Runs reproduce.py at reduced size and returns the folder of results."""

    def run(*flags):
        folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
        reproduce.main(reproduce.parse_args([*flags, *folders]))
        return tmp_path / "results"

    return run


def test_instance_table4_at_reduced_size(small, tmp_path, monkeypatch, capsys):
    flags = ["instance-table4", "--steps", "2", "--num-images", "3", "--seeds", "1"]
    text = (small(*flags) / "instance-table4.md").read_text()
    with Image.open(tmp_path / "results/instance-table4.png") as image:
        assert image.width > 500
    reports = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "runs").glob("*/report.json")}
    assert reports.keys() == {"instance-one-0", "instance-one-surgery-none-0", "instance-one-surgery-both-0"}
    for report in reports.values():  # every figure of the table is one of a report
        assert f"{report['ssim']:.3f}" in text and f"{report['fid_real']:.2f}" in text
    assert "--surgery both --seed 0" in text and "no projection" in text

    # Where everything is done, nothing is run again, and the table is the same but for nothing
    for script in (reproduce.instance_unlearn, reproduce.evaluation):
        monkeypatch.setattr(script, "unlearn" if hasattr(script, "unlearn") else "evaluate", None)
    assert (small(*flags) / "instance-table4.md").read_text() == text
    with pytest.raises(SystemExit, match="holds a run of other flags"):
        small("instance-table4", "--steps", "3", "--seeds", "1")
    # A run that was killed after its training is only measured; until then, --finished leaves its row out
    (tmp_path / "runs/instance-one-0/report.json").unlink()
    text = (small(*flags, "--finished") / "instance-table4.md").read_text()
    assert "| no projection |" in text and "| project g_f |" not in text and "Missing, for" in text and "instance-one." in text
    measured = []
    monkeypatch.setattr(reproduce.evaluation, "evaluate", lambda args: measured.append(args.after.name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small(*flags)
    assert measured == ["instance-one-0"]


def test_one_row_of_doco_table1(small):
    flags = ["--steps", "2", "--num-images", "2", "--seeds", "1"]
    text = (small("doco-table1", "--rows", "Erasing Grumpy Cat and pizza and flag", *flags) / "doco-table1.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| DoCo"))
    assert row.count("|") == 1 + 1 + 4 * 3 + 3 and "| original |" in text and "unlearning styles" not in text


def report(similarity, ssim):
    return {"task": "instance", "pictures": [{"before": 0.9, "after": s} for s in similarity], "ssim": ssim, "distance": 0.1,
            "fid_pre": 1.0, "fid_real": "skipped: none"}  # fmt: skip


def test_cells_by_hand():
    rows = [(name, SimpleNamespace(name=name)) for name in "abc"]
    table = reproduce.Table("T", reproduce.INSTANCE, [("", [], rows)])
    reports = {"a": [report([0.1, 0.5], 0.9), report([0.3, 0.2], 0.8)]}
    reports |= {"b": [report([0.2], 0.7)] * 2, "c": [report([0.0], 0.6)] * 2}
    ((_, _, lines),) = reproduce.cells(table, reports)
    lines = dict(lines)
    worst = [0.5, 0.3]  # of a run's pictures counts
    assert lines["a"][0] == (f"1/2 (0.900 → 0.400 ± {statistics.stdev(worst):.3f})", None)
    assert lines["c"][0][1] == 0 and lines["b"][0][1] == 1  # less is better
    assert lines["a"][2] == (f"0.850 ± {statistics.stdev([0.9, 0.8]):.3f}", 0) and lines["b"][2][1] == 1  # more is better
    assert lines["a"][4] == ("–", None)
    assert {lines[row][3] for row in "abc"} == {("1.00 ± 0.00", None)}  # where all are equal, none is best
    text = "\n".join(reproduce.markdown(table, reproduce.cells(table, reports)))
    assert "**0.850 ± 0.071**" in text and "<u>0.700 ± 0.000</u>" in text and "SSIM ↑" in text and "FID_pre ↓" in text


def test_cells_of_concepts_by_hand():
    """The original's row is what was before; ood and related say it in their own cells, for they differ from row to row."""

    def report(ca):
        concepts = {"cat": {"kind": "target", "before": {"CA": 90.0, "CS": 1.0}, "after": {"CA": ca, "CS": 1.0, "FID": 2.0}}}
        return {"task": "concept", "concepts": concepts, "kinds": {"ood": {"before": {"CA": 80.0}, "after": {"CA": ca / 2}}}}

    rows = [("original", "original"), ("x", SimpleNamespace(name="x")), ("y", SimpleNamespace(name="y"))]
    table = reproduce.Table("T", [("cat", "CA"), ("cat", "FID"), ("ood", "CA")], [("Erasing cat", ["cat"], rows)])
    ((_, _, lines),) = reproduce.cells(table, {"x": [report(10.0), report(30.0)], "y": [report(40.0)]})
    assert [text for text, _ in lines[0][1]] == ["90.0", "–", "–"]
    assert [text for text, _ in lines[1][1]] == ["20.0 ± 14.1", "2.0 ± 0.0", "80.0 → 10.0 ± 7.1"]
    assert [rank for _, rank in lines[1][1]] == [0, None, 0] and lines[2][1][2] == ("80.0 → 20.0", 1)


def test_arrows_turn_with_what_is_erased():
    assert reproduce.wanted(("pizza", "CA"), ["pizza"]) == -1 == -reproduce.wanted(("pizza", "CA"), ["cat"])
    assert reproduce.wanted(("pizza", "FID"), ["pizza"]) == 1 == -reproduce.wanted(("pizza", "FID"), ["cat"])
    assert reproduce.wanted(("ood", "CA"), []) == -1 and reproduce.wanted(("related", "CA"), []) == 1


def test_gallery_shows_each_model_from_the_same_seeds(tiny, tmp_path):
    """A line for the original and one for each row; a row whose run changed nothing equals the original's."""
    job = reproduce.Job("same", "doco.py", [], ["concept", "--before", str(tiny)])
    weights = load_file(tiny / "unet/diffusion_pytorch_model.safetensors")
    for name, factor in (("same", 1), ("other", -1)):
        (tmp_path / f"{name}-0").mkdir()
        save_file({n: factor * w for n, w in weights.items() if "conv_out" in n}, tmp_path / f"{name}-0/delta.safetensors")
    rows = [("same", job), ("other", job._replace(name="other"))]
    reproduce.gallery(SimpleNamespace(runs=tmp_path), rows, ["a cat", "pizza"], tmp_path / "gallery.png", each=1)
    with Image.open(tmp_path / "gallery.png") as image:
        original, same, other = (image.crop((150, 30 + k * 72, image.width, 102 + k * 72)).tobytes() for k in range(3))
    assert original == same != other


def test_trade_off_by_hand():
    rows = [("original", "original"), ("x", SimpleNamespace(name="a"))]
    table = reproduce.Table("T", reproduce.INSTANCE, [("", [], rows)])
    names = reproduce.trade_off_points(table, {"a": [report([0.1, 0.5], 0.9), report([0.3], 0.8)]})
    assert names[:3] == ("similarity", "SSIM", 0.4) and names[3] == [("x", "", [(0.5, 0.9), (0.3, 0.8)])]


def test_picture_outside_the_training_set(tmp_path):
    reproduce.outside_picture(tmp_path / "sun.png")
    with Image.open(tmp_path / "sun.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB" and len(image.getcolors(1024)) > 20
    assert not list(reproduce.HERE.glob("emoji/creatures/*sun-with-face*"))
