"""Which token of one prompt stands where a token of another does, when some words are longer in one of them."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def places_in(prompt: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> Tensor:
    """For each token of `prompt` (n) the place of its like in `other`.

    Both are sections of equal length that tell the word of each token, 0 for start, end and padding; words correspond
    by their numbers. The tokens of a longer word are passed over or repeated so that last meets last.
    """
    length = len(other[0])
    there = defaultdict(list)
    for place, word in enumerate(word for section in other for word in section):
        there[word].append(place)
    sizes, met, found = Counter(word for section in prompt for word in section), Counter(), []
    for number, section in enumerate(prompt):
        for place, word in enumerate(section):
            met[word] += 1
            found.append(there[word][-(-met[word] * len(there[word]) // sizes[word]) - 1] if word
                         else _no_word(other, length, number, place))
    return torch.tensor(found)


def _no_word(other: Sequence[Sequence[int]], length: int, number: int, place: int) -> int:
    """The start, the padding at the same place, or else the section's last token."""
    section = min(number, len(other) - 1)
    return section * length + (place if other[section][place] == 0 else length - 1)
