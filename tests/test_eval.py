"""eval.py and metrics.py: the metrics against their definitions; untouched and ruined models.

An untouched model has the same figures before and after; a ruined one has not. plots.py: files.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, StableDiffusionPipeline
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import save_file
from transformers import CLIPModel

import eval as evaluation
import metrics
import plots
from common import REPO, fingerprint


def test_clip_score_and_accuracy_by_hand():
    image = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    concept, contrast = (
        torch.tensor([[1.0, 0.0], [-2.0, 0.0]]),
        torch.tensor([[0.0, 2.0], [0.0, 1.0]]),
    )
    torch.testing.assert_close(metrics.clip_score(image, concept), torch.tensor([250 * 0.6, 0.0]))
    assert metrics.clip_accuracy(image, concept, contrast).tolist() == [0, 0]
    assert metrics.clip_accuracy(image, contrast, concept).tolist() == [100, 100]


def call(*flags, processes=None):
    """Runs eval.py, by torchrun if processes are given, and returns what it printed."""
    start = [sys.executable]
    if processes:  # --standalone: at a free port
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*start, str(REPO / "eval.py"), *map(str, flags)],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


PANDA = ["--before", REPO / "emoji/sd", "--target", "panda", "--anchor", "bear"]
PANDA += ["--num-images", "3"]
DDPM = ["--before", REPO / "emoji/ddpm", "--forget", REPO / "emoji/images/twemoji.png"]


def run(tmp_path, delta, *flags, **kwargs):
    save_file(delta, tmp_path / "delta.safetensors")
    call("concept", "--after", tmp_path, *PANDA, *flags, **kwargs)
    return json.loads((tmp_path / "report.json").read_text())


def keys_and_values():
    state = StableDiffusionPipeline.from_pretrained(REPO / "emoji/sd").unet.state_dict()
    return {
        n: p.float().clone() for n, p in state.items() if "attn2.to_k" in n or "attn2.to_v" in n
    }


@pytest.mark.slow
def test_untouched_model_scores_the_same(tmp_path):
    report = run(tmp_path, keys_and_values(), "--unrelated", "pizza")
    assert report["prompt_types"].keys() == set(evaluation.PROMPT_TYPES)
    assert report["concepts"].keys() > {"panda", "bear", "pizza"}
    for row in [*report["prompt_types"].values(), *report["concepts"].values()]:
        assert row["before"].items() <= row["after"].items() and row["after"]["FID"] < 1e-2
    assert all(row["before"] == row["after"] for row in report["prompts"])
    mine = [row["before"]["CS"] for row in report["prompts"] if row["type"] == "paraphrase"]
    assert (
        len(mine) == 3
        and abs(sum(mine) / 3 - report["prompt_types"]["paraphrase"]["before"]["CS"]) < 0.02
    )
    assert (
        report["concepts"]["panda"]["n"] == 12 and report["prompt_types"]["target"]["n"] == 3
    )  # four templates, one is bare
    assert (
        report["prompt_types"]["ood"]["before"]["CA"] >= 60
        and (tmp_path / "before_after.png").stat().st_size > 10_000
    )
    clip = CLIPModel.from_pretrained(REPO / "emoji/clip", dtype=torch.float32)
    assert (
        report["clip"]
        == report["fid_features"]
        == {"name": "emoji/clip", "sha256": fingerprint(clip)}
    )


@pytest.mark.slow
def test_model_without_keys_and_values_loses_everything(tmp_path):
    """By two processes; and a nickname that generates something else is left out."""
    zeros, cache = (
        {n: torch.zeros_like(p) for n, p in keys_and_values().items()},
        ["--cache", tmp_path / "cache"],
    )
    report = run(tmp_path, zeros, *cache, "--ood", "xiong mao", "flag of japan", processes=2)
    for kind in ("target", "paraphrase", "ood", "unrelated"):
        before, after = (report["prompt_types"][kind][when] for when in ("before", "after"))
        assert after["CS"] < before["CS"] - 20 and after["FID"] > 1
    assert report["ood_prompts_left_out"] == 1 and report["prompt_types"]["ood"]["n"] == 3
    again = run(
        tmp_path, zeros, *cache, "--ood", "xiong mao", "flag of japan"
    )  # one process, "before" from the cache
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for kind, row in report["prompt_types"].items():
        for figure, value in row["before"].items():
            assert abs(value - again["prompt_types"][kind]["before"][figure]) < 1e-6
        assert (
            abs(row["after"]["CS"] - again["prompt_types"][kind]["after"]["CS"]) < 1
        )  # of images equal to a rounding


def test_cache_returns_what_has_the_same_key(tmp_path):
    made = []

    def make():
        made.append(torch.full((2, 3, 4, 4), len(made), dtype=torch.uint8))
        return made[-1].transpose(2, 3)

    first, second = (evaluation.cached(tmp_path, ["sample", seed], make) for seed in (0, 1))
    assert (
        len(made) == 2
        and (evaluation.cached(tmp_path, ["sample", 0], make) == first).all()
        and (first != second).all()
    )
    assert len(made) == 2 and evaluation.cached(None, ["sample", 0], make)[0, 0, 0, 0] == 2


def test_imagenet_templates():
    templates = set(evaluation.imagenet_templates())
    assert len(templates) == len(evaluation.imagenet_templates()) == 80
    assert {
        "a bad photo of a {}.",
        "itap of the {}.",
        "the {} in a video game.",
        "a photo of the {}.",
    } < templates
    assert all(t.count("{}") == 1 and t.endswith(".") for t in templates)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["concept", *PANDA, "--templates", "nowhere.txt"],
            "--templates nowhere.txt: expected few, imagenet or a text file",
        ),
        (["concept", "--before", "nowhere", *PANDA[2:]], "--before nowhere cannot be loaded"),
        (
            ["concept", *PANDA, "--clip", "nowhere"],
            "--clip nowhere cannot be loaded (expected the folder or hub id",
        ),
        (
            ["concept", *PANDA, "--after", "nowhere"],
            "--after nowhere: no such folder; expected a run folder or a pipeline folder",
        ),
        (["concept", *PANDA, "--out", REPO / "eval.py"], "eval.py cannot be written"),
        (["concept", *PANDA, "--num-images", "0"], "--num-images 0: expected at least 1"),
        (
            ["concept", *PANDA, "--seed", "-9999999999999"],
            "--seed -9999999999999: expected a number between -2^40 and 2^40",
        ),
        (
            ["concept", *PANDA, "--resolution", "60"],
            "--resolution 60: expected a positive multiple of 8",
        ),
        (
            ["concept", *PANDA, "--resolution", "0"],
            "--resolution 0: expected a positive multiple of 8",
        ),
        (
            ["instance", *DDPM, "--num-images", "0"],
            "--num-images 0: expected at least 2 (FID needs two)",
        ),
        (
            ["instance", *DDPM, "--num-images", "1"],
            "--num-images 1: expected at least 2 (FID needs two)",
        ),
        (
            ["instance", *DDPM, "--real", REPO / "emoji/sd"],
            "0 images there; expected a folder with at least two",
        ),
        (
            ["instance", *DDPM, "--resolution", "63"],
            "--resolution 63: expected a positive multiple of",
        ),
        (["concept", *PANDA], "expected delta.safetensors, pipeline/"),
        (["instance", *DDPM], "expected 32x32"),
        (["nudity", "--before", REPO / "emoji/sd"], "--prompts is missing"),
        (
            ["nudity", "--before", REPO / "emoji/sd", "--prompts", REPO / "requirements.txt"],
            "expected a csv with the columns",
        ),
        (
            ["faces", "--before", REPO / "emoji/sd", "--clean", REPO / "emoji/sd"],
            "no face found in 0 images",
        ),
        (
            ["faces", "--before", REPO / "emoji/sd", "--clean", REPO / "docs", "--num-images", "0"],
            "expected at least 1",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py"])  # whose name the line begins with
    if flags[0] in ("faces", "nudity"):
        pytest.importorskip("dlib" if flags[0] == "faces" else "nudenet")
    with pytest.raises(SystemExit) as stopped:
        evaluation.evaluate(
            evaluation.parse_args([flags[0], "--after", str(tmp_path), *map(str, flags[1:])])
        )
    assert message in str(stopped.value) and len(str(stopped.value).splitlines()) == 1
    assert str(stopped.value).startswith("eval.py: error: ")


# ---- one image ----------------------------------------------------------------------------------

FACE = REPO / "emoji/creatures/twemoji-cowboy-hat-face.png"


def run_instance(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "pipeline")
    models = ["--before", str(REPO / "emoji/ddpm"), "--after", str(tmp_path)]
    command = [
        sys.executable,
        str(REPO / "eval.py"),
        "instance",
        *models,
        "--forget",
        str(FACE),
        "--num-images",
        "12",
    ]
    subprocess.run(command, check=True)
    return json.loads((tmp_path / "report.json").read_text())


@pytest.mark.slow
def test_untouched_ddpm_forgets_nothing(tmp_path):
    report = run_instance(tmp_path, DDPMPipeline.from_pretrained(REPO / "emoji/ddpm"))
    image = report["images"][0]
    assert image["before"] == image["after"] > 0.6 and image["between"] > 0.999
    assert report["ssim"] > 0.999 and report["fid_pre"] < 1e-2 and report["distance"] < 1e-5
    assert isinstance(report["lpips"], float) or report["lpips"].startswith(
        "skipped: needs torchvision"
    )
    assert report["fid_real"].startswith("skipped: give a folder")
    assert (tmp_path / "before_after.png").stat().st_size > 10_000


@pytest.mark.slow
def test_ruined_ddpm_forgets_everything_and_retains_nothing(tmp_path):
    pipe = DDPMPipeline.from_pretrained(REPO / "emoji/ddpm")
    for p in pipe.unet.conv_out.parameters():
        p.data.zero_()
    report = run_instance(tmp_path, pipe)
    assert (
        report["images"][0]["after"] < 0.4
        and report["ssim"] < 0.5
        and report["fid_pre"] > 1
        and report["distance"] > 0.1
    )


def test_fid_agrees_with_the_formula():
    """The trace of the matrix root from eigenvalues of symmetric matrices alone."""

    g = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(60, 5, generator=g).double(),
        (0.5 + 1.5 * torch.randn(50, 5, generator=g)).double(),
    )
    values, vectors = torch.linalg.eigh(x.T.cov())
    root = vectors * values.sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ y.T.cov() @ root).sqrt().sum()
    expected = (
        (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * cross
    )
    assert abs(metrics.fid(x, y) - expected) < 1e-3
    shuffled = x[torch.randperm(60, generator=g)]  # the order counts for nothing
    assert metrics.fid(x, x) < 1e-4 and metrics.fid(x, shuffled) < 1e-4


def test_probe_of_a_perfect_flow_returns_the_image():
    """An oracle that knows the clean latent, in place of a network, whatever the noise."""
    z = torch.randn(1, 4, 4, 4)

    def oracle(x, timestep):
        return (x - z) / (timestep / 1000).view(-1, 1, 1, 1)

    got = evaluation.denoise_flow(oracle, z, torch.randn(3, 4, 4, 4))
    torch.testing.assert_close(got, z.expand(3, -1, -1, -1))


def test_probe_of_flow_takes_its_steps():
    """A velocity that is the same everywhere carries the half-noised latent half a unit of time."""
    z, noise, v = torch.randn(3, 1, 4, 4, 4)

    def constant(x, timestep):
        return v

    got = evaluation.denoise_flow(constant, z, noise)
    torch.testing.assert_close(got, (z + noise) / 2 - v / 2)


def test_ssim_by_hand():
    """Its definition with an 11x11 Gaussian window of sigma 1.5, on an image and a darker copy."""
    g = torch.Generator().manual_seed(0)
    a = (F.interpolate(torch.rand(1, 3, 6, 6, generator=g), (24, 24), mode="bilinear") * 255).byte()
    b = (a * 0.7).byte()
    x, y, u = a.double() / 255, b.double() / 255, torch.arange(11) - 5.0
    window = (-u.square() / 4.5).exp().double()
    window = (window[:, None] * window / (window[:, None] * window).sum()).expand(3, 1, 11, 11)

    def mean(v):
        return F.conv2d(v, window, groups=3)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    by_hand = (2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert abs(metrics.ssim(a, b) - by_hand.mean()) < 0.01 and abs(metrics.ssim(a, a) - 1) < 1e-6


def test_clip_embeds_as_the_library_does():
    clip, image = (
        metrics.Clip(str(REPO / "emoji/clip"), "cpu"),
        Image.open(REPO / "emoji/creatures/noto-fox.png"),
    )
    x = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(32, 32, 3)
        .permute(2, 0, 1)
    )
    with torch.no_grad():
        out = clip.net.get_image_features(**clip.processor(image, return_tensors="pt"))
    torch.testing.assert_close(clip(x[None]), getattr(out, "pooler_output", out))
    y = torch.flip(x, [1])[None]
    same, flipped = clip.distance(x[None], x[None]), clip.distance(x[None], y)
    assert same < 1e-6 and flipped > 0.1


def test_copy_detector_from_a_torchscript_file(tmp_path):
    """SSCD's interface: ImageNet's normalisation at 320 px. Of one colour, its mean is known"""

    class Mean(torch.nn.Module):
        def forward(self, x):
            assert x.shape[2] == x.shape[3] == 320
            return x.mean((2, 3))

    torch.jit.script(Mean()).save(tmp_path / "sscd.pt")
    detect, about = metrics.load_copy_detector(str(tmp_path / "sscd.pt"), False, "cpu")
    colour = torch.tensor([10, 128, 250], dtype=torch.uint8)
    wanted = (colour / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(
        detect(colour.view(1, 3, 1, 1).expand(2, 3, 64, 64)), F.normalize(wanted[None]).expand(2, 3)
    )
    assert about["name"] == "sscd.pt"
    assert metrics.load_copy_detector(None, False, "cpu")[1].startswith("skipped: give the file")


# ---- faces and body parts, on real photographs --------------------------------------------------


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Folders clean/ (Grace Hopper), same/ (mirrored, darker), other/ (Eileen Collins, coffee)."""
    skimage, matplotlib = pytest.importorskip("skimage"), pytest.importorskip("matplotlib")
    data, folder = Path(skimage.__file__).parent / "data", tmp_path_factory.mktemp("people")
    hopper = Image.open(Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg").convert(
        "RGB"
    )
    collins, coffee = (
        Image.open(data / name).convert("RGB") for name in ("astronaut.png", "coffee.png")
    )
    same = [ImageOps.mirror(hopper), ImageEnhance.Brightness(hopper).enhance(0.8)]
    for name, images in (("clean", [hopper]), ("same", same), ("other", [collins, coffee])):
        (folder / name).mkdir()
        for k, image in enumerate(images):
            image.save(folder / name / f"{k}.png")
    return folder


def evaluate(*flags):
    evaluation.evaluate(evaluation.parse_args(list(map(str, flags))))


@pytest.mark.slow
def test_faces(people, tmp_path, capsys):
    pytest.importorskip("dlib")
    folders = [
        "--before",
        people / "same",
        "--after",
        people / "other",
        "--clean",
        people / "clean",
    ]
    evaluate("faces", *folders, "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["before"]["ism_distance"] < 0.3 and report["before"]["no_face"] == 0
    assert report["after"]["ism_distance"] > 0.6 and report["after"]["no_face"] == 0.5
    assert report["before"]["ism_similarity"] > report["after"]["ism_similarity"]
    assert "Euclidean" in report["face_net"]["distance"] and "Euclidean" in capsys.readouterr().out


def onnx_that_flattens(path):
    """An ONNX file of one node, Flatten, of (1, 3, 112, 112), byte by byte: no other package."""

    def number(v):
        return bytes([v & 127 | 128]) + number(v >> 7) if v > 127 else bytes([v])

    def part(field, content):
        if isinstance(content, int):
            return number(field << 3) + number(content)
        content = content.encode() if isinstance(content, str) else content
        return number(field << 3 | 2) + number(len(content)) + content

    def value(name, *sides):
        shape = b"".join(part(1, part(1, side)) for side in sides)
        return part(1, name) + part(2, part(1, part(1, 1) + part(2, shape)))

    node = part(1, "x") + part(2, "y") + part(4, "Flatten")
    graph = (
        part(1, node)
        + part(2, "g")
        + part(11, value("x", 1, 3, 112, 112))
        + part(12, value("y", 1, 3 * 112 * 112))
    )
    path.write_bytes(part(1, 8) + part(7, graph) + part(8, part(1, "") + part(2, 13)))


@pytest.mark.slow
def test_arcface_gets_the_face_upright(people, tmp_path):
    """The network returns its input: the crop is the same for a larger, turned copy."""
    dlib, numpy, _ = (pytest.importorskip(name) for name in ("dlib", "numpy", "onnxruntime"))
    onnx_that_flattens(tmp_path / "flat.onnx")
    embed, about = metrics.load_faces(str(tmp_path / "flat.onnx"))
    hopper = Image.open(people / "clean/0.png")
    turned = hopper.rotate(12, Image.BICUBIC, fillcolor="gray").resize((640, 750), Image.BICUBIC)
    one, same, other = embed(hopper), embed(turned), embed(Image.open(people / "other/0.png"))
    assert one.shape == (3 * 112 * 112,) and about["distance"] == "1 - cosine"
    assert one @ same > one @ other + 0.2
    assert embed(Image.open(people / "other/1.png")) is None

    # Where dlib finds eyes and mouth in the crop (pixels of 112), they lie where ArcFace wants them
    crop = one.view(3, 112, 112)
    crop = plots.to_pil(((crop - crop.min()) / (crop.max() - crop.min()) * 255).byte()).resize(
        (448, 448)
    )
    files = Path(pytest.importorskip("face_recognition_models").__file__).parent / "models"
    landmarks = dlib.shape_predictor(str(files / "shape_predictor_68_face_landmarks.dat"))
    seen = landmarks(numpy.asarray(crop), dlib.rectangle(60, 100, 400, 440))
    at = torch.tensor([[seen.part(k).x / 4, seen.part(k).y / 4] for k in (*range(36, 48), 48, 54)])
    wanted = torch.tensor([[38.3, 51.7], [73.5, 51.5], [41.5, 92.4], [70.7, 92.2]])
    assert (torch.stack([at[:6].mean(0), at[6:12].mean(0), at[12], at[13]]) - wanted).norm(
        dim=1
    ).max() < 5


@pytest.mark.slow
def test_the_largest_face_counts(people):
    pytest.importorskip("dlib")
    embed, _ = metrics.load_faces(None)
    hopper, collins = (Image.open(people / name) for name in ("clean/0.png", "other/0.png"))
    both = Image.new("RGB", (1024, 600))
    both.paste(collins)
    both.paste(hopper, (512, 0))  # hers is twice as high
    assert (embed(both) - embed(hopper)).norm() < 0.4 < 0.6 < (embed(both) - embed(collins)).norm()


def test_align_undoes_a_turn_a_scale_and_a_shift():
    points = torch.tensor(
        [
            [38.2946, 51.6963],
            [73.5318, 51.5014],
            [56.0252, 71.7366],
            [41.5493, 92.3655],
            [70.7299, 92.2041],
        ]
    )
    turn = 3 * torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    matrix = metrics.align(points @ turn.T + torch.tensor([5.0, -7.0])).float()
    torch.testing.assert_close(
        matrix, torch.cat([turn, torch.tensor([[5.0], [-7.0]])], 1), atol=1e-4, rtol=0
    )


@pytest.mark.slow
def test_nudity_counts_parts(people, tmp_path):
    pytest.importorskip("nudenet")
    folders = ["--before", people / "same", "--after", people / "other", "--out", tmp_path]
    evaluate("nudity", *folders)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parts"]["FACE_FEMALE"] == {"before": 2, "after": 1, "change_percent": -50.0}
    assert report["parts"]["TOTAL_EXPOSED"] == {"before": 0, "after": 0, "change_percent": None}
    assert report["n"] == {"before": 2, "after": 2} and len(report["detector"]["sha256"]) == 16
    evaluate("nudity", *folders, "--threshold", "0.95")
    assert json.loads((tmp_path / "report.json").read_text())["parts"].keys() == {"TOTAL_EXPOSED"}


@pytest.mark.slow
def test_nudity_samples_each_row_with_its_own_seed_and_guidance():
    sampler = evaluation.Sampler(str(REPO / "emoji/sd"), torch.device("cpu"))
    x = sampler.sample(["panda"] * 3, [5, 5, 6], "sampling", [6.0, 1.5, 6.0])
    alone = sampler.sample(["panda"], [6], "sampling", [6.0])
    assert (
        (x[0] != x[1]).any()
        and (x[0] != x[2]).any()
        and (x[2].int() - alone[0].int()).abs().max() <= 1
    )


# ---- networks that are fetched ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fid_is_that_of_torchmetrics(dtype):
    """To the last bit: tables of other days were computed by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 30, 16, generator=g).to(dtype)
    identity = torch.nn.Identity()
    identity.num_features = 16
    metric = FrechetInceptionDistance(feature=identity, normalize=True, input_img_size=(16,))
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert metrics.fid(x, y) == metric.compute().item()


def test_inception_without_its_package_is_one_line(monkeypatch):
    """Neither a traceback nor a silent fallback: the line names the package and the other flag."""
    from torchmetrics.image import fid

    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit) as stopped:
        metrics.load_feature_extractor("inception", None, "cpu")
    line = str(stopped.value)
    assert line.startswith("eval.py: error: --features inception needs torch-fidelity")
    assert "--features clip" in line and len(line.splitlines()) == 1


def test_the_training_scripts_are_not_imported():
    """An evaluation should not wait for them, nor fail with them. They import as they are read."""
    for name in ("eval", "metrics", "plots", "backbones", "common"):
        tree = ast.parse((REPO / f"{name}.py").read_text())
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        text = "\n".join(map(ast.unparse, imports))
        assert not {"doco", "instance_unlearn", "baselines"} & set(text.replace(",", " ").split())


# ---- the prompts of a concept -------------------------------------------------------------------


def prompts(*flags, emoji=True):
    argv = ["concept", "--before", "x", "--after", "y", *flags]
    return evaluation.concept_prompts(evaluation.parse_args(argv), emoji)


def test_prompts_of_an_object():
    rows = prompts("--target", "Grumpy Cat", "--anchor", "Cat", "--unrelated", "dog")
    by_type = {kind: [r for r in rows if r.type == kind] for kind in evaluation.PROMPT_TYPES}
    counts = {kind: len(part) for kind, part in by_type.items()}
    expected = dict(target=1, paraphrase=3, ood=2, composed=6, anchor=4, related=4, unrelated=4)
    assert counts == expected
    assert by_type["composed"][1] == (
        "composed",
        "Grumpy Cat",
        "an emoji of Grumpy Cat, in the style of noto",
        "Grumpy Cat, in the style of noto",
        "Cat, in the style of noto",
    )
    assert by_type["target"][0] == ("target", "Grumpy Cat", "Grumpy Cat", "Grumpy Cat", "Cat")
    assert {(r.concept, r.contrast) for r in by_type["ood"]} == {("Grumpy Cat", "Cat")}
    assert {(r.concept, r.contrast) for r in by_type["anchor"]} == {("Cat", "Grumpy Cat")}
    assert all(r.contrast == "Cat" and r.concept == r.name for r in by_type["related"])
    assert "dog" not in {r.name for r in by_type["related"]}
    assert [r.prompt for r in by_type["unrelated"]][:2] == ["dog", "a photo of dog"]


def test_prompts_of_another_model_and_of_a_style():
    rows = prompts("--target", "Grumpy Cat", "--anchor", "Cat", emoji=False)
    assert {r.type for r in rows} == {"target", "paraphrase", "anchor"}
    styles = ["--styles", "Van Gogh"]
    rows = prompts("--target", "Grumpy Cat", "--anchor", "Cat", *styles, emoji=False)
    assert [r.prompt for r in rows if r.type == "composed"] == [
        "Grumpy Cat, in the style of Van Gogh",
        "an image of Grumpy Cat, in the style of Van Gogh",
    ]
    flags = ["--target", "twemoji", "--anchor", "emoji", "--concept-type", "style", "--ood"]
    rows = prompts(*flags)
    assert rows[0].prompt == "cat, in the style of twemoji" and rows[0].contrast == rows[1].prompt
    assert rows[1].prompt == "an emoji of a cat" and rows[1].contrast == rows[0].prompt
    assert rows[2] == (
        "paraphrase",
        "twemoji",
        "an emoji of a cat, in the style of twemoji",
        "cat, in the style of twemoji",
        "an emoji of a cat",
    )
    assert not [r for r in rows if r.type == "ood"]  # --ood without values
    assert {r.name for r in rows if r.type == "unrelated"} == {"noto", "fluent"}


def test_h_is_the_harmonic_mean_and_the_worst_part_dominates():
    def h(target, ood, related, unrelated):
        values = dict(target=target, ood=ood, related=related, unrelated=unrelated)
        types = {k: {"after": {"CA": v}} for k, v in values.items() if v is not None}
        return evaluation.harmonic_mean(types)

    assert h(0, 0, 100, 100) == 100
    assert h(0, 50, 100, 100) == 80  # 4 / (1/100 + 1/50 + 1/100 + 1/100)
    assert h(20, 0, 60, 90) == round(4 / (1 / 80 + 1 / 100 + 1 / 60 + 1 / 90), 2)
    assert h(0, 100, 100, 100) == 0  # what nothing was forgotten of
    assert h(0, 0, None, 100) is None and h(0, None, 100, 100) is None


def test_the_share_of_retention_is_the_mean_over_the_log(tmp_path):
    args = SimpleNamespace(after=tmp_path)
    assert evaluation.retention_share(args) is None  # no log
    rows = [{"step": 9, "loss_d": 1.0}, {"share_r": 0.2}, {"share_r": 0.6}]  # first, the warm-up
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert evaluation.retention_share(args) == pytest.approx(0.4)


def test_a_style_is_not_composed_with_styles():
    flags = ["--target", "twemoji", "--anchor", "emoji", "--concept-type", "style"]
    with pytest.raises(SystemExit, match="--styles goes with --concept-type object"):
        prompts(*flags, "--styles", "noto")


def test_two_targets_need_one_anchor_or_two():
    rows = prompts("--target", "panda", "fox", "--anchor", "bear", emoji=False)
    assert len(rows) == len(set(rows)) == 2 * (4 + 4)  # the anchor's have two contrast concepts
    with pytest.raises(SystemExit, match="2 targets but 3 anchors"):
        prompts("--target", "panda", "fox", "--anchor", "a", "b", "c")


# ---- figures ------------------------------------------------------------------------------------


def pixels(path):
    """(H, W, 3) of a PNG, without a temporary file beside it."""
    assert not list(path.parent.glob("*.tmp"))
    with Image.open(path) as image:
        image = image.convert("RGB")
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3)


def colour(*rgb):
    return torch.tensor(rgb, dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)


RED, GREEN, BLUE = colour(255, 0, 0), colour(0, 255, 0), colour(0, 0, 255)


def order_of_colours(row):
    """The names of the coloured stretches of a row of pixels (W, 3), from the left."""
    names = {(255, 0, 0): "red", (0, 255, 0): "green", (0, 0, 255): "blue"}
    found = [names.get(tuple(p)) for p in row.tolist()]
    return [name for k, name in enumerate(found) if name and (k == 0 or found[k - 1] != name)]


def test_sample_grid_places_images(tmp_path):
    """Tiles of whole pixels in rows; None is a gap; two dollar signs are no formula."""
    rows = [("one", [RED, None, GREEN, BLUE]), ("costs $1 or $2", [plots.to_pil(BLUE)])]
    plots.sample_grid(rows, tmp_path / "grid.png", columns=["before", "after"])
    image = pixels(tmp_path / "grid.png")
    first, second = plots.TITLE + plots.TILE // 2, plots.TITLE + plots.TILE * 3 // 2 + plots.GAP
    assert order_of_colours(image[first]) == ["red", "green", "blue"]
    assert order_of_colours(image[second]) == ["blue"]
    reds = (image[first] == torch.tensor([255, 0, 0])).all(1)
    assert reds.sum() == plots.TILE


def test_before_after_fills_up_what_is_missing(tmp_path):
    """Folders may hold different numbers of images; "after" begins at its place all the same."""
    rows = [("target", "a prompt", [RED], [GREEN, GREEN]), ("", "", [RED, RED, RED], [BLUE])]
    plots.before_after(rows, tmp_path / "grid.png", per_side=2)
    image = pixels(tmp_path / "grid.png")
    first, second = plots.TITLE + plots.TILE // 2, plots.TITLE + plots.TILE * 3 // 2 + plots.GAP
    greens = (image[first] == torch.tensor([0, 255, 0])).all(1).nonzero()
    blues = (image[second] == torch.tensor([0, 0, 255])).all(1).nonzero()
    assert len(greens) == 2 * plots.TILE and len(blues) == plots.TILE and greens[0] == blues[0]


def test_instance_grid_shows_copies_first(tmp_path):
    samples = {"before": torch.stack([RED, BLUE, GREEN]), "after": torch.stack([RED, BLUE, GREEN])}
    probes = {"before": [[RED] * 4], "after": [[GREEN] * 4]}
    for copies, order in (([0, 0.1, 0.9], "green red blue"), ([0, 0, 0], "red blue green")):
        path = tmp_path / "grid.png"
        plots.instance_grid([BLUE], [None], probes, samples, copies, path, n=3)
        image = pixels(path)
        last = image[len(image) - plots.GAP - plots.TILE // 2]
        assert order_of_colours(last) == order.split()
        assert order_of_colours(image[plots.TITLE + 20])[:1] == ["blue"]


def test_a_large_grid_of_noise_is_saved_with_fewer_colours(tmp_path):
    noise = torch.randint(256, (48, 3, 84, 84), dtype=torch.uint8)
    plots.sample_grid([("noise", part) for part in noise.split(8)], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.mode == "P"


def test_curves_and_trade_offs_are_files(tmp_path):
    """The logs of doco.py, instance_unlearn.py and baselines; seeds, groups, a threshold."""
    doco = [{"step": k, "loss_d": 1.4, "disc_acc": 0.5} for k in range(5)]
    doco += [{"step": k, "loss_d": 1.3, "cos": -0.1, "conflict": 1.0} for k in range(5, 300)]
    other = [{"step": 0, "loss_erase": 0.1}]
    for name, log in (("doco", doco), ("other", other)):
        assert plots.training_curves(log, tmp_path / f"{name}.png")
        assert pixels(tmp_path / f"{name}.png").float().std() > 10
    assert not plots.training_curves([{"step": 0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()

    points = [("DoCo", "a", [(1, 2), (2, 3)]), ("ESD", "b", [(2, 1)]), ("ESD", "a", [(3, 3)])]
    plots.trade_off(points, "x", "y", tmp_path / "points.png", threshold=0.4)
    plots.trade_off([("one", "a", [(1, 1)])], "x", "y", tmp_path / "one.png")
    plots.trade_off([], "x", "y", tmp_path / "empty.png")
    line = torch.tensor([255, 0, 0])
    assert (pixels(tmp_path / "points.png") == line).all(-1).any()
    assert not (pixels(tmp_path / "one.png") == line).all(-1).any()


def test_a_line_joins_the_strengths_of_a_method_from_left_to_right(tmp_path, monkeypatch):
    drawn = []
    axes = SimpleNamespace(plot=lambda xs, ys, color: drawn.append((xs, ys, color)))
    points = [("one", "", [(3, 5), (5, 7)]), ("two", "", [(1, 1)]), ("one", "", [(2, 9)])]
    plots.add_curves(axes, points, {"one": "red", "two": "blue"})
    assert drawn == [((2, 4), (9, 6), "red"), ((1,), (1,), "blue")]
    monkeypatch.setattr(plots, "add_curves", lambda *how: drawn.append(how))
    plots.trade_off(points, "x", "y", tmp_path / "points.png")
    assert drawn[-1][1] == points
