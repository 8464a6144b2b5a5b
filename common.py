"""What every script needs and no paper describes: errors, processes, run folders, files, images.

Nothing here knows a method or a model family. The scripts call these functions; these functions
call none of theirs. The sections:

    1. errors       one line on stderr, exit code 1; the layout of --help
    2. processes    rank, world size and device; SIGTERM; the environment of a child process
    3. run folders  name, lock, recorded settings, resuming
    4. files        atomic writes, fingerprints, checkpoints, caches
    5. images       PIL images to tensors and back
    6. evaluation   eval.py in a process of its own
"""

import argparse
import contextlib
import gc
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from gradsurgery import is_sharded, whole

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed
    fcntl = None

REPO = Path(__file__).resolve().parent
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


# ---- 1. errors and help -----------------------------------------------------------


def fail(message):
    """Ends the program with one line on stderr, "SCRIPT: error: message", and exit code 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def first_line(error):
    """The first line of an exception's text, or its type if the text is empty (TimeoutError())."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def load_or_fail(path, read):
    """Returns read(), or fails: a truncated or foreign file raises half a dozen exception types."""
    try:
        return read()
    except Exception as e:
        fail(
            f"{path} is corrupted or belongs to a different run "
            f"({type(e).__name__}: {first_line(e)}); delete it to start over"
        )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help: the module's docstring as it stands, and the default of each flag that has one."""

    def _get_help_string(self, action):
        """The help of a flag, with its default."""
        if action.default is None or action.default is False:
            return action.help  # a help text says itself what happens without the flag
        return super()._get_help_string(action)


def add_run_arguments(parser, out_default):
    """Adds the flags that every training script has: how a run uses memory, and where it goes."""
    group = parser.add_argument_group("memory and speed")
    group.add_argument("--compile", action="store_true", help="torch.compile; slow first step")
    group.add_argument(
        "--mixed-precision",
        choices=("no", "bf16"),
        help="bf16: passes, and weights that are not trained (without it: bf16 on a GPU that has "
        "it, no on a CPU)",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="less memory for a second forward pass; the weights are the same",
    )
    group.add_argument(
        "--gradient-accumulation-steps",
        type=int,
        default=1,
        help="the batch in so many parts, one after another: less memory, the same step",
    )
    group.add_argument(
        "--shard",
        action="store_true",
        help="each process holds a part of the weights and of the optimizer (FSDP2): for models "
        "whose training does not fit one card; the step is the same",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="of every random draw")
    group.add_argument("--out", type=Path, help=f"run folder (without it: {out_default})")
    group.add_argument("--resume", action="store_true", help="continue an interrupted run")
    group.add_argument(
        "--save-pipeline", action="store_true", help="also write the whole pipeline to OUT/pipeline"
    )


# ---- 2. processes -------------------------------------------------------------------------------

# rank: 0 .. world - 1; world: number of processes; device: the torch.device of this process
Processes = namedtuple("Processes", "rank world device")


def setup_processes():
    """Reads torchrun's variables, picks the device, starts the process group. Returns Processes.

    Without torchrun: one process. Several processes use NCCL on GPUs, gloo on CPUs.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(mps=world == 1)  # MPS has no process group
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank, world, device)


def pick_device(mps=True):
    """The GPU of this process; else MPS, unless mps is False (no float64 there); else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device("mps" if mps and torch.backends.mps.is_available() else "cpu")


def close_processes(processes):
    """Ends the process group, where there is one."""
    if processes.world > 1:
        dist.destroy_process_group()


def average(tensor, processes):
    """The mean of a tensor over the processes; the tensor itself if there is only one."""
    if processes.world > 1:
        dist.all_reduce(tensor)  # a sum, then a division: gloo has no average
        tensor = tensor / processes.world
    return tensor


def local_slice(batch_size, processes):
    """The rows of a global batch that this process computes."""
    n = batch_size // processes.world
    return slice(processes.rank * n, (processes.rank + 1) * n)


def mixed_precision(args, device):
    """--mixed-precision, or what suits the device: a CPU stays exact, old GPUs emulate bf16."""
    if args.mixed_precision:
        return args.mixed_precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "no"


def use_memory_flags(net, args, processes):
    """Applies --gradient-checkpointing, --shard and --compile to a diffusers network.

    Returns its trained weights, {name: parameter}: with --shard, these are new ones.
    """
    if args.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    if args.shard:
        shard(net, processes)
    if args.compile:
        net.compile()
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def shard(net, processes):
    """Cuts the weights of a diffusers network into a part for each process, by FSDP2.

    A block's weights are whole while it computes, and only then: as soon as the next block begins,
    or its backward pass is done, each process is left with its part.
    """
    # Imported here, and below: it takes a second, and few need it
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    blocks = [m for m in net.modules() if type(m).__name__ in (net._no_split_modules or ())]
    for module in [*reversed(blocks), net]:  # the inner ones first: each takes what is left
        # True for the network itself too: kept whole, its weights would stay those of M_init, once
        # the original model has made its pass
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def check_processes(args, processes):
    """Fails on flags that do not fit the number of processes.

    The global batch must split evenly over processes and micro-batches; one process alone has
    nobody to share the weights with.
    """
    if args.shard and processes.world == 1:
        fail("--shard: one process; expected several, as of torchrun --nproc-per-node 2")
    size, micro = args.batch_size, args.gradient_accumulation_steps
    if micro < 1:
        fail(f"--gradient-accumulation-steps {micro}: expected at least 1")
    unit = processes.world * micro
    if size < 1 or size % unit:
        parts = f"{processes.world} processes" + (f" of {micro} steps" if micro > 1 else "")
        fail(
            f"--batch-size {size} cannot be split over {parts}; take a positive multiple of {unit}"
        )


def same_on_all_ranks(seen, folder):
    """Fails unless all ranks see the same of a run folder. seen: {what: what this rank sees}.

    On several machines without a shared disk, only the first one holds the checkpoint. Without this
    check the others would start from step 0, and the first all_reduce would hang or mix the two.
    """
    if not dist.is_initialized():
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), seen))
    first_host, first = everyone[0]
    for rank, (host, other) in enumerate(everyone):
        for key, value in other.items():
            if value != first[key]:
                fail(
                    f"--out {folder}: {key} is {value!r} on rank {rank} ({host}) and "
                    f"{first[key]!r} on rank 0 ({first_host}); put the run folder on a shared "
                    f"disk, or copy it from rank 0's machine"
                )


@contextlib.contextmanager
def sigterm_flag():
    """Yields a list that is no longer empty once SIGTERM has arrived; the process goes on.

    Schedulers of clusters send SIGTERM before they kill a job: time to write a checkpoint.
    """
    stop_requested = []
    old_handler = signal.signal(signal.SIGTERM, lambda *_: stop_requested.append(True))
    try:
        yield stop_requested
    finally:
        signal.signal(signal.SIGTERM, old_handler)


# The variables that torchrun sets. A child process that inherits them would wait for other ranks.
TORCHRUN = re.compile(
    r"(TORCHELASTIC_.*|GROUP_.*|ROLE_.*|MASTER_(ADDR|PORT)|(LOCAL_)?(RANK|WORLD_SIZE)"
    r"|TORCH_NCCL_ASYNC.*)"
)


def single_process_env():
    """The environment without torchrun's variables, nor the OMP_NUM_THREADS=1 that it sets."""
    env = {k: v for k, v in os.environ.items() if not TORCHRUN.fullmatch(k)}
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    if several and env.get("OMP_NUM_THREADS") == "1":
        del env["OMP_NUM_THREADS"]
    return env


# --seed s owns the seeds s * 1,000,003 + offset: distinct seeds of one script never meet. The
# offsets keep its purposes apart: noise of image j must not be noise of step j in the same network.
SEED_STRIDE = 1_000_003
SEED_OFFSETS = {
    "samples": 0,  # image j of the anchor or remember set
    # Image j and step j share a random stream: at a batch of 8, the noise of the step is that of
    # the image, shifted by 32 numbers. Another offset would change every result.
    "doco_steps": 0,
    "instance_steps": 100_000,
    "evaluation": 500_000,
    "unconditional_samples": 800_000,
    "surrogates": 900_000,
    "retain_prompts": 950_000,
    "attacks": 960_000,
}


def derive_seed(seed, purpose, index=0):
    """The seed of image or step `index`, from --seed. purpose: a key of SEED_OFFSETS."""
    return seed * SEED_STRIDE + SEED_OFFSETS[purpose] + index


def generator(seed, purpose, index=0):
    """A CPU generator with that seed: the draws do not depend on the device."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, index))


# ---- 3. run folders -----------------------------------------------------------------------------

# out: the folder; begun: steps in its checkpoint, or None; finished: the weights are there;
# checkpoint, log: paths; lock: an open file that holds the lock while it lives (rank 0)
Run = namedtuple("Run", "out begun finished checkpoint log lock")

# Settings that may change when a run is resumed: they do not change what is computed.
RESUMABLE_KEYS = ("resume", "out", "save_pipeline", "gradient_checkpointing", "shard")
RESUMABLE_KEYS += ("gradient_accumulation_steps",)


def run_name(method, names):
    """The default name of a run folder: "doco-grumpy-cat". names: the texts it is made of.

    Letters a-z, digits and hyphens, at most 80 of them: every file system takes that. Where this
    loses something (other scripts, punctuation, long names), eight hex digits of the texts' SHA-256
    keep the folders of different targets apart.
    """
    text = "-".join(names)
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    plain = re.sub(r"[\s_-]+", "-", text.lower()).strip("-")  # the slug of an ordinary name
    if slug != plain or len(slug) > 80:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        slug = f"{slug[:70].strip('-')}-{digest}".strip("-")
    return f"{method}-{slug}"


def make_run_dir(folder):
    """Creates a run folder, or fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").touch()
    except OSError as e:
        fail(f"--out {folder} cannot be written: {e.strerror}")


def lock_run_dir(folder):
    """Holds an exclusive lock on a run folder while the returned file lives."""
    lock = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder} is in use by another run; choose another --out")
    return lock


def open_run(out, results, resume, processes):
    """Creates, checks and locks a run folder. Returns Run.

    results: names of the files that a finished run leaves, any of which counts. Fails if the folder
    holds a run already and resume is False, or if it is in use.
    """
    make_run_dir(out)
    checkpoint = out / "checkpoint.safetensors"
    begun = load_or_fail(checkpoint, lambda: checkpoint_step(checkpoint))
    exists = {name: (out / name).exists() for name in results}
    same_on_all_ranks(exists | {checkpoint.name: begun}, out)
    finished = any(exists.values())
    if (finished or begun is not None) and not resume:
        fail(
            f"{out} already holds a run; choose another --out, or --resume one that was interrupted"
        )
    lock = lock_run_dir(out) if processes.rank == 0 else None
    return Run(out, begun, finished, checkpoint, out / "log.jsonl", lock)


def record_settings(run, args, contents, processes):
    """Writes args.json; a resumed run must have the settings that it began with, or it fails.

    args: the flags, defaults filled in. contents: {flag: fingerprint of what it names}, for a
    prompt file or an image may have changed under the same name.
    """
    settings = {k: v for k, v in vars(args).items() if k not in RESUMABLE_KEYS}
    settings |= {f"contents of {flag}": value for flag, value in contents.items()}
    settings = json.loads(json.dumps(settings, default=str))  # paths become texts, as in the file
    same_on_all_ranks({k: v for k, v in settings.items() if k.startswith("contents of")}, run.out)
    record = run.out / "args.json"
    if (run.finished or run.begun is not None) and record.exists():
        saved = load_or_fail(record, lambda: json.loads(record.read_text())["settings"])
        if changed := [k for k in settings if settings[k] != saved.get(k)]:
            fail(
                f"{run.out} was begun with other settings ({', '.join(changed)}); "
                f"repeat them or choose another --out"
            )
    if processes.rank == 0 and not run.finished:
        versions = {name: metadata.version(name) for name in ("torch", "diffusers")}
        about = versions | {"commit": git_commit(), "processes": processes.world}
        atomic_save(record, text=json.dumps(about | {"settings": settings}, indent=1))


def resume(run, tensors, optimizers):
    """Restores a run from its checkpoint, if it has one. Returns (steps done, rows of its log).

    tensors, optimizers: as for save_checkpoint; they are changed in place.
    """
    if run.begun is None:
        return 0, []
    start = load_or_fail(
        run.checkpoint, lambda: load_checkpoint(run.checkpoint, tensors, optimizers)
    )
    rows = [json.loads(line) for line in run.log.read_text().splitlines()]
    return start, [row for row in rows if row["step"] < start]


def progress_bar(start, steps, processes):
    """Iterates over the steps start .. steps - 1, with a progress bar on rank 0."""
    hidden = processes.rank > 0
    return tqdm(range(start, steps), "unlearning", initial=start, total=steps, disable=hidden)


def save_progress(run, log, step, checkpoint, every, stop_requested, processes):
    """Called at each logging step: writes the log, at times a checkpoint, and stops on SIGTERM.

    step: steps done. checkpoint: (tensors, optimizers), see save_checkpoint. every: steps between
    two checkpoints. On SIGTERM all ranks save and exit together, whichever of them received it.
    Fails if a loss is not finite.
    """
    for row in log[-10:]:  # at most as many as were added since the last call
        if not all(map(math.isfinite, row.values())):
            fail(f"not finite at step {row['step']}: {row}; lower --lr and choose another --out")
    stop = torch.tensor(float(bool(stop_requested)), device=processes.device)
    if processes.world > 1:
        dist.all_reduce(stop)
    if processes.rank == 0:
        atomic_save(run.log, text="".join(json.dumps(row) + "\n" for row in log))
    if stop or step % every == 0:
        save_checkpoint(run.checkpoint, step, *checkpoint, processes)
    if stop:
        if processes.world > 1:
            dist.barrier()  # until rank 0 has saved
        fail(f"SIGTERM: saved a checkpoint after {step} steps; continue with --resume")


# ---- 4. files -----------------------------------------------------------------------------------


def atomic_save(path, tensors=None, text=None, pipe=None, metadata=None):
    """Writes a safetensors file, a text file or a pipeline folder atomically.

    It is written under a temporary name and renamed, so that a reader sees the old content or the
    new, and a full disk destroys nothing. Files get the usual permissions (safetensors alone would
    make them readable by their owner only). Fails if it cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    if temporary.is_dir():
        shutil.rmtree(temporary)  # left by a killed save; its shards must not mix with the new ones
    try:
        if pipe is not None:
            pipe.save_pretrained(temporary)
            shutil.rmtree(path, ignore_errors=True)  # only now: a rename does not replace a folder
        elif text is not None:
            temporary.write_text(text, encoding="utf-8")
        else:
            on_cpu = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            save_file(on_cpu, temporary, metadata)
        os.umask(mask := os.umask(0))
        for file in [temporary, *temporary.rglob("*")] if text is None else []:
            if file.suffixes and file.is_file():
                file.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        fail(
            f"{path} cannot be written ({e}); free some space and start again, "
            f"or continue with --resume"
        )


def fingerprint(*parts):
    """16 hex digits of a SHA-256 over tensors, modules, paths (the file's content), other values.

    Two networks, or two files, of the same fingerprint are the same.
    """
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part = part.state_dict()
        if isinstance(part, dict) and any(isinstance(v, torch.Tensor) for v in part.values()):
            for name, tensor in part.items():
                sha.update(f"{name}{tuple(tensor.shape)}".encode())
                sha.update(tensor_bytes(tensor))
        elif isinstance(part, torch.Tensor):
            sha.update(tensor_bytes(part))
        else:
            sha.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return sha.hexdigest()[:16]


def tensor_bytes(tensor):
    """The values of a tensor as an array of bytes, of any dtype."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def fingerprint_files(files):
    """The fingerprint of a data set too large to read: every name, size and last 4 KB.

    The end of a PNG holds the checksum of its pixels, that of a JPEG its last pixels: nearly every
    edit changes it.
    """
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 4096))
            sha.update(f"{Path(file).name}{size}".encode() + f.read())
    return sha.hexdigest()[:16]


def save_checkpoint(path, step, tensors, optimizers, processes):
    """Everything the next step needs, in one file. tensors: {name: tensor}. Called by all ranks.

    No RNG state is stored: all randomness derives from (seed, step).
    """
    tensors = {f"tensor/{name}": t for name, t in tensors.items()}
    for k, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{k}/{i}/{moment}": t for moment, t in state.items()}
    save_tensors(path, tensors, {"step": str(step)}, processes)


def save_tensors(path, tensors, metadata, processes):
    """Rank 0 writes a safetensors file atomically. Called by all ranks: they may hold shards."""
    # One after another goes to the CPU: no card holds more than one of them whole
    tensors = {name: whole(t).cpu() if is_sharded(t) else t for name, t in tensors.items()}
    if processes.rank == 0:
        atomic_save(path, tensors, metadata=metadata)


def load_checkpoint(path, tensors, optimizers):
    """Restores the tensors in place and the optimizers. Returns the number of steps done."""
    saved = load_file(path)
    for name, t in tensors.items():
        t.data.copy_(shard_like(t, saved.pop(f"tensor/{name}")))
    states = [{} for _ in optimizers]
    for name, t in saved.items():
        _, k, i, moment = name.split("/")
        states[int(k)].setdefault(int(i), {})[moment] = t
    for optimizer, state in zip(optimizers, states, strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, moments in state.items():
            state[i] = {name: shard_like(params[i], t) for name, t in moments.items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return checkpoint_step(path)


def shard_like(t, value):
    """The value, or this process's shard of it if t is cut into shards and has its shape."""
    if not is_sharded(t) or value.shape != t.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: every process has read the whole, so that nothing needs to be sent
    where = (t.device_mesh, t.placements)
    return distribute_tensor(value.to(t.device), *where, src_data_rank=None)


def checkpoint_step(path):
    """The number of steps that a checkpoint holds, or None if there is no checkpoint."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as f:
        return int(f.metadata()["step"])


def read_cache(path, name, key, processes):
    """The tensor that an interrupted run left in a cache file, on every rank; or None.

    None: there is no file, or it was made from other inputs (its key differs). Only rank 0 reads:
    the other machines need not see its disk.
    """
    tensor = None
    if processes.rank == 0 and path.exists():

        def read():
            """The tensor, or None if it was made from other inputs."""
            with safe_open(path, "pt") as f:
                same = (f.metadata() or {}).get("key") == key
                return f.get_tensor(name) if same else None

        tensor = load_or_fail(path, read)
    if processes.world > 1:
        shape = [None if tensor is None else tensor.shape]
        dist.broadcast_object_list(shape)
        if shape[0] is not None:
            if tensor is None:
                tensor = torch.empty(shape[0])
            tensor = tensor.to(processes.device)
            dist.broadcast(tensor, 0)
    return None if tensor is None else tensor.to(processes.device)


def git_commit():
    """The commit of this repository, or "" without git or outside a checkout (a downloaded zip)."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        return done.stdout.strip()
    except OSError:
        return ""


# ---- 5. images ----------------------------------------------------------------------------------


def to_tensor(image):
    """PIL RGB -> (3, H, W) in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


def to_image(x):
    """(3, H, W) in [-1, 1] -> PIL RGB."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    x = x.permute(1, 2, 0).contiguous().cpu()  # (H, W, 3)
    height, width, _ = x.shape
    return Image.frombytes("RGB", (width, height), bytes(x.flatten().tolist()))


def open_image(path, flag, about=None):
    """PIL image, upright and loaded; fails if it is missing or damaged (PIL raises six types).

    about: if a small version is enough, its side; a large JPEG is then decoded at an eighth of its
    size, which is faster.
    """
    try:
        with Image.open(path) as image:
            if about:
                image.draft("RGB", (about, about))
            image.load()
            return ImageOps.exif_transpose(image)  # the orientation that a camera records
    except Exception as e:
        fail(f"{flag} {path} cannot be read: {e}")


def to_rgb(image):
    """Any PIL image in 8-bit RGB: transparency on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):  # PIL's own conversion clips 16 bits to black and white
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_exact(path, size, flag):
    """An image to forget or its surrogate, (3, size, size), as the model generates it.

    Nothing is converted or resized: the result would not be the image that the model memorised.
    """
    image = open_image(path, flag)
    if image.mode != "RGB":
        fail(
            f"{flag} {path} has mode {image.mode}; "
            f"expected RGB (no grey, no palette, no transparency)"
        )
    if image.size != (size, size):
        fail(
            f"{flag} {path} is {image.width}x{image.height}; expected {size}x{size}, "
            f"or the --resolution that fits it"
        )
    return to_tensor(image)


def read_cropped(path, size, flag="--remember", about=None):
    """An image of a data set, (3, size, size): its centre square, resized. Any size and mode."""
    image = to_rgb(open_image(path, flag, about))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return to_tensor(square if side == size else square.resize((size, size), Image.LANCZOS))


def list_images(folder):
    """The png, jpg and webp files below a folder, sorted; an empty list without such a folder."""
    return sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)


# ---- 6. evaluation ------------------------------------------------------------------------------


def evaluate_run(task, before, after, *flags):
    """Runs eval.py on a finished run in a separate process and returns its exit code.

    flags: texts, numbers and paths. GPU memory that PyTorch keeps for reuse is released first: the
    two processes share one GPU.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    sys.stdout.flush()  # so that our own lines come first, also in a file
    command = [str(REPO / "eval.py"), task, "--before", str(before), "--after", str(after)]
    command += map(str, flags)
    code = subprocess.run([sys.executable, *command], env=single_process_env()).returncode
    if code:
        again = f"python {shlex.join(command)}"
        print(f"the run is complete; evaluate it again with:\n  {again}", file=sys.stderr)
    return code
