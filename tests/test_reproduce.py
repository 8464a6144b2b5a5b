"""reproduce.py: every command parses, a table comes of the real commands, cells are right."""

import contextlib
import copy
import inspect
import io
import json
import re
import shlex
import statistics
import subprocess
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import baselines
import eval as evaluation
from common import REPO
from experiments import reproduce
from experiments.reproduce import Block, Column, Job, Row, Table

SMALL = SimpleNamespace(paper=False, runs=None)


@pytest.fixture(scope="module")
def dry_run():
    """A function: flags -> the lines that a dry run prints. The same flags run once."""
    done = {}

    def lines(*flags):
        if flags not in done:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                reproduce.main(reproduce.parse_args([*flags, "--dry-run"]))
            done[flags] = [line for line in printed.getvalue().splitlines() if line]
        return done[flags]

    return lines


def script_and_flags(line):
    """A command line -> (key of SCRIPTS or "eval", its flags)."""
    start, script, *flags = shlex.split(line)
    if script == "-m":
        script, *flags = flags
    assert start in ("python", "torchrun")
    return script.removesuffix(".py"), flags


# ---- 1. commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("paper", [[], ["--paper"]])
def test_every_command_parses(dry_run, paper):
    """By the parser of its script; only --paper names the papers' models and sizes."""
    lines = dry_run("all", *paper)
    assert len(lines) > 40 * (6 if paper else 3)
    for line in lines:
        script, flags = script_and_flags(line)
        (evaluation if script == "eval" else reproduce.SCRIPTS[script]).parse_args(flags)
    sizes = (
        "CompVis/stable-diffusion-v1-4",
        "google/ddpm-celebahq-256",
        "--num-images 10000",
        "imagenet",
    )
    assert all(any(size in line for line in lines) == bool(paper) for size in sizes)


def test_two_rows_never_share_a_folder(dry_run):
    """But a row of several tables runs once: its command is the same everywhere."""
    folders = {}
    for line in dry_run("all"):
        if "--out" in (words := shlex.split(line)):
            folder = words[words.index("--out") + 1]
            assert folders.setdefault(folder, line) == line


def test_recorded_commands_are_those_of_today(dry_run):
    """The commands in results/*.md are what the driver runs: no flag of an earlier day."""
    today = set(dry_run("all"))
    for file in (REPO / "experiments/results").glob("*.md"):
        text = file.read_text()
        recorded = re.findall(r"^(?:python|torchrun) .*$", text, re.M)
        assert recorded and set(recorded) <= today, file
        for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (file.parent / image).is_file(), (file, image)


def test_baselines_are_found_by_their_files():
    """Every method has rows of its task, and the driver's source names no module of a baseline."""
    for name, module in baselines.methods().items():
        scripts = [script for script, _ in reproduce.baseline_rows(module.TASK)]
        assert f"baselines.{name}" in scripts
    source = inspect.getsource(reproduce)
    assert not re.findall(rf"baselines[./]({'|'.join(baselines.methods())})\b", source)


def test_first_of_the_tried_rates_is_the_default():
    """Of small models, where the tables without --paper are made."""
    for script, entry in reproduce.baseline_rows("concept", "rates"):
        flag, value, *others = entry["tried"]
        assert others and value not in others
        module = reproduce.SCRIPTS[script]
        name = flag.removeprefix("--")
        if not entry["flags"] and hasattr(module, "SMALL"):
            assert module.SMALL[name] == float(value)


def test_rates_are_of_the_small_models_and_one_seed(dry_run):
    """At the papers' size there is nothing to choose: the papers' rates are the defaults."""
    tries = {"instance-rates": 2 * sum(map(len, reproduce.TRIED_RATES.values()))}
    rows = reproduce.baseline_rows("concept", "rates")
    tries["doco-rates"] = sum(len(entry["tried"]) - 1 for _, entry in rows)
    tries["doco-trade-off"] = tries["doco-rates"] + 3 + 4  # DoCo's own
    for table, n in tries.items():
        lines = dry_run(table)
        assert len(lines) == 2 * n and all("--seed 0" in line for line in lines)
        with pytest.raises(SystemExit, match="without --paper"):
            reproduce.main(reproduce.parse_args([table, "--paper", "--dry-run"]))


def test_no_retained_prompt_is_reported():
    """The list of --retain-prompts has no name of a concept that a row erases or measures."""
    retained = (REPO / reproduce.RETAIN_PROMPTS[1]).read_text().lower().splitlines()
    assert len(retained) == len(set(retained)) > 100
    catalogue = json.loads((REPO / "emoji/images/emoji.json").read_text())
    reported = set()
    for job in reproduce.jobs_of(reproduce.doco_balance(SMALL)).values():
        args = evaluation.parse_args([*job.score, "--after", "run"])
        rows = evaluation.concept_prompts(args, emoji=True)
        reported |= {r.prompt.lower() for r in rows} - {
            r.prompt.lower() for r in rows if r.type == "anchor"
        }
        reported |= {row.name.lower() for row in rows if row.type != "anchor"}
        for target in args.target:
            entry = evaluation.emoji_entry(catalogue, target) or {"name": target, "synonyms": []}
            reported |= {name.lower() for name in (entry["name"], *entry["synonyms"])}
    assert not reported & set(retained)
    # Nor do the styled prompts of training carry a style that the column "composed" reports
    styled = (REPO / reproduce.STYLED_PROMPTS[1]).read_text().lower()
    assert not [style for style in catalogue["styles"] if style in styled]
    assert all("{}" in line for line in styled.splitlines())


def test_rows_of_forgetting_and_preservation_are_sorted_by_h():
    rows = reproduce.balance_rows(reproduce.BALANCE_OBJECTS[:1])
    labels = [row.label for row in rows]
    ours = ["DoCo", "DoCo, distill", "DoCo, distill, prompts", "DoCo, distill, styles"]
    assert labels[-4:] == ours
    assert len({row.job.name for row in rows}) == len(rows)
    with_h = {row.job.name: [{"task": "concept", "H": float(k)}] for k, row in enumerate(rows)}
    assert [row.label for row in reproduce.sorted_by_h(rows, with_h)] == labels[::-1]
    without = {row.job.name: [{"task": "concept", "H": None}] for row in rows}
    assert reproduce.sorted_by_h(rows, without) == rows


def concept_row(target, ood, related, h):
    """A report of eval.py concept with what the balance columns read."""
    accuracy = {"target": target, "ood": ood, "related": related, "unrelated": 100.0}
    types = {k: {"before": {"CA": 97.0}, "after": {"CA": v}} for k, v in accuracy.items()}
    return {"task": "concept", "H": h, "prompt_types": types, "concepts": {}}


def test_balance_columns_show_what_is_after_and_their_directions():
    reports = {"a": [concept_row(0.0, 50.0, 80.0, 81.0)], "b": [concept_row(10.0, 0.0, 90.0, 95.0)]}
    rows = [Row(name, Job(name, "doco", [], [])) for name in "ab"]
    table = Table("t", reproduce.BALANCE_COLUMNS[:5], [Block("", [], rows)])
    (block,) = reproduce.cells(table._replace(columns=reproduce.BALANCE_COLUMNS), reports)
    assert [label for label, _ in block.rows] == ["b", "a"]  # by H
    cells = [[cell.text for cell in row[:5]] for _, row in block.rows]
    assert cells == [["95.0", "10.0", "0.0", "–", "90.0"], ["81.0", "0.0", "50.0", "–", "80.0"]]
    assert [cell.rank for cell in block.rows[0][1][:5]] == [0, 1, 0, None, 0]
    table = table._replace(columns=reproduce.BALANCE_COLUMNS)
    h = Column("", "H")
    values = [reproduce.metric_value(reports["a"][0], h, when) for when in ("before", "after")]
    assert values == [None, 81.0]
    points = [reproduce.trade_off_point(table, reports[name][0]) for name in "ab"]
    assert points == [(25.0, 80.0), (5.0, 90.0)]  # (target + ood) / 2, related


def test_a_trade_off_is_a_curve_per_method(tmp_path, monkeypatch):
    """Blocks of doco-trade-off are methods, their rows strengths: one label for all of a block."""
    reports = {n: [concept_row(10.0 * k, 0.0, 90.0, 90.0)] for k, n in enumerate("abcd")}
    blocks = []
    for heading, names in (("one", "ab"), ("two", "cd")):
        blocks.append(Block(heading, [], [Row(n, Job(n, "doco", [], [])) for n in names]))
    table, drawn = Table("t", reproduce.BALANCE_COLUMNS, blocks), []
    monkeypatch.setattr(reproduce.plots, "trade_off", lambda points, *rest: drawn.append(points))
    reproduce.plot_trade_offs(tmp_path, "doco-trade-off", [table], reports)
    assert [(label, group) for label, group, _ in drawn[0]] == [("one", "")] * 2 + [("two", "")] * 2
    reproduce.plot_trade_offs(tmp_path, "doco-balance", [table], reports)
    assert [(label, group) for label, group, _ in drawn[1]][:2] == [("a", "one"), ("b", "one")]


def test_every_method_has_the_same_number_of_tries_under_both_recipes():
    """And the chosen rates are among those that were tried."""
    tries = {}
    (table,) = reproduce.instance_rates(SMALL)
    for heading, _, rows in table.blocks:
        name, recipe = heading.split(", 240 steps of 8, ")
        tries[name, recipe] = len(rows)
        for label, job in rows:
            flags = (*reproduce.RECIPES[recipe][1], label.split()[1])
            assert all(flag in job.flags for flag in flags), label
    assert len(set(tries.values())) == 1 and len(tries) == 2 * 5
    untried = {"SISS (t = 999)": "SISS (all t)"}  # has the rate of the other
    for recipe, rates in reproduce.CHOSEN_RATES.items():
        assert rates.keys() - untried.keys() == {n for n, r in tries if r == recipe}
        for name, rate in rates.items():
            assert rate in reproduce.TRIED_RATES[untried.get(name, name)], (name, recipe)
        assert all(rates[name] == rates[other] for name, other in untried.items())


def test_blocks_of_equal_recipes_differ_in_the_method_alone():
    """Steps, batch size, scheduler and timesteps are the same for all eight rows."""
    for recipe, (_, flags) in reproduce.RECIPES.items():
        rows = reproduce.equal_rows(SMALL, "one", recipe)
        assert [row.label for row in rows[-2:]] == ["ours", "ours, distilled"] and len(rows) == 8
        for _, job in rows:
            args = reproduce.SCRIPTS[job.script].parse_args(job.flags)
            assert [args.lr_scheduler, args.timestep_sampling] == [flags[1], flags[3]]
            assert args.lr is not None
            assert (args.steps or 240) == 240 and (args.batch_size or 8) == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--seeds", "-1"], "--seeds -1: expected at least 1"),
        (["--num-images", "1"], "--num-images 1: expected at least 2"),
        (["--rows", "nothing"], "--rows 'nothing': no such row in all"),
    ],
)
def test_bad_input_is_one_line(flags, message):
    """Before anything runs."""
    with pytest.raises(SystemExit, match=message):
        reproduce.main(reproduce.parse_args(["all", *flags, "--dry-run"]))


def test_the_twenty_images_are_drawn_and_in_no_other_table():
    (table,) = reproduce.instance_images(SMALL)
    images = [[row.label for row in block.rows[:-1]] for block in table.blocks]
    assert images[0] == images[1] == images[2] and len(set(images[0])) == 20
    other = json.dumps(
        [
            job.flags
            for name in ("one", "another", "four")
            for job in [reproduce.instance_job(SMALL, name)]
        ]
    )
    assert not [stem for stem in images[0] if stem in other]
    targets = []
    for block in table.blocks:
        assert block.rows[-1] is reproduce.MEAN
        args = reproduce.instance_unlearn.parse_args(block.rows[0].job.flags)
        targets.append((args.remember_loss, args.remember == "generated"))
    assert targets == [("noise", False), ("distill", False), ("distill", True)]


def test_a_row_of_means_is_over_the_rows_of_its_block():
    jobs = [Job(name, "instance_unlearn", [], []) for name in "ab"]
    rows = [*(Row(job.name, job) for job in jobs), reproduce.MEAN]
    reports = {"a": [image_report([0.1], 0.9)], "b": [image_report([0.5], 0.7)]}
    table = Table("t", [Column("", "SSIM")], [Block("", [], rows)])
    (block,) = reproduce.cells(table, reports)
    assert [cells[0].text for _, cells in block.rows] == ["0.900", "0.700", "0.800 ± 0.141"]
    assert block.rows[-1][1][0].rank is None


# ---- 2. cells by hand ---------------------------------------------------------------------------


def image_report(similarity, ssim):
    """A report of eval.py instance, of several forget images."""
    return {
        "task": "instance",
        "images": [{"before": 0.9, "after": s} for s in similarity],
        "ssim": ssim,
        "distance": 0.1,
        "fid_pre": 1.0,
        "fid_real": "skipped: none",
    }


def rows_named(names):
    """Rows whose labels are the names of their jobs."""
    return [Row(name, Job(name, "doco", [], ["instance"])) for name in names]


def test_cells_by_hand():
    """Means, deviations and ranks of images; the least forgotten image of a run counts."""
    table = Table("T", reproduce.INSTANCE_COLUMNS, [Block("", [], rows_named("abc"))])
    reports = {"a": [image_report([0.1, 0.5], 0.9), image_report([0.3, 0.2], 0.8)]}
    reports |= {"b": [image_report([0.2], 0.7)] * 2, "c": [image_report([0.0], 0.6)] * 2}
    (block,) = reproduce.cells(table, reports)
    lines = dict(block.rows)
    deviation = statistics.stdev([0.5, 0.3])
    assert lines["a"][0] == (f"1/2 (0.900 → 0.400 ± {deviation:.3f})", None)
    assert lines["c"][0].rank == 0 and lines["b"][0].rank == 1  # less is better
    assert lines["a"][2] == (f"0.850 ± {statistics.stdev([0.9, 0.8]):.3f}", 0)  # more is better
    assert lines["b"][2].rank == 1
    assert lines["a"][4] == ("–", None)
    assert {lines[row][3] for row in "abc"} == {("1.00 ± 0.00", None)}  # all equal: none is best
    text = "\n".join(reproduce.markdown(table, [block]))
    assert "**0.850 ± 0.071**" in text and "<u>0.700 ± 0.000</u>" in text
    assert "SSIM ↑" in text and "FID_pre ↓" in text and "similarity < 0.4 ↓" in text


def concept_report(ca):
    """A report of eval.py concept, of one target."""
    before = {"CA": 90.0, "CS": 1.0}
    after = {"CA": ca, "CS": 1.0, "FID": 2.0}
    ood = {"before": {"CA": 80.0}, "after": {"CA": ca / 2}}
    return {
        "task": "concept",
        "concepts": {"cat": {"type": "target", "before": before, "after": after}},
        "prompt_types": {"ood": ood},
    }


def test_cells_of_concepts_by_hand():
    """The original's row has what was before; columns by prompt type have it in their own cells."""
    rows = [reproduce.ORIGINAL, *rows_named("xy")]
    columns = [Column("cat", "CA"), Column("cat", "FID"), reproduce.OOD]
    table = Table("T", columns, [Block("Erasing cat", ["cat"], rows)])
    reports = {"x": [concept_report(10.0), concept_report(30.0)], "y": [concept_report(40.0)]}
    (block,) = reproduce.cells(table, reports)
    (_, original), (_, x), (_, y) = block.rows
    assert [cell.text for cell in original] == ["90.0", "–", "–"]
    assert [cell.text for cell in x] == ["20.0 ± 14.1", "2.0 ± 0.0", "80.0 → 10.0 ± 7.1"]
    assert [cell.rank for cell in x] == [0, None, 0] and y[2] == ("80.0 → 20.0", 1)
    text = "\n".join(reproduce.markdown(table, [block]))
    assert "| *Erasing cat* | ↓ | ↑ | ↓ |" in text and "| cat: CA |" in text


def test_arrows_turn_with_what_is_erased():
    """For a concept's CA and FID; for OOD and related prompts they do not."""
    ca, fid = Column("pizza", "CA"), Column("pizza", "FID")
    assert reproduce.direction(ca, ["pizza"]) == -1 == -reproduce.direction(ca, ["cat"])
    assert reproduce.direction(fid, ["pizza"]) == 1 == -reproduce.direction(fid, ["cat"])
    assert reproduce.direction(reproduce.OOD, []) == -1
    assert reproduce.direction(reproduce.RELATED, []) == 1


def test_trade_off_by_hand(tmp_path):
    """A point per seed; a figure only where two rows compete."""
    rows = [reproduce.ORIGINAL, *rows_named("x")]
    table = Table("T", reproduce.INSTANCE_COLUMNS, [Block("", [], rows)])
    reports = {"x": [image_report([0.1, 0.5], 0.9), image_report([0.3], 0.8)]}
    points = reproduce.trade_off_points(table, reports)
    assert points == [("x", "", [(0.5, 0.9), (0.3, 0.8)])]
    assert reproduce.plot_trade_offs(tmp_path, "t", [table], reports) == []
    table = Table("T", reproduce.INSTANCE_COLUMNS, [Block("", [], rows_named("xy"))])
    files = reproduce.plot_trade_offs(tmp_path, "t", [table], reports | {"y": reports["x"]})
    assert files == ["t-trade-off.png"] and (tmp_path / files[0]).is_file()


def test_trade_off_of_concepts_by_hand():
    """Mean CS of the erased against the unrelated ones; without these, no point."""
    columns = reproduce.concept_columns([("cat", "animal")])
    table = Table("T", columns, [Block("", ["cat"], rows_named("xy"))])
    report = concept_report(10.0)
    assert reproduce.trade_off_point(table, report) is None
    report = copy.deepcopy(report)
    report["concepts"] |= {
        "a": {"type": "unrelated", "after": {"CS": 3.0}},
        "b": {"type": "unrelated", "after": {"CS": 5.0}},
        "c": {"type": "related", "after": {"CS": 100.0}},
    }
    assert reproduce.trade_off_point(table, report) == (1.0, 4.0)


def test_image_outside_the_training_set(tmp_path):
    """It has the size and mode of emoji/creatures, and is none of them."""
    reproduce.write_outside_image(tmp_path / "sun.png")
    with Image.open(tmp_path / "sun.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"
        assert len(image.getcolors(1024)) > 20
    assert not list(REPO.glob("emoji/creatures/*sun-with-face*"))


# ---- 3. at reduced size -------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """Makes a table at reduced size and returns the folder of results."""

    def run(*flags):
        folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
        reproduce.main(reproduce.parse_args([*flags, *folders]))
        return tmp_path / "results"

    return run


@pytest.mark.slow
def test_instance_table4_at_reduced_size(small, tmp_path, monkeypatch):
    """Every figure is one of a report; what is finished is not run again."""
    flags = ["instance-table4", "--steps", "2", "--num-images", "3", "--seeds", "1"]
    rows = ["--rows", "g_f"]  # two of the four
    text = (small(*flags, *rows) / "instance-table4.md").read_text()
    assert (tmp_path / "results/instance-table4-trade-off.png").is_file()
    assert "![trade-off](instance-table4-trade-off.png)" in text
    reports = {}
    for file in (tmp_path / "runs").glob("*/report.json"):
        reports[file.parent.name] = json.loads(file.read_text())
    assert reports.keys() == {"instance-one-0", "instance-one-surgery-both-0"}
    for report in reports.values():
        assert f"{report['ssim']:.3f}" in text and f"{report['fid_real']:.2f}" in text
    assert "--surgery both --seed 0" in text and "no projection" not in text

    # Everything is done: nothing runs, and the table is the same
    monkeypatch.setattr(reproduce.instance_unlearn, "unlearn", None)
    monkeypatch.setattr(reproduce.evaluation, "evaluate", None)
    assert (small(*flags, *rows) / "instance-table4.md").read_text() == text
    with pytest.raises(SystemExit, match="holds a run of other flags"):
        small("instance-table4", *rows, "--steps", "3", "--seeds", "1")

    # A run that was killed after its training is evaluated only; --finished leaves its row out
    (tmp_path / "runs/instance-one-0/report.json").unlink()
    text = (small(*flags, "--finished") / "instance-table4.md").read_text()
    assert "| project g_f, g_r |" in text and "| project g_f |" not in text
    assert "Missing, because" in text and "instance-one," in text
    evaluated = []

    def evaluate(args):
        evaluated.append(args.after.name)
        raise InterruptedError

    monkeypatch.setattr(reproduce.evaluation, "evaluate", evaluate)
    with pytest.raises(InterruptedError):
        small(*flags, *rows)
    assert evaluated == ["instance-one-0"]


@pytest.mark.slow
def test_one_row_of_doco_table1(small):
    """--rows picks a block; the original's row stays, and other tables go."""
    flags = ["--steps", "2", "--num-images", "2", "--seeds", "1"]
    rows = "Erasing Grumpy Cat and pizza and flag"
    text = (small("doco-table1", "--rows", rows, *flags) / "doco-table1.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| DoCo"))
    assert row.count("|") == 1 + 1 + 4 * 3 + 3
    assert "| original |" in text and "unlearning styles" not in text


@pytest.mark.slow
def test_two_processes_with_a_baseline_and_samples(tmp_path):
    """Under torchrun: the baseline trains in the first process, the samples are shared."""
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "experiments.reproduce"]
    flags = ["doco-rates", "--rows", "UCE --lamb 50", "--steps", "2", "--num-images", "2"]
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    done = subprocess.run([*command, *flags, *folders], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "results/doco-rates.md").read_text()
    assert "| --lamb 50 |" in text and "| --lamb 500 |" in text
    assert "![samples](doco-rates-samples.png)" in text
    assert (tmp_path / "results/doco-rates-samples.png").is_file()


@pytest.mark.slow
def test_samples_of_each_model_are_of_the_same_seeds(tiny, tmp_path):
    """A run that changed nothing generates the original model's images."""
    weights = load_file(tiny / "unet/diffusion_pytorch_model.safetensors")
    for name, factor in (("same", 1), ("other", -1)):
        (tmp_path / name).mkdir()
        changed = {n: factor * w for n, w in weights.items() if "conv_out" in n}
        save_file(changed, tmp_path / name / "delta.safetensors")
    runs = [("same", tmp_path / "same"), ("other", tmp_path / "other")]
    prompts = ["a cat", "pizza"]
    grid = reproduce.sample_rows(str(tiny), runs, prompts, each=1)
    assert [label for label, _ in grid] == ["original", "same", "other"]
    original, same, other = (images for _, images in grid)
    assert len(original) == 2 and not original[0].equal(original[1])
    assert all(a.equal(b) for a, b in zip(original, same, strict=True))
    assert not any(a.equal(b) for a, b in zip(original, other, strict=True))
