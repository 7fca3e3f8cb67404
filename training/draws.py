"""Every random choice of a training step as a function of (seed, step), so that any step can be made again."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step's material: `latents` and `noise` (b c h w), `timesteps` (b), the `photos` and `views` (b) they are of.

    `lot` is a random number for a choice of the method's own, such as a sentence.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    photos: Tensor
    views: Tensor
    lot: int

    def parts(self, size: int) -> Iterator["Batch"]:
        """The batch in pieces of at most `size` samples."""
        for pieces in zip(*(t.split(size) for t in (self.latents, self.noise, self.timesteps, self.photos, self.views)),
                          strict=True):
            yield Batch(*pieces, self.lot)


def draw(latents: Tensor, levels: int, batch_size: int, seed: int, step: int) -> Batch:
    """Draws step `step` of the run `seed` from cached `latents` (n v c h w), where v are views of a photo.

    Photos come in shuffled rounds, each once per round. One noise level is drawn from each of `batch_size` equal
    parts of the `levels`, which keeps every level equally likely and the loss of a batch steadier.
    """
    generator = seeded(seed, "step", step)
    photos = _photos(len(latents), batch_size, seed, step)
    views = torch.randint(latents.shape[1], (batch_size,), generator=generator)
    strata = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
    noise = torch.randn(batch_size, *latents.shape[2:], generator=generator)
    lot = int(torch.randint(2**31, (1,), generator=generator))
    where = latents.device
    return Batch(
        latents=latents[photos.to(where), views.to(where)],
        noise=noise.to(where),
        timesteps=(strata * levels).long().clamp(max=levels - 1).to(where),
        photos=photos,
        views=views,
        lot=lot,
    )


def _photos(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    places = range(step * batch_size, (step + 1) * batch_size)
    rounds = {place // count: None for place in places}
    orders = {r: torch.randperm(count, generator=seeded(seed, "round", r)) for r in rounds}
    return torch.stack([orders[place // count][place % count] for place in places])


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """The generator of one purpose at one step of a run."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
