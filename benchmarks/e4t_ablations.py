"""What parts of E4T do on the sample world: `python3 dev.py run benchmarks/e4t_ablations.py`.

A domain is pretrained from nothing by the same command, for the same steps and on the same pictures: with the chosen
settings, without the regulariser and without weight offsets. Each makes concepts of one picture, and the chosen one
also without its encoder. Pretraining goes on where it was stopped.
"""

from __future__ import annotations

from ..e4t.learner import Recipe
from ..microworld.data import parallel
from ..microworld.pretrain import pretrained
from .e4t import measured, parser, record, so_far
from .timing import keep

ARMS = {"chosen": (), "regulariser 0": ("--regulariser", "0"), "without offsets": ("--no-offsets",)}
LEARNERS = ("E4T + Perfusion, 5", "E4T + Perfusion, 15", "E4T, whole model, 5")
BLIND = "E4T + Perfusion without the encoder"


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--steps", type=int, default=600)
    args = own.parse_args()
    settings = [["--steps", str(args.steps), "--name", f"{args.domain}-{number}", *changes]
                for number, changes in enumerate(ARMS.values())]
    count = len(ARMS)
    files = list(parallel(pretrained, [args.domain] * count, [2000] * count, settings, workers=args.workers))
    result = so_far(args, "e4t_ablations") | {"steps": args.steps, "regulariser": Recipe.regulariser}
    for (arm, changes), file in zip(ARMS.items(), files, strict=True):
        found = measured(args, file, args.only or (LEARNERS if changes else (*LEARNERS, BLIND)))
        result[arm] = result.get(arm, {}) | found | {"seconds": record(file)["seconds"]}
    keep(result, "e4t_ablations")


if __name__ == "__main__":
    main()
