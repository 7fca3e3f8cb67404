"""Rendered pictures with their scenes and captions, made in parallel."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from .captions import caption
from .concepts import NAMES
from .render import render
from .scene import (
    BACKGROUNDS,
    Scene,
    Thing,
    named_look,
    nameless_look,
    pick,
    place_alone,
    random_scene,
)
from .shapes import CLASSES

CHUNK = 2000
PAIRS = 24  # neighbouring pairs that are of one class


def work(name: str) -> Path:
    """Where training keeps a result on the way to the weights: the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "comfyui-concepts" / "microworld"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def _chunk(seed: int, index: int) -> tuple[np.ndarray, np.ndarray, list[Scene], list[str]]:
    rng = np.random.default_rng([seed, index])
    scenes = [random_scene(rng, NAMES) for _ in range(CHUNK)]
    pictures, masks = zip(*(render(scene) for scene in scenes), strict=True)
    captions = [caption(rng, scene) for scene in scenes]
    return np.stack(pictures), np.stack(masks), scenes, captions


def parallel(function: Callable, *arguments: Iterable, workers: int = 2) -> Iterator:
    """`map` over processes where the system can fork them safely, else in this one."""
    if sys.platform != "linux":
        yield from map(function, *arguments)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(function, *arguments)


def pictures(seed: int, count: int) -> Iterator[tuple]:
    """Yield chunks of `count` pictures in all.

    A chunk holds pictures (n, 128, 128, 3) and masks (n, 2, 128, 128), both uint8, scenes and captions.
    """
    chunks = -(-count // CHUNK)
    return parallel(_chunk, [seed] * chunks, range(chunks))


def _pairs(seed: int, index: int) -> np.ndarray:
    rng = np.random.default_rng([seed, index])
    return np.stack([_two_views(rng, CLASSES[index % len(CLASSES)]) for _ in range(PAIRS)])


def _two_views(rng: np.random.Generator, kind: str) -> np.ndarray:
    look = nameless_look(rng) if rng.random() < 0.7 else named_look(rng, kind)
    things = [place_alone(rng, Thing(kind, look, hat=bool(rng.random() < 0.25))) for _ in range(2)]
    scenes = [Scene(thing, pick(rng, BACKGROUNDS), seed=int(rng.integers(2**31))) for thing in things]
    return np.stack([render(scene)[0] for scene in scenes])


def look_pairs(seed: int, count: int) -> Iterator[np.ndarray]:
    """Yield chunks of PAIRS pairs (PAIRS, 2, 128, 128, 3) uint8, `count` pairs in all.

    A pair shows one thing twice; within a chunk all things are of one class, so that only their looks differ.
    """
    chunks = -(-count // PAIRS)
    return parallel(_pairs, [seed] * chunks, range(chunks))
