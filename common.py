"""What every script of this repository needs and no paper describes: errors, run folders, atomic files, evaluation.

Nothing here knows a method or a model family. The scripts call these functions; these functions call none of theirs.
"""

import gc
import hashlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DDPMPipeline, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed
    fcntl = None

REPO = Path(__file__).resolve().parent
FAMILIES = (DDPMPipeline, StableDiffusionPipeline, StableDiffusion3Pipeline)


# ---- 1. errors: one line, exit code 1 ---------------------------------------------------------------------------


def fail(message):
    """Ends the program with one line on stderr, "SCRIPT: error: message", and exit code 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def first_line(error):
    """The first line of an exception's text, or its type where the text is empty (TimeoutError() has none)."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def load_or_fail(path, read):
    """read(), or one line: a truncated or foreign file raises half a dozen types of exceptions."""
    try:
        return read()
    except Exception as e:
        fail(f"{path} is corrupted or belongs to a different run ({type(e).__name__}: {first_line(e)}); "
             f"delete it to start over")  # fmt: skip


# ---- 2. run folders -----------------------------------------------------------------------------------------------


def run_name(method, names):
    """The default folder name of a run: "doco-grumpy-cat". names: the texts it is made of.

    Letters a-z, digits and hyphens, at most 80 of them, so that every file system takes it. Where that loses something (other
    scripts, punctuation, long names), eight hex digits of the texts' SHA-256 keep the folders of different targets apart.
    """
    text = "-".join(names)
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    plain = re.sub(r"[\s_-]+", "-", text.lower()).strip("-")  # what a reader would write for ordinary names
    if slug != plain or len(slug) > 80:
        slug = f"{slug[:70].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".strip("-")
    return f"{method}-{slug}"


def make_run_dir(folder):
    """Creates the folder of a run; one line if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").touch()
    except OSError as e:
        fail(f"--out {folder} cannot be written: {e.strerror}")


def lock_run_dir(folder):
    """Holds an exclusive lock on a run folder while the returned file lives; it ends with the process, however that ends."""
    lock = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder} is in use by another run; choose another --out")
    return lock


def atomic_save(path, tensors=None, text=None, pipe=None, metadata=None):
    """Writes a safetensors file, a text file or a pipeline folder under a temporary name, then renames it.

    So a reader sees the old content or the new, never a part, and a full disk destroys nothing. Files get the usual permissions
    (safetensors alone would make them readable by their owner only).
    """
    temporary = Path(f"{path}.tmp")
    if temporary.is_dir():
        shutil.rmtree(temporary)  # a killed save left it; its shards must not mix with the new ones
    try:
        if pipe is not None:
            pipe.save_pretrained(temporary)
            shutil.rmtree(path, ignore_errors=True)  # only now: a rename does not replace a folder
        elif text is not None:
            temporary.write_text(text, encoding="utf-8")
        else:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, metadata)
        os.umask(mask := os.umask(0))
        for file in [temporary, *temporary.rglob("*")] if text is None else []:
            if file.suffixes and file.is_file():
                file.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        fail(f"{path} cannot be written ({e}); free some space and start again, or continue with --resume")


def fingerprint(*parts):
    """16 hex digits of a SHA-256 over tensors, modules, bytes, paths (the file's content) and anything with a repr."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part = part.state_dict()
        if isinstance(part, dict) and any(isinstance(v, torch.Tensor) for v in part.values()):
            for name, tensor in part.items():
                sha.update(f"{name}{tuple(tensor.shape)}".encode())
                sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(part, torch.Tensor):
            sha.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            sha.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return sha.hexdigest()[:16]


def fingerprint_files(files):
    """The same for a data set that is too large to be read whole: every name, size and last 4 KB.

    The end of a PNG holds the checksum of its pixels, that of a JPEG its last pixels: nearly every edit changes it.
    """
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 4096))
            sha.update(f"{Path(file).name}{size}".encode() + f.read())
    return sha.hexdigest()[:16]


def checkpoint_step(path):
    """The number of steps that a checkpoint holds, or None where there is no checkpoint."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as f:
        return int(f.metadata()["step"])


def read_cache(path, name, key, rank, world, device):
    """The tensor that an interrupted run left in a cache file, on every rank, or None: no file, or one made for other inputs.

    Only the first rank reads: the other machines need not see its disk.
    """
    tensor = None
    if rank == 0 and path.exists():

        def read():
            with safe_open(path, "pt") as f:
                return f.get_tensor(name) if (f.metadata() or {}).get("key") == key else None

        tensor = load_or_fail(path, read)
    if world > 1:
        shape = [None if tensor is None else tensor.shape]
        dist.broadcast_object_list(shape)
        if shape[0] is not None:
            tensor = torch.empty(shape[0], device=device) if tensor is None else tensor.to(device)
            dist.broadcast(tensor, 0)
    return None if tensor is None else tensor.to(device)


def git_commit():
    """The commit of this repository, or "" without git or outside a checkout (a downloaded zip, a slim container)."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# ---- 3. processes -------------------------------------------------------------------------------------------------


def agree(what, folder):
    """All ranks must see the same of a run folder (what: a dict of what this rank sees), or none starts.

    On several machines without a shared disk, only the first one holds the checkpoint. Without this check the others would
    start from the beginning beside it, and the first all_reduce would hang or mix what does not belong together.
    """
    if not dist.is_initialized():
        return
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (socket.gethostname(), what))
    for rank, (host, other) in enumerate(seen):
        for key, value in other.items():
            if value != (first := seen[0][1][key]):
                fail(f"--out {folder}: {key} is {value!r} on rank {rank} ({host}) and {first!r} on rank 0 ({seen[0][0]}); "
                     f"put the run folder on a shared disk, or copy it from rank 0's machine")  # fmt: skip


def close(rank, world, out):
    """Ends the process group; returns the run folder on the first rank, None on the others."""
    if world > 1:
        dist.destroy_process_group()
    return out if rank == 0 else None


# What torchrun sets for its processes. A program that one of them starts must not see it, or it waits for the other ranks.
TORCHRUN = re.compile(r"(TORCHELASTIC_.*|GROUP_.*|ROLE_.*|MASTER_(ADDR|PORT)|(LOCAL_)?(RANK|WORLD_SIZE)|TORCH_NCCL_ASYNC.*)")


def single_process_env():
    """The environment without torchrun's variables, and without its OMP_NUM_THREADS=1 for each of several processes."""
    env = {k: v for k, v in os.environ.items() if not TORCHRUN.fullmatch(k)}
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1 and env.get("OMP_NUM_THREADS") == "1":
        del env["OMP_NUM_THREADS"]
    return env


def evaluate_run(task, before, after, *flags):
    """Runs eval.py on a finished run, in a separate process, and returns its exit code. flags: texts, numbers and paths.

    The GPU memory that PyTorch keeps for reuse is released first: the two processes share one card.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    sys.stdout.flush()  # what was printed so far comes first, also in a file
    command = [str(REPO / "eval.py"), task, "--before", str(before), "--after", str(after), *map(str, flags)]
    code = subprocess.run([sys.executable, *command], env=single_process_env()).returncode
    if code:
        print(f"the run itself is complete; evaluate it again with:\n  python {shlex.join(command)}", file=sys.stderr)
    return code


# ---- 4. models ----------------------------------------------------------------------------------------------------


def is_embedded(model):
    """True for the models in emoji/: they alone are taught and judged by the emoji's images, captions and networks."""
    return os.path.exists(model) and Path(model).resolve().is_relative_to(REPO / "emoji")


def load_pipeline(model, families=FAMILIES, safety_checker=False, **kwargs):
    """A diffusers pipeline of one of the families (classes), from a folder or a hub id; .safetensors alone, nothing executed.

    Without its safety checker, unless asked for: unlearning does not need it. Weights in half precision are found too (variant
    fp16). Every failure is one line: the hub client raises a dozen types of exceptions.
    """
    if os.path.exists(model) and not (Path(model) / "model_index.json").is_file():
        fail(f"--model {model}: no model_index.json there; expected a diffusers pipeline folder or a hub id")
    errors, family, wanted = [], families[0], None
    for variant in (None, "fp16"):
        try:
            index = DiffusionPipeline.load_config(model)
            name = index["_class_name"]
            if not (known := [c for c in families if c.__name__ == name]):
                fail(f"--model {model} is a {name}; expected one of {', '.join(c.__name__ for c in families)}")
            family = known[0]
            # Components that a folder says it lacks, such as Stable Diffusion 3's T5, must be named when it is loaded.
            absent = {part: None for part, source in index.items() if source in ([None, None], (None, None))}
            if family is StableDiffusionPipeline and not safety_checker:
                absent |= dict(safety_checker=None, requires_safety_checker=False)
            if "text_encoder_3" in index.keys() - absent.keys() and isinstance(kwargs.get("dtype"), torch.dtype):
                # T5 has 4.8 billion weights, 19 GB in float32; float16 overflows in it.
                kwargs["dtype"] = {"default": kwargs["dtype"], "text_encoder_3": torch.bfloat16}
            wanted = [part for part in index if part not in absent]
            return family.from_pretrained(model, variant=variant, use_safetensors=True, **absent, **kwargs)
        except Exception as e:
            errors.append(first_line(e))
    explain_pickles(model, family.__name__, wanted or [], errors[0])
    fail(f"--model {model} cannot be loaded (a diffusers folder or hub id with .safetensors weights?): {errors[0]}")


def explain_pickles(model, pipeline, components, error):
    """One line if a wanted component has pickled weights alone: opening one may run any code, so that is the user's call."""
    if os.path.exists(model):
        files = [f.relative_to(model).as_posix() for f in sorted(Path(model).rglob("*")) if f.is_file()]
    else:
        try:
            files = HfApi().list_repo_files(str(model))
        except Exception:  # no network, no such repository: the error of the loading itself says so
            return
    folders = {".", *components}  # an old DDPM has its files beside model_index.json
    weights = {(str(Path(f).parent), Path(f).suffix): f for f in files if str(Path(f).parent) in folders}
    for (folder, suffix), name in weights.items():
        known = name.split("/")[-1].startswith(("diffusion_pytorch_model", "pytorch_model", "model"))
        if suffix == ".bin" and known and (folder, ".safetensors") not in weights:
            code = (f"from diffusers import {pipeline}; "
                    f"{pipeline}.from_pretrained({str(model)!r}).save_pretrained('converted')")  # fmt: skip
            fail(f"--model {model}: {name} is a pickle, which may run any code, and there is no .safetensors beside it; "
                 f"if you trust it, convert it once: python -c \"{code}\", then --model converted ({error})")  # fmt: skip
