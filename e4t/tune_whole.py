"""Tuning as in the paper (E4T, arXiv 2302.12228): word, encoder, offsets and the model itself, on one picture or a few.

Of the model, low-rank differences of the attention matrices are learned in place of all weights, so that what is kept
is a compact difference. The word is what the tuned encoder predicts in the mean, which spares the encoder in each step
of sampling.

With an encoder pretrained here it goes beyond the paper, for more of the picture and of the prompt after five steps:
what is added to the predicted word is learned as Textual Inversion learns words, from more of the noisy levels, and
the outcome is pulled back towards class word and model, as WiSE-FT does with weights.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..host.clip_vision import Vision
from ..host.copies import settle
from ..host.cross_attention import overridden
from ..host.folders import unfinished_folder
from ..host.objective import timestep_count
from ..host.sockets import CLIP, ModelPatcher
from ..host.text import encode_words
from ..host.weight_offsets import ALL_PARTS, matrix_shapes, offset_layers
from ..textual_inversion.concept import Concept
from ..textual_inversion.train import Recipe, WordMethod
from ..training.dataset import Lessons, Photo, squares
from ..training.draws import Batch
from .difference import Difference, LowRank, changed_weight, nothing_added, scaled
from .difference_file import save
from .domain import Domain, digest
from .method import SENTENCES, Predictor
from .offsets import Offset
from .samples import later
from .strangers import tell_strangers
from .tune import mean_of, predict_each
from .use import with_difference

RANK = 4
REGULARISER = 1e-3  # of how far the word is from the class word
WORD_PATH = 2.5  # in the encoder's unit: how far all steps together may move each number that is added to the word
FACTOR_PATH, SLOWEST = 0.02, 5e-4  # the same of each number of a factor, and the rate that is left to many steps


class TunedWhole(WordMethod):
    """`learning_rate` of the recipe is that of the factors; encoder and word move at the encoder's own rates."""

    architecture = "e4t"

    def __init__(self, domain: Domain, photos: Sequence[Photo], unet: ModelPatcher, clip: CLIP, recipe: Recipe,
                 lessons: Lessons, vision: Vision | None = None) -> None:
        super().__init__(unet, clip, recipe, lessons)
        self.device, self.latents = unet.load_device, lessons.latents[:, 0]
        self.started_from = digest(domain)
        self.encoder = copy.deepcopy(domain.encoder).to(self.device).requires_grad_()
        shown = squares(photos, lessons.latents.shape[-1] * 8)
        self.seen = domain.encoder.seen(torch.stack([photo.picture for photo in shown]), vision).to(self.device)
        settle(unet, clip.patcher)
        self.predictor = Predictor(unet, clip, domain.word, self.encoder, {}, domain.encoder.start * domain.scale,
                                   torch.zeros(0, 0))
        self.predictor.installed.close()
        starts = predict_each(self.predictor, self.seen, self.latents, recipe.seed) if len(photos) > 1 else []
        tell_strangers(self.predictor, self.latents, [start.words for start in starts], recipe.seed)
        self.moved = {name: torch.zeros_like(found).requires_grad_() for name, found in self.predictor.rows.items()}
        self.offsets = {layer: Offset(*(f.detach().clone().to(self.device).requires_grad_()
                                        for f in (offset.left, offset.right)))
                        for layer, offset in domain.offsets.items()}
        self.added = {layer: LowRank(*(f.to(self.device).requires_grad_() for f in (factors.up, factors.down)))
                      for layer, factors in nothing_added(matrix_shapes(unet, ALL_PARTS), RANK, recipe.seed).items()}
        self.acting = False
        self.installed = ExitStack()
        self.installed.enter_context(overridden(offset_layers(self.model.diffusion_model, self._tuned, ALL_PARTS)))

    def parameters(self) -> list[dict[str, Any]]:
        factors = [f for offset in self.offsets.values() for f in (offset.left, offset.right)]
        factors += [f for pair in self.added.values() for f in (pair.up, pair.down)]
        rate = self.recipe.learning_rate
        step = min(self.encoder.word_rate, WORD_PATH / max(1, self.recipe.steps))
        words = [{"params": [moved], "lr": step * self.predictor.units[name]}
                 for name, moved in self.moved.items()]
        return [{"params": list(self.encoder.parameters()), "lr": self.encoder.tuning_rate * rate},
                {"params": factors, "lr": rate}, *words]

    def loss(self, batch: Batch) -> Tensor:
        """The error (b) under words that the encoder predicts from each sample's own noised latent, and what is added
        to them."""
        batch = replace(batch, timesteps=later(batch.timesteps, timestep_count(self.model), self.encoder.times))
        self.acting = self.encoder.hears_offsets
        said = self.predictor.predict(self.seen[batch.photos], batch.latents, batch.noise, batch.timesteps)
        words = {name: found + self.moved[name] for name, found in self.predictor.words(said).items()}
        context, pooled = encode_words(self.clip, self.prompts(batch), words)
        self.acting = True
        return self.error_under(batch, context, pooled) + REGULARISER * self.predictor.size(said)

    def after_step(self) -> None:
        """Nothing is held back: the word follows the encoder."""

    def sampled(self) -> ModelPatcher:
        self._fix_word()
        return with_difference(self.unet, self.difference(), 1.0)

    def concept(self, metadata: Mapping[str, str]) -> Concept:
        self._fix_word()
        return Concept((self.word(),), self.difference(), metadata)

    def keep(self, concept: Concept, name: str) -> Path:
        return save(concept, unfinished_folder(), name)

    def difference(self) -> Difference:
        """What is kept of what is learned so far, as values of its own."""
        return scaled(Difference(self.offsets, self.added), self.encoder.kept)

    def _tuned(self, layer: str, weight: Tensor) -> Tensor:
        return changed_weight(weight, self.offsets.get(layer), self.added[layer]) if self.acting else weight

    def _fix_word(self) -> None:
        """Makes the word what is kept of the mean of what `loss` now learns with, and leaves the model as it is."""
        self.acting = self.encoder.hears_offsets
        start = mean_of(predict_each(self.predictor, self.seen, self.latents, self.recipe.seed))
        self.acting = False
        for name, vectors in start.words.items():
            whole = vectors + self.moved[name].detach()
            self.leaves[name].data.copy_(torch.lerp(self.predictor.rows[name], whole, self.encoder.kept))


def whole_recipe(domain: Domain, placeholder: str, steps: int, seed: int, **changes) -> Recipe:
    """Few steps from a good start, in the sentences of pretraining and the paper's batch of 16, half of it at a time.

    More than ten move the factors more slowly.
    """
    rate = min(domain.encoder.factor_rate, max(SLOWEST, FACTOR_PATH / max(1, steps)))
    settings = {"batch_size": 8, "accumulation": 2, "learning_rate": rate, "mask_floor": 0.02, "own_masks": True,
                "schedule": "constant", "sentences": SENTENCES}
    return Recipe(**{"placeholder": placeholder, "init_text": domain.word, "steps": steps, "seed": seed, **settings,
                     **changes})
