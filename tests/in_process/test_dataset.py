"""Photos of any kind become squares of one size, with masks and captions that stay with them."""

import weakref

import pytest
import torch
from concepts_pack.textual_inversion.templates import sentence_of
from concepts_pack.training.dataset import Photo, cache, gather, squares, weighted_mean, working_side


def pictures(photos):
    return torch.stack([photo.picture for photo in photos])


def test_batches_and_sizes_mix():
    photos = gather([torch.rand(2, 64, 96, 3), torch.rand(1, 200, 70, 4), torch.rand(1, 64, 64, 1)])
    assert [tuple(p.picture.shape) for p in photos] == [(64, 96, 3), (64, 96, 3), (200, 70, 3), (64, 64, 3)]
    assert pictures(squares(photos, 64)).shape == (4, 64, 64, 3)


def test_the_middle_is_kept():
    wide = torch.zeros(1, 64, 192, 3)
    wide[:, :, 64:128] = 1
    assert pictures(squares(gather([wide]), 64)).min() > 0.99


@pytest.mark.parametrize("outside", [0, 0.004, 0.2])
def test_the_masked_thing_is_kept(outside):
    """Segmentations give what they are nearly sure of, not 0 and 1."""
    wide, mask = torch.zeros(1, 64, 192, 3), torch.full((1, 64, 192), float(outside))
    wide[:, :, 128:] = 1
    mask[:, 20:40, 170:180] = 1
    (view,) = squares(gather([wide], [mask]), 64)
    assert view.picture.min() > 0.99 and (view.mask > 0.5).sum() == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize(("sides", "asked", "side"), [
    ((128,), 0, 128), ((2000, 3000), 0, 512), ((130, 140), 0, 128), ((40,), 0, 64), ((128,), 256, 256),
    ((900,), 100, 64),
])
def test_working_side(sides, asked, side):
    assert working_side([Photo(torch.zeros(s, s + 10, 3)) for s in sides], asked, 512) == side


def test_no_photos_and_tiny_photos():
    with pytest.raises(ValueError, match="no images"):
        gather([torch.zeros(0, 64, 64, 3)])
    with pytest.raises(ValueError, match="Image 2 is 1×1 pixels; at least 32"):
        gather([torch.rand(1, 64, 64, 3), torch.rand(1, 1, 1, 3)])


def test_alpha_is_the_mask_where_none_is_given():
    picture = torch.rand(1, 64, 64, 4)
    assert torch.equal(gather([picture])[0].mask, picture[0, ..., 3])
    own = torch.rand(1, 64, 64)
    assert torch.equal(gather([picture], [own])[0].mask, own[0])
    assert torch.equal(gather([picture], [torch.zeros(1, 64, 64)])[0].mask, picture[0, ..., 3])


@pytest.mark.parametrize("mask", [torch.zeros(1, 64, 64), torch.ones(1, 64, 64), torch.ones(1, 96, 80)])
def test_a_mask_that_is_the_same_everywhere_counts_as_none(mask):
    """Load Image gives such masks for pictures without alpha, Invert Mask turns them over, Load Concept Photos too."""
    assert gather([torch.rand(1, 96, 80, 3)], [mask])[0].mask is None


def test_an_opaque_picture_has_no_mask():
    picture = torch.rand(1, 64, 64, 4)
    picture[..., 3] = 1
    assert gather([picture])[0].mask is None


def test_crops_hold_the_masked_thing():
    wide, mask = torch.rand(1, 64, 400, 3), torch.zeros(1, 64, 400)
    mask[:, 20:40, 300:320] = 1
    views = list(squares(gather([wide], [mask]), 64, crops=16))
    assert len(views) == 17 and all(view.mask.sum() > 100 for view in views)


def test_views_stay_beside_their_photo():
    photos = gather([torch.rand(3, 64, 64, 3)], [torch.rand(3, 64, 64)], ["one", "", "three"])
    views = list(squares(photos, 64, crops=2, mirror=True, seed=1))
    assert len(views) == 3 * 2 * 3
    first, crop, _, twin = views[6:10]
    assert torch.allclose(first.picture, photos[1].picture, atol=1e-5)
    assert not torch.allclose(crop.picture, first.picture, atol=0.05)
    assert torch.equal(twin.picture, first.picture.flip(1)) and torch.equal(twin.mask, first.mask.flip(1))
    lessons = cache(lambda p: p.permute(0, 3, 1, 2)[..., ::8, ::8], views, 3, floor=0.25)
    assert lessons.latents.shape == (3, 6, 3, 8, 8) and lessons.weights.shape == (3, 6, 1, 8, 8)
    assert lessons.captions == ("one", "", "three")
    mean = views[7].mask[8:16, 16:24].mean()
    assert lessons.weights[1, 1, 0, 1, 2].item() == pytest.approx(0.25 + 0.75 * mean.item(), rel=1e-4)


def test_views_are_let_go_once_they_are_encoded():
    held, counts = weakref.WeakSet(), []

    def watched(views):
        for view in views:
            held.add(view.picture)
            counts.append(len(held))
            yield view

    views = squares(gather([torch.rand(9, 64, 64, 3)]), 64, crops=2)
    cache(lambda picture: picture.mean((1, 2), keepdim=True), watched(views), 9, 0.1)
    assert len(counts) == 27 and max(counts) <= 6


def test_crops_depend_on_the_seed_alone():
    photos = gather([torch.rand(1, 64, 96, 3)])
    one, again, other = (pictures(squares(photos, 64, crops=3, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one[1:], other[1:])


def test_without_masks_there_are_no_weights():
    views = squares(gather([torch.rand(1, 64, 64, 3)]), 64)
    assert cache(lambda p: p.permute(0, 3, 1, 2), views, 1, 0.1).weights is None


def test_weights_decide_what_counts():
    error, weights = torch.rand(2, 4, 8, 8), torch.zeros(2, 1, 8, 8)
    weights[0, 0, 2:5, 3:7], weights[1] = 0.5, 0.1
    mean = weighted_mean(error, weights)
    torch.testing.assert_close(mean[0], error[0, :, 2:5, 3:7].mean())
    torch.testing.assert_close(mean[1], error[1].mean())
    assert weighted_mean(error, 0 * weights).tolist() == [0, 0]
    torch.testing.assert_close(weighted_mean(error, None), error.mean((1, 2, 3)))


@pytest.mark.parametrize(("caption", "sentence"), [
    ("a photo of {} at night", "a photo of {} at night"),
    ("a photo of <mine> at night", "a photo of {} at night"),
    ("a red Cat in a catalogue", "a red {} in a catalogue"),
    ("something else", "{}, something else"),
    ("a cat-themed room with my cat", "a cat-themed room with my {}"),
])
def test_where_the_word_goes_in_a_caption(caption, sentence):
    assert sentence_of(caption, "<mine>", "cat") == sentence


def test_crops_are_three_quarters_or_more():
    ramp = torch.linspace(0, 1, 512).expand(512, -1)[None, ..., None].expand(-1, -1, -1, 3)
    first, *crops = squares(gather([ramp]), 64, crops=16)
    shares = [(crop.picture[0, -1, 0] - crop.picture[0, 0, 0]).item() for crop in crops]
    assert 0.72 < min(shares) < 0.85 and max(shares) < 1.01 and len(set(shares)) == 16
