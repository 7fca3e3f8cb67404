"""What a domain is learned from: pictures of its subjects, each subject in several views, encoded once."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..training.dataset import Photo, squares
from ..training.draws import Batch, draw, seeded
from ..training.folder import ALL, ENDINGS, fingerprint, own_pictures, read_photo
from .encoder import Vision, to_shown
from .shards import Sharded, shard

log = logging.getLogger("concepts")


@dataclass(frozen=True, eq=False)
class Samples:
    """n subjects in v views: `pictures` as the encoder sees them, which is (n v h w 3) uint8 or CLIP vision's CLS
    tokens (n v l d) fp16, `latents` (n v c h w) fp16 as the UNet does, and the `weights` (n v 1 h w) fp16 of each place
    in the loss; how many pictures could not be used, the fingerprint of the CLIP vision, if there is one, and the
    digest of the folder they were read from and of how."""

    pictures: Tensor | Sharded
    latents: Tensor | Sharded
    weights: Tensor | Sharded
    unreadable: int = 0
    vision: str = ""
    source: str = ""

    def part(self, first: int, last: int) -> "Samples":
        """The subjects from `first` up to `last`."""
        return replace(self, pictures=self.pictures[first:last], latents=self.latents[first:last],
                       weights=self.weights[first:last])


@dataclass(frozen=True, eq=False)
class Pair:
    """One step's material: a batch to denoise, its loss weights (b 1 h w), and what the encoder hears of each subject:
    another view, as a picture (b h w 3) in 0..1 or CLIP vision's CLS tokens (b l d), and as a noised latent. `lots` are
    random numbers, one for each sample, for its sentence."""

    batch: Batch
    lots: tuple[int, ...]
    weights: Tensor
    pictures: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor

    def parts(self, size: int) -> Iterator["Pair"]:
        """The pair in pieces of at most `size` samples."""
        lots = (self.lots[start:start + size] for start in range(0, len(self.lots), size))
        tensors = (self.weights, self.pictures, self.latents, self.noise, self.timesteps)
        for pieces in zip(self.batch.parts(size), lots, *(t.split(size) for t in tensors), strict=True):
            yield Pair(*pieces)


def draw_pair(samples: Samples, levels: int, size: int, seed: int, step: int, rows: slice = slice(None),
              times: float = 1.0) -> Pair:
    """Draws step `step` of the run `seed`: `size` subjects, of which `rows` are given.

    Timesteps are levels · u^times for u even in 0..1: below 1 there are more of the noisy ones.
    """
    batch = draw(samples.latents, levels, size, seed, step)
    generator = seeded(seed, "shown", step)
    views = samples.latents.shape[1]
    shown = (batch.views + torch.randint(min(1, views - 1), max(2, views), (size,), generator=generator)) % views
    noise = torch.randn(batch.noise.shape, generator=generator)
    timesteps = torch.randint(levels, (size,), generator=generator)
    photos, own_views, shown = batch.photos[rows], batch.views[rows], shown[rows]
    own = Batch(batch.latents[rows].float(), batch.noise[rows], later(batch.timesteps[rows], levels, times),
                photos, own_views, batch.lot)
    lots = tuple(range(batch.lot, batch.lot + size)[rows])
    pictures = samples.pictures[photos, shown].float()
    return Pair(own, lots, samples.weights[photos, own_views].float(), pictures if samples.vision else pictures / 255,
                samples.latents[photos, shown].float(), noise[rows], timesteps[rows])


def later(timesteps: Tensor, levels: int, times: float) -> Tensor:
    """Even timesteps (b) moved towards the noisy end of the schedule."""
    return (levels * (timesteps / levels) ** times).long()


def read_samples(folder: Path, views: int, side: int, shown_side: int, mirror: bool, floor: float, seed: int,
                 encode: Callable[[Tensor], Tensor], vae: str, cache: Path, vision: Vision | None = None) -> Samples:
    """Every subject of a folder in `views` views of `side` pixels, through `encode` (b h w 3) -> (b c h w).

    A picture in the folder is a subject of its own; the pictures of a subfolder show one subject, of which the first
    `views` are taken. Where there are fewer, random crops make up for it, with `mirror` also mirrored ones. Outside
    masks, places count with the weight `floor`. The encoder is shown pictures of `shown_side` pixels, or what `vision`
    makes of them. Pictures that cannot be read are left out and counted. What was encoded stays in `cache`, where a
    reading that was stopped goes on unless something has changed, such as `vae`, the fingerprint of what encodes.
    Raises ValueError for a folder without pictures.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    seen_by = vision.fingerprint if vision else ""
    files = fingerprint(folder, ALL, ENDINGS)
    settings = f"{files} {views} {side} {seen_by or shown_side} {mirror} {floor} {seed} {vae}"
    source = hashlib.sha256(settings.encode()).hexdigest()[:16]
    subjects = list(_subjects(folder))
    if large := sum(len(paths) > views for paths in subjects):
        log.info("Subjects with more than %d pictures, of which the first %d are learned from: %d", views, views, large)

    def show(pictures: Tensor) -> Tensor:
        if vision:
            return vision.layers(pictures).half()
        return (to_shown(pictures, shown_side) * 255).round().to(torch.uint8)

    def encoded(numbers: range) -> tuple[dict[str, Tensor], dict[str, str]]:
        unreadable, parts = [], []
        for number in numbers:
            photos = list(islice(_readable(subjects[number], unreadable), views))
            if photos:
                parts.append(_encoded(photos, views, side, mirror, floor, (seed + number + 1) % 2**64, encode, show))
        tensors = {name: torch.stack([part[name] for part in parts]) for name in parts[0]} if parts else {}
        return tensors, {"unreadable": str(len(unreadable))}

    fields, unreadable = shard(cache / f"samples-{folder.resolve().name}-{source}", len(subjects), encoded)
    if not fields:
        raise ValueError(f"There are no pictures of subjects in {folder}"
                         f"{f': {unreadable} could not be used, and the log says why' if unreadable else ''}.")
    return Samples(**fields, unreadable=unreadable, vision=seen_by, source=source)


def _subjects(folder: Path) -> Iterator[list[Path]]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and (pictures := list(own_pictures(path))):
            yield pictures
    yield from ([path] for path in own_pictures(folder))


def _readable(paths: list[Path], unreadable: list[Path]) -> Iterator[Photo]:
    for path in paths:
        try:
            yield read_photo(path)
        except ValueError as error:
            log.warning("Left out: %s", error)
            unreadable.append(path)


def _encoded(photos: list[Photo], views: int, side: int, mirror: bool, floor: float, seed: int,
             encode: Callable[[Tensor], Tensor], show: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """One subject's views."""
    crops = ceil(views / (len(photos) * (1 + mirror))) - 1
    cut = list(squares(photos, side, crops, mirror, seed))
    each = len(cut) // len(photos)
    chosen = [cut[photo * each + (view + photo * mirror * each // 2) % each] for view in range(each)
              for photo in range(len(photos))][:views]  # every second photo mirrored first
    pictures = torch.stack([view.picture for view in chosen])
    masks = torch.stack([torch.ones(side, side) if view.mask is None else view.mask for view in chosen])
    latents = encode(pictures)
    weights = floor + (1 - floor) * adaptive_avg_pool2d(masks[:, None], latents.shape[-2:])
    return {"pictures": show(pictures), "latents": latents.half(), "weights": weights.half()}
