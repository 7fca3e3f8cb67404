"""What a method learned, as it travels over the CONCEPT socket."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor


class Unchanging:
    """What never changes, so that copies of what holds it share it: other packs deep-copy models and conditionings."""

    def __deepcopy__(self, memo: dict) -> "Unchanging":
        return self


@dataclass(frozen=True, eq=False)
class Word(Unchanging):
    """A learned word: how a prompt writes it, the word it started from, and fp32 vectors (n d) per text encoder."""

    placeholder: str
    class_word: str
    vectors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", MappingProxyType(dict(self.vectors)))


@dataclass(frozen=True, eq=False)
class Concept(Unchanging):
    """Everything one training learned: words, for some methods an edit of the model, and the file's metadata."""

    words: tuple[Word, ...]
    edit: Any = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
