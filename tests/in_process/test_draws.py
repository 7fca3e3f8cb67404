"""A step's randomness depends on seed and step alone."""

import torch
from concepts_pack.training.draws import draw
from hypothesis import given
from hypothesis import strategies as st

LATENTS = torch.arange(5 * 2 * 4, dtype=torch.float32).view(5, 2, 1, 2, 2)


def same(a, b):
    fields = ("latents", "noise", "timesteps", "photos", "views")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in fields) and a.lot == b.lot


def test_any_step_can_be_made_again():
    run = [draw(LATENTS, 1000, 3, 7, step) for step in range(6)]
    torch.manual_seed(99)
    assert all(same(run[step], draw(LATENTS, 1000, 3, 7, step)) for step in (4, 1, 5, 0))


def test_seeds_and_steps_differ():
    assert not same(draw(LATENTS, 1000, 3, 7, 0), draw(LATENTS, 1000, 3, 7, 1))
    assert not same(draw(LATENTS, 1000, 3, 7, 0), draw(LATENTS, 1000, 3, 8, 0))


@given(st.integers(0, 2**64 - 1), st.integers(1, 7), st.integers(1, 9))
def test_every_photo_once_per_round(seed, photos, batch_size):
    latents = torch.zeros(photos, 1, 1, 2, 2)
    seen = torch.cat([draw(latents, 10, batch_size, seed, step).photos for step in range(photos)])
    assert seen.view(batch_size, photos).sort(1).values.eq(torch.arange(photos)).all()


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 1000))
def test_noise_levels_are_in_range_one_per_stratum(seed, batch_size, levels):
    timesteps = draw(LATENTS, levels, batch_size, seed, 0).timesteps
    bounds = torch.arange(batch_size + 1) * levels / batch_size
    assert timesteps.min() >= 0 and timesteps.max() < levels
    assert ((timesteps >= bounds[:-1].floor()) & (timesteps <= bounds[1:])).all()


def test_all_levels_are_equally_likely():
    timesteps = torch.cat([draw(LATENTS, 10, 4, 0, step).timesteps for step in range(1000)])
    shares = torch.bincount(timesteps, minlength=10) / 4000
    assert shares.min() > 0.08 and shares.max() < 0.12


def test_all_views_are_used():
    firsts = {draw(LATENTS, 10, 1, 0, step).latents.flatten()[0].item() for step in range(60)}
    assert firsts == set(LATENTS[:, :, 0, 0, 0].flatten().tolist())


def test_everything_random_depends_on_the_seed():
    latents = torch.zeros(1, 9, 4, 8, 8)
    one, other = (draw(latents, 1000, 4, seed, 0) for seed in (7, 8))
    assert not any(torch.equal(getattr(one, name), getattr(other, name)) for name in ("noise", "timesteps", "views"))
    assert one.lot != other.lot
