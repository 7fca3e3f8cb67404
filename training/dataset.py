"""Photos of any size to latents of one size, computed once before the first step."""

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import interpolate

STRIDE = 64  # eight pixels per latent cell times the UNet's three halvings
SMALLEST = 32


def single_photos(batches: Sequence[Tensor]) -> list[Tensor]:
    """IMAGE batches (b h w c) as a list of RGB photos (h w 3); grey is spread, alpha dropped.

    Raises ValueError when there is none, or one is smaller than 32 pixels a side.
    """
    photos = [_rgb(photo) for batch in batches for photo in batch]
    if not photos:
        raise ValueError("There are no images to learn from; connect at least one photo.")
    for number, (height, width, _) in enumerate((photo.shape for photo in photos), 1):
        if min(height, width) < SMALLEST:
            raise ValueError(f"Image {number} is {width}×{height} pixels; at least {SMALLEST} a side are needed.")
    return photos


def working_side(photos: Sequence[Tensor], asked: int, largest: int) -> int:
    """The side of the training square in pixels: `asked`, or for 0 the photos' own size up to `largest`."""
    own = int(median(min(photo.shape[:2]) for photo in photos))
    side = asked or min(own, largest)
    return max(STRIDE, side // STRIDE * STRIDE)


def squares(photos: Sequence[Tensor], side: int) -> Tensor:
    """The middle square of each photo (h w 3) at the working size (n side side 3)."""
    return torch.stack([_square(photo, side) for photo in photos])


def cache_latents(encode: Callable[[Tensor], Tensor], photos: Tensor, mirror: bool) -> Tensor:
    """Photos (n h w 3) through `encode` to (n v c h' w'); v is 2 with mirrored twins, else 1."""
    variants = [photos, photos.flip(2)] if mirror else [photos]
    return torch.stack([encode(variant) for variant in variants], dim=1)


def _rgb(photo: Tensor) -> Tensor:
    return photo[..., :3] if photo.shape[-1] >= 3 else photo[..., :1].expand(-1, -1, 3)


def _square(photo: Tensor, side: int) -> Tensor:
    height, width, _ = photo.shape
    crop = min(height, width)
    top, left = (height - crop) // 2, (width - crop) // 2
    middle = photo[None, top:top + crop, left:left + crop].permute(0, 3, 1, 2).float()  # (1 3 crop crop)
    resized = interpolate(middle, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return resized[0].permute(1, 2, 0)  # (side side 3)
