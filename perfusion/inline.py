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
HEADER = re.compile(r"concept (?P<kind>word|perfusion) (?P<size>\d+) (?P<sum>[0-9a-f]{16})")


def to_text(concept: Concept) -> str:
    """One line that says what follows, then the concept's file without its cover picture, in base64."""
    bare = replace(concept, metadata={k: v for k, v in concept.metadata.items() if k != "ssmd_cover_images"})
    kind, data = ("word", word_file.to_bytes(bare)) if concept.edit is None else ("perfusion", file.to_bytes(bare))
    packed = base64.b64encode(zlib.compress(data, 9)).decode()
    return f"concept {kind} {len(data)} {_sum(data)}\n{packed}"


def from_text(text: str) -> Concept:
    """The concept in a text that `to_text` made. Raises ValueError with one sentence for any other text."""
    if len(text) > LARGEST:
        raise ValueError(f"The text is {len(text)} characters long; a concept takes at most {LARGEST}.")
    head, _, body = text.strip().partition("\n")
    match = HEADER.fullmatch(head.strip())
    if not match:
        raise ValueError(f"The text is not a concept: it starts with {head[:40]!r} instead of 'concept perfusion …'.")
    data = _unpacked("".join(body.split()), int(match["size"]))
    if len(data) != int(match["size"]) or _sum(data) != match["sum"]:
        raise ValueError("The concept's text is cut short or changed: its checksum does not fit; copy it anew.")
    read = file.from_bytes if match["kind"] == "perfusion" else word_file.from_bytes
    return read(data, "The concept's text")


def describe(text: str) -> str:
    """Size and checksum of a concept's text."""
    match = HEADER.match(text)
    return f"{int(match['size']) / 1000:.1f} KB, {len(text)} characters, checksum {match['sum']}"


def _unpacked(packed: str, size: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), min(size, LARGEST) + 1)
    except (binascii.Error, ValueError, zlib.error):
        return b""


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
