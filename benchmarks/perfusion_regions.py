"""Two concepts in one picture, a half for each: `python3 dev.py run benchmarks/perfusion_regions.py`.

Each half has a prompt of its own that describes the whole picture, as in the template *perfusion_regions*. On the right
it names the left thing first ("a teddy left of a <two>") or its own ("a <two> right of a teddy"). Then each thing is
cut out of such a picture and drawn again larger, from a prompt that holds it alone, as in *perfusion_two_refined*,
which cuts latents where this cuts pictures.
Settings are chosen with `--split validation`; what is reported comes from `--split test`.
"""

from __future__ import annotations

import argparse
from functools import partial

import comfy.sample
import torch
from comfy.sd import CLIP
from comfy_extras.nodes_mask import FeatherMask
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..microworld import captions
from ..microworld.data import parallel
from ..microworld.oracle import PAIR_WEIGHTS, load
from ..microworld.world import concept_photos, super_category
from .concepts import conditions, names_of, parser, report
from .perfusion import applied, averages, rightness
from .sampling import draw, encode, load_checkpoint
from .textual_inversion import REAL_SEED

SIDE = 128
ORDERS = {"the left thing first": "a {left} left of a <two> {place}",
          "its own thing first": "a <two> right of a {left} {place}"}
METHODS = {"Perfusion": "locked keys", "Textual Inversion": "word"}
PLACES = [places[0] for places in captions.PLACES.values()]
PART, TOP, FEATHER = 80, 32, 8  # side and place of what is drawn again, and the width of its fading edge


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


def in_halves(base, concepts: dict[str, str], seed: int, kind: str, order: str, cfg: float, bias: float) -> Tensor:
    """One picture of the two at each place (n h w 3)."""
    sentences = "a <one> left of a {right} {place}", ORDERS[order]
    encoding = partial(halves, sentences=sentences, classes=tuple(map(super_category, concepts.values())))
    model, clip = applied(base, concepts, seed, kind, bias)
    return draw(model, clip, base[2], PLACES, 1000 * seed, cfg=cfg, size=SIDE, encoding=encoding)


@torch.inference_mode()
def refined(base, images: Tensor, concepts: dict[str, str], seed: int, kind: str, cfg: float, bias: float,
            denoise: float) -> Tensor:
    """Pictures like `images` whose two things are drawn again, each by itself and larger (n h w 3)."""
    vae, result = base[2], images.movedim(-1, 1).clone()
    for number, (word, name) in enumerate(concepts.items()):
        model, clip = applied(base, {word: name}, seed, kind, bias)
        left = number * (SIDE - PART)
        part = result[..., TOP : TOP + PART, left : left + PART]
        latents = vae.encode(interpolate(part, (SIDE, SIDE), mode="bicubic").clamp(0, 1).movedim(1, -1))
        noise = torch.cat([comfy.sample.prepare_noise(latents[:1], 1000 * seed + i) for i in range(len(images))])
        prompts = [f"a {word} {place}" for place in PLACES]
        samples = comfy.sample.sample(
            model, noise, 25, cfg, "euler", "normal", encode(clip, prompts), encode(clip, [""] * len(prompts)), latents,
            denoise=denoise, disable_pbar=True, seed=seed)
        drawn = interpolate(vae.decode(samples).clamp(0, 1).movedim(-1, 1), (PART, PART), mode="area")
        part.lerp_(drawn, own_half(right=bool(number)))
    return result.movedim(1, -1)


def own_half(right: bool) -> Tensor:
    """A mask of a part: its own half of the picture, with an edge that fades as FeatherMask makes it."""
    inner, beyond = {"left": FEATHER * right, "right": FEATHER * (not right)}, PART - SIDE // 2
    half = FeatherMask.execute(torch.ones(1, PART, SIDE // 2), top=FEATHER, bottom=FEATHER, **inner)[0]
    return pad(half, (beyond, 0) if right else (0, beyond))


def one_pair(first: str, second: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`perfusion.rightness` by method and arrangement."""
    torch.set_num_threads(1)
    oracle, base = load(PAIR_WEIGHTS), load_checkpoint()
    reals = {name: torch.from_numpy(concept_photos(name, 24, REAL_SEED)[0]) for name in (first, second)}
    concepts, found = {"<one>": first, "<two>": second}, {}

    def note(label: str, images: Tensor) -> None:
        found[label] = rightness(oracle, images, first, second, reals)
        print(f"{first} and {second}, seed {seed}, {label}: {found[label]}", flush=True)

    for method, kind in METHODS.items():
        for order in ORDERS:
            note(f"{method}, {order}", in_halves(base, concepts, seed, kind, order, args.cfg, args.bias))
        layout = in_halves(base, concepts, seed, kind, "its own thing first", args.cfg, args.layout_bias)
        again = refined(base, layout, concepts, seed, kind, args.cfg, args.refined_bias, args.denoise)
        note(f"{method}, layout", layout)
        note(f"{method}, refined", again)
    return found


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--bias", type=float, default=0.7)
    own.add_argument("--layout-bias", type=float, default=1.0, help="of pictures that are refined")
    own.add_argument("--refined-bias", type=float, default=0.85, help="of what is drawn again")
    own.add_argument("--denoise", type=float, default=0.7)
    args = own.parse_args()
    names = names_of(args)
    jobs = [(first, second, seed, args) for seed in range(args.seeds)
            for first, second in zip(names, [*names[1:], names[0]], strict=True)]
    found = list(parallel(one_pair, *zip(*jobs, strict=True), workers=args.workers))
    result = {label: averages([one[label] for one in found], len(names)) for label in found[0]}
    report(result | vars(args) | conditions(args), "perfusion_regions", args)


if __name__ == "__main__":
    main()
