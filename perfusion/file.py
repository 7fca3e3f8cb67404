"""The concept file: a word and its edit as fp16 tensors with string metadata, about 30 KB for SD1.x."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..textual_inversion.concept import Concept, Word
from ..textual_inversion.file import checked_name, free_path, with_metadata
from ..textual_inversion.word import check_placeholder
from ..training.disk import write_whole
from .concept import Edit

FORMAT = 1
ENDING = ".safetensors"
LARGEST = 8 * 2**20  # bytes; a concept for SDXL with trained keys and a cover takes half a million
NAME = re.compile(r"(?P<kind>word|values|keys)\.(?P<rest>[A-Za-z0-9_.]+)|target_input|super_input")


def to_bytes(concept: Concept) -> bytes:
    """The file of a concept with one word and an edit; equal concepts give equal bytes."""
    (word,) = concept.words
    edit: Edit = concept.edit
    tensors = {f"word.{encoder}": vectors for encoder, vectors in word.vectors.items()}
    tensors |= {"target_input": edit.target_input, "super_input": edit.super_input}
    for kind, vectors in (("values", edit.values), ("keys", edit.keys)):
        tensors |= {f"{kind}.{layer}": vector for layer, vector in vectors.items()}
    return with_metadata(
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


def save(concept: Concept, folder: Path, name: str, overwrite: bool = False) -> Path:
    """Writes `folder/name.safetensors`, whole or not at all, and returns its path.

    A name that is taken gets a counter unless `overwrite`. Raises ValueError for a name that cannot be one, or with
    the reason when the disk refuses.
    """
    path = free_path(folder, checked_name(name), ENDING, overwrite)
    write_whole(path, to_bytes(concept))
    return path


def load(path: Path, placeholder: str = "") -> Concept:
    """Reads a concept; `placeholder` replaces the one in the file. Raises ValueError that says what is wrong."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.name} is not a concept: it is {path.stat().st_size >> 20} MB large.")
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            _check_header(path.name, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is not a readable safetensors file: {error}.") from error
    return _concept(path.name, metadata, tensors, placeholder)


def from_bytes(data: bytes, name: str) -> Concept:
    """Reads a concept out of the bytes of its file; `name` is what errors call it."""
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8:8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not readable: {error}.") from error
    _check_header(name, metadata)
    return _concept(name, metadata, tensors, "")


def check_fits(concept: Concept, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raises ValueError unless the edit has what every layer of a model needs; `sizes` are in and out by layer."""
    edit: Edit = concept.edit
    (word,) = concept.words
    base = concept.metadata.get("modelspec.base_model", "another base")
    said = f"{word.placeholder} was learned on {base}; this model"
    for layer in edit.values.keys() - sizes.keys():
        raise ValueError(f"{said} has no layer {layer}: load a checkpoint of that base.")
    for layer, (taken, given) in sizes.items():
        if layer not in edit.values:
            raise ValueError(f"{said} also has a layer {layer}: load a checkpoint of that base.")
        if len(edit.target_input) != taken or len(edit.values[layer]) != given:
            raise ValueError(f"{said} has {taken} × {given} numbers in {layer} where the concept has "
                             f"{len(edit.target_input)} × {len(edit.values[layer])}: load a checkpoint of that base.")


def is_concept(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata says that it is a concept with an edit."""
    return metadata.get("concepts.method") == "perfusion"


def _check_header(name: str, metadata: Mapping[str, str]) -> None:
    if not is_concept(metadata):
        raise ValueError(f"{name} is not a Perfusion concept: its header names no such method.")
    if metadata.get("concepts.format") != str(FORMAT):
        raise ValueError(f"{name} has concept format {metadata.get('concepts.format')!r}, this version of the pack "
                         f"reads {FORMAT}; update ComfyUI-Concepts.")


def _concept(name: str, metadata: dict[str, str], tensors: dict[str, Tensor], placeholder: str) -> Concept:
    parts: dict[str, dict[str, Tensor]] = {"word": {}, "values": {}, "keys": {}}
    for key, tensor in tensors.items():
        match = NAME.fullmatch(key)
        if not match:
            raise ValueError(f"{name} is not a concept: it holds a tensor {key!r}.")
        if match["kind"]:
            parts[match["kind"]][match["rest"]] = _checked(name, key, tensor, 2 if match["kind"] == "word" else 1)
    vectors = [_checked(name, key, tensors[key], 1) if key in tensors else None
               for key in ("target_input", "super_input")]
    if None in [None if v is None else 0 for v in vectors] or not parts["word"] or not parts["values"]:
        raise ValueError(f"{name} is damaged: it lacks the word, i*, the super-category or the values.")
    target, super_input = vectors
    if target.shape != super_input.shape or not bool(target.any()):
        raise ValueError(f"{name} is damaged: its i* is zero or of another size than the super-category's encoding.")
    if parts["keys"].keys() - parts["values"].keys():
        raise ValueError(f"{name} is damaged: it holds keys for layers that have no values.")
    written = placeholder or metadata.get("concepts.placeholder", "")
    check_placeholder(written)
    try:
        presence = float(metadata.get("concepts.presence", "nan"))
    except ValueError:
        presence = float("nan")
    if not -10 < presence < 10:
        raise ValueError(f"{name} is damaged: its presence is {metadata.get('concepts.presence')!r}, not a number "
                         "such as 0.6.")
    edit = Edit(target, super_input, parts["values"], parts["keys"], presence, metadata.get("concepts.encoder", ""))
    return Concept((Word(written, metadata.get("concepts.class_word", ""), parts["word"]),), edit, metadata)


def _checked(name: str, key: str, tensor: Tensor, dimensions: int) -> Tensor:
    if tensor.ndim != dimensions or 0 in tensor.shape or not tensor.is_floating_point():
        raise ValueError(f"{name} is damaged: {key!r} is {tensor.dtype} of the shape {tuple(tensor.shape)}.")
    with torch.inference_mode(False):
        tensor = tensor.to(torch.float32).clone()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} is damaged: {key!r} holds values that are not finite numbers.")
    return tensor
