"""Where the super-category is in a picture, by the model's own cross-attention: no segmentation model is needed."""

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from ..host.attention_maps import attention_to
from ..host.objective import denoising_error, timestep_count

NOISE = (0.3, 0.5, 0.7)  # shares of the schedule at which the model is asked
AT_ONCE = 4  # pictures: attention maps take more memory than training does


@torch.no_grad()
def zero_shot(model: torch.nn.Module, latents: Tensor, context: Tensor, pooled: Tensor | None, places: Sequence[int],
              seed: int) -> Tensor:
    """Soft masks (b 1 h w), 1 where most attention goes to the tokens at `places` of the encoding `context` (1 n d).

    `latents` (b c h w) as the UNet sees them. Maps of all layers are averaged over heads, layers and noise levels and
    stretched to 0..1 for each picture.
    """
    generator = torch.Generator().manual_seed(seed)
    noises = torch.stack([torch.randn(latents.shape, generator=generator) for _ in NOISE], 1)
    total = torch.cat([_attention(model, some, noise.to(some), context, pooled, places)
                       for some, noise in zip(latents.split(AT_ONCE), noises.split(AT_ONCE), strict=True)])
    smooth = avg_pool2d(total, 3, 1, 1, count_include_pad=False)
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    return (smooth - low) / (high - low).clamp(min=1e-6)


def _attention(model: torch.nn.Module, latents: Tensor, noises: Tensor, context: Tensor, pooled: Tensor | None,
               places: Sequence[int]) -> Tensor:
    """The sum of all maps (b 1 h w); `noises` (b s c h w), one for each of `NOISE`."""
    size = latents.shape[-2:]
    total = torch.zeros(len(latents), 1, *size, device=latents.device)
    for share, noise in zip(NOISE, noises.unbind(1), strict=True):
        timesteps = torch.full((len(latents),), int(share * timestep_count(model)), device=latents.device)
        call = partial(denoising_error, model, latents, noise, timesteps, context, pooled)
        for attended in attention_to(model, places, call):
            total += interpolate(_as_picture(attended, size), size, mode="bilinear")
    return total


def _as_picture(attended: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (b q) as (b 1 h' w'), stretched alike for all layers; h' w' = q is the latent's size halved n times."""
    halved = ((-(-size[0] // 2**n), -(-size[1] // 2**n)) for n in range(8))
    height = next(h for h, w in halved if h * w == attended.shape[1])
    picture = rearrange(attended, "b (h w) -> b 1 h w", h=height)
    return picture / picture.mean((2, 3), keepdim=True)
