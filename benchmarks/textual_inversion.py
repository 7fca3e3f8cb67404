"""Textual Inversion's figures on the sample world: `python3 dev.py run benchmarks/textual_inversion.py`.

`--part photos`: ID and TXT of words learned from 1, 4 and 16 photos, beside the class word and real renders.
`--part vectors`: the same for 1, 2, 4 and 8 vectors. `--part debias`: colours of a class before and after.
Settings are chosen with `--split validation`; what is reported comes from `--split test`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..microworld.oracle import load, read, satisfied, similarity
from ..microworld.scene import BIASED_CLASS, COLOURS
from ..microworld.world import CONCEPTS, CURATED, concept_photos, super_category
from ..nodes.train_textual_inversion import PRESETS
from ..textual_inversion.apply import apply_words
from ..textual_inversion.concept import Concept
from ..textual_inversion.train import Preview, Recipe, learn_word
from ..training.dataset import gather
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


def learn(base, name: str, count: int, seed: int, **changes) -> Concept:
    """A word from `count` photos of a sample concept, by the node's balanced preset unless `changes` say otherwise."""
    pictures, _ = concept_photos(name, count, PHOTOS_SEED + seed)
    recipe = Recipe(**{"placeholder": "<mine>", "init_text": super_category(name), "seed": seed,
                       **PRESETS["balanced"], **changes})
    quiet = Preview(every=0, steps=1)
    return learn_word(*base, gather([torch.from_numpy(pictures)]), recipe, quiet).concept


def pictures_of(base, word: str, seed: int, cfg: float, concept: Concept | None = None) -> Tensor:
    """One picture of each scene (n h w 3)."""
    model, clip, vae = base
    clip = apply_words(clip, concept, 1.0) if concept else clip
    return draw(model, clip, vae, [scene.format(word) for scene, _ in SCENES], 1000 * seed, cfg=cfg)


def judge(oracle, images: Tensor, kind: str, real: Tensor) -> tuple[float, float]:
    """ID to real renders of the concept, and TXT of the scenes, class included."""
    scenes = [{"class": kind, **wanted} for _, wanted in SCENES]
    return similarity(oracle, images, real).mean().item(), satisfied(oracle, images, scenes).mean().item()


def compare(base, oracle, names: list[str], seeds: int, cfg: float, variants: dict[str, dict]) -> dict:
    """ID and TXT [mean, low, high] of every variant, of the class word, and ID among real renders."""
    scores: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        kind = super_category(name)
        real = torch.from_numpy(concept_photos(name, 24, REAL_SEED)[0])
        others = torch.from_numpy(concept_photos(name, 24, REAL_SEED + 1)[0])
        scores.setdefault("real renders", []).append((similarity(oracle, others, real).mean().item(), 1.0))
        for seed in range(seeds):
            drawn = {"class word": pictures_of(base, kind, seed, cfg)}
            for variant, changes in variants.items():
                count = changes.get("photos", 4)
                settings = {key: value for key, value in changes.items() if key != "photos"}
                concept = learn(base, name, count, seed, **settings)
                drawn[variant] = pictures_of(base, "<mine>", seed, cfg, concept)
            for variant, images in drawn.items():
                scores.setdefault(variant, []).append(judge(oracle, images, kind, real))
                print(f"{name}, seed {seed}, {variant}: ID %.3f TXT %.3f" % scores[variant][-1], flush=True)
    return {variant: {"ID": interval(np.array(values)[:, 0]), "TXT": interval(np.array(values)[:, 1])}
            for variant, values in scores.items()}


def debias(base, oracle, cfg: float, count: int, seed: int = 0) -> dict:
    """How far the colours of a class are from even, and how often the class is right, before and after."""
    (name,) = CURATED
    concept = learn(base, name, 16, seed)
    model, clip, vae = base
    taught = apply_words(clip, concept, 1.0)
    result = {}
    for label, word, encoder in (("class word", BIASED_CLASS, clip), ("learned word", "<mine>", taught)):
        images = draw(model, encoder, vae, [f"a {word}"] * count, 10_000 + seed, cfg=cfg)
        found = read(oracle, images)
        counts = Counter(reading["colour"] for reading in found)
        shares = np.array([counts[colour] / count for colour in COLOURS])
        distance = 0.5 * (np.abs(shares - 1 / len(COLOURS)).sum() + counts["other"] / count)
        result[label] = {
            "distance to even": float(distance),
            "shares": dict(zip(COLOURS, shares.tolist(), strict=True)),
            "class accuracy": float(np.mean([reading["class"] == BIASED_CLASS for reading in found])),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("photos", "vectors", "debias"), default="photos")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--changes", type=json.loads, default={}, help="other settings for all, as JSON")
    args = parser.parse_args()
    oracle, base = load(), load_checkpoint()
    names = [name for name, concept in CONCEPTS.items() if concept.split == args.split][: args.concepts]
    if args.part == "debias":
        result = debias(base, oracle, args.cfg, count=200)
    else:
        variants = {
            "photos": {f"{count} photos": {"photos": count} for count in (1, 4, 16)},
            "vectors": {f"{count} vectors": {"vectors": count} for count in (1, 2, 4, 8)},
        }[args.part]
        variants = {label: {**changes, **args.changes} for label, changes in variants.items()}
        result = compare(base, oracle, names, args.seeds, args.cfg, variants)
    result |= {"split": args.split, "seeds": args.seeds, "cfg": args.cfg, "changes": args.changes}
    text = json.dumps(result, indent=1)
    if args.split == "test":
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"textual_inversion_{args.part}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
