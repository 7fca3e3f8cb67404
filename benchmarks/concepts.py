"""What benchmarks with the sample concepts share: their settings, which concepts they choose, what becomes of a result.

Settings are chosen on validation concepts; what is reported comes from test concepts.
"""

from __future__ import annotations

import argparse
import json

from ..microworld.world import CONCEPTS
from .timing import keep


def parser(description: str, seeds: int = 5) -> argparse.ArgumentParser:
    """The settings of everything that is measured with sample concepts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--concepts", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=2)
    return parser


def names_of(args: argparse.Namespace) -> list[str]:
    """The names of the first `args.concepts` concepts of the split."""
    return [name for name, concept in CONCEPTS.items() if concept.split == args.split][: args.concepts]


def conditions(args: argparse.Namespace) -> dict:
    """What a result was measured with."""
    return {"split": args.split, "concepts": names_of(args), "seeds": args.seeds, "cfg": args.cfg}


def report(result: dict, name: str, args: argparse.Namespace) -> None:
    """Shows a result, and keeps it as `results/name.json` if it is of test concepts."""
    if args.split == "test":
        keep(result, name)
    else:
        print(json.dumps(result, indent=1))
