"""What travels over ComfyUI's own sockets, for the layers above."""

from comfy.clip_vision import ClipVisionModel
from comfy.hooks import HookGroup
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

__all__ = ["CLIP", "VAE", "ClipVisionModel", "HookGroup", "ModelPatcher"]
