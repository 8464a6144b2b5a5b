"""The papers' tables, in miniature: trains, measures and writes each of them, on the embedded emoji models.

    python reproduce.py --list                  # what there is
    python reproduce.py instance-table4         # one table: 9 trainings, about a quarter of an hour on two cores
    python reproduce.py all                     # all of them: hours; killed, the same command goes on
    python reproduce.py doco-table1 --rows "Erasing Grumpy Cat" --steps 40 --seeds 1        # a part, at reduced size
    python reproduce.py all --paper --dry-run   # the commands at the papers' size (Stable Diffusion v1.4, DDPM-CelebA-HQ)
    torchrun --nproc-per-node 2 reproduce.py doco-table1 --paper --data paper-data          # run on two GPUs

Every figure comes from the command lines that the table lists: each is parsed and run by its script (doco.py,
instance_unlearn.py, baselines/*.py, then eval.py), in this process. Finished runs are kept in --runs and not run again.
Writes results/TABLE.md and results/TABLE.png: mean +- sample standard deviation over seeds, best in bold and second best
underlined where rows compete, and below them the trade-off between forgetting and keeping (Fig. 10 of the second paper).
Where several methods erase a concept, results/TABLE-pictures.png shows what the models of seed 0 draw.

At the papers' size, --data is a folder with what cannot be downloaded from a hub: celebahq/ (the training pictures),
robin-li.png, kate-del-castillo.png, elva-hsiao.png, ed-harris.png and ffhq.png (256x256, to forget), for each of them an
edited NAME-edited.png, robin-li-edited-W.png for TediGAN's CLIP weights W, inception-2015-12-05.pt and
sscd_disc_mixup.torchscript.pt.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import doco
import eval as evaluation
import instance_unlearn
from baselines import conabl, duo, erasediff, esd, forget_me_not, neggrad, siss, spm, uce
from common import atomic_save, fail

HERE = Path(__file__).resolve().parent
RIVAL_MODULES = (conabl, duo, erasediff, esd, forget_me_not, neggrad, siss, spm, uce)
SCRIPTS = {f"{m.__name__.replace('.', '/')}.py": m for m in (doco, instance_unlearn, *RIVAL_MODULES)}

# A row's run: its folder's name, the script and its flags, and the flags of eval.py. Both get --seed, --out or --after.
Job = namedtuple("Job", "name script flags score")
# Columns are (group, figure) pairs; a block is (heading, the groups that it erases, [(label, job or "original")]).
Table = namedtuple("Table", "title columns blocks")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", nargs="?", choices=(*TABLES, "all"), help="which one")
    p.add_argument("--list", action="store_true", help="say what the tables are")
    p.add_argument("--rows", default="", metavar="TEXT", help="only rows whose title, heading or label contains it")
    p.add_argument("--seeds", type=int, help="how many: 0, 1, ... (default: 3; rates 1, --paper 6)")
    p.add_argument("--steps", type=int, help="iterations of every training, for a quick look (default: each script's own)")
    p.add_argument("--num-images", type=int, help="of eval.py, for a quick look")
    p.add_argument("--paper", action="store_true", help="at the papers' size, with their models; needs a GPU and --data")
    p.add_argument("--data", type=Path, default=Path("paper-data"), help="with --paper: folder of pictures and judges")
    p.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    p.add_argument("--finished", action="store_true", help="write the table of the runs that are finished, run nothing")
    p.add_argument("--runs", type=Path, help="folder of the runs (default: runs/reproduce, with --paper runs/paper)")
    p.add_argument("--out", type=Path, default=Path("results"), help="folder of the tables")
    return p.parse_args(argv)


# ---- 1. the tables: which rows, which commands ------------------------------------------------------------------


def slug(*words):
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")


def doco_job(args, concepts, keep, *flags, style=False, script="doco.py"):
    """concepts, keep: [(name, anchor)]. Erases the former together and measures both."""
    targets, anchors = ([pair[i] for pair in concepts] for i in (0, 1))
    what = ["--target", *targets, "--anchor", *(anchors if not style else anchors[:1])]
    what += ["--concept-type", "style"] if style else []
    model = ["--model", "CompVis/stable-diffusion-v1-4"] if args.paper else []
    score = ["concept", "--before", model[1] if model else "emoji/sd", *what, "--keep", *[name for name, _ in keep]]
    if args.paper:
        score += ["--templates", "imagenet", "--num-images", "10", "--features", str(args.data / "inception-2015-12-05.pt")]
    else:
        score += ["--num-images", "4" if style else "8"]
    return Job(slug(Path(script).stem, *targets, *flags), script, [*model, *what, *flags], score)


# The rivals, and the updates and batch of their papers or released codes. Their defaults on the small model are doco.py's, 250
# updates of 8, and a rate that was chosen on the grumpy cat; at the papers' size, the defaults are their papers'.
RIVALS = {"ESD": ("esd", "--steps", "1000", "--batch-size", "1"), "ConAbl": ("conabl", "--steps", "100"),
          "SPM": ("spm", "--steps", "3000", "--batch-size", "1"), "UCE": ("uce",),
          "Forget-Me-Not": ("forget_me_not", "--steps", "35", "--batch-size", "1")}  # fmt: skip
# What was tried on the small models: on the grumpy cat for concepts. The first of each is the script's default now.
TRIED = {"ESD": ("--lr", "3e-4", "1e-4", "2e-4"), "ConAbl": ("--lr", "1e-4", "3e-5"),
         "SPM": ("--lr", "3e-3", "3e-4", "1e-3"), "UCE": ("--lamb", "50", "0.1", "0.5", "5", "500"),
         "Forget-Me-Not": ("--lr", "3e-6", "1e-5")}  # fmt: skip


def against_rivals(args, concepts, keep, own=False, **kind):
    """Rows: every rival, then DoCo. own: the rivals with the updates and batches of their papers."""
    rows = [(label, doco_job(args, concepts, keep, *(flags if own else ()), **kind, script=f"baselines/{name}.py"))
            for label, (name, *flags) in RIVALS.items()]  # fmt: skip
    return [*rows, ("DoCo, 250 updates of 8" if own else "DoCo", doco_job(args, concepts, keep, **kind))]


def instances(args):
    return [("Snoopy", "Dog"), ("Mickey", "Mouse"), ("Spongebob", "Sponge")] if args.paper else [
        ("Grumpy Cat", "Cat"), ("pizza", "food"), ("flag of japan", "flag")]  # fmt: skip


# Beside the paper's columns: prompts that draw the target without its words, its neighbours, and the anchor itself
OTHERS = [("ood", "CA"), ("related", "CA"), ("anchor", "CS")]


def doco_columns(concepts, others=OTHERS):
    return [(c, figure) for c, _ in concepts for figure in ("CS", "CA", "FID")] + others


def doco_table1(args):
    three, blocks, tables = instances(args), [], []
    fourth = [] if args.paper else [("enraged face", "face")]  # one more kind of stand-in
    for k in (1, 2, 3):  # as the paper: one, two and three instances at once; what is not erased is measured as kept
        names = [name for name, _ in three[:k]]
        rows = against_rivals(args, three[:k], three[k:])
        blocks.append((f"Erasing {' and '.join(names)}", names, rows if args.paper or k == 1 else rows[-1:]))
    for pair in fourth:
        blocks.append((f"Erasing {pair[0]}", [pair[0]], against_rivals(args, [pair], three)))
    if not args.paper:
        name, rows = three[0][0], against_rivals(args, three[:1], three[1:], own=True)
        blocks.append((f"Erasing {name}, rivals with the updates and batch of their papers", [name], rows))
    first = ("", [], [("original", "original")])
    tables.append(Table("DoCo, Table 1: unlearning instances", doco_columns(three + fourth), [first, *blocks]))
    styles, blocks = ("Van Gogh", "Picasso", "Rembrandt") if args.paper else ("noto", "twemoji", "fluent"), []
    pairs = [(style, "painting" if args.paper else "emoji") for style in styles]
    for pair in pairs:
        rows = against_rivals(args, [pair], [p for p in pairs if p != pair], style=True)
        blocks.append((f"Erasing {pair[0]}", [pair[0]], rows if args.paper else rows[-1:]))
    tables.append(Table("DoCo, Table 1: unlearning styles", doco_columns(pairs, OTHERS[::2]), [first, *blocks]))
    return tables


def tried(label):
    """[(label of a row, its flags)] of a rival. Every rate is named: no folder changes its meaning when a default does."""
    flag, *values = TRIED[label]
    return [(f"{flag} {value}", [flag, value]) for value in values]


def doco_rates(args):
    three, blocks = instances(args), [("", [], [("original", "original")])]
    for label, (name, *_) in RIVALS.items():
        job = partial(doco_job, args, three[:1], three[1:], script=f"baselines/{name}.py")
        kind = ["--train", "xattn"] if label == "ESD" else []  # ESD-x, the small models' default
        blocks.append((label, [three[0][0]], [(row, job(*kind, *flags)) for row, flags in tried(label)]))
        if label == "ESD":  # ESD-u, which the paper takes for objects
            rows = [(f"--lr {v}", job("--train", "noxattn", "--lr", v)) for v in ("1e-4", "3e-4", "1e-3")]
            blocks.append(("ESD-u", [three[0][0]], rows))
    return [] if args.paper else [Table("The rivals' rates, tried on Grumpy Cat", doco_columns(three), blocks)]


def doco_table3(args):
    three = instances(args)
    rows = [("original", "original"), ("no retention", doco_job(args, three[:1], three[1:], "--retain", "none")),
            ("L2", doco_job(args, three[:1], three[1:], "--retain", "l2")),
            ("concept-preserving gradient", doco_job(args, three[:1], three[1:])),
            ("the same, of Adam's step", doco_job(args, three[:1], three[1:], "--project", "step"))]  # fmt: skip
    title = "DoCo, Table 3: no retention, L2 loss, concept-preserving gradient"
    return [Table(title, doco_columns(three), [(f"Erasing {three[0][0]}", [three[0][0]], rows)])]


INSTANCE = [("", figure) for figure in ("similarity", "distance", "SSIM", "FID_pre", "FID_real")]
CREATURES = "emoji/creatures"
FOUR = {"twemoji-cowboy-hat-face": "twemoji-thinking-face", "noto-nerd-face": "noto-thinking-face",
        "fluent-star-struck": "fluent-zipper-mouth-face",
        "twemoji-smiling-face-with-sunglasses": "twemoji-zipper-mouth-face"}  # fmt: skip
IDENTITIES = ("robin-li", "kate-del-castillo", "elva-hsiao", "ed-harris")


def instance_job(args, who, *flags, script="instance_unlearn.py"):
    """who: "one", "another", "four" or "outside" (of another data set). Without --surrogate in flags, it is the edit."""
    if args.paper:
        files = {"one": IDENTITIES[:1], "four": IDENTITIES, "outside": ("ffhq",)}[who]
        forget, edited = [[str(args.data / f"{f}{end}.png") for f in files] for end in ("", "-edited")]
        model, real = ["--model", "google/ddpm-celebahq-256"], args.data / "celebahq"
        model += ["--remember", str(real)] if script != "baselines/duo.py" else []  # remembers nothing but pure noise
        score = ["--num-images", "10000", "--features", str(args.data / "inception-2015-12-05.pt"),
                 "--sscd", str(args.data / "sscd_disc_mixup.torchscript.pt")]  # fmt: skip
    else:
        files = {"one": [*FOUR][:1], "another": [*FOUR][1:2], "four": [*FOUR]}.get(who, [])
        forget = [f"{CREATURES}/{f}.png" for f in files] or [str(args.runs / "twemoji-sun-with-face.png")]
        edited = [f"{CREATURES}/{FOUR[f]}.png" for f in files] if who in ("another", "four") else None
        model, real, score = [], CREATURES, []
    name = slug(Path(script).stem.replace("_unlearn", ""), who, *flags)
    if script in ("instance_unlearn.py", "baselines/duo.py"):
        if "--surrogate" not in flags and edited:
            flags = [*flags, "--surrogate", *edited]
        if who == "four" and not args.paper and script == "instance_unlearn.py":
            flags = [*flags, "--beta", "1.5e-4", "--lr", "8e-5"]  # what four need of the small model (README)
    score = ["instance", "--before", model[1] if model else "emoji/ddpm", "--forget", *forget, "--real", str(real), *score]
    return Job(name, script, [*model, "--forget", *forget, *flags], score)


# The rivals of a picture (SISS: at t = 999 alone, or at all t), with the updates and batch of their papers; DUO is not in the
# paper. TRIED_RATES: three rates for every method and each of the two recipes, on the cowboy; the same number for all.
INSTANCE_RIVALS = {"NegGrad": ("neggrad", "--steps", "10"), "EraseDiff": ("erasediff",), "SISS (t = 999)": ("siss",),
                   "SISS (all t)": ("siss", "--full-range"),
                   "DUO": ("duo", "--steps", "1000", "--batch-size", "4")}  # fmt: skip
OURS = "ours"
TRIED_RATES = {"NegGrad": ("3e-7", "1e-6", "5e-6"), "EraseDiff": ("1e-5", "2.5e-5", "6e-5"),
               "SISS (all t)": ("1e-5", "2.5e-5", "6e-5"), "DUO": ("2.5e-5", "6e-5", "1e-4"),
               OURS: ("1e-5", "2.5e-5", "6e-5")}  # fmt: skip
# The two recipes: as in the papers, or with the two remedies that instance_unlearn.py has for small models.
RECIPES = {"plain": ["--lr-scheduler", "constant", "--timestep-sampling", "uniform"],
           "tuned": ["--lr-scheduler", "linear", "--timestep-sampling", "stratified"]}  # fmt: skip
RECIPE_WORDS = {"plain": "constant rate, independent timesteps", "tuned": "falling rate, stratified timesteps"}
EQUAL = ["--steps", "240", "--batch-size", "8"]  # our method's, for all
# What instance-rates chose: by SSIM among the rates that forget the cowboy, else the one that forgets most. Provisional where
# results/instance-rates.md has rows to be run again: EraseDiff and DUO plain, NegGrad and DUO tuned.
CHOSEN = {("NegGrad", "plain"): "1e-6", ("EraseDiff", "plain"): "2.5e-5", ("SISS (all t)", "plain"): "2.5e-5",
          ("DUO", "plain"): "1e-4", (OURS, "plain"): "2.5e-5", ("NegGrad", "tuned"): "1e-6", ("EraseDiff", "tuned"): "6e-5",
          ("SISS (all t)", "tuned"): "6e-5", ("DUO", "tuned"): "1e-4", (OURS, "tuned"): "6e-5"}  # fmt: skip


def instance_method(args, who, label, *flags):
    """The job of a rival or of our method."""
    if label == OURS:
        return instance_job(args, who, *flags)
    name, *own = INSTANCE_RIVALS[label]
    kind = ["--full-range"] if "--full-range" in own else []
    return instance_job(args, who, *kind, *flags, script=f"baselines/{name}.py")


def equal_rows(args, who, recipe):
    """Rows: every method with 240 updates of 8, the recipe, and the rate that was chosen for it under that recipe."""
    rows = []
    for label in (*INSTANCE_RIVALS, OURS):
        rate = ["--lr", CHOSEN["SISS (all t)" if label.startswith("SISS") else label, recipe]]
        flags = [*(EQUAL if label != OURS else []), *RECIPES[recipe], *rate]
        rows.append((label, instance_method(args, who, label, *flags)))
    random = instance_job(args, who, "--surrogate", "random", *RECIPES[recipe], "--lr", CHOSEN[OURS, recipe])
    return [*rows[:-1], ("ours† (random surrogates)", random), rows[-1]]


def own_rows(args, who, rivals=INSTANCE_RIVALS):
    """Rows: every rival with the updates, batch and recipe of its paper, then our method with its own."""
    rows = [(label, instance_job(args, who, *INSTANCE_RIVALS[label][1:], script=f"baselines/{INSTANCE_RIVALS[label][0]}.py"))
            for label in rivals]  # fmt: skip
    random = ("ours† (random surrogates)", instance_job(args, who, "--surrogate", "random"))
    return [*rows, random, (OURS, instance_job(args, who))]


def instance_table1(args):
    four = own_rows(args, "four", rivals=INSTANCE_RIVALS if args.paper else ["NegGrad"])
    blocks = [("updates and batch of their papers", [], own_rows(args, "one"))]
    if not args.paper:
        for recipe, words in RECIPE_WORDS.items():
            blocks.append((f"240 updates of 8 for all; {words}", [], equal_rows(args, "one", recipe)))
        for recipe, words in RECIPE_WORDS.items():
            title = f"another picture, on which no rate was chosen; {words}"
            blocks.append((title, [], equal_rows(args, "another", recipe)))
    return [Table("Instance unlearning, Table I: a single instance", INSTANCE, blocks),
            Table("Instance unlearning, Table I: four instances, one after another", INSTANCE, [("", [], four)])]  # fmt: skip


def instance_rates(args):
    blocks = []
    for recipe in RECIPES:
        for label, rates in TRIED_RATES.items():
            flags = [*(EQUAL if label != OURS else []), *RECIPES[recipe]]
            rows = [(f"--lr {rate}", instance_method(args, "one", label, *flags, "--lr", rate)) for rate in rates]
            blocks.append((f"{label}, 240 updates of 8, {recipe}", [], rows))
    return [] if args.paper else [Table("The rates of all methods, tried on the cowboy", INSTANCE, blocks)]


def one_block(args, title, rows):
    return [Table(f"Instance unlearning, {title}", INSTANCE, [("", [], rows)])]


def instance_table2(args):
    if args.paper:
        rows = [(f"TediGAN, CLIP weight {w}", instance_job(args, "one", "--surrogate", f"{args.data}/robin-li-edited-{w}.png"))
                for w in ("0.5", "1.0", "2.0", "4.0", "8.0", "16.0", "32.0")]  # fmt: skip
    else:  # 0.7 is the default
        rows = [(f"sdedit, strength {s}", instance_job(args, "one", *(["--surrogate", f"sdedit:{s}"] if s != "0.7" else [])))
                for s in ("0.6", "0.7", "0.8", "0.9")]  # fmt: skip
    return one_block(args, "Table II: how strongly the surrogate is edited", rows)


def instance_table3(args):
    rows = [(f"λ = {v}", instance_job(args, "one", "--constant-lambda", v)) for v in ("0.95", "0.99")]
    rows += [(f"λ = 1 - {v} t", instance_job(args, "one", *(["--beta", v] if v != "5e-5" else [])))
             for v in ("2e-5", "5e-5", "1e-4")]  # fmt: skip
    return one_block(args, "Table III: λ, constant or falling with the timestep", rows)


def instance_table4(args):
    rows = [("no projection", instance_job(args, "one", "--surgery", "none")), ("project g_f", instance_job(args, "one")),
            ("project g_f, g_r", instance_job(args, "one", "--surgery", "both"))]  # fmt: skip
    return one_block(args, "Table IV: which gradient is projected", rows)


def instance_table5(args):
    edit = "edit (TediGAN)" if args.paper else "edit (sdedit, strength 0.7)"
    rows = [(edit, instance_job(args, "one")), ("flip", instance_job(args, "one", "--surrogate", "flip"))]
    rows += [(f"add noise (σ = {s})", instance_job(args, "one", "--surrogate", f"noise:{s}")) for s in (50, 150)]
    return one_block(args, "Table V: how the surrogate is made", rows)


def instance_table6(args):
    rows = [("ours, in-domain picture", instance_job(args, "one")), ("ours, out-of-domain", instance_job(args, "outside"))]
    return one_block(args, "Table VI: a picture that the model was not trained on", rows)


TABLES = {"doco-table1": doco_table1, "doco-table3": doco_table3, "instance-table1": instance_table1,
          "instance-table2": instance_table2, "instance-table3": instance_table3, "instance-table4": instance_table4,
          "instance-table5": instance_table5, "instance-table6": instance_table6,
          "doco-rates": doco_rates, "instance-rates": instance_rates}  # fmt: skip


# ---- 2. running: the real command lines, and only what is not done yet ---------------------------------------


def command_lines(args, job, seed):
    """([flags of the training], [flags of eval.py]) of one seed."""
    out = args.runs / f"{job.name}-{seed}"
    train, score = [*job.flags, "--seed", str(seed), "--out", str(out)], [*job.score, "--after", str(out), "--seed", str(seed)]
    if args.steps and job.script != "baselines/uce.py":  # a formula
        train += ["--steps", str(args.steps)]
    if args.num_images:
        score += ["--num-images", str(args.num_images)]
    return train, score


def as_text(job, train, score):
    start = "python" if job.script.startswith("baselines") else "torchrun"
    return [f"{start} {job.script} {shlex.join(train)}", f"python eval.py {shlex.join(score)}"]


def run(args, job, seed):
    """Trains and measures one seed of a row, unless that is done, and returns its report."""
    train, score = command_lines(args, job, seed)
    out, texts, rank = args.runs / f"{job.name}-{seed}", as_text(job, train, score), int(os.environ.get("RANK", 0))
    diary, report = out / "reproduce.json", out / "report.json"
    done = json.loads(diary.read_text()) if diary.exists() else {"commands": texts, "seconds": [0, 0]}
    if done["commands"] != texts or (report.exists() and not diary.exists()):
        fail(f"{out} holds a run of other flags; choose another --runs")

    def note(part, began):
        done["seconds"][part] = round(done["seconds"][part] * (part == 0) + time.time() - began)
        if rank == 0:
            atomic_save(diary, text=json.dumps(done | {"threads": torch.get_num_threads()}, indent=1))

    if not report.exists():
        script, began, rival = SCRIPTS[job.script], time.time(), job.script.startswith("baselines")
        print(f"\n$ {texts[0]}")
        trained = any((out / file).exists() for file in ("delta.safetensors", "pytorch_lora_weights.safetensors", "pipeline"))
        if not trained and (rank == 0 or not rival):
            script.unlearn(script.parse_args([*train, *([] if rival else ["--resume"])]))  # the rivals run on one device
            note(0, began)
        print(f"$ {texts[1]}")
        began = time.time()
        evaluation.evaluate(evaluation.parse_args([*score, "--cache", str(args.runs / "before")]))
        note(1, began)
    while not report.exists():  # under torchrun, the first process writes it
        time.sleep(1)
    return json.loads(report.read_text()) | json.loads(diary.read_text())


# ---- 3. figures --------------------------------------------------------------------------------------------------


def figure(report, column, when):
    """One cell of one seed: a number, or None where the run has none. when: before | after."""
    group, name = column
    if report["task"] == "concept":
        part = report["kinds"].get(group) if column in OTHERS else report["concepts"].get(group)
        return part and part[when].get(name)
    if name == "similarity":  # of several pictures, the one forgotten least
        return max((row[when] for row in report["pictures"]), default=None)
    value = report[{"distance": "distance", "SSIM": "ssim", "FID_pre": "fid_pre", "FID_real": "fid_real"}[name]]
    return None if isinstance(value, str) else value


def wanted(column, erased):
    """+1 where more is better, -1 where less is."""
    group, name = column
    if name in ("CS", "CA"):
        return -1 if group in erased or group == "ood" else 1
    if name == "FID":
        return 1 if group in erased else -1
    return 1 if name == "SSIM" else -1


def summary(values):
    """[numbers] -> (mean, sample standard deviation or None); None for no numbers."""
    values = [v for v in values if v is not None]
    return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None) if values else None


def digits(column):
    return 3 if column[1] in ("similarity", "distance", "SSIM") else 2 if column[1].startswith("FID_") else 1


def cells(table, reports):
    """[(heading, erased, [(label, [cell])])], a cell being (text, rank): rank 0 is the best of its block, 1 the second."""
    result = []
    for heading, erased, rows in table.blocks:
        means = []
        for _, job in rows:
            mine = [r for rs in reports.values() for r in rs] if job == "original" else reports[job.name]
            when = "before" if job == "original" else "after"
            means.append([summary([figure(r, c, when) for r in mine]) for c in table.columns])
            if job == "original":  # these differ from block to block: their cells say before -> after
                means[-1] = [None if c in OTHERS else m for c, m in zip(table.columns, means[-1], strict=True)]
        ranks = [[None] * len(table.columns) for _ in rows]
        for c, column in enumerate(table.columns):
            scores = {i: round(wanted(column, erased) * means[i][c][0], digits(column))
                      for i, (_, job) in enumerate(rows) if job != "original" and means[i][c]}  # fmt: skip
            best = sorted(set(scores.values()), reverse=True)  # equal figures share a rank; where all are equal, none has one
            for i, score in scores.items():
                ranks[i][c] = best.index(score) if len(best) > 1 and score in best[:2] else None
        lines = []
        for i, (label, job) in enumerate(rows):
            texts = []
            for c, column in enumerate(table.columns):
                mean, n = means[i][c], digits(column)
                text = "–" if mean is None else f"{mean[0]:.{n}f}"
                text += f" ± {mean[1]:.{n}f}" if mean and mean[1] is not None and job != "original" else ""
                if mean and (column in OTHERS or column[1] == "similarity"):  # what it was before, row by row
                    text = f"{summary([figure(r, column, 'before') for r in reports[job.name]])[0]:.{n}f} → {text}"
                if mean and column[1] == "similarity":
                    mine = [figure(r, column, "after") for r in reports[job.name]]
                    text = f"{sum(v < 0.4 for v in mine)}/{len(mine)} ({text})"
                texts.append((text, ranks[i][c]))
            lines.append((label, texts))
        result.append((heading, erased, lines))
    return result


# ---- 4. writing ---------------------------------------------------------------------------------------------------


def header(column, erased=None):
    arrow = "" if erased is None else " ↑" if wanted(column, erased) > 0 else " ↓"
    return f"{column[1].replace('similarity', 'similarity < 0.4')}{arrow}"


def markdown(table, blocks):
    fixed = all(not erased for _, erased, _ in blocks)  # then the arrows do not change from block to block
    names = [f"{g}: {header((g, f))}" if g else header((g, f), [] if fixed else None) for g, f in table.columns]
    lines = [f"## {table.title}", "", "| |" + "|".join(f" {n} " for n in names) + "|", "|---|" + "---|" * len(names)]
    for heading, erased, rows in blocks:
        if heading:
            arrows = ["" if fixed else "↑" if wanted(c, erased) > 0 else "↓" for c in table.columns]
            lines.append(f"| *{heading}* |" + "|".join(f" {a} " for a in arrows) + "|")
        for label, texts in rows:
            marked = [f"**{t}**" if rank == 0 else f"<u>{t}</u>" if rank == 1 else t for t, rank in texts]
            lines.append(f"| {label} |" + "|".join(f" {t} " for t in marked) + "|")
    return lines


def text_size(pen, text, font):
    return pen.textlength(text, font=font)


def arrow(pen, x, y, up):
    """A small arrow, 8 pixels wide: the built-in font has none."""
    tip, end = (y + 2, y + 14) if up else (y + 14, y + 2)
    pen.line((x + 4, tip, x + 4, end), fill="black", width=2)
    pen.line((x, tip + (5 if up else -5), x + 4, tip, x + 8, tip + (5 if up else -5)), fill="black", width=2)


def picture(tables, path):
    """The tables as the papers set them, and beside each the trade-off between forgetting (x) and keeping (y)."""
    font, pad, line = ImageFont.load_default(size=15), 12, 26
    plain = str.maketrans({"λ": "lambda", "σ": "sigma", "†": "*", "–": "-", "→": "to"})  # letters that the built-in font lacks
    parts = []
    for table, blocks, points in tables:
        pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        labels = [text for heading, _, rows in blocks for text in (heading, *(label for label, _ in rows))]
        widths = [max(text_size(pen, t.translate(plain), font) for t in labels) + 2 * pad]
        for c, column in enumerate(table.columns):
            texts = [texts[c][0] for _, _, rows in blocks for _, texts in rows]
            widths.append(max(text_size(pen, t.translate(plain), font) for t in [*texts, f"{column[1]} xx"]) + pad)
            if column[1] == "similarity":
                widths[-1] = max(widths[-1], text_size(pen, "similarity < 0.4 xx", font) + pad)
        rows_high = 3 + sum(bool(h) + len(rows) for h, _, rows in blocks)
        title_wide = text_size(pen, table.title.translate(plain), font) + 2 * pad
        wide = int(max(sum(widths) + pad, title_wide, 620))
        plot = 300 if len({label for label, _, _ in points[3]}) <= len(COLOURS) else 0  # more could not be told apart
        image = Image.new("RGB", (wide, int(rows_high * line + plot + 70)), "white")
        pen = ImageDraw.Draw(image)
        pen.text((pad, 6), table.title.translate(plain), fill="black", font=font, stroke_width=0.4)
        lefts, y = [sum(widths[:k]) for k in range(len(widths))], line + 6
        for c, (group, _) in enumerate(table.columns):  # the groups, once over their columns
            if group and (c == 0 or table.columns[c - 1][0] != group):
                pen.text((lefts[c + 1], y), group.translate(plain), fill="black", font=font)
        y += line if any(g for g, _ in table.columns) else 0
        fixed = all(not erased for _, erased, _ in blocks)
        for c, column in enumerate(table.columns):
            text = header(column)
            pen.text((lefts[c + 1], y), text, fill="black", font=font)
            if fixed:
                arrow(pen, lefts[c + 1] + text_size(pen, text, font) + 6, y, wanted(column, []) > 0)
        y += line
        pen.line((pad, y - 4, wide - pad, y - 4), fill="black")
        for heading, erased, rows in blocks:
            if heading:
                pen.text((pad, y), heading.translate(plain), fill="dimgray", font=font)
                for c, column in enumerate([] if fixed else table.columns):
                    arrow(pen, lefts[c + 1] + 4, y, wanted(column, erased) > 0)
                y += line
            for label, texts in rows:
                pen.text((pad, y), label.translate(plain), fill="black", font=font)
                for c, (text, rank) in enumerate(texts):
                    at, text = (lefts[c + 1], y), text.translate(plain)
                    pen.text(at, text, fill="black", font=font, stroke_width=0.5 if rank == 0 else 0)
                    if rank == 1:
                        pen.line((at[0], y + 19, at[0] + text_size(pen, text, font), y + 19), fill="black")
                y += line
            pen.line((pad, y - 4, wide - pad, y - 4), fill="lightgray")
        if plot:
            trade_off(pen, points, (pad + 50, y + 30, pad + 430, y + plot), font, plain)
        parts.append(image.crop((0, 0, wide, int(y + plot + 44))))
    whole = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    y = 0
    for part in parts:
        whole.paste(part, (0, y))
        y += part.height
    whole.save(path)


COLOURS = ("black", "firebrick", "blue", "darkgreen", "darkorange", "purple", "teal", "deeppink")


def trade_off(pen, points, box, font, plain):
    """points: (x name, y name, limit of x or None, [(label, heading, [(x, y) of each seed])]). Large marks: means.

    Colours tell labels, and marks headings; where there is but one label, colours tell headings.
    """
    x_name, y_name, limit, rows = points
    left, top, right, bottom = box
    pen.text((left - 50, top - 26), f"trade-off: {y_name} (up: kept) over {x_name} (left: forgotten)", fill="black", font=font)
    pen.rectangle(box, outline="gray")
    spans = [[xy[k] for *_, seeds in rows for xy in seeds] + ([limit] if limit is not None and k == 0 else []) for k in (0, 1)]
    if not rows:
        return
    (x0, x1), (y0, y1) = ((min(v) - 0.08 * (max(v) - min(v) or 1), max(v) + 0.08 * (max(v) - min(v) or 1)) for v in spans)

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    if len({label for label, _, _ in rows}) == 1:
        rows = [(heading or label, "", seeds) for label, heading, seeds in rows]
    labels, headings = (list(dict.fromkeys(row[k] for row in rows)) for k in (0, 1))

    def mark(x, y, r, colour, heading):
        kind = headings.index(heading)
        if kind == 0:
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        else:
            corners, turn = ((4, 0), (3, 0), (5, 0), (4, 45))[(kind - 1) % 4]
            pen.regular_polygon((x, y, 1.3 * r), corners, rotation=turn, fill=colour)

    if limit is not None:
        for y in range(int(top), int(bottom), 10):
            pen.line((place(limit, 0)[0], y, place(limit, 0)[0], y + 5), fill="red")
    for label, heading, seeds in rows:
        colour = COLOURS[labels.index(label) % len(COLOURS)]
        for xy in seeds:
            mark(*place(*xy), 2, colour, heading)
        mark(*place(*(statistics.mean(v) for v in zip(*seeds, strict=True))), 5, colour, heading)
    legend = [(label, COLOURS[k % len(COLOURS)], headings[0]) for k, label in enumerate(labels)]
    legend += [(heading, "gray", heading) for heading in headings if len(headings) > 1]
    for k, (text, colour, heading) in enumerate(legend):
        mark(right + 20, top + 12 + k * 20, 5, colour, heading)
        pen.text((right + 32, top + 4 + k * 20), text.translate(plain), fill="black", font=font)
    for value, where in ((x0, (left, bottom + 4)), (x1, (right - 36, bottom + 4)), (y0, (left - 50, bottom - 16)),
                         (y1, (left - 50, top))):  # fmt: skip
        pen.text(where, f"{value:.3g}", fill="gray", font=font)


def trade_off_points(table, reports):
    """Every row as points, one a seed: how much of what was to be forgotten is left, and how much of the rest."""
    a_picture = ("", "SSIM") in table.columns
    names, limit = (("similarity", "SSIM"), 0.4) if a_picture else (("CS of the erased", "CS of the kept"), None)

    def place(report):
        if a_picture:
            return tuple(figure(report, ("", name), "after") for name in names)
        values = {kind: [c["after"]["CS"] for c in report["concepts"].values() if c["kind"] == kind]
                  for kind in ("target", "unrelated")}  # fmt: skip
        return tuple(map(statistics.mean, values.values())) if all(values.values()) else None  # all erased: none is kept

    points, contest = [], max(len(rows) for _, _, rows in table.blocks) > 1
    for heading, _, rows in table.blocks:
        for label, job in rows if len(rows) > 1 or not contest else []:  # methods against each other, where there are several
            if job != "original" and all(seeds := [place(r) for r in reports[job.name]]):
                points.append((label, heading, seeds))
    return (*names, limit, points)


def gallery(args, rows, prompts, path, each=3, tile=72):
    """What the models of seed 0 draw from the same prompts and seeds: a line for each row of a block, the original above."""
    font, top = ImageFont.load_default(size=15), 30
    left = max(150, *(int(font.getlength(label)) + 24 for label, _ in rows))
    image = Image.new("RGB", (left + len(prompts) * (each * tile + 12), top + (len(rows) + 1) * tile), "white")
    pen = ImageDraw.Draw(image)
    for line, (label, job) in enumerate([("original", rows[0][1]), *rows]):
        drawer = evaluation.Drawer(job.score[2], torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if line:
            drawer.become(args.runs / f"{job.name}-0")
        texts, seeds = [p for p in prompts for _ in range(each)], [700_000 + k for _ in prompts for k in range(each)]
        pen.text((12, top + line * tile + tile // 2 - 10), label, fill="black", font=font)
        for k, x in enumerate(drawer.draw(texts, seeds, f"drawing: {label}")):
            at = left + k // each * (each * tile + 12) + k % each * tile
            image.paste(evaluation.to_pil(x).resize((tile - 4, tile - 4), Image.BICUBIC), (at, top + line * tile))
    for k, prompt in enumerate(prompts):
        pen.text((left + k * (each * tile + 12), 6), prompt, fill="black", font=font)
    image.save(path)


def write(args, name, tables, reports):
    """results/NAME.md and .png from {job name: [report of each seed]}, and NAME-pictures.png where several erase a concept."""
    some = next(iter(reports.values()))[0]
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = " or ".join(map(str, sorted({len(rs) for rs in reports.values()})))
    sizes = "One seed" if sizes == "1" else f"Mean ± sample standard deviation over {sizes} seeds"
    judges = [f"{key.replace('_', ' ')} {some[key]['name']} ({some[key]['sha256']})" for key in
              ("clip", "fid_features", "copy_detector", "distance_features") if isinstance(some.get(key), dict)]  # fmt: skip
    per = ("images_per_prompt", "pictures a prompt") if some["task"] == "concept" else ("n", "pictures")
    n = f"{' or '.join(map(str, sorted({r[per[0]] for rs in reports.values() for r in rs})))} {per[1]}"
    minutes = [[sum(r["seconds"][i] for r in rs) / len(rs) / 60 for rs in reports.values()] for i in (0, 1)]
    threads = sorted({r["threads"] for rs in reports.values() for r in rs})
    lines = [f"# {name}, {'at the papers’ size' if args.paper else 'in miniature'}", "",
             f"![{name}]({name}.png)", "",
             f"{sizes} of training and drawing; {n}, "
             f"before and after from the same noise. Best in bold, second best underlined where rows compete. "
             f"Judged by {'; '.join(judges)}.", ""]  # fmt: skip
    if not args.paper:
        lines += ["These are figures of small models, drawn 32 or 64 pixels wide and judged by small networks: they can be "
                  "compared with each other, not with the papers'.", ""]  # fmt: skip
    blocks = [[row for row in rows if row[1] != "original"] for table in tables for _, _, rows in table.blocks]
    contests = [rows for rows in blocks if len(rows) > 1 and some["task"] == "concept"]
    if contests:  # the first block where methods compete: one prompt of each kind
        prompts = {p["kind"]: p["prompt"] for p in reversed(reports[contests[0][0][1].name][0]["prompts"])}
        shown = [prompts[kind] for kind in evaluation.KINDS if kind in prompts and kind != "paraphrase"]
        gallery(args, contests[0], shown, args.out / f".{name}-pictures.png")
        os.replace(args.out / f".{name}-pictures.png", args.out / f"{name}-pictures.png")
        lines[2:2] = [f"![what they draw]({name}-pictures.png)", ""]
    missing = [job for job in all_jobs(TABLES[name](args)) if job not in reports]
    lines += [f"Missing, for they were not run or not asked for: {', '.join(missing)}.", ""] if missing else []
    finished = [(table, cells(table, reports)) for table in tables]
    for table, blocks in finished:
        lines += [*markdown(table, blocks), ""]
    lines += [f"A row's training took {min(minutes[0]):.1f} to {max(minutes[0]):.1f} minutes a seed, its scoring "
              f"{min(minutes[1]):.1f} to {max(minutes[1]):.1f} (wall time, threads: {' or '.join(map(str, threads))}, "
              f"{'a GPU' if torch.cuda.is_available() else 'no GPU'}).", "", "The commands of seed 0:", "",
              "```bash"]  # fmt: skip
    lines += dict.fromkeys(text for rs in reports.values() for text in rs[0]["commands"])
    drawn = [(table, blocks, trade_off_points(table, reports)) for table, blocks in finished]
    picture(drawn, args.out / f".{name}.png")
    os.replace(args.out / f".{name}.png", args.out / f"{name}.png")
    atomic_save(args.out / f"{name}.md", text="\n".join([*lines, "```", ""]))
    print("\n".join(lines[: lines.index("The commands of seed 0:")]))
    print(f"written: {args.out / name}.md, {args.out / name}.png")


# ---- 5. main ------------------------------------------------------------------------------------------------------


def outside_picture(path):
    """A picture that emoji/ddpm was not trained on: twemoji's sun with a face, off the sheet, as emoji/creatures/ are made."""
    names = [e["name"] for e in json.loads((HERE / "emoji/images/emoji.json").read_text())["emoji"]]
    x, y = names.index("sun with face") % 20 * 64, names.index("sun with face") // 20 * 64
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(HERE / "emoji/images/twemoji.png") as sheet:
        sheet.convert("RGB").crop((x, y, x + 64, y + 64)).resize((32, 32), Image.LANCZOS).save(path)


def all_jobs(tables):
    """{name: job}: a row that stands twice is run once."""
    return {job.name: job for table in tables for _, _, rows in table.blocks for _, job in rows if job != "original"}


def select(tables, fits):
    """The tables with only those rows for which fits("title heading label", job), and the original's, but not that alone."""
    result = []
    for table in tables:
        blocks = [(h, e, [(label, job) for label, job in rows if job == "original" or fits(f"{table.title} {h} {label}", job)])
                  for h, e, rows in table.blocks]  # fmt: skip
        if any(job != "original" for _, _, rows in blocks for _, job in rows):
            result.append(table._replace(blocks=[b for b in blocks if any(job != "original" for _, job in b[2]) or not b[0]]))
    return result


def main(args):
    if args.list:
        args.runs = Path("runs")
        for name, make in TABLES.items():
            print(f"{name:18}{'; '.join(t.title for t in make(args))}")
        return
    if args.seeds is not None and args.seeds < 1 or args.num_images is not None and args.num_images < 2:
        fail(f"--seeds {args.seeds} --num-images {args.num_images}: expected at least 1 seed and 2 images")
    if args.table is None:
        fail(f"which table? {', '.join(TABLES)} or all")
    args.runs = args.runs or Path("runs/paper" if args.paper else "runs/reproduce")
    os.chdir(HERE)  # the commands name files of this repository
    chosen = {name: tables for name in (TABLES if args.table == "all" else [args.table])
              if (tables := select(TABLES[name](args), lambda words, _: args.rows.lower() in words.lower()))}  # fmt: skip
    if not chosen:
        fail(f"--rows {args.rows!r}: no such row in {args.table}" if args.rows else f"{args.table} is without --paper alone")
    for name, tables in chosen.items():
        jobs, n_seeds = all_jobs(tables), args.seeds or (6 if args.paper else 1 if name.endswith("rates") else 3)
        if args.dry_run:
            for job in jobs.values():
                for seed in range(n_seeds):
                    print("\n".join(as_text(job, *command_lines(args, job, seed))))
            continue
        if any("sun-with-face" in flag for job in jobs.values() for flag in job.flags):
            outside_picture(args.runs / "twemoji-sun-with-face.png")
        reports = {}
        for k, job in enumerate(jobs.values()):
            seeds = [s for s in range(n_seeds) if not args.finished or (args.runs / f"{job.name}-{s}/report.json").exists()]
            print(f"\n{name}, row {k + 1} of {len(jobs)}: {job.name}, {len(seeds)} seeds")
            if seeds:
                reports[job.name] = [run(args, job, seed) for seed in seeds]
        tables = select(tables, lambda _, job: job.name in reports)  # noqa: B023
        if not tables:
            print(f"{name}: nothing is finished")
        elif int(os.environ.get("RANK", 0)) == 0:
            write(args, name, tables, reports)


if __name__ == "__main__":
    main(parse_args())
