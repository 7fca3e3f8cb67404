"""A learned word as a safetensors embedding that ComfyUI, A1111 and diffusers read without this pack."""

import json
import os
import re
import struct
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .concept import Concept, Word
from .word import check_placeholder

ENCODERS = ("clip_l", "clip_g", "clip_h")
ENCODER_OF_WIDTH = {1024: "clip_h", 1280: "clip_g"}
SINGLE = "emb_params"
LONGEST = 75  # vectors that fit one section of a prompt
NAME = re.compile(r"[^\s,:<>\[\]()\"|?*\\/]+(/[^\s,:<>\[\]()\"|?*\\/]+)*")


def to_bytes(concept: Concept) -> bytes:
    """The file of a concept with one word; equal concepts give equal bytes."""
    (word,) = concept.words
    tensors = {name: vectors.detach().cpu().float().contiguous() for name, vectors in word.vectors.items()}
    metadata = {
        **concept.metadata,
        "concepts.format": "1",
        "concepts.placeholder": word.placeholder,
        "concepts.class_word": word.class_word,
        "trained_words": json.dumps([word.placeholder]),
    }
    if len(tensors) == 1:
        ((metadata["concepts.encoder"], vectors),) = tensors.items()
        tensors = {SINGLE: vectors}
    return _with_metadata(safetensors.torch.save(tensors), metadata)


def save(concept: Concept, folder: Path, name: str, overwrite: bool = False) -> Path:
    """Writes `folder/name.safetensors` whole or not at all and returns its path.

    A name that is taken gets a counter unless `overwrite`. Raises ValueError for a name that prompts could not use,
    or with the reason when the disk refuses.
    """
    path = _free_path(folder, checked_name(name), overwrite)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(to_bytes(concept))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def load(path: Path, placeholder: str = "") -> Concept:
    """Reads an embedding; `placeholder` replaces the one in the file.

    Raises ValueError that names the file when a tensor's name, shape, type or value is not that of an embedding.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is not a readable safetensors file: {error}.") from error
    vectors = {_encoder(path, name, tensors, metadata): _checked(path, name, t) for name, t in tensors.items()}
    if not vectors:
        raise ValueError(f"{path.name} holds no embedding.")
    placeholder = placeholder or metadata.get("concepts.placeholder") or f"<{path.stem}>"
    check_placeholder(placeholder)
    return Concept((Word(placeholder, metadata.get("concepts.class_word", ""), vectors),), metadata=metadata)


def checked_name(name: str) -> str:
    """`name` without its ending. Raises ValueError when `embedding:name` could not be written in a prompt."""
    name = name.strip().removesuffix(".safetensors")
    if not NAME.fullmatch(name) or any(part.startswith(".") for part in name.split("/")):
        raise ValueError(f"{name!r} cannot name an embedding: use letters, digits, - and _, and / for a subfolder.")
    return name


def _free_path(folder: Path, name: str, overwrite: bool) -> Path:
    path, number = folder / f"{name}.safetensors", 2
    while path.exists() and not overwrite:
        path, number = folder / f"{name}_{number}.safetensors", number + 1
    return path


def _encoder(path: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    if name in ENCODERS:
        return name
    if len(tensors) > 1:
        raise ValueError(f"{path.name} is not an embedding: it holds {len(tensors)} tensors, one of them {name!r}.")
    named = metadata.get("concepts.encoder")
    return named if named in ENCODERS else ENCODER_OF_WIDTH.get(max(tensors[name].shape, default=0), "clip_l")


def _checked(path: Path, name: str, vectors: Tensor) -> Tensor:
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not 1 <= len(vectors) <= LONGEST or vectors.shape[1] == 0:
        raise ValueError(f"{path.name} is not an embedding: {name!r} has the shape {tuple(vectors.shape)}.")
    if not vectors.is_floating_point():
        raise ValueError(f"{path.name} is not an embedding: {name!r} holds whole numbers.")
    with torch.inference_mode(False):
        vectors = vectors.to(torch.float32).clone()  # of its own: the file may be replaced, the word trained with
    if not bool(vectors.isfinite().all()):
        raise ValueError(f"{path.name} is damaged: {name!r} holds values that are not finite numbers.")
    return vectors


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """safetensors writes metadata in random order; sorted, the same word always gives the same file."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size:]
