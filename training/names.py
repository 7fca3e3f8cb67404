"""Names of files: that every system and every prompt can write, and that are not taken."""

import os
import re
from pathlib import Path

from .disk import write_whole

ENDINGS = (".safetensors", ".pt", ".bin")  # in the order in which the host looks for embedding:name
LONGEST_NAME = 200  # bytes, of the 255 that disks take
NAME = re.compile(r"[^\s\x00-\x1f,:<>\[\]()\"|?*\\/]+(/[^\s\x00-\x1f,:<>\[\]()\"|?*\\/]+)*")
NOT_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?|.*\.", re.IGNORECASE)


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
