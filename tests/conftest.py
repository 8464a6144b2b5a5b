"""A tiny Stable Diffusion of random weights, in the very classes of v1.4, for everything that needs no trained model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests never ask a hub

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import doco


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a pipeline with 16x16 latents that runs a step in a few hundredths of a second."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(doco.HERE / "emoji/sd", subfolder="tokenizer")
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=16, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=64)  # fmt: skip
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              steps_offset=1)  # fmt: skip
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = StableDiffusionPipeline(vae=vae, text_encoder=CLIPTextModel(CLIPTextConfig(**text)), tokenizer=tokenizer, unet=unet,
                                   scheduler=scheduler, **none)  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "sd"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def unlearn(tiny, tmp_path):
    """Runs doco.unlearn on the tiny model with the given flags and returns the run folder."""

    def run(*flags, out="run", target="Grumpy Cat", anchor="Cat", model=tiny):
        argv = ["--model", str(model), "--target", target, "--anchor", anchor, "--out", str(tmp_path / out)]
        return doco.unlearn(doco.parse_args([*argv, "--batch-size", "4", *flags]))

    return run
