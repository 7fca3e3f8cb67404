"""Which kinds of checkpoint the pack can train on."""

from comfy.model_patcher import ModelPatcher
from comfy.supported_models import SD15


def base_name(model: ModelPatcher) -> str:
    """The host's name of the checkpoint's family (`SD15`). Raises ValueError for one that cannot be trained on yet."""
    config = getattr(model.model, "model_config", None)
    own_latents = getattr(model.model, "latent_format", None)
    if not isinstance(config, SD15) or config.unet_config["in_channels"] != own_latents.latent_channels:
        raise ValueError(
            f"Words can be learned on Stable Diffusion 1.x checkpoints so far; this one is {type(config).__name__}."
        )
    return type(config).__name__
