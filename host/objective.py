"""The loss a diffusion model was trained with, whatever it predicts (noise, velocity, flow, the image itself)."""

import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import BaseModel
from torch import Tensor

# PyTorch's attention has a backward on every device and, but on Apple's and some of AMD's, keeps no attention maps for
# it. The host takes it for Nvidia cards only; Sage and Flash have no backward, and the split ones are slow through it.
ATTENTION = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}


def denoising_error(
    model: BaseModel, latents: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor | None,
    snr_cap: float = 0.0,
) -> Tensor:
    """The squared error that the model was trained to lower, at every place (b c h w).

    `latents`, `noise` (b c h w), latents as the UNet sees them; `timesteps` (b) whole numbers into the model's
    schedule; `context` (b n d) and `pooled` (b p), or one prompt for all samples.
    With `snr_cap` γ above 0 the weight of clean images is bounded as in min-SNR (Hang et al., arXiv 2303.09556).
    """
    sampling = model.model_sampling
    sigma = sampling.sigmas.to(latents.device)[timesteps]
    weight = output_scale(sampling, sigma).pow(-2)
    if snr_cap:
        weight = signal_to_noise(sampling, sigma).clamp(max=snr_cap)
    found = denoised(model, latents, noise, timesteps, context, pooled)
    return (found - latents).pow(2) * weight.view(-1, 1, 1, 1)


def denoised(model: BaseModel, latents: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor,
             pooled: Tensor | None) -> Tensor:
    """What the model takes noised latents to be without their noise (b c h w); arguments as of `denoising_error`."""
    sampling = model.model_sampling
    sigma = sampling.sigmas.to(latents.device)[timesteps]
    noisy = sampling.noise_scaling(sigma, noise, latents)
    conditions = _conditions(model, noise, context, pooled)
    return model.apply_model(noisy, sigma, transformer_options=dict(ATTENTION), **conditions)


def signal_to_noise(sampling: torch.nn.Module, sigma: Tensor) -> Tensor:
    """The power of the image over that of the noise at σ (b): the min-SNR weight of an error in the image."""
    zero = torch.zeros_like(sigma).view(-1, 1)
    image, noise = (sampling.noise_scaling(sigma, *pair).flatten() for pair in ((zero, zero + 1), (zero + 1, zero)))
    return (image / noise).pow(2)


def output_scale(sampling: torch.nn.Module, sigma: Tensor) -> Tensor:
    """How far the denoised image moves per unit of the network's output: -σ for noise, -σ/√(σ²+1) for velocity (b)."""
    zero = torch.zeros_like(sigma).view(-1, 1)
    return sampling.calculate_denoised(sigma, zero + 1, zero).flatten()


def timestep_count(model: BaseModel) -> int:
    """How many noise levels the model was trained on."""
    return len(model.model_sampling.sigmas)


def _conditions(model: BaseModel, noise: Tensor, context: Tensor, pooled: Tensor | None) -> dict[str, Tensor]:
    """What the sampler would hand to the network for this prompt, expanded to the batch."""
    height, width = noise.shape[-2] * 8, noise.shape[-1] * 8  # as comfy/samplers.py encode_model_conds assumes
    made = model.extra_conds(
        cross_attn=context.to(noise.device), pooled_output=None if pooled is None else pooled.to(noise.device),
        noise=noise, device=noise.device, width=width, height=height, prompt_type="positive",
    )
    return {k: c.process_cond(batch_size=len(noise), area=None, device=noise.device).cond for k, c in made.items()}
