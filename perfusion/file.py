"""The concept file: a word and its edit as fp16 tensors with string metadata, about 32 KB for SD1.x."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..textual_inversion.concept import Concept, Word
from ..textual_inversion.file import LONGEST, checked_name, free_path, parsed, with_metadata
from ..textual_inversion.formats import ENCODERS
from ..textual_inversion.word import PLACEHOLDER, check_placeholder
from ..training.disk import write_whole
from .concept import Edit

FORMAT = 1
ENDING = ".safetensors"
LARGEST = 8 * 2**20  # bytes; a concept for SDXL with trained keys and a cover takes half a million
NAME = re.compile(rf"(word)\.({'|'.join(ENCODERS)})|(values|keys)\.([A-Za-z0-9_.]+)|target_input|super_input")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def to_bytes(concept: Concept) -> bytes:
    """The file of a concept with one word and an edit; equal concepts give equal bytes.

    Raises ValueError for another kind of concept, or for numbers that half precision cannot hold.
    """
    if len(concept.words) != 1 or concept.edit is None:
        raise ValueError(f"A concept file holds one word and its edit; this concept has {len(concept.words)} words and "
                         f"{'no' if concept.edit is None else 'an'} edit.")
    (word,) = concept.words
    edit: Edit = concept.edit
    tensors = {f"word.{encoder}": vectors for encoder, vectors in word.vectors.items()}
    tensors |= {"target_input": edit.target_input, "super_input": edit.super_input}
    for kind, vectors in (("values", edit.values), ("keys", edit.keys)):
        tensors |= {f"{kind}.{layer}": vector for layer, vector in vectors.items()}
    data = with_metadata(
        safetensors.torch.save({name: t.detach().cpu().half().contiguous() for name, t in tensors.items()}),
        {
            **concept.metadata,
            "concepts.format": str(FORMAT),
            "concepts.method": "perfusion",
            "concepts.placeholder": word.placeholder,
            "concepts.class_word": word.class_word,
            "concepts.presence": f"{edit.presence:.4f}",
            "concepts.encoder": edit.encoder,
            "trained_words": json.dumps([word.placeholder]),
        },
    )
    from_bytes(data, word.placeholder)  # what could not be read again is not written
    return data


def save(concept: Concept, folder: Path, name: str, overwrite: bool = False) -> Path:
    """Writes `folder/name.safetensors`, whole or not at all, and returns its path.

    A name that is taken gets a counter unless `overwrite`. Raises ValueError for a name that cannot be one, or with
    the reason when the disk refuses.
    """
    data = to_bytes(concept)
    path = free_path(folder, checked_name(name), ENDING, overwrite)
    write_whole(path, data)
    return path


def load(path: Path, placeholder: str = "") -> Concept:
    """Reads a concept; `placeholder` replaces the one in the file. Raises ValueError that says what is wrong."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ValueError(f"{path.name} is not a concept: it is {size >> 20} MB large.")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} is not a readable safetensors file: {error.strerror or error}.") from error
    return from_bytes(data, path.name, placeholder)


def from_bytes(data: bytes, name: str, placeholder: str = "") -> Concept:
    """Reads a concept out of the bytes of its file; `name` is what errors call it.

    Raises ValueError with one sentence unless every name, shape, type and number is what a concept has.
    """
    metadata, tensors = parsed(data, name)
    _check_header(name, metadata)
    vectors = {key: _checked(name, key, tensor) for key, tensor in tensors.items()}
    for key in ("target_input", "super_input"):
        if key not in vectors:
            raise ValueError(f"{name} is damaged: it lacks the tensor {key!r}.")
    word, values, keys = (_part(vectors, kind) for kind in ("word", "values", "keys"))
    _check_together(name, vectors["target_input"], vectors["super_input"], word, values, keys)
    edit = Edit(vectors["target_input"], vectors["super_input"], values, keys, _presence(name, metadata),
                metadata.get("concepts.encoder", ""))
    written = _placeholder(name, metadata, placeholder)
    return Concept((Word(written, metadata.get("concepts.class_word", ""), word),), edit, metadata)


def check_fits(concept: Concept, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raises ValueError unless the edit has what every layer of a model needs; `sizes` are in and out by layer."""
    edit: Edit = concept.edit
    (word,) = concept.words
    base = concept.metadata.get("modelspec.base_model", "another base")
    said = f"{word.placeholder} was learned on {base}; this model"
    for layer in edit.values:
        if layer not in sizes:
            raise ValueError(f"{said} has no layer {layer}: load a checkpoint of that base.")
    for layer, (taken, given) in sizes.items():
        if layer not in edit.values:
            raise ValueError(f"{said} also has a layer {layer}: load a checkpoint of that base.")
        if len(edit.target_input) != taken or len(edit.values[layer]) != given:
            raise ValueError(f"{said} has {taken} × {given} numbers in {layer} where the concept has "
                             f"{len(edit.target_input)} × {len(edit.values[layer])}: load a checkpoint of that base.")


def _check_header(name: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("concepts.method") != "perfusion":
        raise ValueError(f"{name} is not a Perfusion concept: its header names no such method.")
    version = metadata.get("concepts.format", "")
    if version != str(FORMAT):
        mend = "update ComfyUI-Concepts" if re.fullmatch("[1-9][0-9]*", version) else "it is damaged"
        raise ValueError(f"{name} has concept format {version[:20]!r} and this version of the pack reads {FORMAT}; "
                         f"{mend}.")


def _checked(name: str, key: str, tensor: Tensor) -> Tensor:
    """The tensor in single precision, if a concept may hold one of this name, type and shape."""
    if not NAME.fullmatch(key):
        raise ValueError(f"{name} is not a concept of format {FORMAT}: it holds a tensor {key[:80]!r}.")
    dimensions = 2 if key.startswith("word.") else 1
    if tensor.ndim != dimensions or 0 in tensor.shape or tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is damaged: {key!r} is {kind} of the shape {tuple(tensor.shape)}.")
    with torch.inference_mode(False):
        tensor = tensor.to(torch.float32, copy=True)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} is damaged: {key!r} holds values that are not finite numbers.")
    return tensor


def _part(vectors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors `kind.….` by the rest of their names."""
    return {key.removeprefix(f"{kind}."): tensor for key, tensor in vectors.items() if key.startswith(f"{kind}.")}


def _check_together(name: str, target: Tensor, super_input: Tensor, word: Mapping[str, Tensor],
                    values: Mapping[str, Tensor], keys: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the tensors belong together."""
    if not word or not values:
        raise ValueError(f"{name} is damaged: it holds no {'values' if word else 'word'}.")
    if not bool(target.any()):
        raise ValueError(f"{name} is damaged: its target_input is zero, so no word could be told from it.")
    if len(target) != len(super_input):
        raise ValueError(f"{name} is damaged: its target_input has {len(target)} numbers, its super_input "
                         f"{len(super_input)}.")
    (count, *more) = {len(vectors) for vectors in word.values()}
    width = sum(vectors.shape[1] for vectors in word.values())
    if more or count > LONGEST or width != len(target):
        shapes = ", ".join(f"{encoder} {tuple(vectors.shape)}" for encoder, vectors in sorted(word.items()))
        raise ValueError(f"{name} is damaged: a word of the shape {shapes} does not go with {len(target)} numbers in "
                         "target_input.")
    for layer, key in keys.items():
        if layer not in values or len(values[layer]) != len(key):
            raise ValueError(f"{name} is damaged: 'keys.{layer}' has no values of its size beside it.")


def _presence(name: str, metadata: Mapping[str, str]) -> float:
    written = metadata.get("concepts.presence", "")
    if not re.fullmatch(r"-?[0-9]\.[0-9]{1,9}", written):
        raise ValueError(f"{name} is damaged: its presence is {written[:20]!r}, not a number such as 0.6.")
    return float(written)


def _placeholder(name: str, metadata: Mapping[str, str], wanted: str) -> str:
    """The one that is wanted, or the one in the file."""
    written = metadata.get("concepts.placeholder", "")
    if wanted:
        check_placeholder(wanted)
    elif not PLACEHOLDER.fullmatch(written):
        raise ValueError(f"{name} is damaged: its placeholder is {written[:80]!r}, which no prompt could use; write "
                         "another one, such as <mine>.")
    return wanted or written
