"""The encoder of a domain (E4T, arXiv 2302.12228): a picture and what the UNet makes of it, to a word and its values.

Pure torch. The paper's encoder hears the CLS token of every second CLIP layer; where a domain has no CLIP vision, a
small convolutional stem of its own takes its place, with one vector for each of its levels.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Protocol

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from ..textual_inversion.word import row_size

SLOPE = 0.01


@dataclass(frozen=True)
class Shape:
    """What an encoder hears and says.

    `levels` are the sizes of the vectors that a picture gives, one for each level; with a stem of its own (`stem`)
    they are its channels, and pictures are `side` pixels wide. `unet` counts the UNet's features. `words` is how many
    numbers a vector of each text encoder has, `values` those of each cross-attention layer by its name. `width` is the
    size of the common vector, `code` of what all layers' values share.
    """

    levels: tuple[int, ...]
    unet: int
    words: Mapping[str, int]
    values: Mapping[str, int]
    stem: bool = True
    side: int = 128
    width: int = 256
    code: int = 64


@dataclass(frozen=True, eq=False)
class Predicted:
    """Offsets: of the class word's rows (b d), by text encoder and in the encoder's unit; and of W_V i* (b d_l), by
    layer and in root mean squares of the super-category's values, for the layers that it speaks of."""

    words: Mapping[str, Tensor]
    values: Mapping[str, Tensor]


class Vision(Protocol):
    """A CLIP vision, as `host.clip_vision` has it."""

    fingerprint: str
    side: int

    def layers(self, pictures: Tensor) -> Tensor: ...

    def patches(self, pictures: Tensor) -> tuple[Tensor, Tensor]: ...


class Encoder(nn.Module):
    """Starts by predicting the class word itself: its last layers are zero."""

    factor_rate = 2e-3  # of weight offsets and low-rank differences when the whole model is tuned in few steps
    tuning_rate = 0.2  # then: of the encoder, in shares of that
    word_rate = 0.35  # and of what is added to its words, in its unit
    times = 0.6  # and of the noise levels, as in `draw_pair`
    start, kept = 0.5, 0.7  # and the shares of what it predicts at first, and of what is learned at last
    hears_offsets = False  # pretraining lets it hear the plain model

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.stem = Stem(shape.levels) if shape.stem else None
        self.levels = nn.ModuleList(nn.Linear(size, shape.width) for size in shape.levels)
        self.unet_norm = nn.LayerNorm(shape.unet)
        self.unet = nn.Linear(shape.unet, shape.width)
        self.middle = nn.Linear(shape.width, shape.width)
        self.words = nn.ModuleDict({name: nn.Linear(shape.width, size) for name, size in shape.words.items()})
        self.code = nn.Linear(shape.width, shape.code)
        self.values = nn.Linear(shape.code, sum(shape.values.values()))
        for layer in (*self.words.values(), self.values):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def needs_vision(self) -> bool:
        """Whether it sees through CLIP vision."""
        return self.stem is None

    def tensors(self) -> dict[str, Tensor]:
        """What its file holds."""
        return self.state_dict()

    def header(self) -> dict[str, str]:
        """What the header of its file says."""
        return {"e4t.shape": json.dumps(asdict(self.shape), separators=(",", ":"))}

    def heard_parameters(self) -> list[nn.Parameter]:
        """What turns a picture into the image part, where a stem of its own has to learn to see."""
        return [*self.stem.parameters(), *self.levels.parameters()] if self.stem else []

    def seen(self, pictures: Tensor, vision: Vision | None) -> Tensor:
        """What `image_part` takes of pictures (b h w 3) in 0..1: themselves at the stem's size (b side side 3), or
        without a stem CLIP vision's CLS tokens (b l d)."""
        return vision.layers(pictures) if self.stem is None else to_shown(pictures, self.shape.side)

    def unit(self, rows: Tensor) -> float:
        """What a predicted 1 means beside the class word's rows (t d): the root mean square of their numbers."""
        return row_size(rows)

    def image_part(self, seen: Tensor) -> Tensor:
        """What a picture adds whatever the timestep (b width): the mean over levels of each one's linear layer."""
        if self.stem is None:
            heard = seen.float().unbind(1)
        else:
            heard = self.stem(rearrange(seen, "b h w c -> b c h w").float(), self.shape.side)
        return torch.stack([layer(level) for layer, level in zip(self.levels, heard, strict=True)]).mean(0)

    def forward(self, image_part: Tensor, unet_features: Tensor) -> Predicted:
        """(b width), (b u) -> offsets."""
        heard = leaky_relu(image_part + self.unet(self.unet_norm(unet_features)), SLOPE)
        common = leaky_relu(self.middle(heard), SLOPE)
        values = self.values(self.code(common)).split(list(self.shape.values.values()), 1)
        return Predicted({name: layer(common) for name, layer in self.words.items()},
                         dict(zip(self.shape.values, values, strict=True)))


def to_shown(pictures: Tensor, side: int) -> Tensor:
    """Pictures (b h w 3) in 0..1 at the size of a stem."""
    if pictures.shape[1:3] == (side, side):
        return pictures
    resized = interpolate(rearrange(pictures, "b h w c -> b c h w"), (side, side), mode="bilinear", antialias=True)
    return rearrange(resized, "b c h w -> b h w c")


class Stem(nn.Module):
    """Convolutions that halve a picture at each level; each level gives one vector by attention over its places."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels[0], 4, 2, 1)
        self.blocks = nn.ModuleList(_Block(before, after) for before, after in pairwise((channels[0], *channels)))
        self.looks = nn.ModuleList(nn.Conv2d(size, 1, 1) for size in channels)

    def forward(self, pictures: Tensor, side: int) -> list[Tensor]:
        """Pictures (b 3 h w) in 0..1 to one vector (b d) for each level."""
        if pictures.shape[-2:] != (side, side):
            pictures = interpolate(pictures, (side, side), mode="bilinear", antialias=True)
        x, vectors = self.first(pictures * 2 - 1), []
        for block, look in zip(self.blocks, self.looks, strict=True):
            x = block(x)
            attention = look(x).flatten(1).softmax(1)
            vectors.append(einsum(x.flatten(2), attention, "b c p, b p -> b c"))
        return vectors


class _Block(nn.Module):
    """Half the size, then a residual pair of convolutions."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(before, after, 3, 2, 1)
        self.norm = nn.GroupNorm(8, after)
        self.conv1 = nn.Conv2d(after, after, 3, 1, 1)
        self.norm1 = nn.GroupNorm(8, after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.down(leaky_relu(x, SLOPE)))
        return x + self.conv2(leaky_relu(self.norm1(self.conv1(leaky_relu(x, SLOPE))), SLOPE))
