"""The file of a concept that tuning the whole model learned: a word and a difference, as fp16 tensors with metadata.

Tensors are `word.` and a text encoder; `left.`, `right.`, `up.` or `down.` and a layer.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ..textual_inversion.concept import Concept, Word
from ..textual_inversion.file import LONGEST, placeholder_in
from ..textual_inversion.formats import ENCODERS
from ..training.contents import half_precision, parsed, require_format, single_precision, with_metadata
from ..training.disk import read_whole
from ..training.names import write_named
from .difference import Difference, LowRank
from .offsets import Offset

FORMAT, METHOD = 1, "e4t"
ENDING = ".safetensors"
LARGEST = 64 * 2**20  # bytes; SDXL at rank 4 takes 18 MB
MOST_RANK = 128
NAME = re.compile(rf"word\.({'|'.join(ENCODERS)})|(left|right|up|down)\.\w+(\.\w+)*\.attn[12]\.to_([qkv]|out\.0)",
                  re.ASCII)
KIND = "e4t difference"


def to_bytes(concept: Concept) -> bytes:
    """The file of a concept with one word and a difference; equal concepts give equal bytes.

    Raises ValueError for another kind of concept, or for numbers that half precision cannot hold.
    """
    if len(concept.words) != 1 or not isinstance(concept.edit, Difference):
        raise ValueError(f"This file holds one word and a difference of the model; this concept has "
                         f"{len(concept.words)} words and {type(concept.edit).__name__}.")
    (word,) = concept.words
    tensors = {f"word.{encoder}": vectors for encoder, vectors in word.vectors.items()}
    for layer, offset in concept.edit.offsets.items():
        tensors |= {f"left.{layer}": offset.left, f"right.{layer}": offset.right}
    for layer, added in concept.edit.added.items():
        tensors |= {f"up.{layer}": added.up, f"down.{layer}": added.down}
    data = with_metadata(
        safetensors.torch.save(half_precision(word.placeholder, tensors)),
        {
            **concept.metadata,
            "concepts.format": str(FORMAT),
            "concepts.method": METHOD,
            "concepts.kind": KIND,
            "concepts.placeholder": word.placeholder,
            "concepts.class_word": word.class_word,
            "trained_words": json.dumps([word.placeholder]),
        },
    )
    from_bytes(data, word.placeholder)  # what could not be read again is not written
    return data


def save(concept: Concept, folder: Path, name: str, overwrite: bool = False) -> Path:
    """Writes `folder/name.safetensors` as `write_named` does."""
    return write_named(to_bytes(concept), folder, name, ENDING, overwrite)


def load(path: Path, placeholder: str = "") -> Concept:
    """Reads a concept; `placeholder` replaces the one in the file. Raises ValueError that says what is wrong."""
    return from_bytes(read_whole(path, LARGEST, "a concept"), path.name, placeholder)


def is_difference(metadata: Mapping[str, str]) -> bool:
    """Whether a header is that of such a file."""
    return metadata.get("concepts.kind") == KIND


def from_bytes(data: bytes, name: str, placeholder: str = "") -> Concept:
    """Reads a concept out of the bytes of its file; `name` is what errors call it.

    Raises ValueError with one sentence unless every name, shape, type and number is what such a concept has.
    """
    metadata, tensors = parsed(data, name)
    if not is_difference(metadata):
        raise ValueError(f"{name} is not a tuned E4T concept: its header names no such kind.")
    require_format(name, metadata, FORMAT, "concept")
    held = {key: _checked(name, key, tensor) for key, tensor in tensors.items()}
    word = {key.removeprefix("word."): tensor for key, tensor in held.items() if key.startswith("word.")}
    if not word or len({len(vectors) for vectors in word.values()}) != 1 or len(next(iter(word.values()))) > LONGEST:
        raise ValueError(f"{name} is damaged: it holds no whole word.")
    offsets = {layer: Offset(*pair) for layer, pair in _pairs(name, held, "left", "right").items()}
    added = {layer: LowRank(*pair) for layer, pair in _pairs(name, held, "up", "down").items()}
    written = placeholder_in(name, metadata, placeholder)
    return Concept((Word(written, metadata.get("concepts.class_word", ""), word),),
                   Difference(offsets, added), metadata)


def _checked(name: str, key: str, tensor: Tensor) -> Tensor:
    """The tensor in single precision, if such a concept may hold one of this name, type and shape."""
    if not NAME.fullmatch(key):
        raise ValueError(f"{name} is not a concept of format {FORMAT}: it holds a tensor {key[:80]!r}.")
    if tensor.ndim != 2 or 0 in tensor.shape:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is damaged: {key!r} is {kind} of the shape {tuple(tensor.shape)}.")
    return single_precision(name, key, tensor)


def _pairs(name: str, held: Mapping[str, Tensor], first: str, second: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The two factors (out r) and (r in) of each layer."""
    layers = dict.fromkeys(key.partition(".")[2] for key in held if key.partition(".")[0] in (first, second))
    pairs = {}
    for layer in layers:
        one, two = held.get(f"{first}.{layer}"), held.get(f"{second}.{layer}")
        if one is None or two is None or not one.shape[1] == len(two) <= MOST_RANK:
            raise ValueError(f"{name} is damaged: {first} and {second} of {layer} do not go together.")
        pairs[layer] = one, two
    return pairs
