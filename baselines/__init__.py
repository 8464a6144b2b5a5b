"""Baselines: other unlearning methods with the flags and run folders of ours, one file each.

A file in this folder is a baseline; there is no other list. The evaluation and the tables find it
here (methods(), ROWS) and need no change for a new one. A baseline holds what its paper
describes: the docstring with the equations, the loss as a pure function, the training loop. What
no paper describes is here, as functions with arguments and results, in seven sections:

    1. flags         concept_parser, instance_parser, add_weight_flags
    2. run folder    open_run_folder
    3. model         load_text_to_image, load_ddpm, with_preset, with_train_method,
                     trainable_weights
    4. prompts       concept_prompts, target_prompts; prediction and guidance
    5. images        generate_latents; read_forget, remember_files, remember_batch; timesteps
    6. results       save_delta, save_lora, save_trained, save_pipeline
    7. the program   main, methods, prompt_strength

How to add a baseline:

    1. Copy baselines/_template.py to baselines/NAME.py: the name of the file is the method's. The
       copy runs as it stands: python -m baselines.NAME --target "Grumpy Cat" --anchor Cat. For a
       method that unlearns images, copy neggrad.py, whose TASK is "instance".
    2. Write the docstring: idea, paper, equations, what the released code does differently.
    3. Write the loss as a pure function of tensors, an equation to a line, and the loop around it.
    4. PAPER and SMALL are the presets for large and small models: steps, batch size, learning
       rate, and any other number that depends on the size. A flag overrides the number of its name.
    5. ROWS are the rows that the result tables get. label: the row's name. flags: what makes it
       this row. paper: steps and batch size of its paper or its released code. tried, for concepts:
       a flag and the values of it that were tried on the grumpy cat, the default of small models
       first. in: "rates" for a row of the table of rates alone.
    6. Test its first two steps by hand, from the equations: tests/test_baseline_updates.py.

What the rest of the repository asks of a baseline: TASK, ROWS, parse_args(argv), unlearn(args) ->
run folder. If the strength of its LoRA depends on the prompt, also prompt_strength(pipe, settings).
For concepts, FAMILIES are those of backbones.py whose models it takes; WHY says, in half a
sentence, why no others, and ends the error message. All randomness comes from common.generator, so
that --seed and the step determine it. Baselines run in one process and in fp32, on a GPU too;
there, only the generation of images is in bf16.
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from tqdm import tqdm

from backbones import (
    DDPM,
    DELTA,
    LORA,
    is_embedded,
    load_backbone,
    sample_timesteps,
    stack_conditions,
)
from common import (
    REPO,
    HelpFormatter,
    atomic_save,
    derive_seed,
    evaluate_run,
    fail,
    list_images,
    load_or_fail,
    make_run_dir,
    pick_device,
    read_cropped,
    read_exact,
    run_name,
)
from doco import prompt_pairs
from instance_unlearn import drop_forget_files

# What a finished run leaves in its folder: changed weights, a LoRA, or a whole pipeline
RESULTS = (DELTA, LORA, "pipeline")
RANK = 16  # of a LoRA, as in doco.py


# ---- 1. flags -----------------------------------------------------------------------------------


def concept_parser(file, doc, paper, small):
    """The parser of a baseline that unlearns concepts, with the flags of doco.py.

    file, doc: __file__ and __doc__ of the baseline; paper, small: its presets. A preset without
    steps is a method without training: it has no flags for that.
    """
    parser = new_parser(file, doc)
    add = parser.add_argument_group("concepts").add_argument
    add("--target", nargs="+", required=True, help="concept to unlearn; several: all at once")
    add("--anchor", nargs="+", required=True, help="anchor concept: one for all, or one per target")
    help_text = "style: the anchor is a medium, such as painting"
    add("--concept-type", choices=("object", "style"), default="object", help=help_text)
    text = "file of anchor prompts, one per line; {} stands for the anchor (without it: templates)"
    add("--prompts", type=Path, help=text)

    add = parser.add_argument_group("model").add_argument
    text = "folder or hub id of a model of one of the families named above"
    add("--model", default=str(REPO / "emoji/sd"), help=text)
    if "steps" in paper:
        add(
            "--resolution",
            type=int,
            help="side of an image in pixels (without it: the model's own)",
        )
        add_training_flags(parser, paper, small, " per target, twice as many for a style")
    add_run_flags(parser, "TARGET")
    return parser


def instance_parser(file, doc, paper, small, remember=True):
    """The parser of a baseline that unlearns images, with the flags of instance_unlearn.py.

    file, doc, paper, small: as for concept_parser. remember: the method has images to remember.
    """
    parser = new_parser(file, doc)
    add = parser.add_argument_group("images").add_argument
    add("--forget", nargs="+", type=Path, required=True, help="image; several: one after another")
    if remember:
        add("--remember", type=Path, help="folder of images (without it: emoji's, for emoji/ddpm)")

    add = parser.add_argument_group("model").add_argument
    add("--model", default=str(REPO / "emoji/ddpm"), help="DDPM: folder or hub id")

    add = add_training_flags(parser, paper, small, " per image")
    add(
        "--lr-scheduler",
        choices=("constant", "linear"),
        default="constant",
        help="linear: the learning rate falls to 0 for each image",
    )
    add(
        "--timestep-sampling",
        choices=("uniform", "stratified"),
        default="uniform",
        help="of a batch of n: independent, or one timestep from each n-th of the range",
    )
    add_run_flags(parser, "IMAGE")
    return parser


def new_parser(file, doc):
    """A parser without flags. The Namespace that it returns has the attribute method."""
    method = Path(file).stem
    parser = argparse.ArgumentParser(
        prog=f"python -m baselines.{method}", description=doc, formatter_class=HelpFormatter
    )
    parser.set_defaults(method=method)
    return parser


def add_training_flags(parser, paper, small, unit):
    """Adds --steps, --batch-size and --lr. Returns add_argument of their group.

    Without a flag, with_preset takes the number of the preset that fits the model. unit: of the
    steps of a small model.
    """
    text = "without them, the settings of the paper; for small models, those of emoji/"
    add = parser.add_argument_group("training", text).add_argument
    add("--steps", type=int, help=f"({paper['steps']}; small: {small['steps']}{unit})")
    sizes = f"{paper['batch_size']}; small: {small['batch_size']}"
    add("--batch-size", type=int, help=f"images per step ({sizes})")
    add("--lr", type=float, help=f"learning rate ({paper['lr']:g}; small: {small['lr']:g})")
    return add


def add_weight_flags(add, choices, text, rate):
    """Adds --train-method and --rank.

    add: add_argument of a group; text: what the choices mean; rate: the learning rate of a LoRA.
    """
    text += f"; lora, the default for transformers: a LoRA of all attention, at a rate of {rate:g}"
    add("--train-method", choices=(*choices, "lora"), help=text)
    add("--rank", type=int, default=RANK, help="of --train-method lora")


def add_run_flags(parser, what):
    """Adds --seed and --out. what: the second half of the run folder's default name."""
    name = parser.get_default("method").replace("_", "-")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="of all random numbers, also of the evaluation")
    add("--out", type=Path, help=f"run folder (without it: runs/{name}-{what})")


# ---- 2. run folder ------------------------------------------------------------------------------


def open_run_folder(args):
    """Checks the flags and creates the run folder, which must hold no result. Returns its path.

    Everything that can be checked without the model is checked here: loading takes long.
    """
    check_training_flags(args)
    if "remember" in args:
        remember_folder(args)
    names = args.target if "target" in args else [file.stem for file in args.forget]
    out = args.out or Path("runs") / run_name(args.method.replace("_", "-"), names)
    if any((out / name).exists() for name in RESULTS):
        fail(f"{out} already holds a run; choose another --out")
    make_run_dir(out)
    return out


def check_training_flags(args):
    """Fails if a number of the training is impossible. A flag that was not given is None."""
    given = vars(args)
    for name in ("steps", "batch_size", "rank"):
        value = given.get(name)
        if value is not None and value < 1:
            fail(f"--{name.replace('_', '-')} {value}: expected at least 1")
    rate = given.get("lr")
    if rate is not None and not rate > 0:  # nan is not greater than 0 either
        fail(f"--lr {rate:g}: expected a positive learning rate")


def remember_folder(args):
    """--remember, or the images that the embedded DDPM was trained on."""
    if args.remember is None and not is_embedded(args.model):
        fail(f"--remember is missing: which images should {args.model} remember?")
    return args.remember or REPO / "emoji/creatures"


# ---- 3. model -----------------------------------------------------------------------------------


def load_text_to_image(args, prompts, families, why, device=None):
    """The model of --model, and {prompt: condition of one row} with the empty prompt.

    families, why: FAMILIES and WHY of the baseline. A condition is a dict of tensors, what the
    network is told of a prompt: see backbones.py. Its "encoder_hidden_states" are the embeddings of
    the tokens, (1, 77, D) in Stable Diffusion. The text encoders leave the memory once they have
    encoded the prompts.
    """
    device = device or pick_device()
    model = load_backbone(args.model, families, why)
    conditions = model.encode_prompts(dict.fromkeys(["", *prompts]), device)
    return model.to(device), conditions


def load_ddpm(args):
    """The DDPM of --model, on the device; fails if it is another model or predicts no epsilon."""
    why = "the methods for images compare predictions with noise, and have no prompt"
    model = load_backbone(args.model, (DDPM,), why)
    if model.prediction_type != "epsilon":
        fail(f"--model {args.model} predicts {model.prediction_type}; expected epsilon")
    return model.to(pick_device())


def with_preset(args, model, paper, small):
    """A copy of args: what is None comes from the preset that fits the model, resolution too.

    Names of the preset without a flag are added. The steps of small models are for one target
    concept, and twice as many for a style, as in doco.py. A LoRA has a rate of its own, "lora_lr".
    """
    preset = dict(small if model.small else paper)
    if "num_images" in preset:  # generated as the family generates images, unless the preset tells
        images = {"sampling_steps": model.sampling_steps, "guidance": model.guidance}
        preset = images | preset
    lora_lr = preset.pop("lora_lr", None)
    if vars(args).get("train_method") == "lora":
        preset["lr"] = lora_lr
    if model.small and "target" in args and "steps" in preset:
        per_target = 2 if args.concept_type == "style" else 1
        preset["steps"] *= len(args.target) * per_target
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**(vars(args) | preset | given))
    if "resolution" in args:
        args.resolution = model.check_resolution(args.resolution)
    return args


def with_train_method(args, model, unet):
    """A copy of args: without --train-method, a UNet trains `unet`, and a transformer a LoRA.

    As in doco.py: in a UNet the prompt enters through keys and values of its own; in a transformer
    the text's tokens change from block to block, and all attention has a part in a concept.
    """
    args = argparse.Namespace(**vars(args))
    if args.train_method is None:
        args.train_method = "lora" if model.net_name == "transformer" else unet
    if args.rank != RANK and args.train_method != "lora":
        fail(f"--rank {args.rank} goes with --train-method lora, not {args.train_method}")
    return args


def trainable_weights(net, pattern=""):
    """{name: weight} of the weights whose name matches a regular expression, set to be trained."""
    matching = {n: p for n, p in net.named_parameters() if re.search(pattern, n)}
    for weight in matching.values():
        weight.requires_grad_()
    return matching


# ---- 4. prompts, prediction, guidance -----------------------------------------------------------


def concept_prompts(args):
    """[(anchor prompt, [target prompts])]: see doco.prompt_pairs. Checks --target and --anchor."""
    emoji = is_embedded(args.model)
    return prompt_pairs(args.target, args.anchor, args.concept_type, args.prompts, emoji)


def target_prompts(pairs):
    """All target prompts of concept_prompts, in its order."""
    return [prompt for _, prompts in pairs for prompt in prompts]


def predict(model, xt, t, conditions, prompts):
    """The network's prediction (B, C, h, w) at x_t (B, C, h, w), t (B,) for a list of B prompts.

    conditions: {prompt: condition of one row}.
    """
    condition = stack_conditions([conditions[prompt] for prompt in prompts])
    return model.predict(xt, t, condition)


def predict_both(model, xt, t, null, target):
    """(without the prompt, with it): two predictions (B, C, h, w) at x_t, in one pass.

    t: 0-dim. null, target: conditions of B rows.
    """
    condition = stack_conditions([null, target])  # of 2B rows
    xt, t = torch.cat([xt, xt]), t.expand(2 * len(xt))
    return model.predict(xt, t, condition).chunk(2)


def guide(pred_null, pred_target, guidance):
    """Classifier-free guidance: pred_null + guidance (pred_target - pred_null)."""
    return pred_null + guidance * (pred_target - pred_null)


def ddim_scheduler(model, steps):
    """diffusers' DDIM with so many steps, on the model's device.

    Trap: it clips x0_hat to [-1, 1] unless told otherwise. Latents are N(0, 1), about a third of
    their values lies outside.
    """
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps, model.device)
    return scheduler


# ---- 5. images ----------------------------------------------------------------------------------


def generate_latents(args, model, conditions, prompts):
    """Image j of the original model, as a latent, from prompts[j] and seed j: (n, C, h, w).

    args: with_preset's, which has guidance and sampling_steps. conditions: {prompt: condition}.
    """
    chunks = []
    for i in tqdm(range(0, len(prompts), 16), f"{len(prompts)} images"):
        chunk = prompts[i : i + 16]  # 16 at a time: memory
        seeds = [derive_seed(args.seed, "samples", i + k) for k in range(len(chunk))]
        latents = model.generate_latents(
            [conditions[prompt] for prompt in chunk],
            conditions[""],
            seeds,
            args.resolution,
            args.sampling_steps,
            args.guidance,
        )
        chunks.append(latents)
    return torch.cat(chunks)


def read_forget(args, model, files=None, flag="--forget"):
    """The images to unlearn, or other files of the same kind: a list of (3, H, W) on the device.

    Trap: not stacked. A stack has another memory layout, with which convolutions round differently.
    """
    size = model.sample_size
    return [read_exact(file, size, flag).to(model.device) for file in files or args.forget]


def remember_files(args, x_f):
    """The files of --remember that show none of the images to unlearn, a list of (3, H, W)."""
    folder = remember_folder(args)
    forget = torch.stack(x_f).cpu()  # (K, 3, H, W)
    files = drop_forget_files(list_images(folder), forget, forget.shape[-1])
    if not files:
        fail(f"--remember {folder}: no images there; expected a folder of png, jpg or webp files")
    return files


def remember_batch(files, n, model, g):
    """n remembered images, sampled with replacement by g: (n, 3, H, W) on the model's device."""
    idx = torch.randint(len(files), (n,), generator=g).tolist()
    images = [read_cropped(files[i], model.sample_size) for i in idx]
    return torch.stack(images).to(model.device)


def training_timesteps(model, n, g):
    """n timesteps (n,) as a model of this kind is trained, by the generator g.

    Uniform; flow matching: shifted towards noise.
    """
    if model.shift is None:
        return torch.randint(1000, (n,), generator=g)
    return sample_timesteps(n, g, model.shift)


def batch_timesteps(args, g):
    """--batch-size timesteps, (B,), by --timestep-sampling and the generator g."""
    stratified = args.timestep_sampling == "stratified"
    return sample_timesteps(args.batch_size, g, stratified=stratified)


def schedule_lr(optimizer, args, step):
    """Sets the learning rate of this step. Linear: from --lr to 0, anew for each image."""
    if args.lr_scheduler == "linear":
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step % args.steps / args.steps)


# ---- 6. results ---------------------------------------------------------------------------------


def write_records(args, out, log):
    """Writes log.jsonl and args.json. log: for each step, {name: 0-dim tensor}.

    Fails if a value is not finite. They are looked at after the last step alone: reading one in
    the loop would make the GPU wait. Call it before the result is saved: a run that diverged must
    leave none.
    """
    if not all(value.isfinite() for row in log for value in row.values()):
        fail("the loss is not finite any more; lower --lr and choose another --out")
    lines = []
    for step, row in enumerate(log):
        numbers = {name: value.item() for name, value in row.items()}
        lines.append(json.dumps({"step": step} | numbers) + "\n")
    atomic_save(out / "log.jsonl", text="".join(lines))
    settings = {name: value for name, value in vars(args).items() if name != "method"}
    record = {"method": args.method, "settings": settings}
    atomic_save(out / "args.json", text=json.dumps(record, indent=1, default=str))


def save_delta(args, out, weights, log=()):
    """Saves the changed weights of the network, {name: tensor}. Returns the run folder.

    Plain diffusers loads them: unet.load_state_dict(weights, strict=False), or transformer.
    """
    write_records(args, out, log)
    about = {"format": "pt", "method": args.method, "base_model": args.model}
    atomic_save(out / DELTA, weights, metadata=about)
    return out


def save_lora(args, out, model, log=()):
    """Saves the LoRA of the network. Returns the run folder.

    Plain diffusers loads it: pipe.load_lora_weights(folder).
    """
    write_records(args, out, log)
    atomic_save(out / LORA, model.lora_state(), metadata={"format": "pt"})
    return out


def save_trained(args, out, model, weights, log):
    """Saves what --train-method trained, a LoRA or the weights. Returns the run folder."""
    if args.train_method == "lora":
        return save_lora(args, out, model, log)
    return save_delta(args, out, weights, log)


def save_pipeline(args, out, model, log=()):
    """Saves the whole pipeline, in the folder "pipeline". Returns the run folder."""
    write_records(args, out, log)
    atomic_save(out / "pipeline", pipe=model.pipe)
    return out


# ---- 7. the program -----------------------------------------------------------------------------


def main(task, parse_args, unlearn):
    """Runs a baseline and evaluates it; exits with the exit code of eval.py."""
    args = parse_args()
    out = unlearn(args)
    flags = ["--seed", args.seed]
    if task == "concept":
        flags += ["--concept-type", args.concept_type]
        if vars(args).get("resolution"):
            flags += ["--resolution", args.resolution]
        flags += ["--target", *args.target, "--anchor", *args.anchor]
    else:
        if "remember" in args:
            flags += ["--real", remember_folder(args)]
        flags += ["--forget", *args.forget]
    sys.exit(evaluate_run(task, args.model, out, *flags))


def methods():
    """{name: module} of all baselines: the files of this folder."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {file.stem: importlib.import_module(f"baselines.{file.stem}") for file in files}


def prompt_strength(run_folder, pipe):
    """A function prompt -> strength of the run's LoRA in [0, 1], or None: full strength always.

    args.json names the method; its module's prompt_strength(pipe, settings), if there is one,
    returns the function. pipe: the pipeline, with its text encoder.
    """
    record = run_folder / "args.json"
    if not record.is_file():
        return None
    about = load_or_fail(record, lambda: json.loads(record.read_text()))
    if about.get("method") is None:
        return None
    module = methods().get(about["method"])
    if not hasattr(module, "prompt_strength"):
        return None
    return module.prompt_strength(pipe, about["settings"])
