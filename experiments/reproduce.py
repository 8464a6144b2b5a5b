"""The papers' tables, in miniature: trains, evaluates and writes them, on the embedded models.

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

The sections:

    1. jobs              the command lines of a row
    2. DoCo              its tables: data and rows
    3. instances         the tables of instance unlearning
    4. all tables        their names, their jobs, a part of them
    5. running           one seed of one row: train, evaluate, record
    6. cells             from reports to texts and ranks
    7. figures           trade-offs and samples
    8. writing           the Markdown file
    9. the program       flags and main
"""

import argparse
import functools
import itertools
import json
import os
import random
import re
import shlex
import socket
import statistics
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

import baselines
import doco
import eval as evaluation
import instance_unlearn
import plots
from common import REPO, HelpFormatter, atomic_save, fail, pick_device

SCRIPTS = {"doco": doco, "instance_unlearn": instance_unlearn}
SCRIPTS |= {f"baselines.{name}": module for name, module in baselines.methods().items()}

# A table has blocks, and a block has rows: the methods that compete at the same task.
Table = namedtuple("Table", "title columns blocks")

# heading: a text, may be empty. erased: the concepts that the rows of the block erase; in their
# columns less is better, where more is better elsewhere.
Block = namedtuple("Block", "heading erased rows")

# job: how the row is run, or None for the original model, which is not run
Row = namedtuple("Row", "label job")

# group: a concept or a prompt type, and "" for images. metric: as in the header of the table
Column = namedtuple("Column", "group metric")

# name: of the run folder, without the seed. script: a key of SCRIPTS. flags: of that script.
# score: the flags of eval.py. What differs from seed to seed is added by command_lines.
Job = namedtuple("Job", "name script flags score")

ORIGINAL = Row("original", None)
MEAN = Row("mean of the images", None)  # of the other rows of its block


# ---- 1. jobs ------------------------------------------------------------------------------------
# Two jobs with the same flags have the same name: what several tables show runs once. So a flag at
# its default is left out, where the row is the method's own setting.


def slug(*words):
    """The name of a run folder: lower case, digits and dots, all else as hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")


def takes(script, flags, setting):
    """Whether a script has a setting ("steps" for --steps). flags: a valid command line of it.

    So the driver need not know which baseline lacks which flag.
    """
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
    """The job that erases concepts together and measures what becomes of them and of others.

    erased, unrelated: [(name, anchor)]. flags: of the script, beside the concepts. style: they are
    styles, which share one anchor.
    """
    targets = [name for name, _ in erased]
    anchors = [anchor for _, anchor in erased]
    concepts = ["--target", *targets, "--anchor", *(anchors[:1] if style else anchors)]
    if style:
        concepts += ["--concept-type", "style"]
    before = "CompVis/stable-diffusion-v1-4" if args.paper else "emoji/sd"
    model = ["--model", before] if args.paper else []
    score = ["concept", "--before", before, *concepts]
    score += ["--unrelated", *(name for name, _ in unrelated)]
    if args.paper:  # DoCo measures with CLIP's 80 templates and Inception-v3
        score += ["--templates", "imagenet", "--num-images", "10", "--features", "inception"]
    else:  # styles have three times as many prompts
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
    """([files to unlearn], [their edits, or None for the script's own surrogate]).

    which: a key of SMALL_IMAGES, "outside", or the name of one of CREATURES.
    """
    if which not in ("outside", *SMALL_IMAGES):
        return [f"{CREATURES}/{which}.png"], None
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
    # The name follows the flags that were asked for; those added below follow from `which`.
    name = slug(script.removeprefix("baselines.").replace("_unlearn", ""), which, *flags)
    flags = list(flags)
    files, edits = forget_files(args, which)
    forget = ["--forget", *files]
    real = f"{args.data}/celebahq" if args.paper else CREATURES
    before = "google/ddpm-celebahq-256" if args.paper else "emoji/ddpm"
    model = ["--model", before] if args.paper else []
    # DUO remembers nothing but pure noise, and only two methods take a surrogate: ask the script.
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


# ---- 2. DoCo ------------------------------------------------------------------------------------

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

# The columns of forgetting and preservation by prompt type alone, so that rows of different targets
# have the same ones. H is eval.py's: the harmonic mean of what was forgotten and what was kept.
BALANCE_COLUMNS = [
    Column("", "H"),
    *(Column(kind, "CA") for kind in ("target", "ood", "composed", "related", "unrelated")),
    *(Column(kind, "FID") for kind in ("anchor", "related", "unrelated")),
]


def objects(args):
    """[(name, anchor)] of the three instances of DoCo's tables."""
    return PAPER_OBJECTS if args.paper else SMALL_OBJECTS


def concept_columns(concepts, type_columns=TYPE_COLUMNS):
    """CS, CA and FID of each concept, then the columns by prompt type."""
    columns = [Column(name, metric) for name, _ in concepts for metric in ("CS", "CA", "FID")]
    return [*columns, *type_columns]


def concept_rows(args, erased, unrelated, own=False, style=False):
    """Rows: every baseline, then DoCo. own: the baselines with their papers' steps and batch.

    Otherwise a baseline has, on small models, the 250 steps of 8 that DoCo has, and a learning rate
    that was chosen for it (doco-rates); at the papers' size, its paper's settings.
    """
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
        """A run of doco.py with some flags."""
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


# --retain distill was tuned on the first; the others are reported. All with their anchors.
TUNED_OBJECT = ("panda", "bear")
BALANCE_OBJECTS = [
    ("Grumpy Cat", "Cat"),
    ("enraged face", "face"),
    ("flag of japan", "flag"),
    ("pizza", "food"),
    ("shark", "fish"),
]
BALANCE_STYLE = ("twemoji", "emoji")
# Concepts that no row of the table erases or reports; baselines that take a list get it, too.
RETAIN_PROMPTS = ["--retain-prompts", "experiments/retain-prompts.txt"]
# The templates of doco.py, and eight in styles; none of these is a style that is reported.
STYLED_PROMPTS = ["--prompts", "experiments/prompts-styles.txt"]
DISTILL = ["--retain", "distill"]


def balance_job(erased, *flags, script="doco", style=False, model="emoji/sd"):
    """The job that erases concepts, [(name, anchor)], for BALANCE_COLUMNS; small models alone."""
    if model != "emoji/sd":
        # As a flag it is part of the folder's name, so that two models share no folder.
        flags = ["--model", model, *flags]
    job = concept_job(
        argparse.Namespace(paper=False), erased, [], *flags, style=style, script=script
    )
    # eval.py chooses the unrelated concepts, none of which is among the retained prompts. At the
    # papers' size, nothing is known of related concepts and OOD prompts, and there is no H.
    score = job.score[: job.score.index("--unrelated")]
    score[score.index("--before") + 1] = model
    score += ["--num-images", "2" if style else "4"]
    return job._replace(name=f"balance-{job.name}", score=score)


def balance_rows(erased, style=False):
    """Rows: every baseline, with the list of prompts too if it takes one; then DoCo.

    Of several concepts at once, and of a style, DoCo alone.
    """
    how = {"style": style}
    rows = []
    for script, entry in baseline_rows("concept") if len(erased) == 1 and not style else []:
        job = balance_job(erased, *entry["flags"], script=script, **how)
        rows.append(Row(entry["label"], job))
        if takes(script, job.flags, "retain_prompts"):
            flags = [*entry["flags"], *RETAIN_PROMPTS]
            job = balance_job(erased, *flags, script=script, **how)
            rows.append(Row(f"{entry['label']}, prompts", job))
    rows.append(Row("DoCo", balance_job(erased, **how)))
    rows.append(Row("DoCo, distill", balance_job(erased, *DISTILL, **how)))
    flags = [*DISTILL, *RETAIN_PROMPTS]
    rows.append(Row("DoCo, distill, prompts", balance_job(erased, *flags, **how)))
    if not style:
        flags = [*DISTILL, *STYLED_PROMPTS]
        rows.append(Row("DoCo, distill, styles", balance_job(erased, *flags, **how)))
    return rows


def doco_balance(args):
    """Forgetting against preservation: --retain distill and the baselines, on nine erasures."""
    if args.paper:
        return []
    erasures = [[TUNED_OBJECT], *([concept] for concept in BALANCE_OBJECTS)]
    erasures += [BALANCE_OBJECTS[:2], BALANCE_OBJECTS[:3]]  # two and three at once
    blocks = []
    for erased in erasures:
        heading = f"Erasing {' and '.join(name for name, _ in erased)}"
        if erased == [TUNED_OBJECT]:
            heading += ", on which distill was tuned"
        blocks.append(Block(heading, [], balance_rows(erased)))
    rows = balance_rows([BALANCE_STYLE], style=True)
    blocks.append(Block(f"Erasing the style {BALANCE_STYLE[0]}", [], rows))
    return [Table("Forgetting and preservation", BALANCE_COLUMNS, blocks)]


# emoji/sd3 does not draw the grumpy cat (its CA is 0 before anything is erased). On the first its
# learning rate was chosen; the others are reported.
TRANSFORMER_OBJECTS = [("enraged face", "face"), ("flag of japan", "flag"), ("pizza", "food")]
# On emoji/sdxl nothing was chosen: its settings are those of emoji/sd.
XL_OBJECTS = [("Grumpy Cat", "Cat"), *TRANSFORMER_OBJECTS[:2]]


def family_table(title, model, headings):
    """DoCo on another model than emoji/sd. headings: {heading: (concept, anchor)}."""
    blocks = []
    for heading, concept in headings.items():
        job = functools.partial(balance_job, [concept], model=model)
        rows = [Row("DoCo", job()), Row("DoCo, distill", job(*DISTILL))]
        blocks.append(Block(heading, [], rows))
    return [Table(title, BALANCE_COLUMNS, blocks)]


def doco_sd3(args):
    """DoCo on a transformer that was trained by flow matching."""
    first, *others = TRANSFORMER_OBJECTS
    headings = {f"Erasing {first[0]}, on which the rate was chosen": first}
    headings |= {f"Erasing {concept[0]}": concept for concept in others}
    title = "DoCo on Stable Diffusion 3, a LoRA: emoji/sd3"
    return [] if args.paper else family_table(title, "emoji/sd3", headings)


def doco_sdxl(args):
    """DoCo on a UNet with two text encoders that is told the size of the image."""
    headings = {f"Erasing {concept[0]}": concept for concept in XL_OBJECTS}
    title = "DoCo on Stable Diffusion XL: emoji/sdxl"
    return [] if args.paper else family_table(title, "emoji/sdxl", headings)


def doco_ablation(args):
    """Each ingredient of --retain distill alone, on the concept that it was tuned on."""
    if args.paper:
        return []
    # One thing at a time changes: how G_r enters, how much it counts, what is trained, and what is
    # retained beside the anchor. The null space constrains the weights, in place of the gradient;
    # there L_r is the paper's.
    settings = {
        "Eq. 10 on the noise target (DoCo)": [],
        "distill: Eq. 10 and the normalized sum": DISTILL,
        "the sum without Eq. 10": [*DISTILL, "--lam", "0"],
        "Eq. 10 on AdamW's step": [*DISTILL, "--project", "step"],
        "weight 0.3": [*DISTILL, "--retain-weight", "0.3"],
        "weight 3": [*DISTILL, "--retain-weight", "3"],
        "a larger rate": [*DISTILL, "--lr", "5e-4"],
        "the whole UNet": [*DISTILL, "--train-method", "full", "--lr", "5e-5"],
        "prompts of a list": [*DISTILL, *RETAIN_PROMPTS],
        "prompts of a list, weight 0.3": [*DISTILL, *RETAIN_PROMPTS, "--retain-weight", "0.3"],
        "words of the vocabulary": [*DISTILL, "--retain-prompts", "vocabulary"],
        "null space of the list, 0.9": ["--null-space", "0.9", *RETAIN_PROMPTS],
        "null space of the list, 0.99": ["--null-space", "0.99", *RETAIN_PROMPTS],
    }
    rows = [Row(label, balance_job([TUNED_OBJECT], *flags)) for label, flags in settings.items()]
    title = f"What --retain distill is made of: erasing {TUNED_OBJECT[0]}"
    return [Table(title, BALANCE_COLUMNS, [Block("", [], rows)])]


def sweep_rows(entry, make_job):
    """A row per value that was tried for a method of concepts. make_job: flags -> Job.

    Every value is named, the default too: no folder changes its meaning when a default does.
    """
    flag, *values = entry["tried"]
    rows = []
    for value in values:
        rows.append(Row(f"{flag} {value}", make_job(*entry["flags"], flag, value)))
    return rows


def doco_rates(args):
    """What was tried for the baselines on the grumpy cat."""
    if args.paper:
        return []
    three = objects(args)
    blocks = [Block("", [], [ORIGINAL])]
    for script, entry in baseline_rows("concept", "rates"):
        job = functools.partial(concept_job, args, three[:1], three[1:], script=script)
        blocks.append(Block(entry["label"], [three[0][0]], sweep_rows(entry, job)))
    title = "The baselines' rates, tried on Grumpy Cat"
    return [Table(title, concept_columns(three), blocks)]


# The strengths of our own method: how fast it unlearns, how much it retains.
DOCO_STRENGTHS = [
    {"label": "DoCo", "flags": [], "tried": ("--lr", "3e-5", "6e-5", "1.5e-4")},
    {
        "label": "DoCo, distill",
        "flags": DISTILL,
        "tried": ("--retain-weight", "0.1", "0.3", "1", "3"),
    },
]


def doco_trade_off(args):
    """Forgetting against preservation as the strength of every method varies: a curve for each."""
    if args.paper:
        return []
    entries = [*baseline_rows("concept", "rates"), *(("doco", entry) for entry in DOCO_STRENGTHS)]
    blocks = []
    for script, entry in entries:
        job = functools.partial(balance_job, BALANCE_OBJECTS[:1], script=script)
        blocks.append(Block(entry["label"], [], sweep_rows(entry, job)))
    return [Table("Forgetting against preservation, of Grumpy Cat", BALANCE_COLUMNS, blocks)]


# ---- 3. instances -------------------------------------------------------------------------------

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
    edited_at_random = instance_job(args, which, "--surrogate", "random", *flags)
    distilled = instance_job(args, which, *flags, *DISTILLED_FLAGS)
    rows += [Row(RANDOM, edited_at_random), Row(OURS, instance_job(args, which, *flags))]
    return [*rows, Row(DISTILLED, distilled)]


def own_rows(args, which, only=None):
    """Rows: every baseline with the steps, batch and recipe of its paper, then our method.

    only: the labels of the baselines that are wanted, or None for all.
    """
    rows = []
    for script, entry in baseline_rows("instance"):
        if only is None or entry["label"] in only:
            flags = [*entry["flags"], *entry["paper"]]
            rows.append(Row(entry["label"], instance_job(args, which, *flags, script=script)))
    edited_at_random = instance_job(args, which, "--surrogate", "random")
    distilled = instance_job(args, which, *DISTILLED_FLAGS)
    rows += [Row(RANDOM, edited_at_random), Row(OURS, instance_job(args, which))]
    return [*rows, Row(DISTILLED, distilled)]


def instance_table1(args):
    """One image, and four in sequence.

    Without --paper, there are blocks in which all methods have the same steps, batch and recipe:
    the papers' settings differ in more than the method. They are repeated on another image, for the
    rates were chosen on the first.
    """
    blocks = [Block("steps and batch of their papers", [], own_rows(args, "one"))]
    if not args.paper:
        images = {
            "one": "240 steps of 8 for all",
            "another": "another image, on which no rate was chosen",
        }
        for which, title in images.items():
            for recipe, (description, _) in RECIPES.items():
                rows = equal_rows(args, which, recipe)
                blocks.append(Block(f"{title}; {description}", [], rows))
    four = own_rows(args, "four", None if args.paper else FOUR_BASELINES)
    title = "Instance unlearning, Table I"
    return [
        Table(f"{title}: a single instance", INSTANCE_COLUMNS, blocks),
        Table(f"{title}: four instances, in sequence", INSTANCE_COLUMNS, [Block("", [], four)]),
    ]


DISTILLED = "ours, distilled"
DISTILLED_FLAGS = ["--remember-loss", "distill"]


def instance_images(args):
    """Twenty images drawn at random from the training set: the two targets of remembering.

    By the script's defaults, which were chosen on the cowboy; none of the images that any other
    table unlearns is among them.
    """
    if args.paper:
        return []
    # Drawn and not chosen, so that nobody can have tuned on them, and sorted first: the order of a
    # folder's files depends on the machine.
    stems = sorted(f.stem for f in (REPO / CREATURES).glob("*.png") if f.stem not in EDITS)
    drawn = random.Random(0).sample(stems, 20)
    targets = {
        "the noise, Eq. 8": [],
        "the original model's prediction": DISTILLED_FLAGS,
        "the same, of the model's own samples": [*DISTILLED_FLAGS, "--remember", "generated"],
    }
    blocks = []
    for heading, flags in targets.items():
        rows = [Row(stem, instance_job(args, stem, *flags)) for stem in drawn]
        blocks.append(Block(f"remembering {heading}", [], [*rows, MEAN]))
    title = "Instance unlearning: twenty images, what is remembered"
    return [Table(title, INSTANCE_COLUMNS, blocks)]


def instance_rates(args):
    """Every rate of TRIED_RATES under each recipe, with an equal budget."""
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


def ablation(args, title, rows):
    """A table of one block, without heading. rows: [(label, job)].

    Below them, our method with the distilled loss and otherwise its defaults: what the ablated
    setting changes can be compared with what that changes.
    """
    rows = [*rows, (DISTILLED, instance_job(args, "one", *DISTILLED_FLAGS))]
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
            # 0.7 is the default: that row is the run of the other tables
            edit = [] if s == "0.7" else ["--surrogate", "sdedit", "--strength", s]
            rows.append((f"sdedit, strength {s}", instance_job(args, "one", *edit)))
    return ablation(args, "Table II: how strongly the surrogate is edited", rows)


def instance_table3(args):
    """The weight lambda of the surrogate, constant or falling with the timestep."""
    rows = []
    for v in ("0.95", "0.99"):
        rows.append((f"λ = {v}", instance_job(args, "one", "--constant-lambda", v)))
    for v in ("2e-5", "5e-5", "1e-4"):
        flags = [] if v == "5e-5" else ["--beta", v]  # 5e-5 is the default
        rows.append((f"λ = 1 - {v} t", instance_job(args, "one", *flags)))
    return ablation(args, "Table III: λ, constant or falling with the timestep", rows)


def instance_table4(args):
    """Gradient surgery: none; of the forget gradient, the default (Eq. 10); of both gradients."""
    rows = [
        ("no projection", instance_job(args, "one", "--surgery", "none")),
        ("project g_f", instance_job(args, "one")),
        ("project g_f, g_r", instance_job(args, "one", "--surgery", "both")),
    ]
    return ablation(args, "Table IV: which gradient is projected", rows)


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
    return ablation(args, "Table V: how the surrogate is made", rows)


def instance_table6(args):
    """An image that the model was trained on, and one from elsewhere."""
    rows = [
        ("ours, in-domain image", instance_job(args, "one")),
        ("ours, out-of-domain", instance_job(args, "outside")),
    ]
    return ablation(args, "Table VI: an image that the model was not trained on", rows)


# ---- 4. all tables ------------------------------------------------------------------------------

TABLES = {
    "doco-table1": doco_table1,
    "doco-table3": doco_table3,
    "doco-balance": doco_balance,
    "doco-ablation": doco_ablation,
    "doco-sd3": doco_sd3,
    "doco-sdxl": doco_sdxl,
    "instance-table1": instance_table1,
    "instance-table2": instance_table2,
    "instance-table3": instance_table3,
    "instance-table4": instance_table4,
    "instance-table5": instance_table5,
    "instance-table6": instance_table6,
    "doco-rates": doco_rates,
    "doco-trade-off": doco_trade_off,
    "instance-images": instance_images,
    "instance-rates": instance_rates,
}


def jobs_of(tables):
    """{name: Job} of tables. A row that is in several tables is there once."""
    rows = []
    for table in tables:
        for block in table.blocks:
            rows += block.rows
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


# ---- 5. running ---------------------------------------------------------------------------------


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
    reproduce.json. Under torchrun, every process comes here: our scripts and eval.py share the work
    among them.
    """
    train, score = command_lines(args, job, seed)
    texts = command_texts(job, train, score)
    out = args.runs / f"{job.name}-{seed}"
    record_file, report_file = out / "reproduce.json", out / "report.json"
    record = {"commands": texts, "seconds": [0, 0]}
    if record_file.exists():
        record = json.loads(record_file.read_text())
    elif report_file.exists():
        record["commands"] = None  # evaluated by somebody else, with flags that are not known
    if record["commands"] != texts:
        fail(f"{out} holds a run of other flags; choose another --runs")

    if not report_file.exists():
        print(f"\n$ {texts[0]}")
        new_rendezvous()
        train_once(job, train, out, record)
        print(f"$ {texts[1]}")
        new_rendezvous()
        began = time.time()
        # The original model's images are the same for all rows with the same prompts and seed.
        score += ["--cache", str(args.runs / "before")]
        evaluation.evaluate(evaluation.parse_args(score))
        record["seconds"][1] = round(time.time() - began)
        save_record(out, record)
    while not report_file.exists():  # under torchrun, the first process writes it
        time.sleep(1)
    return json.loads(report_file.read_text()) | record


def train_once(job, train, out, record):
    """Runs the training of a job, unless its result is there, and records its seconds.

    Our scripts resume an interrupted run. A baseline starts again, and trains in the first process
    alone; the others go on and wait for it in new_rendezvous.
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
    record["threads"] = torch.get_num_threads()
    if rank() == 0:
        atomic_save(out / "reproduce.json", text=json.dumps(record, indent=1))


def rank():
    """The number of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """The number of processes under torchrun, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


@functools.cache
def torchrun_store():
    """The key-value store that torchrun hosts for its processes. Waits 12 hours for a value."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(hours=12))


RENDEZVOUS = itertools.count()


def new_rendezvous():
    """Lets the next process group meet at a port of its own. Called by all processes, in step.

    The scripts start and end a process group each. All groups of a torchrun job exchange their
    addresses in its store, under the same names: a fast process would read the address that another
    one had in the group before, and connect to nobody. So each group gets a store of its own, which
    the first process hosts. Does nothing without torchrun.
    """
    if world_size() == 1:
        return
    store = torchrun_store()
    key = f"reproduce/{next(RENDEZVOUS)}"
    if rank() == 0:
        with socket.socket() as s:
            s.bind(("", 0))  # 0: any free port
            store.set(key, str(s.getsockname()[1]))
    os.environ["MASTER_PORT"] = store.get(key).decode()  # the others wait for the first
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


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


# ---- 6. cells -----------------------------------------------------------------------------------
# `reports` is {job name: [report of each seed]} from here on: what run() returned.

# text: as printed. rank: 0 for the best of its column in a block, 1 for the second, or None
Cell = namedtuple("Cell", "text rank")


def metric_value(report, column, when):
    """A metric of one seed, or None where its report has none. when: "before" or "after"."""
    if column.metric == "H":  # of the model after unlearning; there is none before
        return report["H"] if when == "after" else None
    if report["task"] == "concept":
        by_type = column.group in evaluation.PROMPT_TYPES
        parts = report["prompt_types" if by_type else "concepts"]
        part = parts.get(column.group)
        return part and part[when].get(column.metric)
    if column.metric == "similarity":  # of several images, that of the one forgotten least
        return max((image[when] for image in report["images"]), default=None)
    value = report[column.metric.lower()]
    return None if isinstance(value, str) else value  # a text says why it was skipped


def direction(column, erased):
    """+1 where more is better, -1 where less is. erased: of the block, names of concepts."""
    if column.metric in ("CS", "CA"):
        # OOD prompts generate the target without naming it: they should fail as well.
        return -1 if column.group in (*erased, "target", "ood", "composed") else 1
    if column.metric == "FID":  # far from the original model's images, if the concept is erased
        return 1 if column.group in erased else -1
    return 1 if column.metric in ("SSIM", "H") else -1


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
    """The summary of a column over the seeds of a row; of the original model, over all reports.

    Every report has measured the original model: on the same prompts, but with its own seed.
    """
    if row.job:
        return summary([metric_value(r, column, "after") for r in reports[row.job.name]])
    if column in TYPE_COLUMNS:  # other prompts for other targets; see TYPE_COLUMNS
        return None
    every = [r for seeds in reports.values() for r in seeds]
    return summary([metric_value(r, column, "before") for r in every])


def ranks(means, column, erased):
    """The rank of each mean in its column. Equal means share one; if all are equal, none has one.

    Equal as printed: a difference that the table does not show gets no mark. means: summaries, or
    None for a row that does not compete.
    """
    sign, n = direction(column, erased), digits(column)
    scores = [None if m is None else round(sign * m[0], n) for m in means]
    best = sorted({s for s in scores if s is not None}, reverse=True)
    if len(best) < 2:
        return [None] * len(means)
    return [best.index(s) if s in best[:2] else None for s in scores]


def cell_text(row, column, mean, reports, by_type=False):
    """A cell: "mean ± deviation", or "before → mean ± deviation" where the rows' befores differ.

    by_type: all columns are by prompt type; then there is no room for the values before.

    The similarity has in front in how many seeds the image counts as forgotten: below 0.4, as in
    the paper.
    """
    if mean is None:
        return "–"
    n = digits(column)
    text = f"{mean[0]:.{n}f}"
    if row.job is None:
        return text + (f" ± {mean[1]:.{n}f}" if row is MEAN and mean[1] is not None else "")
    if mean[1] is not None:
        text += f" ± {mean[1]:.{n}f}"
    seeds = reports[row.job.name]
    if (column in TYPE_COLUMNS and not by_type) or column.metric == "similarity":
        before = summary([metric_value(r, column, "before") for r in seeds])[0]
        text = f"{before:.{n}f} → {text}"
    if column.metric == "similarity":
        values = [metric_value(r, column, "after") for r in seeds]
        text = f"{sum(v < 0.4 for v in values)}/{len(values)} ({text})"
    return text


def sorted_by_h(rows, reports):
    """The rows, the largest mean H first; those without one (a style) stay as they are, last."""

    def h(row):
        """The mean H of a row over its seeds."""
        mean = mean_of_row(row, BALANCE_COLUMNS[0], reports)
        return mean[0] if mean else -1

    return sorted(rows, key=h, reverse=True)


def cells(table, reports):
    """The blocks of a table, with rows [(label, [Cell of each column])].

    The original model does not compete: it has cells, but no rank. Rows that have an H are sorted
    by it.
    """
    blocks = []
    by_type = table.columns == BALANCE_COLUMNS
    for block in table.blocks:
        if by_type:
            block = block._replace(rows=sorted_by_h(block.rows, reports))
        columns = []
        for column in table.columns:
            means = [mean_of_row(row, column, reports) for row in block.rows]
            # A mean of rows has a deviation too: how much the images differ.
            if block.rows[-1] is MEAN:
                means[-1] = summary([mean[0] for mean in means[:-1] if mean])
            pairs = list(zip(block.rows, means, strict=True))
            texts = [cell_text(row, column, mean, reports, by_type) for row, mean in pairs]
            competing = [mean if row.job else None for row, mean in pairs]
            columns.append(map(Cell, texts, ranks(competing, column, block.erased)))
        labels = [row.label for row in block.rows]
        by_row = zip(*columns, strict=True)
        blocks.append(block._replace(rows=list(zip(labels, by_row, strict=True))))
    return blocks


# ---- 7. figures ---------------------------------------------------------------------------------


def trade_off_point(table, report):
    """(forgetting, preservation) of one seed; None where all concepts of the table are erased.

    Images: similarity to the forget image and SSIM. Concepts: mean CS of the erased and of the
    unrelated ones; by prompt type, CA of target and OOD prompts, and of related ones.
    """
    if table.columns == INSTANCE_COLUMNS:
        names = ("similarity", "SSIM")
        return tuple(metric_value(report, Column("", name), "after") for name in names)
    if table.columns == BALANCE_COLUMNS:
        kinds = ("target", "ood", "related")
        target, ood, related = (metric_value(report, Column(k, "CA"), "after") for k in kinds)
        return None if None in (target, ood, related) else ((target + ood) / 2, related)
    scores = {"target": [], "unrelated": []}
    for concept in report["concepts"].values():
        if concept["type"] in scores:
            scores[concept["type"]].append(concept["after"]["CS"])
    return tuple(map(statistics.mean, scores.values())) if all(scores.values()) else None


def trade_off_points(table, reports):
    """[(label, heading, [(x, y) of each seed])] of the rows that compete, for plots.trade_off.

    Where no block has two rows, the blocks compete.
    """
    blocks = [b for b in table.blocks if sum(row.job is not None for row in b.rows) > 1]
    points = []
    for block in blocks or table.blocks:
        for row in block.rows:
            if row.job:
                seeds = [trade_off_point(table, r) for r in reports[row.job.name]]
                if all(seeds):
                    points.append((row.label, block.heading, seeds))
    return points


def plot_trade_offs(folder, name, tables, reports):
    """A figure per table, where at least two rows compete. Returns the names of the files.

    Less is better on the x axis, and more on the y axis: the best methods are in the upper left.
    """
    files = []
    for k, table in enumerate(tables):
        axes = ("CS of the erased concepts", "CS of the unrelated concepts")
        threshold = None
        if table.columns == INSTANCE_COLUMNS:
            axes = ("similarity to the forget image", "SSIM of the other images")
            threshold = 0.4  # below it, the image counts as forgotten
        if table.columns == BALANCE_COLUMNS:
            axes = ("CA of target and OOD prompts", "CA of related concepts")
        points = trade_off_points(table, reports)
        if name == "doco-trade-off":  # there a block is a method: one curve, as its strength varies
            points = [(heading, "", seeds) for _, heading, seeds in points]
        # Beyond so many colours or marker shapes, rows could not be told apart
        labels, groups = (len({point[i] for point in points}) for i in (0, 1))
        distinct = labels <= len(plots.COLOURS) and groups <= len(plots.MARKERS)
        if len(points) > 1 and distinct:
            file = f"{name}-trade-off{f'-{k + 1}' if k else ''}.png"
            plots.trade_off(points, *axes, folder / file, threshold)
            files.append(file)
    return files


SAMPLE_SEED = 700_000  # of the first initial noise of a prompt; any number would do
SAMPLE_TYPES = ("target", "ood", "anchor", "related", "unrelated")  # the columns, from left


def competing_rows(tables):
    """The rows of the first block in which several runs compete; [] if there is no such block."""
    for table in tables:
        for block in table.blocks:
            rows = [row for row in block.rows if row.job]
            if len(rows) > 1:
                return rows
    return []


def sample_rows(before, runs, prompts, each=3):
    """[(label, [images])]: what the original model and unlearned ones generate.

    before: the original model. runs: [(label, run folder)]. The same prompts and initial noise for
    all, `each` images per prompt. Under torchrun, every process comes here and generates a part.
    """
    if world_size() > 1:  # sampling shares the work as in eval.py, which has ended its own group
        new_rendezvous()
        dist.init_process_group("gloo")
    texts = [prompt for prompt in prompts for _ in range(each)]
    seeds = [SAMPLE_SEED + k for _ in prompts for k in range(each)]
    grid = []
    for label, folder in [(ORIGINAL.label, None), *runs]:
        sampler = evaluation.Sampler(before, pick_device())
        if folder:
            sampler.load_unlearned(folder)
        images = sampler.sample(texts, seeds, f"samples: {label}")  # (n, 3, H, W)
        grid.append((label, list(images)))
    if world_size() > 1:
        dist.destroy_process_group()
    return grid


def plot_samples(args, name, tables, reports):
    """TABLE-samples.png, for concepts. Returns the names of the files: one, or none."""
    rows = competing_rows(tables)
    if not rows or rows[0].job.score[0] != "concept":
        return []
    runs = []
    for row in rows:
        first_seed = reports[row.job.name][0]
        runs.append((row.label, Path(first_seed["after"])))
    examples = {}  # {type: the first prompt of it}; the rows of a block have the same prompts
    for prompt in first_seed["prompts"]:
        examples.setdefault(prompt["type"], prompt["prompt"])
    prompts = [examples[t] for t in SAMPLE_TYPES if t in examples]
    before = rows[0].job.score[2]  # of --before
    grid = sample_rows(before, runs, prompts)
    if rank() == 0:
        plots.sample_grid(grid, args.out / f"{name}-samples.png", prompts)
    return [f"{name}-samples.png"]


# ---- 8. writing ---------------------------------------------------------------------------------


def markdown(table, blocks):
    """The lines of a Markdown table. blocks: of cells().

    The arrows stand in the header, or beside the headings where they turn from block to block.
    """
    fixed = all(not block.erased for block in blocks)

    def arrow(column, erased):
        """The direction in which a column is better."""
        return "↑" if direction(column, erased) > 0 else "↓"

    def line(first, texts):
        """A row of the table."""
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


def either(values):
    """[3, 3, 6] -> "3 or 6"."""
    return " or ".join(map(str, sorted(set(values))))


def about_reports(args, reports):
    """The sentences above a table: what was averaged, and which networks evaluated it."""
    every = [r for seeds in reports.values() for r in seeds]
    first = every[0]
    n_seeds = either(len(seeds) for seeds in reports.values())
    seeds = "One seed" if n_seeds == "1" else f"Mean ± sample standard deviation of {n_seeds} seeds"
    n_images = f"{either(r['n'] for r in every if 'n' in r)} images"
    if first["task"] == "concept":
        n_images = f"{either(r['images_per_prompt'] for r in every)} images per prompt"
    networks = []
    for key in ("clip", "fid_features", "copy_detector", "distance_features"):
        if isinstance(first.get(key), dict):  # a text says why there is none
            network = first[key]
            networks.append(f"{key.replace('_', ' ')} {network['name']} ({network['sha256']})")
    lines = [
        f"{seeds} of training and sampling; {n_images}, before and after from the same noise. Best "
        f"in bold, second best underlined where rows compete. Evaluation networks: "
        f"{'; '.join(networks)}.",
        "",
    ]
    if not args.paper:
        lines += [
            "These are figures of small models, with images of 32 or 64 pixels and small "
            "evaluation networks: they can be compared with each other, not with the papers'.",
            "",
        ]
    return lines


def about_time(reports):
    """A sentence below a table: the minutes per seed, and on what."""
    minutes = []
    for part in (0, 1):
        means = [statistics.mean(r["seconds"][part] for r in rs) / 60 for rs in reports.values()]
        minutes.append(f"{min(means):.1f} to {max(means):.1f}")
    threads = either(r["threads"] for seeds in reports.values() for r in seeds)
    device = "a GPU" if torch.cuda.is_available() else "no GPU"
    return (
        f"A row's training took {minutes[0]} minutes per seed, its evaluation {minutes[1]} "
        f"(wall time, threads: {threads}, {device})."
    )


def write(args, name, tables, reports):
    """Writes the table and its figures into args.out. reports: {job name: [report per seed]}.

    Under torchrun, every process comes here to generate samples; the first one writes.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    # All processes generate samples; only then may the others go on to the next table.
    figures = plot_samples(args, name, tables, reports)
    if rank() != 0:
        return
    figures += plot_trade_offs(args.out, name, tables, reports)
    lines = [f"# {name}, {'at the papers’ size' if args.paper else 'in miniature'}", ""]
    for file in figures:
        kind = "samples" if file.endswith("samples.png") else "trade-off"
        lines += [f"![{kind}]({file})", ""]
    lines += about_reports(args, reports)
    missing = [job for job in jobs_of(TABLES[name](args)) if job not in reports]
    if missing:
        lines += [f"Missing, because not run or not asked for: {', '.join(missing)}.", ""]
    for table in tables:
        lines += [*markdown(table, cells(table, reports)), ""]
    lines += [about_time(reports), ""]
    print("\n".join(lines))  # all but the commands, which fill a screen
    commands = [text for seeds in reports.values() for text in seeds[0]["commands"]]
    lines += ["The commands of seed 0:", "", "```bash", *dict.fromkeys(commands), "```", ""]
    atomic_save(args.out / f"{name}.md", text="\n".join(lines))
    print("written:", ", ".join(str(args.out / file) for file in [f"{name}.md", *figures]))


# ---- 9. the program -----------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.reproduce", description=__doc__, formatter_class=HelpFormatter
    )
    add = p.add_argument_group("what").add_argument
    add("table", nargs="?", choices=(*TABLES, "all"), metavar="TABLE", help="see --list")
    add("--list", action="store_true", help="print the names and titles of the tables")
    add("--rows", default="", metavar="TEXT", help="only rows whose title, heading or label has it")
    add("--finished", action="store_true", help="only the runs that are finished; runs nothing")
    add("--dry-run", action="store_true", help="print the commands, run nothing")
    add = p.add_argument_group("size").add_argument
    add("--seeds", type=int, help="how many: 0, 1, ... (without it: 3; rates 1; --paper 6)")
    add("--steps", type=int, help="of every training, for a quick look (without it: the scripts')")
    add("--num-images", type=int, help="of eval.py, for a quick look")
    add("--paper", action="store_true", help="the papers' models and sizes; needs a GPU and --data")
    add = p.add_argument_group("folders").add_argument
    add("--data", type=Path, default=Path("paper-data"), help="with --paper: images and networks")
    add("--runs", type=Path, help="of the runs (without it: runs/reproduce; --paper runs/paper)")
    add("--out", type=Path, default=Path("experiments/results"), help="of the tables")
    return p.parse_args(argv)


def chosen_tables(args):
    """{name: [Table]} of what the flags ask for; fails if that is nothing."""
    if args.seeds is not None and args.seeds < 1:
        fail(f"--seeds {args.seeds}: expected at least 1")
    if args.num_images is not None and args.num_images < 2:
        fail(f"--num-images {args.num_images}: expected at least 2")
    if args.table is None:
        fail(f"which table? {', '.join(TABLES)} or all")

    def fits(words, job):
        """Whether a row is one of those that --rows asks for."""
        return args.rows.lower() in words.lower()

    names = TABLES if args.table == "all" else [args.table]
    chosen = {name: select(TABLES[name](args), fits) for name in names}
    chosen = {name: tables for name, tables in chosen.items() if tables}
    if not chosen and args.rows:
        fail(
            f"--rows {args.rows!r}: no such row in {args.table}; "
            f"expected a part of a title, a heading or a label, such as 'Grumpy Cat'"
        )
    if not chosen:
        fail(f"{args.table} exists without --paper alone: no rates were tried at the papers' size")
    return chosen


def print_list(args):
    """The names and titles of all tables."""
    args.runs = Path("runs")
    for name, make in TABLES.items():
        print(f"{name:18}{'; '.join(table.title for table in make(args))}")


def main(args):
    """Runs, or prints, what the flags ask for, table by table."""
    if args.list:
        print_list(args)
        return
    args.runs = args.runs or Path("runs/paper" if args.paper else "runs/reproduce")
    os.chdir(REPO)  # the commands name files of this repository
    for name, tables in chosen_tables(args).items():
        default_seeds = 6 if args.paper else 1 if name.endswith(("rates", "trade-off")) else 3
        seeds = range(args.seeds or default_seeds)
        jobs = list(jobs_of(tables).values())
        if args.dry_run:
            for job in jobs:
                for seed in seeds:
                    print("\n".join(command_texts(job, *command_lines(args, job, seed))))
            continue

        if any(OUTSIDE in flag for job in jobs for flag in job.flags):
            write_outside_image(args.runs / OUTSIDE)
        reports = {}
        for k, job in enumerate(jobs):
            todo = seeds
            if args.finished:
                todo = [seed for seed in seeds if is_finished(args, job, seed)]
            print(f"\n{name}, row {k + 1} of {len(jobs)}: {job.name}, {len(todo)} seeds")
            if todo:
                reports[job.name] = [run(args, job, seed) for seed in todo]

        tables = select(tables, functools.partial(has_report, reports))
        if tables:
            write(args, name, tables, reports)
        else:
            print(f"{name}: no run is finished")


def is_finished(args, job, seed):
    """Whether one seed of a row is trained and evaluated."""
    return (args.runs / f"{job.name}-{seed}" / "report.json").exists()


def has_report(reports, words, job):
    """For select(): whether a job has a report."""
    return job.name in reports


if __name__ == "__main__":
    main(parse_args())
