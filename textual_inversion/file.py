"""Learned words as embedding files: read in every layout, written so that programs without this pack read them."""

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..training.disk import read_safetensors, write_whole
from .concept import Concept, Word
from .formats import Found, in_brackets, is_plain, read, to_pickle, trained_words, words_in
from .word import PLACEHOLDER, check_placeholder

LAYOUTS = {"ComfyUI, A1111, kohya": ".safetensors", "diffusers": ".safetensors", "diffusers (.bin)": ".bin",
           "A1111 (.pt)": ".pt"}
DEFAULT_LAYOUT = next(iter(LAYOUTS))
ENDINGS = (".safetensors", ".pt", ".bin")  # in the order in which the host looks for embedding:name
SINGLE = "emb_params"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LONGEST_NAME = 200  # bytes, of the 255 that disks take
LONGEST = 75  # vectors that fit one section of a prompt
WIDEST = 2**16  # numbers in a vector; text encoders have thousands
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
NAME = re.compile(r"[^\s\x00-\x1f,:<>\[\]()\"|?*\\/]+(/[^\s\x00-\x1f,:<>\[\]()\"|?*\\/]+)*")
NOT_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?|.*\.", re.IGNORECASE)


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


def write_named(data: bytes, folder: Path, name: str, ending: str, overwrite: bool) -> Path:
    """Writes `folder/name` with its ending, whole or not at all, and returns its path.

    A name that is taken gets a counter unless `overwrite`. Raises ValueError for a name that cannot be one, or with
    the reason when the disk refuses.
    """
    path = free_path(folder, checked_name(name), ending, overwrite)
    write_whole(path, data)
    return path


def checked_name(name: str) -> str:
    """`name` without its ending. Raises ValueError when `embedding:name` could not be written in a prompt."""
    name = name.strip()
    name = next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)
    if not NAME.fullmatch(name) or not name.isprintable() or any(part.startswith(".") for part in name.split("/")):
        raise ValueError(f"{name!r} cannot name a file: give 'name' letters, digits, - and _, and / for a "
                         "subfolder.")
    for part in name.split("/"):
        if len(part.encode()) > LONGEST_NAME:
            raise ValueError(f"The name has {len(part)} characters; give it fewer, at most {LONGEST_NAME} of a to z.")
        if NOT_ON_WINDOWS.fullmatch(part):
            raise ValueError(f"Windows cannot open anything called {part!r}, and files are shared; choose another "
                             "name.")
    return name


def free_path(folder: Path, name: str, ending: str, overwrite: bool) -> Path:
    """Where to write a file of this name: one that is taken, with whatever ending, gets a counter unless `overwrite`.

    Raises ValueError when the file of an ending that programs prefer would hide the one to write.
    """
    free, number = name, 2
    while not overwrite and any(os.path.exists(folder / f"{free}{other}") for other in ENDINGS):
        free, number = f"{name}_{number}", number + 1  # exists is False where the disk refuses to say
    for other in ENDINGS[:ENDINGS.index(ending)]:
        if os.path.exists(folder / f"{free}{other}"):
            raise ValueError(f"There is a {free}{other} too, which programs would go on loading instead of "
                             f"{free}{ending}; remove it first or choose another name.")
    return folder / f"{free}{ending}"


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


def parsed(data: bytes, name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, in the order of their names, of a safetensors file's bytes. Raises ValueError that calls
    them `name`."""
    try:
        tensors = dict(sorted(safetensors.torch.load(data).items()))  # in another order at each reading
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + size], object_pairs_hook=_each_once)
        return header.get("__metadata__") or {}, tensors
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{name} is not a readable safetensors file: {reason}.") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A header's names, of which parsers of JSON would otherwise take the last of several."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it holds {name[:80]!r} twice")
        found[name] = value
    return found


def require_format(name: str, metadata: Mapping[str, str], wanted: int, kind: str) -> None:
    """Raises ValueError unless a file's header has the format that this version of the pack reads."""
    version = metadata.get("concepts.format", "")
    if version != str(wanted):
        mend = "update ComfyUI-Concepts" if re.fullmatch("[1-9][0-9]*", version) else "it is damaged"
        raise ValueError(f"{name} has {kind} format {version[:20]!r} and this version of the pack reads {wanted}; "
                         f"{mend}.")


def half_precision(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file holds them, in fp16. Raises ValueError for numbers that are too large for that."""
    halved = {key: tensor.detach().cpu().half().contiguous() for key, tensor in tensors.items()}
    if any(bool((halved[key].isinf() & tensor.isfinite().cpu()).any()) for key, tensor in tensors.items()):
        raise ValueError(f"{name} has grown too large to be saved; train it again with a lower learning rate.")
    return halved


def single_precision(name: str, key: str, tensor: Tensor) -> Tensor:
    """A copy in fp32 that can be trained with. Raises ValueError for another type, or numbers that are not finite."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is damaged: {key[:80]!r} is {str(tensor.dtype).removeprefix('torch.')}.")
    with torch.inference_mode(False):
        tensor = tensor.to(torch.float32, copy=True)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} is damaged: {key[:80]!r} holds values that are not finite numbers.")
    return tensor


def placeholder_in(name: str, metadata: Mapping[str, str], wanted: str) -> str:
    """The placeholder that is wanted, or the one in the file. Raises ValueError for one that no prompt could use."""
    written = metadata.get("concepts.placeholder", "")
    if wanted:
        check_placeholder(wanted)
    elif not PLACEHOLDER.fullmatch(written):
        raise ValueError(f"{name} is damaged: its placeholder is {written[:80]!r}, which no prompt could use; write "
                         "another one, such as <mine>.")
    return wanted or written


def with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """safetensors writes metadata in random order; sorted, the same word always gives the same file."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size:]
