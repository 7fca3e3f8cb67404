"""Relative changes of the attention matrices: as the host's own kind of patch, beside LoRAs, and while training."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from comfy.model_management import cast_to_device
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter.base import WeightAdapterBase
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor
from torch.nn.functional import linear

from .cross_attention import transformer_blocks

PARTS = ("to_q", "to_k", "to_v")
ALL_PARTS = (*PARTS, "to_out.0")


class Offset(Protocol):
    """Factors of the relative change Δ = left @ right of one matrix (out in): `left` (out r), `right` (r in)."""

    left: Tensor
    right: Tensor


class LowRank(Protocol):
    """Factors of what is added to one matrix (out in): `up` (out r), `down` (r in)."""

    up: Tensor
    down: Tensor


class OffsetAdapter(WeightAdapterBase):
    """W ⊙ (1 + strength · Δ), as the host applies its own adapters."""

    name = "offset"

    def __init__(self, loaded_keys: set[str], weights: tuple[Tensor, Tensor]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(self, weight, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None):
        left, right = (cast_to_device(factor, weight.device, intermediate_dtype) for factor in self.weights)
        weight += function((strength * (left @ right) * weight.to(intermediate_dtype)).to(weight.dtype))
        return weight


def attention_matrices(unet: torch.nn.Module, parts: Sequence[str] = PARTS) -> dict[str, torch.nn.Module]:
    """The linear layers q, k and v of self- and cross-attention in every transformer block, by their name in the UNet.

    Of `parts`, `to_out.0` in `ALL_PARTS` is the layer after attention.
    """
    return {f"{name}.{attention}.{part}": getattr(block, attention).get_submodule(part)
            for name, block in transformer_blocks(unet)
            for attention in ("attn1", "attn2") if getattr(block, attention) is not None for part in parts}


def matrix_shapes(model: ModelPatcher, parts: Sequence[str] = PARTS) -> dict[str, tuple[int, int]]:
    """Numbers out and in of each attention matrix, by its name."""
    matrices = attention_matrices(model.model.diffusion_model, parts)
    return {name: (layer.out_features, layer.in_features) for name, layer in matrices.items()}


def with_offsets(model: ModelPatcher, offsets: Mapping[str, Offset], strength: float) -> ModelPatcher:
    """A clone of `model` whose matrices are changed before LoRAs add to them, in whichever order the two are given.

    What a merge added before counts as part of the matrices; it is a patch with a list.
    """
    patched = model.clone()
    patches = {f"diffusion_model.{layer}.weight": OffsetAdapter({layer}, (offset.left, offset.right))
               for layer, offset in offsets.items()}
    patched.add_patches(patches, strength)
    for key in patches:
        *others, own = patched.patches[key]
        merged = max((place for place, patch in enumerate(others, 1) if isinstance(patch[1], list)), default=0)
        patched.patches[key] = [*others[:merged], own, *others[merged:]]
    return patched


def with_added(model: ModelPatcher, added: Mapping[str, LowRank], strength: float) -> ModelPatcher:
    """A clone of `model` to whose matrices strength · up @ down is added, as a LoRA is."""
    patched = model.clone()
    patched.add_patches({f"diffusion_model.{layer}.weight": LoRAAdapter(
        {layer}, (factors.up, factors.down, None, None, None, None)) for layer, factors in added.items()}, strength)
    return patched


def offset_layers(
    unet: torch.nn.Module, changed: Callable[[str, Tensor], Tensor], parts: Sequence[str] = PARTS
) -> dict[torch.nn.Module, Callable]:
    """What `host.cross_attention.overridden` takes so that layers compute with `changed(name, weight)` (out in).

    It is asked in the layer itself, so that gradient checkpointing keeps no changed matrices either.
    """

    def through(name: str, layer: torch.nn.Module, forward: Callable, x: Tensor) -> Tensor:
        own = layer.weight
        for patch in getattr(layer, "weight_function", ()):  # LoRAs that the host adds in each call with --novram
            own = patch(own.to(x.device, copy=True))
        weight = changed(name, own)
        if weight is own:
            return forward(x)
        return linear(x, weight.to(x), None if layer.bias is None else layer.bias.to(x))

    return {layer: partial(through, name, layer) for name, layer in attention_matrices(unet, parts).items()}
