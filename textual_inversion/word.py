"""The vectors of a word: how they start, how long they may grow, how they are spelled."""

import re

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

PLACEHOLDER = re.compile(r"<[\w-]+>|[\w-]+")  # of any script
NOTHING = "The init text says nothing; write the word or words that come closest, such as 'cat'."


def spread(rows: Tensor, count: int) -> Tensor:
    """Starts `count` vectors from the embedding rows of some text: rows (t d) -> (count d).

    Neighbouring rows are averaged when there are more rows than vectors and repeated when there are fewer;
    an average keeps the mean length of the rows. Raises ValueError for no rows.
    """
    if len(rows) == 0:
        raise ValueError(NOTHING)
    pooled = adaptive_avg_pool1d(rows.T[None], count)[0].T
    return with_norm(pooled, rows.norm(dim=1).mean(), 1.0)


def row_size(rows: Tensor) -> float:
    """The root mean square of the numbers in embedding rows (t d), by which learning rates of encoders compare.

    Raises ValueError for no rows.
    """
    if len(rows) == 0:
        raise ValueError(NOTHING)
    return float(f"{rows.square().mean().sqrt().item():.4g}")


def with_norm(v: Tensor, norm: Tensor | float, amount: float) -> Tensor:
    """Moves the length of each vector (n d) by the share `amount` of the way to `norm`; the direction stays."""
    length = v.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return v * (1 + amount * (norm / length - 1))


def between(start: Tensor, learned: Tensor, strength: float) -> Tensor:
    """The point at `strength` on the line from the class word's vectors (0) through the learned ones (1), (n d)."""
    return torch.lerp(start, learned, strength)


def check_placeholder(placeholder: str) -> None:
    """Raises ValueError unless `placeholder` can be found in a prompt."""
    if not placeholder:
        raise ValueError("The placeholder is empty; write the word that prompts will use, such as <mine>.")
    if not PLACEHOLDER.fullmatch(placeholder):
        raise ValueError(
            f"The placeholder {placeholder!r} must be one word of letters, digits, - and _, "
            "best in angle brackets: <mine>."
        )
