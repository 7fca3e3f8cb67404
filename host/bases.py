"""Which kinds of checkpoint the pack can train on."""

from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy.supported_models import SD15, SD20, SDXL, LotusD, SD21UnclipH, SD21UnclipL

from .text import widths

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


def native_side(model: ModelPatcher) -> int:
    """The side in pixels of the squares that a checkpoint of these families was trained on."""
    config = model.model.model_config
    if own := getattr(type(config), "native_side", 0):  # the sample model's
        return own
    if isinstance(config, SDXL):
        return 1024
    return 768 if isinstance(config, SD20) and model.model.model_type == ModelType.V_PREDICTION else 512


def check_pair(model: ModelPatcher, clip: CLIP) -> None:
    """Raises ValueError for a CLIP whose encoders are not those that the model was trained with."""
    wanted, given = model.model.model_config.unet_config["context_dim"], sum(widths(clip).values())
    if given != wanted:
        raise ValueError(f"This CLIP gives {given} numbers a token and the MODEL takes {wanted}; "
                         "connect the CLIP of the same checkpoint.")
