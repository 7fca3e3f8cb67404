"""Files written whole or not at all, and safetensors and pickles read with one sentence for what is wrong with them."""

import os
import re
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from secrets import token_hex
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

NO_ROOM = re.compile(r"not enough memory|file mapping|mmap", re.IGNORECASE)  # as torch words it
PAUSES = (0.05, 0.1, 0.2, 0.4)  # seconds; on Windows a virus scanner holds what is new for a moment


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one. Raises ValueError when the disk refuses."""
    temporary, begun = path.with_name(f"{token_hex(8)}.part"), False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:  # tempfile tries on and on in a folder that Windows protects
            begun = True
            file.write(data)
            file.flush()
            with suppress(OSError):  # some network disks cannot
                os.fsync(file.fileno())
        _replace(temporary, path)
    except OSError as error:
        refused = isinstance(error, PermissionError) and begun and path.exists()
        advice = "; it may be in use: choose another name, or turn overwrite off" if refused else ""
        raise ValueError(f"{path} could not be written: {error.strerror or error}{advice}.") from error
    finally:
        if begun:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    for pause in PAUSES:
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(pause)
    return os.replace(temporary, path)


def read_whole(path: Path, largest: int, kind: str) -> bytes:
    """The bytes of a file. Raises ValueError when it cannot be read, or is larger than any file of that `kind`."""
    try:
        size = path.stat().st_size
        if size > largest:
            raise ValueError(f"{path.name} is not {kind}: it is {size >> 20} MB large.")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} is not a readable safetensors file: {error.strerror or error}.") from error


def unpacked_size(path: Path) -> int:
    """The bytes that a pickled file takes once it is read: newer ones of torch are zips, and zips may be packed.

    Raises ValueError that names the file when it cannot be read, or what it holds cannot be listed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":  # which tells a zip to torch
                return size
        with zipfile.ZipFile(path) as packed:
            return max(size, sum(entry.file_size for entry in packed.infolist()))
    except (PermissionError, MemoryError) as error:
        raise _refused(path, error) from error
    except Exception as error:  # zipfile raises whatever a damaged file provokes
        raise ValueError(f"{path.name} is damaged or cut off; download it again.") from error


def read_safetensors(path: Path, only: re.Pattern | None = None) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file; when names match `only`, those tensors alone, for files that hold much else.

    Raises ValueError that names the file when it cannot be read.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            chosen = [name for name in names if only and only.fullmatch(name)] or names
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in chosen}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is not a readable safetensors file: {error}.") from error


def read_pickle(path: Path, allowed: list[type], mmap: bool = False) -> Any:
    """The content of a file as torch's weights-only unpickler reads it, which executes nothing.

    Besides tensors it may hold `allowed` types. Raises ValueError that names the file when it cannot be read.
    """
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler raises whatever a damaged file provokes
        *_, message = str(error).split("WeightsUnpickler error: ")  # torch's own advice before and after is not ours
        reason = re.split(r"\n|\.\s", message.strip())[0].rstrip(".")
        if isinstance(error, UnpicklingError) and not reason.startswith("Unsupported operand"):
            raise ValueError(f"{path.name} cannot be read without running code: {reason}.") from error
        if isinstance(error, (PermissionError, MemoryError)) or NO_ROOM.search(str(error)):
            raise _refused(path, error) from error
        raise ValueError(f"{path.name} is damaged or cut off; download it again.") from error


def _refused(path: Path, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
    return ValueError(f"{path.name} cannot be read ({reason}): it may be in use, damaged, or too large for this "
                      "computer's memory.")
