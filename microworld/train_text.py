"""Give the text encoder a head start: `python3 dev.py run microworld/train_text.py --minutes 4`.

Stable Diffusion's text encoder was trained with pictures long before any UNet saw it. In the same spirit this one first
learns to tell, at the end of a caption, what is in the scene that the caption is about.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import text
from .captions import caption
from .concepts import NAMES
from .data import work
from .fit import fit
from .muon import Muon
from .oracle import FACTORS, factors
from .scene import BADGES, SPLITS, Scene, random_scene
from .train import Model

BATCH, LENGTH, RATE = 64, 32, 1e-3
LOOK = {"split": SPLITS, "badge": BADGES}


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Class indices (b,) of every factor, those of a named look (else -100), and its two tones (b, 6) (else NaN)."""
    truth = [factors(scene) for scene in scenes]
    out = {name: torch.tensor([values.index(t[name]) for t in truth]) for name, values in FACTORS.items()}
    looks = [scene.first.look if scene.name else None for scene in scenes]
    for name, values in LOOK.items():
        out[name] = torch.tensor([values.index(getattr(look, name)) if look else -100 for look in looks])
    unknown = (math.nan,) * 6
    out["tones"] = torch.tensor([sum(look.tones, ()) if look else unknown for look in looks])
    return out


class Reader(nn.Module):
    """Linear heads on the encodings of the end token and of the last padding token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {name: len(values) for name, values in (FACTORS | LOOK).items()}
        self.heads = nn.ModuleDict({name.replace(" ", "_"): nn.Linear(width, n) for name, n in sizes.items()})
        self.tones = nn.Linear(width, 6)

    def loss(self, encoding: Tensor, truth: dict[str, Tensor]) -> Tensor:
        """Sum of the losses of all heads on encodings (b, d)."""
        known = truth["tones"].isfinite().all(1)
        loss = 10 * F.mse_loss(self.tones(encoding[known]), truth["tones"][known]) if known.any() else 0.0
        for name, head in self.heads.items():
            target = truth[name.replace("_", " ")]
            if (target >= 0).any():
                loss = loss + F.cross_entropy(head(encoding), target)
        return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, reader = Model(), Reader(text.CONFIG["hidden_size"])
    encoder = model.clip.text_model.encoder
    hidden = [p for p in encoder.parameters() if p.ndim > 1]
    chosen = {id(p) for p in hidden}
    rest = [p for p in (*model.clip.parameters(), model.table, *reader.parameters()) if id(p) not in chosen]
    muon, adam = Muon(hidden), torch.optim.AdamW(rest, RATE, weight_decay=0.0)
    rng = np.random.default_rng(5)

    def loss(_: int) -> Tensor:
        scenes = [random_scene(rng, NAMES) for _ in range(BATCH)]
        rows = text.rows([caption(rng, scene) for scene in scenes]).long()[:, :LENGTH]
        ends = (rows == rows[0, -1]).int().argmax(1)
        with torch.autocast("cpu", torch.bfloat16):
            encodings = model.context(rows).float()
        truth = labels(scenes)
        return reader.loss(encodings[torch.arange(BATCH), ends], truth) + reader.loss(encodings[:, -1], truth)

    fit(loss, muon, adam, RATE, 50, args.minutes, "text")
    state = {f"clip.{key}": value for key, value in model.clip.state_dict().items()} | {"table": model.table.data}
    save_file({key: value.contiguous() for key, value in state.items()}, work("text.safetensors"))


if __name__ == "__main__":
    main()
