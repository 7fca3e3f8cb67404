"""What LoRA files and diffusers call the weights of a model."""

from comfy.lora import model_lora_keys_unet
from comfy.model_patcher import ModelPatcher
from comfy.utils import unet_to_diffusers


def lora_names(model: ModelPatcher) -> dict[str, str]:
    """What LoRA files call each weight of this model: kohya's names, after diffusers' blocks where there are such."""
    found: dict[str, str] = {}
    for name, weight in model_lora_keys_unet(model.model, {}).items():
        if name.startswith("lora_unet_") and isinstance(weight, str):
            found[weight] = name if weight not in found or "_attentions_" in name else found[weight]
    return found


def diffusers_names(model: ModelPatcher) -> dict[str, str]:
    """The name of each weight in the host's UNet, by what diffusers calls it."""
    own = model.model.diffusion_model.state_dict()
    named = unet_to_diffusers(model.model.model_config.unet_config)  # also weights that some UNets lack
    return {theirs: ours for theirs, ours in named.items() if ours in own}
