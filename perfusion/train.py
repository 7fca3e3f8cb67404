"""Learning a concept from photos: what Perfusion adds to learning a word."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..host.cross_attention import cross_attentions, overridden, with_edits
from ..host.folders import unfinished_folder
from ..host.sockets import CLIP, ModelPatcher
from ..host.text import encode, encode_all, word_places
from ..textual_inversion.concept import Concept
from ..textual_inversion.templates import AMONG_OTHERS, fill
from ..textual_inversion.train import Recipe, WordMethod
from ..training.dataset import Lessons
from ..training.draws import Batch
from .apply import Applied, Call, applied, overrides
from .concept import Edit
from .edit import TRAINING_TEMPERATURE, similarity
from .file import save

SURE = 0.8  # of the word's own similarity: below this a prompt may hold the word


@dataclass(frozen=True)
class EditRecipe(Recipe):
    """What decides the edit, besides what decides the word.

    `value_rate` is the learning rate of o*_V, in root mean squares of the super-category's values in each layer when
    `relative_values`, and of trained keys likewise; `learning_rate` is that of the word, `momentum` what i* keeps of
    itself at each step (section 4.4). `constancy` is the weight of a second loss that keeps the word near i* wherever
    it stands in a prompt. Each step draws its bias from `bias` ± `slide`, so that the concept is learned for the whole
    slider. `corpus` names the captions of the user's own that the encoder was measured on. With `train_keys` keys are
    learned instead of locked.
    """

    value_rate: float = 0.03
    relative_values: bool = False
    momentum: float = 0.99
    constancy: float = 0.3
    bias: float = 0.65
    slide: float = 0.25
    temperature: float = TRAINING_TEMPERATURE
    own_masks: bool = True
    corpus: str = ""
    train_keys: bool = False


class EditMethod(WordMethod):
    """The word and, for every layer, what o*_V adds to W_V i* as leaves; keys locked to the super-category, i* a moving
    average."""

    architecture = "perfusion"
    recipe: EditRecipe

    def __init__(self, precision: Tensor, encoder: str, unet: ModelPatcher, clip: CLIP, recipe: EditRecipe,
                 lessons: Lessons) -> None:
        super().__init__(unet, clip, recipe, lessons)
        self.encoder, self.device = encoder, unet.load_device
        self.places: dict[str, int] = {}
        self.precision = precision.to(self.device)
        self.attentions = cross_attentions(unet.model.diffusion_model)
        self.super_input = self._super_input(clip)
        self.target_input = self.super_input.clone()
        self.call: Call | None = None
        values = self._through("to_v", self.super_input)
        self.added = {name: torch.zeros_like(value).requires_grad_() for name, value in values.items()}
        keys = self._through("to_k", self.super_input) if recipe.train_keys else {}
        self.sizes = [{name: output.square().mean().sqrt().item() for name, output in kind.items()}
                      for kind in (values, keys)]
        self.keys = {name: key.requires_grad_() for name, key in keys.items()}
        self.met: list[Tensor] = []
        self._install()

    def parameters(self) -> list[dict[str, Any]]:
        """The word, the outputs, and i*, which no gradient moves but which a state must hold."""
        outputs = [{"params": [leaf], "lr": self.recipe.value_rate * (size[name] if self.recipe.relative_values else 1)}
                   for kind, size in zip((self.added, self.keys), self.sizes, strict=True)
                   for name, leaf in kind.items()]
        return [*super().parameters(), *outputs, {"params": [self.target_input], "lr": 0.0}]

    def loss(self, batch: Batch) -> Tensor:
        prompts = self.prompts(batch)
        context, pooled = encode_all(self.clip, prompts)
        context = context.to(self.device)
        places = [context[row, self._place(text)] for row, text in enumerate(prompts)]
        self.met.append(torch.stack(places).detach().float().mean(0))
        target = self.target_input.data
        bias = self.recipe.bias + self.recipe.slide * (2 * Random(batch.lot).random() - 1)
        training = Applied(self._edit(target), self._dual(target), self.recipe.placeholder, bias,
                           self.recipe.temperature)
        self.call = Call(list(self.attentions), [training], context)
        error = self.error_under(batch, context, pooled)
        return error + self.recipe.constancy * self._away(batch.lot, target)

    def _away(self, lot: int, target: Tensor) -> Tensor:
        """How far the word is from i* in a sentence that no photo shows."""
        text = fill(AMONG_OTHERS[lot % len(AMONG_OTHERS)], self.recipe.placeholder)
        word = encode(self.clip, text)[0][0, self._place(text)].float().to(self.device)
        return (1 - similarity(word, target[None], self._dual(target)[None])[0]).square()

    def after_step(self) -> None:
        super().after_step()
        self.target_input.data = torch.lerp(torch.stack(self.met).mean(0), self.target_input.data, self.recipe.momentum)
        self.met.clear()

    def sampled(self) -> ModelPatcher:
        edit = self.learned_edit()
        return with_edits(self.unet, [applied(edit, self.precision.cpu(), self.recipe.placeholder)], overrides)

    def concept(self, metadata: Mapping[str, str]) -> Concept:
        return Concept((self.word(),), self.learned_edit(), metadata)

    def keep(self, concept: Concept, name: str) -> Path:
        return save(concept, unfinished_folder(), name)

    def learned_edit(self) -> Edit:
        """The edit so far, as values of its own."""
        target = self.target_input.detach()
        edit = self._edit(target)
        values, keys = ({name: value.detach().cpu().clone() for name, value in kind.items()}
                        for kind in (edit.values, edit.keys))
        return Edit(target.cpu().clone(), self.super_input.cpu(), values, keys, self._presence(), self.encoder,
                    self._dual(target).cpu() if self.recipe.corpus else None)

    def _edit(self, target: Tensor) -> Edit:
        own = self._through("to_v", target.detach())
        values = {name: own[name] + added for name, added in self.added.items()}
        return Edit(target, self.super_input, values, self.keys, float("-inf"))

    def _dual(self, target: Tensor) -> Tensor:
        return target @ self.precision

    def _super_input(self, clip: CLIP) -> Tensor:
        """The mean encoding (d), over the sentences, of the super-category's last token, which has read the others."""
        with torch.no_grad():
            found = [encode(clip, fill(s, self.recipe.init_text))[0][0, self.init_places(s)[-1]]
                     for s in self.recipe.sentences]
            return torch.stack(found).float().mean(0).to(self.device)

    def _place(self, text: str) -> int:
        if text not in self.places:
            self.places[text] = word_places(self.clip, text, self.leaves)[0]
        return self.places[text]

    @torch.no_grad()
    def _through(self, part: str, encoding: Tensor) -> dict[str, Tensor]:
        """W e (d_l) of the model as it is, by layer, for an encoding (d)."""
        self.call = None
        given = encoding[None].to(self.model.get_dtype_inference())
        return {name: getattr(attention, part)(given)[0].float() for name, attention in self.attentions.items()}

    @torch.no_grad()
    def _presence(self) -> float:
        """The similarity half way between the most a class word has in the sentences and the least the word has.

        A word that came out no nearer to i* than its class word is never lost to its own prompts.
        """
        target = self.target_input[None]
        dual = self._dual(target)
        word, others = [], []
        for sentence in self.recipe.sentences:
            text = fill(sentence, self.recipe.placeholder)
            word.append(similarity(encode(self.clip, text)[0][0, self._place(text)].to(self.device), target, dual))
            ordinary = encode(self.clip, fill(sentence, self.recipe.init_text))[0][0].to(self.device)
            others.append(similarity(ordinary, target, dual).max())
        return float(min((min(word) + max(others)) / 2, SURE * min(word)))

    def _install(self) -> None:
        """Lets the private copy's layers compute the edited keys and values, also when they are computed again."""

        def edited(kind: str, name: str, forward, encodings: Tensor) -> Tensor:
            return getattr(self.call, kind)(name, forward, encodings) if self.call else forward(encodings)

        layers = {}
        for name, attention in self.attentions.items():
            layers[attention.to_k] = partial(edited, "keys", name)
            layers[attention.to_v] = partial(edited, "values", name)
        self.installed = ExitStack()
        self.installed.enter_context(overridden(layers))
