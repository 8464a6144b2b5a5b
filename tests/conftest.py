"""Tiny models of random weights, in the very classes of the papers' models.

For everything that needs no trained model: a run of a few steps takes a second or two.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests never ask a hub
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers run side by side: one thread each, and no thread waits for its turn by spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import common

TOKENIZER = common.REPO / "emoji/sd"

# Files whose slow tests take longest. A worker takes a file at a time: a long one must not be last,
# or the other worker would wait for it.
LONGEST = ("test_reproduce.py", "test_main.py", "test_golden.py", "test_tutorial.py")


def pytest_collection_modifyitems(items):
    """The longest files first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def text_config(tokenizer, side, **more):
    """The config of a CLIP text encoder with two layers, `side` wide."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=side,
        intermediate_size=2 * side,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )


def small_vae(**more):
    """A VAE with 4 channels, and 2x2 pixels per latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **more,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a Stable Diffusion with 16x16 latents of 64x64 pixels."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, subfolder="tokenizer")
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    scheduler.register_to_config(clip_sample=False)  # as in the hub's folder
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, 32)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("tiny") / "sd"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_ddpm(tmp_path_factory):
    """Folder of a DDPM of 16x16 pixels."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("tiny") / "ddpm"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """Folder of a Stable Diffusion 3 without T5, 8x8 latents of 16x16 pixels."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, subfolder="tokenizer")
    text = text_config(tokenizer, 16, projection_dim=16)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    no_quantization = {"use_quant_conv": False, "use_post_quant_conv": False}
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=small_vae(scaling_factor=0.5, shift_factor=0.1, **no_quantization),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        text_encoder_3=None,
        text_encoder=CLIPTextModelWithProjection(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    folder = tmp_path_factory.mktemp("tiny") / "sd3"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Folder of a Stable Diffusion XL, 8x8 latents of 16x16 pixels."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, subfolder="tokenizer")
    text = text_config(tokenizer, 16, projection_dim=16)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        use_linear_projection=True,
        cross_attention_dim=32,  # of both text encoders together
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,  # the pooled text, six sizes
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.register_to_config(clip_sample=False)  # as in the hub's folder
    pipe = StableDiffusionXLPipeline(
        unet=unet,
        vae=small_vae(scaling_factor=0.13025),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        scheduler=scheduler,
    )
    folder = tmp_path_factory.mktemp("tiny") / "sdxl"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """Folder of a FLUX.1-dev. Native are 256x256 pixels, whatever its parts; 16x16 are enough."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, subfolder="tokenizer")
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    spelling = T5TokenizerFast(vocab=special + letters, extra_ids=0)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5EncoderModel(T5Config(**small, vocab_size=len(spelling)))
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    no_quantization = {"use_quant_conv": False, "use_post_quant_conv": False}
    pipe = FluxPipeline(
        transformer=transformer,
        vae=small_vae(scaling_factor=0.3611, shift_factor=0.1159, **no_quantization),
        tokenizer=tokenizer,
        tokenizer_2=spelling,
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)),
        text_encoder_2=t5.bfloat16().float(),  # the hub has bfloat16: no rounding when it is loaded
        scheduler=scheduler,
    )
    folder = tmp_path_factory.mktemp("tiny") / "flux"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Folder of five random images of 16x16 and 64x64 pixels: a, b, c, d.png and large.png."""
    folder = tmp_path_factory.mktemp("photos")
    g = torch.Generator().manual_seed(0)
    sides = {"a": 16, "b": 16, "c": 16, "d": 16, "large": 64}
    for name, side in sides.items():
        coarse = torch.rand(1, 3, 4, 4, generator=g) * 2 - 1
        image = torch.nn.functional.interpolate(coarse, (side, side))[0]
        common.to_image(image).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def forget(tiny_ddpm, tiny_sd3, tiny, photos, tmp_path):
    """run(*flags, out=, model=, images=): a run of instance_unlearn.py; returns its folder.

    model: ddpm, sd3, sd, or a folder. images: the files to forget.
    """

    def run(*flags, out="run", model="ddpm", images=None):
        import instance_unlearn

        folder = {"ddpm": tiny_ddpm, "sd3": tiny_sd3, "sd": tiny}.get(model, model)
        images = images or [photos / ("large.png" if model == "sd" else "a.png")]
        argv = ["--model", str(folder), "--forget", *map(str, images), "--remember", str(photos)]
        argv += ["--batch-size", "4", "--out", str(tmp_path / out), *flags]
        return instance_unlearn.unlearn(instance_unlearn.parse_args(argv))

    return run


@pytest.fixture
def unlearn(tiny, tmp_path):
    """run(*flags, out=, target=, anchor=, model=): a run of doco.py; returns its folder."""

    def run(*flags, out="run", target="Grumpy Cat", anchor="Cat", model=tiny):
        import doco

        argv = ["--model", str(model), "--target", target, "--anchor", anchor]
        argv += ["--batch-size", "4", "--out", str(tmp_path / out), *flags]
        return doco.unlearn(doco.parse_args(argv))

    return run
