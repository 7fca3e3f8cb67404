"""A concept's edit without its gate: a rank-1 change of the key and value weights, as a LoRA file any loader takes."""

import torch
from torch import Tensor

from ..host.cross_attention import cross_attentions, lora_names
from ..host.sockets import ModelPatcher
from ..textual_inversion.concept import Concept
from .edit import dual_of


@torch.no_grad()
def to_lora(model: ModelPatcher, concept: Concept, precision: Tensor, strength: float = 1.0) -> dict[str, Tensor]:
    """LoRA tensors of rank 1 (fp16), up (o* - W i*) and down C⁻¹ i* / <i*, i*>, so that W' i* = o* at strength 1.

    Without a gate the change acts on every token as far as it resembles i*. `precision` is C⁻¹ (d d).
    """
    (word,), edit = concept.words, concept.edit
    dual = dual_of(edit.target_input[None], precision)[0].float()
    down = dual / (dual @ edit.target_input)
    balance = down.norm()
    tensors, keys = {}, lora_names(model)
    for name, attention in cross_attentions(model.model.diffusion_model).items():
        for layer, learned in (("to_k", edit.keys.get(name)), ("to_v", edit.values[name])):
            through = getattr(attention, layer)
            device = next(through.parameters()).device
            before, locked = through(torch.stack([edit.target_input, edit.super_input]).to(device)).float().cpu()
            output = locked if learned is None else learned
            key = keys[f"diffusion_model.{name}.attn2.{layer}.weight"]
            tensors[f"{key}.lora_up.weight"] = (strength * balance * (output - before))[:, None].half().contiguous()
            tensors[f"{key}.lora_down.weight"] = (down / balance)[None].half().contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    title = word.placeholder.strip("<>")
    for encoder, vectors in word.vectors.items():
        part = "string_to_param.*" if word.vectors.keys() == {"clip_l"} else encoder
        tensors[f"bundle_emb.{title}.{part}"] = vectors.detach().cpu().float().contiguous()
    return tensors
