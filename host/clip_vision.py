"""What the host's CLIP vision makes of pictures, and a CLIP vision out of weights under open_clip's names."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory

import comfy.clip_vision
import torch
from comfy.clip_vision import ClipVisionModel
from torch import Tensor

HEADS = 16  # of attention, in every CLIP vision from ViT-L to ViT-bigG


class Vision:
    """A CLIP vision for encoders to see with, without gradients and on the device that the host chooses for it."""

    def __init__(self, clip_vision: ClipVisionModel) -> None:
        """Raises ValueError for a vision model without CLS token, such as SigLIP, or another kind, such as DINO."""
        self.clip_vision, self.model = clip_vision, getattr(clip_vision.model, "vision_model", None)
        if getattr(getattr(self.model, "embeddings", None), "class_embedding", None) is None:
            raise ValueError(f"This CLIP_VISION is a {clip_vision.model_type}, which sums a picture up in no CLS token "
                             "of CLIP; load a CLIP vision such as ViT-L or ViT-H.")

    @property
    def side(self) -> int:
        """How many pixels wide the host makes pictures for it."""
        return self.clip_vision.image_size

    @cached_property
    def fingerprint(self) -> str:
        """Its size and a digest of the signs of every weight's first numbers, the same in whichever precision."""
        digest = hashlib.sha256()
        for name, weight in self.model.state_dict().items():
            signs = torch.signbit(weight.reshape(-1)[:256]).cpu()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + signs.numpy().tobytes())
        return (f"{len(self.model.encoder.layers)} layers of {len(self.model.embeddings.class_embedding)} numbers, "
                f"{digest.hexdigest()[:16]}")

    def layers(self, pictures: Tensor) -> Tensor:
        """The CLS token after every second layer, through the norm behind the last one: (b h w 3) in 0..1 -> (b l d).

        The paper's features (E4T, arXiv 2302.12228); the norm is that of its first public reimplementation.
        """
        kept: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda module, inputs, output: kept.append(output[:, 0].clone()))
                 for layer in self.model.encoder.layers[1::2]]
        try:
            self._last_layer(pictures)
        finally:
            for hook in hooks:
                hook.remove()
        return self._normed(torch.stack(kept, 1)).cpu()

    def patches(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Of the last layer, CLS through the norm behind it (b d) and the patches without it (b p d)."""
        tokens = self._last_layer(pictures)
        return self._normed(tokens[:, 0]).cpu(), tokens[:, 1:].cpu()

    def _last_layer(self, pictures: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self.clip_vision.encode_image(pictures)["last_hidden_state"].float()

    def _normed(self, tokens: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self.model.post_layernorm(tokens).float()


def from_open_clip(tensors: Mapping[str, Tensor]) -> ClipVisionModel:
    """The host's CLIP vision with these weights. Raises ValueError for weights that are of none."""
    try:
        width, _, _, patch = tensors["conv1.weight"].shape
        config = {
            "model_type": "clip_vision_model", "hidden_act": "gelu", "num_channels": 3, "patch_size": patch,
            "image_size": patch * isqrt(len(tensors["positional_embedding"]) - 1), "hidden_size": width,
            "num_hidden_layers": sum(name.endswith(".attn.in_proj_weight") for name in tensors),
            "num_attention_heads": HEADS,
            "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.bias"]),
        }
        with torch.inference_mode(False):
            clip_vision = _of_config(config)
            missing, _ = clip_vision.load_sd(comfy.clip_vision.convert_to_transformers(dict(tensors), ""))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The CLIP vision in this file is damaged: {' '.join(str(error).split())[:200]}.") from error
    if missing:
        raise ValueError(f"The CLIP vision in this file is damaged: it lacks {missing[0]!r}.")
    return clip_vision


def _of_config(config: Mapping[str, int | str]) -> ClipVisionModel:
    """By way of a file, which is all that older hosts take."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return ClipVisionModel(str(path))
