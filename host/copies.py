"""Private copies of a MODEL and a CLIP that can be trained through, beside originals that nothing touches."""

import copy
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import comfy.model_management
import torch
from comfy.clip_model import CLIPLayer
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sd import CLIP, VAE
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .bases import native_side
from .cross_attention import KEY
from .text import UNUSED

log = logging.getLogger("concepts")
AMPLE = 5  # bytes for each weight at 512 pixels, and again for each picture of a batch: 20 GB for 4 on SD1.x
MOST = 0.6  # of a card for weights: what is left is for activations, previews and the system


@contextmanager
def private_copies(
    model: ModelPatcher, clip: CLIP, recompute: bool = False
) -> Iterator[tuple[ModelPatcher, CLIP]]:
    """Copies of `model` and `clip` with ordinary frozen tensors and the LoRAs they carry, for one training.

    The weights are held once where the host leaves them in place, and are loaded from disk again where it does not.

    Gradients flow through both copies; with `recompute` the UNet's blocks keep no activations for them and are
    computed twice (gradient checkpointing), and the text encoder works on the processor where the card is small
    (`card_is_small`). Both copies are freed on the way out.
    Raises ValueError for a model or CLIP whose loader did not leave the host a way to load it again.
    """
    in_training = comfy.model_management.in_training
    with torch.inference_mode(False), torch.enable_grad():
        unet, of_unet = _private(model, "MODEL", recompute)
        encoder, of_encoder = _private(clip.patcher, "CLIP")
        if recompute and card_is_small(model, clip):
            encoder.load_device = encoder.offload_device
        text = clip.clone()
        text.patcher, text.cond_stage_model = encoder, encoder.model
        try:
            settle(unet, encoder)  # together, as loading one may push out the other
            _convert(unet.model, unet.model.get_dtype_inference(), recompute)
            _convert(encoder.model, torch.float32)  # in which the host lets text encoders compute
            del of_unet, of_encoder  # which the host has down as loaded and would have reported as leaked before
            comfy.model_management.in_training = True
            yield unet, text
        finally:
            comfy.model_management.in_training = in_training
            for patcher in (unet, encoder):
                patcher.detach()
            comfy.model_management.soft_empty_cache()


def fingerprint(*patchers: ModelPatcher) -> str:
    """A digest of the first numbers of every weight, which tells checkpoints and the LoRAs on them apart.

    Without weights that text encoders may never have been given (`host.text.UNUSED`).
    """
    digest = hashlib.sha256()
    for patcher in patchers:
        for name, weight in patcher.model.state_dict().items():
            if not name.endswith(UNUSED):
                start = weight.reshape(-1)[:32].float().cpu().contiguous()
                digest.update(f"{name} {tuple(weight.shape)}".encode() + start.numpy().tobytes())
    return digest.hexdigest()


def encoded_by(model: ModelPatcher, vae: VAE) -> str:
    """A digest of what makes latents of pictures: the VAE, and how the model scales what that gives."""
    return f"{fingerprint(vae.patcher)} {type(model.get_model_object('latent_format')).__name__}"


def settle(*patchers: ModelPatcher) -> None:
    """Brings copies whole onto their devices, where a preview or CLIP vision may have pushed them out."""
    comfy.model_management.load_models_gpu(list(patchers), memory_required=1e20, force_full_load=True)


def memory_is_short(model: ModelPatcher, pictures: int) -> bool:
    """Whether the model's device is a graphics card with less memory than a batch of so many pictures takes in training
    that keeps all activations."""
    device, weights = model.load_device, sum(weight.numel() for weight in model.model.parameters())
    ample = AMPLE * weights * (1 + pictures) * (native_side(model) / 512) ** 2
    return device.type != "cpu" and comfy.model_management.get_total_memory(device) < ample


def computes_in_bf16(model: ModelPatcher) -> bool:
    """Whether the model is on a card on which the host would compute in bf16."""
    return model.load_device.type == "cuda" and comfy.model_management.should_use_bf16(model.load_device)


def card_is_small(model: ModelPatcher, clip: CLIP) -> bool:
    """Whether the weights of both, the text encoder's in single precision, would fill most of the model's card.

    SDXL's take 8.4 GB, and a batch of 4 at 1024 pixels 3 more.
    """
    parts = ((model.model, model.model.get_dtype_inference().itemsize), (clip.cond_stage_model, 4))
    weights = sum(size * weight.numel() for part, size in parts for weight in part.parameters())
    device = model.load_device
    return device.type != "cpu" and weights > MOST * comfy.model_management.get_total_memory(device)


def _private(patcher: ModelPatcher, socket: str, recompute: bool = False) -> tuple[ModelPatcher, ModelPatcher]:
    """A patcher with modules of its own, with the LoRAs that `patcher` carries, and what it took the modules from."""
    fresh = _plain(patcher, socket)
    if fresh is patcher:
        fresh = ModelPatcher(_twin(patcher.model), patcher.load_device, patcher.offload_device)
    private = patcher.clone(disable_dynamic=True, model_override=fresh.get_clone_model_override())
    private.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)  # it would sample with the original's UNet
    if edits := private.model_options["transformer_options"].pop(KEY, ()):
        log.warning("%s on this MODEL does not act while training; connect the MODEL from in front of Apply Concept.",
                    ", ".join(edit.placeholder for edit in edits))
    if private.injections:
        log.warning("What was put on this %s by bypass does not act while training; use Load LoRA, not its bypass.",
                    socket)
    _prepare(private, recompute)
    return private, fresh


def unload(model: torch.nn.Module) -> None:
    """Lets the host put the weights back as they were before LoRAs, as when it needs room."""
    loaded_models = comfy.model_management.current_loaded_models
    for loaded in [each for each in loaded_models if each.model is not None and each.model.model is model]:
        loaded.model_unload()
        loaded_models.remove(loaded)


def plain_weights(model: ModelPatcher) -> dict[str, Tensor]:
    """The weights of a UNet as its checkpoint has them, whatever LoRAs and concepts have last been loaded with it."""
    return _plain(model, "MODEL").model.diffusion_model.state_dict()


def _plain(patcher: ModelPatcher, socket: str) -> ModelPatcher:
    """One whose modules hold the weights of the file as ordinary tensors: the patcher itself, or one loaded again."""
    weights = [*patcher.model.parameters(), *patcher.model.buffers()]
    if patcher.is_dynamic() or any(type(weight.data) is not Tensor for weight in weights):
        return _reloaded(patcher, socket)
    unload(patcher.model)
    return patcher


def _twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules over the same memory, so that frozen weights are held once.

    What a loader made in inference mode cannot be trained through; these are ordinary tensors on the same storage.
    """

    def shared(weight: Tensor) -> Tensor:
        view = torch.empty(0, dtype=weight.dtype, device=weight.device)
        view.set_(weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride())
        return torch.nn.Parameter(view, requires_grad=False) if isinstance(weight, torch.nn.Parameter) else view

    known = {id(weight): shared(weight) for weight in (*model.parameters(), *model.buffers())}
    if isinstance(model, BaseModel):
        known |= {id(model.current_patcher): None, id(model.model_config): model.model_config}
    return copy.deepcopy(model, known)


def _reloaded(patcher: ModelPatcher, socket: str) -> ModelPatcher:
    """`patcher.clone(force_deepcopy=True, disable_dynamic=True)`, spelled so that hosts before 0.26 have it too.

    For weights that the host moves about on its own (dynamic VRAM) or keeps quantised.
    """
    if patcher.cached_patcher_init is None:
        raise ValueError(
            f"The {socket} comes from a loader that cannot load it a second time, which training needs; "
            "use Load Checkpoint or another of ComfyUI's own loaders."
        )
    factory, arguments, *index = patcher.cached_patcher_init
    fresh = factory(*arguments, disable_dynamic=True)
    return fresh[index[0]] if index else fresh


def _prepare(private: ModelPatcher, recompute: bool) -> None:
    """Freezes the weights and makes every part let gradients through."""
    private.model.requires_grad_(False).eval()
    for name, layer in private.model.named_modules():
        if isinstance(layer, CLIPLayer):
            private.add_object_patch(f"{name}.forward", partial(_differentiable_forward, layer))
        elif recompute and isinstance(layer, ResBlock | SpatialTransformer):
            private.add_object_patch(f"{name}.forward", partial(checkpoint, layer.forward, use_reentrant=False))
    if isinstance(private.model, BaseModel) and private.model.get_dtype_inference() == torch.float16:
        # Half precision has too little range for these gradients.
        bf16 = comfy.model_management.should_use_bf16(private.load_device)
        private.set_model_compute_dtype(torch.bfloat16 if bf16 else torch.float32)


def _convert(model: torch.nn.Module, computed: torch.dtype, recompute: bool = False) -> None:
    """Keeps weights as they are computed with, where the host would cast them anew in each call.

    The backward pass holds on to every such cast, once for each encoded prompt. With `recompute` it holds few, and
    weights stay as they are that would become larger.
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.Embedding):  # looked up, which is not held on to
            continue
        for weight in layer.parameters(recurse=False):
            larger = computed.itemsize > weight.dtype.itemsize
            if type(weight.data) is Tensor and weight.is_floating_point() and not (recompute and larger):
                weight.data = weight.data.to(computed)


def _differentiable_forward(layer: CLIPLayer, x: Tensor, mask=None, optimized_attention=None) -> Tensor:
    """The host's layer adds in place (comfy/clip_model.py, CLIPLayer.forward), which autograd refuses; same numbers."""
    x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
    return x + layer.mlp(layer.layer_norm2(x))
