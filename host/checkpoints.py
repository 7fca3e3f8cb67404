"""Checkpoints by their path, for commands that run without a graph."""

from pathlib import Path

import comfy.clip_vision
import comfy.sd

from .sockets import CLIP, VAE, ClipVisionModel, ModelPatcher


def load_checkpoint(path: Path) -> tuple[ModelPatcher, CLIP, VAE]:
    """MODEL, CLIP and VAE, as Load Checkpoint gives them. Raises ValueError for a file that is gone or is none."""
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {path}.")
    try:
        return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)[:3]
    except Exception as error:  # the host raises whatever its parsers do
        raise ValueError(f"{path.name} cannot be loaded as a checkpoint: {error}.") from error


def load_clip_vision(path: Path) -> ClipVisionModel:
    """CLIP_VISION, as Load CLIP Vision gives it. Raises ValueError for a file that is gone or is none."""
    if not path.is_file():
        raise ValueError(f"There is no CLIP vision {path}.")
    try:
        clip_vision = comfy.clip_vision.load(str(path))
    except Exception as error:  # the host raises whatever its parsers do
        raise ValueError(f"{path.name} cannot be loaded as a CLIP vision: {error}.") from error
    if clip_vision is None:
        raise ValueError(f"{path.name} is no CLIP vision that this ComfyUI knows.")
    return clip_vision
