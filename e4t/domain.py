"""The domain file, models/e4t/*.safetensors: an encoder and weight offsets as fp16 tensors with string metadata.

Tensors are `encoder.` and the name of a parameter, and `left.` or `right.` and a layer for the factors of its offset.
An imported encoder keeps the names of its release.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..training.contents import parsed, require_format, single_precision, with_metadata
from ..training.disk import read_whole
from ..training.names import checked_name, write_named
from .encoder import Encoder, Shape
from .imported import IMPORTED, ImportedEncoder
from .offsets import Offset
from .release import read_encoder

FORMAT = 1
ENDING = ".safetensors"
LARGEST = 512 * 2**20  # bytes
MOST = 2**16  # layers, levels, or numbers in a vector
MOST_LEVELS, MOST_RANK, MOST_SIDE = 64, 3, 4096
LAYER = re.compile(r"\w+(\.\w+)*\.attn[12]\.to_[qkv]", re.ASCII)
VALUE = re.compile(r"\w+(\.\w+)*", re.ASCII)


@dataclass(frozen=True, eq=False)
class Domain:
    """What pretraining learned of a class of things.

    `word` is the class word that predicted words start from, `scale` the size of an offset of 1 in the encoder's unit.
    `base` is the family of checkpoints. `text` is the fingerprint of the text encoder that it was learned on, `model`
    that of UNet and text encoder with their LoRAs, for the record; `vision` that of the CLIP vision that its encoder
    sees with, empty where it has a stem.
    """

    word: str
    base: str
    encoder: Encoder | ImportedEncoder
    offsets: Mapping[str, Offset]
    scale: float = 1.0
    model: str = ""
    text: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    vision: str = ""


def to_bytes(domain: Domain) -> bytes:
    """The file of a domain; equal domains give equal bytes. Raises ValueError for numbers that fp16 cannot hold."""
    data = with_metadata(
        safetensors.torch.save({name: t.cpu().half().contiguous() for name, t in _tensors(domain).items()}),
        {
            **domain.metadata,
            **domain.encoder.header(),
            "concepts.format": str(FORMAT),
            "concepts.method": "e4t",
            "concepts.class_word": domain.word,
            "concepts.encoder": domain.text,
            "e4t.model": domain.model,
            "e4t.scale": repr(domain.scale),
            "e4t.vision": domain.vision,
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{domain.base}/e4t",
            "modelspec.base_model": domain.base,
        },
    )
    from_bytes(data, domain.word)  # what could not be read again is not written
    return data


def digest(domain: Domain) -> str:
    """Tells domains apart, by the first numbers of every tensor."""
    found = hashlib.sha256(f"{domain.word} {domain.scale} {domain.vision}".encode())
    for name, tensor in _tensors(domain).items():
        found.update(name.encode() + tensor.reshape(-1)[:32].float().cpu().numpy().tobytes())
    return found.hexdigest()


def _tensors(domain: Domain) -> dict[str, Tensor]:
    tensors = {f"encoder.{name}": tensor for name, tensor in domain.encoder.tensors().items()}
    for layer, offset in domain.offsets.items():
        tensors |= {f"left.{layer}": offset.left, f"right.{layer}": offset.right}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def file_name(name: str, word: str) -> str:
    """What to call the file of a domain of `word`: `name`, or where that is empty the word, with - for its spaces.

    Raises ValueError for what cannot name a file.
    """
    return checked_name(name.strip() or "-".join(word.split()))


def save(domain: Domain, folder: Path, name: str, overwrite: bool = False) -> Path:
    """Writes `folder/name.safetensors` as `write_named` does."""
    return write_named(to_bytes(domain), folder, name, ENDING, overwrite)


def load(path: Path) -> Domain:
    """Reads a domain. Raises ValueError that says what is wrong."""
    return from_bytes(read_whole(path, LARGEST, "an E4T domain"), path.name)


def from_bytes(data: bytes, name: str) -> Domain:
    """Reads a domain out of the bytes of its file; `name` is what errors call it.

    Raises ValueError with one sentence unless every name, shape, type and number is what a domain has.
    """
    metadata, tensors = parsed(data, name)
    _check_header(name, metadata)
    read = READERS.get(metadata.get("e4t.kind", ""))
    if read is None:
        raise ValueError(f"{name} holds an encoder of the kind {metadata['e4t.kind'][:40]!r}, which this version of "
                         "the pack does not know; update ComfyUI-Concepts.")
    encoder = read(name, metadata, {key: t for key, t in tensors.items() if key.startswith("encoder.")})
    if encoder.needs_vision != bool(metadata.get("e4t.vision")):
        raise ValueError(f"{name} is damaged: an encoder has either a stem of its own or a CLIP vision, e4t.vision.")
    offsets = _offsets(name, {key: single_precision(name, key, t) for key, t in tensors.items()
                              if not key.startswith("encoder.")})
    return Domain(metadata.get("concepts.class_word", ""), metadata.get("modelspec.base_model", ""), encoder, offsets,
                  _scale(name, metadata), metadata.get("e4t.model", ""), metadata.get("concepts.encoder", ""), metadata,
                  metadata.get("e4t.vision", ""))


def _check_header(name: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("concepts.method") != "e4t":
        raise ValueError(f"{name} is not an E4T domain: its header names no such method.")
    require_format(name, metadata, FORMAT, "domain")
    if not metadata.get("concepts.class_word", "").strip():
        raise ValueError(f"{name} is damaged: it names no class word.")


def _shape(name: str, metadata: Mapping[str, str]) -> Shape:
    try:
        given = json.loads(metadata.get("e4t.shape", ""))
        shape = Shape(**{**given, "levels": tuple(given["levels"])})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: its e4t.shape is no shape of an encoder.") from error
    sizes = (*shape.levels, shape.unet, shape.side, shape.width, shape.code)
    parts = (shape.words, shape.values)
    if (not isinstance(shape.stem, bool) or not shape.levels or not all(isinstance(p, dict) and p for p in parts)
            or not all(VALUE.fullmatch(key) for part in parts for key in part)
            or not all(type(size) is int and 0 < size < MOST for size in (*sizes, *_all_sizes(parts)))
            or shape.stem and any(size % 8 for size in shape.levels) or len(shape.levels) > MOST_LEVELS
            or shape.side > MOST_SIDE):
        raise ValueError(f"{name} is damaged: its e4t.shape is no shape of an encoder.")
    return shape


def _all_sizes(parts: tuple[Mapping[str, int], ...]) -> list[int]:
    return [size for part in parts for size in part.values()]


def _encoder(name: str, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Encoder:
    shape = _shape(name, metadata)
    tensors = {key: single_precision(name, key, tensor) for key, tensor in tensors.items()}
    with torch.device("meta"):
        encoder = Encoder(shape)
    wanted = {f"encoder.{key}": tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key in sorted(wanted.keys() ^ found.keys()):
        raise ValueError(f"{name} is damaged: {'it lacks the tensor' if key in wanted else 'it also holds a tensor'} "
                         f"{key[:80]!r}.")
    for key, size in wanted.items():
        if found[key] != size:
            raise ValueError(f"{name} is damaged: {key!r} has the shape {found[key]}, not {size}.")
    encoder.load_state_dict({key.removeprefix("encoder."): tensor for key, tensor in tensors.items()}, assign=True)
    return encoder.requires_grad_(False).eval()


def _imported(name: str, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> ImportedEncoder:
    encoder = ImportedEncoder(read_encoder(name, {key.removeprefix("encoder."): t for key, t in tensors.items()}))
    for key in sorted(tensors.keys() - {f"encoder.{own}" for own in encoder.tensors()}):
        raise ValueError(f"{name} is damaged: it also holds a tensor {key[:80]!r}.")
    return encoder.requires_grad_(False).eval()


READERS = {"": _encoder, IMPORTED: _imported}


def _offsets(name: str, tensors: dict[str, Tensor]) -> dict[str, Offset]:
    layers = dict.fromkeys(key.partition(".")[2] for key in tensors)
    for key in tensors:
        if not re.fullmatch(r"left|right", key.partition(".")[0]) or not LAYER.fullmatch(key.partition(".")[2]):
            raise ValueError(f"{name} is not an E4T domain of format {FORMAT}: it holds a tensor {key[:80]!r}.")
    offsets = {}
    for layer in layers:
        left, right = (tensors.get(f"{side}.{layer}") for side in ("left", "right"))
        if left is None or right is None:
            raise ValueError(f"{name} is damaged: the offset of {layer} is not whole.")
        if left.ndim != 2 or right.ndim != 2 or not 1 <= left.shape[1] == right.shape[0] <= MOST_RANK:
            raise ValueError(f"{name} is damaged: the offset of {layer} has the shapes {tuple(left.shape)} and "
                             f"{tuple(right.shape)}.")
        offsets[layer] = Offset(left, right)
    return offsets


def _scale(name: str, metadata: Mapping[str, str]) -> float:
    try:
        scale = float(metadata.get("e4t.scale", ""))
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"{name} is damaged: its e4t.scale is {metadata.get('e4t.scale', '')[:20]!r}, not a number "
                         "above 0.")
    return scale
