"""Prompts whose every factor the oracle can check."""

from __future__ import annotations

import numpy as np

from .captions import PLACES
from .scene import BACKGROUNDS, COLOURS, PATTERNS, RELATIONS, pick
from .shapes import CLASSES, CONTAINERS, SUPPORTS

Prompt = tuple[str, dict[str, str]]


def single_object(rng: np.random.Generator) -> Prompt:
    """A prompt for one thing, e.g. 'a striped red cat wearing a hat on the beach', and the factors it asks for."""
    want = {"class": pick(rng, CLASSES), "colour": pick(rng, tuple(COLOURS)), "background": pick(rng, BACKGROUNDS)}
    words = [want["colour"], want["class"]]
    if rng.random() < 0.5:
        want["pattern"] = pick(rng, PATTERNS[1:])
        words.insert(0, want["pattern"])
    hat = ""
    if rng.random() < 0.3:
        want["hat"], hat = "hat", " wearing a hat"
    return f"{_article(words[0])} {' '.join(words)}{hat} {PLACES[want['background']][0]}", want


def two_objects(rng: np.random.Generator) -> Prompt:
    """A prompt for two things, e.g. 'a red cat left of a blue car in the snow', and the factors it asks for."""
    relation = pick(rng, RELATIONS)
    second = pick(rng, {"left of": CLASSES, "in": CONTAINERS, "on": SUPPORTS}[relation])
    want = {
        "class": pick(rng, [kind for kind in CLASSES if kind != second]),
        "colour": pick(rng, tuple(COLOURS)),
        "relation": relation,
        "second class": second,
        "second colour": pick(rng, tuple(COLOURS)),
        "background": pick(rng, BACKGROUNDS),
    }
    first = f"{_article(want['colour'])} {want['colour']} {want['class']}"
    other = f"{_article(want['second colour'])} {want['second colour']} {second}"
    return f"{first} {relation} {other} {PLACES[want['background']][0]}", want


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
