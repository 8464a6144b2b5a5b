"""What goes wrong on real machines, for doco.py and instance_unlearn.py alike: one line, nothing lost, the same weights."""

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
from safetensors.torch import load_file, save_file

import common
import doco
import instance_unlearn

STEPS = {"doco": ["--steps", "40", "5"], "instance": ["--steps", "40", "--surrogate", "flip"]}


@pytest.fixture(params=["doco", "instance"])
def script(request, tiny, tiny_ddpm, photos, tmp_path):
    """One of the two: its module, the flags of a run of 40 iterations, and unlearn(*flags, out) -> the folder."""
    module = {"doco": doco, "instance": instance_unlearn}[request.param]
    argv = ["--model", str(tiny), "--target", "Grumpy Cat", "--anchor", "Cat"]
    if request.param == "instance":
        argv = ["--model", str(tiny_ddpm), "--forget", str(photos / "a.png"), "--remember", str(photos)]
    argv += ["--batch-size", "6", *STEPS[request.param]]

    def unlearn(*flags, out="run"):
        return module.unlearn(module.parse_args([*argv, "--out", str(tmp_path / out), *flags]))

    return SimpleNamespace(name=request.param, module=module, argv=argv, unlearn=unlearn, folder=tmp_path)


def weights(folder):
    delta = folder / "delta.safetensors"
    return load_file(delta if delta.exists() else folder / "pipeline/unet/diffusion_pytorch_model.safetensors")


def largest_difference(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def program(script, body, out, *flags, processes=None):
    """The script in a process of its own (or under torchrun), with lines of Python before it; without the scoring."""
    file = script.folder / f"program-{out}.py"
    file.write_text(f"import os, signal, sys\nimport {script.module.__name__} as m\nrank = int(os.environ.get('RANK', 0))\n"
                    f"{body}\nm.unlearn(m.parse_args(sys.argv[1:]))\n")  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes else []), str(file), *script.argv, "--out", str(script.folder / out)]
    env = os.environ | {"OMP_NUM_THREADS": "1" if processes else str(torch.get_num_threads()), "PYTHONPATH": str(doco.REPO)}
    return subprocess.Popen([*command, *flags], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stopped(script, monkeypatch):
    """A run that was asked to end by SIGTERM, in its third iteration."""
    write, calls = script.module.write_grad, []

    def ask(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        write(*args)

    with monkeypatch.context() as m:
        m.setattr(script.module, "write_grad", ask)
        with pytest.raises(SystemExit, match=r"asked to end \(SIGTERM\) and saved after 10 "):
            script.unlearn()
    return script.folder / "run"


# ---- stopped from outside: the same command with --resume reaches the same weights, bitwise --------------------------


def test_asked_to_end_it_saves_and_goes_on(script, monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stopped(script, monkeypatch)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # that run ended by an exception, and with it, usually, the process
    assert largest_difference(script.unlearn("--resume"), script.unlearn(out="whole")) == 0
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL  # a run that ended well puts it back itself


def test_asked_to_end_it_saves_where_no_checkpoint_is_due(script, monkeypatch):
    script.argv[script.argv.index("--steps") + 1] = "400"  # by itself, it would save every 20
    assert (stopped(script, monkeypatch) / "checkpoint.safetensors").exists()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_killed_at_random_moments(script):
    """Once while it loads, twice while it trains, of which at least one leaves a checkpoint to go on from."""
    script.argv[script.argv.index("--steps") + 1] = "240" if script.name == "instance" else "100"
    whole, left, draw = script.unlearn(out="whole"), 0, random.Random(script.name)
    cut = script.folder / "cut"
    for sign in ("log.jsonl", "checkpoint.safetensors", "checkpoint.safetensors"):
        run = program(script, "", "cut", "--resume")
        began = (cut / sign).stat().st_mtime_ns if (cut / sign).exists() else 0
        while run.poll() is None and not ((cut / sign).exists() and (cut / sign).stat().st_mtime_ns > began):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        run.kill()
        run.communicate()
        left += (cut / "checkpoint.safetensors").exists() and run.returncode == -signal.SIGKILL
    assert left >= 1
    assert largest_difference(script.unlearn("--resume", out="cut"), whole) == 0


def test_killed_in_the_middle_of_a_save(script):
    half = """
import common
save, saved = common.save_file, []
def save_half(tensors, path, metadata=None):
    save(tensors, path, metadata)
    saved.append(path)
    if len([p for p in saved if 'checkpoint' in str(p)]) == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
common.save_file = save_half"""
    run = program(script, half, "cut")
    run.communicate()
    assert run.returncode == -signal.SIGKILL and (script.folder / "cut/checkpoint.safetensors.tmp").exists()
    assert largest_difference(script.unlearn("--resume", out="cut"), script.unlearn(out="whole")) == 0
    assert not list((script.folder / "cut").glob("*.tmp"))


def test_a_run_that_ended_while_it_was_scored_is_not_trained_again(script):
    run = script.unlearn()
    before = [f.stat().st_mtime_ns for f in sorted(run.rglob("*.safetensors"))]
    assert script.unlearn("--resume") == run
    assert before == [f.stat().st_mtime_ns for f in sorted(run.rglob("*.safetensors"))]


# ---- the disk -----------------------------------------------------------------------------------------------------


def test_full_disk_spoils_nothing(script, monkeypatch):
    """The second checkpoint hits the limit of a file's size, which fails as a full disk does."""
    limits, saved, save = resource.getrlimit(resource.RLIMIT_FSIZE), [], script.module.save_checkpoint

    def save_little(*args):
        saved.append(args)
        if len(saved) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(*args)

    monkeypatch.setattr(script.module, "save_checkpoint", save_little)
    try:
        with pytest.raises(SystemExit, match=r"checkpoint\.safetensors cannot be written [^\n]*--resume$"):
            script.unlearn()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((script.folder / "run").glob("*.tmp"))
    monkeypatch.undo()
    assert largest_difference(script.unlearn("--resume"), script.unlearn(out="whole")) == 0


def test_full_disk_at_the_very_end_keeps_the_checkpoint(script, monkeypatch):
    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    target = common if script.name == "doco" else instance_unlearn.DDPMPipeline
    name, save = ("save_file", common.save_file) if script.name == "doco" else ("save_pretrained", None)
    fail = no_room if save is None else lambda t, p, m=None: no_room() if "delta" in str(p) else save(t, p, m)
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(SystemExit, match=r"cannot be written .*No space left"):
        script.unlearn()
    monkeypatch.undo()
    assert (script.folder / "run/checkpoint.safetensors").exists()
    assert largest_difference(script.unlearn("--resume"), script.unlearn(out="whole")) == 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "shapes"])
def test_a_damaged_or_foreign_checkpoint_is_one_line(script, monkeypatch, damage):
    file = stopped(script, monkeypatch) / "checkpoint.safetensors"
    if damage in ("truncated", "empty"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if damage == "truncated" else 0])
    elif damage == "foreign":
        save_file({"something": torch.zeros(3)}, file)
    else:
        save_file({n: torch.zeros(*t.shape, 2) for n, t in load_file(file).items()}, file, {"step": "20"})
    content = file.read_bytes()
    with pytest.raises(SystemExit, match=r"checkpoint\.safetensors is corrupted or belongs to .*delete it") as e:
        script.unlearn("--resume")
    assert "\n" not in str(e.value) and file.read_bytes() == content


def test_damaged_anchor_pictures_are_one_line(script, monkeypatch):
    if script.name == "instance":
        script.argv += ["--remember", "generate:4"]
    run = stopped(script, monkeypatch)
    cache = run / ("anchor_latents.safetensors" if script.name == "doco" else "remember.safetensors")
    cache.write_bytes(cache.read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"safetensors is corrupted or belongs to a different run"):
        script.unlearn("--resume")


# ---- other runs, other ranks --------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(script):
    (script.folder / "run").mkdir()
    lock = common.lock_run_dir(script.folder / "run")
    with pytest.raises(SystemExit, match="is in use by another run; choose another --out"):
        script.unlearn()
    lock.close()
    script.unlearn()


def test_a_loss_that_is_not_finite_is_one_line_and_saves_nothing(script):
    with pytest.raises(SystemExit, match=r"not finite at (iteration|update) .*lower --lr"):
        script.unlearn("--lr", "1e30")
    assert not (script.folder / "run/delta.safetensors").exists() and not (script.folder / "run/pipeline").exists()


def test_three_processes_equal_one_and_each_other_bitwise(script, monkeypatch):
    """Also the pictures to keep, which the ranks draw in parts."""
    if script.name == "instance":
        script.argv[script.argv.index("--remember") + 1] = "generate:20"
    script.argv[script.argv.index("--steps") + 1] = "8"
    each = """
import common
made, grads, adam, write, destroy = [], [], m.torch.optim.AdamW, m.write_grad, m.dist.destroy_process_group
m.torch.optim.AdamW = lambda params, **k: (made.extend(params), adam(params, **k))[1]
m.write_grad = lambda ps, g: (grads.append(g) if len(g) == sum(p.numel() for p in made) else None, write(ps, g))
def keep():
    named = {str(i): p.detach().contiguous() for i, p in enumerate(made)}
    common.save_file(named | {'first gradient': grads[0]}, m.Path(sys.argv[0]).with_suffix(f'.{rank}'))
    destroy()
m.dist.destroy_process_group = keep"""
    run = program(script, each, "three", processes=3)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    ranks = [load_file(script.folder / f"program-three.{rank}") for rank in range(3)]
    assert all(torch.equal(ranks[0][n], other[n]) for other in ranks[1:] for n in ranks[0])
    grads, write, n = [], script.module.write_grad, len(ranks[0]["first gradient"])
    monkeypatch.setattr(script.module, "write_grad", lambda ps, g: (grads.append(g) if len(g) == n else None, write(ps, g)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun gives each process: other numbers of threads sum in another order
    one = script.unlearn(out="one")
    torch.set_num_threads(threads)
    cache = "anchor_latents.safetensors" if script.name == "doco" else "remember.safetensors"
    a, b = (next(iter(load_file(folder / cache).values())) for folder in (one, script.folder / "three"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(grads[0], ranks[0]["first gradient"], rtol=0, atol=5e-5 * grads[0].abs().max().item())
    # Where a gradient is nothing but rounding, as a bias's before a normalisation, Adam makes a part of a step (6e-5) of it
    assert largest_difference(one, script.folder / "three") < (5e-6 if script.name == "doco" else 3e-5)


def test_one_failing_rank_stops_all_with_its_message(script):
    fail = """
write, calls = m.write_grad, []
def fail(*a):
    calls.append(1)
    if rank == 1 and len(calls) == 8:
        sys.exit('rank 1 has had enough')
    write(*a)
m.write_grad = fail"""
    began = time.time()
    run = program(script, fail, "run", processes=2)
    _, errors = run.communicate(timeout=240)
    assert run.returncode != 0 and "rank 1 has had enough" in errors and time.time() - began < 200
    assert not (script.folder / "run/delta.safetensors").exists() and not (script.folder / "run/pipeline").exists()


def test_two_processes_asked_to_end_save_and_go_on(script):
    script.argv[script.argv.index("--steps") + 1] = "400"
    run = program(script, "", "cut", processes=2)
    while not (script.folder / "cut/checkpoint.safetensors").exists() and run.poll() is None:
        time.sleep(0.05)
    run.terminate()
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0 and "asked to end (SIGTERM) and saved after" in errors, errors
    assert (script.folder / "cut/checkpoint.safetensors").exists()


# ---- no pickle ----------------------------------------------------------------------------------------------------


def test_a_model_that_is_a_pickle_is_refused_with_the_reason(script):
    folder = script.folder / "pickled"
    shutil.copytree(script.argv[1], folder)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(SystemExit, match=r"diffusion_pytorch_model\.bin is a pickle, which may run any code") as e:
        script.unlearn("--model", str(folder))
    assert "\n" not in str(e.value)


def test_no_pickle_is_written_or_read(script, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle")

    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, forbidden)
    run = script.unlearn("--save-pipeline")
    files = [f for f in run.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jsonl", ".png", ".txt", ""}
    assert not any(f.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05") for f in files)


# ---- slower or faster, the same weights ---------------------------------------------------------------------------


def test_gradient_checkpointing_changes_the_memory_alone(script, monkeypatch):
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: (calls.append(1), checkpoint(*a, **k))[1])
    whole, less = script.unlearn(out="whole"), script.unlearn("--gradient-checkpointing", out="less")
    assert calls and largest_difference(whole, less) == 0


def test_compiled_it_learns_the_same(script, monkeypatch):
    """Traced and differentiated as torch.compile does, then run without its C++ or Triton code, which takes minutes to make."""
    graphs, build = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: (graphs.append(1), build(self, backend="aot_eager")))
    script.argv[script.argv.index("--steps") + 1] = "6"
    plain, compiled = script.unlearn(out="plain"), script.unlearn("--compile", out="compiled")
    assert graphs and largest_difference(plain, compiled) < 1e-5


# ---- resumed with other contents under the same names ---------------------------------------------------------------


def change_prompts(script):
    (script.folder / "prompts.txt").write_text("one cat\n")


def change_model(script):
    file = script.folder / "model/unet/diffusion_pytorch_model.safetensors"
    save_file({n: t * 1.01 for n, t in load_file(file).items()}, file)


def change_schedule(script):
    file = script.folder / "model/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.015}))


def change_picture(script):
    shutil.copy(script.folder / "set/b.png", script.folder / "forget.png")


def change_surrogate(script):
    shutil.copy(script.folder / "set/c.png", script.folder / "edited.png")


def change_set(script):
    shutil.copy(script.folder / "set/c.png", script.folder / "set/b.png")


CHANGES = [("doco", change_prompts, "--prompts"), ("doco", change_model, "--model"), ("doco", change_schedule, "--model"),
           ("instance", change_model, "--model"), ("instance", change_schedule, "--model"),
           ("instance", change_set, "--remember"), ("instance", change_picture, "--forget"),
           ("instance", change_surrogate, "--surrogate")]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "flag"), CHANGES)
def test_resume_compares_contents_not_names(name, change, flag, request, tiny, tiny_ddpm, photos, tmp_path, monkeypatch):
    """The same paths, other files: the run must not go on with half of one and half of the other."""
    shutil.copytree(tiny if name == "doco" else tiny_ddpm, tmp_path / "model")
    shutil.copytree(photos, tmp_path / "set")
    shutil.copy(photos / "a.png", tmp_path / "forget.png")
    shutil.copy(photos / "d.png", tmp_path / "edited.png")
    (tmp_path / "prompts.txt").write_text("a cat\na photo of a cat\n")
    module = {"doco": doco, "instance": instance_unlearn}[name]
    argv = ["--target", "Grumpy Cat", "--anchor", "cat", "--prompts", str(tmp_path / "prompts.txt"), *STEPS["doco"]]
    if name == "instance":
        argv = ["--forget", str(tmp_path / "forget.png"), "--remember", str(tmp_path / "set"), *STEPS["instance"]]
        argv += ["--surrogate", str(tmp_path / "edited.png")]
    argv += ["--model", str(tmp_path / "model"), "--batch-size", "2"]
    script = SimpleNamespace(name=name, module=module, argv=argv, folder=tmp_path)
    script.unlearn = lambda *f, out="run": module.unlearn(module.parse_args([*argv, "--out", str(tmp_path / out), *f]))
    stopped(script, monkeypatch)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    change(script)
    with pytest.raises(SystemExit, match=rf"was begun with other settings \(contents of {flag}\)"):
        script.unlearn("--resume")


def test_images_of_another_model_are_not_used(script, tiny, tmp_path):
    """A run that failed after it had sampled its images leaves them; with another seed they are sampled anew."""
    cache = script.folder / "run" / ("anchor_latents.safetensors" if script.name == "doco" else "remember.safetensors")
    script.argv += ["--remember", "generate:4"] if script.name == "instance" else []
    with pytest.raises(SystemExit, match="not finite"):
        script.unlearn("--lr", "1e30")
    (script.folder / "run/checkpoint.safetensors").unlink(missing_ok=True)
    first = next(iter(load_file(cache).values()))
    run = script.unlearn("--seed", "1")
    assert not torch.equal(first, next(iter(load_file(cache).values())))
    assert largest_difference(run, script.unlearn("--seed", "1", out="clean")) == 0


def test_a_run_that_failed_on_bad_input_refuses_nothing(script):
    """It has written args.json but nothing that could be lost: the corrected command runs in the same folder."""
    with pytest.raises(SystemExit, match="not finite"):
        script.unlearn("--lr", "1e30", "--steps", "5", *(["1"] if script.name == "doco" else []))
    assert (script.folder / "run/args.json").exists()
    script.unlearn("--steps", "5", *(["1"] if script.name == "doco" else []))


def test_several_machines_without_a_shared_disk_say_what_is_missing(script):
    """Two ranks, each with a disk of its own: a fresh run works, a resumed one needs the checkpoint on both."""
    script.argv[script.argv.index("--steps") + 1] = "20"
    own = f"os.chdir(os.path.join({str(script.folder)!r}, f'machine-{{rank}}'))"
    for rank in range(2):
        (script.folder / f"machine-{rank}").mkdir()
    stop_at_10 = own + """
write, calls = m.write_grad, []
def ask(*a):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    write(*a)
m.write_grad = ask"""
    out = [*script.argv, "--out", "run"]
    script.argv = out
    script_run = lambda body, *flags: program(script, body, "unused", *flags, "--out", "run", processes=2)  # noqa: E731
    run = script_run(stop_at_10)
    _, errors = run.communicate(timeout=200)
    assert "asked to end (SIGTERM) and saved after 10" in errors, errors
    assert (script.folder / "machine-0/run/checkpoint.safetensors").exists()
    assert not (script.folder / "machine-1/run/checkpoint.safetensors").exists()
    run = script_run(own, "--resume")
    _, errors = run.communicate(timeout=200)
    assert run.returncode != 0 and "checkpoint.safetensors is None on rank 1" in errors, errors
    assert "put the run folder on a shared disk, or copy it from rank 0's machine" in errors
    shutil.copytree(script.folder / "machine-0/run", script.folder / "machine-1/run", dirs_exist_ok=True)
    run = script_run(own, "--resume")
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    (script.folder / "machine-0/run/checkpoint.safetensors").unlink(missing_ok=True)


def test_the_first_rank_alone_reads_what_was_sampled(script, monkeypatch):
    """The images of an interrupted run lie on the first machine; the others get them from there."""
    script.argv[script.argv.index("--steps") + 1] = "8"
    if script.name == "instance":
        script.argv[script.argv.index("--remember") + 1] = "generate:4"
    one = script.unlearn(out="one")
    cache = "anchor_latents.safetensors" if script.name == "doco" else "remember.safetensors"
    for rank in range(2):
        (script.folder / f"machine-{rank}/run").mkdir(parents=True)
    shutil.copy(one / cache, script.folder / "machine-0/run")
    refuse = f"""os.chdir(os.path.join({str(script.folder)!r}, f'machine-{{rank}}'))
def sampled(*a, **k):
    sys.exit('sampled again')
m.sample_anchor_latents = m.draw_pool = sampled"""
    run = program(script, refuse, "unused", "--out", "run", processes=2)
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert largest_difference(one, script.folder / "machine-0/run") < 1e-4


# ---- the end of a run -------------------------------------------------------------------------------------------------


def test_without_git_it_runs(script, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    run = script.unlearn()
    assert json.loads((run / "args.json").read_text())["commit"] == ""


def test_an_evaluation_that_fails_is_not_a_success(capfd, tmp_path):
    code = common.evaluate_run("concept", tmp_path / "no model", tmp_path, "--target", "a", "--anchor", "b")
    errors = capfd.readouterr().err
    assert code == 1 and "the run itself is complete; evaluate it again with:\n  python" in errors


def test_the_evaluation_does_not_see_torchrun(monkeypatch):
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "ROLE_RANK": "0",
                "ROLE_NAME": "default", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
                "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1", "GROUP_WORLD_SIZE": "1"}  # fmt: skip
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    env = common.single_process_env()
    assert not env.keys() & torchrun.keys() and env["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # one process: torchrun has set no number of threads, the user has
    assert common.single_process_env()["OMP_NUM_THREADS"] == "1"


def test_the_weights_are_saved_before_the_pipeline(tiny, tiny_sd3, photos, tmp_path, monkeypatch):
    """A safety checker that has gone, a hub that does not answer: the training is not lost, --resume writes the pipeline."""
    doco_argv = ["--model", str(tiny), "--target", "Grumpy Cat", "--anchor", "Cat", "--steps", "4", "1", "--batch-size", "2"]
    instance_argv = ["--model", str(tiny_sd3), "--forget", str(photos / "a.png"), "--remember", "generate:4", "--steps", "2"]
    instance_argv += ["--surrogate", "flip", "--batch-size", "2"]
    for module, argv, file in ((doco, doco_argv, "delta.safetensors"),
                               (instance_unlearn, instance_argv, "pytorch_lora_weights.safetensors")):  # fmt: skip
        run, load = tmp_path / module.__name__, module.load_pipeline

        def gone(model, *args, load=load, **kwargs):
            return common.fail("no network") if kwargs.get("safety_checker") else load(model, *args, **kwargs)

        args = module.parse_args([*argv, "--out", str(run), "--save-pipeline"])
        with monkeypatch.context() as m:
            m.setattr(module, "load_pipeline", gone)
            with pytest.raises(SystemExit, match="no network"):
                module.unlearn(args)
        assert (run / file).exists() and not (run / "pipeline").exists()
        before = (run / file).read_bytes()
        module.unlearn(module.parse_args([*argv, "--out", str(run), "--save-pipeline", "--resume"]))
        assert (run / "pipeline/model_index.json").exists() and (run / file).read_bytes() == before


def test_an_error_without_text_is_one_line():
    assert common.first_line(TimeoutError()) == "TimeoutError" and common.first_line(ValueError("a\nb")) == "a"
    with pytest.raises(SystemExit, match=r"x is corrupted or belongs to a different run \(TimeoutError: TimeoutError\)"):
        common.load_or_fail("x", lambda: (_ for _ in ()).throw(TimeoutError()))


# ---- names of folders, pickles ----------------------------------------------------------------------------------------


def test_folders_of_runs():
    assert common.run_name("doco", ["Grumpy Cat"]) == "doco-grumpy-cat"
    assert common.run_name("doco", ["flag of japan", "pizza"]) == "doco-flag-of-japan-pizza"
    strange = ["猫", "кот", "!!!", "?!", "C++", "C", "x" * 300, "x" * 301, "Café", "Cafe"]
    names = [common.run_name("doco", [s]) for s in strange]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"doco-[a-z0-9-]{1,85}", name) for name in names), names
    assert common.run_name("doco", ["C"]) == "doco-c"


def test_files_of_a_run_can_be_read_by_others(script):
    run = script.unlearn("--save-pipeline")
    mask = os.umask(0)
    os.umask(mask)
    files = list(run.rglob("*.safetensors"))
    assert files and {f.stat().st_mode & 0o777 for f in files} == {0o666 & ~mask}


def test_what_a_killed_save_left_does_not_mix_with_the_new(tiny_ddpm, tmp_path):
    (tmp_path / "pipeline.tmp").mkdir()
    (tmp_path / "pipeline.tmp/shard-of-an-old-save.safetensors").write_text("")
    common.atomic_save(tmp_path / "pipeline", pipe=common.load_pipeline(str(tiny_ddpm)))
    assert not list(tmp_path.rglob("shard*")) and (tmp_path / "pipeline/model_index.json").exists()


def test_a_pickled_model_can_be_converted_by_the_line_that_is_printed(tiny_ddpm, photos, tmp_path, monkeypatch):
    shutil.copytree(tiny_ddpm, tmp_path / "pickled")
    file = tmp_path / "pickled/unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(SystemExit, match="convert it once: python -c") as e:
        common.load_pipeline(str(tmp_path / "pickled"))
    assert "\n" not in str(e.value)
    line = re.search(r'convert it once: (python -c ".*"), then --model converted', str(e.value))[1]
    subprocess.run(shlex.split(line.replace("python", sys.executable, 1)), cwd=tmp_path, check=True)
    assert torch.equal(common.load_pipeline(str(tmp_path / "converted")).unet.conv_in.weight,
                       common.load_pipeline(str(tiny_ddpm)).unet.conv_in.weight)  # fmt: skip


def test_a_pickled_model_on_the_hub_says_so(monkeypatch):
    """As google/ddpm-celebahq-256 may be: the list of its files is asked for, none of them is opened."""
    files = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin", "scheduler/scheduler_config.json"]
    for flat in (False, True):
        listed = [f.split("/")[-1] for f in files] if flat else files
        monkeypatch.setattr(common.HfApi, "list_repo_files", lambda self, model, listed=listed: listed)
        with pytest.raises(SystemExit, match=r"ddpm-celebahq-256: (unet/)?diffusion_pytorch_model\.bin is a pickle") as e:
            common.explain_pickles("google/ddpm-celebahq-256", "DDPMPipeline", ["unet", "scheduler"], "no network")
        assert "from diffusers import DDPMPipeline; DDPMPipeline.from_pretrained('google/ddpm-celebahq-256')" in str(e.value)
        assert "\n" not in str(e.value) and "(no network)" in str(e.value)
    others = ["v1-4.ckpt", "safety_checker/pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors"]
    monkeypatch.setattr(common.HfApi, "list_repo_files", lambda self, model: others)
    common.explain_pickles("CompVis/stable-diffusion-v1-4", "StableDiffusionPipeline", ["unet", "vae"], "")  # nothing wanted


# ---- every program's last lines ---------------------------------------------------------------------------------------


CONCEPTS = ("doco", "conabl", "spm", "uce", "forget_me_not")
INSTANCES = ("instance_unlearn", "neggrad", "erasediff", "siss", "duo")


@pytest.mark.parametrize("name", [*CONCEPTS, *INSTANCES])
def test_every_program_evaluates_its_run_and_exits_as_the_evaluation_does(name, tiny, tiny_ddpm, photos, tmp_path, monkeypatch):
    """eval.py itself is replaced by one that only says 3."""
    commands, file = [], common.REPO / ("" if name in ("doco", "instance_unlearn") else "baselines") / f"{name}.py"
    argv = ["--model", tiny, "--target", "Grumpy Cat", "pizza", "--anchor", "Cat", "food", "--seed", "4", "--out", tmp_path]
    argv += ["--steps", "1", "--batch-size", "2", "--resolution", "32"] if name != "uce" else []
    wanted = ["concept", "--before", tiny, "--after", tmp_path, "--seed", "4", "--concept-type", "object"]
    wanted += ["--resolution", "32"] if name != "uce" else []
    wanted += ["--target", "Grumpy Cat", "pizza", "--anchor", "Cat", "food"]
    if name in INSTANCES:
        argv = ["--model", tiny_ddpm, "--forget", photos / "a.png", photos / "c.png", "--seed", "4", "--out", tmp_path]
        argv += ["--steps", "1"]
        argv += ["--remember", photos] if name != "duo" else []
        argv += ["--surrogate", "flip"] if name == "instance_unlearn" else []
        wanted = ["instance", "--before", tiny_ddpm, "--after", tmp_path, "--seed", "4"]
        wanted += ["--real", photos] if name not in ("duo", "instance_unlearn") else []
        wanted += ["--forget", photos / "a.png", photos / "c.png"]
        wanted += ["--real", photos] if name == "instance_unlearn" else []

    def run(command, **kwargs):
        commands.append((command, kwargs))
        return SimpleNamespace(returncode=3, stdout="")

    monkeypatch.setattr(common.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", [str(file), *map(str, argv)])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(file), run_name="__main__")
    assert end.value.code == 3
    command, kwargs = commands[-1]
    assert command == [sys.executable, str(common.REPO / "eval.py"), *map(str, wanted)]
    assert "TORCHELASTIC_RUN_ID" not in kwargs["env"]


def test_the_memory_of_the_card_is_free_for_the_evaluation(monkeypatch, tmp_path):
    order = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("emptied"))
    monkeypatch.setattr(common.subprocess, "run", lambda *a, **k: order.append("run") or SimpleNamespace(returncode=0))
    assert common.evaluate_run("concept", "model", tmp_path) == 0 and order == ["emptied", "run"]
