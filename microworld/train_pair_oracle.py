"""Teach the oracle two nameless looks in one picture: `python3 dev.py run microworld/train_pair_oracle.py`.

The oracle has seen looks that no word names only alone. This one goes on from it, on pictures of two such things, and
judges pictures of two concepts; ID and TXT of single ones stay with the first.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from einops import rearrange, reduce
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from .data import PAIRS, parallel, work
from .fit import fit
from .oracle import FACTORS, PAIR_WEIGHTS, Oracle, factors, load
from .render import render
from .scene import BACKGROUNDS, RELATIONS, Scene, Thing, named_look, nameless_look, pick, place_alone, place_pair
from .shapes import CLASSES
from .train_oracle import RATE, augmented, contrastive, optimisers, save

SEED, ALONE = 5, 0.25
HEADS = ("class", "second class")


def scenes_of(rng: np.random.Generator, first: str, second: str) -> list[Scene]:
    """Two views of two things, or of the first alone; most have looks that no word names."""
    looks = [nameless_look(rng) if rng.random() < 0.8 else named_look(rng, kind, patterned=False)
             for kind in (first, second)]
    things = [Thing(kind, look) for kind, look in zip((first, second), looks, strict=True)]
    alone = rng.random() < ALONE
    made = []
    for _ in range(2):
        background, seed = pick(rng, BACKGROUNDS), int(rng.integers(2**31))
        if alone:
            made.append(Scene(place_alone(rng, things[0]), background, seed=seed))
        else:
            one, two = place_pair(rng, *things, RELATIONS[0])
            made.append(Scene(one, background, two, RELATIONS[0], seed=seed))
    return made


def group(index: int) -> dict[str, np.ndarray]:
    """PAIRS pairs of views of the same two classes, so that only looks tell them apart.

    Pictures (p 2 128 128 3) uint8, masks (p 2 2 32 32) uint8, labels (p 2) by position in FACTORS.
    """
    rng = np.random.default_rng([SEED, index])
    first, second = (CLASSES[number] for number in rng.choice(len(CLASSES), 2, replace=False))
    scenes = [scenes_of(rng, first, second) for _ in range(PAIRS)]
    drawn = [[render(scene) for scene in views] for views in scenes]
    masks = np.stack([[reduce(m, "c (h s) (w r) -> c h w", "max", s=4, r=4) for _, m in views] for views in drawn])
    labels = np.array([[FACTORS[name].index(factors(views[0])[name]) for name in HEADS] for views in scenes])
    return {"images": np.stack([[p for p, _ in views] for views in drawn]), "masks": masks, "labels": labels}


def step_loss(oracle: Oracle, data: dict[str, Tensor], step: int) -> Tensor:
    """Classes and masks of both things, and InfoNCE over the views of each place."""
    generator = torch.Generator().manual_seed(step)
    where = torch.randint(len(data["images"]), (1,), generator=generator).item()
    images = augmented(rearrange(data["images"][where], "p v h w c -> (v p) h w c"), generator)
    labels = data["labels"][where].repeat(2, 1)
    both = labels[:, 1] > 0
    with torch.autocast("cpu", torch.bfloat16):
        reading = oracle(images)
        looks = [oracle.identity(reading), oracle.identity(reading, reading.masks[:, 1].sigmoid().detach())[both]]
    classes = sum(F.cross_entropy(reading.logits[name].float(), label)
                  for name, label in zip(HEADS, labels.unbind(1), strict=True))
    masks = rearrange(data["masks"][where], "p v c h w -> (v p) c h w").float() / 255
    seen = F.binary_cross_entropy_with_logits(reading.masks.float(), masks)
    return classes + 2 * seen + sum(contrastive(look.float()) for look in looks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--groups", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    path = work(f"pair_examples_{args.groups}.safetensors")
    if not path.exists():
        made = list(parallel(group, range(args.groups), workers=args.workers))
        save_file({name: torch.from_numpy(np.stack([each[name] for each in made])) for name in made[0]}, path)
    data = load_file(path)
    oracle = load().to(memory_format=torch.channels_last).train()
    muon, adam = optimisers(oracle)
    fit(lambda step: step_loss(oracle, data, step), muon, adam, 0.5 * RATE, 100, args.minutes, "oracle of pairs")
    save(oracle, PAIR_WEIGHTS)


if __name__ == "__main__":
    main()
