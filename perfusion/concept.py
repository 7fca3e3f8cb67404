"""What Perfusion learns besides the word."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from ..textual_inversion.concept import Unchanging
from .edit import dual_of


@dataclass(frozen=True, eq=False)
class Edit(Unchanging):
    """The gated rank-1 edit of one concept; all tensors fp32 on the CPU.

    `target_input` i* and `super_input` (d) are encodings of the concept's and the super-category's token. `values`
    holds o*_V (d_l) for each cross-attention layer, by its name in the UNet (`input_blocks.1.1.transformer_blocks.0`).
    `keys` holds o*_K likewise where keys were trained; locked keys are W_K·super_input and kept nowhere.
    A prompt holds the concept when some token's similarity to i* reaches `presence`.
    `encoder` is the fingerprint of the text encoder whose covariance the similarity is measured with. Where that was
    measured on captions of the user's own, `dual` holds C⁻¹ i* (d), since nobody else could measure it again.
    """

    target_input: Tensor
    super_input: Tensor
    values: Mapping[str, Tensor]
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    presence: float = 0.6
    encoder: str = ""
    dual: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))
        object.__setattr__(self, "keys", MappingProxyType(dict(self.keys)))

    def dual_under(self, precision: Tensor | None) -> Tensor:
        """C⁻¹ i* (d) in double precision, the concept's own or under the precision C⁻¹ (d d) of its text encoder, which
        only a concept without its own needs."""
        return dual_of(self.target_input[None], precision)[0] if self.dual is None else self.dual.double()


def is_same(one: Edit, other: Edit) -> bool:
    """Whether two edits are one, read twice."""
    return torch.equal(one.target_input, other.target_input) and one.values.keys() == other.values.keys() and all(
        torch.equal(value, other.values[layer]) for layer, value in one.values.items())
