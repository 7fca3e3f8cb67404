"""The training loop of every method."""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Any, Protocol

import torch
from torch import Tensor

from ..host.progress import Cancelled, stop_if_cancelled
from .draws import Batch, draw


class Method(Protocol):
    """What a method brings: its few parameters, its loss, and what must hold between steps."""

    def parameters(self) -> list[dict[str, Any]]:
        """AdamW parameter groups, each with its own peak `lr`."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of each sample (b)."""

    def after_step(self) -> None:
        """Restores the method's constraints, in place."""


@dataclass(frozen=True)
class Plan:
    """How long and on what scale to train; `levels` is the number of noise levels of the model."""

    steps: int
    batch_size: int
    seed: int
    levels: int


class Diverged(ValueError):
    """The loss stopped being a number; the parameters are those after the last good step, the last of `losses`."""

    def __init__(self, sentence: str, losses: list[float]) -> None:
        super().__init__(sentence)
        self.losses = losses


class NoGradient(RuntimeError):
    """Nothing connects the loss with the parameters."""

    def __init__(self) -> None:
        super().__init__(
            "No gradient reaches what is to be learned: this ComfyUI runs an attention back end that cannot be "
            "trained through; start it with --use-pytorch-cross-attention."
        )


def train(method: Method, latents: Tensor, plan: Plan, watch: Callable[[list[float]], None]) -> list[float]:
    """Trains `method` on cached `latents` (n v c h w) and returns the loss of each step.

    Cancelled after at least one step, it returns the losses so far: what was learned stays in the method.
    `watch` sees the losses after each step. Raises Diverged or NoGradient.
    """
    optimiser = torch.optim.AdamW(method.parameters(), weight_decay=0.0)
    peaks = [group["lr"] for group in optimiser.param_groups]
    losses: list[float] = []
    try:
        for step in range(plan.steps):
            stop_if_cancelled()
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_factor(step, plan.steps)
            batch = draw(latents, plan.levels, plan.batch_size, plan.seed, step)
            loss = method.loss(batch).mean()
            if not loss.requires_grad:
                raise NoGradient()
            optimiser.zero_grad()
            loss.backward()
            value = loss.item()  # waits for the device
            _check(value, optimiser, losses)
            optimiser.step()
            method.after_step()
            losses.append(value)
            watch(losses)
    except Cancelled:
        if not losses:
            raise
    return losses


def learning_rate_factor(step: int, steps: int) -> float:
    """Half a cosine from 1 down to 0.1: large moves first, settling at the end."""
    return 0.55 + 0.45 * cos(pi * step / max(1, steps - 1))


def _check(loss: float, optimiser: torch.optim.Optimizer, losses: list[float]) -> None:
    gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    if not isfinite(loss) or not all(bool(g.isfinite().all()) for g in gradients):
        raise Diverged(
            f"The loss stopped being a number at step {len(losses) + 1}; a lower learning rate usually helps, "
            "and so does starting ComfyUI with --fp32-unet.", losses
        )
    if not losses and not any(bool(g.any()) for g in gradients):
        raise NoGradient()
