"""Learned words as embedding files: read in every layout, written so that programs without this pack read them."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..training.contents import parsed, with_metadata
from ..training.disk import read_safetensors
from ..training.names import write_named
from .concept import Concept, Word
from .formats import Found, in_brackets, is_plain, read, to_pickle, trained_words, words_in
from .word import PLACEHOLDER, check_placeholder

LAYOUTS = {"ComfyUI, A1111, kohya": ".safetensors", "diffusers": ".safetensors", "diffusers (.bin)": ".bin",
           "A1111 (.pt)": ".pt"}
DEFAULT_LAYOUT = next(iter(LAYOUTS))
SINGLE = "emb_params"
LONGEST = 75  # vectors that fit one section of a prompt
WIDEST = 2**16  # numbers in a vector; text encoders have thousands
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


def to_bytes(concept: Concept, layout: str = DEFAULT_LAYOUT) -> bytes:
    """The file of a concept with one word; equal concepts give equal bytes.

    Raises ValueError when the layout has no place for what the concept holds.
    """
    if len(concept.words) != 1:
        raise ValueError(f"A file holds one word; this concept has {len(concept.words)}.")
    (word,) = concept.words
    tensors = {name: vectors.detach().cpu().float().contiguous() for name, vectors in word.vectors.items()}
    if LAYOUTS[layout] != ".safetensors":
        if len(tensors) > 1:
            raise ValueError(f"{layout} has no place for the vectors of {' and '.join(tensors)}; "
                             f"choose {DEFAULT_LAYOUT}.")
        return to_pickle(layout.split()[0], word.placeholder, *tensors.values())
    metadata = {
        **concept.metadata,
        "concepts.format": "1",
        "concepts.placeholder": word.placeholder,
        "concepts.class_word": word.class_word,
        "trained_words": json.dumps([word.placeholder]),
    }
    if len(tensors) == 1:
        ((metadata["concepts.encoder"], vectors),) = tensors.items()
        tensors = {word.placeholder if layout == "diffusers" else SINGLE: vectors}
    return with_metadata(safetensors.torch.save(tensors), metadata)


def save(concept: Concept, folder: Path, name: str, overwrite: bool = False, layout: str = DEFAULT_LAYOUT) -> Path:
    """Writes `folder/name` with the layout's ending, whole or not at all, and returns its path.

    A name that is taken gets a counter unless `overwrite`. Raises ValueError for a name that prompts could not use,
    or with the reason when the disk refuses.
    """
    return write_named(to_bytes(concept, layout), folder, name, LAYOUTS[layout], overwrite)


def bundle(concept: Concept, lora: Path, folder: Path, name: str, overwrite: bool = False) -> Path:
    """Writes a copy of a LoRA file that also holds the words of `concept`, as A1111 bundles them.

    Raises ValueError that names the file when the LoRA cannot be read or already holds a word of that name.
    """
    metadata, tensors = read_safetensors(lora)
    for word in concept.words:
        title = word.placeholder.strip("<>")
        if any(key.startswith(f"bundle_emb.{title}.") for key in tensors):
            raise ValueError(f"{lora.name} already holds a word called {title!r}; give one of the two another name.")
        tensors |= bundled(word)
    words = [*trained_words(metadata), *(word.placeholder for word in concept.words)]
    metadata["trained_words"] = json.dumps(words)  # as prompts write them, which the keys of tensors do not say
    data = with_metadata(safetensors.torch.save(tensors), metadata)
    del tensors  # mapped from the LoRA, which Windows would not let be replaced by its copy
    return write_named(data, folder, name, ".safetensors", overwrite)


def bundled(word: Word) -> dict[str, Tensor]:
    """A word as A1111 bundles it in a LoRA file: its vectors (v d) by key."""
    title, keys = word.placeholder.strip("<>"), {"clip_l": "string_to_param.*"} if len(word.vectors) == 1 else {}
    return {f"bundle_emb.{title}.{keys.get(encoder, encoder)}": vectors.detach().cpu().float().contiguous()
            for encoder, vectors in word.vectors.items()}


def load(path: Path, placeholder: str = "") -> Concept:
    """Reads the words in a file of any layout; `placeholder` replaces the one in the file.

    Raises ValueError that names the file when it is damaged or holds no words.
    """
    found, metadata = read(path)
    return _concept(path.name, path.stem, found, metadata, placeholder)


def from_bytes(data: bytes, name: str) -> Concept:
    """Reads the word in the bytes of a file that `to_bytes` made in its first layout; `name` is what errors call it."""
    metadata, tensors = parsed(data, name)
    return _concept(name, "mine", words_in(name, tensors, metadata), metadata, "")


def _concept(file: str, stem: str, found: Found, metadata: dict[str, str], placeholder: str) -> Concept:
    if placeholder and len(found) > 1:
        raise ValueError(f"{file} holds {len(found)} words ({', '.join(found)}); leave the placeholder empty.")
    class_word = metadata.get("concepts.class_word", "")
    only = metadata.get("concepts.placeholder", "") if len(found) == 1 else ""
    words = []
    for name, tensors in found.items():
        vectors = {encoder: _checked(file, encoder, tensor) for encoder, tensor in tensors.items()}
        own = only or name or in_brackets(stem)
        written = placeholder_in(file, {"concepts.placeholder": own}, placeholder)
        words.append(Word(written, class_word, vectors))
    return Concept(tuple(words), metadata=metadata)


def _checked(file: str, name: str, vectors: Tensor) -> Tensor:
    if not isinstance(vectors, Tensor):
        raise ValueError(f"{file} is not an embedding: it holds a {type(vectors).__name__}.")
    if not is_plain(vectors):
        raise ValueError(f"{file} is not an embedding: {name!r} is sparse, nested, quantised or without numbers.")
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not 1 <= len(vectors) <= LONGEST or not 1 <= vectors.shape[1] <= WIDEST:
        raise ValueError(f"{file} is not an embedding: {name!r} has the shape {tuple(vectors.shape)}.")
    if vectors.dtype not in FLOATS:
        raise ValueError(f"{file} is not an embedding: {name!r} holds numbers of the kind {vectors.dtype}.")
    with torch.inference_mode(False):
        vectors = vectors.detach().to(torch.float32).clone()  # of its own: files are replaced, words trained with
    if not bool(vectors.isfinite().all()):
        raise ValueError(f"{file} is damaged: {name!r} holds values that are not finite numbers.")
    return vectors


def placeholder_in(name: str, metadata: Mapping[str, str], wanted: str) -> str:
    """The placeholder that is wanted, or the one in the file. Raises ValueError for one that no prompt could use."""
    written = metadata.get("concepts.placeholder", "")
    if wanted:
        check_placeholder(wanted)
    elif not PLACEHOLDER.fullmatch(written):
        raise ValueError(f"{name} is damaged: its placeholder is {written[:80]!r}, which no prompt could use; write "
                         "another one, such as <mine>.")
    return wanted or written
