"""E4T's figures on the sample world: `python3 dev.py run benchmarks/e4t.py`.

A concept from one picture of things of the domain that pretraining has not seen: by the encoder and k steps of tuning,
with the whole model tuned, by the same tuning without the encoder, and by Textual Inversion and Perfusion from the
class word on the same picture. ID and TXT of the scenes of `textual_inversion.py`, and the processor seconds of each
training, which do not hang on what else the machine does. What pretraining cost is in the domain's record.

`e4t_car.json` is `--domain car --file` with what `microworld/pretrain.py --domain car --minutes 60` makes, and `--only`
with the labels in it. `e4t_teddy_40.json`, over more things and fewer seeds, is `--name e4t_teddy_40 --instances 40
--seeds 1 --only` with the labels in it, and `e4t_teddy_unmasked.json` that of 30 pictures without masks: `--unmasked
--name e4t_teddy_unmasked --instances 30` and so on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from ..e4t import domain, tune
from ..e4t.tune import TunedEdit, tuning_recipe
from ..e4t.tune_whole import TunedWhole, whole_recipe
from ..host.text import fingerprint_of
from ..microworld.data import parallel, work
from ..microworld.domain import DOMAINS, instance_photos
from ..microworld.host import WEIGHTS
from ..microworld.oracle import load, similarity
from ..nodes import train_perfusion, train_textual_inversion
from ..nodes.applying import applied
from ..perfusion.covariance import precision
from ..perfusion.train import EditMethod, EditRecipe
from ..textual_inversion.concept import Concept
from ..textual_inversion.train import Preview, Recipe, learn_word
from ..training.dataset import gather
from .microworld import interval
from .sampling import draw, load_checkpoint
from .source import code
from .textual_inversion import HERE, SCENES, judge
from .timing import keep

TUNED, WHOLE, BLIND, INVERTED, EDITED = (0, 1, 5, 15), (5, 15), (5, 15), (5, 25, 100), (150, 400)
RIVAL = "Textual Inversion"
QUIET = Preview(every=0, steps=1)


def photos(kind: str, number: int, count: int):
    """Pictures (n h w 3) in 0..1 and masks (n h w) of a test instance."""
    pictures, masks = instance_photos(kind, "test", number, count)
    return torch.from_numpy(pictures).float() / 255, torch.from_numpy(masks).float() / 255


def learners(base, kind: str, file: Path, seed: int) -> dict[str, tuple[Callable, int, dict[str, float]]]:
    """What makes a concept of steps and gathered photos, the steps, and what it is drawn with beside the usual, by
    label."""
    known, blind = domain.load(file), domain.load(file)
    for layer in (*blind.encoder.words.values(), blind.encoder.values):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    metric, encoder = precision(base[1]), fingerprint_of(base[1])

    def tuned(start: domain.Domain, steps: int, given) -> Concept:
        still = {"learning_rate": 0.0, "value_rate": 0.0} if not steps else {}
        recipe = tuning_recipe(start, base[1], "<mine>", max(steps, 1), seed, **still)
        method = partial(TunedEdit, start, given, metric, encoder)
        return learn_word(*base, given, recipe, QUIET, method_of=method).concept

    def whole(start: domain.Domain, steps: int, given) -> Concept:
        recipe = whole_recipe(start, "<mine>", steps, seed)
        return learn_word(*base, given, recipe, QUIET, method_of=partial(TunedWhole, start, given)).concept

    def inverted(steps: int, given) -> Concept:
        pace = train_textual_inversion.pace_of("quick", base[1], kind) | {"steps": steps}
        return learn_word(*base, given, Recipe("<mine>", kind, seed=seed, own_masks=True, **pace), QUIET).concept

    def edited(steps: int, given) -> Concept:
        pace = train_perfusion.pace_of("quick", base[1], kind) | {"steps": steps}
        recipe = EditRecipe("<mine>", kind, seed=seed, momentum=0.9, **pace)
        return learn_word(*base, given, recipe, QUIET, method_of=partial(EditMethod, metric, encoder)).concept

    with_encoder, without = partial(tuned, known), partial(tuned, blind)
    seeing, unseeing = partial(whole, known), partial(whole, blind)
    kinds = (("E4T + Perfusion", with_encoder, TUNED, {}),
             ("E4T + Perfusion at bias 0.9", with_encoder, (5, 15), {"bias": 0.9}),
             ("E4T, whole model", seeing, WHOLE, {}),
             ("E4T, whole model at 0.85", seeing, (5,), {"strength": 0.85}),
             ("E4T, whole model at 1.2", seeing, WHOLE, {"strength": 1.2}),
             ("E4T, whole model without the encoder", unseeing, WHOLE, {}),
             ("E4T + Perfusion without the encoder", without, BLIND, {}),
             (RIVAL, inverted, INVERTED, {}),
             (f"{RIVAL} at 1.5", inverted, INVERTED, {"strength": 1.5}),
             ("Perfusion", edited, EDITED, {}),
             ("Perfusion at bias 0.9", edited, (150,), {"bias": 0.9}))
    return {f"{label}, {steps} steps": (learn, steps, use) for label, learn, each, use in kinds for steps in each}


def one(kind: str, file: Path, number: int, seed: int, cfg: float, bias: float, unmasked: bool = False,
        labels: tuple[str, ...] = ()) -> list[tuple]:
    """(label, ID, TXT, processor seconds of training) for one test instance and one picture of it, with its mask
    unless `unmasked`; of the learners those whose labels begin with one of `labels`, or all. A row found before is read
    again."""
    torch.set_num_threads(1)
    oracle, base = load(), load_checkpoint()
    real = photos(kind, number, 25)[0][1:]
    picture, mask = photos(kind, number, 25 + seed + 1)
    given = gather([picture[-1:]], [] if unmasked else [mask[-1:]])
    texts = [scene.format(kind) for scene, _ in SCENES]
    rows = [("class word", *judge(oracle, draw(*base, texts, 1000 * seed, cfg=cfg), kind, real), 0.0),
            ("real renders", similarity(oracle, picture[:1], real).mean().item(), 1.0, 0.0)]
    learned: dict[tuple[Callable, int], tuple[Concept, float]] = {}
    for label, (learn, steps, use) in learners(base, kind, file, seed).items():
        if not label.startswith(labels or ""):
            continue
        path = work("rows") / f"{kind}_{number}_{seed}_{settings(label, file, cfg, bias, unmasked)}.json"
        if not path.exists():
            if (learn, steps) not in learned:
                start = time.process_time()
                learned[learn, steps] = learn(steps, given), time.process_time() - start
            concept, seconds = learned[learn, steps]
            model, clip = applied(*base[:2], concept, **{"strength": 1.0, "bias": bias, **use})
            drawn = draw(model, clip, base[2], [scene.format("<mine>") for scene, _ in SCENES], 1000 * seed, cfg=cfg)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps([*judge(oracle, drawn, kind, real), seconds]))
        rows.append((label, *json.loads(path.read_text())))
        print(f"{kind} {number}, seed {seed}, {label}: ID {rows[-1][1]:.3f} TXT {rows[-1][2]:.3f} {rows[-1][3]:.1f} s",
              flush=True)
    return rows


def settings(label: str, file: Path, cfg: float, bias: float, unmasked: bool) -> str:
    """A name for all that a row hangs on besides instance and seed."""
    uses = b"" if "Perfusion without" in label or not label.startswith("E4T") else file.read_bytes()
    paces = [train_textual_inversion.PRESETS["quick"], train_perfusion.PRESETS["quick"],
             tune.LEVELS, tune.SHARE, tune.WORD_RATE, tune.VALUE_RATE]
    return hashlib.sha256(f"{label} {paces} {cfg} {bias} {unmasked} {SCENES} {code()}".encode() + uses).hexdigest()[:12]


def summary(rows: Iterable[tuple], seeds: int) -> dict[str, dict]:
    """Means and intervals of what `one` found, by label, for rows in the order of seed and instance.

    With them, how far the ID is beyond that of the rival's best label.
    """
    found: dict[str, list] = {}
    for label, *figures in rows:
        found.setdefault(label, []).append(figures)
    columns = {label: rearrange(np.array(figures), "(seed thing) figure -> figure thing seed", seed=seeds)
               for label, figures in found.items()}
    result = {label: {"ID": interval(identity), "TXT": interval(prompt), "seconds, median": float(np.median(seconds))}
              for label, (identity, prompt, seconds) in columns.items()}
    rivals = [label for label in columns if label.startswith(RIVAL)]
    if rivals:
        best = max(rivals, key=lambda label: result[label]["ID"][0])
        for label, (identity, *_) in columns.items():
            result[label][f"ID beyond {best}"] = interval(identity - columns[best][0])
    return result


def record(file: Path) -> dict:
    """What a domain file says of its pretraining."""
    return json.loads(domain.load(file).metadata.get("concepts.training", "{}"))


def parser(description: str) -> argparse.ArgumentParser:
    """The settings of everything that is measured with a domain."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--domain", choices=DOMAINS, default="teddy")
    parser.add_argument("--instances", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--bias", type=float, default=0.7)
    parser.add_argument("--unmasked", action="store_true", help="learn from pictures without their masks")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=(),
                        help="the learners whose labels begin so; the result's other rows then stay as they are")
    return parser


def measured(args: argparse.Namespace, file: Path, labels: Iterable[str]) -> dict[str, dict]:
    """`summary` over instances and seeds."""
    jobs = [(args.domain, file, number, seed, args.cfg, args.bias, args.unmasked, tuple(labels))
            for seed in range(args.seeds) for number in range(args.instances)]
    rows = [row for part in parallel(one, *zip(*jobs, strict=True), workers=args.workers) for row in part]
    return summary(rows, args.seeds)


def conditions(args: argparse.Namespace) -> dict:
    """What a result was measured with."""
    return {name: getattr(args, name) for name in ("domain", "instances", "seeds", "cfg", "bias", "unmasked")}


def so_far(args: argparse.Namespace, name: str) -> dict:
    """The result so far, of which `--only` measures a part anew. Raises ValueError if it was measured otherwise."""
    path = HERE / "results" / f"{name}.json"
    result = json.loads(path.read_text()) if args.only and path.exists() else conditions(args)
    if result | conditions(args) != result:
        raise ValueError(f"{name}.json was measured with other settings than {conditions(args)}; measure all anew.")
    return result


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--file", type=Path, help="the domain file; the one that comes with the pack by default")
    own.add_argument("--name", help="of the file in results/; e4t_ and the domain by default")
    args = own.parse_args()
    file = args.file or WEIGHTS / "domains" / f"{args.domain}.safetensors"
    name = args.name or f"e4t_{args.domain}"
    keep(so_far(args, name) | measured(args, file, args.only) | {"pretraining": record(file)}, name)


if __name__ == "__main__":
    main()
