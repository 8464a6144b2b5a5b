"""common.py: run folders, settings, checkpoints, caches, images, seeds, --help.

What a real run does with them when something goes wrong is in test_faults.py.
"""

import argparse
import json
import math
import os
import re
import signal
import stat
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common

ONE = common.Processes(0, 1, torch.device("cpu"))


def fails(message):
    """Expects the program to end with one line that contains the message."""
    return pytest.raises(SystemExit, match=rf"(?s)\A[^\n]*{re.escape(message)}[^\n]*\Z")


# ---- errors and help ----------------------------------------------------------------------------


def test_fail_names_the_program_and_is_exit_code_1(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/doco.py", "--steps"])
    with pytest.raises(SystemExit) as e:
        common.fail("--steps 0: expected at least 1")
    assert e.value.code == "doco.py: error: --steps 0: expected at least 1"


def test_load_or_fail_returns_what_was_read_or_is_one_line(tmp_path):
    assert common.load_or_fail("x", lambda: 7) == 7
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(b"half")
    with fails(f"{file} is corrupted or belongs to a different run"):
        common.load_or_fail(file, lambda: load_file(file))


def test_help_shows_the_docstring_and_each_default(capsys):
    """None and False are no defaults to show: the help text tells what happens without the flag."""
    parser = argparse.ArgumentParser(
        description="One.\n\n    an equation\n", formatter_class=common.HelpFormatter
    )
    parser.add_argument("--lam", type=float, default=1.0, help="lambda")
    parser.add_argument("--file", help="a file (without it: none)")
    parser.add_argument("--off", type=int, default=0, help="zero is a default")
    common.add_run_arguments(parser, "runs/NAME")
    parser.print_help()
    text = capsys.readouterr().out
    assert "\n    an equation\n" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "lambda (default: 1.0)" in lines["--lam"]
    assert "(default: 0)" in lines["--off"] and "(default: 0)" in lines["--seed"]
    for flag in ("--file", "--out", "--resume", "--save-pipeline", "--compile"):
        assert "default:" not in lines[flag]
    assert "runs/NAME" in text
    args = parser.parse_args([])
    names = ("compile", "gradient_checkpointing", "seed", "out", "resume", "save_pipeline")
    assert [getattr(args, name) for name in names] == [False, False, 0, None, False, False]


# ---- processes ----------------------------------------------------------------------------------


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    processes = common.setup_processes()
    assert (processes.rank, processes.world) == (0, 1)
    x = torch.ones(2)
    assert common.average(x, processes) is x
    common.close_processes(processes)
    common.same_on_all_ranks({"a": 1}, "folder")


def test_ranks_split_a_batch_evenly():
    ranks = [common.Processes(rank, 3, None) for rank in range(3)]
    rows = [list(range(12))[common.local_slice(12, rank)] for rank in ranks]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]

    def check(batch_size, micro=1):
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": micro}
        args = SimpleNamespace(**sizes, shard=False)
        common.check_processes(args, ranks[0])

    check(12)
    check(12, 4)
    for batch_size in (0, -3, 4):
        with fails(f"--batch-size {batch_size} cannot be split over 3 processes; take a positive"):
            check(batch_size)
    with fails(
        "--batch-size 12 cannot be split over 3 processes of 3 steps; take a positive multiple of 9"
    ):
        check(12, 3)
    with fails("--gradient-accumulation-steps 0: expected at least 1"):
        check(12, 0)


def test_sigterm_is_noted_and_the_old_handler_comes_back():
    old_handler = signal.getsignal(signal.SIGTERM)
    with common.sigterm_flag() as stop_requested:
        assert not stop_requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested
        os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
    assert signal.getsignal(signal.SIGTERM) == old_handler
    with pytest.raises(RuntimeError), common.sigterm_flag():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == old_handler


def test_seeds_of_all_purposes_are_distinct():
    """Of one --seed and of several: 1000 images and steps of each purpose that one script uses.

    Images and steps of doco.py share the offset: an image draws one latent, a step begins with
    integers.
    """
    purposes = [p for p in common.SEED_OFFSETS if p != "doco_steps"]
    seeds = [
        common.derive_seed(seed, purpose, index)
        for seed in range(3)
        for purpose in purposes
        for index in range(1000)
    ]
    assert len(set(seeds)) == len(seeds)
    assert common.derive_seed(2, "instance_steps", 7) == 2 * 1_000_003 + 100_007


def test_other_seeds_give_other_random_numbers():
    """A generator looks at the lower 32 bits of its seed alone: --seed must reach them."""
    drawn = set()
    for seed in (0, 1):
        for step in range(2):
            g = common.generator(seed, "doco_steps", step)
            drawn.add(tuple(torch.randint(1000, (8,), generator=g).tolist()))
    assert len(drawn) == 4
    a, b = (torch.rand(3, generator=common.generator(5, "samples", 2)) for _ in range(2))
    assert torch.equal(a, b)


# ---- run folders --------------------------------------------------------------------------------


def open_run(folder, resume=False):
    """A run whose result is one file."""
    return common.open_run(folder, ["delta.safetensors"], resume, ONE)


def settings(**values):
    """The flags of a run."""
    return argparse.Namespace(**{"seed": 0, "out": None, "resume": False, "lr": 1e-4} | values)


def test_run_names_are_short_plain_and_distinct():
    assert common.run_name("doco", ["Grumpy_Cat  2"]) == "doco-grumpy-cat-2"
    name = common.run_name("esd", ["a" * 500])
    assert re.fullmatch(r"esd-a{70}-[0-9a-f]{8}", name)
    assert name == common.run_name("esd", ["a" * 500]) != common.run_name("esd", ["a" * 501])
    assert re.fullmatch(r"esd-[0-9a-f]{8}", common.run_name("esd", ["猫"]))
    traversal = common.run_name("esd", ["../../etc/passwd"])
    assert re.fullmatch(r"esd-etc-passwd-[0-9a-f]{8}", traversal)


def test_a_new_run_folder(tmp_path):
    run = open_run(tmp_path / "a/b")
    assert (run.begun, run.finished) == (None, False)
    assert run.log.read_text() == "" and run.log.parent == run.out == tmp_path / "a/b"
    assert run.checkpoint.parent == run.out and not run.checkpoint.exists()
    with fails("is in use by another run; choose another --out"):
        open_run(tmp_path / "a/b")
    run.lock.close()
    assert open_run(tmp_path / "a/b")  # a run that failed before its first step refuses nothing


def test_a_run_folder_that_holds_something_needs_resume(tmp_path):
    w = torch.ones(2)
    common.save_checkpoint(tmp_path / "checkpoint.safetensors", 7, {"w": w}, [], ONE)
    with fails("already holds a run; choose another --out, or --resume"):
        open_run(tmp_path)
    run = open_run(tmp_path, resume=True)
    assert (run.begun, run.finished) == (7, False)
    run.lock.close()
    (tmp_path / "checkpoint.safetensors").unlink()
    save_file({"w": w}, tmp_path / "delta.safetensors")
    with fails("already holds a run"):
        open_run(tmp_path)
    run = open_run(tmp_path, resume=True)
    assert (run.begun, run.finished) == (None, True)


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with fails(f"--out {tmp_path / 'file'} cannot be written"):
        open_run(tmp_path / "file")


def test_settings_are_recorded_and_compared(tmp_path):
    run = open_run(tmp_path)
    args = settings(out=tmp_path, init=tmp_path / "earlier")
    common.record_settings(run, args, {"--model": "ab"}, ONE)
    record = json.loads((tmp_path / "args.json").read_text())
    wanted = {"seed": 0, "lr": 1e-4, "init": str(tmp_path / "earlier")}
    assert record["settings"] == wanted | {"contents of --model": "ab"}
    assert record["torch"] == torch.__version__ and record["processes"] == 1
    assert {"diffusers", "commit"} <= record.keys()

    # Where to, and whether to resume, may change; what is computed may not.
    begun = run._replace(begun=3)
    how = {"resume": True, "gradient_checkpointing": True, "shard": True}  # the step is the same
    common.record_settings(begun, settings(**how, init=args.init), {"--model": "ab"}, ONE)
    with fails("was begun with other settings (seed)"):
        common.record_settings(begun, settings(seed=1, init=args.init), {"--model": "ab"}, ONE)
    with fails("was begun with other settings (contents of --model)"):
        common.record_settings(begun, args, {"--model": "other"}, ONE)
    (tmp_path / "args.json").write_text("half")
    with fails("args.json is corrupted"):
        common.record_settings(begun, args, {"--model": "ab"}, ONE)


def test_settings_of_a_finished_run_stay_as_they_are(tmp_path):
    """They tell of the processes and versions that made the weights, not of who looked later."""
    run = open_run(tmp_path)
    common.record_settings(run, settings(), {}, ONE)
    record = tmp_path / "args.json"
    before = record.read_text()
    finished = run._replace(finished=True)
    common.record_settings(finished, settings(), {}, ONE._replace(world=1))
    assert record.read_text() == before
    # A run that failed before its first step may be started anew with other settings.
    common.record_settings(run, settings(seed=5), {}, ONE)
    assert json.loads(record.read_text())["settings"]["seed"] == 5


# ---- checkpoints, log, SIGTERM ------------------------------------------------------------------


def make_training():
    """(tensors, optimizers) after two steps of a weight and of a "discriminator"."""
    torch.manual_seed(0)
    w, d = torch.randn(3).requires_grad_(), torch.randn(2, 2).requires_grad_()
    optimizers = (torch.optim.AdamW([w], lr=0.1), torch.optim.Adam([d], lr=0.2))
    train(w, d, optimizers, 2)
    return {"w": w, "d": d}, optimizers


def train(w, d, optimizers, steps):
    """Some steps on two losses."""
    for _ in range(steps):
        for p, optimizer in zip((w, d), optimizers, strict=True):
            optimizer.zero_grad()
            (p**4).sum().backward()
            optimizer.step()


def test_a_checkpoint_holds_all_that_the_next_step_needs(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    assert common.checkpoint_step(file) is None
    tensors, optimizers = make_training()
    common.save_checkpoint(file, 2, tensors, optimizers, ONE)
    assert common.checkpoint_step(file) == 2
    train(tensors["w"], tensors["d"], optimizers, 3)

    w, d = torch.zeros(3).requires_grad_(), torch.zeros(2, 2).requires_grad_()
    fresh = (torch.optim.AdamW([w], lr=0.1), torch.optim.Adam([d], lr=0.2))
    assert common.load_checkpoint(file, {"w": w, "d": d}, fresh) == 2
    train(w, d, fresh, 3)
    assert torch.equal(w, tensors["w"]) and torch.equal(d, tensors["d"])


def test_resuming_reads_the_log_up_to_the_checkpoint(tmp_path):
    """Rows after the checkpoint are of steps that will be taken again."""
    tensors, optimizers = make_training()
    run = open_run(tmp_path)
    assert common.resume(run, tensors, optimizers) == (0, [])
    common.save_checkpoint(run.checkpoint, 20, tensors, optimizers, ONE)
    rows = [{"step": step, "loss": 0.5} for step in (9, 19, 29)]
    run.log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.lock.close()
    run = open_run(tmp_path, resume=True)
    assert common.resume(run, tensors, optimizers) == (20, rows[:2])
    other = {"w": torch.zeros(4), "d": torch.zeros(2, 2)}
    with fails("is corrupted or belongs to a different run"):
        common.resume(run, other, optimizers)


def test_progress_is_saved_at_each_call_and_a_checkpoint_at_times(tmp_path):
    run, state = open_run(tmp_path), make_training()
    log = [{"step": 9, "loss": 0.5}]
    common.save_progress(run, log, 10, state, 20, [], ONE)
    assert json.loads(run.log.read_text()) == log[0] and not run.checkpoint.exists()
    log.append({"step": 19, "loss": 0.25})
    common.save_progress(run, log, 20, state, 20, [], ONE)
    assert len(run.log.read_text().splitlines()) == 2
    assert common.checkpoint_step(run.checkpoint) == 20


def test_on_sigterm_the_next_call_saves_and_ends(tmp_path):
    run, state = open_run(tmp_path), make_training()
    with fails("SIGTERM: saved a checkpoint after 10 steps; continue with --resume"):
        common.save_progress(run, [{"step": 9, "loss": 1.0}], 10, state, 1000, [True], ONE)
    assert common.checkpoint_step(run.checkpoint) == 10 and "9" in run.log.read_text()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_saves_nothing(tmp_path, loss):
    """Also in a row before the last one; and a checkpoint of good weights is not overwritten."""
    run, state = open_run(tmp_path), make_training()
    log = [{"step": 9, "loss": loss, "cos": 0.0}, {"step": 19, "loss": 1.0, "cos": 0.0}]
    with fails("not finite at step 9: {'step': 9"):
        common.save_progress(run, log, 20, state, 20, [], ONE)
    assert not run.checkpoint.exists() and run.log.read_text() == ""


# ---- files --------------------------------------------------------------------------------------


def test_files_have_the_usual_permissions(tmp_path):
    """Also safetensors, which the library alone would make readable by their owner only."""
    old_mask = os.umask(0o027)
    try:
        common.atomic_save(tmp_path / "a.safetensors", {"w": torch.ones(2)})
        common.atomic_save(tmp_path / "b.json", text="{}")
    finally:
        os.umask(old_mask)
    for name in ("a.safetensors", "b.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640, name
    assert not list(tmp_path.glob("*.tmp"))


def test_tensors_are_saved_from_where_they_are(tmp_path):
    """With a gradient, not contiguous, with metadata: nothing to prepare."""
    w = torch.arange(6.0).view(2, 3).requires_grad_()
    common.atomic_save(tmp_path / "a.safetensors", {"w": w.t()}, metadata={"key": "1"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], w.detach().t())


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    """And no temporary file."""
    file = tmp_path / "folder"
    file.mkdir()
    (file / "content").write_text("old")
    with fails(f"{file} cannot be written"):
        common.atomic_save(file, text="new")  # a file does not replace a folder
    assert (file / "content").read_text() == "old" and not list(tmp_path.glob("*.tmp"))
    with fails("none/a.json cannot be written"):
        common.atomic_save(tmp_path / "none/a.json", text="new")


class Pipe:
    """Something with save_pretrained: one file, made of a text."""

    def __init__(self, name, text):
        self.name, self.text = name, text

    def save_pretrained(self, folder):
        """Writes the file into a new folder, as diffusers does."""
        folder.mkdir()
        (folder / self.name).write_text(self.text)


def test_a_pipeline_folder_is_replaced_as_one(tmp_path):
    out = tmp_path / "pipeline"
    (tmp_path / "pipeline.tmp").mkdir()  # left by a killed save
    (tmp_path / "pipeline.tmp/shard").write_text("half")
    common.atomic_save(out, pipe=Pipe("one.json", "1"))
    common.atomic_save(out, pipe=Pipe("two.json", "2"))
    assert [f.name for f in out.iterdir()] == ["two.json"]
    assert [f.name for f in tmp_path.iterdir()] == ["pipeline"]


def test_fingerprints_tell_things_apart(tmp_path):
    w = torch.arange(6.0)
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    parts = [w, w + 1, {"w": w}, {"v": w}, {"w": w.view(2, 3)}]
    parts += ["w", ("w",), 1, "1", None]
    parts += [tmp_path / "a", tmp_path / "b", [tmp_path / "a"]]
    fingerprints = [common.fingerprint(part) for part in parts]
    fingerprints += [common.fingerprint("a", "b"), common.fingerprint("ab")]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(re.fullmatch("[0-9a-f]{16}", f) for f in fingerprints)


def test_fingerprints_are_of_the_content(tmp_path):
    w = torch.arange(6.0)
    assert common.fingerprint(w) == common.fingerprint(w.clone().requires_grad_())
    net = torch.nn.Linear(2, 2)
    assert common.fingerprint(net) == common.fingerprint(net.state_dict())
    assert common.fingerprint(w.bfloat16()) != common.fingerprint(w)  # any dtype
    for name in ("a", "b"):
        (tmp_path / name).write_text("the same")
    assert common.fingerprint(tmp_path / "a") == common.fingerprint(tmp_path / "b")


def test_fingerprint_of_a_data_set_sees_names_sizes_and_ends(tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    a.write_bytes(b"0" * 10_000)
    b.write_bytes(b"1")
    first = common.fingerprint_files([a, b])
    assert first == common.fingerprint_files([a, b]) and len(first) == 16
    b.write_bytes(b"2")
    assert common.fingerprint_files([a, b]) != first
    b.write_bytes(b"1")
    a.write_bytes(b"0" * 10_001)
    assert common.fingerprint_files([a, b]) != first
    a.write_bytes(b"0" * 10_000)
    assert common.fingerprint_files([a, b]) == first != common.fingerprint_files([a])


def test_a_cache_serves_the_inputs_it_was_made_from(tmp_path):
    cache = tmp_path / "latents.safetensors"
    assert common.read_cache(cache, "latents", "key", ONE) is None
    latents = torch.randn(2, 3)
    common.atomic_save(cache, {"latents": latents}, metadata={"key": "key"})
    assert torch.equal(common.read_cache(cache, "latents", "key", ONE), latents)
    assert common.read_cache(cache, "latents", "other", ONE) is None
    save_file({"latents": latents}, cache)  # without metadata
    assert common.read_cache(cache, "latents", "key", ONE) is None
    cache.write_bytes(cache.read_bytes()[:-8])
    with fails("is corrupted or belongs to a different run"):
        common.read_cache(cache, "latents", "key", ONE)


def test_the_commit_is_that_of_the_repository_or_empty(tmp_path, monkeypatch):
    assert re.fullmatch("[0-9a-f]{40}|", common.git_commit())
    monkeypatch.setenv("PATH", "")
    assert common.git_commit() == ""


# ---- images -------------------------------------------------------------------------------------


def test_images_and_tensors_are_the_same_pixels():
    """All 256 values; the axes are not mixed up; values out of range are clipped."""
    pixels = torch.arange(256, dtype=torch.uint8).view(8, 32)
    image = Image.merge(
        "RGB", [Image.frombytes("L", (32, 8), bytes(pixels.flatten().tolist()))] * 3
    )
    image.putpixel((31, 0), (255, 0, 7))
    x = common.to_tensor(image)
    assert x.shape == (3, 8, 32) and x.min() == -1 and x.max() == 1
    torch.testing.assert_close(x[:, 0, 31], torch.tensor([1.0, -1.0, 7 / 127.5 - 1]))
    assert common.to_image(x).tobytes() == image.tobytes()
    far = common.to_image(torch.full((3, 2, 2), 9.0))
    assert far.getpixel((0, 0)) == (255, 255, 255)


def test_an_image_to_forget_is_taken_as_it_is(tmp_path):
    image = common.to_image(torch.rand(3, 8, 8) * 2 - 1)
    image.save(tmp_path / "a.png")
    x = common.read_exact(tmp_path / "a.png", 8, "--forget")
    assert common.to_image(x).tobytes() == image.tobytes()
    with fails("--forget " + str(tmp_path / "a.png") + " is 8x8; expected 16x16"):
        common.read_exact(tmp_path / "a.png", 16, "--forget")
    image.convert("L").save(tmp_path / "grey.png")
    with fails("has mode L; expected RGB"):
        common.read_exact(tmp_path / "grey.png", 8, "--surrogate")
    (tmp_path / "no.png").write_bytes(b"no image")
    with fails(f"--real {tmp_path / 'no.png'} cannot be read"):
        common.open_image(tmp_path / "no.png", "--real")


def test_a_data_set_may_hold_any_size_and_mode(tmp_path):
    """Transparent is white, 16-bit grey is scaled, the centre square is resized."""
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert common.read_cropped(tmp_path / "clear.png", 8).min() == 1
    Image.new("I;16", (8, 8), 32768).save(tmp_path / "grey16.png")
    grey = common.read_cropped(tmp_path / "grey16.png", 8)
    assert grey.shape == (3, 8, 8) and grey.abs().max() < 0.02
    wide = Image.new("RGB", (24, 8), "blue")
    wide.paste("red", (8, 0, 16, 8))
    wide.save(tmp_path / "wide.png")
    square = common.read_cropped(tmp_path / "wide.png", 4)
    red = torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 4, 4)
    torch.testing.assert_close(square, red)


def test_a_large_jpeg_is_decoded_small(tmp_path):
    """The size that is enough: an eighth of a side, and about the same image."""
    coarse = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4) * 2 - 1, (512, 512))
    common.to_image(coarse[0]).save(tmp_path / "large.jpg", quality=95)
    assert common.open_image(tmp_path / "large.jpg", "--real", about=64).size == (64, 64)
    fast = common.read_cropped(tmp_path / "large.jpg", 16, about=64)
    slow = common.read_cropped(tmp_path / "large.jpg", 16)
    assert (fast - slow).abs().mean() < 0.1


def test_images_of_a_folder_are_listed_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/1.JPG", "a.png", "c.webp", "d.txt", "e.jpeg"):
        (tmp_path / name).write_text("")
    names = [str(f.relative_to(tmp_path)) for f in common.list_images(tmp_path)]
    assert names == ["a.png", "b/1.JPG", "c.webp", "e.jpeg"]
    assert common.list_images(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("flag", "device", "has_bf16", "expected"),
    [
        (None, "cpu", True, "no"),
        (None, "cuda", True, "bf16"),
        (None, "cuda", False, "no"),
        ("bf16", "cpu", False, "bf16"),
        ("no", "cuda", True, "no"),
    ],
)
def test_precision_suits_the_device(monkeypatch, flag, device, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    args = SimpleNamespace(mixed_precision=flag)
    assert common.mixed_precision(args, torch.device(device)) == expected
