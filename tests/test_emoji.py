"""emoji/: the embedded data and models are what its README says.

Small, safe to load, in Stable Diffusion v1.4's classes; and they generate what the prompts ask for.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import backbones
import eval as evaluation
import metrics
from common import REPO, read_cropped, read_exact
from emoji import train

EMOJI = REPO / "emoji"
CPU = torch.device("cpu")
DATA = json.loads((EMOJI / "images/emoji.json").read_text())
NAMES = [entry["name"] for entry in DATA["emoji"]]


def to_uint8(x):
    """[0, 1] -> uint8, as the evaluation networks take images."""
    return (x * 255).round().byte()


@pytest.fixture(scope="module")
def clip():
    """The scoring CLIP."""
    return metrics.Clip(EMOJI / "clip", CPU)


def top1(clip, images, asked):
    """The fraction of images whose name (an index) ranks first among all 237; chance: 0.4 %."""
    image_emb = F.normalize(clip(images), dim=-1)  # (n, d)
    name_emb = F.normalize(clip.texts(NAMES), dim=-1)  # (237, d)
    ranked = (image_emb @ name_emb.T).argmax(1)
    return (ranked == torch.tensor(asked)).float().mean()


# ---- data and files -----------------------------------------------------------------------------


def words(texts):
    """The words of some texts, a set."""
    return set(" ".join(texts).split())


def test_nicknames_share_no_word_with_any_caption_of_their_concept():
    """Else they were no out-of-distribution prompts."""
    with_nicknames = [e for e in DATA["emoji"] if e["nicknames"]]
    assert len(with_nicknames) >= 20
    for e in with_nicknames:
        assert len(e["nicknames"]) >= 2
        captions = [e["name"], *e["synonyms"], *e["groups"]]
        assert not words(captions) & words(e["nicknames"]), e
    for nicknames in DATA["styles"].values():
        assert len(nicknames) >= 2


def test_size_and_file_types():
    """A clone stays small, and no file can run code when it is loaded."""
    files = [p for p in EMOJI.rglob("*") if p.is_file()]
    files = [p for p in files if "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 55e6
    pickles = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    assert not [p for p in files if p.suffix in pickles]


def test_classes_and_noise_schedule_are_those_of_stable_diffusion():
    """What unlearns emoji/sd unlearns Stable Diffusion v1.4."""
    classes = json.loads((EMOJI / "sd/model_index.json").read_text())
    expected = {
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
    }
    assert classes["_class_name"] == "StableDiffusionPipeline"
    assert {k: classes[k][1] for k in expected} == expected
    scheduler = json.loads((EMOJI / "sd/scheduler/scheduler_config.json").read_text())
    assert scheduler["beta_start"] == 0.00085
    assert scheduler["beta_end"] == 0.012
    assert scheduler["beta_schedule"] == "scaled_linear"


def test_configs_name_float32_and_no_clipping():
    """In plain diffusers, all components come in one dtype, and no sampler clips latents."""
    for config in EMOJI.glob("*/**/config.json"):
        dtype = json.loads(config.read_text()).get("dtype", "float32")
        assert dtype == "float32", config
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI / "sd")
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert DDIMScheduler.from_config(pipe.scheduler.config).config.clip_sample is False


def test_creatures_are_what_the_script_writes(tmp_path):
    """The training images of the DDPM, as files and as tensors."""
    data, images = train.load_images(EMOJI / "images")
    x = train.write_creatures(tmp_path, data, images)
    folder = EMOJI / "creatures"
    written = sorted(p.name for p in tmp_path.glob("*.png"))
    assert written == sorted(p.name for p in folder.glob("*.png"))
    assert len(x) == len(written) == 417
    for name in written[::40]:
        ours = Image.open(tmp_path / name)
        embedded = Image.open(folder / name)
        assert ours.tobytes() == embedded.tobytes()


# ---- train.py -----------------------------------------------------------------------------------


def test_tokenizer_follows_its_seed_alone():
    """A resumed training must find its tokens again; ties between merges used to vary."""
    data, _ = train.load_images(EMOJI / "images")
    first = train.train_tokenizer(data, seed=0)
    second = train.train_tokenizer(data, seed=0)
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 2048
    text = "Grumpy Cat, in twemoji's style"
    assert first(text).input_ids == second(text).input_ids
    assert first("GRUMPY CAT").input_ids == first("grumpy cat").input_ids


def test_cycles_of_the_training():
    """Where a step is in the cycles, also in those of a shortened training."""
    args = SimpleNamespace(scale=1.0)
    assert train.cycle(args, "unet", 5999) == (0, 5999, 6000, 11000)
    assert train.cycle(args, "unet", 6000) == (1, 0, 5000, 11000)
    args.scale = 0.01
    assert train.cycle(args, "scorer", 31) == (2, 11, 12, 32)


def test_a_resumed_training_goes_on_bitwise(tmp_path):
    """Weights and Adam moments come back from a checkpoint, the random numbers from the step."""

    def run(steps, folder):
        """Trains a small network for so many steps, from the checkpoint that is there."""
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 3)
        optimizer = train.adamw((net, 1e-2))
        checkpoint = tmp_path / folder / "net.safetensors"
        start = train.load_checkpoint(checkpoint, optimizer, net=net)
        for step in range(start, steps):
            _, g = train.generators(0, "test", step)
            x = torch.randn(4, 3, generator=g)
            loss = net(x).square().mean()
            train.cosine_lr(optimizer, step, 6)
            train.optimize(loss, optimizer)
            train.save_checkpoint(checkpoint, step + 1, optimizer, net=net)
        return net.weight

    run(3, "interrupted")
    resumed = run(6, "interrupted")
    assert torch.equal(resumed, run(6, "at-once"))


def test_saved_in_half_loaded_in_float(tmp_path):
    """The config of a saved folder decides what transformers loads."""
    config = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
    )
    folder = tmp_path / "text_encoder"
    train.half(CLIPTextModel(config)).save_pretrained(folder)
    assert CLIPTextModel.from_pretrained(folder).dtype == torch.float16
    train.load_in_float(tmp_path)
    assert CLIPTextModel.from_pretrained(folder).dtype == torch.float32


# ---- sd -----------------------------------------------------------------------------------------


def test_case_does_not_matter():
    """The tokenizer is lower-case, as CLIP's."""
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI / "sd", dtype=torch.float32)
    upper, _ = pipe.encode_prompt("Grumpy CAT", "cpu", 1, False)
    lower, _ = pipe.encode_prompt("grumpy cat", "cpu", 1, False)
    assert torch.equal(upper, lower)


@pytest.mark.slow
def test_sd_generates_what_is_asked_for(clip):
    """Forty names: the scoring CLIP ranks most of them first among all 237."""
    asked = list(range(0, len(NAMES), 6))
    prompts = [NAMES[i] for i in asked]
    sampler = evaluation.Sampler(EMOJI / "sd", CPU)
    images = sampler.sample(prompts, range(len(prompts)), "test")
    assert top1(clip, images, asked) >= 0.6


@pytest.mark.slow
def test_the_nicknames_of_the_grumpy_cat_generate_it(clip):
    """The OOD prompts of the default evaluation have something to lose."""
    sampler = evaluation.Sampler(EMOJI / "sd", CPU)
    prompts = ["tardar sauce", "sourpuss"] * 10
    images = sampler.sample(prompts, range(20), "test")
    target = clip.texts(["grumpy cat"] * 20)
    anchor = clip.texts(["cat"] * 20)
    ca = metrics.clip_accuracy(clip(images), target, anchor)
    assert ca.mean() >= 60


# ---- copy detector and DDPM ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def detect():
    """The copy detector: uint8 images -> unit vectors."""
    network, _ = metrics.load_copy_detector(None, embedded=True, device=CPU)
    return network


@torch.no_grad()
def test_copy_detector_tells_copies_from_others(detect):
    """Half the resolution is still a copy; other emoji, cats among them, are not."""
    _, images = train.load_images(EMOJI / "images")
    every_fifth = images.flatten(0, 1)[::5]
    x = (every_fifth + 1) / 2
    original = detect(to_uint8(x))
    small = detect(to_uint8(F.avg_pool2d(x, 2)))
    copies = (original * small).sum(1)
    itself = torch.eye(len(x), dtype=torch.bool)
    others = (original @ original.T)[~itself]
    assert copies.quantile(0.05) > 0.8
    assert others.quantile(0.95) < 0.4


@pytest.mark.slow
@torch.no_grad()
def test_ddpm_returns_a_noised_training_image(detect):
    """It has memorised them: the noise-and-denoise probe finds them."""
    sampler = evaluation.Sampler(EMOJI / "ddpm", CPU)
    for name in ("twemoji-cowboy-hat-face", "twemoji-panda"):
        x = read_exact(EMOJI / f"creatures/{name}.png", 32, "--forget")
        probes = detect(sampler.probe(x, "", seed=0))
        original = detect(to_uint8((x[None] + 1) / 2))[0]
        assert (probes @ original).mean() > 0.8


@pytest.mark.slow
@torch.no_grad()
def test_ddpm_generates_creatures(detect):
    """A generated image is closer to some training image than most training images are."""
    sampler = evaluation.Sampler(EMOJI / "ddpm", CPU)
    files = sorted((EMOJI / "creatures").glob("*.png"))
    images = torch.stack([read_cropped(file, 32) for file in files])
    real = detect(to_uint8((images + 1) / 2))
    generated = detect(sampler.sample(None, range(24), "test"))
    assert (generated @ real.T).amax(1).median() > 0.6


# ---- sd3 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd3():
    """The pipeline in emoji/sd3."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        EMOJI / "sd3", dtype=torch.float32, **train.NO_T5
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_sd3_generates_what_is_asked_for(sd3, clip):
    """Twenty names: the scoring CLIP ranks at least half of them first among all 237."""
    asked = list(range(0, len(NAMES), 12))
    output = sd3(
        [NAMES[i] for i in asked],
        generator=[torch.Generator().manual_seed(k) for k in asked],
        num_inference_steps=15,
        guidance_scale=4.0,
        output_type="np",
    )
    images = torch.from_numpy(output.images).permute(0, 3, 1, 2)
    assert top1(clip, to_uint8(images), asked) >= 0.5


@torch.no_grad()
def test_one_counted_row_is_256_rows(sd3):
    """The shortcut of the training is exact: 256 zero rows, or one that counts 256 times."""
    texts = ["a grumpy cat", "flag of japan"]
    encoded = sd3.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
    rows, pooled = encoded[0], encoded[2]
    encoders = {"text_encoder": sd3.text_encoder, "text_encoder_2": sd3.text_encoder_2}
    ids = train.tokenize(sd3.tokenizer, texts, "cpu")
    short, same_pooled = train.encode_captions(encoders, ids)
    assert rows.shape[1] == 288
    assert short.shape[1] == 33

    x = torch.randn(2, 4, 16, 16)
    t = torch.tensor([300.0, 800.0])
    expected = sd3.transformer(x, rows, pooled, t).sample
    processors = sd3.transformer.attn_processors
    sd3.transformer.set_attn_processor(train.CountedRow())
    got = sd3.transformer(x, short, same_pooled, t).sample
    sd3.transformer.set_attn_processor(processors)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---- sdxl ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl():
    """The pipeline in emoji/sdxl, loaded as in its README: plain diffusers, no argument."""
    pipe = StableDiffusionXLPipeline.from_pretrained(EMOJI / "sdxl")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_xl(pipe, prompts):
    """One image per prompt, uint8; image k is generated with seed k."""
    output = pipe(
        prompts,
        generator=[torch.Generator().manual_seed(k) for k in range(len(prompts))],
        num_inference_steps=20,
        guidance_scale=3.0,
        output_type="np",
    )
    return to_uint8(torch.from_numpy(output.images).permute(0, 3, 1, 2))


def test_sdxl_is_small_and_has_the_traits_of_xl(sdxl):
    """10 MB in all; two encoders side by side; zeros for the empty prompt; XL's schedule."""
    files = [p for p in (EMOJI / "sdxl").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 10e6
    unet, first, second = (m.config for m in (sdxl.unet, sdxl.text_encoder, sdxl.text_encoder_2))
    assert unet.addition_embed_type == "text_time"
    assert unet.cross_attention_dim == first.hidden_size + second.hidden_size
    added = second.projection_dim + 6 * unet.addition_time_embed_dim
    assert unet.projection_class_embeddings_input_dim == added
    assert type(sdxl.text_encoder) is CLIPTextModel
    assert type(sdxl.text_encoder_2) is CLIPTextModelWithProjection
    assert sdxl.config.force_zeros_for_empty_prompt
    scheduler = sdxl.scheduler.config
    assert (scheduler.beta_start, scheduler.beta_end) == (0.00085, 0.012)
    assert (scheduler.timestep_spacing, scheduler.steps_offset) == ("leading", 1)
    assert scheduler.clip_sample is False
    for module in (sdxl.unet, sdxl.vae, sdxl.text_encoder, sdxl.text_encoder_2):
        assert {p.dtype for p in module.parameters()} == {torch.float32}


@torch.no_grad()
def test_xl_is_trained_on_what_the_pipeline_computes(sdxl):
    """Caption rows, pooled vectors, sizes: of the training, of diffusers and of the toolkit."""
    texts = ["a grumpy cat", "", "flag of japan"]
    encoders = {"text_encoder": sdxl.text_encoder, "text_encoder_2": sdxl.text_encoder_2}
    rows, pooled = train.encode_xl(encoders, texts, sdxl.tokenizer, "cpu")
    assert rows.shape == (3, 32, 160)
    assert pooled.shape == (3, 64)
    # The pipeline zeroes only the prompt that guidance subtracts: the empty one.
    expected, empty, expected_pooled, empty_pooled = sdxl.encode_prompt(["a grumpy cat"])
    torch.testing.assert_close(rows[:2], torch.cat([expected, empty]))
    torch.testing.assert_close(pooled[:2], torch.cat([expected_pooled, empty_pooled]))
    assert not rows[1].any() and not pooled[1].any()

    toolkit = backbones.load_backbone(str(EMOJI / "sdxl"))
    embedded = toolkit.embed(texts, CPU)
    torch.testing.assert_close(embedded["prompt_embeds"], rows)
    torch.testing.assert_close(embedded["pooled_prompt_embeds"], pooled)


@pytest.mark.slow
def test_sdxl_generates_what_is_asked_for(sdxl, clip):
    """Forty names: the scoring CLIP ranks most of them first among all 237."""
    asked = list(range(0, len(NAMES), 6))
    images = generate_xl(sdxl, [NAMES[i] for i in asked])
    assert top1(clip, images, asked) >= 0.6


@pytest.mark.slow
def test_sdxl_generates_the_grumpy_cat_also_by_nickname(sdxl, clip):
    """Unlike sd3/: there is something to unlearn, and something to lose out of distribution."""
    target = clip.texts(["grumpy cat"] * 20)
    anchor = clip.texts(["cat"] * 20)
    for prompts in (["grumpy cat"] * 20, ["tardar sauce", "sourpuss"] * 10):
        images = generate_xl(sdxl, prompts)
        ca = metrics.clip_accuracy(clip(images), target, anchor)
        assert ca.mean() >= 80
