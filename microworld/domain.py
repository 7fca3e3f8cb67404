"""Domains for E4T: one class whose instances differ in what no word names, with as many instances as one asks for.

`python3 dev.py run microworld/domain.py teddy FOLDER` writes one as a folder of pictures, a folder to each instance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from .data import parallel
from .render import render
from .scene import BACKGROUNDS, Scene, Thing, nameless_look, pick, place_alone

DOMAINS = ("teddy", "car")
SPLITS = {"train": 59, "test": 61}  # other seeds than those of named individuals and sample concepts


def instance(domain: str, split: str, number: int) -> Thing:
    """Instance `number` of a domain; those of the two splits never meet. Raises KeyError for another split."""
    return Thing(domain, nameless_look(np.random.default_rng([SPLITS[split], number, *domain.encode()])))


def instance_photos(
    domain: str, split: str, number: int, count: int, seed: int = 0, size: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Photos of one instance in random poses and places, the same for the same arguments.

    Returns pictures (count, size, size, 3) and masks (count, size, size), uint8.
    """
    rng = np.random.default_rng([SPLITS[split], number, seed, *domain.encode()])
    thing = instance(domain, split, number)
    scenes = [Scene(place_alone(rng, thing), pick(rng, BACKGROUNDS), seed=int(rng.integers(2**31)))
              for _ in range(count)]
    pictures, masks = zip(*(render(scene, size) for scene in scenes), strict=True)
    return np.stack(pictures), np.stack(masks)[:, 0]


def write_folder(folder: Path, domain: str, instances: int, photos: int) -> None:
    """Training instances as `folder/00001/1.png` with masks beside them; what is there already is kept."""
    done = sum(1 for _ in parallel(write_instance, [folder] * instances, [domain] * instances, range(instances),
                                   [photos] * instances))
    print(f"{done} instances with {photos} photos each are in {folder}", flush=True)


def write_instance(folder: Path, domain: str, number: int, photos: int) -> None:
    """One training instance as `folder/NUMBER/1.png` and so on with masks beside them, unless it is there already."""
    own = folder / f"{number:05d}"
    if (own / f"{photos}.png").exists():
        return
    own.mkdir(parents=True, exist_ok=True)
    for place, (picture, mask) in enumerate(zip(*instance_photos(domain, "train", number, photos), strict=True), 1):
        Image.fromarray(mask).save(own / f"{place}.mask.png", compress_level=1)
        Image.fromarray(picture).save(own / f"{place}.png", compress_level=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--instances", type=int, default=2000)
    parser.add_argument("--photos", type=int, default=4)
    args = parser.parse_args()
    write_folder(args.folder, args.domain, args.instances, args.photos)


if __name__ == "__main__":
    main()
