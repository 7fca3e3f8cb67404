"""Giving a model and its CLIP a concept, for a whole workflow or for single prompts."""

from collections.abc import Iterable

from ..host.cross_attention import edits_on, hook_of, sizes, with_edits
from ..host.sockets import CLIP, HookGroup, ModelPatcher
from ..textual_inversion.apply import apply_words
from ..textual_inversion.concept import Concept
from .apply import Applied, applied, overrides
from .covariance import precision
from .file import check_fits


def apply_concept(
    model: ModelPatcher, clip: CLIP, concept: Concept, strength: float, **settings
) -> tuple[ModelPatcher, CLIP]:
    """Clones of `model` and `clip` that know `concept`; at strength 0 the two themselves.

    `settings` are those of `perfusion.apply.Applied`; a concept that is only a word has no use for them.
    Raises ValueError for a concept of another base, or one that the model already has.
    """
    if strength == 0:
        return model, clip
    if concept.edit is None:
        return model, apply_words(clip, concept, strength)
    edit = _ready(model, clip, concept, strength, settings)
    if any(other.edit is concept.edit or other.placeholder == edit.placeholder for other in edits_on(model)):
        raise ValueError(f"{edit.placeholder} is already on this model; apply each concept once, and raise its "
                         "strength or lower its bias for more of it.")
    return with_edits(model, [edit], overrides), apply_words(clip, concept, 1.0)


def concept_hook(
    model: ModelPatcher, clip: CLIP, concept: Concept, strength: float, **settings
) -> tuple[HookGroup | None, CLIP]:
    """A hook that gives single prompts the concept, and a clone of `clip` that knows its word."""
    if concept.edit is None:
        return None, apply_words(clip, concept, strength)
    return hook_of([_ready(model, clip, concept, strength, settings)], overrides), apply_words(clip, concept, 1.0)


def names(concepts: Iterable[Concept]) -> str:
    """The placeholders of concepts, as prompts write them."""
    return " ".join(word.placeholder for concept in concepts for word in concept.words)


def _ready(model: ModelPatcher, clip: CLIP, concept: Concept, strength: float, settings: dict) -> Applied:
    (word,) = concept.words
    check_fits(concept, sizes(model))
    return applied(concept.edit, precision(clip), word.placeholder, strength=strength, **settings)
