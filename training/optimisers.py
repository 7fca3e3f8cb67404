"""Optimisers and learning-rate schedules to choose from."""

from collections.abc import Callable
from math import cos, pi
from typing import Any

import torch

OPTIMISERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, weight_decay=0.0),
    "RAdam": lambda groups: torch.optim.RAdam(groups),
    "NAdam": lambda groups: torch.optim.NAdam(groups),
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.55 + 0.45 * cos(pi * done),
    "linear": lambda done: 1 - 0.9 * done,
    "constant": lambda done: 1.0,
}


def learning_rate_factor(schedule: str, warmup: int, step: int, steps: int) -> float:
    """The share of the peak rate at `step` of `steps`: a ramp over `warmup` steps times the schedule, which ends at 0.1
    unless it is constant."""
    ramp = min(1.0, (step + 1) / (warmup + 1))
    return ramp * SCHEDULES[schedule](step / max(1, steps - 1))
