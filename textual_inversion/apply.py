"""Giving a CLIP the words of a concept."""

import logging

from ..host.clip_overlay import with_words
from ..host.sockets import CLIP
from ..host.text import ready, rows, widths
from .concept import Concept, Word
from .word import between, spread

log = logging.getLogger("concepts")
MEND = "load a checkpoint of that base, or a concept learned on this one"


def apply_words(clip: CLIP, concept: Concept, strength: float) -> CLIP:
    """A clone of `clip` that knows the words of `concept` at `strength`; at 0 `clip` itself.

    Below 1 a word lies on the way from its class word to what was learned, above 1 beyond it.
    Raises ValueError when a word was learned for a text encoder of another size.
    """
    if strength == 0:
        return clip
    for word in concept.words:
        _require_fit(clip, word, concept.metadata.get("modelspec.base_model", "another base"))
    words = concept.words if strength == 1 else [_scaled(clip, word, strength) for word in concept.words]
    return with_words(clip, words)


def _require_fit(clip: CLIP, word: Word, base: str) -> None:
    present = widths(clip)
    for encoder in word.vectors.keys() & present.keys():
        learned = word.vectors[encoder].shape[1]
        if learned != present[encoder]:
            raise ValueError(
                f"{word.placeholder} was learned on {base} for a text encoder of width {learned}; "
                f"this CLIP's {encoder} has width {present[encoder]}: {MEND}."
            )
    if not word.vectors.keys() & present.keys():
        raise ValueError(f"{word.placeholder} was learned on {base} for {', '.join(word.vectors)}; "
                         f"this CLIP has {', '.join(present) or 'no such text encoder'}: {MEND}.")
    if others := present.keys() - word.vectors.keys():
        log.warning("%s was learned on %s for %s; this CLIP's %s reads %s in its place, so that it may look less like "
                    "what was learned.", word.placeholder, base, ", ".join(word.vectors), ", ".join(sorted(others)),
                    word.class_word or "nothing")
    if lost := word.vectors.keys() - present.keys():
        log.warning("%s was learned on %s for %s too, which this CLIP lacks, so that it may look less like what was "
                    "learned.", word.placeholder, base, ", ".join(sorted(lost)))


def _scaled(clip: CLIP, word: Word, strength: float) -> Word:
    starts = rows(ready(clip), word.class_word)
    vectors = {
        encoder: between(spread(starts[encoder], len(v)) if len(starts[encoder]) else v * 0, v, strength)
        for encoder, v in word.vectors.items() if encoder in starts
    }
    return Word(word.placeholder, word.class_word, vectors)
