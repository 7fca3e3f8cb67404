"""Draw a scene: PIL at twice the size, then a box filter down."""

from __future__ import annotations

from math import cos, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scene import COLOURS, Scene, Thing
from .shapes import INK, SHAPES, Polygon, box, oval, star

SUPERSAMPLING = 2


def render(scene: Scene, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Picture (size, size, 3) uint8 and the visible parts of its two things, (2, size, size) uint8 masks."""
    rng = np.random.default_rng(scene.seed)
    canvas = background(scene.background, size * SUPERSAMPLING, rng)
    masks = [Image.new("L", canvas.size), Image.new("L", canvas.size)]
    order = ((0, scene.first), (1, scene.second))
    for slot, thing in order if scene.relation == "in" else reversed(order):
        if thing is None:
            continue
        painted = paint(canvas, thing)
        for mask in masks:
            mask.paste(0, mask=painted)
        masks[slot] = painted
    return np.asarray(canvas.reduce(SUPERSAMPLING)), np.stack([np.asarray(m.reduce(SUPERSAMPLING)) for m in masks])


def paint(canvas: Image.Image, thing: Thing) -> Image.Image:
    """Paint a thing onto the canvas in place; returns its mask."""
    shape, size = SHAPES[thing.kind], canvas.width
    draw = ImageDraw.Draw(canvas)
    body = _mask(size, [_to_canvas(part, thing, size) for part in shape.body])
    outline = body.filter(ImageFilter.MaxFilter(5))
    canvas.paste(INK, mask=outline)
    canvas.paste(Image.fromarray(texture(thing, size)), mask=body)
    for colour, part in shape.details:
        draw.polygon(_to_canvas(part, thing, size), fill=colour)
    parts = [part for _, part in shape.details]
    if thing.look.tones:
        _paint_badge(draw, thing, size)
    if thing.hat:
        for colour, part in _hat(*shape.hat):
            draw.polygon(_to_canvas(part, thing, size), fill=colour)
            parts.append(part)
    outline.paste(255, mask=_mask(size, [_to_canvas(part, thing, size) for part in parts]))
    return outline


def texture(thing: Thing, size: int) -> np.ndarray:
    """The colours of a thing at every canvas pixel, (size, size, 3) uint8, fixed to the thing's own frame."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    dx, dy = (axis - thing.x)[None, :] / thing.size, (axis - thing.y)[:, None] / thing.size
    c, s = cos(thing.angle), sin(thing.angle)
    u, v = dx * c + dy * s, dy * c - dx * s
    u = -u if thing.mirrored else u
    look = thing.look
    if look.tones:
        boundary = {"top": v - 0.12, "side": u, "diagonal": u + v - 0.1}[look.split]
        second, (base, other) = boundary > 0, look.tones
    else:
        base = COLOURS[look.colour]
        pale = min(base) > 0.9 or look.colour in ("yellow", "pink")
        other = tuple(0.45 * c for c in base) if pale else tuple(0.3 * c + 0.7 for c in base)
        second = {
            "plain": lambda: np.zeros((size, size), bool),
            "striped": lambda: np.broadcast_to((v * 2.4) % 1.0 < 0.45, u.shape),
            "dotted": lambda: ((u * 2.2) % 1.0 - 0.5) ** 2 + ((v * 2.2) % 1.0 - 0.5) ** 2 < 0.09,
            "checkered": lambda: ((u * 2.2 + 8.5) // 1 + (v * 2.2 + 8.5) // 1) % 2 < 1,
        }[look.pattern]()
    return (255 * np.where(second[..., None], np.float32(other), np.float32(base))).astype(np.uint8)


def background(kind: str, size: int, rng: np.random.Generator) -> Image.Image:
    """A background canvas of the given kind; the generator moves its horizon and scatters its details."""
    sky, ground = {
        "grass": ((150, 206, 240), (104, 182, 78)),
        "beach": ((158, 216, 244), (240, 218, 160)),
        "snow": ((206, 220, 232), (244, 247, 252)),
        "night": ((18, 22, 62), (34, 40, 58)),
        "desert": ((250, 220, 168), (216, 150, 84)),
        "brick": ((168, 84, 66), (126, 120, 118)),
    }[kind]
    canvas = Image.new("RGB", (size, size), sky)
    draw = ImageDraw.Draw(canvas)
    horizon = int(size * rng.uniform(0.6, 0.72))
    draw.rectangle((0, horizon, size, size), fill=ground)
    _SCENERY[kind](draw, size, horizon, rng)
    return canvas


def _to_canvas(part: Polygon, thing: Thing, size: int) -> list[tuple[float, float]]:
    c, s, flip = cos(thing.angle), sin(thing.angle), -1 if thing.mirrored else 1
    points = ((flip * x, y) for x, y in part)
    turned = ((x * c - y * s, x * s + y * c) for x, y in points)
    return [(size * (thing.x + thing.size * x), size * (thing.y + thing.size * y)) for x, y in turned]


def _mask(size: int, polygons: list) -> Image.Image:
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    for polygon in polygons:
        draw.polygon(polygon, fill=255)
    return mask


def _hat(x: float, y: float) -> tuple:
    """A top hat standing at (x, y): black with a red band."""
    return (
        (INK, box(x - 0.42, y - 0.1, x + 0.42, y + 0.04)),
        (INK, box(x - 0.26, y - 0.62, x + 0.26, y - 0.08)),
        ((205, 40, 46), box(x - 0.26, y - 0.26, x + 0.26, y - 0.12)),
    )


def _paint_badge(draw: ImageDraw.ImageDraw, thing: Thing, size: int) -> None:
    x, y = SHAPES[thing.kind].badge
    colour = tuple(int(255 * c) for c in thing.look.badge_colour)
    shapes = {
        "ring": (oval(x, y, 0.24, 0.24),),
        "cross": (box(x - 0.25, y - 0.085, x + 0.25, y + 0.085), box(x - 0.085, y - 0.25, x + 0.085, y + 0.25)),
        "triangle": (((x - 0.26, y + 0.22), (x, y - 0.26), (x + 0.26, y + 0.22)),),
        "diamond": (star(2, 0.3, 0.2, x, y),),
    }[thing.look.badge]
    for part in shapes:
        draw.polygon(_to_canvas(part, thing, size), fill=colour)
    if thing.look.badge == "ring":
        inner = tuple(int(255 * c) for c in thing.look.tones[0])
        draw.polygon(_to_canvas(oval(x, y, 0.12, 0.12), thing, size), fill=inner)


def _peak(draw, colour, x, horizon, width, height):
    draw.polygon(((x - width, horizon), (x, horizon - height), (x + width, horizon)), fill=colour)


def _grass(draw, size, horizon, rng):
    x = size * rng.uniform(0.1, 0.9)
    draw.ellipse((x - size * 0.5, horizon - size * 0.1, x + size * 0.5, horizon + size * 0.1), fill=(104, 182, 78))


def _beach(draw, size, horizon, rng):
    sea = horizon - size * rng.uniform(0.12, 0.18)
    draw.rectangle((0, sea, size, horizon), fill=(48, 138, 196))


def _snow(draw, size, horizon, rng):
    for x in size * (rng.uniform(0, 0.4) + np.array([0.0, 0.6])):
        _peak(draw, (178, 196, 214), x, horizon, size * 0.3, size * 0.2)


def _night(draw, size, horizon, rng):
    for x, y in zip(rng.uniform(0, size, 5), rng.uniform(0, horizon - 16, 5), strict=True):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(250, 244, 200))
    x, y = size * rng.uniform(0.08, 0.92), size * rng.uniform(0.08, 0.16)
    draw.ellipse((x - 16, y - 16, x + 16, y + 16), fill=(246, 238, 196))


def _desert(draw, size, horizon, rng):
    x, y = size * rng.uniform(0.1, 0.9), size * rng.uniform(0.08, 0.18)
    draw.ellipse((x - 18, y - 18, x + 18, y + 18), fill=(255, 244, 196))
    _peak(draw, (202, 134, 72), size * rng.uniform(0.2, 0.8), horizon, size * 0.5, size * 0.12)


def _brick(draw, size, horizon, rng):
    height, width, offset = size / 8, size / 4, rng.uniform(0, size / 4)
    for row, y in enumerate(np.arange(horizon, -height, -height)):
        draw.line((0, y, size, y), fill=(214, 178, 160), width=4)
        for x in np.arange(-width, size + width, width) + offset + (row % 2) * width / 2:
            draw.line((x, y - height, x, y), fill=(214, 178, 160), width=4)
    draw.rectangle((0, horizon, size, size), fill=(126, 120, 118))


_SCENERY = {"grass": _grass, "beach": _beach, "snow": _snow, "night": _night, "desert": _desert, "brick": _brick}
