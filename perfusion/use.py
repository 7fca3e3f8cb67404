"""Giving a model and its CLIP a concept, for a whole workflow or for single prompts."""

import logging
from collections.abc import Iterable

from ..host.bases import warn_of_other_prediction
from ..host.cross_attention import edits_on, hook_of, sizes, with_edits
from ..host.sockets import CLIP, HookGroup, ModelPatcher
from ..host.text import fingerprint_of, widths
from ..textual_inversion.apply import apply_words
from ..textual_inversion.concept import Concept
from .apply import Applied, applied, overrides
from .concept import is_same
from .covariance import precision_for
from .file import check_encoder, check_fits

log = logging.getLogger("concepts")


def apply_concept(
    model: ModelPatcher, clip: CLIP, concept: Concept, strength: float, **settings
) -> tuple[ModelPatcher, CLIP]:
    """Clones of `model` and `clip` that know `concept`; at strength 0 the two themselves.

    `settings` are those of `perfusion.apply.Applied`; a concept that is only a word has no use for them.
    Raises ValueError for a concept of another base, one that the model already has, or a start that is not before the
    end.
    """
    if strength == 0:
        return model, clip
    if concept.edit is None:
        return model, apply_words(clip, concept, strength)
    taught, edit = _ready(model, clip, concept, strength, settings)
    for other in edits_on(model):
        same = other.placeholder.lower() == edit.placeholder.lower()
        if same or is_same(other.edit, edit.edit):
            known = "" if same else f" as {other.placeholder}"
            raise ValueError(f"{edit.placeholder} is already on this model{known}; apply each concept once, and raise "
                             "its strength or lower its bias for more of it.")
    return with_edits(model, [edit], overrides), taught


def concept_hook(
    model: ModelPatcher, clip: CLIP, concept: Concept, strength: float, **settings
) -> tuple[HookGroup, CLIP]:
    """A hook that gives single prompts the concept, and a clone of `clip` that knows its word.

    A concept that is only a word needs none, so that its group is empty.
    Where the model or another hook gives the prompt the same concept, one of them acts, and a hook before the model.
    Raises ValueError for a concept of another base, or a start that is not before the end.
    """
    if concept.edit is None:
        return HookGroup(), apply_words(clip, concept, strength)
    taught, edit = _ready(model, clip, concept, strength, settings)
    return hook_of([edit], overrides), taught


def names(concepts: Iterable[Concept]) -> str:
    """The placeholders of concepts, as prompts write them."""
    return " ".join(word.placeholder for concept in concepts for word in concept.words)


def _ready(
    model: ModelPatcher, clip: CLIP, concept: Concept, strength: float, settings: dict
) -> tuple[CLIP, Applied]:
    taught = apply_words(clip, concept, 1.0)
    check_fits(concept, sizes(model))
    check_encoder(concept, sum(widths(clip).values()))
    (word,) = concept.words
    if concept.edit.encoder and concept.edit.encoder != fingerprint_of(clip):
        log.warning("%s was learned with another text encoder than this one, or with another CLIP Set Last Layer in "
                    "front of where it is applied; it may look less like its photos.", word.placeholder)
    warn_of_other_prediction(word.placeholder, concept.metadata, model)
    start, end = settings.get("start", 0.0), settings.get("end", 1.0)
    if start >= end:
        raise ValueError(f"{word.placeholder} would never act: its start ({start:.2f}) is not before its end "
                         f"({end:.2f}); set the start lower or the end higher.")
    return taught, applied(concept.edit, precision_for(concept.edit, clip), word.placeholder, strength=strength,
                           **settings)
