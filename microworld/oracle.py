"""The judge: what is in a picture of the sample world (TXT) and whose look it has (ID).

TXT is the share of a prompt's factors that a classifier finds in the picture. ID is the cosine between identity
embeddings, pooled over the subject's predicted mask, of a picture and of real renders. They play the parts of CLIP's
text and image similarity in this world and mean nothing outside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import einsum, rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .scene import BACKGROUNDS, COLOURS, PATTERNS, RELATIONS, Scene
from .shapes import CLASSES

WEIGHTS = Path(__file__).parent / "weights" / "oracle" / "oracle.safetensors"
PAIR_WEIGHTS = WEIGHTS.with_name("pairs.safetensors")
OTHER, NONE = "other", "none"

FACTORS: dict[str, tuple[str, ...]] = {
    "class": CLASSES,
    "colour": (*COLOURS, OTHER),
    "pattern": (*PATTERNS, OTHER),
    "hat": (NONE, "hat"),
    "background": BACKGROUNDS,
    "relation": (NONE, *RELATIONS),
    "second class": (NONE, *CLASSES),
    "second colour": (NONE, *COLOURS),
}


def factors(scene: Scene) -> dict[str, str]:
    """The true value of every factor of a scene."""
    first, second = scene.first, scene.second
    return {
        "class": first.kind,
        "colour": first.look.colour or OTHER,
        "pattern": OTHER if first.look.tones else first.look.pattern,
        "hat": "hat" if first.hat else NONE,
        "background": scene.background,
        "relation": scene.relation or NONE,
        "second class": second.kind if second else NONE,
        "second colour": second.look.colour if second else NONE,
    }


def _block(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


@dataclass(frozen=True)
class Reading:
    """What the oracle sees: logits by factor (b, n), masks of both things (b, 2, h, w), features (b, c, h, w)."""

    logits: dict[str, Tensor]
    masks: Tensor
    features: Tensor


class Oracle(nn.Module):
    """A small convolutional classifier with a mask head and an identity head, on 128 px pictures in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, 24, 2), _block(24, 48, 2), _block(48, 48))
        self.body = nn.Sequential(_block(48, 96, 2), _block(96, 96), _block(96, 96))
        self.top = nn.Sequential(_block(96, 128, 2), _block(128, 128), nn.Conv2d(128, 40, 1))
        self.trunk = nn.Sequential(nn.Linear(40 * 8 * 8, 256), nn.ReLU(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({name.replace(" ", "_"): nn.Linear(256, len(v)) for name, v in FACTORS.items()})
        self.mask = nn.Conv2d(96 + 48, 2, 3, padding=1)
        self.identity_features = nn.Sequential(_block(96, 96), _block(96, 96))
        self.identity_head = nn.Sequential(nn.Linear(2 * 96, 128), nn.ReLU(), nn.Linear(128, 48))

    def forward(self, images: Tensor) -> Reading:
        """Read pictures (b, 3, 128, 128)."""
        low = self.stem(images - 0.5)
        middle = self.body(low)
        trunk = self.trunk(self.top(middle).flatten(1))
        logits = {name: self.heads[name.replace(" ", "_")](trunk) for name in FACTORS}
        wide = torch.cat([low, F.interpolate(middle, scale_factor=2.0)], 1)
        return Reading(logits, self.mask(wide), self.identity_features(middle))

    def identity(self, reading: Reading, mask: Tensor | None = None) -> Tensor:
        """Unit identity embeddings (b, 48) of the first thing, pooled under its mask (b, h, w) in 0..1."""
        mask = reading.masks[:, 0].sigmoid().detach() if mask is None else mask
        mask = F.interpolate(mask[:, None], reading.features.shape[-2:], mode="area")[:, 0]
        weight = mask / mask.sum((1, 2), keepdim=True).clamp_min(1e-3)
        mean = einsum(reading.features, weight, "b c h w, b h w -> b c")
        peak = (reading.features * mask[:, None]).amax((2, 3))
        return F.normalize(self.identity_head(torch.cat([mean, peak], 1)), dim=1)


def load(weights: Path = WEIGHTS) -> Oracle:
    """The trained oracle, in evaluation mode; that of PAIR_WEIGHTS also knows two nameless looks in one picture."""
    oracle = Oracle()
    oracle.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    return oracle.eval()


@torch.inference_mode()
def read(oracle: Oracle, images: Tensor) -> list[dict[str, str]]:
    """The likeliest value of every factor of each picture; images (b, h, w, 3) in 0..1."""
    logits = oracle(_prepare(images)).logits
    found = {name: [FACTORS[name][i] for i in values.argmax(1)] for name, values in logits.items()}
    return [{name: values[i] for name, values in found.items()} for i in range(len(images))]


def satisfied(oracle: Oracle, images: Tensor, wanted: list[dict[str, str]]) -> Tensor:
    """TXT: the share of each prompt's factors found in its picture. images (b, h, w, 3) in 0..1 -> (b,)."""
    pairs = zip(read(oracle, images), wanted, strict=True)
    return torch.tensor([sum(found[k] == v for k, v in want.items()) / len(want) for found, want in pairs])


@torch.inference_mode()
def embed(oracle: Oracle, images: Tensor, masks: Tensor | None = None) -> Tensor:
    """Identity embeddings (b, 48) of pictures (b, h, w, 3); masks (b, h, w) say where the subject is, if known."""
    return oracle.identity(oracle(_prepare(images)), masks)


def similarity(oracle: Oracle, images: Tensor, real: Tensor) -> Tensor:
    """ID: the mean cosine of each picture (b, h, w, 3) to real renders (n, h, w, 3) of the concept -> (b,)."""
    return (embed(oracle, images) @ embed(oracle, real).T).mean(1)


def _prepare(images: Tensor) -> Tensor:
    images = rearrange(images[..., :3].float(), "b h w c -> b c h w")
    return images if images.shape[-1] == 128 else F.interpolate(images, (128, 128), mode="area")
