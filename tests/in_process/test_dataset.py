"""Photos of any kind become squares of one size."""

import pytest
import torch
from concepts_pack.training.dataset import cache_latents, single_photos, squares, working_side


def test_batches_and_sizes_mix():
    photos = single_photos([torch.rand(2, 64, 96, 3), torch.rand(1, 200, 70, 4), torch.rand(1, 64, 64, 1)])
    assert [tuple(p.shape) for p in photos] == [(64, 96, 3), (64, 96, 3), (200, 70, 3), (64, 64, 3)]
    assert squares(photos, 64).shape == (4, 64, 64, 3)


def test_the_middle_is_kept():
    wide = torch.zeros(1, 64, 192, 3)
    wide[:, :, 64:128] = 1
    assert squares(single_photos([wide]), 64).min() > 0.99


@pytest.mark.parametrize(("sides", "asked", "side"), [
    ((128,), 0, 128), ((2000, 3000), 0, 512), ((130, 140), 0, 128), ((40,), 0, 64), ((128,), 256, 256),
    ((900,), 100, 64),
])
def test_working_side(sides, asked, side):
    assert working_side([torch.zeros(s, s + 10, 3) for s in sides], asked, 512) == side


def test_no_photos_and_tiny_photos():
    with pytest.raises(ValueError, match="no images"):
        single_photos([torch.zeros(0, 64, 64, 3)])
    with pytest.raises(ValueError, match="Image 2 is 1×1 pixels; at least 32"):
        single_photos([torch.rand(1, 64, 64, 3), torch.rand(1, 1, 1, 3)])


def test_mirrored_twins_are_cached_beside():
    photos = torch.rand(3, 8, 8, 3)
    assert cache_latents(lambda p: p, photos, False).shape == (3, 1, 8, 8, 3)
    both = cache_latents(lambda p: p, photos, True)
    assert torch.equal(both[:, 0], photos) and torch.equal(both[:, 1], photos.flip(2))
