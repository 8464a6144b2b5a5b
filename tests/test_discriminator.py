"""discriminator.py: five strided convolutions, fewer for small latents; each image by itself."""

import pytest
import torch

from discriminator import patchgan


@pytest.mark.parametrize(("size", "layers"), [(64, 5), (32, 4), (16, 3), (8, 2), (4, 1)])
def test_depth_follows_the_latent(size, layers):
    """Each side is halved until 2x2 patches are left."""
    disc = patchgan(size)
    convs = [m for m in disc if isinstance(m, torch.nn.Conv2d)]
    assert [(c.kernel_size, c.stride) for c in convs] == [((4, 4), (2, 2))] * layers
    assert disc(torch.randn(2, 4, size, size)).shape == (2, 1, 2, 2)


def test_oblong_and_large_latents_give_more_patches():
    """The network is convolutional: sample_size is only the smaller side."""
    assert patchgan(64)(torch.randn(1, 4, 64, 96)).shape == (1, 1, 2, 3)
    assert patchgan(96)(torch.randn(1, 4, 96, 96)).shape == (1, 1, 3, 3)


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
