"""Giving a model the edits of concepts, while it samples or trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .concept import Edit
from .edit import change, components, dual_of, gate, similarity

BIAS, TEMPERATURE = 0.75, 0.15


@dataclass(frozen=True, eq=False)
class Applied:
    """An edit as it acts on a model.

    `dual` (d) is C⁻¹ i*. `bias` β and `temperature` τ shape the gate. At `strength` 0 the concept's values are those
    of its super-category, at 1 those learned; `key_strength` scales the whole edit of the keys. `start` and `end` are
    shares of the sampling. `everywhere` also edits prompts without the concept, as in the paper.
    """

    edit: Edit
    dual: Tensor
    placeholder: str
    bias: float = BIAS
    temperature: float = TEMPERATURE
    strength: float = 1.0
    key_strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    everywhere: bool = False


def applied(edit: Edit, precision: Tensor, placeholder: str, **settings) -> Applied:
    """An edit ready for models whose text encoder has the precision C⁻¹ (d d)."""
    return Applied(edit, dual_of(edit.target_input[None], precision)[0].float(), placeholder, **settings)


def overrides(
    attentions: Mapping[str, nn.Module], edits: Sequence[Applied]
) -> tuple[dict[nn.Module, Callable], Callable[[], Tensor]]:
    """What the key and value layers compute instead under `edits` during one call, for `host.cross_attention`."""
    if not edits:
        return {}, lambda: torch.zeros(0, dtype=torch.bool)
    call = Call(list(attentions), edits)
    layers: dict[nn.Module, Callable] = {}
    for name, attention in attentions.items():
        layers[attention.to_k] = partial(call.keys, name)
        layers[attention.to_v] = partial(call.values, name)
    return layers, call.met


class Call:
    """One call of the UNet. All layers receive the same encodings, so gates are computed once for them."""

    def __init__(self, layers: Sequence[str], edits: Sequence[Applied], encodings: Tensor | None = None) -> None:
        """With `encodings` (b n d) every layer is taken to receive these, as in training."""
        self.layers, self.edits = layers, edits
        self.known: dict[int, tuple[Tensor, ...]] = {}
        self.seen: list[Tensor] = []
        self.only: tuple[Tensor, Tensor] | None = None
        if encodings is not None:
            self.only = self._amounts(encodings)

    def met(self) -> Tensor:
        """Which concepts occurred in any prompt (j)."""
        return torch.stack(self.seen).any(0) if self.seen else torch.zeros(len(self.edits), dtype=torch.bool)

    def keys(self, name: str, forward: Callable, encodings: Tensor) -> Tensor:
        """Locked keys: o*_K = W_K·(super-category), whatever the model's weights are now."""
        h = forward(encodings)
        if encodings.shape[-1] != len(self.edits[0].dual):
            return h
        c, g = self._amounts(encodings)
        inputs, outputs = self._through(forward, encodings)
        if any(name in a.edit.keys for a in self.edits):
            outputs = torch.stack([a.edit.keys.get(name, o).to(o) for a, o in zip(self.edits, outputs, strict=True)])
        return h + change(c * self.key_strength, g * self.key_strength, inputs, outputs).to(h)

    def values(self, name: str, forward: Callable, encodings: Tensor) -> Tensor:
        h = forward(encodings)
        if encodings.shape[-1] != len(self.edits[0].dual):
            return h
        c, g = self._amounts(encodings)
        inputs, outputs = self._through(forward, encodings)
        return h + change(c, g, inputs, torch.lerp(outputs, self.learned[name], self.strength[:, None])).to(h)

    def _amounts(self, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """Components and gates (b n j) of encodings (b n d)."""
        if self.only is not None:
            return self.only
        if not self.known:
            self._move(encodings.device)
        if id(encodings) not in self.known:
            s = similarity(encodings.float(), self.inputs, self.dual)
            present = s.amax(1, keepdim=True) >= self.presence
            c = components(s, self.inputs, self.dual, present.expand_as(s))
            self.seen.append(present.flatten(0, 1).any(0))
            self.known[id(encodings)] = encodings, c, gate(s, self.bias, self.temperature) * present
        return self.known[id(encodings)][1:]

    def _through(self, forward: Callable, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """W i* and W·(super-category) (j d_l), fp32, with all that LoRAs and quantisation make of W."""
        return forward(self.vectors.to(encodings.dtype))[0].float().chunk(2)

    def _move(self, device: torch.device) -> None:
        """Brings everything to the device, each kind in one piece."""
        edits = [a.edit for a in self.edits]
        self.inputs = torch.stack([edit.target_input for edit in edits]).to(device)
        self.vectors = torch.cat([self.inputs, torch.stack([edit.super_input for edit in edits]).to(device)])[None]
        self.dual = torch.stack([a.dual for a in self.edits]).to(device)
        values = torch.stack([torch.cat([edit.values[name] for name in self.layers]) for edit in edits]).to(device)
        sizes = [len(edits[0].values[name]) for name in self.layers]
        self.learned = dict(zip(self.layers, values.split(sizes, 1), strict=True))
        self.bias, self.temperature, self.presence, self.strength, self.key_strength = torch.tensor([
            [a.bias, a.temperature, float("-inf") if a.everywhere else a.edit.presence, a.strength, a.key_strength]
            for a in self.edits
        ]).T.to(device)
