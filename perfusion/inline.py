"""A concept as text, to travel inside a workflow."""

import base64
import binascii
import hashlib
import re
import zlib
from dataclasses import replace

from ..textual_inversion import file as word_file
from ..textual_inversion.concept import Concept
from . import file

LARGEST = 2**20  # characters
COVER = "ssmd_cover_images"
HEADER = re.compile(r"concept\s+(?P<kind>word|perfusion)\s+(?P<size>[0-9]{1,7})\s+(?P<sum>[0-9a-f]{16})(?!\S)")


def to_text(concept: Concept) -> str:
    """One line with kind, size and checksum, then the concept's file without its cover picture, packed, in base64.

    Equal concepts give equal texts. Raises ValueError for what no file can hold, or for more than `LARGEST` characters.
    """
    bare = replace(concept, metadata={key: text for key, text in concept.metadata.items() if key != COVER})
    kind, data = ("word", word_file.to_bytes(bare)) if concept.edit is None else ("perfusion", file.to_bytes(bare))
    packed = base64.b64encode(zlib.compress(data, 9)).decode()
    text = f"concept {kind} {len(data)} {_sum(data)}\n{packed}"
    _check_size(text)
    return text


def from_text(text: str) -> Concept:
    """The concept in a text that `to_text` made; line breaks and spaces in it do not matter.

    Raises ValueError with one sentence for any other text.
    """
    _check_size(text)
    text = text.strip()
    match = HEADER.match(text)
    if not match:
        raise ValueError(f"The text is not a concept: it starts with {text[:40]!r} instead of 'concept perfusion …'.")
    data = _unpacked("".join(text[match.end():].split()), int(match["size"]))
    if _sum(data) != match["sum"]:
        raise ValueError(f"The concept's text has been changed: its checksum is {_sum(data)}, not {match['sum']}; copy "
                         "it anew.")
    read = file.from_bytes if match["kind"] == "perfusion" else word_file.from_bytes
    return read(data, "The concept's text")


def describe(text: str) -> str:
    """Size and checksum of a text that `to_text` made."""
    match = HEADER.match(text.strip())
    return f"{int(match['size']) / 1000:.1f} KB, {len(text.strip())} characters, checksum {match['sum']}"


def _unpacked(body: str, size: int) -> bytes:
    """The bytes behind the base64, never more than `size` and one. Raises ValueError unless there are `size`."""
    whole = len(body) - len(body) % 4
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.b64decode(body[:whole], validate=True), size + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise ValueError("The concept's text has been changed: what follows its first line cannot be unpacked; copy it "
                         "anew.") from error
    if len(data) < size or whole < len(body) or not unpacker.eof and len(data) == size:
        raise ValueError(f"The concept's text is cut short: it holds {len(data)} of {size} bytes, and its end is "
                         "missing; copy it anew.")
    if len(data) > size or unpacker.unused_data:
        raise ValueError(f"The concept's text has been changed: it holds more than its {size} bytes; copy it anew.")
    return data


def _check_size(text: str) -> None:
    if len(text) > LARGEST:
        raise ValueError(f"The concept's text is {len(text)} characters long; at most {LARGEST} fit a workflow.")


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
