"""What the encoder of a domain predicts for pictures, and the loss that teaches it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..host.clip_overlay import with_words
from ..host.cross_attention import cross_attentions, overridden
from ..host.objective import denoising_error
from ..host.sockets import CLIP, ModelPatcher
from ..host.text import encode, encode_words, rows, word_places
from ..host.unet_features import unet_features
from ..host.weight_offsets import offset_layers
from ..perfusion.apply import Applied, Call
from ..perfusion.concept import Edit
from ..perfusion.edit import TRAINING_TEMPERATURE
from ..textual_inversion.concept import Word
from ..textual_inversion.templates import OBJECT, PLACES, fill
from ..textual_inversion.word import spread
from ..training.dataset import weighted_mean
from .encoder import Encoder, Predicted
from .imported import ImportedEncoder
from .offsets import Offset, offset_weight, penalty
from .samples import Pair

PLACEHOLDER = "<domain>"
BIAS = 0.75  # of the gate while a domain learns
SENTENCES = OBJECT + PLACES


class Together(Call):
    """One call of the UNet for a batch in which each sample has a concept of its own, and no other."""

    def __init__(self, layers, edits: list[Applied], encodings: Tensor) -> None:
        super().__init__(layers, edits)
        self._move(encodings)
        calls = [Call(layers, [edit], encodings[row:row + 1]) for row, edit in enumerate(edits)]
        own = torch.eye(len(edits), device=encodings.device)[:, None, None]
        self.only = tuple((torch.cat(same)[..., None] * own).flatten(-2)
                          for same in zip(*(call.only for call in calls), strict=True))


class Predictor:
    """Encoder and offsets on private copies of a model and its CLIP.

    Words start from the rows of `word`, the values of each layer from what the layer makes of the word.
    """

    def __init__(self, unet: ModelPatcher, clip: CLIP, word: str, encoder: Encoder | ImportedEncoder,
                 offsets: Mapping[str, Offset], scale: float, precision: Tensor) -> None:
        self.model, self.device = unet.model, unet.load_device
        self.encoder, self.offsets, self.scale, self.word = encoder, offsets, scale, word
        self.precision = precision.to(self.device)
        self.rows = {name: spread(found, 1).to(self.device) for name, found in rows(clip, word).items()}
        self.units = {name: encoder.unit(found) for name, found in self.rows.items()}
        self.clip = with_words(clip, [Word(PLACEHOLDER, word, self.rows)])
        self.places = {sentence: word_places(self.clip, fill(sentence, PLACEHOLDER), self.rows)[0]
                       for sentence in SENTENCES}
        with torch.no_grad():
            self.empty = encode(clip, "")
            self.super_input = self._super_input(clip)
        self.attentions = cross_attentions(self.model.diffusion_model)
        self.offsetting: Mapping[str, Offset] = {}
        self.call: Together | None = None
        self.installed = ExitStack()
        self._install()

    def predict(self, seen: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Predicted:
        """For pictures as the encoder sees them, one for all or for each, and their noised latents, as in `Pair`."""
        self._rest()
        if self.encoder.hears_offsets:
            self.offsetting = self.offsets
        features = unet_features(self.model, latents, noise, timesteps, *self.empty)
        return self.encoder(self.encoder.image_part(seen), features)

    def words(self, predicted: Predicted) -> dict[str, Tensor]:
        """v* = v_class + s E (b 1 d), by text encoder; E is in the encoder's unit."""
        return {name: self.rows[name] + self.scale * self.units[name] * offset.float()[:, None]
                for name, offset in predicted.words.items()}

    def size(self, predicted: Predicted) -> Tensor:
        """The mean square of s E (b), in the encoder's unit: how far words are from the class word."""
        return (self.scale * torch.cat(list(predicted.words.values()), 1).float()).square().mean(1)

    def added(self, predicted: Predicted) -> dict[str, Tensor]:
        """o*_V - W_V i* (b d_l) by layer; predictions are in root mean squares of the super-category's values."""
        own = self.through(self.super_input[None])
        return {name: own[name].square().mean().sqrt() * value.float() for name, value in predicted.values.items()}

    @torch.no_grad()
    def through(self, encodings: Tensor) -> dict[str, Tensor]:
        """W_V e (b d_l) of the model as it is, by layer, for encodings (b d)."""
        self._rest()
        given = encodings.to(self.model.get_dtype_inference())
        return {name: attention.to_v(given).float() for name, attention in self.attentions.items()}

    def loss(self, pair: Pair, edited: bool, regulariser: float) -> Tensor:
        """The model's error (b) under sentences with the predicted words, and how far these are from the class word.

        With `edited` the predicted values act through Perfusion's gated edit of the plain model, else the offsets act:
        also in the backward pass, where gradient checkpointing computes layers again.
        """
        predicted = self.predict(pair.pictures, pair.latents, pair.noise, pair.timesteps)
        sentences = [SENTENCES[lot % len(SENTENCES)] for lot in pair.lots]
        context, pooled = encode_words(self.clip, [fill(s, PLACEHOLDER) for s in sentences], self.words(predicted))
        context = context.to(self.device)
        size = self.size(predicted)
        if edited:
            added = self.added(predicted)
            size = size + torch.cat([v.float() for v in predicted.values.values()], 1).square().mean(1)
            with torch.autocast(self.device.type, enabled=False):
                self.call = self._together(context.float(), sentences, added)
        else:
            self.offsetting = self.offsets
            size = size + penalty(self.offsets) if self.offsets else size
        error = denoising_error(self.model, pair.batch.latents, pair.batch.noise, pair.batch.timesteps, context, pooled)
        return weighted_mean(error.float(), pair.weights) + regulariser * size

    @contextmanager
    def acting(self, encoder: Encoder, offsets: Mapping[str, Offset]) -> Iterator[None]:
        """While it lasts, this encoder and these offsets are used, and the offsets act until something is predicted."""
        own = self.encoder, self.offsets
        self.encoder, self.offsets = encoder, offsets
        self.offsetting = offsets
        try:
            yield
        finally:
            self.encoder, self.offsets = own
            self._rest()

    def _rest(self) -> None:
        """Leaves the model as it is."""
        self.call, self.offsetting = None, {}

    def _offset(self, layer: str, weight: Tensor) -> Tensor:
        if layer not in self.offsetting:
            return weight
        with torch.autocast(self.device.type, enabled=False):  # which would round 1 + Δ to a step of 1/128
            return offset_weight(weight, self.offsetting[layer])

    def _together(self, context: Tensor, sentences: list[str], added: dict[str, Tensor]) -> Together:
        targets = context[range(len(context)), [self.places[sentence] for sentence in sentences]].detach()
        own = self.through(targets)
        edits = []
        for row, target in enumerate(targets):
            edit = Edit(target, self.super_input, {name: own[name][row] + added[name][row] for name in added})
            edits.append(Applied(edit, target @ self.precision, PLACEHOLDER, BIAS, TRAINING_TEMPERATURE))
        return Together(list(self.attentions), edits, context)

    def _super_input(self, clip: CLIP) -> Tensor:
        """The mean encoding (d), over the sentences, of the class word's last token, which has read the others."""
        more = len(next(iter(rows(clip, self.word).values()))) - 1
        found = [encode(clip, fill(sentence, self.word))[0][0, place + more] for sentence, place in self.places.items()]
        return torch.stack(found).float().mean(0).to(self.device)

    def _install(self) -> None:
        """Lets the private copy's layers compute with the offsets, and with the edit on top of them."""

        def edited(kind: str, name: str, forward, encodings: Tensor) -> Tensor:
            return getattr(self.call, kind)(name, forward, encodings) if self.call else forward(encodings)

        layers: dict[nn.Module, partial] = {}
        for name, attention in self.attentions.items():
            layers[attention.to_k] = partial(edited, "keys", name)
            layers[attention.to_v] = partial(edited, "values", name)
        self.installed.enter_context(overridden(offset_layers(self.model.diffusion_model, self._offset)))
        self.installed.enter_context(overridden(layers))
