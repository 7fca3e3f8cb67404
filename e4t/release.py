"""Domains that mkshing/e4t-diffusion trained: a folder of config.json, encoder.pt and weight_offsets.pt, read as it is.

Files are mapped rather than loaded, and pickles are read by torch's weights-only unpickler, which executes nothing.
A tuned folder has the whole UNet instead of its offsets, `unet.pt`, and may have `text_encoder.pt`. Any of these may
be a .safetensors file instead.
"""

import json
import math
import re
import zipfile
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear

from ..training.disk import read_pickle, read_safetensors

LARGEST_CONFIG = 2**20  # bytes; the released one has 374
WRAPPERS = re.compile(r"^((module|_orig_mod|e4t_encoder|unet)\.)+")  # before a name, where a wrapped module was saved
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VISION = "clip_vision."

Pair = tuple[Tensor, Tensor]


def _matrices() -> dict[str, str]:
    """What the release calls each of SD1.x's attention matrices -> ComfyUI's layer."""
    blocks = {f"down_blocks.{b}.attentions.{a}": f"input_blocks.{3 * b + a + 1}.1" for b in range(3) for a in range(2)}
    blocks["mid_block.attentions.0"] = "middle_block.1"
    blocks |= {f"up_blocks.{b}.attentions.{a}": f"output_blocks.{3 * b + a}.1" for b in range(1, 4) for a in range(3)}
    return {f"{theirs}.transformer_blocks.0.{attention}.wo_{part}": f"{ours}.transformer_blocks.0.{attention}.to_{part}"
            for theirs, ours in blocks.items() for attention in ("attn1", "attn2") for part in "qkv"}


MATRICES = _matrices()


@dataclass(frozen=True, eq=False)
class ImageLinears:
    """The matrices that a picture goes through, in the file's own precision; copies of an encoder share them."""

    feature: Pair
    firsts: list[Pair]

    def __deepcopy__(self, memo: dict) -> "ImageLinears":
        return self


class ReleasedEncoder(nn.Module):
    """The published encoder E(picture, UNet features) with everything that is linear in front of LeakyReLU collapsed.

    For the K image vectors h_k and the embedded UNet features u it is mean_k A_k (B_h h_k + B_u u + b) + a_k. What the
    picture adds to that is one vector; what the UNet adds is the matrix mean_k A_k · B_u. The parameters are what each
    sampling step needs; the image's own matrices stay where they lie, in the mapped file, and are read one after the
    other for each picture.
    """

    def __init__(self, embedder: tuple[Pair, Pair], feature: Pair, firsts: list[Pair], final: Pair):
        """Weight and bias of unet_feature_embedder.0 and .2, feature_linear, each of first_linears, final_linear."""
        super().__init__()
        width = len(feature[0])
        self.unet_feature_embedder = nn.Sequential(_layer(*embedder[0]), nn.LeakyReLU(), _layer(*embedder[1]))
        self.unet_linear = _layer(_mean(firsts) @ feature[0][:, width:].double())
        self.final_linear = _layer(*final)
        self.image_linears = ImageLinears(feature, firsts)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights under the release's names, as `read_encoder` takes them."""
        pairs = {"feature_linear": self.image_linears.feature,
                 **{f"first_linears.{k}": first for k, first in enumerate(self.image_linears.firsts)}}
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("unet_linear")}
        return own | {f"{name}.{part}": tensor for name, pair in pairs.items()
                      for part, tensor in zip(("weight", "bias"), pair, strict=True)}

    def image_part(self, pooled: Tensor, tokens: Tensor) -> Tensor:
        """What a picture adds at every timestep: pooled (b d), tokens (b p d) -> (b d).

        Of CLIP vision's last layer, `pooled` is the CLS token after ln_post and `tokens` are the p patches without CLS
        before ln_post, in reading order; every second of them counts, as in the published code. d is 1280 and p 256
        for ViT-H/14. Raises ValueError for features of another CLIP vision.
        """
        (weight, bias), firsts = self.image_linears.feature, self.image_linears.firsts
        width, patches = len(weight), 2 * (len(firsts) - 1)
        if pooled.shape[1:] != (width,) or tokens.shape != (len(pooled), patches, width):
            raise ValueError(f"This encoder hears a picture as one vector and {patches} patches of {width} numbers, "
                             f"not as {tuple(pooled.shape[1:])} and {tuple(tokens.shape[1:])}: use the CLIP vision "
                             "that it was trained with, ViT-H/14 for the released one.")
        heard = linear(torch.cat([pooled[:, None], tokens[:, 1::2]], 1).float(),
                       *_on(pooled.device, (weight[:, :width], bias)))
        total = torch.zeros_like(heard[:, 0])
        for vector, first in zip(heard.unbind(1), firsts, strict=True):
            total += linear(vector, *_on(pooled.device, first))
        return total / len(firsts)

    def forward(self, image_part: Tensor, unet_features: Tensor) -> Tensor:
        """The change of the domain word's vector before it is scaled by s: (b d), (b u) -> (b e).

        `unet_features` are the spatial means of the 12 skip tensors and of the middle block, in that order, of a pass
        under the empty prompt; u is 10880 for SD1.x. Raises ValueError for features of another UNet.
        """
        expected = self.unet_feature_embedder[0].in_features
        if unet_features.shape[-1] != expected:
            raise ValueError(f"This encoder hears a UNet as {expected} numbers, not {unet_features.shape[-1]}: use a "
                             "model of the base that it was trained with, Stable Diffusion 1.x for the released one.")
        return self.final_linear(leaky_relu(image_part + self.unet_linear(self.unet_feature_embedder(unet_features))))


@dataclass(frozen=True)
class Release:
    """A published or tuned domain. The word at a step is v = v(domain_word) + scale · encoder(…)."""

    domain_word: str
    placeholder: str
    scale: float
    prompt_template: str
    base: str  # as the release names it, such as CompVis/stable-diffusion-v1-4
    offsets: dict[str, Pair]  # by ComfyUI layer, left (out 3) and right (3 in): W' = W ⊙ (1 + left @ right)
    offset_error: float  # largest |left @ right - Δ| of all matrices, relative to the largest |Δ| of the matrix
    encoder: ReleasedEncoder
    clip_vision: dict[str, Tensor]  # under open_clip's names; empty where CLIP's own weights will do
    unet: dict[str, Tensor]  # under diffusers' names, before the offsets; empty unless the folder is a tuned one
    text_encoder: dict[str, Tensor]  # under transformers' names; empty unless it was tuned too


@dataclass(frozen=True)
class _Weights:
    file: str
    tensors: Mapping[str, Tensor]

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor of this shape, None being any size. Raises ValueError that names the file."""
        if name not in self.tensors:
            raise ValueError(f"{self.file} lacks {name!r}, which a release of E4T has; download or save it again.")
        tensor = self.tensors[name]
        found = tuple(tensor.shape)
        fits = len(found) == len(shape) and all(m > 0 and n in (None, m) for n, m in zip(shape, found, strict=True))
        fits = fits and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize  # not one number expanded
        if not fits or tensor.dtype not in FLOATS:
            wanted = tuple("any" if n is None else n for n in shape)
            raise ValueError(f"{self.file} is malformed: {name!r} has the shape {found} of {tensor.dtype}, "
                             f"where {wanted} of torch.float32 is expected.")
        return tensor

    def finite(self, name: str, *shape: int | None) -> Tensor:
        """As `take`, and every number in it is finite."""
        tensor = self.take(name, *shape)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{self.file} is damaged: {name!r} holds values that are not finite numbers.")
        return tensor

    def layer(self, name: str, out: int | None, into: int | None) -> Pair:
        """Weight (out in) and bias (out) of a linear layer."""
        weight = self.finite(f"{name}.weight", out, into)
        return weight, self.finite(f"{name}.bias", len(weight))


def read_encoder(name: str, tensors: Mapping[str, Tensor]) -> ReleasedEncoder:
    """The encoder of weights under the release's names. Raises ValueError that calls their file `name`."""
    with torch.inference_mode(False), torch.no_grad():
        return _encoder(_Weights(name, tensors))


def read_release(folder: Path) -> Release:
    """Reads a folder that mkshing/e4t-diffusion saved or released; large files stay mapped.

    Raises ValueError that names the file which is missing, malformed, damaged, or holds code.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; choose the one that holds config.json, encoder.pt and "
                         "weight_offsets.pt.")
    levels = _levels(folder / "config.json")
    pretrained = ChainMap(*reversed(levels))
    with torch.inference_mode(False), torch.no_grad():
        encoder, unet = _file(folder, "encoder"), _file(folder, "unet", "weight_offsets")
        offsets, error = _offsets(unet)
        return Release(
            domain_word=_text(pretrained, "domain_class_token"),
            placeholder=_text(pretrained, "placeholder_token", "*s"),
            scale=_scale(ChainMap(*levels)),  # the one that the weights were last trained with
            prompt_template=_text(pretrained, "prompt_template", "a photo of {placeholder_token}"),
            base=_text(pretrained, "pretrained_model_name_or_path", "runwayml/stable-diffusion-v1-5"),
            offsets=offsets,
            offset_error=error,
            encoder=_encoder(encoder),
            clip_vision=_vision(encoder, levels),
            unet={name: tensor for name, tensor in unet.tensors.items() if ".wo_" not in name},
            text_encoder=_file(folder, "text_encoder").tensors if _paths(folder, "text_encoder") else {},
        )


def _levels(path: Path) -> list[dict[str, Any]]:
    """What a config says: of the tuning, if there was one, and then of the pretraining, which is nested in it."""
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError("it is too large")
        config = json.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows write a mark first
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name}; put it beside encoder.pt.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read: {' '.join(str(error).split())}.") from error
    levels = []
    while isinstance(config, dict):
        levels.append({name: value for name, value in config.items() if value is not None})
        config = config.get("pretrained_args")
    if not levels:
        raise ValueError(f"{path.name} is malformed: it holds a {type(config).__name__} where settings are expected.")
    return levels


def _text(settings: Mapping[str, Any], name: str, default: str = "") -> str:
    value = settings.get(name, default)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"config.json says {repr(value)[:40]} for {name}; write a word there, such as \"face\".")
    return value.strip()


def _scale(settings: Mapping[str, Any]) -> float:
    value = settings.get("domain_embed_scale", 0.1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1000:
        raise ValueError(f"config.json says {repr(value)[:40]} for domain_embed_scale; "
                         "write a number above 0 and up to 1000, such as 0.1.")
    return float(value)


def _paths(folder: Path, *stems: str) -> list[Path]:
    paths = (folder / f"{stem}{ending}" for stem in stems for ending in (".safetensors", ".pt"))
    return [path for path in paths if path.is_file()]


def _file(folder: Path, *stems: str) -> _Weights:
    """The tensors of the first of these files that there is, without the prefixes of wrapped modules."""
    paths = _paths(folder, *stems)
    if not paths:
        raise ValueError(f"{folder} has no {stems[-1]}.pt; a release of E4T has it beside config.json.")
    path = paths[0]
    content = read_safetensors(path)[1] if path.suffix == ".safetensors" else _unpickled(path)
    return _Weights(path.name, {WRAPPERS.sub("", name): tensor for name, tensor in content.items()
                                if isinstance(name, str) and isinstance(tensor, Tensor)
                                and tensor.layout == torch.strided})


def _unpickled(path: Path) -> Mapping[Any, Any]:
    content = read_pickle(path, [], mmap=zipfile.is_zipfile(path))
    if not isinstance(content, Mapping):
        raise ValueError(f"{path.name} is malformed: it holds a {type(content).__name__} where weights are expected.")
    return content


def _offsets(weights: _Weights) -> tuple[dict[str, Pair], float]:
    """The offsets of all attention matrices as factors of rank 3, and the largest relative error of their products."""
    found, worst = {}, 0.0
    for name, layer in MATRICES.items():
        found[layer], error = _rank_three(weights, name)
        worst = max(worst, error)
    return found, worst


def _rank_three(weights: _Weights, name: str) -> tuple[Pair, float]:
    """Left (out 3), right (3 in) and the error of their product relative to the largest number of the published Δ.

    With x = linear1(v) and y = linear2(v), the published module applies linear_column (W_c, b_c) to the rows of y xᵀ
    and linear_row (W_r, b_r) to the columns of what that gives. Hence
    Δ = (W_r y)(W_c x)ᵀ + (W_r 1) b_cᵀ + b_r 1ᵀ, of rank 3 for any weights.
    """
    out, into = (weights.take(f"{name}.{part}.bias", None).numel() for part in ("linear_row", "linear_column"))
    row, row_bias = _doubles(weights.layer(f"{name}.linear_row", out, out))
    column, column_bias = _doubles(weights.layer(f"{name}.linear_column", into, into))
    v = weights.finite(f"{name}.v", 1).double()
    x = linear(v, *_doubles(weights.layer(f"{name}.linear1", into, 1)))
    y = linear(v, *_doubles(weights.layer(f"{name}.linear2", out, 1)))
    left = torch.stack([row @ y, row.sum(1), row_bias], 1).float()
    right = torch.stack([column @ x, column_bias, torch.ones_like(x)]).float()
    rows = linear(*map(Tensor.float, (torch.outer(y, x), column, column_bias)))
    published = row.float() @ rows + row_bias.float()[:, None]
    largest = published.abs().max().item()
    error = (published - left @ right).abs_().max().item()
    if not math.isfinite(error):
        raise ValueError(f"{weights.file} is damaged: the numbers of {name!r} are too large to multiply.")
    return (left, right), error / largest if largest else error


def _encoder(weights: _Weights) -> ReleasedEncoder:
    count = sum(name.startswith("first_linears.") and name.endswith(".weight") for name in weights.tensors)
    if not count and "linear.weight" in weights.tensors:
        raise ValueError(f"{weights.file} is of e4t-diffusion before April 2023, whose encoder was another; "
                         "only the one that was released can be imported.")
    final = weights.layer("final_linear", None, None)
    width = final[0].shape[1]
    firsts = [(weights.take(f"first_linears.{k}.weight", width, width),
               weights.finite(f"first_linears.{k}.bias", width)) for k in range(max(count, 1))]
    embedder = (weights.layer("unet_feature_embedder.0", width, None),
                weights.layer("unet_feature_embedder.2", width, width))
    encoder = ReleasedEncoder(embedder, weights.layer("feature_linear", width, 2 * width), firsts, final)
    if not bool(encoder.unet_linear.weight.isfinite().all()):
        raise ValueError(f"{weights.file} is damaged: 'first_linears' hold values that are not finite numbers.")
    return encoder


def _vision(weights: _Weights, levels: list[dict[str, Any]]) -> dict[str, Tensor]:
    """CLIP's weights as they were saved, unless the config says of every training that it left them frozen."""
    if not any(level.get("unfreeze_clip_vision", True) for level in levels):
        return {}
    return {name.removeprefix(VISION): tensor for name, tensor in weights.tensors.items() if name.startswith(VISION)}


def _mean(firsts: list[Pair]) -> Tensor:
    """The mean of their weights, in double precision."""
    total = torch.zeros(firsts[0][0].shape, dtype=torch.float64)
    for weight, _ in firsts:
        total += weight
    return total / len(firsts)


def _layer(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with its own copy of these numbers in single precision."""
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(torch.float32, copy=True))
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(torch.float32, copy=True))
    return layer


def _doubles(pair: Pair) -> Pair:
    weight, bias = pair
    return weight.double(), bias.double()


def _on(device: torch.device, pair: Pair) -> Pair:
    weight, bias = pair
    return weight.to(device, torch.float32), bias.to(device, torch.float32)
