"""Giving a model and its CLIP what tuning the whole model learned, and a model the offsets of a domain."""

from ..host.bases import warn_of_other_prediction
from ..host.sockets import CLIP, ModelPatcher
from ..host.weight_offsets import ALL_PARTS, matrix_shapes, with_added, with_offsets
from ..textual_inversion.apply import apply_words
from ..textual_inversion.concept import Concept
from .difference import Difference, is_same
from .domain import Domain

TUNED = "concepts_tuned"


def apply_tuned(model: ModelPatcher, clip: CLIP, concept: Concept, strength: float) -> tuple[ModelPatcher, CLIP]:
    """Clones of `model` and `clip` that know a concept with a difference; at strength 0 the two themselves.

    Raises ValueError for a concept of another base, or one that the model already has.
    """
    if strength == 0:
        return model, clip
    placeholder, tuned = concept.words[0].placeholder, model.get_attachment(TUNED) or ()
    for other, difference in tuned:
        same = other.lower() == placeholder.lower()
        if same or is_same(difference, concept.edit):
            known = "" if same else f" as {other}"
            raise ValueError(f"{placeholder} is already on this model{known}; apply each concept once, and raise its "
                             "strength for more of it.")
    _check_fits(placeholder, concept.metadata.get("modelspec.base_model", "another base"), model,
                {**{layer: (len(o.left), o.right.shape[1]) for layer, o in concept.edit.offsets.items()},
                 **{layer: (len(f.up), f.down.shape[1]) for layer, f in concept.edit.added.items()}})
    warn_of_other_prediction(placeholder, concept.metadata, model)
    patched = with_difference(model, concept.edit, strength)
    patched.set_attachments(TUNED, (*tuned, (placeholder, concept.edit)))
    return patched, apply_words(clip, concept, strength)


def apply_offsets(model: ModelPatcher, domain: Domain, strength: float) -> ModelPatcher:
    """A clone of `model` with the offsets of a domain; at strength 0 the model itself.

    Raises ValueError for a domain of another base.
    """
    if strength == 0 or not domain.offsets:
        return model
    _check_fits(f"The domain {domain.word!r}", domain.base, model,
                {layer: (len(o.left), o.right.shape[1]) for layer, o in domain.offsets.items()})
    warn_of_other_prediction(f"The domain {domain.word!r}", domain.metadata, model)
    return with_offsets(model, domain.offsets, strength)


def with_difference(model: ModelPatcher, difference: Difference, strength: float) -> ModelPatcher:
    """A clone of `model` with its attention matrices changed by `strength` of a difference."""
    return with_added(with_offsets(model, difference.offsets, strength), difference.added, strength)


def _check_fits(name: str, base: str, model: ModelPatcher, shapes: dict[str, tuple[int, int]]) -> None:
    """Raises ValueError unless the model has every matrix (out in) of `shapes`."""
    own = matrix_shapes(model, ALL_PARTS)
    for layer, (out, given) in shapes.items():
        if own.get(layer) != (out, given):
            here = "no such layer" if layer not in own else "{} × {}".format(*own[layer])
            raise ValueError(f"{name} was learned on {base}, which has {out} × {given} numbers in {layer}; this model "
                             f"has {here}: load a checkpoint of that base.")
