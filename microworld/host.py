"""The sample model as ComfyUI sees it: one more entry among the models that the stock loaders recognise."""

from __future__ import annotations

from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
import torch

from . import text

WEIGHTS = Path(__file__).parent / "weights"
CHECKPOINT = WEIGHTS / "checkpoints" / "microworld.safetensors"
TOKEN_TABLE = "clip_l.transformer.text_model.embeddings.token_embedding.weight"


class LatentFormat(comfy.latent_formats.LatentFormat):
    """Latents of the sample VAE, brought to zero mean and unit variance per channel."""

    latent_channels = 4
    mean = torch.tensor([0.835825, 0.587517, 0.343575, 0.183978]).view(1, 4, 1, 1)
    std = torch.tensor([0.682297, 0.575138, 0.569202, 0.408844]).view(1, 4, 1, 1)

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent - self.mean.to(latent)) / self.std.to(latent)

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent * self.std.to(latent) + self.mean.to(latent)


class Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006 - the host's signature
        width = text.CONFIG["hidden_size"]
        super().__init__(
            embedding_directory=embedding_directory, embedding_size=width, tokenizer_data=tokenizer_data
        )


class ClipTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006 - the host's signature
        super().__init__(embedding_directory, tokenizer_data, tokenizer=Tokenizer)


class TextModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 - the host's signature
        super().__init__(
            device, dtype=dtype, textmodel_json_config=dict(text.CONFIG), return_projected_pooled=False,
            model_options=model_options,
        )


class ClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 - the host's signature
        super().__init__(device, dtype, model_options, clip_model=TextModel)


class Microworld(comfy.supported_models.SD15):
    """SD1.x in small: a 7 M UNet on 4 x 16 x 16 latents, v-prediction, 256 numbers a token."""

    unet_config = {
        "context_dim": text.CONFIG["hidden_size"],
        "model_channels": 64,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}
    native_side = 128  # for `host.bases.native_side`
    latent_format = LatentFormat

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def process_clip_state_dict(self, state_dict: dict) -> dict:
        state_dict = super().process_clip_state_dict(state_dict)
        table = state_dict.get(TOKEN_TABLE)  # a checkpoint without text encoder has none
        if table is not None and len(table) < text.VOCABULARY:
            state_dict[TOKEN_TABLE] = text.full_table(table)
        return state_dict

    def clip_target(self, state_dict={}):  # noqa: B006 - the host's signature
        return comfy.supported_models_base.ClipTarget(ClipTokenizer, ClipModel)


def register() -> None:
    """Make loaders find and recognise the sample model and its E4T domain. Calling it twice changes nothing."""
    if not any(model.__qualname__ == Microworld.__qualname__ for model in comfy.supported_models.models):
        comfy.supported_models.models.append(Microworld)
    folder_paths.add_model_folder_path("checkpoints", str(CHECKPOINT.parent))
    folder_paths.add_model_folder_path("e4t", str(WEIGHTS / "domains"))
