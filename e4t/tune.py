"""A concept from one picture or a few: predicted by a domain's encoder, then learned on for a few steps (E4T,
arXiv 2302.12228).

What is learned is the word and the values of a Perfusion edit, so the outcome is an ordinary Perfusion concept, which
needs neither the encoder nor the offsets when it is used.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..host.clip_vision import Vision
from ..host.copies import settle
from ..host.objective import timestep_count
from ..host.sockets import CLIP, ModelPatcher
from ..host.text import encode, ready, rows
from ..perfusion.train import EditMethod, EditRecipe
from ..textual_inversion.templates import fill
from ..textual_inversion.word import row_size
from ..training.dataset import Lessons, Photo, squares
from .domain import Domain, digest
from .encoder import Predicted
from .method import SENTENCES, Predictor
from .offsets import Offset
from .strangers import tell_strangers

LEVELS = 16  # noise levels that a prediction is the mean of
SHARE = 0.6  # of the way from the class word to the predicted one, which drowns out the rest of a prompt
WORD_RATE, VALUE_RATE = 0.05, 0.05  # of the class word's numbers and its values in each layer


@dataclass(frozen=True, eq=False)
class Start:
    """What the encoder makes of pictures: the word's vectors (1 d) by text encoder, and what a layer's o*_V adds to
    W_V i* (d_l), by layer."""

    words: dict[str, Tensor]
    added: dict[str, Tensor]


@torch.no_grad()
def predict_each(predictor: Predictor, seen: Tensor, latents: Tensor, seed: int) -> list[Start]:
    """The mean prediction over noise levels for each of n pictures as the encoder sees them and their latents
    (n c h w)."""
    generator = torch.Generator().manual_seed(seed)
    levels = timestep_count(predictor.model)
    timesteps = ((torch.arange(LEVELS) + 0.5) / LEVELS * levels).long().to(predictor.device)
    starts = []
    for picture, latent in zip(seen.to(predictor.device), latents, strict=True):
        noise = torch.randn(LEVELS, *latent.shape, generator=generator).to(latent)
        said = predictor.predict(picture[None], latent.expand_as(noise), noise, timesteps)
        mean = Predicted(*({name: value.float().mean(0, keepdim=True) for name, value in getattr(said, kind).items()}
                           for kind in ("words", "values")))
        starts.append(Start({name: vectors[0] for name, vectors in predictor.words(mean).items()},
                            {name: added[0] for name, added in predictor.added(mean).items()}))
    return starts


def mean_of(starts: Sequence[Start]) -> Start:
    """The mean of what several pictures say."""
    return Start(*({name: torch.stack([getattr(start, kind)[name] for start in starts]).mean(0)
                    for name in getattr(starts[0], kind)} for kind in ("words", "added")))


class TunedEdit(EditMethod):
    """A Perfusion edit that starts where the encoder puts it."""

    architecture = "e4t-perfusion"

    def __init__(self, domain: Domain, photos: Sequence[Photo], precision: Tensor, encoder: str, unet: ModelPatcher,
                 clip: CLIP, recipe: EditRecipe, lessons: Lessons, vision: Vision | None = None) -> None:
        super().__init__(precision, encoder, unet, clip, recipe, lessons)
        self.started_from = digest(domain)
        self.start = self._predicted(domain, photos, clip, lessons, vision)
        with torch.no_grad():
            for name, vectors in self.start.words.items():
                self.leaves[name].copy_(vectors)
                self.norms[name] = self.leaves[name].norm(dim=1).mean()
            for name, added in self.start.added.items():
                self.added[name].copy_(added)
            texts = [fill(sentence, recipe.placeholder) for sentence in recipe.sentences]
            met = [encode(self.clip, text)[0][0, self._place(text)] for text in texts]
            self.target_input.copy_(torch.stack(met).float().mean(0))

    def _predicted(self, domain: Domain, photos: Sequence[Photo], clip: CLIP, lessons: Lessons,
                   vision: Vision | None) -> Start:
        shown = squares(photos, lessons.latents.shape[-1] * 8)
        seen = domain.encoder.seen(torch.stack([photo.picture for photo in shown]), vision)
        settle(self.unet, clip.patcher)
        offsets = {layer: Offset(o.left.to(self.device), o.right.to(self.device))
                   for layer, o in domain.offsets.items()}
        predictor = Predictor(self.unet, clip, domain.word, copy.deepcopy(domain.encoder).to(self.device), offsets,
                              SHARE * domain.scale, self.precision)
        try:
            starts = predict_each(predictor, seen, lessons.latents[:, 0], self.recipe.seed)
            tell_strangers(predictor, lessons.latents[:, 0], [start.words for start in starts], self.recipe.seed)
            return mean_of(starts)
        finally:
            predictor.installed.close()


def tuning_recipe(domain: Domain, clip: CLIP, placeholder: str, steps: int, seed: int, **changes) -> EditRecipe:
    """Few steps from a good start: the sentences of pretraining, rates in shares of what they move."""
    size = max(row_size(found) for found in rows(ready(clip), domain.word).values())
    settings = {"batch_size": 8, "learning_rate": WORD_RATE * size, "value_rate": VALUE_RATE, "relative_values": True,
                "momentum": 0.8, "mask_floor": 0.02, "schedule": "constant", "sentences": SENTENCES}
    return EditRecipe(**{"placeholder": placeholder, "init_text": domain.word, "steps": steps, "seed": seed, **settings,
                         **changes})
