"""Pictures in and out of the host: the VAE, and samples from a model."""

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from .text import encode


def is_empty(vae: VAE) -> bool:
    """Whether this is what the host makes of a file without a VAE."""
    return vae.first_stage_model is None


def vae_encode(vae: VAE, images: Tensor) -> Tensor:
    """Images (b h w 3) in 0..1 to the VAE's own latents (b c h w), fp32, ordinary tensors."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat([vae.encode(image[None]).float() for image in images.clone()])


def to_latents(model: ModelPatcher, vae: VAE, images: Tensor) -> Tensor:
    """Images (b h w 3) in 0..1 to latents (b c h w) as this model's UNet sees them, fp32.

    Raises ValueError for a VAE of another kind, and for one that gives no numbers.
    """
    known = model.get_model_object("latent_format")  # which nodes may put in place of the checkpoint's own
    if vae.latent_channels != known.latent_channels:
        raise ValueError(f"This VAE makes latents of {vae.latent_channels} channels and the MODEL takes "
                         f"{known.latent_channels}; connect the VAE of the same checkpoint.")
    latents = known.process_in(vae_encode(vae, images))
    if not bool(latents.isfinite().all()):
        raise ValueError("The VAE makes latents of a picture that are not numbers; start ComfyUI without --fp16-vae, "
                         "or connect another VAE.")
    return latents


def sample_picture(model: ModelPatcher, clip: CLIP, vae: VAE, prompt: str, shape: tuple[int, ...], cfg: float,
                   steps: int, seed: int) -> Tensor:
    """One picture (h w 3) of `prompt` through the host's own sampler; `shape` is that of the latent (c h w).

    Not in inference mode: weights that the host moves meanwhile would come out unfit for training.
    """
    with torch.inference_mode(False), torch.no_grad():
        positive, negative = ([[context, {"pooled_output": pooled}]] for context, pooled in
                              (encode(clip, prompt), encode(clip, "")))
        latent = torch.zeros(1, *shape)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
        sampled = comfy.sample.sample(model, noise, steps, cfg, "euler", "normal", positive, negative, latent,
                                      disable_pbar=True, seed=seed)
        return vae.decode(sampled)[0].cpu().clamp(0, 1)
