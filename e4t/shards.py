"""Encoded subjects on disk, written as they are made; a step reads what it draws, however many there are."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..training.disk import read_safetensors, write_whole

SUBJECTS = 64  # in a file
log = logging.getLogger("concepts")


@dataclass(frozen=True, eq=False)
class Sharded:
    """A tensor (n v ...) that stays in files, where it is called `name`: the file and row of each subject, and the
    shape (v ...) of one.

    A slice of subjects stays there too. Indexed with two tensors, subjects and views, it reads those from files that
    are open for no longer. Raises ValueError that names a file which cannot be read.
    """

    name: str
    places: Sequence[tuple[Path, int]]
    one: tuple[int, ...]
    device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.places), *self.one)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: slice | tuple[Tensor, Tensor]) -> "Sharded | Tensor":
        if isinstance(at, slice):
            return replace(self, places=self.places[at])
        subjects, views = torch.broadcast_tensors(*at)
        found = [self._view(subject, view)
                 for subject, view in zip(subjects.flatten().tolist(), views.flatten().tolist(), strict=True)]
        return torch.stack(found).unflatten(0, subjects.shape)

    def _view(self, subject: int, view: int) -> Tensor:
        path, row = self.places[subject]
        return read_safetensors(path, re.compile(self.name))[1][self.name][row, view]  # mapped, not read whole


def shard(folder: Path, count: int,
          encode: Callable[[range], tuple[dict[str, Tensor], dict[str, str]]]) -> tuple[dict[str, Sharded], int]:
    """What `encode` makes of `count` subjects, some at a time, and how many of their pictures could not be read.

    `encode` gives tensors (n ...), all with the n subjects that have pictures, and how many are `unreadable`. Files
    that are whole are not made again. Raises ValueError when the disk refuses.
    """
    starts = range(0, count, SUBJECTS)
    places, shapes, unreadable = [], {}, 0
    for number, start in enumerate(starts, 1):
        path, stop = folder / f"{number:05d}-of-{len(starts):05d}.safetensors", min(start + SUBJECTS, count)
        try:
            metadata, tensors = read_safetensors(path)
        except ValueError:
            tensors, metadata = encode(range(start, stop))
            write_whole(path, save(tensors, metadata))
            log.info("Read %d of %d subjects into %s", stop, count, folder)
        unreadable += int(metadata["unreadable"])
        shapes |= {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
        places += [(path, row) for row in range(max(map(len, tensors.values()), default=0))]
    return {name: Sharded(name, places, shape) for name, shape in shapes.items()}, unreadable
