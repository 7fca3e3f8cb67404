"""Pretrain an E4T domain of the sample world: `python3 dev.py run microworld/pretrain.py --domain teddy --minutes 40`.

Draws the domain's folder and hands it to `e4t/pretrain.py`, whose other settings it takes. It goes on where it was
stopped; a longer time goes on from a state of a shorter one.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch

from ..e4t import pretrain
from ..host.checkpoints import load_checkpoint
from .data import work
from .domain import DOMAINS, write_folder
from .host import CHECKPOINT

SETTINGS = ["--resolution", "128", "--mask-floor", "0.05", "--keep-minutes", "5", "--preview-cfg", "3"]


def pretrained(domain: str, instances: int, settings: list[str]) -> Path:
    """The file of a domain pretrained by the command with these settings."""
    torch.set_num_threads(1)
    home = work("e4t")
    folder = home / f"{domain}-{instances}"
    write_folder(folder, domain, instances, photos=4)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True, stream=sys.stdout)
    args = pretrain.parser().parse_args([
        "--folder", str(folder), "--checkpoint", str(CHECKPOINT), "--word", domain, "--output", str(home),
        "--work", str(home / "work"), *SETTINGS, *settings,
    ])
    return pretrain.run(args, load_checkpoint(CHECKPOINT))


def main() -> None:
    own = pretrain.argparse.ArgumentParser(description=__doc__)
    own.add_argument("--domain", choices=DOMAINS, required=True)
    own.add_argument("--instances", type=int, default=2000)
    chosen, others = own.parse_known_args()
    pretrained(chosen.domain, chosen.instances, others)


if __name__ == "__main__":
    main()
