"""The words of the world, as token ids of CLIP's own vocabulary; only their embedding rows are trained and stored."""

from __future__ import annotations

from functools import cache

import comfy.sd1_clip
import torch

from .captions import FILLERS, PLACES, PREFIXES
from .concepts import NAMES
from .scene import COLOURS, PATTERNS, RELATIONS
from .shapes import CLASSES

VOCABULARY, LENGTH = 49408, 77
START, END = 49406, 49407
UNKNOWN = 0  # row of the table that every other word of the vocabulary shares

CONFIG = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": LENGTH,
    "eos_token_id": END,
    "vocab_size": VOCABULARY,
}
_GRAMMAR = "a an the my one and with wearing hat right of to left ,"


@cache
def tokenizer():
    """CLIP's byte-pair tokenizer, from the files that the host ships."""
    return comfy.sd1_clip.SDTokenizer().tokenizer


@cache
def word_ids() -> tuple[int, ...]:
    """Token ids of every word that a caption can hold, sorted; the row of `word_ids()[i]` in the table is i + 1."""
    places = [place for options in PLACES.values() for place in options]
    text = " ".join([_GRAMMAR, *CLASSES, *COLOURS, *PATTERNS, *RELATIONS, *PREFIXES, *places, *FILLERS, *NAMES])
    return tuple(sorted({*tokenizer()(text)["input_ids"], START, END}))


@cache
def _rows() -> dict[int, int]:
    return {token: row + 1 for row, token in enumerate(word_ids())}


def rows(texts: list[str]) -> torch.Tensor:
    """Table rows (n, 77) of the captions: start, words, end, then padding with end as CLIP does."""
    out = torch.full((len(texts), LENGTH), _rows()[END], dtype=torch.int16)
    for line, tokens in zip(out, tokenizer()(texts)["input_ids"], strict=True):
        known = [_rows().get(token, UNKNOWN) for token in tokens[:LENGTH]]
        line[: len(known)] = torch.tensor(known, dtype=torch.int16)
    return out


def full_table(table: torch.Tensor) -> torch.Tensor:
    """The embedding matrix (49408, d) from the stored rows (1 + words, d)."""
    full = table[UNKNOWN].expand(VOCABULARY, -1).clone()
    full[list(word_ids())] = table[1:]
    return full
