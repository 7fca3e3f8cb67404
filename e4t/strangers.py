"""Whether a picture shows a thing of the domain at all, which the model itself can tell.

The encoder's own spread over noise levels does not: it is as sure of a car as of a teddy.
"""

import logging

import torch
from torch import Tensor

from ..host.objective import denoising_error, timestep_count
from ..host.text import encode
from ..textual_inversion.templates import fill
from .method import SENTENCES, Predictor

LEVELS = 8
log = logging.getLogger("concepts")


@torch.no_grad()
def strangeness(predictor: Predictor, latents: Tensor, seed: int) -> Tensor:
    """The model's error under a sentence with the class word ÷ under the empty prompt (n), for latents (n c h w).

    Below 1 the word helps to explain the picture (diffusion classifiers, Li et al. 2023, section 3).
    """
    generator = torch.Generator().manual_seed(seed)
    levels = timestep_count(predictor.model)
    timesteps = ((torch.arange(LEVELS) + 0.5) / LEVELS * levels).long().to(predictor.device)
    noise = torch.randn(LEVELS, *latents.shape[1:], generator=generator).to(latents)
    prompts = encode(predictor.clip, fill(SENTENCES[0], predictor.word)), predictor.empty
    errors = [[denoising_error(predictor.model, latent.expand_as(noise), noise, timesteps,
                               *(part if part is None else part.expand(LEVELS, *part.shape[1:]) for part in prompt))
               .float().mean() for prompt in prompts] for latent in latents]
    under_word, under_nothing = torch.tensor(errors).T
    return under_word / under_nothing


def tell_strangers(predictor: Predictor, latents: Tensor, seed: int) -> None:
    """Logs a warning for pictures that the class word does not help to explain."""
    for number, found in enumerate(strangeness(predictor, latents, seed).tolist(), 1):
        if found >= 1:
            log.warning("Picture %d does not look like a %s to this checkpoint, whose error is %.0f %% higher with "
                        "that word than without: the concept may not resemble it. Use a domain of what it shows, or a "
                        "mask if the %s is only a small part of it.", number, predictor.word, 100 * (found - 1),
                        predictor.word)
