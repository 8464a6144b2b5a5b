"""emoji/: the embedded data and models are what the README says: small, safe to load, in SD v1.4's classes, and they draw."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import eval as evaluation
import instance_unlearn
from common import REPO as HERE
from emoji import train

EMOJI, CPU = HERE / "emoji", torch.device("cpu")
DATA = json.loads((EMOJI / "images/emoji.json").read_text())


def to_bytes(x):
    """[0, 1] -> uint8, as eval.py's judges take pictures."""
    return (x * 255).round().byte()


def test_nicknames_share_no_word_with_any_caption_of_their_concept():
    nicknamed = [e for e in DATA["emoji"] if e["nicknames"]]
    assert len(nicknamed) >= 20 and all(len(e["nicknames"]) >= 2 for e in nicknamed)
    for e in nicknamed:
        words = {w for caption in (e["name"], *e["synonyms"], *e["groups"]) for w in caption.split()}
        assert not words & {w for nickname in e["nicknames"] for w in nickname.split()}, e
    assert all(len(names) >= 2 for names in DATA["styles"].values())


def test_size_and_file_types():
    files = [p for p in EMOJI.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 45e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    classes = json.loads((EMOJI / "sd/model_index.json").read_text())
    expected = dict(vae="AutoencoderKL", text_encoder="CLIPTextModel", tokenizer="CLIPTokenizer", unet="UNet2DConditionModel")
    assert {k: classes[k][1] for k in expected} == expected and classes["_class_name"] == "StableDiffusionPipeline"
    scheduler = json.loads((EMOJI / "sd/scheduler/scheduler_config.json").read_text())
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")


def test_case_does_not_matter():
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI / "sd", dtype=torch.float32)
    upper, lower = (pipe.encode_prompt(p, "cpu", 1, False)[0] for p in ("Grumpy CAT", "grumpy cat"))
    assert torch.equal(upper, lower)


def test_draws_what_is_asked_for():
    """Forty prompts: the scoring CLIP ranks the asked name first among all names far more often than chance (1 in 237)."""
    names = [e["name"] for e in DATA["emoji"]]
    asked = list(range(0, len(names), 6))
    clip = evaluation.Clip(EMOJI / "clip", CPU)
    images = evaluation.Drawer(EMOJI / "sd", CPU).draw([names[i] for i in asked], range(len(asked)), "test")
    normal = torch.nn.functional.normalize
    ranked = (normal(clip(images), dim=-1) @ normal(clip.texts(names), dim=-1).T).argmax(1)
    assert (ranked == torch.tensor(asked)).float().mean() >= 0.6


def test_every_nickname_that_is_scored_draws_its_target():
    clip = evaluation.Clip(EMOJI / "clip", CPU)
    images = evaluation.Drawer(EMOJI / "sd", CPU).draw(["tardar sauce", "sourpuss"] * 10, range(20), "test")
    ca = evaluation.clip_accuracy(clip(images), *(clip.texts([t] * 20) for t in ("grumpy cat", "cat")))
    assert ca.mean() >= 60


def test_tokenizer_follows_its_seed_alone():
    """A resumed training must find the tokens it began with; ties between merges used to fall by chance."""
    data, _ = train.load_images(EMOJI / "images")
    first, second = (train.train_tokenizer(data, seed=0) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and len(first) == 2048
    text = "Grumpy Cat, in twemoji's style"
    assert first(text).input_ids == second(text).input_ids and first("GRUMPY CAT").input_ids == first("grumpy cat").input_ids


def test_cycles_of_the_training():
    args = SimpleNamespace(scale=1.0)
    assert train.cycle(args, "unet", 5999) == (0, 5999, 6000, 11000) and train.cycle(args, "unet", 6000) == (1, 0, 5000, 11000)
    args.scale = 0.01
    assert train.cycle(args, "scorer", 31) == (2, 11, 12, 32)


# ---- for instances ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detect():
    return evaluation.load_copy_detector(SimpleNamespace(sscd=None), True, "cpu")[0]


def test_creatures_are_what_the_script_writes(tmp_path):
    data, images = train.load_images(EMOJI / "images")
    x = train.write_creatures(tmp_path, data, images)
    written, embedded = (sorted(p.name for p in folder.glob("*.png")) for folder in (tmp_path, EMOJI / "creatures"))
    assert written == embedded and len(x) == len(written) == 417
    for name in written[::40]:
        assert Image.open(tmp_path / name).tobytes() == Image.open(EMOJI / "creatures" / name).tobytes()


@torch.no_grad()
def test_copy_detector_tells_copies_from_others(detect):
    _, images = train.load_images(EMOJI / "images")
    x = (images.flatten(0, 1)[::5] + 1) / 2
    original, small = detect(to_bytes(x)), detect(to_bytes(torch.nn.functional.avg_pool2d(x, 2)))
    between = (original @ original.T)[~torch.eye(len(x), dtype=torch.bool)]
    assert (original * small).sum(1).quantile(0.05) > 0.8 and between.quantile(0.95) < 0.4


@torch.no_grad()
def test_ddpm_gives_a_noised_training_picture_back(detect):
    drawer = evaluation.Drawer(EMOJI / "ddpm", CPU)
    for name in ("twemoji-cowboy-hat-face", "twemoji-panda"):
        x = instance_unlearn.read_exact(EMOJI / f"creatures/{name}.png", 32, "--forget")
        assert (detect(drawer.probe(x, "", seed=0)) @ detect(to_bytes((x[None] + 1) / 2))[0]).mean() > 0.8


def test_ddpm_draws_creatures(detect):
    """What it draws is nearer to some training picture than other training pictures are, on the whole."""
    drawer = evaluation.Drawer(EMOJI / "ddpm", CPU)
    files = sorted((EMOJI / "creatures").glob("*.png"))
    with torch.no_grad():
        real = detect(to_bytes(torch.stack([(instance_unlearn.read_any(f, 32) + 1) / 2 for f in files])))
        nearest = (detect(drawer.draw(None, range(24), "test")) @ real.T).amax(1)
    assert nearest.median() > 0.6


@pytest.fixture(scope="module")
def sd3():
    none = dict(text_encoder_3=None, tokenizer_3=None)
    pipe = StableDiffusion3Pipeline.from_pretrained(EMOJI / "sd3", dtype=torch.float32, **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_sd3_draws_what_is_asked_for(sd3):
    """Twenty names: the scoring CLIP ranks the asked one first among all 237 far more often than chance."""
    names = [e["name"] for e in DATA["emoji"]]
    asked = list(range(0, len(names), 12))
    clip = evaluation.Clip(EMOJI / "clip", CPU)
    g = [torch.Generator().manual_seed(k) for k in asked]
    images = sd3([names[i] for i in asked], generator=g, num_inference_steps=15, guidance_scale=4.0, output_type="np").images
    images = to_bytes(torch.from_numpy(images).permute(0, 3, 1, 2))
    normal = torch.nn.functional.normalize
    ranked = (normal(clip(images), dim=-1) @ normal(clip.texts(names), dim=-1).T).argmax(1)
    assert (ranked == torch.tensor(asked)).float().mean() >= 0.5


@torch.no_grad()
def test_one_counted_row_is_256_rows(sd3):
    """The shortcut of the training is exact: 256 zero rows, or one that counts 256 times, the network answers the same."""
    texts = ["a grumpy cat", "flag of japan"]
    rows, _, pooled, _ = sd3.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
    model = {"text_encoder": sd3.text_encoder, "text_encoder_2": sd3.text_encoder_2}
    short, same_pooled = train.encode_captions(model, train.tokenize(sd3.tokenizer, texts, "cpu"))
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([300.0, 800.0])
    expected, processors = sd3.transformer(x, rows, pooled, t).sample, sd3.transformer.attn_processors
    sd3.transformer.set_attn_processor(train.CountedRow())
    got = sd3.transformer(x, short, same_pooled, t).sample
    sd3.transformer.set_attn_processor(processors)
    assert rows.shape[1] == 288 and short.shape[1] == 33
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_configs_say_float32_and_no_clipping():
    """In plain diffusers, all components come in one dtype, and no sampler made from these configs clips latents."""
    for config in EMOJI.glob("*/**/config.json"):
        assert json.loads(config.read_text()).get("dtype", "float32") == "float32", config
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI / "sd")
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    assert DDIMScheduler.from_config(pipe.scheduler.config).config.clip_sample is False


def test_saved_in_half_loaded_in_float(tmp_path):
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    net = CLIPTextModel(CLIPTextConfig(**small))
    train.half(net).save_pretrained(tmp_path / "text_encoder")
    assert CLIPTextModel.from_pretrained(tmp_path / "text_encoder").dtype == torch.float16
    train.load_in_float(tmp_path)
    assert CLIPTextModel.from_pretrained(tmp_path / "text_encoder").dtype == torch.float32
