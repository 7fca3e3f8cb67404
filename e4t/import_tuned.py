"""A concept out of a folder that e4t-diffusion tuned on one picture: a whole UNet, kept as a compact difference."""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from ..host.copies import plain_weights, private_copies
from ..host.lora_names import diffusers_names
from ..host.progress import stop_if_cancelled
from ..host.sockets import CLIP, ModelPatcher
from ..host.weight_offsets import ALL_PARTS, attention_matrices
from ..perfusion.edit import exact_device
from ..textual_inversion.concept import Concept, Word
from .difference import Difference, LowRank
from .encoder import Vision
from .import_release import BASE
from .imported import IMPORTED, ImportedEncoder
from .method import Predictor
from .offsets import Offset
from .release import Release
from .tune import predict_each
from .use import with_difference


@dataclass(frozen=True)
class Kept:
    """Shares of the squared change of all weights, without that of the offsets: what `attention` has of it, and what
    the factors keep of that."""

    attention: float
    factors: float


def difference_of(release: Release, model: ModelPatcher, rank: int) -> tuple[Difference, Kept]:
    """W_tuned ⊙ (1 + Δ) = W ⊙ (1 + Δ) + (W_tuned - W) ⊙ (1 + Δ) for the attention matrices W of `model`, the last part
    by its `rank` largest singular values.

    Raises ValueError for a UNet that is not of the model's base.
    """
    own, matrices = plain_weights(model), attention_matrices(model.model.diffusion_model, ALL_PARTS)
    added: dict[str, LowRank] = {}
    inside = outside = lost = 0.0
    for theirs, ours in diffusers_names(model).items():
        stop_if_cancelled()
        tuned = _matching(release, theirs, own[ours])
        change = tuned - own[ours].to(tuned)  # which also brings it to the processor
        layer = ours.removesuffix(".weight")
        if layer not in matrices or not ours.endswith(".weight"):
            outside += change.square().sum().item()
            continue
        if layer in release.offsets:
            left, right = release.offsets[layer]
            change = change * (1 + left @ right)
        inside += change.square().sum().item()
        up, sizes, down = torch.linalg.svd(change.to(exact_device(model.load_device)), full_matrices=False)
        added[layer] = LowRank((up[:, :rank] * sizes[:rank]).cpu(), down[:rank].cpu())
        lost += sizes[rank:].square().sum().item()
    whole = max(inside + outside, 1e-30)
    offsets = {layer: Offset(*pair) for layer, pair in release.offsets.items()}
    return Difference(offsets, added), Kept(inside / whole, max(0.0, 1 - lost / max(inside, 1e-30)))


def concept_of(
    release: Release, model: ModelPatcher, clip: CLIP, picture: Tensor, latent: Tensor, vision: Vision,
    placeholder: str, rank: int,
) -> tuple[Concept, Kept]:
    """The concept of a tuned folder, for the picture (1 h w 3) it was tuned on and that picture's latent (1 c h w).

    Its word is the mean over noise levels of what the tuned encoder says at each step of the published sampling.
    Raises ValueError for a UNet of another base, and another CLIP vision.
    """
    encoder = ImportedEncoder(release.encoder).requires_grad_(False).eval()
    seen = encoder.seen(picture, vision)
    difference, kept = difference_of(release, model, rank)
    with private_copies(with_difference(model, difference, 1.0), clip) as (unet, text), torch.no_grad():
        predictor = Predictor(unet, text, release.domain_word, encoder.to(unet.load_device), {}, release.scale,
                              torch.zeros(0, 0))
        try:
            (start,) = predict_each(predictor, seen, latent.to(unet.load_device), 0)
        finally:
            predictor.installed.close()
    vectors = {name: found.cpu().clone() for name, found in start.words.items()}
    record = {"source": IMPORTED, "base": release.base, "rank": rank}
    metadata = {"modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": f"{BASE}/e4t",
                "modelspec.base_model": BASE, "modelspec.title": placeholder.strip("<>"),
                "concepts.training": json.dumps(record, separators=(",", ":"))}
    return Concept((Word(placeholder, release.domain_word, vectors),), difference, metadata), kept


def _matching(release: Release, name: str, weight: Tensor) -> Tensor:
    """A weight of the tuned UNet in single precision, in the shape of the model's."""
    tensor = release.unet.get(name)
    if tensor is None or tensor.numel() != weight.numel():
        found = "lacks it" if tensor is None else f"has {' × '.join(map(str, tensor.shape))} numbers"
        raise ValueError(f"The UNet of this folder does not fit the model: {name} has "
                         f"{' × '.join(map(str, weight.shape))} numbers there, and the folder's {found}; connect the "
                         f"checkpoint that it was tuned from, {release.base}.")
    tensor = tensor.float().reshape(weight.shape)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"The UNet of this folder is damaged: {name} holds values that are not finite numbers.")
    return tensor
