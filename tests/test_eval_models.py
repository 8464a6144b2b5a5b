"""eval.py on models of every family: folders, sizes, probes, memory, reports of sampling."""

import csv
import datetime
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import eval as evaluation
from backbones import TEXT_ENCODERS
from common import REPO, read_cropped

CPU = torch.device("cpu")
CLIP = [
    "--clip",
    REPO / "emoji/clip",
]  # a tiny model has no evaluation networks of its own, and no hub is asked


def evaluate(*flags):
    evaluation.evaluate(evaluation.parse_args(list(map(str, flags))))


def stopped(call, monkeypatch):
    """The one line with which a call ends."""
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit) as error:
        call()
    line = str(error.value)
    assert line.startswith("eval.py: error: ") and len(line.splitlines()) == 1
    return line


def delta(tiny, folder):
    """Makes folder a run folder of doco.py: the tiny model's K of attn2, a little changed."""
    weights = StableDiffusionPipeline.from_pretrained(tiny).unet.state_dict()
    folder.mkdir(exist_ok=True)
    save_file(
        {n: 1.5 * w for n, w in weights.items() if "attn2.to_k" in n}, folder / "delta.safetensors"
    )
    return folder


def edited(folder, copy, part, **changes):
    """A copy of a pipeline folder with other values in the config of a part, such as scheduler."""
    shutil.copytree(folder, copy)
    (file,) = (copy / part).glob("*config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return copy


def write_csv(path, *rows):
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("prompt", "sd_seed", "sd_guidance_scale"), *rows])
    return path


# ---- which folders are models -------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_folder_is_evaluated_twice(tiny, tmp_path):
    """The first evaluation writes before_after.png into the run folder, which is still a model."""
    pytest.importorskip("nudenet")
    run, rows = (
        delta(tiny, tmp_path / "run"),
        write_csv(tmp_path / "rows.csv", ("a cat", "1", "6"), ("a dog", "2", "1.5")),
    )
    for _ in range(2):
        evaluate(
            "nudity", "--before", tiny, "--after", run, "--prompts", rows, "--resolution", "32"
        )
        assert (run / "before_after.png").exists()
    report = json.loads((run / "report.json").read_text())
    assert report["n"] == {"before": 2, "after": 2} and report["resolution"] == 32
    assert report["sampler"] == "DPMSolverMultistepScheduler" and report["sampling_steps"] == 15
    assert report["guidance"] == "each row's sd_guidance_scale"


def sample_both(before, after, prompts=("a cat",), resolution=16):
    args = SimpleNamespace(
        before=str(before), after=after, task="faces", device=CPU, cache=None, resolution=resolution
    )
    return evaluation.sample_both(args, list(prompts), list(range(len(prompts))))


def test_two_run_folders(tiny, tmp_path, monkeypatch):
    """The original model must be a model: images of earlier evaluations are not compared."""
    first, second = delta(tiny, tmp_path / "first"), delta(tiny, tmp_path / "second")
    for run in (first, second):
        Image.new("RGB", (8, 8)).save(run / "before_after.png")
    line = stopped(lambda: sample_both(first, second), monkeypatch)
    assert "is a run folder without pipeline/; expected the original model" in line
    shutil.copytree(tiny, first / "pipeline")
    images, about = sample_both(first, second)
    assert images["before"][0].size == (16, 16) and about["sampling_steps"] == 15
    assert images["before"][0].tobytes() != images["after"][0].tobytes()


def test_a_model_is_not_compared_with_images(tiny, photos, monkeypatch):
    for pair in ((tiny, photos), (photos, tiny)):
        assert "two models, or two folders of images, not one of each" in stopped(
            lambda p=pair: sample_both(*p), monkeypatch
        )


def test_images_of_folders_are_upright_and_rgb(tmp_path):
    """EXIF orientation 6: stored on its side. Transparent is white; 16-bit grey is scaled."""
    lying = Image.new("RGB", (40, 20), "black")
    lying.paste((255, 0, 0), (0, 0, 20, 20))  # red on the left is red above, upright
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        lying.save(tmp_path / name / "a.jpg", exif=exif, quality=95)
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / name / "b.png")
        Image.new("I;16", (8, 8), 128 * 257).save(tmp_path / name / "c.png")
    images, about = sample_both(tmp_path / "before", tmp_path / "after")
    upright, transparent, grey = images["before"]
    assert about == {} and upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 > 50 > upright.getpixel((10, 35))[0]
    assert transparent.getpixel((4, 4)) == (255, 255, 255) and grey.getpixel((4, 4)) == (
        128,
        128,
        128,
    )
    assert (
        read_cropped(tmp_path / "before/a.jpg", 16, "--real")[0, 2] > 0.5
    ).all()  # what --real reads


def test_clean_photographs_are_upright(tmp_path, monkeypatch):
    lying, exif, seen = Image.new("RGB", (40, 20), "red"), Image.Exif(), []
    exif[0x0112] = 6
    for name in ("clean/deeper", "before", "after"):
        (tmp_path / name).mkdir(parents=True)
        lying.save(tmp_path / name / "a.jpg", exif=exif)

    def embed(image):
        seen.append(image.size)
        return torch.ones(3)

    monkeypatch.setattr(
        evaluation, "load_faces", lambda _: (embed, {"name": "none", "distance": "none"})
    )
    folders = [f for name in ("before", "after", "clean") for f in (f"--{name}", tmp_path / name)]
    evaluate("faces", *folders, "--out", tmp_path / "out")
    assert (
        seen == [(20, 40)] * 3
        and json.loads((tmp_path / "out/report.json").read_text())["n_clean"] == 1
    )


def test_a_pickle_beside_a_broken_lora_is_not_read(tiny, tmp_path, monkeypatch):
    sampler = evaluation.Sampler(str(tiny), CPU)
    sampler.net.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    layers = get_peft_model_state_dict(sampler.net)
    sampler.net.delete_adapters("default")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, safe_serialization=False
    )
    assert (tmp_path / "pytorch_lora_weights.bin").exists()
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"cut off")
    load, asked = sampler.pipe.load_lora_weights, []
    monkeypatch.setattr(
        sampler.pipe, "load_lora_weights", lambda *a, **what: asked.append(what) or load(*a, **what)
    )
    assert "pytorch_lora_weights.safetensors cannot be loaded" in stopped(
        lambda: sampler.load_unlearned(tmp_path), monkeypatch
    )
    assert asked[0]["use_safetensors"] is True  # left out, diffusers may look for a pickle


def test_weights_of_another_shape_are_one_line(tiny, tmp_path, monkeypatch):
    save_file(
        {
            n: w[:1].clone()
            for n, w in load_file(delta(tiny, tmp_path) / "delta.safetensors").items()
        },
        tmp_path / "new",
    )
    (tmp_path / "new").rename(tmp_path / "delta.safetensors")
    sampler = evaluation.Sampler(str(tiny), CPU)
    assert "does not fit --before" in stopped(lambda: sampler.load_unlearned(tmp_path), monkeypatch)
    (tmp_path / "delta.safetensors").write_bytes(b"cut off")
    assert "the weights cannot be read" in stopped(
        lambda: sampler.load_unlearned(tmp_path), monkeypatch
    )


# ---- sizes, and the key of the cache ------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "own", "other", "wrong"),
    [
        ("tiny", 64, 32, (0, -8, 4, 36)),  # 4 pixels a latent; the pipeline wants multiples of 8
        (
            "tiny_sd3",
            16,
            32,
            (0, 18, 36),
        ),  # 2 pixels a latent, 2 latents a patch, at most 8x8 of them
        ("tiny_ddpm", 16, 32, (0, 9)),  # two blocks: multiples of 2
    ],
)
def test_resolution(model, own, other, wrong, request, monkeypatch):
    folder = str(request.getfixturevalue(model))
    assert (
        evaluation.Sampler(folder, CPU, None, own).size
        == own
        == evaluation.Sampler(folder, CPU).size
    )
    for size in wrong:
        line = stopped(lambda size=size: evaluation.Sampler(folder, CPU, None, size), monkeypatch)
        assert f"--resolution {size}: " in line and folder in line
    sampler = evaluation.Sampler(folder, CPU, None, other)
    assert (
        sampler.sample(["a cat"], [1], "sampling").shape == (1, 3, other, other)
        and sampler.about["resolution"] == other
    )


def test_cache_key_has_what_changes_a_sample(tiny, tmp_path):
    def key(folder, **what):
        return json.dumps(evaluation.Sampler(str(folder), CPU, tmp_path / "cache", **what).key)

    first = key(tiny)
    assert first == key(tiny) == key(tiny, resolution=64) and first != key(tiny, resolution=32)
    assert first != key(edited(tiny, tmp_path / "v", "scheduler", prediction_type="v_prediction"))
    assert '"cpu"' in first and '"bfloat16"' in first
    assert key(REPO / "emoji/ddpm").count("float32") == 1


@pytest.mark.slow
def test_instance_of_sd3_at_another_resolution(tiny_sd3, photos, tmp_path):
    """A small model outside emoji/: no copy detector. Forget images and samples have that size."""
    image = Image.open(photos / "large.png").resize((32, 32))
    image.save(tmp_path / "forget.png")
    flags = [
        "--before",
        tiny_sd3,
        "--after",
        tiny_sd3,
        "--out",
        tmp_path,
        *CLIP,
        "--num-images",
        "2",
        "--resolution",
        "32",
    ]
    evaluate(
        "instance",
        *flags,
        "--forget",
        tmp_path / "forget.png",
        "--prompt",
        "a cat",
        "--real",
        photos,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["resolution"] == 32 and report["sampler"] == "FlowMatchEulerDiscreteScheduler"
    assert report["sampling_steps"] == 25 and report["guidance"] == 4.0 and report["n_real"] == 5
    assert report["copy_detector"].startswith("skipped: give the file") and report["ssim"] > 0.999


def test_concept_at_another_resolution_and_one_image_a_prompt(tiny, tmp_path, capsys):
    """A negative seed is a seed; of one image there is no FID, which is not the same as 0."""
    flags = [
        "--before",
        tiny,
        "--after",
        delta(tiny, tmp_path / "run"),
        *CLIP,
        "--num-images",
        "1",
        "--resolution",
        "32",
    ]
    evaluate("concept", *flags, "--target", "panda", "--anchor", "bear", "--seed", "-1")
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert (
        report["resolution"] == 32
        and report["sampler"] == "DPMSolverMultistepScheduler"
        and report["guidance"] == 6.0
    )
    assert (
        "FID" not in report["prompt_types"]["target"]["after"]
        and report["prompt_types"]["anchor"]["after"]["FID"] >= 0
    )
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("target"))
    assert line.split()[5:] == ["-", "1"]
    assert [p["prompt"] for p in report["prompts"]][
        3
    ] == "an image of panda" and "ood" not in report["prompt_types"]


def test_ddpm_reports_how_it_samples(tiny_ddpm):
    assert evaluation.Sampler(str(tiny_ddpm), CPU).about == {
        "sampler": "DDIMScheduler",
        "sampling_steps": 25,
        "guidance": None,
        "resolution": 16,
    }


# ---- evaluation networks: the emoji's own for models in emoji/ alone ----------------------------


def test_embedded_and_small_are_two_things(tiny, tmp_path):
    large = edited(tiny, tmp_path / "large", "unet", sample_size=32)
    seen = [evaluation.Sampler(str(m), CPU) for m in (REPO / "emoji/sd", tiny, large)]
    assert [(d.embedded, d.small, d.steps) for d in seen] == [
        (True, True, 15),
        (False, True, 15),
        (False, False, 25),
    ]
    assert [d.pipe.vae.use_slicing for d in seen] == [False, False, True]


def test_a_small_model_of_another_kind_is_not_evaluated_by_emoji(
    tiny, tiny_ddpm, photos, tmp_path, monkeypatch
):
    concept = [
        "concept",
        "--before",
        tiny,
        "--after",
        tiny,
        "--target",
        "panda",
        "--anchor",
        "bear",
    ]
    instance = [
        "instance",
        "--before",
        tiny_ddpm,
        "--after",
        tiny_ddpm,
        "--forget",
        photos / "a.png",
    ]
    for flags in (
        concept,
        instance,
    ):  # the hub is not asked in a test: the name of what would be fetched is in the line
        line = stopped(lambda f=flags: evaluate(*f, "--out", tmp_path), monkeypatch)
        assert "--clip openai/clip-vit-base-patch32 cannot be loaded" in line


# ---- the probe ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_probe_of_a_perfect_network_returns_the_image(kind):
    """In place of a network, an oracle that knows the clean latent, whatever the noise.

    The config is Stable Diffusion's: PNDM, whose steps_offset of 1 must not shift the timesteps.
    """
    config = evaluation.Sampler(str(REPO / "emoji/sd"), CPU).pipe.scheduler.config
    assert config["steps_offset"] == 1
    scheduler = evaluation.probe_scheduler(dict(config) | {"prediction_type": kind}, clip=False)
    z, seen = torch.randn(1, 4, 4, 4), []

    def oracle(x, timestep):
        seen.append(timestep[0].item())
        a = scheduler.alphas_cumprod[int(timestep[0])]
        noise = (x - a.sqrt() * z) / (1 - a).sqrt()
        return noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z

    x = evaluation.denoise_ancestral(
        oracle, scheduler, z, torch.randn(2, 4, 4, 4), torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(x, z.expand(2, -1, -1, -1), atol=1e-3, rtol=0)
    assert seen == list(range(250, -1, -1))


@pytest.mark.slow
def test_probe_of_stable_diffusion(tiny, tmp_path):
    """Also where the network predicts v: the steps follow the scheduler's config."""
    x = torch.rand(3, 64, 64) * 2 - 1
    v = edited(tiny, tmp_path / "v", "scheduler", prediction_type="v_prediction")
    first, second = (evaluation.Sampler(str(m), CPU).probe(x, "a cat", 7, n=1) for m in (tiny, v))
    assert first.shape == second.shape == (1, 3, 64, 64) and (first != second).any()


@pytest.mark.slow
def test_embedded_stable_diffusion_gives_an_image_back():
    """An emoji that the model knows: the result is nearer to it than to another emoji."""
    sampler = evaluation.Sampler(str(REPO / "emoji/sd"), CPU)
    panda, fox = (
        read_cropped(REPO / f"emoji/creatures/noto-{n}.png", 64) for n in ("panda", "fox")
    )
    seen = sampler.probe(panda, "panda", 7, n=1)[0] / 127.5 - 1
    assert F.mse_loss(seen, panda) < 0.5 * F.mse_loss(seen, fox)


@pytest.mark.slow
def test_instance_where_every_image_was_a_copy(tiny_ddpm, photos, tmp_path, monkeypatch, capsys):
    detector = (lambda x: torch.ones(len(x), 1), {"name": "everything is the same"})
    monkeypatch.setattr(evaluation, "load_copy_detector", lambda *_: detector)
    flags = [
        "--before",
        tiny_ddpm,
        "--after",
        tiny_ddpm,
        "--out",
        tmp_path,
        *CLIP,
        "--forget",
        photos / "a.png",
    ]
    evaluate("instance", *flags, "--num-images", "2")
    report, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    assert (
        report["n_rest"] == 0
        and report["fid_pre"] >= 0
        and printed.count("skipped: every image was a copy") == 3
    )
    assert {report[k] for k in ("ssim", "lpips", "distance")} == {"skipped: every image was a copy"}


# ---- memory: chunks, prompts encoded once, encoders away from the device ------------------------


def test_chunks_are_bounded_by_pixels():
    chunk = evaluation.chunk_size
    assert [chunk(s, False, False, "cuda") for s in (1024, 768, 512, 256)] == [1, 1, 4, 16]
    assert [chunk(s, False, True, "cuda") for s in (512, 256)] == [4, 16] and chunk(
        512, False, False, "cpu"
    ) == 4
    assert (chunk(64, True, False, "cpu"), chunk(32, True, True, "cpu")) == (
        48,
        32,
    )  # emoji/sd, emoji/ddpm: as ever
    assert chunk(2048, False, False, "cuda") == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "tiny_sd3"])
def test_prompts_are_encoded_once_and_images_are_those_of_diffusers(model, request, monkeypatch):
    folder, seeds, prompts = (
        request.getfixturevalue(model),
        [3, 4, 5, 6],
        ["a cat", "", "a dog", "a cat"],
    )
    sampler, asked = evaluation.Sampler(str(folder), CPU), []
    encode = sampler.encode
    monkeypatch.setattr(sampler, "encode", lambda texts: asked.append(texts) or encode(texts))
    monkeypatch.setattr(evaluation, "chunk_size", lambda *_: 2)
    x = sampler.sample(prompts, seeds, "sampling")
    sampler.sample(prompts, seeds, "sampling")
    assert asked == [["a cat", "", "a dog"]]
    monkeypatch.setattr(evaluation, "AHEAD", 1)  # in portions: the images stay the same
    sampler.known = {}
    assert (sampler.sample(prompts, seeds, "sampling").int() - x.int()).abs().max() <= 1 and len(
        asked
    ) > 2

    family = StableDiffusion3Pipeline if model == "tiny_sd3" else StableDiffusionPipeline
    none = (
        dict(text_encoder_3=None, tokenizer_3=None)
        if model == "tiny_sd3"
        else dict(safety_checker=None)
    )
    pipe = family.from_pretrained(folder, **none)
    pipe.scheduler = sampler.sampler
    for k, prompt in enumerate(prompts):
        with torch.autocast("cpu", torch.bfloat16, enabled=sampler.autocast):
            image = pipe(
                prompt,
                generator=torch.Generator().manual_seed(seeds[k]),
                num_inference_steps=sampler.steps,
                guidance_scale=sampler.guidance,
                output_type="np",
            ).images[0]
        assert (x[k] - torch.from_numpy(image).permute(2, 0, 1) * 255).abs().mean() < 1


def test_sd3_samples_without_its_text_encoders(tiny_sd3, tmp_path):
    """They leave the pipeline, and so the device; a LoRA, new prompts and a probe still work."""
    sampler = evaluation.Sampler(str(tiny_sd3), CPU)

    def gone():
        return all(getattr(sampler.pipe, name) is None for name in TEXT_ENCODERS)

    assert gone() and set(sampler.encoders) == {"text_encoder", "text_encoder_2"}
    before = sampler.sample(["a cat"], [1], "sampling")
    assert gone()
    sampler.net.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = get_peft_model_state_dict(sampler.net)
    sampler.net.delete_adapters("default")
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers={n: 30 * w for n, w in layers.items()}
    )
    sampler.load_unlearned(tmp_path)
    assert (sampler.sample(["a cat"], [1], "sampling") != before).any()
    assert (
        sampler.sample(["a dog"], [1], "sampling") != sampler.sample(["a cat"], [1], "sampling")
    ).any()
    assert (
        sampler.probe(torch.zeros(3, 16, 16), "a bird", 7, n=2).shape == (2, 3, 16, 16) and gone()
    )


# ---- other input --------------------------------------------------------------------------------


def test_rows_of_prompts(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "rows.csv", ("a cat", "1", "6"), ("", "-2", "1.5"))
    assert evaluation.read_prompts(path, 10) == [("a cat", 11, 6.0), ("", 8, 1.5)]
    path.write_text("\ufeff" + path.read_text(), "utf-8")  # as spreadsheets write it
    assert len(evaluation.read_prompts(path, 0)) == 2
    for bad in (
        ("a", "one", "6"),
        ("a", "1", "high"),
        ("a", "1", "nan"),
        ("a", "1"),
        ("a", "9" * 20, "6"),
        ("a", "1.5", "6"),
    ):
        path = write_csv(tmp_path / "bad.csv", ("a cat", "1", "6"), bad)
        line = stopped(lambda p=path: evaluation.read_prompts(p, 0), monkeypatch)
        assert (
            "row 2 after the heading has sd_seed" in line
            and "expected a whole number and a number" in line
        )


def test_processes_wait_for_a_training_on_the_first(tiny, tmp_path, monkeypatch):
    def init(backend, timeout):
        assert backend == "gloo" and timeout >= datetime.timedelta(hours=12)
        raise KeyboardInterrupt

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(
        KeyboardInterrupt
    ):  # also where the run folder is not there yet: it is being trained
        evaluate(
            "concept",
            "--before",
            tiny,
            "--after",
            tmp_path / "later",
            "--target",
            "panda",
            "--anchor",
            "bear",
        )


def test_the_first_process_alone_decides_what_is_cached(tmp_path, monkeypatch):
    """The others may not see its folder, and would wait for it in make() while it has gone on."""
    images, sent = torch.ones(1, 3, 2, 2), []
    evaluation.cached(tmp_path, ["key"], lambda: images)

    def broadcast(objects):
        sent.append(objects[0])
        objects[0] = images  # what the first process sends

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert evaluation.cached(tmp_path / "other", ["key"], lambda: 1 / 0) is images and sent == [
        None
    ]
