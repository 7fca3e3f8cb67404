"""What parts of E4T do on the sample world: `python3 dev.py run benchmarks/e4t_ablations.py`.

A domain is pretrained from nothing by the same command, for the same steps and on the same pictures: with the chosen
settings, without the regulariser and without weight offsets. Each makes concepts of one picture, and the chosen one
also without its encoder. Pretraining goes on where it was stopped.
"""

from __future__ import annotations

import argparse

from ..e4t.pretrain import Recipe
from ..microworld.data import parallel
from ..microworld.domain import DOMAINS
from ..microworld.pretrain import pretrained
from .e4t import one, record, summary
from .timing import keep

ARMS = {"chosen": (), "regulariser 0": ("--regulariser", "0"), "without offsets": ("--no-offsets",)}
LEARNERS = ("E4T + Perfusion, 5", "E4T + Perfusion, 15", "E4T, whole model, 5")
BLIND = "E4T + Perfusion without the encoder"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domain", choices=DOMAINS, default="teddy")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--instances", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--bias", type=float, default=0.7)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    settings = [["--steps", str(args.steps), "--name", f"{args.domain}-{number}", *changes]
                for number, changes in enumerate(ARMS.values())]
    count = len(ARMS)
    files = list(parallel(pretrained, [args.domain] * count, [2000] * count, settings, workers=args.workers))
    result: dict = {"domain": args.domain, "steps": args.steps, "regulariser": Recipe.regulariser,
                    "instances": args.instances, "seeds": args.seeds, "cfg": args.cfg, "bias": args.bias}
    for (arm, changes), file in zip(ARMS.items(), files, strict=True):
        labels = LEARNERS if changes else (*LEARNERS, BLIND)
        jobs = [(args.domain, file, number, seed, args.cfg, args.bias, labels)
                for seed in range(args.seeds) for number in range(args.instances)]
        found = parallel(one, *zip(*jobs, strict=True), workers=args.workers)
        result[arm] = summary(row for part in found for row in part) | {"seconds": record(file)["seconds"]}
    keep(result, "e4t_ablations")


if __name__ == "__main__":
    main()
