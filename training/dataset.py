"""Photos of any size to latents of one size, computed once before the first step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

STRIDE = 64  # eight pixels per latent cell times the UNet's three halvings
SMALLEST = 32
SMALLEST_CROP = 0.75  # of the short side


@dataclass(frozen=True)
class Photo:
    """One photo (h w 3) in 0..1, where its subject is (h w) if known, and its caption, which may be empty."""

    picture: Tensor
    mask: Tensor | None = None
    caption: str = ""


@dataclass(frozen=True)
class Lessons:
    """What a method trains on: latents (n v c h w) of n photos in v views, the loss weight of each place
    (n v 1 h w) if masks are known, the caption of each photo, and which have no mask beside others that have one."""

    latents: Tensor
    weights: Tensor | None
    captions: tuple[str, ...]
    unmasked: tuple[int, ...] = ()


def gather(images: Sequence[Tensor], masks: Sequence[Tensor] = (), captions: Sequence[str] = ()) -> list[Photo]:
    """Photos out of IMAGE batches (b h w c), MASK batches (b h w), 1 on the subject, and captions.

    Grey is spread to RGB; alpha becomes the mask where none is given. A mask that is the same everywhere counts as
    none: loaders give such masks for photos that have none. Raises ValueError that names the photo and what is wrong
    with it.
    """
    pictures = [picture for batch in images for picture in batch]
    single_masks = [mask for batch in masks for mask in batch.reshape(-1, *batch.shape[-2:])]
    if not pictures:
        raise ValueError("There are no images to learn from; connect at least one photo.")
    for what, given in (("masks", single_masks), ("captions", captions)):
        if given and len(given) != len(pictures):
            raise ValueError(f"The number of {what} ({len(given)}) is not that of the images ({len(pictures)}); give "
                             "one for each, or none.")
    single_masks, captions = single_masks or [None] * len(pictures), captions or [""] * len(pictures)
    return [_photo(number, *parts)
            for number, parts in enumerate(zip(pictures, single_masks, captions, strict=True), 1)]


def telling(mask: Tensor | None) -> Tensor | None:
    """A mask, unless it is the same everywhere and so says nothing of where the subject is."""
    return None if mask is None or bool(mask.min() == mask.max()) else mask


def working_side(photos: Sequence[Photo], asked: int, largest: int) -> int:
    """The side of the training square in pixels: `asked`, or for 0 the photos' own size up to `largest`."""
    own = int(median(min(photo.picture.shape[:2]) for photo in photos))
    side = asked or min(own, largest)
    return max(STRIDE, side // STRIDE * STRIDE)


def squares(photos: Sequence[Photo], side: int, crops: int = 0, mirror: bool = False, seed: int = 0) -> Iterator[Photo]:
    """Every view of every photo as a square of the working size, those of a photo side by side.

    The first view is the largest square, in the middle or around the mask; `crops` random smaller ones follow, which
    hold the mask's centre, then with `mirror` the mirrored twins of all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    for photo in photos:
        own = [_cut(photo, *box, side) for box in _boxes(photo, crops, generator)]
        yield from own
        if mirror:
            yield from map(_mirrored, own)


def cache(encode: Callable[[Tensor], Tensor], views: Iterable[Photo], photos: int, floor: float) -> Lessons:
    """Squares of `photos` photos, as `squares` gives them, each through `encode` (1 h w 3) -> (1 c h w).

    Outside its mask a photo counts with the weight `floor`. No view is held once it is encoded.
    """
    latents, weights, captions, masked = [], [], [], []
    for view in views:
        latents.append(encode(view.picture[None]))
        mask = torch.ones(view.picture.shape[:2]) if view.mask is None else view.mask
        inside = adaptive_avg_pool2d(mask[None, None].to(latents[-1]), latents[-1].shape[-2:])
        weights.append(floor + (1 - floor) * inside)
        captions.append(view.caption)
        masked.append(view.mask is not None)
    each = len(latents) // photos
    found = torch.cat(latents).unflatten(0, (photos, -1))
    if not any(masked):
        return Lessons(found, None, tuple(captions[::each]))
    unmasked = tuple(number for number, known in enumerate(masked[::each]) if not known)
    return Lessons(found, torch.cat(weights).unflatten(0, (photos, -1)), tuple(captions[::each]), unmasked)


def weighted_mean(error: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of squared errors (b c h w) under weights (b 1 h w), each sample by its own weight's sum -> (b).

    A view that shows nothing of the subject has no weight at all with a floor of 0; its mean is 0.
    """
    if weights is None:
        return error.flatten(1).mean(1)
    return (error.mean(1, keepdim=True) * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1e-6)


def _photo(number: int, picture: Tensor, mask: Tensor | None, caption: str) -> Photo:
    height, width, channels = picture.shape
    if min(height, width) < SMALLEST:
        raise ValueError(f"Image {number} is {width}×{height} pixels; at least {SMALLEST} a side are needed.")
    if not bool(picture.isfinite().all()):
        raise ValueError(f"Image {number} holds values that are not numbers.")
    if mask is not None and not bool(mask.isfinite().all()):
        raise ValueError(f"Mask {number} holds values that are not numbers.")
    mask = telling(mask)
    if mask is None and channels == 4:
        mask = telling(picture[..., 3])
    if mask is not None and mask.shape != (height, width):
        raise ValueError(f"Mask {number} is {mask.shape[1]}×{mask.shape[0]} pixels, image {number} {width}×{height}; "
                         "they must be of one size.")
    rgb = picture[..., :3] if channels >= 3 else picture[..., :1].expand(-1, -1, 3)
    return Photo(rgb, mask, caption.strip())


def _boxes(photo: Photo, crops: int, generator: torch.Generator) -> Iterator[tuple[int, int, int]]:
    """Top, left and side of each square to cut out."""
    height, width, _ = photo.picture.shape
    short = min(height, width)
    centre = None if photo.mask is None else _centre(photo.mask)
    middle = centre or (height / 2, width / 2)
    yield (_start(middle[0], short, height), _start(middle[1], short, width), short)
    for scale, *share in torch.rand(crops, 3, generator=generator).tolist():
        crop = max(1, round(short * (SMALLEST_CROP + (1 - SMALLEST_CROP) * scale)))
        top, left = (round(of * (length - crop)) for of, length in zip(share, (height, width), strict=True))
        if centre:
            top, left = (_over(start, at, crop) for start, at in zip((top, left), centre, strict=True))
        yield (top, left, crop)


def _centre(mask: Tensor) -> list[float]:
    """Row and column of the middle of the subject; segmentations often give what is not subject a little too."""
    return (mask >= mask.max() / 2).nonzero().float().mean(0).tolist()


def _start(centre: float, crop: int, length: int) -> int:
    return min(max(0, round(centre - crop / 2)), length - crop)


def _over(start: int, centre: float, crop: int) -> int:
    """The nearest start of a crop that holds the subject's centre."""
    return min(max(start, int(centre) + 1 - crop), int(centre))


def _cut(photo: Photo, top: int, left: int, crop: int, side: int) -> Photo:
    def cut(picture: Tensor) -> Tensor:
        part = picture[None, top:top + crop, left:left + crop].permute(0, 3, 1, 2).float()  # (1 c crop crop)
        resized = interpolate(part, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return resized[0].permute(1, 2, 0)  # (side side c)

    mask = None if photo.mask is None else cut(photo.mask[..., None])[..., 0]
    return Photo(cut(photo.picture), mask, photo.caption)


def _mirrored(photo: Photo) -> Photo:
    return Photo(photo.picture.flip(1), None if photo.mask is None else photo.mask.flip(1), photo.caption)
