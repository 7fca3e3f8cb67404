"""Which kinds of checkpoint the pack can train on."""

from comfy.model_patcher import ModelPatcher
from comfy.supported_models import SD15, SD20, SDXL, LotusD, SD21UnclipH, SD21UnclipL

TRAINABLE = (SD15, SD20, SDXL)
OTHER_TASKS = (LotusD, SD21UnclipH, SD21UnclipL)


def base_name(model: ModelPatcher) -> str:
    """The host's name of the checkpoint's family (`SD15`, `SD20`, `SDXL`).

    Raises ValueError for one that cannot be trained on.
    """
    config = getattr(model.model, "model_config", None)
    if not isinstance(config, TRAINABLE) or isinstance(config, OTHER_TASKS):
        raise ValueError(
            "Words can be learned on Stable Diffusion 1.x, 2.x and SDXL checkpoints; "
            f"this one is {type(config).__name__}."
        )
    if config.unet_config["in_channels"] != model.model.latent_format.latent_channels:
        raise ValueError(
            "Words are learned on text-to-image checkpoints; this one is for inpainting or editing. "
            "Learn on the checkpoint it was made from: the word works on both."
        )
    return type(config).__name__
