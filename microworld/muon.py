"""Muon (Jordan 2024): momentum with orthogonalised steps, which uses a matrix's whole rank from the first step on."""

from __future__ import annotations

import math

import torch

MOMENTUM = 0.95


@torch.no_grad()
def orthogonal(gradient: torch.Tensor) -> torch.Tensor:
    """The semi-orthogonal matrix nearest to a gradient (rows, …), by Newton-Schulz iterations in bf16."""
    x = gradient.flatten(1).bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(4):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).float().reshape(gradient.shape)


class Muon:
    """Takes steps whose entries are about 0.2 rate in size, so that AdamW's rates suit it."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.parameters, self.momenta = parameters, [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every parameter (rows, …) along its gradient, and drop the gradients."""
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            momentum.lerp_(parameter.grad, 1 - MOMENTUM)
            nesterov = momentum.lerp(parameter.grad, 1 - MOMENTUM)
            size = math.sqrt(max(len(parameter), parameter[0].numel()))
            parameter.sub_(orthogonal(nesterov), alpha=0.2 * size * rate)
            parameter.grad = None
