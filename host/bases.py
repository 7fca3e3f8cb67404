"""Which kinds of checkpoint the pack can train on."""

import logging
from collections.abc import Mapping

from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import EPS, V_PREDICTION
from comfy.sd import CLIP
from comfy.supported_models import SD15, SD20, SDXL, LotusD, SD21UnclipH, SD21UnclipL

from .text import widths

log = logging.getLogger("concepts")
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
    velocity = predicts(model) == "v" or not predicts(model) and model.model.model_type == ModelType.V_PREDICTION
    return 768 if isinstance(config, SD20) and velocity else 512


def predicts(model: ModelPatcher) -> str:
    """What the UNet predicts, as `modelspec.prediction_type` has it: 'epsilon', 'v', or '' for anything else."""
    kinds = {EPS.calculate_denoised: "epsilon", V_PREDICTION.calculate_denoised: "v"}
    return kinds.get(getattr(type(model.get_model_object("model_sampling")), "calculate_denoised", None), "")


def warn_of_other_prediction(name: str, metadata: Mapping[str, str], model: ModelPatcher) -> None:
    """Logs a warning when the header of a file tells of another prediction than this model's."""
    learned, here = metadata.get("modelspec.prediction_type", ""), predicts(model)
    if learned and here and learned != here:
        log.warning("%s was learned on a model that predicts %s, and this one predicts %s; pictures will hardly look "
                    "like what was learned.", name, learned, here)


def manner(model: ModelPatcher) -> str:
    """How the UNet is used, besides its weights: the kinds of its sampling and latents, which nodes may replace."""
    sampling, latents = model.get_model_object("model_sampling"), model.get_model_object("latent_format")
    kinds = (*type(sampling).__mro__[1:], type(latents))  # the first is the host's name for any mixture
    numbers = [f"{name}={value}" for part in (sampling, latents) for name, value in sorted(vars(part).items())
               if isinstance(value, float)]
    return " ".join([*(kind.__name__ for kind in kinds), *numbers])


def check_pair(model: ModelPatcher, clip: CLIP) -> None:
    """Raises ValueError for a CLIP whose encoders are not those that the model was trained with."""
    wanted, given = model.model.model_config.unet_config["context_dim"], sum(widths(clip).values())
    if given != wanted:
        raise ValueError(f"This CLIP gives {given} numbers a token and the MODEL takes {wanted}; "
                         "connect the CLIP of the same checkpoint.")
