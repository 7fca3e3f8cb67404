"""Textual Inversion's figures on the sample world: `python3 dev.py run benchmarks/textual_inversion.py`.

`--part photos`: ID and TXT of words learned from 1, 4 and 16 photos, beside the class word and real renders.
`--part vectors`: the same for 1, 2, 4 and 8 vectors. `--part debias`: colours of a class before and after; its settings
are `--cfg 2 --changes '{"vectors": 8, "preset": "balanced"}'`. `--part settings`: the variants given as `--variants`.
Settings are chosen with `--split validation`; what is reported comes from `--split test`. Concepts are shared out over
two processes of one thread each.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..microworld.data import parallel
from ..microworld.oracle import OTHER, load, read, satisfied, similarity
from ..microworld.scene import BIASED_CLASS, COLOURS
from ..microworld.world import CURATED, concept_photos, super_category
from ..nodes.train_textual_inversion import pace_of
from ..textual_inversion.apply import apply_words
from ..textual_inversion.concept import Concept
from ..textual_inversion.train import Preview, Recipe, learn_word
from ..training.dataset import gather
from .concepts import conditions, names_of, parser, report
from .microworld import interval
from .sampling import draw, load_checkpoint

HERE = Path(__file__).parent
PHOTOS_SEED, REAL_SEED = 1, 900_000
SCENES = (
    ("a {} in the snow", {"background": "snow"}),
    ("a {} on the beach", {"background": "beach"}),
    ("a {} at night", {"background": "night"}),
    ("a {} wearing a hat in the desert", {"background": "desert", "hat": "hat"}),
    ("a {} in front of a brick wall", {"background": "brick"}),
    ("a {} left of a red tree in the grass",
     {"background": "grass", "relation": "left of", "second class": "tree", "second colour": "red"}),
    ("a {} on a blue car in the snow",
     {"background": "snow", "relation": "on", "second class": "car", "second colour": "blue"}),
)


def learn(
    base, name: str, seed: int, photos: int = 4, masked: bool = True, preset: str = "quick", **changes
) -> Concept:
    """A word from photos of a sample concept, by the node's preset unless `changes` say otherwise."""
    kind = super_category(name)
    pictures, masks = concept_photos(name, photos, PHOTOS_SEED + seed)
    recipe = Recipe(**{"placeholder": "<mine>", "init_text": kind, "seed": seed,
                       **pace_of(preset, base[1], kind), **changes})
    quiet = Preview(every=0, steps=1)
    given = gather([torch.from_numpy(pictures)], [torch.from_numpy(masks)] if masked else [])
    return learn_word(*base, given, recipe, quiet).concept


def pictures_of(base, word: str, seed: int, cfg: float, concept: Concept | None = None) -> Tensor:
    """One picture of each scene (n h w 3)."""
    model, clip, vae = base
    clip = apply_words(clip, concept, 1.0) if concept else clip
    return draw(model, clip, vae, [scene.format(word) for scene, _ in SCENES], 1000 * seed, cfg=cfg)


def judge(oracle, images: Tensor, kind: str, real: Tensor) -> tuple[float, float]:
    """ID to real renders of the concept, and TXT of the scenes, class included."""
    scenes = [{"class": kind, **wanted} for _, wanted in SCENES]
    return similarity(oracle, images, real).mean().item(), satisfied(oracle, images, scenes).mean().item()


def compare(names: list[str], seeds: int, cfg: float, variants: dict[str, dict]) -> dict:
    """ID and TXT [mean, low, high] of every variant, of the class word, and ID among real renders."""
    jobs = len(names)
    rows = [row for part in parallel(_scores, names, [seeds] * jobs, [cfg] * jobs, [variants] * jobs) for row in part]
    labels = dict.fromkeys(label for label, *_ in rows)
    return {label: {measure: interval(np.array([row[place] for row in rows if row[0] == label]).reshape(jobs, -1))
                    for place, measure in ((1, "ID"), (2, "TXT"))} for label in labels}


def _scores(name: str, seeds: int, cfg: float, variants: dict[str, dict]) -> list[tuple[str, float, float]]:
    """Label, ID and TXT of every picture set of one concept."""
    torch.set_num_threads(1)
    oracle, base = load(), load_checkpoint()
    kind = super_category(name)
    real = torch.from_numpy(concept_photos(name, 24, REAL_SEED)[0])
    others = torch.from_numpy(concept_photos(name, 24, REAL_SEED + 1)[0])
    rows = [("real renders", similarity(oracle, others, real).mean().item(), 1.0)]
    for seed in range(seeds):
        rows.append(("class word", *judge(oracle, pictures_of(base, kind, seed, cfg), kind, real)))
        for label, changes in variants.items():
            drawn = pictures_of(base, "<mine>", seed, cfg, learn(base, name, seed, **changes))
            rows.append((label, *judge(oracle, drawn, kind, real)))
            print(f"{name}, seed {seed}, {label}: ID {rows[-1][1]:.3f} TXT {rows[-1][2]:.3f}", flush=True)
    return rows


def debias(seeds: int, cfg: float, count: int, changes: dict, workers: int) -> dict:
    """How far the colours of a class are from even, and how often the class is right, before and after.

    Things of two colours, which no word names, count as a colour of their own; or not at all, among the one-coloured.
    """
    found = list(parallel(_colours, range(seeds), [cfg] * seeds, [count] * seeds, [changes] * seeds, workers=workers))
    measures = ("distance to even", "distance of the one-coloured", "class accuracy")
    result: dict = {label: {measure: interval(np.array([one[label][measure] for one in found])) for measure in measures}
                    | {"shares": {colour: round(float(np.mean([one[label]["shares"][colour] for one in found])), 3)
                                  for colour in found[0][label]["shares"]}}
                    for label in found[0]}
    for measure in measures:
        result[f"{measure}, learned ÷ class word"] = interval(
            np.array([one["learned word"][measure] / one["class word"][measure] for one in found]))
    return result


def _colours(seed: int, cfg: float, count: int, changes: dict) -> dict:
    """The same for a word learned with one seed."""
    torch.set_num_threads(1)
    (name,) = CURATED
    oracle, base = load(), load_checkpoint()
    model, clip, vae = base
    taught = apply_words(clip, learn(base, name, seed, **{"photos": 16, **changes}), 1.0)
    result = {}
    for label, word, encoder in (("class word", BIASED_CLASS, clip), ("learned word", "<mine>", taught)):
        seen = read(oracle, draw(model, encoder, vae, [f"a {word}"] * count, 10_000 * (seed + 1), cfg=cfg))
        counts = Counter(reading["colour"] for reading in seen)
        shares = {colour: counts[colour] / count for colour in (*COLOURS, OTHER)}
        named = np.array([shares[colour] for colour in COLOURS])
        distance = 0.5 * (np.abs(named - 1 / len(COLOURS)).sum() + shares[OTHER])
        result[label] = {"distance to even": distance, "shares": shares,
                         "distance of the one-coloured": 0.5 * np.abs(named / named.sum() - 1 / len(COLOURS)).sum(),
                         "class accuracy": float(np.mean([reading["class"] == BIASED_CLASS for reading in seen]))}
        print(f"seed {seed}, {label}: distance {distance:.3f}, class {result[label]['class accuracy']:.3f}", flush=True)
    return result


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--part", choices=("photos", "vectors", "debias", "settings"), default="photos")
    own.add_argument("--changes", type=json.loads, default={}, help="other settings for all, as JSON")
    own.add_argument("--variants", type=json.loads, default={}, help="settings by label, as JSON")
    args = own.parse_args()
    names = names_of(args)
    if args.part == "debias":
        result = debias(args.seeds, args.cfg, 100, args.changes, args.workers) | {"concepts": list(CURATED)}
    else:
        variants = {
            "photos": {f"{count} photos": {"photos": count} for count in (1, 4, 16)},
            "vectors": {f"{count} vectors": {"vectors": count} for count in (1, 2, 4, 8)},
            "settings": args.variants,
        }[args.part]
        variants = {label: {**changes, **args.changes} for label, changes in variants.items()}
        result = compare(names, args.seeds, args.cfg, variants)
    report(conditions(args) | result | {"changes": args.changes}, f"textual_inversion_{args.part}", args)


if __name__ == "__main__":
    main()
