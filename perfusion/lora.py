"""A concept's edit without its gate: a rank-1 change of the key and value weights, as a LoRA file."""

import json

import safetensors.torch
import torch
from torch import Tensor

from ..host.cross_attention import cross_attentions
from ..host.loading import load
from ..host.lora_names import lora_names
from ..host.sockets import ModelPatcher
from ..textual_inversion.concept import Concept
from ..textual_inversion.file import bundled
from ..training.contents import with_metadata

KEPT = ("modelspec.base_model", "modelspec.prediction_type", "modelspec.title", "ssmd_cover_images",
        "concepts.training")


@torch.no_grad()
def to_lora(model: ModelPatcher, concept: Concept, dual: Tensor, strength: float = 1.0,
            with_word: bool = True) -> dict[str, Tensor]:
    """LoRA tensors of rank 1 (fp16), up (o* - W i*) and down M⁻¹ i* / <i*, i*>, so that W' i* = o* at strength 1.

    Without a gate the change acts on every token as far as it resembles i*. `dual` (d) is M⁻¹ i* of `linear`. W is what
    the model's layers compute, with the LoRAs on it; `with_word` bundles the word as A1111 does. Raises ValueError for
    numbers that half precision cannot hold.
    """
    (word,), edit = concept.words, concept.edit
    target = edit.target_input
    down = (dual / (dual @ target.to(dual))).float()
    balance = down.norm()  # so that neither half is small beside the other
    load(model)
    inputs = torch.stack([target, edit.super_input]).to(model.load_device, model.model.get_dtype_inference())
    tensors, keys = {}, lora_names(model)
    for name, attention in cross_attentions(model.model.diffusion_model).items():
        for layer, learned in (("to_k", edit.keys.get(name)), ("to_v", edit.values[name])):
            before, locked = getattr(attention, layer)(inputs).float().cpu()
            output = locked if learned is None else learned
            key = keys[f"diffusion_model.{name}.attn2.{layer}.weight"]
            up = (strength * balance * (output - before))[:, None].half().contiguous()
            if not bool(up.isfinite().all()):
                raise ValueError(f"{word.placeholder} cannot become a LoRA: what it changes in {name} is more than "
                                 "half precision holds; use a strength nearer 0.")
            tensors[f"{key}.lora_up.weight"] = up
            tensors[f"{key}.lora_down.weight"] = (down / balance)[None].half().contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return tensors | (bundled(word) if with_word else {})


def to_bytes(tensors: dict[str, Tensor], concept: Concept) -> bytes:
    """The LoRA file, with the concept's cover and trigger word where hosts look for them; always the same bytes."""
    kept = {name: concept.metadata[name] for name in KEPT if name in concept.metadata}
    words = json.dumps([word.placeholder for word in concept.words])
    return with_metadata(safetensors.torch.save(tensors), {
        **kept, "trained_words": words, "ss_network_module": "networks.lora", "ss_network_dim": "1",
        "ss_network_alpha": "1",
    })
