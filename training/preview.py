"""The picture of a training: loss curve, newest sample, photos. PIL only."""

import base64
import io
from collections.abc import Sequence
from math import floor

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, PANEL, GRID = "#17181c", "#212329", "#34373f"
INK, FAINT, RAW, LINE = "#f1f1ee", "#9a9ca3", "#3f5a70", "#5cc8ff"
GAP = 16
LARGEST = 384  # side of a sample as it is shown while it runs


def to_pil(picture: Tensor) -> Image.Image:
    """A picture (h w 3) in 0..1."""
    return Image.fromarray((picture.cpu().clamp(0, 1).numpy() * 255).round().astype(np.uint8))


def small(picture: Tensor) -> Image.Image:
    """A picture (h w 3) in 0..1, no larger than it is ever shown."""
    image = to_pil(picture)
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as IMAGE (1 h w 3) in 0..1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def live(losses: Sequence[float], steps: int, sample: Image.Image | None, caption: str) -> Image.Image:
    """What the node shows while it runs: the loss so far beside the newest sample, 832×448."""
    image = Image.new("RGB", (832 if sample else 448, 448), PAPER)
    draw = ImageDraw.Draw(image)
    image.paste(curve(losses, steps, (400, 376)), (GAP, 56))
    draw.text((GAP, 20), f"step {len(losses)} of {steps}", INK, _font(22))
    if sample:
        image.paste(_fit(sample, LARGEST), (432, 56))
        draw.text((432, 22), _short(draw, caption, _font(18), 384), FAINT, _font(18))
    return image


def sheet(photos: Sequence[Image.Image], samples: Sequence[tuple[str, Image.Image]], losses: Sequence[float],
          steps: int, title: str) -> Image.Image:
    """The whole training on one page: photos above, samples from first to last below, the loss at the foot."""
    cell, columns = 224, 5
    shown = _evenly(samples, 2 * columns)
    rows = -(-len(shown) // columns)
    width = GAP + columns * (cell + GAP)
    top = 64
    below = top + cell + GAP + 34
    height = below + rows * (cell + 34 + GAP) + 220 + GAP
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, 18), _short(draw, title, _font(26), width - 2 * GAP), INK, _font(26))
    for column, photo in enumerate(_evenly(photos, columns)):
        image.paste(_fit(photo, cell), (GAP + column * (cell + GAP), top))
    draw.text((GAP, below - 36), "photos above, samples below", FAINT, _font(16))
    for place, (label, sample) in enumerate(shown):
        x, y = GAP + place % columns * (cell + GAP), below + place // columns * (cell + 34 + GAP)
        image.paste(_fit(sample, cell), (x, y))
        draw.text((x, y + cell + 6), _short(draw, label, _font(16), cell), FAINT, _font(16))
    image.paste(curve(losses, steps, (width - 2 * GAP, 220)), (GAP, height - 220 - GAP))
    return image


def curve(losses: Sequence[float], steps: int, size: tuple[int, int]) -> Image.Image:
    """The loss of each step, thin, and its moving average, bold; the axis ends at the last planned step."""
    scale = 2  # drawn larger and reduced, for smooth lines
    width, height = size[0] * scale, size[1] * scale
    image = Image.new("RGB", (width, height), PANEL)
    draw = ImageDraw.Draw(image)
    left, right, top, bottom = 64 * scale, width - 14 * scale, 18 * scale, height - 34 * scale
    values = np.asarray(losses, dtype=np.float64)
    low, high = (0.0, 1.0) if len(values) == 0 else (0.0, float(np.quantile(values, 0.98)) * 1.15 or 1.0)
    for part in range(4):
        y = bottom - (bottom - top) * part / 3
        draw.line([(left, y), (right, y)], GRID, scale)
        draw.text((left - 8 * scale, y), f"{low + (high - low) * part / 3:.3g}", FAINT, _font(13 * scale), anchor="rm")
    draw.text((left, bottom + 8 * scale), "loss", FAINT, _font(13 * scale))
    draw.text((right, bottom + 8 * scale), f"{steps} steps", FAINT, _font(13 * scale), anchor="ra")

    def points(series: np.ndarray) -> list[tuple[float, float]]:
        xs = left + (right - left) * (np.arange(len(series)) + 1) / max(steps, 1)
        ys = bottom - (bottom - top) * np.clip((series - low) / (high - low), 0, 1)
        return list(zip(xs.tolist(), ys.tolist(), strict=True))

    if len(values) > 1:
        draw.line(points(values), RAW, scale)
        draw.line(points(moving_average(values)), LINE, 3 * scale, joint="curve")
    return image.resize(size, Image.Resampling.LANCZOS)


def moving_average(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it, over a fifteenth of the run, at least five."""
    window = max(5, len(values) // 15)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def cover(sample: Image.Image) -> str:
    """A thumbnail as base64 JPEG, at most 256 pixels a side."""
    thumbnail = sample.copy()
    thumbnail.thumbnail((256, 256), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    thumbnail.save(buffer, "JPEG", quality=88)
    return base64.b64encode(buffer.getvalue()).decode()


def _evenly(items: Sequence, most: int) -> list:
    """At most `most` of `items`, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[floor(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _fit(picture: Image.Image, side: int) -> Image.Image:
    factor = side / max(picture.size)
    size = tuple(max(1, round(edge * factor)) for edge in picture.size)
    sized = picture.resize(size, Image.Resampling.NEAREST if factor >= 4 else Image.Resampling.LANCZOS)
    framed = Image.new("RGB", (side, side), PANEL)
    framed.paste(sized, ((side - size[0]) // 2, (side - size[1]) // 2))
    return framed


def _short(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont, width: int) -> str:
    text = " ".join(text.split())
    while len(text) > 4 and draw.textlength(text, font) > width:
        text = text[:-2].rstrip("… ") + "…"
    return text


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)
