"""What can be told of a learned word by looking at its vectors."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..host.sockets import CLIP
from ..host.text import ready, vocabulary, widths
from .concept import Concept, Word

NEAREST = 5


def report(clip: CLIP, concept: Concept) -> str:
    """A page about a concept: each vector's length beside the vocabulary's, the words nearest to it, and how it was
    learned."""
    lines = []
    for word in concept.words:
        lines += _word(ready(clip), word)
    return "\n".join([*lines, *_training(concept.metadata)])


def nearest(vector: Tensor, table: Tensor, count: int) -> list[tuple[int, float]]:
    """The rows of `table` (v d) that point most nearly where `vector` (d) does, with their cosines; equal rows once."""
    cosines = normalize(table.float(), dim=1) @ normalize(vector.float(), dim=0)
    best, rows = torch.topk(cosines, min(20 * count, len(table)))
    found: list[tuple[int, float]] = []
    for cosine, row in zip(best.tolist(), rows.tolist(), strict=True):
        if len(found) < count and not any(torch.equal(table[row], table[other]) for other, _ in found):
            found.append((row, cosine))
    return found


def _word(clip: CLIP, word: Word) -> list[str]:
    lines = [f"{word.placeholder}, learned from “{word.class_word}”" if word.class_word else word.placeholder]
    present = widths(clip)
    for encoder, vectors in word.vectors.items():
        lines.append(f"  {encoder}: {len(vectors)} × {vectors.shape[1]} numbers")
        if present.get(encoder) != vectors.shape[1]:
            lines.append("    this CLIP has no such encoder: connect that of the base model")
            continue
        names, table = vocabulary(clip, encoder)
        lengths = table.float().norm(dim=1)
        for number, vector in enumerate(vectors, 1):
            share = (lengths < vector.norm()).float().mean().item()
            words = ", ".join(f"{names[row]} {cosine:.2f}" for row, cosine in nearest(vector, table, NEAREST))
            lines.append(f"    {number}: length {vector.norm():.2f} (words: {lengths.mean():.2f}, "
                         f"{share:.0%} are shorter), nearest {words}")
    return lines


def _training(metadata: Mapping[str, str]) -> list[str]:
    lines = [f"base: {metadata['modelspec.base_model']}"] if "modelspec.base_model" in metadata else []
    try:
        record = json.loads(metadata.get("concepts.training", "{}"))
        return lines + [f"{name}: {text}" for name, text in record.items() if name not in ("placeholder", "init_text")]
    except (ValueError, RecursionError, AttributeError):
        return [*lines, "how it was trained cannot be read: concepts.training in its file is damaged"]
