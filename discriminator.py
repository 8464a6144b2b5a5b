"""The PatchGAN discriminator of DoCo (Wu et al., AAAI 2025; after Isola et al. 2017). Torch alone.

It plays the membership inference attack of the paper. Given what the UNet denoises from a noisy
latent, it classifies, patch by patch, whether the prompt was the anchor (logit > 0) or the target
(logit < 0). Neither the prompt nor the timestep is an input.

The paper: five 4x4 convolutions, each of stride 2. A 64x64 latent (512 pixels in Stable Diffusion
v1.4) becomes 2x2 patch logits. A side of one pixel cannot be halved, so smaller latents get fewer
layers instead of an error: the depth is what leaves 2x2 patches (16x16 latents: three layers).

The released code differs. Its last layer has stride 1 (3x3 logits from 64x64, and an error below
32x32), and its BatchNorm mixes the images of a batch. Batch statistics differ between ranks, and
between anchor and target batches: N processes would not compute what one does, and the batch itself
would reveal the concept. GroupNorm normalises each image by itself.
"""

import torch.nn as nn


def patchgan(sample_size=64, in_channels=4, width=64, max_layers=5):
    """The network: latents (B, in_channels, sample_size, sample_size) -> patch logits (B, 1, 2, 2).

    sample_size is the smaller side of the latent; larger and oblong latents give more patches. The
    channels double from layer to layer, from `width` up to eight times it. Raises ValueError for a
    side below 4.
    """
    if sample_size < 4:
        raise ValueError(
            f"patchgan: a latent side of {sample_size} is too small, 4 is the least; "
            f"use a larger --resolution"
        )
    depth = min(max_layers, sample_size.bit_length() - 2)  # 64 -> 5, 32 -> 4, 16 -> 3, 4 -> 1
    layers, channels = [], in_channels
    for i in range(depth - 1):
        out = width * min(2**i, 8)  # 64, 128, 256, 512
        layers.append(nn.Conv2d(channels, out, kernel_size=4, stride=2, padding=1))
        if i > 0:  # none after the first layer, as in PatchGAN
            layers.append(nn.GroupNorm(out // 16, out))
        layers.append(nn.LeakyReLU(0.2))
        channels = out
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, kernel_size=4, stride=2, padding=1))
