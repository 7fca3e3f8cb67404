"""Train the oracle on clean renders: `python3 dev.py run microworld/train_oracle.py --minutes 14`.

`--compile` (needs a C++ compiler on the CPU) makes it faster.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from einops import rearrange, reduce
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from .data import PAIRS, look_pairs, pictures, work
from .fit import fit
from .muon import Muon
from .oracle import FACTORS, WEIGHTS, Oracle, factors

SCENES, RATE, TEMPERATURE = 48, 2e-3, 0.1


def examples(seed: int, count: int) -> dict[str, Tensor]:
    """Pictures (n, 128, 128, 3) uint8, masks (n, 2, 32, 32) and factor labels (n,) by factor name."""
    images, masks, labels = [], [], {name: [] for name in FACTORS}
    for picture, mask, scenes, _ in pictures(seed, count):
        images.append(torch.from_numpy(picture))
        masks.append(reduce(torch.from_numpy(mask).float() / 255, "n c (h s) (w r) -> n c h w", "mean", s=4, r=4))
        for scene in scenes:
            for name, value in factors(scene).items():
                labels[name].append(FACTORS[name].index(value))
    return {"images": torch.cat(images), "masks": torch.cat(masks), **{k: torch.tensor(v) for k, v in labels.items()}}


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (b, h, w, 3) to floats (b, 3, h, w) in 0..1, half of them blurred and noisy as decoded latents are."""
    x = rearrange(images, "b h w c -> b c h w").float() / 255
    rough = torch.rand(len(x), generator=generator) < 0.5
    soft = F.avg_pool2d(F.pad(x[rough], (1, 1, 1, 1), mode="replicate"), 3, 1)
    x[rough] = soft.lerp(x[rough], torch.rand(1, generator=generator).item())
    x[rough] += 0.04 * torch.randn(x[rough].shape, generator=generator)
    return x.clamp(0, 1).contiguous(memory_format=torch.channels_last)


def contrastive(embeddings: Tensor) -> Tensor:
    """InfoNCE over pairs (2n, d) whose two views are at i and n + i."""
    n = len(embeddings) // 2
    scores = (embeddings @ embeddings.T / TEMPERATURE).fill_diagonal_(-1e4)
    return F.cross_entropy(scores, torch.arange(2 * n).roll(n))


def step_loss(oracle: Oracle, data: dict, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    which = torch.randint(len(data["images"]), (SCENES,), generator=generator)
    pairs = data["pairs"]
    start = PAIRS * torch.randint(len(pairs) // PAIRS, (1,), generator=generator).item()
    views = rearrange(pairs[start : start + PAIRS], "n v h w c -> (v n) h w c")
    images = augmented(torch.cat([data["images"][which], views]), generator)
    with torch.autocast("cpu", torch.bfloat16):
        reading = oracle(images)
        embeddings = oracle.identity(reading)[SCENES:]
    heads = sum(F.cross_entropy(reading.logits[name][:SCENES].float(), data[name][which]) for name in FACTORS)
    masks = F.binary_cross_entropy_with_logits(reading.masks[:SCENES].float(), data["masks"][which])
    return heads + 2 * masks + contrastive(embeddings.float())


def optimisers(oracle: Oracle) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices and convolutions between the first and the last, AdamW for the rest."""
    ends = ("stem.0.", "heads.", "mask.", "identity_head.2.")
    hidden = [p for name, p in oracle.named_parameters() if p.ndim > 1 and not name.startswith(ends)]
    chosen = {id(p) for p in hidden}
    rest = [p for p in oracle.parameters() if id(p) not in chosen]
    return Muon(hidden), torch.optim.AdamW(rest, RATE, weight_decay=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--pictures", type=int, default=20000)
    parser.add_argument("--pairs", type=int, default=300, help="groups of pairs of one class")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    path = work("oracle_examples.safetensors")
    if not path.exists():
        pairs = torch.cat([torch.from_numpy(chunk) for chunk in look_pairs(4, args.pairs * PAIRS)])
        save_file(examples(3, args.pictures) | {"pairs": pairs}, path)
    data = load_file(path)
    print(f"{len(data['images'])} scenes, {len(data['pairs'])} pairs", flush=True)
    torch.manual_seed(0)
    oracle = Oracle().to(memory_format=torch.channels_last)
    if args.compile:
        for part in (oracle.stem, oracle.body, oracle.top, oracle.identity_features):
            part.compile()
    muon, adam = optimisers(oracle)
    fit(lambda step: step_loss(oracle, data, step), muon, adam, RATE, 100, args.minutes, "oracle")
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save(oracle, WEIGHTS)


def save(oracle: Oracle, path: Path) -> None:
    """Writes an oracle in half precision."""
    weights = {k: v.half() if v.is_floating_point() else v for k, v in oracle.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, path)


if __name__ == "__main__":
    main()
