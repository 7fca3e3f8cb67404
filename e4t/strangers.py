"""Whether pictures show a thing of the domain at all, and the same one, which the model itself can tell.

The encoder's own spread over noise levels does not: it is as sure of a car as of a teddy.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..host.objective import denoising_error, timestep_count
from ..host.text import encode, encode_words
from ..textual_inversion.templates import fill
from .method import PLACEHOLDER, SENTENCES, Predictor

LEVELS = 8
APART = 1.05  # so much worse than its own may the word of others explain a picture of the same thing
log = logging.getLogger("concepts")


class Judge:
    """The model's error on a picture, at the same noises whatever the prompt (diffusion classifiers, Li et al. 2023,
    section 3)."""

    def __init__(self, predictor: Predictor, shape: torch.Size, seed: int) -> None:
        self.predictor, levels = predictor, timestep_count(predictor.model)
        generator = torch.Generator().manual_seed(seed)
        self.timesteps = ((torch.arange(LEVELS) + 0.5) / LEVELS * levels).long().to(predictor.device)
        self.noise = torch.randn(LEVELS, *shape, generator=generator).to(predictor.device)

    def under_text(self, latent: Tensor, text: str) -> float:
        """The mean error on a latent (c h w) under a text."""
        return self._under(latent, *encode(self.predictor.clip, text))

    def under_words(self, latent: Tensor, words: Mapping[str, Tensor]) -> float:
        """The same under a sentence with words (1 d), by text encoder."""
        given = {name: vectors[None] for name, vectors in words.items()}
        return self._under(latent, *encode_words(self.predictor.clip, [fill(SENTENCES[0], PLACEHOLDER)], given))

    def _under(self, latent: Tensor, context: Tensor, pooled: Tensor | None) -> float:
        context, pooled = (part if part is None else part.to(self.predictor.device).expand(LEVELS, *part.shape[1:])
                           for part in (context, pooled))
        return denoising_error(self.predictor.model, latent.expand_as(self.noise), self.noise.to(latent),
                               self.timesteps, context, pooled).float().mean().item()


@torch.no_grad()
def tell_strangers(predictor: Predictor, latents: Tensor, words: Sequence[Mapping[str, Tensor]], seed: int) -> None:
    """Logs a warning for pictures, of latents (n c h w), that the class word does not help to explain, and for those
    that the words predicted of the others do not, given those of each picture (1 d), by text encoder."""
    judge = Judge(predictor, latents.shape[1:], seed)
    for number, latent in enumerate(latents, 1):
        sentence = fill(SENTENCES[0], predictor.word)
        if judge.under_text(latent, sentence) >= judge.under_text(latent, ""):
            log.warning("Picture %d does not look like a %s to this checkpoint, whose error is no lower with that "
                        "word than without: the concept may not resemble it. Use a domain of what it shows, or crop it "
                        "if the %s is only a small part of it.", number, predictor.word, predictor.word)
        elif len(words) > 1:
            others = [said for place, said in enumerate(words, 1) if place != number]
            mean = {name: torch.stack([said[name] for said in others]).mean(0) for name in others[0]}
            if judge.under_words(latent, mean) > APART * judge.under_words(latent, words[number - 1]):
                log.warning("Picture %d seems to show another %s than the other pictures: the concept will be a "
                            "mixture. Make a concept of each by itself.", number, predictor.word)
