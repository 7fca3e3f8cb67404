"""What tuning the whole model on a picture changes, kept small: pure maths on tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from ..textual_inversion.concept import Unchanging
from .offsets import Offset, offset_weight


@dataclass(frozen=True, eq=False)
class LowRank:
    """The factors of what is added to one matrix W (out in): `up` (out r) and `down` (r in)."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True, eq=False)
class Difference(Unchanging):
    """W' = W ⊙ (1 + Δ) + up @ down of attention matrices, by layer; all tensors fp32 on the CPU."""

    offsets: Mapping[str, Offset]
    added: Mapping[str, LowRank] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", MappingProxyType(dict(self.offsets)))
        object.__setattr__(self, "added", MappingProxyType(dict(self.added)))


def is_same(one: Difference, other: Difference) -> bool:
    """Whether two differences are one, read twice."""

    def factors(difference: Difference) -> dict[tuple[str, str], Tensor]:
        return {(layer, name): factor for part in (difference.offsets, difference.added)
                for layer, pair in part.items() for name, factor in vars(pair).items()}

    mine, others = factors(one), factors(other)
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


def nothing_added(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, LowRank]:
    """Factors by layer for matrices (out in) that add nothing yet: `up` is zero, `down` random as in LoRA."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: LowRank(torch.zeros(out, rank), torch.randn(rank, given, generator=generator) / given**0.5)
            for layer, (out, given) in shapes.items()}


def scaled(difference: Difference, share: float) -> Difference:
    """`share` of a difference, as values of its own."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().clone()

    return Difference({layer: Offset(share * own(o.left), own(o.right)) for layer, o in difference.offsets.items()},
                      {layer: LowRank(share * own(f.up), own(f.down)) for layer, f in difference.added.items()})


def changed_weight(weight: Tensor, offset: Offset | None, added: LowRank | None) -> Tensor:
    """W' (out in) for one matrix, in the factors' precision and on their device."""
    if offset is not None:
        weight = offset_weight(weight, offset)
    return weight if added is None else weight.to(added.up) + added.up @ added.down
