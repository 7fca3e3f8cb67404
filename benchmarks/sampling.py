"""Draw with the stock nodes' own functions, many prompts to a batch."""

from __future__ import annotations

from collections.abc import Callable

import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy.sd import CLIP
from torch import Tensor

from ..microworld.host import CHECKPOINT, register


def load_checkpoint(path=CHECKPOINT):
    """MODEL, CLIP and VAE of a checkpoint, as CheckpointLoaderSimple gives them."""
    register()
    return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)[:3]


def encode(clip, prompts: list[str]) -> list:
    """One conditioning that holds a prompt for each picture of a batch."""
    with torch.inference_mode():
        encodings = [clip.encode_from_tokens(clip.tokenize(prompt)) for prompt in prompts]
    return [[torch.cat(encodings), {}]]


@torch.inference_mode()
def draw(
    model, clip, vae, prompts: list[str], seed: int, steps: int = 25, cfg: float = 4.0, sampler: str = "euler",
    scheduler: str = "normal", size: int = 128, batch: int = 16, encoding: Callable[[CLIP, list[str]], list] = encode,
) -> Tensor:  # fmt: skip
    """One picture for each prompt, (n, size, size, 3) in 0..1; picture i starts from noise seeded with seed + i."""
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        latents = torch.zeros(len(part), 4, size // 8, size // 8)
        noise = torch.cat([comfy.sample.prepare_noise(latents[:1], seed + start + i) for i in range(len(part))])
        positive, negative = encoding(clip, part), encode(clip, [""] * len(part))
        samples = comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latents, disable_pbar=True, seed=seed
        )
        pictures.append(vae.decode(samples).clamp(0, 1))
    return torch.cat(pictures)
