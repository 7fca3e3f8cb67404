"""Giving a model the edits of concepts, while it samples or trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import einsum
from torch import Tensor, nn

from ..textual_inversion.concept import Unchanging
from .concept import Edit
from .edit import change, components, gate, gate_of_kin, similarity, withheld

BIAS, TEMPERATURE = 0.8, 0.1
KEYS, VALUES = 0, 1
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
        self.known: list[tuple[Tensor, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]] = []
        self.seen: list[Tensor] = []
        self.only: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        if encodings is not None:
            self.only = self._amounts(encodings)

    def most(self) -> Tensor:
        """The highest similarity of a token to each concept, over all prompts (j)."""
        return torch.stack(self.seen).amax(0) if self.seen else torch.zeros(len(self.edits))

    def keys(self, name: str, forward: Callable, encodings: Tensor) -> Tensor:
        """Locked keys: o*_K = W_K·(super-category), whatever the model's weights are now."""
        trained = [keys.get(name) for keys in self.trained_keys]
        if all(key is None for key in trained):
            return self._edited(forward, encodings, lambda own: own, KEYS)
        return self._edited(forward, encodings, lambda own: torch.stack(
            [o if key is None else key.to(o) for o, key in zip(own, trained, strict=True)]), KEYS)

    def values(self, name: str, forward: Callable, encodings: Tensor) -> Tensor:
        """o*_V, from the super-category's own values at strength 0 to those learned at 1."""
        return self._edited(
            forward, encodings, lambda own: torch.lerp(own, self.learned[name], self.strength[:, None]), VALUES
        )

    def _edited(self, forward: Callable, encodings: Tensor, learned: Callable[[Tensor], Tensor],
                kind: int) -> Tensor:
        """W e + Δh, where `learned` makes o* (j d_l) of W·(super-category)."""
        h = forward(encodings)
        if encodings.shape[-1] != len(self.edits[0].dual):
            return h
        c, gates = self._amounts(encodings)[kind]
        inputs, own = self._through(forward, encodings)
        return h + change(c, gates, inputs, torch.cat([learned(own), own])).to(h)

    def _amounts(self, encodings: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """For keys and for values: components (b n j) of encodings (b n d), and what o* and the super-category get of
        each concept (b n 2j): the gates, and what these withhold."""
        if self.only is not None:
            return self.only
        if not self.known:
            self._move(encodings.device)
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
            c, gates = c * self.acting, torch.cat([g, given_back * ~self.everywhere], -1) * self.acting.repeat(2)
            keys = c * self.key_strength, gates * self.key_strength.repeat(2)
            amounts = keys, (c, gates)
            self.known.append((encodings, amounts))
        return amounts

    def _own(self, s: Tensor) -> Tensor:
        """Whether a token may be a concept's own, not that of another concept of its class, from s to as much (b n j).

        Told by <i, e> / |i|, which a concept's length does not change and which is greatest for e = i.
        """
        held = s * einsum(self.inputs, self.dual, "j d, j d -> j").sqrt()
        return held >= (1 - SIBLING) * held.amax(-1, keepdim=True)

    def _through(self, forward: Callable, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """W i* and W·(super-category) (j d_l), fp32, with all that LoRAs and quantisation make of W."""
        return forward(self.vectors.to(encodings.dtype))[0].float().chunk(2)

    def _move(self, device: torch.device) -> None:
        """Brings everything to the device, each kind in one piece."""
        edits, learned = [a.edit for a in self.edits], self.learned_values
        self.inputs = torch.stack([edit.target_input for edit in edits]).to(device)
        self.vectors = torch.cat([self.inputs, torch.stack([edit.super_input for edit in edits]).to(device)])[None]
        self.dual = torch.stack([a.dual for a in self.edits]).to(device)
        values = torch.stack([torch.cat([own[name] for name in self.layers]) for own in learned]).to(device)
        sizes = [len(learned[0][name]) for name in self.layers]
        self.learned = dict(zip(self.layers, values.split(sizes, 1), strict=True))
        self.bias, self.temperature, self.presence, self.strength, self.key_strength, self.acting = torch.tensor([
            [a.bias, a.temperature, a.presence, a.strength, a.key_strength, a.acting] for a in self.edits
        ]).T.to(device)
        self.everywhere = torch.tensor([a.everywhere for a in self.edits], device=device)
