"""ComfyUI's own classes at toy size with random weights: an SD1.x UNet, a CLIP with the real tokenizer, a TAESD VAE."""

import json
import tempfile
from pathlib import Path

import comfy.clip_vision
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.taesd.taesd
import comfy.text_encoders.sd2_clip
import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")
torch.set_num_threads(1)  # toy sizes: more threads only wait for each other

CPU = torch.device("cpu")
DEVICE = comfy.model_management.get_torch_device()
WIDTH = 32
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4,
    "transformer_depth_middle": 1, "context_dim": WIDTH, "use_spatial_transformer": True,
    "use_linear_in_transformer": False, "legacy": False, "adm_in_channels": None, "dtype": torch.float32,
    "use_temporal_attention": False, "use_temporal_resblock": False,
}
TEXT = {
    "architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", "hidden_size": WIDTH, "intermediate_size": 64,
    "max_position_embeddings": 77, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 49408,
    "eos_token_id": 49407, "projection_dim": WIDTH,
}
HEADS = {"num_heads": 4, "num_head_channels": -1}  # over the families' own, which are for full size
WIDTH_G = 48
TEXT_G = TEXT | {"hidden_size": WIDTH_G, "projection_dim": WIDTH_G, "num_hidden_layers": 3}
SD15_BLOCKS = {  # as many as SD1.x has
    "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
OWN_UNET = {  # SDXL hears of both encoders, of the pooled vector and of six picture sizes
    "SD20": {"use_linear_in_transformer": True},
    "SDXL": {"use_linear_in_transformer": True, "context_dim": WIDTH + WIDTH_G, "adm_in_channels": WIDTH_G + 6 * 256,
             "num_classes": "sequential"},
}


def fill(module: torch.nn.Module, seed: int, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def make_text_matter(unet: torch.nn.Module) -> None:
    """Random weights hardly listen to the prompt; these do."""
    for name, parameter in unet.named_parameters():
        if "attn2" in name or name.startswith("diffusion_model.out."):
            parameter.data *= 8


def make_model(
    model_type=comfy.model_base.ModelType.EPS, family="SD15", changes=None, disable_dynamic=True
) -> comfy.model_patcher.ModelPatcher:
    config = getattr(comfy.supported_models, family)(UNET | OWN_UNET.get(family, {}) | (changes or {}))
    config.unet_config |= HEADS
    config.set_inference_dtype(torch.float32, None)
    kind = comfy.model_base.SDXL if family == "SDXL" else comfy.model_base.BaseModel
    model = kind(config, model_type=model_type, device=CPU)
    fill(model, 1)
    make_text_matter(model)
    patcher = comfy.model_patcher.ModelPatcher(model, DEVICE, CPU)
    patcher.cached_patcher_init = (make_model, (model_type, family, changes))
    return patcher


class TinyEncoder(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, textmodel_json_config=dict(TEXT), return_projected_pooled=False)


class TinyClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, clip_model=TinyEncoder, model_options=model_options or {})


class Target:
    params = {}
    clip = TinyClip
    tokenizer = comfy.sd1_clip.SD1Tokenizer


def make_clip(embeddings: str | None = None, disable_dynamic=True) -> comfy.sd.CLIP:
    clip = comfy.sd.CLIP(Target, embedding_directory=embeddings, disable_dynamic=True)
    fill(clip.cond_stage_model, 2)
    clip.patcher.cached_patcher_init = (make_clip_patcher, (embeddings,))
    return clip


class TargetH:
    params = {}
    clip = comfy.text_encoders.sd2_clip.SD2ClipModel
    tokenizer = comfy.text_encoders.sd2_clip.SD2Tokenizer


class TargetXL:
    params = {}
    clip = comfy.sdxl_clip.SDXLClipModel
    tokenizer = comfy.sdxl_clip.SDXLTokenizer


def make_other_clip(family: str, disable_dynamic=True) -> comfy.sd.CLIP:
    """The host's own text encoders of SD2.x and SDXL at toy size."""
    target, options = {
        "SD20": (TargetH, {"model_name": "clip_h", "clip_h_model_config": TEXT | {"num_hidden_layers": 3}}),
        "SDXL": (TargetXL, {"clip_l_model_config": TEXT | {"num_hidden_layers": 3}, "clip_g_model_config": TEXT_G}),
    }[family]
    clip = comfy.sd.CLIP(target, model_options=options, disable_dynamic=True)
    fill(clip.cond_stage_model, 2)
    clip.patcher.cached_patcher_init = (make_other_clip_patcher, (family,))
    return clip


def make_other_clip_patcher(family: str, disable_dynamic=True) -> comfy.model_patcher.ModelPatcher:
    return make_other_clip(family).patcher


def make_clip_patcher(embeddings: str | None, disable_dynamic=True) -> comfy.model_patcher.ModelPatcher:
    return make_clip(embeddings).patcher


def make_vae() -> comfy.sd.VAE:
    vae = comfy.taesd.taesd.TAESD()
    fill(vae, 3)
    return comfy.sd.VAE(sd=vae.state_dict())


VISION = {
    "model_type": "clip_vision_model", "hidden_act": "gelu", "hidden_size": 32, "image_size": 56, "patch_size": 14,
    "intermediate_size": 64, "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 4, "projection_dim": 24,
}


def make_clip_vision(seed=5, **changes) -> comfy.clip_vision.ClipVisionModel:
    with tempfile.TemporaryDirectory() as folder:  # all that older hosts take
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(VISION | changes))
        clip_vision = comfy.clip_vision.ClipVisionModel(str(path))
    fill(clip_vision.model, seed, 0.3)
    return clip_vision


@pytest.fixture(scope="session")
def clip_vision():
    with torch.inference_mode():
        return make_clip_vision()


@pytest.fixture(scope="session")
def model():
    with torch.inference_mode():
        return make_model()


@pytest.fixture(scope="session")
def velocity_model():
    with torch.inference_mode():
        return make_model(comfy.model_base.ModelType.V_PREDICTION)


@pytest.fixture(scope="session", params=["SD20", "SDXL"])
def other_base(request):
    """Name, MODEL and CLIP of the other families."""
    with torch.inference_mode():
        return request.param, make_model(family=request.param), make_other_clip(request.param)


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory):
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="session")
def clip(embeddings):
    with torch.inference_mode():
        return make_clip(str(embeddings))


@pytest.fixture(scope="session")
def vae():
    with torch.inference_mode():
        return make_vae()


@pytest.fixture(scope="session")
def calm_vae():
    """One whose latents half precision can hold."""
    vae = comfy.taesd.taesd.TAESD()
    fill(vae, 3, 0.02)
    with torch.inference_mode():
        return comfy.sd.VAE(sd=vae.state_dict())


@pytest.fixture
def photos():
    """Three pictures of 64 pixels."""
    return torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(4))


class Told(Exception):
    """What a training was given."""


def told(*given):
    """In place of a training."""
    raise Told(*given)
