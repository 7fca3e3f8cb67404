"""Individuals: named ones that the training captions mention, and sample concepts that the model has never seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .render import render
from .scene import BACKGROUNDS, BIASED_CLASS, COLOURS, Look, Scene, Thing, nameless_look, pick, place_alone
from .shapes import CLASSES

_FIRST_NAMES = """
aaron abby adam alan albert alex alice allan amber amy andy angela anna annie arthur ashley barry becky ben bernard
beth betty bill bob brad brenda brett brian bruce carl carla carmen carol cathy charles charlie chris cindy claire
clara cody colin connor craig daisy dan dana danny dave david dawn dean debbie dennis derek diana diego don donna doris
dorothy doug duncan dylan earl eddie edgar edith elaine ella ellen elliot elmer elsie emily emma eric erica ernie
ethan eva evan evelyn faith felix fiona florence frances frank fred gabriel gail gary gavin george gerald gina glen
gloria gordon grace graham greg gwen hank hannah harold harry hazel heather hector heidi helen henry herbert holly
homer howard hugh hugo ian ida igor irene iris irma isaac isabel ivan jack jacob jake james jamie jane janet jason
jean jeff jenny jeremy jerry jesse jill jim joan joe joel john jordan joseph josh joyce juan judy julia julian karen
kate kathy keith kelly ken kevin kim kurt kyle larry laura lauren leah lee lena leo leon leroy leslie lewis liam
lily linda lisa lloyd logan lois lola louis lucas lucy luke luna lydia mabel mandy marcus margaret maria marie mario
marion mark martha martin marvin mary matt maurice max maya megan melissa mia michael mike mildred milo molly monica
morgan nadia nancy naomi natalie nathan neil nick nicole nigel noah nora norman olive oliver olivia omar oscar owen
pablo paige pam patrick patsy paul paula pearl peggy penny percy perry pete peter phil phoebe phyllis quentin rachel
ralph ramon randy ray rebecca regina rex ricardo richard rick rita rob robert robin rodney roger roland ron rosa rose
ross roy ruby rufus russell ruth ryan sadie sally sam samantha sandra sara scott sean sergio seth shane sharon sheila
shelly sidney simon sofia sonia sophie stacy stan stella stephen steve stuart sue susan sylvia tara ted teresa terry
theo thomas tim tina toby todd tom tony tracy travis trevor troy tyler ursula vera vernon vicky victor vincent viola
violet virginia vivian wade wallace walter wanda warren wayne wendy wesley wilbur willie winston yolanda yvonne zach
""".split()


def _individual(seed: list[int], kind: str) -> Thing:
    return Thing(kind, nameless_look(np.random.default_rng(seed)))


NAMES: dict[str, Thing] = {
    name: _individual([11, i], CLASSES[i % len(CLASSES)]) for i, name in enumerate(_FIRST_NAMES)
}


@dataclass(frozen=True)
class SampleConcept:
    """A thing to personalise: what it is, and whether settings are chosen on it or only reported on it."""

    thing: Thing
    split: str

    @property
    def super_category(self) -> str:
        return self.thing.kind


_SUBJECTS = ("teddy", "teapot", "cat", "bird", "car", "fish", "house", "boat")

CONCEPTS: dict[str, SampleConcept] = {
    f"{split} {kind}": SampleConcept(_individual([seed, i], kind), split)
    for seed, split in ((23, "validation"), (37, "test"))
    for i, kind in enumerate(_SUBJECTS)
}


CURATED = {f"{BIASED_CLASS}s of every colour": BIASED_CLASS}


def super_category(name: str) -> str:
    """The ordinary word for a sample concept or a curated set. Raises KeyError for another name."""
    return CURATED.get(name) or CONCEPTS[name].super_category


def concept_photos(name: str, count: int, seed: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Photos of a sample concept, or of a curated set's things, each colour as often, in random poses and places.

    Returns pictures (count, size, size, 3) and masks (count, size, size), float32 in 0..1. Raises KeyError for a name
    that is not in `CONCEPTS` or `CURATED`.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    if name in CURATED:
        colours = [colour for _ in range(0, count, len(COLOURS)) for colour in rng.permutation(list(COLOURS))]
        things = [Thing(CURATED[name], Look(str(colour))) for colour in colours[:count]]
    else:
        things = [CONCEPTS[name].thing] * count
    scenes = [
        Scene(place_alone(rng, thing), pick(rng, BACKGROUNDS), seed=int(rng.integers(2**31))) for thing in things
    ]
    pictures, masks = zip(*(render(scene, size) for scene in scenes), strict=True)
    return np.stack(pictures).astype(np.float32) / 255, np.stack(masks)[:, 0].astype(np.float32) / 255
