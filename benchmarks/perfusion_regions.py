"""Two concepts in one picture, a half for each: `python3 dev.py run benchmarks/perfusion_regions.py`.

Each half has a prompt of its own that describes the whole picture, as in the template *perfusion_regions*. On the right
it names the left thing first ("a teddy left of a <two>") or its own ("a <two> right of a teddy").
Settings are chosen with `--split validation`; what is reported comes from `--split test`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from comfy.sd import CLIP
from torch import Tensor

from ..microworld import captions
from ..microworld.data import parallel
from ..microworld.oracle import PAIR_WEIGHTS, load
from ..microworld.world import CONCEPTS, concept_photos, super_category
from ..perfusion.use import apply_concept
from .perfusion import averages, learned, rightness
from .sampling import draw, encode, load_checkpoint
from .textual_inversion import HERE, REAL_SEED

SIDE = 128
ORDERS = {"the left thing first": "a {left} left of a <two> {place}",
          "its own thing first": "a <two> right of a {left} {place}"}
METHODS = {"Perfusion": "locked keys", "Textual Inversion": "word"}


def halves(clip: CLIP, places: list[str], sentences: tuple[str, str], classes: tuple[str, str]) -> list:
    """The conditioning of both halves, for a picture at each of `places`."""
    left, right = classes
    mask = torch.zeros(1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    both = []
    for sentence, half in zip(sentences, (mask, 1 - mask), strict=True):
        ((encoding, extra),) = encode(clip, [sentence.format(left=left, right=right, place=place) for place in places])
        both.append([encoding, {**extra, "mask": half, "mask_strength": 1.0, "set_area_to_bounds": False}])
    return both


def pictures_of(base, names: tuple[str, str], seed: int, kind: str, order: str, cfg: float, bias: float) -> Tensor:
    """One picture of the two at each place (n h w 3)."""
    model, clip, vae = base
    for word, name in zip(("<one>", "<two>"), names, strict=True):
        model, clip = apply_concept(model, clip, learned(base, name, seed, kind, word), 1.0, bias=bias)
    encoding = partial(halves, sentences=("a <one> left of a {right} {place}", ORDERS[order]),
                       classes=tuple(map(super_category, names)))
    return draw(model, clip, vae, [places[0] for places in captions.PLACES.values()], 1000 * seed, cfg=cfg, size=SIDE,
                encoding=encoding)


def one_pair(first: str, second: str, seed: int, cfg: float, bias: float) -> dict[str, dict[str, float]]:
    """`perfusion.rightness` by method and order."""
    torch.set_num_threads(1)
    oracle, base = load(PAIR_WEIGHTS), load_checkpoint()
    reals = {name: torch.from_numpy(concept_photos(name, 24, REAL_SEED)[0]) for name in (first, second)}
    found = {}
    for method, kind in METHODS.items():
        for order in ORDERS:
            label = f"{method}, {order}"
            images = pictures_of(base, (first, second), seed, kind, order, cfg, bias)
            found[label] = rightness(oracle, images, first, second, reals)
            print(f"{first} and {second}, seed {seed}, {label}: {found[label]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--concepts", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--bias", type=float, default=0.7)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    names = [name for name, concept in CONCEPTS.items() if concept.split == args.split][: args.concepts]
    jobs = [(first, second, seed, args.cfg, args.bias) for seed in range(args.seeds)
            for first, second in zip(names, [*names[1:], names[0]], strict=True)]
    found = list(parallel(one_pair, *zip(*jobs, strict=True), workers=args.workers))
    result = {label: averages([one[label] for one in found]) for label in found[0]}
    text = json.dumps(result | vars(args) | {"concepts": names}, indent=1)
    if args.split == "test":
        (HERE / "results" / "perfusion_regions.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
