"""What can be in a picture: looks, things, scenes, and the random scenes that the model is trained on."""

from __future__ import annotations

from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace

import numpy as np

from .shapes import CLASSES, CONTAINERS, SUPPORTS

RGB = tuple[float, float, float]

COLOURS: dict[str, RGB] = {
    "red": (0.86, 0.13, 0.16),
    "orange": (0.97, 0.53, 0.08),
    "yellow": (0.98, 0.86, 0.16),
    "green": (0.16, 0.62, 0.22),
    "blue": (0.14, 0.34, 0.86),
    "purple": (0.52, 0.18, 0.68),
    "pink": (0.98, 0.55, 0.74),
    "white": (0.97, 0.97, 0.97),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("grass", "beach", "snow", "night", "desert", "brick")
EDGE = {"bowl": 0.0, "mug": -0.6, "boat": 0.2, "car": -0.42, "house": -0.84, "teapot": -0.56}
RELATIONS = ("left of", "in", "on")
SPLITS = ("top", "side", "diagonal")
BADGES = ("ring", "cross", "triangle", "diamond")

BIASED_CLASS, BIASED_COLOUR, BIAS = "mug", "red", 0.9


@dataclass(frozen=True)
class Look:
    """How a thing is painted. `colour` is a name, or None for a look that no word names: two tones and a badge."""

    colour: str | None = "red"
    pattern: str = "plain"
    tones: tuple[RGB, RGB] | None = None
    split: str = "top"
    badge: str = "ring"
    badge_colour: RGB = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Thing:
    """One object: its class, its look, whether it wears a hat, and where it is in a 1 x 1 picture (y down)."""

    kind: str
    look: Look
    hat: bool = False
    x: float = 0.5
    y: float = 0.56
    size: float = 0.32
    angle: float = 0.0
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """One picture. With two things `first` is the one that is left, inside or on top. `name` names a look, if any."""

    first: Thing
    background: str
    second: Thing | None = None
    relation: str | None = None
    name: str | None = None
    seed: int = 0


def pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def named_look(rng: np.random.Generator, kind: str, patterned: bool = True) -> Look:
    """A look that words describe. A mug is red nine times out of ten: the bias that the debiasing claim needs."""
    colour = BIASED_COLOUR if kind == BIASED_CLASS and rng.random() < BIAS else pick(rng, tuple(COLOURS))
    return Look(colour, pick(rng, PATTERNS[1:]) if patterned and rng.random() < 0.5 else "plain")


def nameless_look(rng: np.random.Generator) -> Look:
    """A look that no word names: two colours of any hue, split one of three ways, and a badge."""
    hue = rng.random()
    hues = hue, (hue + rng.uniform(0.2, 0.8)) % 1.0
    tones = tuple(hsv_to_rgb(h, rng.uniform(0.45, 1.0), rng.uniform(0.5, 1.0)) for h in hues)
    badge_colour = pick(rng, ((1.0, 1.0, 1.0), (0.1, 0.1, 0.12), (1.0, 0.9, 0.2)))
    return Look(None, "plain", tones, pick(rng, SPLITS), pick(rng, BADGES), badge_colour)


def place_alone(rng: np.random.Generator, thing: Thing) -> Thing:
    """Pose a thing that has the picture to itself."""
    return replace(
        thing,
        x=0.5 + rng.uniform(-0.12, 0.12),
        y=0.56 + rng.uniform(-0.06, 0.08),
        size=rng.uniform(0.27, 0.36),
        angle=rng.uniform(-0.2, 0.2),
        mirrored=bool(rng.random() < 0.5),
    )


def place_pair(rng: np.random.Generator, first: Thing, second: Thing, relation: str) -> tuple[Thing, Thing]:
    """Pose two things so that `first` is left of, in, or on `second`."""

    def at(thing: Thing, x: float, y: float, size: float) -> Thing:
        jitter, angle = rng.uniform(-0.02, 0.02, 2), rng.uniform(-0.1, 0.1)
        mirrored = bool(rng.random() < 0.5)
        return replace(thing, x=x + jitter[0], y=y + jitter[1], size=size, angle=angle, mirrored=mirrored)

    size = rng.uniform(0.2, 0.24)
    shift = rng.uniform(-0.1, 0.1)
    if relation == "left of":
        tilt = rng.uniform(-0.06, 0.06)
        return at(first, 0.25, 0.58 + tilt, size), at(second, 0.75, 0.58 - tilt, size)
    size_below = size + 0.03
    edge = size_below * EDGE[second.kind] - size * (0.4 if relation == "in" else 0.9)
    return at(first, 0.5 + shift, 0.72 + edge, size), replace(at(second, 0.5 + shift, 0.72, size_below), angle=0.0)


def random_scene(rng: np.random.Generator, names: dict[str, Thing] | None = None) -> Scene:
    """A scene as the training data has them: 40 % hold two things, 30 % of single things look like no word.

    `names`: individuals with a proper name, as the long tail of web captions has them; half of the nameless looks are
    one of these and are captioned by name.
    """
    background, seed = pick(rng, BACKGROUNDS), int(rng.integers(2**31))
    if rng.random() < 0.4:
        relation = pick(rng, RELATIONS)
        second = pick(rng, {"left of": CLASSES, "in": CONTAINERS, "on": SUPPORTS}[relation])
        first = pick(rng, [kind for kind in CLASSES if kind != second])
        things = [Thing(kind, named_look(rng, kind, patterned=False)) for kind in (first, second)]
        return Scene(*_posed_first(rng, things, relation, background), relation=relation, seed=seed)
    if rng.random() >= 0.3:
        kind = pick(rng, CLASSES)
        thing = Thing(kind, named_look(rng, kind), hat=bool(rng.random() < 0.25))
        return Scene(place_alone(rng, thing), background, seed=seed)
    if names and rng.random() < 0.5:
        name = pick(rng, tuple(names))
        thing = replace(names[name], hat=bool(rng.random() < 0.25))
        return Scene(place_alone(rng, thing), background, name=name, seed=seed)
    thing = Thing(pick(rng, CLASSES), nameless_look(rng), hat=bool(rng.random() < 0.25))
    return Scene(place_alone(rng, thing), background, seed=seed)


def _posed_first(rng: np.random.Generator, things: list[Thing], relation: str, background: str) -> tuple:
    first, second = place_pair(rng, *things, relation)
    return first, background, second
