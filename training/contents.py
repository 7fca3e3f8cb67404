"""What the pack's safetensors files hold: a header that is the same for the same content, checked when it is read."""

import json
import re
import struct
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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


def with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """safetensors writes metadata in random order; sorted, the same word always gives the same file."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size:]


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
