"""The sample model's figures: `python3 dev.py run benchmarks/microworld.py`.

Oracle accuracy on held-out renders, what survives the VAE, and TXT of the base model. The guidance scale is chosen on
validation prompts; every reported figure comes from other prompts, other renders and other seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..microworld.data import pictures
from ..microworld.oracle import FACTORS, factors, load, read, satisfied
from ..microworld.prompts import single_object, two_objects
from .sampling import draw, load_checkpoint

HERE = Path(__file__).parent
VALIDATION, TEST = 1_000_000, 2_000_000
SCALES = (2.0, 3.0, 4.5, 6.0)
KINDS = {"single object": single_object, "two objects": two_objects}


def held_out(seed: int, count: int) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """Renders (n, 128, 128, 3) in 0..1 that nothing was trained on, and their true factors."""
    chunks = list(pictures(seed, count))
    images = torch.cat([torch.from_numpy(chunk[0]) for chunk in chunks]).float() / 255
    return images, [factors(scene) for chunk in chunks for scene in chunk[2]]


def accuracy(oracle, images: torch.Tensor, truth: list[dict[str, str]]) -> dict[str, float]:
    """Share of pictures whose factor the oracle reads right, by factor."""
    right = {name: [] for name in FACTORS}
    for start in range(0, len(images), 250):
        for found, true in zip(read(oracle, images[start : start + 250]), truth[start : start + 250], strict=True):
            for name in FACTORS:
                right[name].append(found[name] == true[name])
    return {name: float(np.mean(values)) for name, values in right.items()}


def reconstruct(vae, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([vae.decode(vae.encode(part)).clamp(0, 1) for part in images.split(50)])


def interval(values: np.ndarray, seed: int = 0, average: Callable = np.mean) -> list[float]:
    """Mean, or another average, and its 95 % bootstrap interval, for which the first axis is drawn anew.

    That is one of things where there are several seeds of each (thing, seed): things differ more than seeds do.
    """
    rng = np.random.default_rng(seed)
    averages = average(rng.choice(values, (2000, len(values))).reshape(2000, -1), axis=1)
    return [float(average(values)), *(float(q) for q in np.quantile(averages, (0.025, 0.975)))]


def txt(base, oracle, kind: str, seed: int, count: int, **settings) -> tuple[np.ndarray, list[str], torch.Tensor]:
    """TXT (n,) of `count` random prompts, with the prompts and the pictures."""
    prompts, wanted = zip(*(KINDS[kind](np.random.default_rng([seed, i])) for i in range(count)), strict=True)
    images = draw(*base, list(prompts), seed, **settings)
    return satisfied(oracle, images, list(wanted)).numpy(), list(prompts), images


def grid(images: torch.Tensor, prompts: list[str], path: Path, columns: int = 6) -> None:
    """A labelled sheet of pictures."""
    cell, line = images.shape[1] + 8, 14
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + 3 * line)), "white")
    ink = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % columns * cell + 4, i // columns * (cell + 3 * line) + 4
        sheet.paste(Image.fromarray((image * 255).byte().numpy()), (x, y))
        words, text = prompt.split(), ""
        for word in words:
            last = text.rsplit("\n", 1)[-1]
            text += ("\n" if len(last) + len(word) > 21 else " " if text else "") + word
        ink.multiline_text((x, y + cell - 8), text, fill="black", spacing=1)
    path.parent.mkdir(exist_ok=True)
    sheet.save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renders", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tuning", type=int, default=48, help="validation prompts of each kind")
    args = parser.parse_args()
    oracle, base = load(), load_checkpoint()
    images, truth = held_out(99, args.renders)
    result = {"renders": len(images), "oracle accuracy": accuracy(oracle, images, truth)}
    small = images[: args.renders // 4]
    result["accuracy after the VAE"] = accuracy(oracle, reconstruct(base[2], small), truth[: len(small)])
    choice = {
        cfg: float(np.mean([txt(base, oracle, kind, VALIDATION, args.tuning, cfg=cfg)[0].mean() for kind in KINDS]))
        for cfg in SCALES
    }
    best = max(choice, key=choice.get)
    result |= {"validation TXT by guidance scale": choice, "guidance scale": best, "sampler": "euler, normal, 25 steps"}
    result["prompts"] = args.prompts
    for kind in KINDS:
        values, prompts, drawn = txt(base, oracle, kind, TEST, args.prompts, cfg=best)
        result[f"TXT, {kind} [mean, low, high]"] = interval(values)
        grid(drawn[:24], prompts[:24], HERE / "figures" / f"microworld {kind}.jpg".replace(" ", "_"))
    text = json.dumps(result, indent=1)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "microworld.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
