"""Giving a model the edits of concepts, while it samples or trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import einsum
from torch import Tensor, nn

from ..textual_inversion.concept import Unchanging
from .concept import Edit
from .edit import components, gate, gate_of_kin, similarity, withheld

BIAS, TEMPERATURE = 0.8, 0.1
LOCKED, KEYS, VALUES = 0, 1, 2
SIBLING = 0.05  # by this share may a concept's own token hold more of another concept


@dataclass(frozen=True, eq=False)
class Applied(Unchanging):
    """An edit as it acts on a model.

    `dual` (d) is C⁻¹ i*. `bias` β and `temperature` τ shape the gate. At `strength` 0 the concept's values are those
    of its super-category, at 1 those learned; `key_strength` scales the whole edit of the keys. `start` and `end` are
    shares of the sampling.

    A token that has only read of the concept gives nothing of it (`gate_of_kin`), and what the gate withholds of a
    concept stays what it is or becomes the super-category (`withheld`), so that a high bias draws that instead of
    erasing it. Where a prompt has several concepts, a token gives no more of each than it holds of it, or two of one
    class, of which a token holds much the same, would come out on top of each other. `everywhere` is equation 3 to the
    letter instead: none of these, and also in prompts without the concept. One that is not `acting` leaves its own word
    as it is and still keeps others of its class off it.
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
    acting: bool = True

    @property
    def presence(self) -> float:
        """The similarity to i* that some token of a prompt must reach."""
        return float("-inf") if self.everywhere else self.edit.presence


def applied(edit: Edit, precision: Tensor | None, placeholder: str, **settings) -> Applied:
    """An edit ready for models whose text encoder has the precision C⁻¹ (d d), as `Edit.dual_under` takes it."""
    return Applied(edit, edit.dual_under(precision).float(), placeholder, **settings)


def overrides(
    attentions: Mapping[str, nn.Module], edits: Sequence[Applied]
) -> tuple[dict[nn.Module, Callable], Callable[[], Tensor]]:
    """What the key and value layers compute instead under `edits` during one call, for `host.cross_attention`."""
    if not any(edit.acting for edit in edits):
        return {}, lambda: torch.zeros(len(edits))
    call = Call(list(attentions), edits)
    layers: dict[nn.Module, Callable] = {}
    for name, attention in attentions.items():
        layers[attention.to_k] = partial(call.keys, name)
        layers[attention.to_v] = partial(call.values, name)
    return layers, call.most


class Call:
    """One call of the UNet. All layers receive the same encodings, so gates are computed once for them."""

    def __init__(self, layers: Sequence[str], edits: Sequence[Applied], encodings: Tensor | None = None) -> None:
        """With `encodings` (b n d) every layer is taken to receive these, as in training."""
        self.layers, self.edits = layers, edits
        self.trained_keys = [dict(a.edit.keys) for a in edits]  # torch.compile cannot read the edit's own mappings
        self.learned_values = [dict(a.edit.values) for a in edits]
        self.known: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        self.seen: list[Tensor] = []
        self.only: tuple[Tensor, ...] | None = None
        if encodings is not None:
            self.only = self._amounts(encodings)

    def most(self) -> Tensor:
        """The highest similarity of a token to each concept, over all prompts (j)."""
        return torch.stack(self.seen).amax(0) if self.seen else torch.zeros(len(self.edits))

    def keys(self, name: str, forward: Callable, encodings: Tensor) -> Tensor:
        """Locked keys: o*_K = W_K·(super-category), whatever the model's weights are now."""
        trained = [keys.get(name) for keys in self.trained_keys]
        if all(key is None for key in trained):
            return self._edited(forward, encodings, LOCKED)
        return self._edited(forward, encodings, KEYS, lambda own: torch.stack(
            [o if key is None else key.to(o) for o, key in zip(own, trained, strict=True)]))

    def values(self, name: str, forward: Callable, encodings: Tensor) -> Tensor:
        """o*_V, from the super-category's own values at strength 0 to those learned at 1."""
        return self._edited(forward, encodings, VALUES, lambda own: self.learned[name])

    def _edited(self, forward: Callable, encodings: Tensor, kind: int,
                learned: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """W e + Δh with Δh = Σ_j g_j o*_j - c_j W i*_j (equation 3), W with all that LoRAs and quantisation make of it.

        `learned` makes o* (j d_l) of W·(super-category); without it that is o*.
        """
        h = forward(encodings)
        if encodings.shape[-1] != len(self.edits[0].dual):
            return h
        shares = self._amounts(encodings)[kind]
        outputs = forward(self.vectors.to(encodings))[0].float()
        if learned is not None:
            outputs = torch.cat([learned(outputs[:len(self.edits)]), outputs])
        return h + (shares @ outputs).to(h)

    def _amounts(self, encodings: Tensor) -> tuple[Tensor, ...]:
        """For locked keys, trained keys and values: how much of o*, of W·(super-category) and of W i* each token of
        encodings (b n d) gets of each concept (b n 3j), for locked keys, where the first two are one, (b n 2j)."""
        if self.only is not None:
            return self.only
        if not self.known:
            self._move(encodings)
        amounts = next((found for seen, found in self.known if seen is encodings), None)
        if amounts is None:
            s = similarity(encodings.float(), self.inputs, self.dual)
            self.seen.append(s.amax((0, 1)))
            present = ((s >= self.presence) & (self._own(s) | self.everywhere)).any(1, keepdim=True)
            c = components(s, self.inputs, self.dual, present.expand_as(s))
            published, kin = gate(s, self.bias, self.temperature), gate_of_kin(s, self.bias, self.temperature)
            shared = present.sum(-1, keepdim=True) > 1
            kin = torch.where(shared, torch.minimum(kin, c.clamp(min=0)), kin)
            g = torch.where(self.everywhere, published, kin) * present
            opened = gate_of_kin(torch.ones_like(self.bias), self.bias, self.temperature)
            untouched, given_back = withheld(c, g, opened)
            c = c - untouched * ~self.everywhere
            g, given, out = g * self.acting, given_back * ~self.everywhere * self.acting, -c * self.acting
            amounts = (torch.cat([g + given, out], -1) * self.key_strength.repeat(2),
                       torch.cat([g, given, out], -1) * self.key_strength.repeat(3),
                       torch.cat([g * self.strength, g * (1 - self.strength) + given, out], -1))
            self.known.append((encodings, amounts))
        return amounts

    def _own(self, s: Tensor) -> Tensor:
        """Whether a token may be a concept's own, not that of another concept of its class, from s to as much (b n j).

        Told by <i, e> / |i|, which a concept's length does not change and which is greatest for e = i.
        """
        held = s * einsum(self.inputs, self.dual, "j d, j d -> j").sqrt()
        return held >= (1 - SIBLING) * held.amax(-1, keepdim=True)

    def _move(self, encodings: Tensor) -> None:
        """Brings everything to the device of the encodings, each kind in one piece."""
        device = encodings.device
        edits, learned = [a.edit for a in self.edits], self.learned_values
        self.inputs = torch.stack([edit.target_input for edit in edits]).to(device)
        super_inputs = torch.stack([edit.super_input for edit in edits]).to(device)
        self.vectors = torch.cat([super_inputs, self.inputs])[None].to(encodings)
        self.dual = torch.stack([a.dual for a in self.edits]).to(device)
        values = torch.stack([torch.cat([own[name] for name in self.layers]) for own in learned]).to(device)
        sizes = [len(learned[0][name]) for name in self.layers]
        self.learned = dict(zip(self.layers, values.split(sizes, 1), strict=True))
        self.bias, self.temperature, self.presence, self.strength, self.key_strength, self.acting = torch.tensor([
            [a.bias, a.temperature, a.presence, a.strength, a.key_strength, a.acting] for a in self.edits
        ]).T.to(device)
        self.everywhere = torch.tensor([a.everywhere for a in self.edits], device=device)
