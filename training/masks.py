"""Where the thing is in a picture, by what the model itself knows of its word: no segmentation model is needed."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from ..host.attention_maps import attention_to
from ..host.objective import denoised, timestep_count
from ..host.progress import ProgressBar, stop_if_cancelled

NOISE = 2 * (0.2, 0.4, 0.6)  # shares of the schedule at which the model is asked, each under noise of its own
SMOOTHED = 20  # the part of the short side within which values are averaged
AT_ONCE = 4  # pictures, whose attention maps take about the memory of training on one

Encoding = tuple[Tensor, Tensor | None]


@torch.no_grad()
def zero_shot(model: torch.nn.Module, latents: Tensor, named: Encoding, empty: Encoding, places: Sequence[int],
              seed: int) -> Tensor:
    """Masks (b 1 h w) of 0 and 1 for latents (b c h w) as the UNet sees them, 1 on the thing.

    It is where the attention to the tokens at `places` of the encoding `named` (1 n d) of its word is, which often
    falls on a part of it only, and where that word changes what the model predicts from `empty`, the encoding of "", as
    in DiffEdit (arXiv 2210.11427, section 3.2). The geometric mean of the two, each the mean of all noise levels and
    layers, is cut where Otsu's threshold parts its values. Where they have no place in common, all of it counts.
    """
    generator, groups, masks = torch.Generator().manual_seed(seed), latents.split(AT_ONCE), []
    bar = ProgressBar(len(groups))
    for some in groups:
        noises = torch.stack([torch.randn(len(NOISE), *one.shape, generator=generator) for one in some]).to(some)
        looked, changed = _maps(model, some, noises, named, empty, places)
        both = (_stretched(looked) * _stretched(changed)).sqrt()
        found = torch.stack([(one > otsu(one)).to(one) for one in both])
        masks.append(torch.where(found.amax((1, 2, 3), keepdim=True) > 0, found, torch.ones_like(found)))
        bar.update(1)
    return torch.cat(masks)


def otsu(values: Tensor) -> Tensor:
    """The threshold that parts values into two classes with the most variance between them (Otsu 1979)."""
    found = values.flatten().sort().values
    below = torch.arange(1, len(found), device=found.device)
    above = len(found) - below
    mean_below, mean_above = found.cumsum(0)[:-1] / below, found.flip(0).cumsum(0).flip(0)[1:] / above
    return found[(below * above * (mean_above - mean_below).square()).argmax()]


def _maps(model: torch.nn.Module, latents: Tensor, noises: Tensor, named: Encoding, empty: Encoding,
          places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The sums (b 1 h w) of attention maps and of changed predictions; `noises` (b s c h w), one for each of
    `NOISE`."""
    size = latents.shape[-2:]
    stop_if_cancelled()
    looked, changed = torch.zeros(2, len(latents), 1, *size, device=latents.device)
    for share, noise in zip(NOISE, noises.unbind(1), strict=True):
        timesteps = torch.full((len(latents),), int(share * timestep_count(model)), device=latents.device)
        with attention_to(model, places) as maps:
            said = denoised(model, latents, noise, timesteps, *named)
        looked += sum(interpolate(_as_picture(one, size), size, mode="bilinear") for one in maps)
        changed += _even((said - denoised(model, latents, noise, timesteps, *empty)).abs().mean(1, keepdim=True))
    return looked, changed


def _as_picture(attended: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (b q) as (b 1 h' w'), stretched alike for all layers; h' w' = q is the latent's size halved n times."""
    halved = ((-(-size[0] // 2**n), -(-size[1] // 2**n)) for n in range(8))
    height = next(h for h, w in halved if h * w == attended.shape[1])
    return _even(rearrange(attended, "b (h w) -> b 1 h w", h=height))


def _even(maps: Tensor) -> Tensor:
    """Maps (b 1 h w) with a mean of 1 each, so that all count the same."""
    return maps / maps.mean((2, 3), keepdim=True).clamp(min=1e-12)


def _stretched(maps: Tensor) -> Tensor:
    """Smoothed maps (b 1 h w), each from 0 to 1."""
    width = min(maps.shape[-2:]) // SMOOTHED | 1
    smooth = avg_pool2d(maps, width, 1, width // 2, count_include_pad=False)
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    return (smooth - low) / (high - low).clamp(min=1e-6)
