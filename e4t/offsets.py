"""Weight offsets of a domain (E4T, arXiv 2302.12228): W' = W ⊙ (1 + α Δ), pure maths on tensors.

Δ = left @ right has rank 3 at most, which is exactly what the published parametrisation can express.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 3


@dataclass(frozen=True, eq=False)
class Offset:
    """The factors of Δ for one matrix W (out in): `left` (out r) and `right` (r in)."""

    left: Tensor
    right: Tensor


def new_offsets(shapes: Mapping[str, tuple[int, int]], seed: int) -> dict[str, Offset]:
    """Offsets by layer for matrices (out in) that change nothing yet: `left` is zero, `right` random of unit size."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: Offset(torch.zeros(out, RANK), torch.randn(RANK, given, generator=generator) / RANK**0.5)
            for layer, (out, given) in shapes.items()}


def offset_weight(weight: Tensor, offset: Offset, strength: float = 1.0) -> Tensor:
    """W ⊙ (1 + strength · left @ right) (out in), in the offset's precision and on its device."""
    return weight.to(offset.left) * (1 + strength * (offset.left @ offset.right))


def penalty(offsets: Mapping[str, Offset]) -> Tensor:
    """The mean over layers of Δ's mean square, found from the factors without making Δ."""
    squares = [((o.left.T @ o.left) * (o.right @ o.right.T)).sum() / (len(o.left) * o.right.shape[1])
               for o in offsets.values()]
    return torch.stack(squares).mean()
