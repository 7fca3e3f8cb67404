"""The training loop of the small networks around the sample model."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .muon import Muon


def fit(loss: Callable[[int], Tensor], muon: Muon, adam: torch.optim.AdamW, rate: float, warmup: int, minutes: float,
        label: str) -> None:
    """Lowers `loss(step)` for so many minutes at a rate that rises for `warmup` steps and falls as a cosine."""
    start, step, seen = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        value = loss(step)
        value.backward()
        now = rate * min(1, (step + 1) / warmup) * math.cos(math.pi / 2 * done)
        adam.param_groups[0]["lr"] = now
        adam.step()
        adam.zero_grad()
        muon.step(now)
        step, seen = step + 1, 0.98 * seen + 0.02 * value.item()
        if step % 100 == 0:
            print(f"{label} step {step} loss {seen / (1 - 0.98**step):.4f} done {done:.2f}", flush=True)
