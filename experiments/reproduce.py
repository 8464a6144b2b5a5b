"""The papers' tables, in miniature: trains, evaluates and writes each, on the embedded emoji models.

    python -m experiments.reproduce --list             # the tables
    python -m experiments.reproduce instance-table4    # 9 runs, a quarter of an hour on two cores
    python -m experiments.reproduce all                # hours; after an interruption, it continues
    python -m experiments.reproduce doco-table1 --rows "Erasing Grumpy Cat" --steps 40 --seeds 1
    python -m experiments.reproduce all --paper --dry-run    # the commands at the papers' size
    torchrun --nproc-per-node 2 -m experiments.reproduce doco-table1 --paper --data paper-data

Every figure comes from the command lines that a table lists. Each is parsed and run by its script
(doco.py, instance_unlearn.py, a baseline, then eval.py), in this process. Finished runs stay in
--runs and are not run again. A baseline enters the tables by its file alone: see ROWS in
baselines/__init__.py.

Writes experiments/results/TABLE.md: mean ± sample standard deviation over seeds, the best in bold
and the second best underlined where rows compete. Beside it, TABLE-trade-off.png: preservation over
forgetting (Fig. 10 of the second paper); and, where several methods erase a concept,
TABLE-samples.png: what the models of seed 0 generate.

The papers' size (--paper) needs a GPU, Stable Diffusion v1.4 and DDPM-CelebA-HQ, and in --data what
no hub has: celebahq/ (the training images), sscd_disc_mixup.torchscript.pt, and 256x256 images to
unlearn, robin-li.png, kate-del-castillo.png, elva-hsiao.png, ed-harris.png and ffhq.png, each with
its edit NAME-edited.png; robin-li also edited by TediGAN with CLIP weight W, robin-li-edited-W.png.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import time
from collections import namedtuple
from pathlib import Path

import torch
from PIL import Image

import baselines
import doco
import eval as evaluation
import instance_unlearn
import plots
from common import REPO, HelpFormatter, atomic_save, fail

SCRIPTS = {"doco": doco, "instance_unlearn": instance_unlearn}
SCRIPTS |= {f"baselines.{name}": module for name, module in baselines.methods().items()}

# A table has blocks, a block has rows. A block's heading may be empty; erased: the names of the
# columns' groups that its rows erase, which turns the arrows of these columns.
Table = namedtuple("Table", "title columns blocks")
Block = namedtuple("Block", "heading erased rows")
Row = namedtuple("Row", "label job")  # job: None for the original model
Column = namedtuple("Column", "group metric")  # group: a concept or a prompt type; "" for images

# The run of a row. name: of its folder, without the seed. script: a key of SCRIPTS, with its flags.
# score: the flags of eval.py. The driver adds --seed to both, --out to one and --after to the other.
Job = namedtuple("Job", "name script flags score")

ORIGINAL = Row("original", None)


# ---- 1. the runs of rows ------------------------------------------------------------------------


def slug(*words):
    """The name of a run folder: lower case, digits and dots, all else as hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")


def takes(script, flags, setting):
    """Whether a script has a setting ("steps" for --steps). flags: a valid command line of it."""
    return setting in vars(SCRIPTS[script].parse_args(flags))


def baseline_rows(task, table="all"):
    """[(script, entry of its ROWS)] of all baselines of a task, "concept" or "instance".

    table: "all" for the entries of every table, "rates" for those with rates that were tried.
    """
    found = []
    for name, module in baselines.methods().items():
        if module.TASK == task:
            found += [(f"baselines.{name}", entry) for entry in module.ROWS]
    if table == "rates":
        return [(script, entry) for script, entry in found if "tried" in entry]
    return [(script, entry) for script, entry in found if entry.get("in", "all") == "all"]


def concept_job(args, erased, unrelated, *flags, style=False, script="doco"):
    """The job that erases concepts together. erased, unrelated: [(name, anchor)]."""
    targets = [name for name, _ in erased]
    anchors = [anchor for _, anchor in erased]
    concepts = ["--target", *targets, "--anchor", *(anchors[:1] if style else anchors)]
    if style:
        concepts += ["--concept-type", "style"]
    before = "CompVis/stable-diffusion-v1-4" if args.paper else "emoji/sd"
    model = ["--model", before] if args.paper else []
    score = ["concept", "--before", before, *concepts]
    score += ["--unrelated", *(name for name, _ in unrelated)]
    if args.paper:
        score += ["--templates", "imagenet", "--num-images", "10", "--features", "inception"]
    else:
        score += ["--num-images", "4" if style else "8"]
    name = slug(script.removeprefix("baselines."), *targets, *flags)
    return Job(name, script, [*model, *concepts, *flags], score)


# The images to unlearn at the papers' size, files of --data
PAPER_IMAGES = {
    "one": ["robin-li"],
    "four": ["robin-li", "kate-del-castillo", "elva-hsiao", "ed-harris"],
    "outside": ["ffhq"],
}
# Of the small model: files of emoji/creatures and, as their edits, other expressions in their style
CREATURES = "emoji/creatures"
EDITS = {
    "twemoji-cowboy-hat-face": "twemoji-thinking-face",
    "noto-nerd-face": "noto-thinking-face",
    "fluent-star-struck": "fluent-zipper-mouth-face",
    "twemoji-smiling-face-with-sunglasses": "twemoji-zipper-mouth-face",
}
SMALL_IMAGES = {
    "one": ["twemoji-cowboy-hat-face"],
    "another": ["noto-nerd-face"],
    "four": [*EDITS],
}
OUTSIDE = "twemoji-sun-with-face.png"  # not in emoji/creatures; see write_outside_image
# What four images in sequence need of the small model (docs/instance.md)
FOUR_FLAGS = ["--beta", "1.5e-4", "--lr", "8e-5"]


def forget_files(args, which):
    """([files to unlearn], [their edits, or None for the script's own surrogate])."""
    if args.paper:
        stems = [f"{args.data}/{name}" for name in PAPER_IMAGES[which]]
        return [f"{s}.png" for s in stems], [f"{s}-edited.png" for s in stems]
    if which == "outside":
        return [f"{args.runs}/{OUTSIDE}"], None
    names = SMALL_IMAGES[which]
    edits = [f"{CREATURES}/{EDITS[name]}.png" for name in names]
    return [f"{CREATURES}/{name}.png" for name in names], None if which == "one" else edits


def instance_job(args, which, *flags, script="instance_unlearn"):
    """The job that unlearns images: "one", "another", "four", or "outside" the training set.

    Without --surrogate in flags, a script that takes one gets the edits.
    """
    name = slug(script.removeprefix("baselines.").replace("_unlearn", ""), which, *flags)
    flags = list(flags)
    files, edits = forget_files(args, which)
    forget = ["--forget", *files]
    real = f"{args.data}/celebahq" if args.paper else CREATURES
    before = "google/ddpm-celebahq-256" if args.paper else "emoji/ddpm"
    model = ["--model", before] if args.paper else []
    if args.paper and takes(script, [*model, *forget, *flags], "remember"):
        model += ["--remember", real]
    if edits and "--surrogate" not in flags and takes(script, [*forget, *flags], "surrogate"):
        flags += ["--surrogate", *edits]
    if which == "four" and not args.paper and script == "instance_unlearn":
        flags += FOUR_FLAGS
    score = ["instance", "--before", before, *forget, "--real", real]
    if args.paper:
        score += ["--num-images", "10000", "--features", "inception"]
        score += ["--sscd", f"{args.data}/sscd_disc_mixup.torchscript.pt"]
    return Job(name, script, [*model, *forget, *flags], score)


# ---- 2. the tables of DoCo ----------------------------------------------------------------------

PAPER_OBJECTS = [("Snoopy", "Dog"), ("Mickey", "Mouse"), ("Spongebob", "Sponge")]
SMALL_OBJECTS = [("Grumpy Cat", "Cat"), ("pizza", "food"), ("flag of japan", "flag")]
ANOTHER_OBJECT = ("enraged face", "face")  # of a fourth kind; no rate was chosen on it
PAPER_STYLES = ("Van Gogh", "Picasso", "Rembrandt")
SMALL_STYLES = ("noto", "twemoji", "fluent")  # vendors of emoji

# Columns by prompt type, beside the paper's by concept: prompts for the target without its words,
# related concepts, and the anchor itself. Their prompts follow the target, so their values before
# unlearning differ from row to row: each cell shows both.
OOD = Column("ood", "CA")
RELATED = Column("related", "CA")
ANCHOR = Column("anchor", "CS")
TYPE_COLUMNS = (OOD, RELATED, ANCHOR)


def objects(args):
    """[(name, anchor)] of the three instances of DoCo's tables."""
    return PAPER_OBJECTS if args.paper else SMALL_OBJECTS


def concept_columns(concepts, type_columns=TYPE_COLUMNS):
    """CS, CA and FID of each concept, then the columns by prompt type."""
    columns = [Column(name, metric) for name, _ in concepts for metric in ("CS", "CA", "FID")]
    return [*columns, *type_columns]


def concept_rows(args, erased, unrelated, own=False, style=False):
    """Rows: every baseline, then DoCo. own: the baselines with the steps and batch of their papers."""
    rows = []
    for script, entry in baseline_rows("concept"):
        flags = [*entry["flags"], *(entry["paper"] if own else [])]
        job = concept_job(args, erased, unrelated, *flags, style=style, script=script)
        rows.append(Row(entry["label"], job))
    label = "DoCo, 250 steps of 8" if own else "DoCo"
    return [*rows, Row(label, concept_job(args, erased, unrelated, style=style))]


def doco_table1(args):
    """Instances and styles. Without --paper, fewer blocks have baselines, and two are added."""
    three = objects(args)
    first = Block("", [], [ORIGINAL])

    blocks = [first]
    for k in (1, 2, 3):  # as in the paper: one, two and three instances at once
        names = [name for name, _ in three[:k]]
        rows = concept_rows(args, three[:k], three[k:])
        rows = rows if args.paper or k == 1 else rows[-1:]
        blocks.append(Block(f"Erasing {' and '.join(names)}", names, rows))
    columns = concept_columns(three)
    if not args.paper:
        name = ANOTHER_OBJECT[0]
        rows = concept_rows(args, [ANOTHER_OBJECT], three)
        blocks.append(Block(f"Erasing {name}", [name], rows))
        columns = concept_columns([*three, ANOTHER_OBJECT])
        name = three[0][0]
        rows = concept_rows(args, three[:1], three[1:], own=True)
        heading = f"Erasing {name}, baselines with the steps and batch of their papers"
        blocks.append(Block(heading, [name], rows))
    instances = Table("DoCo, Table 1: unlearning instances", columns, blocks)

    blocks = [first]
    names = PAPER_STYLES if args.paper else SMALL_STYLES
    styles = [(name, "painting" if args.paper else "emoji") for name in names]
    for style in styles:
        unrelated = [other for other in styles if other != style]
        rows = concept_rows(args, [style], unrelated, style=True)
        rows = rows if args.paper else rows[-1:]
        blocks.append(Block(f"Erasing {style[0]}", [style[0]], rows))
    columns = concept_columns(styles, (OOD, ANCHOR))  # a style has no related concepts
    return [instances, Table("DoCo, Table 1: unlearning styles", columns, blocks)]


def doco_table3(args):
    """Three ways to retain, and one that is ours: Eq. 10 on the optimizer's step."""
    three = objects(args)
    name = three[0][0]

    def row(label, *flags):
        return Row(label, concept_job(args, three[:1], three[1:], *flags))

    rows = [
        ORIGINAL,
        row("no retention", "--retain", "none"),
        row("L2", "--retain", "l2"),
        row("concept-preserving gradient"),
        row("the same, of AdamW's step", "--project", "step"),
    ]
    title = "DoCo, Table 3: no retention, L2 loss, concept-preserving gradient"
    return [Table(title, concept_columns(three), [Block(f"Erasing {name}", [name], rows)])]


def sweep_rows(args, script, entry):
    """A row per value that was tried for a baseline of concepts, on the first instance.

    Every value is named, the default too: no folder changes its meaning when a default does.
    """
    three = objects(args)
    flag, *values = entry["tried"]
    rows = []
    for value in values:
        flags = [*entry["flags"], flag, value]
        job = concept_job(args, three[:1], three[1:], *flags, script=script)
        rows.append(Row(f"{flag} {value}", job))
    return rows


def doco_rates(args):
    """What was tried for the baselines on the grumpy cat."""
    if args.paper:
        return []
    three = objects(args)
    blocks = [Block("", [], [ORIGINAL])]
    for script, entry in baseline_rows("concept", "rates"):
        rows = sweep_rows(args, script, entry)
        blocks.append(Block(entry["label"], [three[0][0]], rows))
    title = "The baselines' rates, tried on Grumpy Cat"
    return [Table(title, concept_columns(three), blocks)]


# ---- 3. the tables of instance unlearning -------------------------------------------------------

METRICS = ("similarity", "distance", "SSIM", "FID_pre", "FID_real")
INSTANCE_COLUMNS = [Column("", metric) for metric in METRICS]
OURS = "ours"
RANDOM = "ours† (random surrogates)"

# Two recipes for every method: that of the papers, and the two remedies of instance_unlearn.py for
# small models. {name: (description, flags)}
RECIPES = {
    "plain": (
        "constant rate, independent timesteps",
        ["--lr-scheduler", "constant", "--timestep-sampling", "uniform"],
    ),
    "tuned": (
        "falling rate, stratified timesteps",
        ["--lr-scheduler", "linear", "--timestep-sampling", "stratified"],
    ),
}
EQUAL_BUDGET = ["--steps", "240", "--batch-size", "8"]  # our method's own on the small model

# Rates tried under each recipe, on the cowboy: the same number for every method.
TRIED_RATES = {
    "NegGrad": ("3e-7", "1e-6", "5e-6"),
    "EraseDiff": ("1e-5", "2.5e-5", "6e-5"),
    "SISS (all t)": ("1e-5", "2.5e-5", "6e-5"),
    "DUO": ("2.5e-5", "6e-5", "1e-4"),
    OURS: ("1e-5", "2.5e-5", "6e-5"),
}
# Chosen by SSIM among the rates that forget the cowboy, else the one that forgets most.
CHOSEN_RATES = {
    "plain": {
        "NegGrad": "1e-6",
        "EraseDiff": "2.5e-5",  # provisional: results/instance-rates.md lacks a row
        "SISS (all t)": "2.5e-5",
        "SISS (t = 999)": "2.5e-5",  # that of SISS (all t); nothing was tried for it
        "DUO": "1e-4",  # provisional, as above
        OURS: "2.5e-5",
    },
    "tuned": {
        "NegGrad": "1e-6",  # provisional, as above
        "EraseDiff": "6e-5",
        "SISS (all t)": "6e-5",
        "SISS (t = 999)": "6e-5",
        "DUO": "1e-4",  # provisional, as above
        OURS: "6e-5",
    },
}
# Baselines that unlearn four images in sequence without --paper: the others take an hour each
FOUR_BASELINES = ("NegGrad",)


def equal_rows(args, which, recipe):
    """Rows: every method with an equal budget, a recipe, and the rate chosen under that recipe.

    A baseline without a chosen rate is left out.
    """
    _, recipe_flags = RECIPES[recipe]
    rates = CHOSEN_RATES[recipe]
    rows = []
    for script, entry in baseline_rows("instance"):
        if rate := rates.get(entry["label"]):
            flags = [*entry["flags"], *EQUAL_BUDGET, *recipe_flags, "--lr", rate]
            rows.append(Row(entry["label"], instance_job(args, which, *flags, script=script)))
    flags = [*recipe_flags, "--lr", rates[OURS]]  # the budget is the script's default
    random = instance_job(args, which, "--surrogate", "random", *flags)
    return [*rows, Row(RANDOM, random), Row(OURS, instance_job(args, which, *flags))]


def own_rows(args, which, only=None):
    """Rows: every baseline with the steps, batch and recipe of its paper, then our method.

    only: the labels of the baselines that are wanted, or None for all.
    """
    rows = []
    for script, entry in baseline_rows("instance"):
        if only is None or entry["label"] in only:
            flags = [*entry["flags"], *entry["paper"]]
            rows.append(Row(entry["label"], instance_job(args, which, *flags, script=script)))
    random = instance_job(args, which, "--surrogate", "random")
    return [*rows, Row(RANDOM, random), Row(OURS, instance_job(args, which))]


def instance_table1(args):
    """One image, and four in sequence; without --paper, also under equal recipes."""
    blocks = [Block("steps and batch of their papers", [], own_rows(args, "one"))]
    if not args.paper:
        for which, of in (("one", "240 steps of 8 for all"), ("another", "another image, on which no rate was chosen")):
            for recipe, (description, _) in RECIPES.items():
                heading = f"{of}; {description}"
                blocks.append(Block(heading, [], equal_rows(args, which, recipe)))
    four = own_rows(args, "four", None if args.paper else FOUR_BASELINES)
    title = "Instance unlearning, Table I"
    return [
        Table(f"{title}: a single instance", INSTANCE_COLUMNS, blocks),
        Table(f"{title}: four instances, in sequence", INSTANCE_COLUMNS, [Block("", [], four)]),
    ]


def instance_rates(args):
    """Every rate of TRIED_RATES under each recipe."""
    if args.paper:
        return []
    baseline = {entry["label"]: (s, entry) for s, entry in baseline_rows("instance")}
    blocks = []
    for recipe, (_, recipe_flags) in RECIPES.items():
        for label, rates in TRIED_RATES.items():
            flags, script = recipe_flags, "instance_unlearn"
            if label != OURS:
                script, entry = baseline[label]
                flags = [*entry["flags"], *EQUAL_BUDGET, *recipe_flags]
            rows = []
            for rate in rates:
                job = instance_job(args, "one", *flags, "--lr", rate, script=script)
                rows.append(Row(f"--lr {rate}", job))
            blocks.append(Block(f"{label}, 240 steps of 8, {recipe}", [], rows))
    return [Table("The rates of all methods, tried on the cowboy", INSTANCE_COLUMNS, blocks)]


def ablation(title, rows):
    """A table of one block, without heading. rows: [(label, job)]."""
    block = Block("", [], [Row(label, job) for label, job in rows])
    return [Table(f"Instance unlearning, {title}", INSTANCE_COLUMNS, [block])]


def instance_table2(args):
    """How strongly the surrogate is edited."""
    rows = []
    if args.paper:
        for w in ("0.5", "1.0", "2.0", "4.0", "8.0", "16.0", "32.0"):
            edit = ["--surrogate", f"{args.data}/robin-li-edited-{w}.png"]
            rows.append((f"TediGAN, CLIP weight {w}", instance_job(args, "one", *edit)))
    else:
        for s in ("0.6", "0.7", "0.8", "0.9"):
            edit = [] if s == "0.7" else ["--strength", s]  # 0.7 is the default
            rows.append((f"sdedit, strength {s}", instance_job(args, "one", *edit)))
    return ablation("Table II: how strongly the surrogate is edited", rows)


def instance_table3(args):
    """The weight lambda of the surrogate, constant or falling with the timestep."""
    rows = []
    for v in ("0.95", "0.99"):
        rows.append((f"λ = {v}", instance_job(args, "one", "--constant-lambda", v)))
    for v in ("2e-5", "5e-5", "1e-4"):
        flags = [] if v == "5e-5" else ["--beta", v]  # 5e-5 is the default
        rows.append((f"λ = 1 - {v} t", instance_job(args, "one", *flags)))
    return ablation("Table III: λ, constant or falling with the timestep", rows)


def instance_table4(args):
    """Gradient surgery: none, of the forget gradient (the default), of both."""
    rows = [
        ("no projection", instance_job(args, "one", "--surgery", "none")),
        ("project g_f", instance_job(args, "one")),
        ("project g_f, g_r", instance_job(args, "one", "--surgery", "both")),
    ]
    return ablation("Table IV: which gradient is projected", rows)


def instance_table5(args):
    """Kinds of surrogates."""
    edit = "edit (TediGAN)" if args.paper else "edit (sdedit, strength 0.7)"
    rows = [
        (edit, instance_job(args, "one")),
        ("flip", instance_job(args, "one", "--surrogate", "flip")),
    ]
    for sigma in ("50", "150"):
        flags = ["--surrogate", "noise", "--noise-sigma", sigma]
        rows.append((f"add noise (σ = {sigma})", instance_job(args, "one", *flags)))
    return ablation("Table V: how the surrogate is made", rows)


def instance_table6(args):
    """An image that the model was trained on, and one from elsewhere."""
    rows = [
        ("ours, in-domain image", instance_job(args, "one")),
        ("ours, out-of-domain", instance_job(args, "outside")),
    ]
    return ablation("Table VI: an image that the model was not trained on", rows)


TABLES = {
    "doco-table1": doco_table1,
    "doco-table3": doco_table3,
    "instance-table1": instance_table1,
    "instance-table2": instance_table2,
    "instance-table3": instance_table3,
    "instance-table4": instance_table4,
    "instance-table5": instance_table5,
    "instance-table6": instance_table6,
    "doco-rates": doco_rates,
    "instance-rates": instance_rates,
}


def jobs_of(tables):
    """{name: Job} of tables; rows shared by tables run once."""
    rows = [row for table in tables for block in table.blocks for row in block.rows]
    return {row.job.name: row.job for row in rows if row.job}


def select(tables, fits):
    """The tables with only the rows for which fits("TITLE HEADING LABEL", job) is true.

    The original model's row stays where another one does. Tables and headed blocks without rows are
    dropped.
    """
    selected = []
    for table in tables:
        blocks = []
        for block in table.blocks:
            words = f"{table.title} {block.heading}"
            rows = [r for r in block.rows if not r.job or fits(f"{words} {r.label}", r.job)]
            if any(row.job for row in rows) or not block.heading:
                blocks.append(block._replace(rows=rows))
        table = table._replace(blocks=blocks)
        if jobs_of([table]):
            selected.append(table)
    return selected


# ---- 4. running ---------------------------------------------------------------------------------


def command_lines(args, job, seed):
    """([flags of the training], [flags of eval.py]) of one seed."""
    out = f"{args.runs / job.name}-{seed}"
    train = [*job.flags, "--seed", str(seed), "--out", out]
    score = [*job.score, "--after", out, "--seed", str(seed)]
    if args.steps and takes(job.script, job.flags, "steps"):  # a closed form has none
        train += ["--steps", str(args.steps)]
    if args.num_images:
        score += ["--num-images", str(args.num_images)]
    return train, score


def command_texts(job, train, score):
    """The two command lines as a user types them."""
    start = f"torchrun {job.script}.py"
    if job.script.startswith("baselines."):  # baselines run in one process
        start = f"python -m {job.script}"
    return [f"{start} {shlex.join(train)}", f"python eval.py {shlex.join(score)}"]


def run(args, job, seed):
    """Trains and evaluates one seed of a row, unless that is done. Returns its report.

    The commands, the seconds of both parts and the number of threads are recorded in
    reproduce.json. Under torchrun, every process comes here.
    """
    train, score = command_lines(args, job, seed)
    texts = command_texts(job, train, score)
    out = args.runs / f"{job.name}-{seed}"
    record_file, report_file = out / "reproduce.json", out / "report.json"
    record = {"commands": texts, "seconds": [0, 0]}
    if record_file.exists():
        record = json.loads(record_file.read_text())
    elif report_file.exists():
        record["commands"] = None  # an evaluation that this driver did not run
    if record["commands"] != texts:
        fail(f"{out} holds a run of other flags; choose another --runs")

    if not report_file.exists():
        print(f"\n$ {texts[0]}")
        train_once(job, train, out, record)
        print(f"$ {texts[1]}")
        began = time.time()
        score += ["--cache", str(args.runs / "before")]  # the original model's images
        evaluation.evaluate(evaluation.parse_args(score))
        record["seconds"][1] = round(time.time() - began)
        save_record(out, record)
    while not report_file.exists():  # under torchrun, the first process writes it
        time.sleep(1)
    return json.loads(report_file.read_text()) | json.loads(record_file.read_text())


def train_once(job, train, out, record):
    """Runs the training of a job, unless its result is there, and records its seconds.

    A baseline trains in the first process; the others wait for it in the evaluation. Our scripts
    resume an interrupted run.
    """
    if any((out / result).exists() for result in baselines.RESULTS):
        return
    script = SCRIPTS[job.script]
    is_baseline = job.script.startswith("baselines.")
    if is_baseline and rank() != 0:
        return
    began = time.time()
    script.unlearn(script.parse_args(train if is_baseline else [*train, "--resume"]))
    record["seconds"][0] += round(time.time() - began)
    save_record(out, record)


def save_record(out, record):
    """Writes reproduce.json, in the first process."""
    if rank() == 0:
        text = json.dumps(record | {"threads": torch.get_num_threads()}, indent=1)
        atomic_save(out / "reproduce.json", text=text)


def rank():
    """The number of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def write_outside_image(path):
    """An image that emoji/ddpm was not trained on: twemoji's sun with face, from the sheet.

    Made as the images of emoji/creatures are.
    """
    sheet = json.loads((REPO / "emoji/images/emoji.json").read_text())
    k = [emoji["name"] for emoji in sheet["emoji"]].index("sun with face")
    x, y = k % 20 * 64, k // 20 * 64  # 20 in a row, 64 pixels each
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(REPO / "emoji/images/twemoji.png") as image:
        tile = image.convert("RGB").crop((x, y, x + 64, y + 64))
        tile.resize((32, 32), Image.LANCZOS).save(path)


# ---- 5. from reports to cells -------------------------------------------------------------------

Cell = namedtuple("Cell", "text rank")  # rank: 0 for the best of its block, 1 the second, or None


def metric_value(report, column, when):
    """A metric of one seed, or None where its report has none. when: "before" or "after"."""
    if report["task"] == "concept":
        parts = report["prompt_types" if column in TYPE_COLUMNS else "concepts"]
        part = parts.get(column.group)
        return part and part[when].get(column.metric)
    if column.metric == "similarity":  # of several images, that of the one forgotten least
        return max((image[when] for image in report["images"]), default=None)
    value = report[column.metric.lower()]
    return None if isinstance(value, str) else value  # a text says why it was skipped


def direction(column, erased):
    """+1 where more is better, -1 where less is. erased: the groups that a block erases."""
    if column.metric in ("CS", "CA"):
        return -1 if column.group in (*erased, OOD.group) else 1
    if column.metric == "FID":  # far from the original model's images, if the concept is erased
        return 1 if column.group in erased else -1
    return 1 if column.metric == "SSIM" else -1


def summary(values):
    """[numbers or None] -> (mean, sample standard deviation or None); None without numbers."""
    values = [v for v in values if v is not None]
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def digits(column):
    """Decimals of a metric."""
    if column.metric in ("similarity", "distance", "SSIM"):
        return 3
    return 2 if column.metric.startswith("FID_") else 1


def mean_of_row(row, column, reports):
    """The summary of a column over the seeds of a row. reports: {job name: [report per seed]}."""
    if row.job:
        return summary([metric_value(r, column, "after") for r in reports[row.job.name]])
    if column in TYPE_COLUMNS:
        return None
    every = [r for seeds in reports.values() for r in seeds]
    return summary([metric_value(r, column, "before") for r in every])


def ranks(means, column, erased):
    """The rank of each mean, None for None. Equal means share a rank; if all are equal: no ranks."""
    sign, n = direction(column, erased), digits(column)
    scores = [None if m is None else round(sign * m[0], n) for m in means]
    best = sorted({s for s in scores if s is not None}, reverse=True)
    if len(best) < 2:
        return [None] * len(means)
    return [best.index(s) if s in best[:2] else None for s in scores]


def cell_text(row, column, mean, reports):
    """A cell: "mean ± deviation", before it the value before unlearning where rows differ in it."""
    if mean is None:
        return "–"
    n = digits(column)
    text = f"{mean[0]:.{n}f}"
    if row.job is None:
        return text
    if mean[1] is not None:
        text += f" ± {mean[1]:.{n}f}"
    seeds = reports[row.job.name]
    if column in TYPE_COLUMNS or column.metric == "similarity":
        before = summary([metric_value(r, column, "before") for r in seeds])[0]
        text = f"{before:.{n}f} → {text}"
    if column.metric == "similarity":
        values = [metric_value(r, column, "after") for r in seeds]
        text = f"{sum(v < 0.4 for v in values)}/{len(values)} ({text})"
    return text


def cells(table, reports):
    """The blocks of a table, with rows [(label, [Cell of each column])]."""
    blocks = []
    for block in table.blocks:
        columns = []
        for column in table.columns:
            means = [mean_of_row(row, column, reports) for row in block.rows]
            texts = [
                cell_text(row, column, mean, reports)
                for row, mean in zip(block.rows, means, strict=True)
            ]
            competing = [
                mean if row.job else None for row, mean in zip(block.rows, means, strict=True)
            ]
            columns.append(list(map(Cell, texts, ranks(competing, column, block.erased))))
        labels = [row.label for row in block.rows]
        blocks.append(block._replace(rows=list(zip(labels, zip(*columns), strict=True))))
    return blocks


# ---- 6. writing ---------------------------------------------------------------------------------


def markdown(table, blocks):
    """The lines of a Markdown table. blocks: of cells().

    The arrows stand in the header, or beside the headings where they turn from block to block.
    """
    fixed = all(not block.erased for block in blocks)

    def arrow(column, erased):
        return "↑" if direction(column, erased) > 0 else "↓"

    def line(first, texts):
        return f"| {first} |" + "|".join(f" {text} " for text in texts) + "|"

    names = []
    for column in table.columns:
        name = f"{column.group}: {column.metric}" if column.group else column.metric
        name = name.replace("similarity", "similarity < 0.4")
        names.append(f"{name} {arrow(column, [])}" if fixed else name)
    lines = [f"## {table.title}", "", line("", names), "|---|" + "---|" * len(names)]
    for block in blocks:
        if block.heading:
            arrows = ["" if fixed else arrow(c, block.erased) for c in table.columns]
            lines.append(line(f"*{block.heading}*", arrows))
        for label, row in block.rows:
            marks = {0: "**{}**", 1: "<u>{}</u>", None: "{}"}
            lines.append(line(label, [marks[cell.rank].format(cell.text) for cell in row]))
    return lines


def trade_off_axes(table):
    """(name of x, name of y, threshold of x or None): forgetting and preservation in a trade-off."""
    if Column("", "SSIM") in table.columns:
        return "similarity (forgetting: left)", "SSIM (preservation: up)", 0.4
    return "CS of erased concepts (left)", "CS of unrelated concepts (up)", None


def trade_off_point(table, report):
    """(x, y) of one seed, or None where all concepts of the table are erased."""
    if Column("", "SSIM") in table.columns:
        names = ("similarity", "SSIM")
        return tuple(metric_value(report, Column("", name), "after") for name in names)
    scores = {"target": [], "unrelated": []}
    for concept in report["concepts"].values():
        if concept["type"] in scores:
            scores[concept["type"]].append(concept["after"]["CS"])
    return tuple(map(statistics.mean, scores.values())) if all(scores.values()) else None


def trade_off_points(table, reports):
    """[(label, heading, [(x, y) of each seed])] of the rows that compete, for plots.trade_off."""
    blocks = [block for block in table.blocks if len(block.rows) > 1]
    points = []
    for block in blocks or table.blocks:
        for row in block.rows:
            seeds = [trade_off_point(table, r) for r in reports[row.job.name]] if row.job else []
            if seeds and all(seeds):
                points.append((row.label, block.heading, seeds))
    return points


def draw_trade_offs(args, name, tables, reports):
    """Writes a figure per table. Returns the names of the files."""
    files = []
    for k, table in enumerate(tables):
        points = trade_off_points(table, reports)
        if len(points) > 1:
            file = f"{name}-trade-off{f'-{k + 1}' if k else ''}.png"
            plots.trade_off(points, *trade_off_axes(table)[:2], args.out / file, trade_off_axes(table)[2])
            files.append(file)
    return files
