"""The gated rank-1 edit (Perfusion, section 4): pure maths on tensors.

Throughout, i (j d) are the target inputs of J concepts, e (… d) encodings of tokens, and the metric is that of the
inverse covariance: <a, b> = aᵀ C⁻¹ b. `dual` (j d) holds C⁻¹ i, so that <i, e> is a plain product.
"""

import torch
from einops import einsum
from torch import Tensor
from torch.nn.functional import logsigmoid

RIDGE = 1e-6  # of the Gram matrix, whose diagonal is 1: keeps it solvable when two concepts are one
TRAINING_TEMPERATURE = 0.1
KIN = 0.5  # the similarity up to which a token has only read of the concept; the word itself has 1


def dual_of(target_inputs: Tensor, precision: Tensor) -> Tensor:
    """C⁻¹ i (j d) of target inputs (j d) under the precision C⁻¹ (d d), in double precision."""
    return target_inputs.double() @ precision.double()


def similarity(encodings: Tensor, target_inputs: Tensor, dual: Tensor) -> Tensor:
    """s(e) = <i, e> / <i, i>, which is 1 at the target input: (… d) -> (… j). The scale of C cancels."""
    energy = einsum(target_inputs, dual.to(target_inputs), "j d, j d -> j")
    return einsum(encodings, dual.to(encodings), "... d, j d -> ... j") / energy.to(encodings)


def gate(s: Tensor, bias: Tensor | float, temperature: Tensor | float) -> Tensor:
    """σ((s - β) / τ): how far each concept is switched on, of the shape of s (… j)."""
    return torch.sigmoid((s - bias) / temperature)


def gate_of_kin(s: Tensor, bias: Tensor | float, temperature: Tensor | float) -> Tensor:
    """(σ((s - β) / τ) - σ((KIN - β) / τ))₊ / (1 - σ((KIN - β) / τ)): the gate, closed to tokens that hold no more than
    KIN of the concept.

    The published gate lets a little of o* into every token, and much into those behind the word, which have read it.
    Prompts are filled up to 77 tokens, and at a low bias these seventy are most of what the picture sees.
    """
    closed, floor = (logsigmoid((torch.as_tensor(bias) - x) / temperature) for x in (s, torch.full_like(s, KIN)))
    return -torch.expm1(closed - floor).clamp(max=0)  # 1 - (1 - σ(s)) / (1 - σ(KIN)), which loses no digits


def withheld(components: Tensor, gates: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
    """(c - g)₊, what the gate does not let through of what the edit takes out: how much of it stays untouched, and how
    much is given to the super-category; both of the shape of c and g (… j).

    Equation 3 drops it, which erases the thing at a high bias, and at any bias what the tokens behind the word have
    read of it. Here a token on which the gate opens less than on the word itself (`opened` o, of shape j) keeps the
    share (o - g) (2 - o) of it as the text encoder made it, so that a rising bias takes the word first and then what
    others have read of it. On the word itself nothing is kept: its keys are locked at any bias.
    """
    held = (components - gates).clamp(min=0)
    untouched = (opened - gates).clamp(min=0) * (2 - opened) * held
    return untouched, held - untouched


def exact_device(device: torch.device) -> torch.device:
    """Where linear algebra of tensors on `device` is done: many others have no double, no solve, or an unsound SVD."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def components(s: Tensor, target_inputs: Tensor, dual: Tensor, present: Tensor | None = None) -> Tensor:
    """What each concept holds of an encoding: e⊥ = e - Σ_j c_j i_j has <i_k, e⊥> = 0 for every k (equation 10).

    `s` (… j) are the similarities. c solves the Gram system G c = <i, e> with G_kj = <i_k, i_j>, here scaled to a unit
    diagonal; for one concept c = s. Concepts that are not `present` (… j, boolean) take no part. Each k may have a
    metric of its own.
    """
    here = torch.ones_like(s) if present is None else present.to(s)
    if s.shape[-1] == 1:
        return s * here
    where = exact_device(s.device)
    similar, target_inputs, dual, here = (t.to(where).double() for t in (s, target_inputs, dual, here))
    gram = einsum(target_inputs, dual, "j d, k d -> k j")
    length = gram.diagonal().sqrt()
    others = (gram / length[:, None] / length).fill_diagonal_(0) * here[..., None] * here[..., None, :]
    identity = torch.eye(len(length), dtype=gram.dtype, device=where)
    solved = torch.linalg.solve_ex(others + (1 + RIDGE) * identity, similar * length * here)[0]  # no wait for the card
    return (solved / length).to(s)
