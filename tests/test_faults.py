"""What goes wrong on real machines: one line on stderr, nothing lost, the same weights.

Most tests run for doco.py and instance_unlearn.py alike, on tiny models of random weights:

    1. stopped      SIGTERM, SIGKILL; --resume reaches the same weights, bitwise
    2. the disk     full, truncated files, foreign files
    3. processes    two runs in one folder, several ranks, several machines
    4. resuming     with other contents under the same names
    5. pickles      none is read, none is written
    6. memory       --gradient-checkpointing and --compile give the same weights
    7. the end      evaluation, --save-pipeline, names of run folders
    8. bad input    the last line of every program

Tests that start processes are slow: each of them imports torch and diffusers anew.
"""

import json
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file

import backbones
import common
import doco
import instance_unlearn
from common import REPO

MODULES = {"doco": doco, "instance": instance_unlearn}
CACHES = {"doco": "anchor_latents.safetensors", "instance": "remember.safetensors"}
CAT = ("--target", "Grumpy Cat", "--anchor", "Cat")
# Checkpoints after 10 and 20 steps; 8x8 latents
TRAINING = {
    "doco": ("--steps", "20", "--warmup-steps", "5", "--resolution", "32"),
    "instance": ("--steps", "20", "--surrogate", "flip"),
}
SHORT = {"doco": ("--steps", "6", "--warmup-steps", "1"), "instance": ("--steps", "6")}


class Script:
    """One of the two programs, and the flags of a run of 20 steps. A later flag overrides them."""

    def __init__(self, name, folder, argv):
        self.name, self.folder = name, folder
        self.module = MODULES[name]
        self.argv = [*map(str, argv), "--batch-size", "2", *TRAINING[name]]

    def unlearn(self, *flags, out="run"):
        """Trains in this process, without the evaluation; returns the run folder."""
        argv = [*self.argv, "--out", str(self.folder / out), *flags]
        return self.module.unlearn(self.module.parse_args(argv))

    def start(self, body, out, *flags, processes=None):
        """The same in a process of its own, or under torchrun. body: lines of Python before it."""
        file = self.folder / f"program-{out}.py"
        lines = [
            "import os, signal, sys",
            f"import {self.module.__name__} as m",
            "import common",
            "rank = int(os.environ.get('RANK', 0))",
            body,
            "m.unlearn(m.parse_args(sys.argv[1:]))",
        ]
        file.write_text("\n".join(lines))
        command = [sys.executable]
        if processes:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(processes)]
        command += [str(file), *self.argv, "--out", str(self.folder / out), *flags]
        threads = 1 if processes else torch.get_num_threads()
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPO)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=env, text=True, **pipes)


@pytest.fixture(params=["doco", "instance"])
def script(request, tiny, tiny_ddpm, photos, tmp_path):
    """Each of the two programs in turn, its runs in a fresh folder."""
    argv = ["--model", tiny, *CAT]
    if request.param == "instance":
        argv = ["--model", tiny_ddpm, "--forget", photos / "a.png", "--remember", photos]
    return Script(request.param, tmp_path, argv)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folder of the runs that several tests compare with or begin from."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def whole(script, shared):
    """The folder of a run that nothing interrupted."""
    folder = shared / f"{script.name}-whole"
    if not folder.exists():
        script.unlearn(out=folder)
    return folder


@pytest.fixture
def interrupted(script, shared, monkeypatch):
    """The folder of a run that stopped after 10 of 20 steps; "run", as script.unlearn() has it."""
    folder = shared / f"{script.name}-interrupted"
    if not folder.exists():
        stop_by_sigterm(script, monkeypatch, folder)
    shutil.copytree(folder, script.folder / "run")
    return script.folder / "run"


def stop_by_sigterm(script, monkeypatch, out, *flags):
    """A run that receives SIGTERM in its third step: it saves at step 10, and exits."""
    write_grad, calls = script.module.write_grad, []

    def write_and_signal(*args):
        """Stands before the write of a gradient."""
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        write_grad(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script.module, "write_grad", write_and_signal)
        with pytest.raises(SystemExit, match=r"SIGTERM: saved a checkpoint after 10 steps"):
            script.unlearn(*flags, out=out)


def weights(folder):
    """The trained weights of a run folder, {name: tensor}."""
    delta = folder / "delta.safetensors"
    unet = folder / "pipeline/unet/diffusion_pytorch_model.safetensors"
    return load_file(delta if delta.exists() else unet)


def largest_difference(a, b):
    """Between the weights of two run folders."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def has_result(folder):
    """Whether a run folder holds trained weights."""
    return (folder / "delta.safetensors").exists() or (folder / "pipeline").exists()


# ---- 1. stopped ---------------------------------------------------------------------------------


def test_sigterm_saves_and_resume_gives_the_same_weights(script, interrupted, whole):
    """Bitwise; and SIGTERM means again what it meant before the run."""
    before = signal.getsignal(signal.SIGTERM)
    assert (interrupted / "checkpoint.safetensors").exists() and not has_result(interrupted)
    assert largest_difference(script.unlearn("--resume"), whole) == 0
    assert not (interrupted / "checkpoint.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_saves_where_no_checkpoint_is_due(script, monkeypatch):
    """A run of 400 steps would save every 20 steps by itself."""
    before = signal.getsignal(signal.SIGTERM)
    stop_by_sigterm(script, monkeypatch, "run", "--steps", "400")
    assert (script.folder / "run/checkpoint.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def modified(file):
    """When a file was written, in ns; 0 if there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


@pytest.mark.slow
def test_killed_at_random_moments(script):
    """Once while it loads, twice while it trains: at least once there is a checkpoint left."""
    steps = ("--steps", "240" if script.name == "instance" else "100")
    whole = script.unlearn(*steps, out="whole")
    rng = random.Random(script.name)
    cut = script.folder / "cut"
    left = 0
    for sign in ("log.jsonl", "checkpoint.safetensors", "checkpoint.safetensors"):
        began = modified(cut / sign)
        run = script.start("", "cut", "--resume", *steps)
        while run.poll() is None and modified(cut / sign) <= began:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        run.kill()
        run.communicate()
        was_killed = run.returncode == -signal.SIGKILL
        left += was_killed and (cut / "checkpoint.safetensors").exists()
    assert left >= 1
    assert largest_difference(script.unlearn("--resume", *steps, out="cut"), whole) == 0


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(script, whole):
    """Half a checkpoint lies under its temporary name, the one before it is untouched."""
    save_half = """
save_file, saved = common.save_file, []
def save_half(tensors, path, metadata=None):
    save_file(tensors, path, metadata)
    saved.append(str(path))
    if sum('checkpoint' in p for p in saved) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
common.save_file = save_half
"""
    run = script.start(save_half, "run")
    _, errors = run.communicate()
    assert run.returncode == -signal.SIGKILL, errors
    assert (script.folder / "run/checkpoint.safetensors.tmp").exists()
    assert largest_difference(script.unlearn("--resume"), whole) == 0
    assert not list((script.folder / "run").glob("*.tmp"))


def test_a_finished_run_is_not_trained_again(script, whole):
    """Its evaluation was interrupted: --resume leaves the weights as they are."""
    shutil.copytree(whole, script.folder / "run")
    files = sorted((script.folder / "run").rglob("*.safetensors"))
    before = [modified(f) for f in files]
    assert script.unlearn("--resume") == script.folder / "run"
    assert before == [modified(f) for f in files]


# ---- 2. the disk --------------------------------------------------------------------------------


def test_full_disk_destroys_nothing(script, interrupted, whole, monkeypatch):
    """The second checkpoint exceeds the limit of a file's size, which fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint = common.save_checkpoint

    def save_on_full_disk(*args):
        """Saves with little space left."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save_checkpoint(*args)

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", save_on_full_disk)
        message = r"checkpoint\.safetensors cannot be written [^\n]*--resume$"
        try:
            with pytest.raises(SystemExit, match=message):
                script.unlearn("--resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(interrupted.glob("*.tmp"))
    assert common.checkpoint_step(interrupted / "checkpoint.safetensors") == 10
    assert largest_difference(script.unlearn("--resume"), whole) == 0


def test_full_disk_at_the_very_end_leaves_the_checkpoint(script, interrupted, whole, monkeypatch):
    """The weights cannot be written, and are not lost."""
    save_file = common.save_file

    def no_space(*args, **kwargs):
        """What the operating system reports."""
        raise OSError(28, "No space left on device")

    def no_space_for_delta(tensors, path, metadata=None):
        """Checkpoints fit, the result does not."""
        if "delta" in str(path):
            no_space()
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_file", no_space_for_delta)
        patch.setattr(DDPMPipeline, "save_pretrained", no_space)
        with pytest.raises(SystemExit, match=r"cannot be written .*No space left"):
            script.unlearn("--resume")
    assert common.checkpoint_step(interrupted / "checkpoint.safetensors") == 20
    assert not has_result(interrupted)
    assert largest_difference(script.unlearn("--resume"), whole) == 0


def damage(file, how):
    """Makes a checkpoint unusable."""
    if how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "empty":
        os.truncate(file, 0)
    elif how == "foreign":
        save_file({"something": torch.zeros(3)}, file)
    else:
        others = {name: torch.zeros(*t.shape, 2) for name, t in load_file(file).items()}
        save_file(others, file, {"step": "20"})


@pytest.mark.parametrize("how", ["truncated", "empty", "foreign", "shapes"])
def test_a_damaged_or_foreign_checkpoint_is_one_line(script, interrupted, how):
    """And it is not overwritten: the user may have another copy of it."""
    file = interrupted / "checkpoint.safetensors"
    damage(file, how)
    content = file.read_bytes()
    message = r"checkpoint\.safetensors is corrupted or belongs to .*delete it"
    with pytest.raises(SystemExit, match=message) as e:
        script.unlearn("--resume")
    assert "\n" not in str(e.value) and file.read_bytes() == content


def test_a_damaged_cache_of_images_is_one_line(script, interrupted, monkeypatch):
    """Anchor images, or generated images to remember."""
    flags = []
    if script.name == "instance":
        shutil.rmtree(interrupted)  # it remembers files
        flags = ["--remember", "generated", "--num-remember", "4"]
        stop_by_sigterm(script, monkeypatch, "run", *flags)
    os.truncate(interrupted / CACHES[script.name], 100)
    with pytest.raises(SystemExit, match=r"safetensors is corrupted or belongs to a different run"):
        script.unlearn("--resume", *flags)


def test_what_a_killed_save_left_does_not_mix_with_the_new(tiny_ddpm, tmp_path):
    """The folder of a pipeline, written by another version of diffusers, say."""
    (tmp_path / "pipeline.tmp").mkdir()
    (tmp_path / "pipeline.tmp/shard-of-an-old-save.safetensors").write_text("")
    pipe = backbones.load_pipeline(str(tiny_ddpm))
    common.atomic_save(tmp_path / "pipeline", pipe=pipe)
    assert not list(tmp_path.rglob("shard*"))
    assert (tmp_path / "pipeline/model_index.json").exists()


# ---- 3. processes -------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(script):
    """While the first one lives; then the folder is free."""
    (script.folder / "run").mkdir()
    lock = common.lock_run_dir(script.folder / "run")
    with pytest.raises(SystemExit, match="is in use by another run; choose another --out"):
        script.unlearn()
    lock.close()
    script.unlearn(*SHORT[script.name])


def test_a_loss_that_is_not_finite_is_one_line_and_saves_nothing(script):
    """Its folder is not lost either: the corrected command runs in it."""
    # Not "as e": the exception would hold the lock of the folder
    with pytest.raises(SystemExit, match=r"not finite at step \d+: [^\n]*lower --lr[^\n]*$"):
        script.unlearn("--lr", "1e30", *SHORT[script.name])
    assert (script.folder / "run/args.json").exists() and not has_result(script.folder / "run")
    assert has_result(script.unlearn(*SHORT[script.name]))


# Saves what a rank trained, and the first gradient of it, beside the program
SAVE_EACH_RANK = """
trained, grads = [], []
AdamW, write_grad = m.torch.optim.AdamW, m.write_grad
destroy_process_group = m.dist.destroy_process_group
def record_params(params, **kwargs):
    trained.extend(params)
    return AdamW(params, **kwargs)
def record_grad(params, g):
    if len(g) == sum(p.numel() for p in trained):
        grads.append(g)
    write_grad(params, g)
def save_and_destroy():
    tensors = {str(i): p.detach().contiguous() for i, p in enumerate(trained)}
    tensors['first gradient'] = grads[0]
    common.save_file(tensors, m.Path(sys.argv[0]).with_suffix(f'.{rank}'))
    destroy_process_group()
m.torch.optim.AdamW, m.write_grad = record_params, record_grad
m.dist.destroy_process_group = save_and_destroy
"""


@pytest.mark.slow
def test_three_processes_equal_one_and_each_other_bitwise(script, monkeypatch):
    """Also the generated images, which the ranks share."""
    flags = ["--steps", "8", "--batch-size", "6"]
    if script.name == "instance":
        flags += ["--remember", "generated", "--num-remember", "20"]
    run = script.start(SAVE_EACH_RANK, "three", *flags, processes=3)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    first, *others = (load_file(script.folder / f"program-three.{rank}") for rank in range(3))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)

    write_grad, grads = script.module.write_grad, []
    n = len(first["first gradient"])

    def record_grad(params, g):
        """Records the gradients of the model, not those of the discriminator."""
        if len(g) == n:
            grads.append(g)
        write_grad(params, g)

    monkeypatch.setattr(script.module, "write_grad", record_grad)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun: the number of threads decides the order of sums
    one = script.unlearn(*flags, out="one")
    torch.set_num_threads(threads)

    three = script.folder / "three"
    a, b = (load_file(run / CACHES[script.name]) for run in (one, three))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    atol = 5e-5 * grads[0].abs().max().item()
    torch.testing.assert_close(grads[0], first["first gradient"], rtol=0, atol=atol)
    # Where a gradient is nothing but rounding, as that of a bias before a normalisation, Adam makes
    # a fraction of a whole step of it, 6e-5.
    assert largest_difference(one, three) < (5e-6 if script.name == "doco" else 3e-5)


@pytest.mark.slow
def test_one_failing_rank_stops_all_with_its_message(script):
    """The others do not wait for it."""
    fail_on_rank_1 = """
write_grad, calls = m.write_grad, []
def fail_on_rank_1(*args):
    calls.append(1)
    if rank == 1 and len(calls) == 8:
        sys.exit('rank 1 is out of memory')
    write_grad(*args)
m.write_grad = fail_on_rank_1
"""
    run = script.start(fail_on_rank_1, "run", processes=2)
    _, errors = run.communicate(timeout=200)
    assert run.returncode != 0 and "rank 1 is out of memory" in errors
    assert not has_result(script.folder / "run")


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(script):
    """It passes the signal on to its processes."""
    run = script.start("", "cut", "--steps", "4000", processes=2)
    checkpoint = script.folder / "cut/checkpoint.safetensors"
    log = script.folder / "cut/log.jsonl"
    while run.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    run.terminate()
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0 and "SIGTERM: saved a checkpoint after" in errors, errors
    assert checkpoint.exists()


@pytest.mark.slow
def test_several_machines_without_a_shared_disk(script, interrupted):
    """A run is resumed only where both disks hold its checkpoint; the error names the way out."""
    own_disk = f"os.chdir(os.path.join({str(script.folder)!r}, f'machine-{{rank}}'))"
    first, second = (script.folder / f"machine-{rank}/run" for rank in range(2))
    second.parent.mkdir()
    shutil.copytree(interrupted, first)

    def resume_on_both():
        """(exit code, stderr) of two processes, each in the folder of its machine."""
        run = script.start(own_disk, "unused", "--resume", "--out", "run", processes=2)
        _, errors = run.communicate(timeout=200)
        return run.returncode, errors

    code, errors = resume_on_both()
    assert code != 0 and "checkpoint.safetensors is None on rank 1" in errors, errors
    assert "put the run folder on a shared disk, or copy it from rank 0's machine" in errors

    shutil.copytree(first, second, dirs_exist_ok=True)
    code, errors = resume_on_both()
    assert code == 0 and has_result(first), errors


@pytest.mark.slow
def test_the_first_rank_alone_reads_the_cache_of_images(script):
    """It lies on the first of two machines without a shared disk; the other gets the images."""
    flags = ["--steps", "8"]
    if script.name == "instance":
        flags += ["--remember", "generated", "--num-remember", "4"]
    one = script.unlearn(*flags, out="one")
    for rank in range(2):
        (script.folder / f"machine-{rank}/run").mkdir(parents=True)
    shutil.copy(one / CACHES[script.name], script.folder / "machine-0/run")
    generate_nothing = f"""
os.chdir(os.path.join({str(script.folder)!r}, f'machine-{{rank}}'))
def generate(*args, **kwargs):
    sys.exit('generated again')
if m.__name__ == 'doco':
    import backbones
    backbones.Backbone.generate_latents = generate
else:
    m.generate_samples = generate
"""
    run = script.start(generate_nothing, "unused", *flags, "--out", "run", processes=2)
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert largest_difference(one, script.folder / "machine-0/run") < 1e-4


# ---- 4. resumed with other contents under the same names ----------------------------------------


def change_prompts():
    """Another file of prompts."""
    with open("prompts.txt", "w") as f:
        f.write("one cat\n")


def change_model():
    """Other weights, by one percent."""
    file = "model/unet/diffusion_pytorch_model.safetensors"
    save_file({name: t * 1.01 for name, t in load_file(file).items()}, file)


def change_schedule():
    """Another noise schedule."""
    file = "model/scheduler/scheduler_config.json"
    with open(file) as f:
        config = json.load(f)
    with open(file, "w") as f:
        json.dump(config | {"beta_end": 0.015}, f)


def change_image():
    """Another image to forget."""
    shutil.copy("set/b.png", "forget.png")


def change_surrogate():
    """Another edit of it."""
    shutil.copy("set/c.png", "edited.png")


def change_set():
    """Another image to remember."""
    shutil.copy("set/c.png", "set/b.png")


CHANGES = [
    ("doco", change_prompts, "--prompts"),
    ("doco", change_model, "--model"),
    ("doco", change_schedule, "--model"),
    ("instance", change_model, "--model"),
    ("instance", change_schedule, "--model"),
    ("instance", change_set, "--remember"),
    ("instance", change_image, "--forget"),
    ("instance", change_surrogate, "--surrogate"),
]


@pytest.mark.parametrize(("name", "change", "flag"), CHANGES)
def test_resume_compares_contents_not_names(
    name, change, flag, tiny, tiny_ddpm, photos, shared, tmp_path, monkeypatch
):
    """The same paths, other files: half a run with each would be neither."""
    folder = shared / f"{name}-contents"
    argv = ["--model", "model", "--target", "Grumpy Cat", "--anchor", "cat"]
    argv += ["--prompts", "prompts.txt"]
    if name == "instance":
        argv = ["--model", "model", "--forget", "forget.png", "--remember", "set"]
    script = Script(name, tmp_path, argv)
    if name == "instance":
        script.argv += ["--surrogate", "edited.png"]
    if not folder.exists():
        shutil.copytree(tiny if name == "doco" else tiny_ddpm, folder / "model")
        shutil.copytree(photos, folder / "set")
        shutil.copy(photos / "a.png", folder / "forget.png")
        shutil.copy(photos / "d.png", folder / "edited.png")
        (folder / "prompts.txt").write_text("a cat\na photo of a cat\n")
        monkeypatch.chdir(folder)
        stop_by_sigterm(script, monkeypatch, folder / "run")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # the paths in the settings are relative
    change()
    message = rf"was begun with other settings \([^\n]*contents of {flag}[,)]"
    with pytest.raises(SystemExit, match=message):
        script.unlearn("--resume")


@pytest.mark.slow
def test_a_cache_of_other_images_is_not_used(script):
    """A run that failed left its images; with another seed they are generated anew."""
    flags = [*SHORT[script.name]]
    if script.name == "instance":
        flags += ["--remember", "generated", "--num-remember", "4"]
    cache = script.folder / "run" / CACHES[script.name]
    with pytest.raises(SystemExit, match="not finite"):
        script.unlearn("--lr", "1e30", *flags)
    (first,) = load_file(cache).values()
    run = script.unlearn("--seed", "1", *flags)
    (second,) = load_file(cache).values()
    assert not torch.equal(first, second)
    assert largest_difference(run, script.unlearn("--seed", "1", *flags, out="clean")) == 0


# ---- 5. pickles ---------------------------------------------------------------------------------


def pickled(model, folder):
    """A copy of a model whose UNet is a pickle alone."""
    shutil.copytree(model, folder)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    return folder


def test_a_pickled_model_is_refused_with_the_reason(script):
    """One line, that names the file."""
    folder = pickled(script.argv[1], script.folder / "pickled")
    message = r"diffusion_pytorch_model\.bin is a pickle, which may run any code"
    with pytest.raises(SystemExit, match=message) as e:
        script.unlearn("--model", str(folder))
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_a_pickled_model_can_be_converted_by_the_line_that_is_printed(tiny_ddpm, tmp_path):
    """The line runs as written, and gives the same weights."""
    with pytest.raises(SystemExit, match="convert it once: python -c") as e:
        backbones.load_pipeline(str(pickled(tiny_ddpm, tmp_path / "pickled")))
    assert "\n" not in str(e.value)
    line = r'convert it once: (python -c ".*"), then --model converted'
    command = shlex.split(re.search(line, str(e.value))[1])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    converted = backbones.load_pipeline(str(tmp_path / "converted")).unet.conv_in.weight
    assert torch.equal(converted, backbones.load_pipeline(str(tiny_ddpm)).unet.conv_in.weight)


@pytest.mark.parametrize("flat", [False, True])
def test_a_pickled_model_on_the_hub_is_refused_with_the_reason(flat, monkeypatch):
    """Its files are listed; none of them is opened. flat: an old DDPM, without subfolders."""
    files = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"]
    files = [f.split("/")[-1] for f in files] if flat else files
    monkeypatch.setattr(backbones.HfApi, "list_repo_files", lambda self, model: files)
    message = r"ddpm-celebahq-256: (unet/)?diffusion_pytorch_model\.bin is a pickle"
    model = "google/ddpm-celebahq-256"
    with pytest.raises(SystemExit, match=message) as e:
        backbones.explain_pickles(model, "DDPMPipeline", ["unet", "scheduler"], "no network")
    way_out = f"from diffusers import DDPMPipeline; DDPMPipeline.from_pretrained({model!r})"
    assert way_out in str(e.value) and "(no network)" in str(e.value)
    assert "\n" not in str(e.value)


def test_pickles_that_are_not_needed_refuse_nothing(monkeypatch):
    """The repository of Stable Diffusion has its first format too, and a safety checker."""
    files = ["v1-4.ckpt", "safety_checker/pytorch_model.bin"]
    files += ["unet/diffusion_pytorch_model.safetensors"]
    monkeypatch.setattr(backbones.HfApi, "list_repo_files", lambda self, model: files)
    model = "CompVis/stable-diffusion-v1-4"
    backbones.explain_pickles(model, "StableDiffusionPipeline", ["unet", "vae"], "")


def test_no_pickle_is_written_or_read(script, monkeypatch):
    """Neither by name nor by content."""

    def forbidden(*args, **kwargs):
        """Stands for torch.load and torch.save."""
        raise AssertionError("a pickle")

    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch, "save", forbidden)
    run = script.unlearn("--save-pipeline", *SHORT[script.name])
    files = [f for f in run.rglob("*") if f.is_file()]
    allowed = {".safetensors", ".json", ".jsonl", ".png", ".txt", ""}
    assert {f.suffix for f in files} <= allowed
    magic = (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
    assert not any(f.read_bytes()[:2] in magic for f in files)


# ---- 6. memory and speed ------------------------------------------------------------------------


def test_gradient_checkpointing_changes_the_memory_alone(script, monkeypatch):
    """The same weights, bitwise."""
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint

    def recorded(*args, **kwargs):
        """The checkpoint itself."""
        calls.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", recorded)
    plain = script.unlearn(*SHORT[script.name], out="plain")
    assert not calls
    less = script.unlearn("--gradient-checkpointing", *SHORT[script.name], out="less")
    assert calls and largest_difference(plain, less) == 0


@pytest.mark.slow
def test_compiled_it_learns_the_same(script, monkeypatch):
    """Traced and differentiated as by torch.compile, without its compiler, which takes minutes."""
    calls, compile_module = [], torch.nn.Module.compile

    def compile_eager(module):
        """Module.compile by another backend."""
        calls.append(1)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eager)
    plain = script.unlearn(*SHORT[script.name], out="plain")
    compiled = script.unlearn("--compile", *SHORT[script.name], out="compiled")
    assert calls and largest_difference(plain, compiled) < 1e-5


# ---- 7. the end of a run ------------------------------------------------------------------------


def test_without_git_it_runs(script, monkeypatch):
    """As from a downloaded zip."""
    monkeypatch.setenv("PATH", "/nowhere")
    run = script.unlearn(*SHORT[script.name])
    assert json.loads((run / "args.json").read_text())["commit"] == ""


def test_files_of_a_run_can_be_read_by_others(script, whole):
    """Also those of a pipeline that is written later."""
    shutil.copytree(whole, script.folder / "run")
    run = script.unlearn("--save-pipeline", "--resume")
    assert (run / "pipeline/model_index.json").exists()
    mask = os.umask(0)
    os.umask(mask)
    files = list(run.rglob("*.safetensors"))
    assert files and {f.stat().st_mode & 0o777 for f in files} == {0o666 & ~mask}


@pytest.mark.parametrize("name", ["doco", "instance"])
def test_the_weights_are_saved_before_the_pipeline(
    name, tiny, tiny_sd3, photos, tmp_path, monkeypatch
):
    """A hub that does not answer costs no training: --resume writes the pipeline."""
    argv = ["--model", tiny, *CAT]
    if name == "instance":
        argv = ["--model", tiny_sd3, "--forget", photos / "a.png", "--remember", photos]
    script = Script(name, tmp_path, argv)
    load_pipeline = script.module.load_pipeline

    def offline(model, *args, **kwargs):
        """The safety checker alone is missing."""
        if kwargs.get("safety_checker"):
            common.fail("no network")
        return load_pipeline(model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(script.module, "load_pipeline", offline)
        with pytest.raises(SystemExit, match="no network"):
            script.unlearn("--save-pipeline", *SHORT[name])
    results = {"doco": "delta.safetensors", "instance": "pytorch_lora_weights.safetensors"}
    file = tmp_path / "run" / results[name]
    content = file.read_bytes()
    assert not (tmp_path / "run/pipeline").exists()
    script.unlearn("--save-pipeline", "--resume", *SHORT[name])
    assert (tmp_path / "run/pipeline/model_index.json").exists() and file.read_bytes() == content


@pytest.mark.slow
def test_an_evaluation_that_fails_is_not_a_success(capfd, tmp_path):
    """The exit code is that of eval.py, and the command is printed."""
    model = tmp_path / "no model"
    code = common.evaluate_run("concept", model, tmp_path, "--target", "a", "--anchor", "b")
    errors = capfd.readouterr().err
    assert code == 1 and f"eval.py: error: --before {model}" in errors
    assert "the run is complete; evaluate it again with:\n  python" in errors


def test_the_evaluation_does_not_see_torchrun(monkeypatch):
    """Or it would wait for ranks that have left."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    torchrun |= {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_RANK": "0"}
    torchrun |= {"ROLE_NAME": "default", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    torchrun |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torchrun |= {"OMP_NUM_THREADS": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    env = common.single_process_env()
    assert not env.keys() & torchrun.keys() and env["PATH"] == os.environ["PATH"]
    # With one process, torchrun has set no number of threads: the user has.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert common.single_process_env()["OMP_NUM_THREADS"] == "1"


def test_the_memory_of_the_gpu_is_free_for_the_evaluation(monkeypatch, tmp_path):
    """Both processes share it."""
    order = []

    def run(*args, **kwargs):
        """Stands for the process of eval.py."""
        order.append("run")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("emptied"))
    monkeypatch.setattr(common.subprocess, "run", run)
    assert common.evaluate_run("concept", "model", tmp_path) == 0
    assert order == ["emptied", "run"]


def test_names_of_run_folders():
    """One per target, in any script and of any length, for any file system."""
    assert common.run_name("doco", ["Grumpy Cat"]) == "doco-grumpy-cat"
    assert common.run_name("doco", ["C"]) == "doco-c"
    several = common.run_name("doco", ["flag of japan", "pizza"])
    assert several == "doco-flag-of-japan-pizza"
    strange = ["猫", "кот", "!!!", "?!", "C++", "C", "x" * 300, "x" * 301, "Café", "Cafe"]
    names = [common.run_name("doco", [text]) for text in strange]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"doco-[a-z0-9-]{1,85}", name) for name in names), names


def test_an_error_without_text_is_one_line():
    """Its type serves as its text."""
    assert common.first_line(TimeoutError()) == "TimeoutError"
    assert common.first_line(ValueError("a\nb")) == "a"

    def read():
        """A read that fails without a text."""
        raise TimeoutError

    message = r"x is corrupted or belongs to a different run \(TimeoutError: TimeoutError\)"
    with pytest.raises(SystemExit, match=message):
        common.load_or_fail("x", read)


# ---- 8. every program: bad input, and the exit code ---------------------------------------------

CONCEPTS = ("conabl", "esd", "forget_me_not", "speed", "spm", "uce")
CLOSED = ("speed", "uce")  # without training, so without its flags
INSTANCES = ("duo", "erasediff", "neggrad", "siss")


def run_main(program, flags, monkeypatch):
    """Runs a program as __main__, in this process. program: a file, or a module for python -m."""
    monkeypatch.setattr(sys, "argv", [str(REPO / program), *map(str, flags)])
    if program.endswith(".py"):
        runpy.run_path(str(REPO / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


COWBOY = ("--forget", REPO / "emoji/creatures/twemoji-cowboy-hat-face.png")
BAD_INPUT = [
    ("doco.py", ["--target", "Cat", "--anchor", "cat"], "--target and --anchor are both 'Cat'"),
    ("doco.py", [*CAT, "--model", "no/such"], "--model no/such cannot be loaded"),
    ("doco.py", [*CAT, "--out", "/proc/nowhere"], "--out /proc/nowhere cannot be written"),
    ("instance_unlearn.py", ["--strength", "2"], "--strength 2.0: expected a number in (0, 1]"),
    ("instance_unlearn.py", ["--forget", "no.png"], "--forget no.png cannot be read"),
    ("eval.py", ["concept", *CAT, "--before", "a", "--after", "b"], "--after b: no such folder"),
    ("eval.py", ["instance", *COWBOY, "--before", "a", "--after", "."], "--before a cannot be"),
    *((f"baselines.{n}", [*CAT, "--lr", "0"], "--lr 0") for n in CONCEPTS if n not in CLOSED),
    *((f"baselines.{n}", [*CAT, "cat"], "1 targets but 2 anchors") for n in CLOSED),
    *((f"baselines.{name}", [*COWBOY, "--steps", "0"], "--steps 0") for name in INSTANCES),
    ("experiments.reproduce", [], "which table?"),
    ("experiments.reproduce", ["all", "--seeds", "0"], "--seeds 0: expected at least 1"),
    ("experiments.bench", ["doco", "--steps", "1"], "--steps 1 --batch-size 8: expected"),
    ("experiments.bench", ["build"], "build needs --arch and --out"),
    ("experiments.bench", ["doco", "--model", "no/such"], "--model no/such"),
    ("experiments.theory", ["--out", "/proc/no/a.png"], "--out /proc/no/a.png cannot be"),
    ("emoji/train.py", ["--out", "new"], "npm, which fetches the images, is not installed"),
]


@pytest.mark.parametrize(("program", "flags", "message"), BAD_INPUT)
def test_bad_input_is_one_line(program, flags, message, tmp_path, monkeypatch):
    """On stderr, with the program's name; sys.exit of a text is exit code 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")  # without npm, for emoji/train.py
    with pytest.raises(SystemExit) as e:
        run_main(program, flags, monkeypatch)
    name = program.removesuffix(".py").replace("/", ".").split(".")[-1]
    assert str(e.value).startswith(f"{name}.py: error: ") and message in str(e.value)
    assert isinstance(e.value.code, str) and "\n" not in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["doco.py", *CAT, "--steps", "0"],
        ["-m", "baselines.esd", *CAT, "--steps", "0"],
    ],
)
def test_the_last_line_of_a_process_is_the_error(command, tmp_path):
    """As a person sees it: exit code 1, no traceback."""
    env = os.environ | {"PYTHONPATH": str(REPO)}
    command = [str(REPO / command[0]), *command[1:]] if command[0] != "-m" else command
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.match(r"\w+\.py: error: --", done.stderr.splitlines()[-1]), done.stderr


QUICK = ("doco.py", "instance_unlearn.py", "baselines.uce", "baselines.neggrad")
PROGRAMS = [*QUICK[:2], *(f"baselines.{name}" for name in CONCEPTS + INSTANCES)]
PROGRAMS.remove("baselines.esd")  # samples 64 paths of 50 steps; test_main.py runs it to its end


@pytest.mark.parametrize(
    "program", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PROGRAMS]
)
def test_the_exit_code_is_that_of_the_evaluation(
    program, tiny, tiny_ddpm, photos, tmp_path, monkeypatch, capsys
):
    """eval.py itself, in a process of its own, is replaced by an exit code of 3."""
    task = "concept"
    argv = ["--model", tiny, "--target", "Grumpy Cat", "pizza", "--anchor", "Cat", "food"]
    expected = {"--concept-type": ["object"], "--target": argv[3:5], "--anchor": argv[6:]}
    if program.split(".")[-1] not in CLOSED:
        argv += ["--steps", "1", "--batch-size", "2", "--resolution", "32"]
        expected["--resolution"] = ["32"]
    if program == "instance_unlearn.py" or program.split(".")[-1] in INSTANCES:
        task = "instance"
        images = [photos / "a.png", photos / "c.png"]
        argv = ["--model", tiny_ddpm, "--forget", *images, "--steps", "1"]
        expected = {"--forget": images}
        if program != "baselines.duo":
            argv += ["--remember", photos]
            expected["--real"] = [photos]
        argv += ["--surrogate", "flip"] if program == "instance_unlearn.py" else []
    argv += ["--seed", "4", "--out", tmp_path]
    expected |= {"--before": [argv[1]], "--after": [tmp_path], "--seed": ["4"]}
    calls = []

    def run(command, **kwargs):
        """Stands for the process of eval.py, and for git."""
        calls.append((command, kwargs))
        return SimpleNamespace(returncode=3, stdout="")

    monkeypatch.setattr(common.subprocess, "run", run)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SystemExit) as e:
        run_main(program, argv, monkeypatch)
    assert e.value.code == 3
    assert "the run is complete; evaluate it again with:\n  python" in capsys.readouterr().err
    command, kwargs = calls[-1]
    assert command[:3] == [sys.executable, str(REPO / "eval.py"), task]
    assert by_flag(command[3:]) == {flag: [*map(str, values)] for flag, values in expected.items()}
    assert "TORCHELASTIC_RUN_ID" not in kwargs["env"]


def by_flag(words):
    """{flag: [values]} of a command line."""
    found = {}
    for word in words:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return found
