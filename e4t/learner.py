"""What a domain is learned with: its settings, and encoder and offsets as steps improve them."""

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import cos, isfinite, pi

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..host.cross_attention import sizes
from ..host.sockets import CLIP, ModelPatcher
from ..host.text import encode, widths
from ..host.unet_features import unet_features
from ..host.weight_offsets import matrix_shapes
from ..training.states import States
from .domain import Domain
from .encoder import Encoder, Shape
from .method import Predictor
from .offsets import Offset, new_offsets
from .recognition import recognise
from .samples import Pair, Samples
from .validation import to_device
from .workers import Workers

LOST = 10  # steps in a row without a gradient that can be used


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a domain learns, besides the models and the pictures.

    It ends after `steps` steps or `minutes` minutes, whichever comes first (0: no such end). Rates fall to nothing
    along a half cosine. `edited` is the share of steps that learn the word with its predicted values, `regulariser` the
    weight λ of how far predictions are from the class word, `times` as in `draw_pair`, `average` the most that the
    moving average of the parameters keeps of itself. A stem of its own first learns to tell subjects apart for
    `recognition` steps, but no more than `steps`, and from then on at the share `stem` of `rate`.
    """

    word: str
    steps: int = 0
    minutes: float = 0.0
    batch_size: int = 16
    rate: float = 1e-3
    stem: float = 0.1
    offset_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    regulariser: float = 1e-3
    scale: float = 1.0
    edited: float = 0.5
    offsets: bool = True
    times: float = 0.6
    average: float = 0.999
    recognition: int = 150
    seed: int = 0
    levels: tuple[int, ...] = (24, 48, 96, 160)
    side: int = 128


class Learner:
    """Encoder and offsets as they are trained, and their moving average, which is what is kept."""

    def __init__(self, unet: ModelPatcher, clip: CLIP, recipe: Recipe, metric: Tensor, samples: Samples,
                 start: Domain | None) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, unet.load_device
        heard = (samples.pictures.shape[3],) * samples.pictures.shape[2] if samples.vision else ()
        self.encoder = Encoder(shape_of(unet, clip, recipe, heard)).to(self.device)
        fresh = new_offsets(matrix_shapes(unet), recipe.seed) if recipe.offsets else {}
        if start:
            fresh = {name: start.offsets.get(name, offset) for name, offset in fresh.items()}
            self._go_on_from(start, samples.vision)
        self.offsets = {name: Offset(*(f.to(self.device).requires_grad_() for f in (offset.left, offset.right)))
                        for name, offset in fresh.items()}
        self.predictor = Predictor(unet, clip, recipe.word, self.encoder, self.offsets, recipe.scale, metric)
        factors = [factor for offset in self.offsets.values() for factor in (offset.left, offset.right)]
        self.trained = [*self.encoder.parameters(), *factors]
        self.mean = [parameter.detach().clone() for parameter in self.trained]
        self.clock = torch.zeros(1, dtype=torch.float64)
        self.lost = 0  # steps in a row that moved nothing
        heard = self.encoder.heard_parameters()
        others = [p for p in self.encoder.parameters() if not any(p is own for own in heard)]
        self.peaks = (recipe.stem * recipe.rate, recipe.rate, recipe.offset_rate, 0.0)
        groups = [{"params": params, "lr": peak} for params, peak in zip(
            (heard, others, factors, [*self.mean, self.clock]),  # the last no gradient moves but a state must hold
            self.peaks, strict=True)]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)

    def _go_on_from(self, start: Domain, vision: str) -> None:
        if start.encoder.shape != self.encoder.shape:
            raise ValueError(f"The domain {start.word!r} has an encoder of another shape: go on from one of this base "
                             "and these levels, or from nothing.")
        if start.vision != vision:
            raise ValueError(f"The domain {start.word!r} hears another CLIP vision ({start.vision}) than this one "
                             f"({vision}): go on with the same, or from nothing.")
        self.encoder.load_state_dict(start.encoder.state_dict())

    def recognise(self, samples: Samples, workers: Workers) -> None:
        """Teaches a new stem to tell subjects apart."""
        started = time.monotonic()
        recognise(self.encoder, samples, min(self.recipe.recognition, self.recipe.steps or self.recipe.recognition),
                  self.recipe.seed)
        workers.average(parameter.data for parameter in self.encoder.heard_parameters())
        for mean, parameter in zip(self.mean, self.trained, strict=True):
            mean.copy_(parameter.detach())
        self.clock += time.monotonic() - started

    def restore(self, states: States, workers: Workers) -> list[float]:
        """Goes on from the first process's newest state, which others may not see; the losses up to it."""
        losses = states.restore(self.optimiser) if workers.first else []
        tensors = [tensor for group in self.optimiser.param_groups for tensor in group["params"]]
        held = {number: {name: value.cpu() for name, value in own.items()}
                for number, own in self.optimiser.state_dict()["state"].items()}
        losses, values, held = workers.of_first((losses, [tensor.detach().cpu() for tensor in tensors], held))
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": held})
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data.copy_(value)
        return losses

    def step(self, pairs: Sequence[Pair], number: int, done: float, workers: Workers, bf16: bool) -> float:
        """One step at the share `done` of the whole, on a batch in equal parts; returns its loss.

        It moves nothing when the loss or the averaged gradient, which all processes have alike, is not finite. Raises
        ValueError at the tenth such step in a row.
        """
        factor = min(1.0, (number + 1) / (self.recipe.warmup + 1)) * (0.5 + 0.5 * cos(pi * done))
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimiser.zero_grad()
        value = torch.zeros((), device=self.device)
        for pair in pairs:
            with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    loss = self.predictor.loss(to_device(pair, self.device), is_edited(number, self.recipe.edited),
                                               self.recipe.regulariser).mean() / len(pairs)
                loss.backward()
            value += loss.detach()
        workers.average([value, *(p.grad for p in self.trained if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        if not isfinite(value.item()) or not isfinite(norm.item()):
            self.lost += 1
            if self.lost == LOST:
                raise ValueError(f"The loss stopped being a number at step {number + 2 - LOST}; a lower rate than "
                                 f"{self.recipe.rate:g} usually helps.")
            return value.item()
        self.lost = 0
        self.optimiser.step()
        kept = min(self.recipe.average, (1 + number) / (10 + number))
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.trained], 1 - kept)
        return value.item()

    def sound(self) -> bool:
        """Whether there is something to go on from: all numbers are finite, and not only since the loss was lost."""
        return self.lost < LOST and all(bool(tensor.isfinite().all()) for tensor in (*self.trained, *self.mean))

    def averaged(self) -> tuple[Encoder, dict[str, Offset]]:
        """Encoder and offsets of the moving average, as values of their own."""
        encoder = copy.deepcopy(self.encoder)
        mean = [tensor.clone() for tensor in self.mean]
        names = [name for name, _ in encoder.named_parameters()]
        encoder.load_state_dict(dict(zip(names, mean, strict=False)))
        factors = iter(mean[len(names):])
        return encoder, {name: Offset(next(factors), next(factors)) for name in self.offsets}


def is_edited(step: int, share: float) -> bool:
    """Whether this step learns with the values: as evenly as `share` allows."""
    return int((step + 1) * share) > int(step * share)


def shape_of(unet: ModelPatcher, clip: CLIP, recipe: Recipe, heard: tuple[int, ...] = ()) -> Shape:
    """The shape of a new encoder for these models, with a stem of its own unless it hears vectors of CLIP vision."""
    channels = unet.model.latent_format.latent_channels
    nothing = torch.zeros(1, channels, 64, 64, device=unet.load_device)
    level = torch.zeros(1, dtype=torch.long, device=unet.load_device)
    features = unet_features(unet.model, nothing, nothing, level, *encode(clip, ""))
    return Shape(heard or recipe.levels, features.shape[1], widths(clip),
                 {name: given for name, (_, given) in sizes(unet).items()}, stem=not heard, side=recipe.side)
