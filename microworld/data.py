"""Rendered pictures with their scenes and captions, made in parallel and kept as arrays in a work folder."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from .captions import caption
from .concepts import NAMES
from .render import render
from .scene import Scene, random_scene

WORK = Path(__file__).parent / "work"
CHUNK = 2000


def _chunk(seed: int, index: int) -> tuple[np.ndarray, np.ndarray, list[Scene], list[str]]:
    rng = np.random.default_rng([seed, index])
    scenes = [random_scene(rng, NAMES) for _ in range(CHUNK)]
    pictures, masks = zip(*(render(scene) for scene in scenes), strict=True)
    captions = [caption(rng, scene) for scene in scenes]
    return np.stack(pictures), np.stack(masks), scenes, captions


def pictures(seed: int, count: int, workers: int = 2):
    """Yield chunks of `count` pictures in all.

    A chunk holds pictures (n, 128, 128, 3) and masks (n, 2, 128, 128), both uint8, scenes and captions.
    """
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_chunk, *zip(*((seed, i) for i in range(-(-count // CHUNK))), strict=True))
