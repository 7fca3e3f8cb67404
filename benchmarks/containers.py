"""Whether a learned container goes on holding things: `python3 dev.py run benchmarks/containers.py`.

Bowls, mugs and a boat that the model has never seen are learned from four photos, by Perfusion and by Textual
Inversion. Then prompts put something else into each, as they do with its class word.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..microworld.captions import PLACES
from ..microworld.data import parallel, work
from ..microworld.domain import instance_photos
from ..microworld.oracle import PAIR_WEIGHTS, embed, load, read
from ..nodes.train_textual_inversion import pace_of
from ..perfusion.global_keys import encode_with_global_keys
from ..perfusion.use import apply_concept
from ..textual_inversion.concept import Concept
from ..textual_inversion.train import Preview, Recipe, learn_word
from ..training.dataset import gather
from .microworld import interval
from .perfusion import learn_from, stem
from .sampling import draw, encode, load_checkpoint
from .timing import keep

THINGS = (("bowl", 0), ("bowl", 1), ("mug", 0), ("mug", 1), ("boat", 0))
CONTENTS = ("cat", "fish", "teddy", "bird")
PROMPTS = tuple((content, f"a {content} in a {{}} {PLACES[place][0]}")
                for content in CONTENTS for place in ("snow", "beach", "grass"))
PHOTOS, REALS = 4, 24


def learned(base, kind: str, number: int, seed: int) -> dict[str, Concept]:
    """The thing as a word and as a Perfusion concept, by the nodes' quick presets."""
    pictures, masks = (torch.from_numpy(part) for part in instance_photos(kind, "test", number, PHOTOS, seed))
    given = gather([pictures.float() / 255], [masks.float() / 255])
    word = Recipe("<mine>", kind, seed=seed, **pace_of("quick", base[1], kind))
    return {"word": learn_word(*base, given, word, Preview(every=0, steps=1)).concept,
            "edit": learn_from(base, kind, seed, given)}


def one(kind: str, number: int, seed: int, cfg: float) -> dict[str, dict[str, float]]:
    """What is found in the pictures of one training, by how they were drawn; what was measured before is kept."""
    torch.set_num_threads(1)
    path = work("concepts") / f"{stem(f'{kind} {number}', seed, 'container', [cfg, PROMPTS])}.json"
    if path.exists():
        return json.loads(path.read_text())
    oracle, base = load(PAIR_WEIGHTS), load_checkpoint()
    concepts, real = learned(base, kind, number, seed), instance_photos(kind, "test", number, REALS, 900_000)[0]
    looks, found = embed(oracle, torch.from_numpy(real).float() / 255).mean(0), {}

    def note(label: str, model, clip, word: str, encoding: Callable = encode) -> None:
        prompts = [prompt.format(word) for _, prompt in PROMPTS]
        drawn = draw(model, clip, base[2], prompts, 1000 * seed, cfg=cfg, batch=1 if encoding is locked else 16,
                     encoding=encoding)
        found[label] = holding(oracle, drawn, kind, looks)
        print(f"{kind} {number}, seed {seed}, {label}: {found[label]}", flush=True)

    note("class word", *base[:2], kind)
    for label, which, bias in (("Textual Inversion", "word", 0.8), ("Perfusion, bias 0.8", "edit", 0.8),
                               ("Perfusion, bias 1.0", "edit", 1.0)):
        taught = apply_concept(*base[:2], concepts[which], 1.0, bias=bias)
        note(label, *taught, "<mine>")
        note(f"{label}, global key lock", *taught, "<mine>", locked)
    path.write_text(json.dumps(found))
    return found


def locked(clip, prompts: list[str]) -> list:
    """A conditioning under the global key lock."""
    return encode_with_global_keys(clip, *prompts)


@torch.inference_mode()
def holding(oracle, images: Tensor, kind: str, looks: Tensor) -> dict[str, float]:
    """Shares of pictures with the other thing in the container, with anything in something, and the container's ID."""
    seen = read(oracle, images)
    both = [one["class"] == content and one["second class"] == kind
            for one, (content, _) in zip(seen, PROMPTS, strict=True)]
    inside = [one["relation"] == "in" for one in seen]
    reading = oracle(images.permute(0, 3, 1, 2).float())
    likeness = oracle.identity(reading, reading.masks[:, 1].sigmoid()) @ looks
    return {"holds it": float(np.mean([a and b for a, b in zip(both, inside, strict=True)])),
            "both things": float(np.mean(both)), "something inside": float(np.mean(inside)),
            "ID of the container": likeness.mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs = [(*thing, seed, args.cfg) for seed in range(args.seeds) for thing in THINGS]
    found = list(parallel(one, *zip(*jobs, strict=True), workers=args.workers))
    result = {label: {measure: interval(np.array([row[label][measure] for row in found]).reshape(-1, len(THINGS)).T)
                      for measure in found[0][label]} for label in found[0]}
    keep(result | {"things": [" ".join(map(str, thing)) for thing in THINGS], "seeds": args.seeds, "cfg": args.cfg,
                   "prompts": len(PROMPTS)}, "containers")


if __name__ == "__main__":
    main()
