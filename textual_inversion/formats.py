"""The layouts in which learned words are kept: ComfyUI and kohya, A1111, diffusers, original LDM, bundled in a LoRA.

Layouts are told apart by their keys. Pickled files are read by torch's weights-only unpickler, which executes nothing.
"""

import io
import json
import logging
import re
import unicodedata
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.container import ParameterDict

from ..training.disk import read_pickle, read_safetensors, unpacked_size
from .word import PLACEHOLDER

log = logging.getLogger("concepts")
ENCODERS = ("clip_l", "clip_g", "clip_h")
ENCODER_OF_WIDTH = {1024: "clip_h", 1280: "clip_g"}
ENCODER_OF_KEY = {name: name for name in ENCODERS} | {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
LARGEST = 64 * 2**20  # bytes of a pickled file; a word of 75 vectors takes less than one
BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<key>string_to_param\.\*|clip_l|clip_g|clip_h)")
OF_THE_WORD = re.compile(r"concepts\..+|modelspec\.base_model")  # in the header of a LoRA with words
UNNAMED = ("emb_params", "embedding", "embeddings", "vectors", "weight", "0")  # no placeholders, as keys

Found = dict[str, dict[str, Tensor]]  # placeholder, which may be empty -> tensor by encoder


def read(path: Path) -> tuple[Found, dict[str, str]]:
    """The words in a file, by the placeholder the file gives them ('' for none), and its metadata.

    Raises ValueError that names the file when it cannot be read or holds something else.
    """
    if path.suffix.lower() == ".safetensors":
        metadata, content = read_safetensors(path, BUNDLED)
    else:
        metadata, content = {}, _unpickled(path)
    found = words_in(path.name, content, metadata)
    if any(map(BUNDLED.fullmatch, content)):
        metadata = {key: text for key, text in metadata.items() if OF_THE_WORD.fullmatch(key)}
    return found, metadata


def to_pickle(layout: str, placeholder: str, vectors: Tensor) -> bytes:
    """A word (n d) for one encoder as the pickled file of `layout`: 'diffusers' (.bin) or 'A1111' (.pt)."""
    content = {placeholder: vectors}
    if layout == "A1111":
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": placeholder.strip("<>"),
                   "step": 0, "sd_checkpoint": None, "sd_checkpoint_name": None, "concepts.placeholder": placeholder}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _unpickled(path: Path) -> dict[str, Any]:
    size = unpacked_size(path)
    if size > LARGEST:
        raise ValueError(f"{path.name} is not an embedding: it is {size >> 20} MB large.")
    content = read_pickle(path, [ParameterDict, OrderedDict, defaultdict])  # the original LDM code saved ParameterDicts
    if not isinstance(content, Mapping):
        raise ValueError(f"{path.name} is not an embedding: it holds a {type(content).__name__}.")
    for key in content:
        if not isinstance(key, str):
            raise ValueError(f"{path.name} is not an embedding: it holds something under a {type(key).__name__} in "
                             "place of a name.")
    return dict(content)


def words_in(file: str, content: dict[str, Any], metadata: dict[str, str]) -> Found:
    """The words among the tensors of a file, by its layout. Raises ValueError that names the `file`."""
    bundled = [(match, content[key]) for key in content if (match := BUNDLED.fullmatch(key))]
    if bundled:
        found: Found = {}
        spelled = {word.strip("<>"): word for word in trained_words(metadata) if PLACEHOLDER.fullmatch(word)}
        for match, tensor in bundled:
            name = spelled.get(match["name"]) or in_brackets(match["name"])
            encoder = _encoder_of(tensor, {}) if match["key"].endswith("*") else match["key"]
            found.setdefault(name, {})[encoder] = tensor
        return found
    if "string_to_param" in content:
        tensors = _parameters(content["string_to_param"])
        written, name = (_text(content.get(key)) for key in ("concepts.placeholder", "name"))
        return {written or _placeholder(tensors) or in_brackets(name): _one(file, tensors, metadata)}
    if (known := content.keys() & ENCODER_OF_KEY.keys()) and not metadata.get("concepts.method"):
        if others := content.keys() - known:
            log.warning("%s also holds %s, which is for no text encoder of Stable Diffusion 1 to XL; left out.", file,
                        ", ".join(sorted(others)))
        return {"": {ENCODER_OF_KEY[key]: content[key] for key in sorted(known)}}
    return {_placeholder(content): _one(file, content, metadata)}


def in_brackets(name: str) -> str:
    """A name as prompts can write it: <my-cat> for 'my cat', <cat> as it is, and '' for ''."""
    name = unicodedata.normalize("NFC", name)  # as keyboards write it; some disks take é apart
    if not name or PLACEHOLDER.fullmatch(name) and name.startswith("<"):
        return name
    one_word = re.sub(r"[^\w-]+", "-", name)
    return f"<{one_word}>"


def trained_words(metadata: Mapping[str, str]) -> list[str]:
    """The words in a file's header that call up what it holds, as prompts write them."""
    text = metadata.get("trained_words", "[]")
    try:
        words = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return [word for word in words if isinstance(word, str)] if isinstance(words, list) else [text]


def _placeholder(tensors: Mapping[str, Any]) -> str:
    """The key of a file's only tensor, which diffusers calls by the placeholder; '' for one that is none."""
    key = _text(next(iter(tensors), ""))
    if key.startswith("<"):
        return in_brackets(key)
    return key if PLACEHOLDER.fullmatch(key) and key not in UNNAMED else ""


def _parameters(kept: Any) -> dict[str, Any]:
    """`string_to_param`, whether a dict, a ParameterDict of today or one that torch before 1.12 pickled."""
    if isinstance(kept, torch.nn.Module):
        state = vars(kept)
        inner = state.get("_parameters")
        kept = {**(inner if isinstance(inner, Mapping) else {}), **state}
        return {key: value for key, value in kept.items() if isinstance(value, Tensor)}
    return dict(kept) if isinstance(kept, Mapping) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _one(file: str, tensors: Mapping[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    if not tensors:
        raise ValueError(f"{file} holds no embedding.")
    if len(tensors) > 1 and any("lora" in str(key) for key in tensors):
        raise ValueError(f"{file} is a LoRA and holds no learned words; use Load LoRA.")
    if metadata.get("concepts.method"):
        raise ValueError(f"{file} is not an embedding: it is more than a learned word and belongs in models/concepts.")
    if len(tensors) > 1:
        raise ValueError(f"{file} is not an embedding: it holds {len(tensors)} tensors, "
                         f"one of them {str(next(iter(tensors)))[:80]!r}.")
    (tensor,) = tensors.values()
    return {_encoder_of(tensor, metadata): tensor}


def _encoder_of(tensor: Any, metadata: dict[str, str]) -> str:
    named = metadata.get("concepts.encoder")
    width = tensor.shape[-1] if is_plain(tensor) and tensor.ndim else 0
    return named if named in ENCODERS else ENCODER_OF_WIDTH.get(width, "clip_l")


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor with all its numbers in memory: not sparse, nested, quantised or without any."""
    return (isinstance(value, Tensor) and value.layout == torch.strided
            and not (value.is_nested or value.is_quantized or value.is_meta))
