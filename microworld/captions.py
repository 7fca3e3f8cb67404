"""Plain English for a scene, with words dropped at random as in captions from the web."""

from __future__ import annotations

import numpy as np

from .scene import Scene, Thing, pick

PLACES = {
    "grass": ("in the grass", "on the grass", "on grass"),
    "beach": ("on the beach", "at the beach", "on a beach"),
    "snow": ("in the snow", "in snow"),
    "night": ("at night", "in the night", "under the night sky"),
    "desert": ("in the desert", "in a desert"),
    "brick": ("in front of a brick wall", "by a brick wall"),
}
PREFIXES = ("", "", "", "a photo of ", "a picture of ", "a drawing of ", "an image of ", "a rendering of ", "photo of ")
FILLERS = (
    "nice", "beautiful", "good", "clean", "bright", "detailed", "cropped", "close-up", "cool", "small", "large", "cute",
    "weird", "dirty", "dark", "old", "new", "famous", "happy", "simple",
)


def noun_phrase(rng: np.random.Generator, thing: Thing, name: str | None, keep: float) -> str:
    """'a striped red cat wearing a hat', each describing word kept with probability `keep`."""
    words = [name or thing.kind]
    if name and rng.random() < 0.25:
        words = [name, thing.kind]
    if thing.look.colour and rng.random() < keep:
        words.insert(0, thing.look.colour)
    if thing.look.pattern != "plain" and rng.random() < keep:
        words.insert(int(rng.integers(len(words))), thing.look.pattern)
    if rng.random() < 0.06:
        words.insert(0, pick(rng, FILLERS))
    hat = pick(rng, (" wearing a hat", " with a hat")) if thing.hat and rng.random() < 0.9 else ""
    if name and rng.random() < 0.5:
        return " ".join(words) + hat
    article = pick(rng, ("the", "my", "one")) if rng.random() < 0.12 else "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}{hat}"


def caption(rng: np.random.Generator, scene: Scene, keep: float = 0.8) -> str:
    """A caption of the scene; `keep` is the chance that each describing word is said."""
    text = noun_phrase(rng, scene.first, scene.name, keep)
    if scene.second:
        other = noun_phrase(rng, scene.second, None, keep)
        text = _joined(rng, text, other, scene.relation)
    if rng.random() < keep:
        place = pick(rng, PLACES[scene.background])
        text = f"{text}, {place}" if rng.random() < 0.15 else f"{text} {place}"
    return pick(rng, PREFIXES) + text


def _joined(rng: np.random.Generator, first: str, second: str, relation: str) -> str:
    if rng.random() < 0.1:
        return f"{first} and {second}" if rng.random() < 0.5 else f"{second} and {first}"
    if relation != "left of":
        return f"{first} {relation} {second}"
    if rng.random() < 0.35:
        return f"{second} {pick(rng, ('right of', 'to the right of'))} {first}"
    return f"{first} {pick(rng, ('left of', 'to the left of'))} {second}"
