"""The training loop of every method."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from ..host.progress import Cancelled, stop_if_cancelled
from .draws import Batch, draw
from .optimisers import OPTIMISERS, learning_rate_factor
from .states import States


class Method(Protocol):
    """What a method brings: its few parameters, its loss, and what must hold between steps."""

    def parameters(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser, each with its own peak `lr`."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of each sample (b)."""

    def after_step(self) -> None:
        """Restores the method's constraints, in place."""


@dataclass(frozen=True)
class Plan:
    """How long and on what scale to train.

    `levels` is the number of noise levels of the model; `accumulation` batches make one step. The model sees at most
    `at_once` samples of a batch together, all of them at 0: less memory for the same step.
    """

    steps: int
    batch_size: int
    seed: int
    levels: int
    accumulation: int = 1
    optimiser: str = "AdamW"
    schedule: str = "cosine"
    warmup: int = 0
    at_once: int = 0


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


def train(
    method: Method, latents: Tensor, plan: Plan, watch: Callable[[list[float]], None], states: States | None = None
) -> list[float]:
    """Trains `method` on cached `latents` (n v c h w) and returns the loss of each step.

    With `states` it goes on from the newest one, keeps new ones, and removes them once it is done.
    Cancelled after at least one step, it returns the losses so far: what was learned stays in the method.
    `watch` sees the losses after each step. Raises Diverged or NoGradient.
    """
    optimiser = OPTIMISERS[plan.optimiser](method.parameters())
    peaks = [group["lr"] for group in optimiser.param_groups]
    losses = states.restore(optimiser) if states else []
    try:
        while len(losses) < plan.steps:
            stop_if_cancelled()
            step = len(losses)
            factor = learning_rate_factor(plan.schedule, plan.warmup, step, plan.steps)
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            value = _gradients(method, latents, plan, optimiser, step)
            _check(value, optimiser, losses)
            optimiser.step()
            method.after_step()
            losses.append(value)
            if states and states.every and len(losses) % states.every == 0 and len(losses) < plan.steps:
                states.save(losses, optimiser)
            watch(losses)
    except Cancelled:
        if not losses:
            raise
        if states and states.every and len(losses) < plan.steps:
            states.save(losses, optimiser)
    if states and len(losses) >= plan.steps:
        states.clear()
    return losses


def _gradients(method: Method, latents: Tensor, plan: Plan, optimiser: torch.optim.Optimizer, step: int) -> float:
    """Leaves the gradients of one step in the parameters and returns its loss."""
    optimiser.zero_grad()
    total = 0.0
    for part in range(plan.accumulation):
        batch = draw(latents, plan.levels, plan.batch_size, plan.seed, step * plan.accumulation + part)
        for piece in batch.parts(plan.at_once or plan.batch_size):
            share = len(piece.latents) / (plan.batch_size * plan.accumulation)
            loss = method.loss(piece).mean() * share
            if not loss.requires_grad:
                raise NoGradient()
            loss.backward()
            total += loss.item()  # waits for the device
    return total


def _check(loss: float, optimiser: torch.optim.Optimizer, losses: list[float]) -> None:
    gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    if not isfinite(loss) or not all(bool(g.isfinite().all()) for g in gradients):
        raise Diverged(
            f"The loss stopped being a number at step {len(losses) + 1}; a lower learning rate usually helps, "
            "and so does starting ComfyUI with --fp32-unet.", losses
        )
    if not losses and not any(bool(g.any()) for g in gradients):
        raise NoGradient()
