"""The loss a diffusion model was trained with, whatever it predicts (noise, velocity, flow, the image itself)."""

from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import BaseModel
from torch import Tensor


def denoising_loss(
    model: BaseModel, latents: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor | None
) -> Tensor:
    """The model's own squared error, one value per sample.

    `latents`, `noise` (b c h w), latents as the UNet sees them; `timesteps` (b) whole numbers into the model's
    schedule; `context` (1 n d) and `pooled` (1 p) of one prompt for all samples -> (b).
    """
    sampling = model.model_sampling
    sigma = sampling.sigmas.to(latents.device)[timesteps]
    noisy = sampling.noise_scaling(sigma, noise, latents)
    conditions = _conditions(model, noise, context, pooled)
    denoised = model.apply_model(noisy, sigma, transformer_options=_options(), **conditions)
    error = (denoised - latents).pow(2).flatten(1).mean(1)
    return error / output_scale(sampling, sigma).pow(2)


def output_scale(sampling: torch.nn.Module, sigma: Tensor) -> Tensor:
    """How far the denoised image moves per unit of the network's output: -σ for noise, -σ/√(σ²+1) for velocity (b)."""
    zero = torch.zeros_like(sigma).view(-1, 1)
    return sampling.calculate_denoised(sigma, zero + 1, zero).flatten()


def timestep_count(model: BaseModel) -> int:
    """How many noise levels the model was trained on."""
    return len(model.model_sampling.sigmas)


def _options() -> dict[str, Any]:
    """PyTorch's attention in place of Sage and Flash, whose kernels have no backward."""
    if comfy.model_management.sage_attention_enabled() or comfy.model_management.flash_attention_enabled():
        return {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}
    return {}


def _conditions(model: BaseModel, noise: Tensor, context: Tensor, pooled: Tensor | None) -> dict[str, Tensor]:
    """What the sampler would hand to the network for this prompt, expanded to the batch."""
    height, width = noise.shape[-2] * 8, noise.shape[-1] * 8  # as comfy/samplers.py encode_model_conds assumes
    made = model.extra_conds(
        cross_attn=context.to(noise.device), pooled_output=None if pooled is None else pooled.to(noise.device),
        noise=noise, device=noise.device, width=width, height=height, prompt_type="positive",
    )
    return {k: c.process_cond(batch_size=len(noise), area=None, device=noise.device).cond for k, c in made.items()}
