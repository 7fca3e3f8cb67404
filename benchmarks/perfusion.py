"""Perfusion's figures on the sample world: `python3 dev.py run benchmarks/perfusion.py`.

`--part single`: one concept learned by Perfusion with locked and with trained keys and by Textual Inversion, drawn in
scenes at eight biases. `--part pairs --seeds 3`: two separately learned concepts in one picture, and `--part judge`:
what their judge makes of true renders. `--part leaks`: attention outside the subject. `--part masks`:
zero-shot masks beside the true ones. `--part settings`: the variants of `--variants`.
Settings are chosen with `--split validation`; what is reported comes from `--split test`.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from ..host.attention_maps import attention_to
from ..host.text import encode, fingerprint_of, ready, rows, word_places
from ..microworld import captions
from ..microworld.data import parallel, work
from ..microworld.oracle import PAIR_WEIGHTS, embed, load, read
from ..microworld.render import render
from ..microworld.scene import Scene, place_pair
from ..microworld.world import CONCEPTS, concept_photos, super_category
from ..nodes import train_textual_inversion
from ..nodes.train_perfusion import PRESETS, pace_of
from ..perfusion import apply, file
from ..perfusion.covariance import precision
from ..perfusion.edit import components
from ..perfusion.global_keys import encode_with_global_keys
from ..perfusion.train import EditMethod, EditRecipe
from ..perfusion.use import apply_concept
from ..textual_inversion import file as word_file
from ..textual_inversion.concept import Concept
from ..textual_inversion.train import Preview, learn_word
from ..training.dataset import Photo, gather
from ..training.masks import zero_shot
from . import textual_inversion
from .concepts import conditions, names_of, parser, report
from .microworld import interval
from .sampling import draw, load_checkpoint
from .source import code
from .textual_inversion import PHOTOS_SEED, REAL_SEED, SCENES, judge

BIASES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
KEYS = {"locked keys": {}, "trained keys": {"train_keys": True}}
PAIRED = (0.6, 0.8)  # where locked and trained keys are compared
MOMENTUM = 0.9
PAIR_SCENES = tuple(f"a {{}} left of a {{}} {places[0]}" for places in captions.PLACES.values())
ENOUGH = 0.4  # ID of a region that counts as the concept


def learn(base, name: str, seed: int, photos: int = 4, masked: bool = True, **changes) -> Concept:
    """A concept from photos, by the node's quick preset unless `changes` say otherwise."""
    pictures, masks = concept_photos(name, photos, PHOTOS_SEED + seed)
    given = gather([torch.from_numpy(pictures)], [torch.from_numpy(masks)] if masked else [])
    return learn_from(base, super_category(name), seed, given, **changes)


def learn_from(base, kind: str, seed: int, given: list[Photo], **changes) -> Concept:
    """The same from gathered photos of a thing of this kind."""
    clip = base[1]
    recipe = EditRecipe(**{"placeholder": "<mine>", "init_text": kind, "seed": seed, "momentum": MOMENTUM,
                           **pace_of("quick", clip, kind), **changes})
    method = partial(EditMethod, precision(clip), fingerprint_of(clip))
    return learn_word(*base, given, recipe, Preview(every=0, steps=1), method_of=method).concept


def pictures_of(base, concept: Concept, seed: int, cfg: float, **settings) -> Tensor:
    """One picture of each scene (n h w 3)."""
    model, clip = apply_concept(*base[:2], concept, 1.0, **settings)
    return draw(model, clip, base[2], [scene.format("<mine>") for scene, _ in SCENES], 1000 * seed, cfg=cfg)


def single(name: str, seed: int, cfg: float, variants: dict[str, dict]) -> list[tuple]:
    """(label, bias, ID, TXT, seed, name) of every set of scenes of one training; what was measured before is kept."""
    torch.set_num_threads(1)
    settings = [cfg, variants, BIASES, PAIRED, PRESETS["quick"]]
    path = work("concepts") / f"{stem(name, seed, 'rows', settings)}.json"
    if not path.exists():
        path.write_text(json.dumps(one_seed(load(), load_checkpoint(), name, seed, cfg, variants)))
    return [tuple(row) for row in json.loads(path.read_text())]


def one_seed(oracle, base, name: str, seed: int, cfg: float, variants: dict[str, dict]) -> list[tuple]:
    """The same for one seed."""
    kind = super_category(name)
    real = torch.from_numpy(concept_photos(name, 24, REAL_SEED)[0])
    found = []

    def note(label: str, bias: float, images: Tensor) -> None:
        found.append((label, bias, *judge(oracle, images, kind, real), seed, name))
        print(f"{name}, seed {seed}, {label} {bias}: ID {found[-1][2]:.3f} TXT {found[-1][3]:.3f}", flush=True)

    for label, changes in variants.items():
        concept = learned(base, name, seed, label, **changes)
        for bias in PAIRED if changes.get("train_keys") else BIASES:
            note(label, bias, pictures_of(base, concept, seed, cfg, bias=bias))
    note("class word", 0, textual_inversion.pictures_of(base, kind, seed, cfg))
    word = learned(base, name, seed, "word")
    for strength in (0.75, 1.0):
        note("textual inversion", strength, word_pictures(base, word, seed, cfg, strength))
    return found


def word_pictures(base, word: Concept, seed: int, cfg: float, strength: float) -> Tensor:
    """The scenes with a learned word, whose own slider is its strength."""
    model, clip = apply_concept(*base[:2], word, strength)
    return draw(model, clip, base[2], [scene.format("<mine>") for scene, _ in SCENES], 1000 * seed, cfg=cfg)


def stem(name: str, seed: int, label: str, settings: object) -> str:
    digest = hashlib.sha256(f"{json.dumps(settings)} {code()}".encode()).hexdigest()
    return f"{name}_{seed}_{label}_{digest[:8]}".replace(" ", "-")


def learned(base, name: str, seed: int, label: str, word: str = "<mine>", **changes) -> Concept:
    """A concept by Perfusion, or by Textual Inversion for the label "word"; one learned before is read again."""
    module, train, presets = (file, learn, PRESETS)
    if label == "word":
        module, train, presets = (word_file, textual_inversion.learn, train_textual_inversion.PRESETS)
    path = work("concepts") / f"{stem(name, seed, label, [presets['quick'], changes])}.safetensors"
    if not path.exists():
        module.save(train(base, name, seed, **changes), path.parent, path.stem)
    return module.load(path, word)


def summary(found: list[tuple]) -> dict:
    """Means with intervals by label and bias, rank correlations with the bias, and the paired effect of the lock."""
    result: dict = {"curves": {}}
    for label, bias in dict.fromkeys(row[:2] for row in found):
        identity, text = by_concept(found, label, bias)
        result["curves"].setdefault(label, {})[bias] = {"ID": interval(identity), "TXT": interval(text)}
    base_id = result["curves"]["class word"][0]["ID"][0]
    for label in ("locked keys",) if "locked keys" in result["curves"] else ():
        curve = result["curves"][label]
        ids, txts = ([point[measure][0] for point in curve.values()] for measure in ("ID", "TXT"))
        result[label] = {
            "Spearman of bias with ID": float(spearmanr(list(curve), ids)[0]),
            "Spearman of bias with TXT": float(spearmanr(list(curve), txts)[0]),
            "share of the way from class word to best ID that the slider spans":
                (max(ids) - min(ids)) / (max(ids) - base_id),
        }
    for bias in result["curves"].get("trained keys", ()):
        differences = by_concept(found, "locked keys", bias) - by_concept(found, "trained keys", bias)
        result.setdefault("locked - trained keys", {})[bias] = dict(zip(("ID", "TXT"), map(interval, differences),
                                                                        strict=True))
    return result


def by_concept(found: list[tuple], label: str, bias: float) -> np.ndarray:
    """ID and TXT (2 concept seed) of rows that hold every seed of every concept, those of a concept in one order."""
    values: dict[str, list] = {}
    for *which, identity, text, _, name in found:
        if which == [label, bias]:
            values.setdefault(name, []).append((identity, text))
    return np.moveaxis(np.array(list(values.values())), -1, 0)


@torch.no_grad()
def leak(base, concept: Concept, pictures: Tensor, masks: Tensor) -> float:
    """The share of the concept token's attention outside the subject's mask, on noised real renders."""
    model, clip = apply_concept(*base[:2], concept, 1.0)
    text = "a photo of a <mine>"
    latents = model.model.process_latent_in(base[2].encode(pictures))
    context, pooled = encode(ready(clip), text)
    shares = []
    sigma = model.model.model_sampling.sigmas[torch.full((len(latents),), 500)]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = model.model.model_sampling.noise_scaling(sigma, noise, latents)
    with attention_to(model.model, [word_places(clip, text, concept.words[0].vectors)[0]]) as maps:
        model.model.apply_model(noisy, sigma, c_crossattn=context.expand(len(latents), -1, -1),
                                transformer_options=model.model_options["transformer_options"])
    for attended in maps:
        side = int(attended.shape[1] ** 0.5)
        outside = 1 - torch.nn.functional.adaptive_avg_pool2d(masks[:, None], side).flatten(1)
        shares.append(((attended * outside).sum(1) / attended.sum(1)).mean().item())
    return float(np.mean(shares))


def leaks(names: list[str], seeds: int) -> dict:
    """Attention outside the subject with locked and with trained keys, paired."""
    base, values = load_checkpoint(), {label: [] for label in KEYS}
    for name in names:
        pictures, masks = (torch.from_numpy(part) for part in concept_photos(name, 16, REAL_SEED))
        for seed in range(seeds):
            for label, changes in KEYS.items():
                values[label].append(leak(base, learned(base, name, seed, label, **changes), pictures, masks))
    shares = {label: np.array(found).reshape(len(names), seeds) for label, found in values.items()}
    return {**{label: interval(found) for label, found in shares.items()},
            "locked - trained keys": interval(shares["locked keys"] - shares["trained keys"])}


def pairs(names: list[str], seeds: int, cfg: float, bias: float, workers: int) -> dict:
    """How often two concepts are both in the picture and right, by how they were learned and joined."""
    jobs = [(first, second, seed, cfg, bias) for seed in range(seeds)
            for first, second in zip(names, [*names[1:], names[0]], strict=True)]
    rates: dict[str, list[dict[str, float]]] = {}
    for found in parallel(one_pair, *zip(*jobs, strict=True), workers=workers):
        for label, rate in found.items():
            rates.setdefault(label, []).append(rate)
    return {label: averages(found, len(names)) for label, found in rates.items()}


def averages(found: list[dict[str, float]], things: int) -> dict:
    """Means and intervals of what was found, in the order of seed and thing, by measure."""
    return {measure: interval(np.array([one[measure] for one in found]).reshape(-1, things).T) for measure in found[0]}


def one_pair(first: str, second: str, seed: int, cfg: float, bias: float) -> dict[str, dict[str, float]]:
    """The same for two concepts, with the first seed also for two of one class: `rightness` by label."""
    torch.set_num_threads(1)
    oracle, base = load(PAIR_WEIGHTS), load_checkpoint()
    alike = f"validation {super_category(first)}"
    arms = {"Perfusion": ("locked keys", second, components, False),
            "Perfusion, approximate": ("locked keys", second, approximate, False),
            "Textual Inversion": ("word", second, components, False)}
    if seed == 0:
        arms |= {f"two of one class: {label}": (kind, alike, *others)
                 for label, (kind, _, *others) in arms.items()}
    arms |= {"Perfusion, global key lock": ("locked keys", second, components, True),
             "Textual Inversion, global key lock": ("word", second, components, True)}
    found = {}
    for label, (kind, other, projection, locked) in arms.items():
        names = first, other
        with patch.object(apply, "components", projection):
            images = pair_pictures(base, names, seed, kind, cfg, bias, locked)
        reals = {name: torch.from_numpy(concept_photos(name, 24, REAL_SEED)[0]) for name in names}
        found[label] = rightness(oracle, images, *names, reals)
        print(f"{' and '.join(names)}, seed {seed}, {label}: {found[label]}", flush=True)
    return found


def approximate(s: Tensor, target_inputs: Tensor, dual: Tensor, present: Tensor) -> Tensor:
    """What each concept holds of an encoding as if the target inputs were orthogonal."""
    return s * present.to(s)


def pair_pictures(base, names: tuple[str, str], seed: int, kind: str, cfg: float, bias: float, locked: bool) -> Tensor:
    """One picture of each scene (n h w 3), with `locked` under the global key lock."""
    model, clip = applied(base, dict(zip(("<one>", "<two>"), names, strict=True)), seed, kind, bias)
    scenes = [scene.format("<one>", "<two>") for scene in PAIR_SCENES]
    if locked:
        return draw(model, clip, base[2], scenes, 1000 * seed, cfg=cfg, batch=1,
                    encoding=lambda clip, prompts: encode_with_global_keys(clip, *prompts))
    return draw(model, clip, base[2], scenes, 1000 * seed, cfg=cfg)


def applied(base, concepts: dict[str, str], seed: int, kind: str, bias: float) -> tuple:
    """Model and CLIP that know each of `concepts` by its word."""
    model, clip, _ = base
    for word, name in concepts.items():
        model, clip = apply_concept(model, clip, learned(base, name, seed, kind, word), 1.0, bias=bias)
    return model, clip


@torch.inference_mode()
def rightness(oracle, images: Tensor, first: str, second: str, reals: dict[str, Tensor]) -> dict[str, float]:
    """Shares of pictures: where both things are right, where each is, and where both classes are.

    A thing is right if its class is and its look is nearer its own concept, and near enough.
    """
    reading = oracle(images.permute(0, 3, 1, 2).float())
    masks = reading.masks.sigmoid()
    own = torch.stack([embed(oracle, reals[name]).mean(0) for name in (first, second)])
    likeness = torch.stack([oracle.identity(reading, masks[:, place]) @ own.T for place in (0, 1)])
    classes = torch.tensor([[seen["class"] == super_category(first), seen["second class"] == super_category(second)]
                            for seen in read(oracle, images)]).T
    looks = torch.stack([likeness[place, :, place] > likeness[place, :, 1 - place].clamp(min=ENOUGH)
                         for place in (0, 1)])
    one, two = (classes & looks).float()
    return {"both right": (one * two).mean().item(), "first right": one.mean().item(),
            "second right": two.mean().item(), "both classes": classes.all(0).float().mean().item()}


def judged_renders(names: list[str], count: int = 8) -> dict:
    """How often the judge of `pairs` finds true renders of two concepts right: what it could find at best."""
    oracle, rng = load(PAIR_WEIGHTS), np.random.default_rng(0)
    reals = {name: torch.from_numpy(concept_photos(name, 24, REAL_SEED)[0]) for name in names}
    rates = []
    for place, first in enumerate(names):
        second = names[(place + 1) % len(names)]
        posed = [place_pair(rng, CONCEPTS[first].thing, CONCEPTS[second].thing, "left of") for _ in range(count)]
        drawn = [render(Scene(one, "snow", two, relation="left of", seed=number), 128)[0]
                 for number, (one, two) in enumerate(posed)]
        rates.append(rightness(oracle, torch.from_numpy(np.stack(drawn)).float() / 255, first, second, reals))
        print(f"{first} and {second}, true renders: {rates[-1]}", flush=True)
    return {"true renders": averages(rates, len(names)), "renders of each pair": count}


def mask_quality(names: list[str], count: int = 16) -> dict:
    """Intersection over union of zero-shot masks with the true ones, cut at one half, at the latents' size."""
    base = load_checkpoint()
    model, clip, vae = base
    result = {}
    for name in names:
        kind = super_category(name)
        pictures, masks = (torch.from_numpy(part) for part in concept_photos(name, count, REAL_SEED))
        latents = model.model.process_latent_in(vae.encode(pictures))
        sentence = f"a photo of a {kind}"
        with torch.no_grad():
            named, empty = encode(ready(clip), sentence), encode(ready(clip), "")
        places = range(5, 5 + len(rows(clip, kind)["clip_l"]))
        found = zero_shot(model.model, latents, named, empty, list(places), 0)[:, 0].bool()
        true = torch.nn.functional.adaptive_avg_pool2d(masks[:, None], latents.shape[-2:])[:, 0] > 0.5
        result[name] = float(((found & true).sum((1, 2)) / (found | true).sum((1, 2))).mean())
    return {"IoU": result, "mean": interval(np.array(list(result.values())))}


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--part", choices=("single", "pairs", "judge", "masks", "leaks", "settings"), default="single")
    own.add_argument("--bias", type=float, default=0.8, help="of the pairs")
    own.add_argument("--variants", type=json.loads, default={}, help="settings by label, as JSON")
    args = own.parse_args()
    names = names_of(args)
    if args.part in ("single", "settings"):
        variants = args.variants or KEYS
        jobs = [(name, seed, args.cfg, variants) for seed in range(args.seeds) for name in names]
        parts = parallel(single, *zip(*jobs, strict=True), workers=args.workers)
        result = summary([row for part in parts for row in part])
    elif args.part == "pairs":
        result = pairs(names, args.seeds, args.cfg, args.bias, args.workers) | {"bias": args.bias, "enough ID": ENOUGH}
    elif args.part == "judge":
        result = judged_renders(names)
    else:
        result = leaks(names, args.seeds) if args.part == "leaks" else mask_quality(names)
    report(result | conditions(args), f"perfusion_{args.part}", args)


if __name__ == "__main__":
    main()
