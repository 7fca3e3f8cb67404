"""Which method applies a concept, by what it learned."""

from ..e4t.difference import Difference
from ..e4t.use import apply_tuned
from ..perfusion.use import apply_concept
from ..textual_inversion.concept import Concept


def applied(model, clip, concept: Concept, strength: float, **settings) -> tuple:
    """Clones of `model` and `clip` that know the concept; `settings` are those of a Perfusion edit."""
    if isinstance(concept.edit, Difference):
        return apply_tuned(model, clip, concept, strength)
    return apply_concept(model, clip, concept, strength, **settings)


def require_no_difference(concept: Concept, what: str) -> None:
    """Raises ValueError for a tuned model, which `what` cannot take."""
    if isinstance(concept.edit, Difference):
        raise ValueError(f"{concept.words[0].placeholder} is a tuned model (E4T), which {what}; use Apply Concept, or "
                         "tune it again with the result 'concept'.")
