"""A domain of a published release, and what became of it on the way."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .domain import Domain
from .encoder import Vision
from .imported import IMPORTED, ImportedEncoder
from .offsets import Offset
from .release import Release

BASE = "SD15"  # whose layers a release names
MB = 1e6  # bytes


def domain_of(release: Release, vision: Vision) -> Domain:
    """The domain of a release that was trained with this CLIP vision.

    Raises ValueError for another CLIP vision, and for a model that was tuned on one picture, which is no domain.
    """
    if release.unet or release.text_encoder:
        raise ValueError(f"This folder holds a whole model that was tuned on one picture of a {release.domain_word}, "
                         "not a domain; use Import Tuned E4T, or import the folder that it was tuned from.")
    encoder = ImportedEncoder(release.encoder).requires_grad_(False).eval()
    encoder.seen(torch.zeros(1, vision.side, vision.side, 3), vision)
    record = {"source": IMPORTED, "base": release.base, "prompt_template": release.prompt_template}
    return Domain(release.domain_word, BASE, encoder, {layer: Offset(*pair) for layer, pair in release.offsets.items()},
                  release.scale, metadata={"concepts.training": json.dumps(record, separators=(",", ":"))},
                  vision=vision.fingerprint)


def report(release: Release, vision: str) -> str:
    """What was read, what it was reduced to, and at what error; `vision` is the fingerprint of the CLIP vision."""
    before = 4 * sum(published_numbers(*offset) for offset in release.offsets.values())
    after = 4 * sum(left.numel() + right.numel() for left, right in release.offsets.values())
    encoder = 4 * sum(tensor.numel() for tensor in release.encoder.tensors().values())
    step = 4 * sum(parameter.numel() for parameter in release.encoder.parameters())
    return "\n".join((
        f"{release.domain_word}: a domain learned on {release.base}; words at a scale of {release.scale:g}.",
        f"Weight offsets of {len(release.offsets)} matrices: {before / MB:.1f} MB became {after / MB:.1f} MB of rank "
        f"3. They differ by at most {release.offset_error:.1e} of a matrix's largest offset, in the half precision of "
        f"the file by {half_error(release.offsets):.1e}.",
        f"Encoder: {encoder / MB:.0f} MB, of which {step / MB:.0f} MB run at each step; the rest says what a picture "
        "adds, once for each picture.",
        f"CLIP vision that it sees with: {vision}. It is not in the file.",
    ))


def published_numbers(left: Tensor, right: Tensor) -> int:
    """How many numbers a release spends on the offset of one matrix (out in), for factors (out r) and (r in).

    v, two linear layers from it, and a square matrix with bias for each side.
    """
    out, into = len(left), right.shape[1]
    return 1 + 2 * into + 2 * out + into * into + into + out * out + out


def half_error(offsets: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """The largest |Δ - Δ of the factors in half precision|, relative to the largest |Δ| of the same matrix."""
    worst = 0.0
    for left, right in offsets.values():
        whole = left @ right
        error = (whole - left.half().float() @ right.half().float()).abs().max()
        worst = max(worst, (error / whole.abs().max().clamp(min=1e-30)).item())
    return worst
