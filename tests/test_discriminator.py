"""discriminator.py: five strided convolutions, fewer for small latents; each image by itself."""

import pytest
import torch

from discriminator import patchgan

LAYERS = {64: 5, 32: 4, 16: 3, 8: 2, 4: 1}


@pytest.mark.parametrize("size", LAYERS)
def test_depth_follows_the_latent(size):
    """Each side is halved until 2x2 patches are left."""
    disc = patchgan(size)
    convolutions = [m for m in disc if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == LAYERS[size]
    for c in convolutions:
        assert c.kernel_size == (4, 4)
        assert c.stride == (2, 2)
    assert disc(torch.randn(2, 4, size, size)).shape == (2, 1, 2, 2)


def test_oblong_and_large_latents_give_more_patches():
    """The network is convolutional: sample_size is only the smaller side."""
    oblong = torch.randn(1, 4, 64, 96)
    assert patchgan(64)(oblong).shape == (1, 1, 2, 3)
    large = torch.randn(1, 4, 96, 96)
    assert patchgan(96)(large).shape == (1, 1, 3, 3)


def test_too_small_is_an_error_that_names_the_flag():
    """A side of two pixels leaves no 2x2 patches."""
    with pytest.raises(ValueError, match="--resolution"):
        patchgan(2)


def test_each_image_is_classified_by_itself():
    """A logit does not depend on the other images of the batch, as with BatchNorm it would."""
    torch.manual_seed(0)
    disc = patchgan(16)
    x = torch.randn(6, 4, 16, 16)
    torch.testing.assert_close(disc(x)[:2], disc(x[:2]))
