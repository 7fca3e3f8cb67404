"""The silhouettes of the world's classes, as polygons in a unit frame.

x and y run over [-1, 1] with y down; y = 1 is where a thing stands. A shape is drawn in three layers: `body` (takes
the colour and pattern of the thing), `details` (fixed colours) and the place where a hat sits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

Point = tuple[float, float]
Polygon = tuple[Point, ...]
RGB = tuple[int, int, int]

INK, WINDOW, WOOD, BEAK = (38, 32, 44), (196, 226, 240), (122, 84, 52), (240, 170, 50)


@dataclass(frozen=True)
class Shape:
    """One class: `body` polygons, `(colour, polygon)` details, hat anchor `(x, y)` and badge centre `(x, y)`."""

    body: tuple[Polygon, ...]
    details: tuple[tuple[RGB, Polygon], ...]
    hat: Point
    badge: Point


def oval(
    cx: float, cy: float, rx: float, ry: float, start: float = 0.0, stop: float = 1.0, points: int = 28
) -> Polygon:
    """An ellipse, or the part of it between two fractions of a turn (clockwise from the right)."""
    turns = (start + (stop - start) * i / points for i in range(points + (stop - start < 1)))
    return tuple((cx + rx * cos(2 * pi * t), cy + ry * sin(2 * pi * t)) for t in turns)


def box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def arch(cx: float, cy: float, rx: float, ry: float, width: float, start: float, stop: float) -> Polygon:
    """A band of the given width along an elliptic arc: handles and tails."""
    outer = oval(cx, cy, rx, ry, start, stop)
    return outer + oval(cx, cy, rx - width, ry - width, stop, start)


def star(points: int, outer: float, inner: float, cx: float = 0.0, cy: float = 0.0) -> Polygon:
    return tuple(
        (cx + r * sin(pi * i / points), cy - r * cos(pi * i / points))
        for i in range(2 * points)
        for r in [inner if i % 2 else outer]
    )


def _eye(x: float, y: float, r: float = 0.065) -> tuple[RGB, Polygon]:
    return INK, oval(x, y, r, r)


# fmt: off
SHAPES: dict[str, Shape] = {
    "teddy": Shape(
        body=(
            oval(-0.34, -0.78, 0.19, 0.19), oval(0.34, -0.78, 0.19, 0.19),
            oval(-0.56, 0.12, 0.24, 0.17), oval(0.56, 0.12, 0.24, 0.17),
            oval(-0.34, 0.82, 0.24, 0.18), oval(0.34, 0.82, 0.24, 0.18),
            oval(0, 0.36, 0.48, 0.54), oval(0, -0.46, 0.44, 0.4),
        ),
        details=(
            ((240, 222, 190), oval(0, -0.34, 0.19, 0.15)), (INK, oval(0, -0.39, 0.075, 0.05)),
            _eye(-0.17, -0.55), _eye(0.17, -0.55),
        ),
        hat=(0.0, -0.8),
        badge=(0.0, 0.36),
    ),
    "cat": Shape(
        body=(
            arch(0.62, -0.1, 0.36, 0.5, 0.15, 0.35, 1.02),
            box(-0.5, 0.4, -0.3, 1), box(-0.2, 0.5, 0.0, 1), box(0.2, 0.5, 0.4, 1), box(0.46, 0.4, 0.66, 1),
            oval(0.08, 0.36, 0.64, 0.32),
            ((-0.86, -0.3), (-0.84, -0.86), (-0.48, -0.5)), ((-0.2, -0.3), (-0.2, -0.86), (-0.56, -0.5)),
            oval(-0.52, -0.22, 0.38, 0.33),
        ),
        details=(
            _eye(-0.66, -0.28), _eye(-0.38, -0.28), ((232, 120, 130), oval(-0.52, -0.14, 0.06, 0.045)),
            (INK, box(-0.98, -0.13, -0.72, -0.1)), (INK, box(-0.32, -0.13, -0.06, -0.1)),
        ),
        hat=(-0.52, -0.48),
        badge=(0.12, 0.36),
    ),
    "fish": Shape(
        body=(
            ((0.42, 0), (0.98, -0.46), (0.84, 0), (0.98, 0.46)), ((-0.3, -0.36), (0.16, -0.72), (0.3, -0.26)),
            ((-0.1, 0.36), (0.12, 0.66), (0.26, 0.28)), oval(-0.16, 0, 0.74, 0.46),
        ),
        details=(
            ((250, 250, 250), oval(-0.56, -0.12, 0.13, 0.13)), _eye(-0.58, -0.12), (INK, box(-0.86, 0.12, -0.66, 0.16)),
        ),
        hat=(-0.3, -0.42),
        badge=(0.02, 0.04),
    ),
    "bird": Shape(
        body=(
            ((0.36, 0.1), (1.0, -0.26), (0.96, 0.12), (0.5, 0.4)), oval(0.04, 0.18, 0.58, 0.44),
            oval(-0.42, -0.36, 0.34, 0.32),
        ),
        details=(
            (BEAK, ((-0.7, -0.44), (-1.04, -0.3), (-0.7, -0.22))), _eye(-0.5, -0.42),
            (BEAK, box(-0.12, 0.58, -0.05, 1)), (BEAK, box(0.16, 0.58, 0.23, 1)),
            (INK, arch(0.16, 0.1, 0.34, 0.28, 0.045, 0.0, 0.45)),
        ),
        hat=(-0.42, -0.62),
        badge=(-0.14, 0.2),
    ),
    "car": Shape(
        body=(
            ((-0.52, 0.1), (-0.34, -0.42), (0.34, -0.42), (0.58, 0.1)),
            ((-0.98, 0.12), (-0.9, 0.02), (0.86, 0.02), (0.98, 0.16), (0.98, 0.6), (-0.98, 0.6)),
        ),
        details=(
            (WINDOW, ((-0.38, 0.02), (-0.26, -0.3), (-0.04, -0.3), (-0.04, 0.02))),
            (WINDOW, ((0.06, 0.02), (0.06, -0.3), (0.27, -0.3), (0.42, 0.02))),
            (INK, oval(-0.56, 0.62, 0.25, 0.25)), (INK, oval(0.56, 0.62, 0.25, 0.25)),
            ((205, 205, 210), oval(-0.56, 0.62, 0.1, 0.1)), ((205, 205, 210), oval(0.56, 0.62, 0.1, 0.1)),
        ),
        hat=(0.0, -0.4),
        badge=(0.0, 0.3),
    ),
    "house": Shape(
        body=(((-0.96, -0.2), (-0.5, -0.84), (0.5, -0.84), (0.96, -0.2)), box(-0.78, -0.2, 0.78, 0.98)),
        details=(
            (INK, box(-0.8, -0.23, 0.8, -0.17)), (WOOD, box(-0.56, 0.3, -0.2, 0.98)),
            (WINDOW, box(0.14, -0.02, 0.58, 0.3)), (INK, box(0.34, -0.02, 0.38, 0.3)),
        ),
        hat=(0.0, -0.82),
        badge=(0.36, 0.62),
    ),
    "tree": Shape(
        body=(
            ((-0.74, 0.56), (0.0, -0.2), (0.74, 0.56)), ((-0.6, 0.14), (0.0, -0.6), (0.6, 0.14)),
            ((-0.44, -0.3), (0.0, -0.98), (0.44, -0.3)),
        ),
        details=((WOOD, box(-0.15, 0.57, 0.15, 1)),),
        hat=(0.0, -0.8),
        badge=(0.0, 0.24),
    ),
    "star": Shape(
        body=(star(5, 1.0, 0.46),),
        details=(_eye(-0.17, -0.12), _eye(0.17, -0.12), (INK, arch(0, 0.04, 0.2, 0.16, 0.06, 0.08, 0.42))),
        hat=(0.0, -0.8),
        badge=(0.0, 0.44),
    ),
    "mug": Shape(
        body=(
            arch(0.52, 0.18, 0.44, 0.46, 0.17, -0.26, 0.26), box(-0.62, -0.6, 0.5, 0.9), oval(-0.06, 0.9, 0.56, 0.1),
        ),
        details=(((92, 58, 40), oval(-0.06, -0.6, 0.5, 0.12)),),
        hat=(-0.06, -0.62),
        badge=(-0.06, 0.2),
    ),
    "teapot": Shape(
        body=(
            arch(0.6, 0.2, 0.38, 0.42, 0.15, -0.26, 0.26),
            ((-0.5, 0.5), (-1.0, -0.2), (-0.86, -0.34), (-0.4, 0.0)), oval(0, 0.3, 0.66, 0.56),
            oval(0, -0.26, 0.4, 0.16), oval(0, -0.46, 0.12, 0.12),
        ),
        details=((INK, arch(0, -0.36, 0.5, 0.26, 0.05, 0.08, 0.42)),),
        hat=(0.0, -0.52),
        badge=(0.0, 0.36),
    ),
    "boat": Shape(
        body=(
            ((-1.0, 0.2), (1.0, 0.2), (0.66, 0.86), (-0.66, 0.86)), ((0.66, -0.84), (0.66, -0.36), (0.16, -0.6)),
        ),
        details=((WOOD, box(0.66, -0.9, 0.75, 0.2)), (INK, box(-0.98, 0.3, 0.98, 0.35))),
        hat=(-0.3, 0.16),
        badge=(0.0, 0.6),
    ),
    "bowl": Shape(
        body=(oval(0, -0.02, 0.98, 0.92, 0.0, 0.5), box(-0.34, 0.84, 0.34, 1.0)),
        details=((INK, box(-0.98, 0.06, 0.98, 0.11)),),
        hat=(0.0, -0.04),
        badge=(0.0, 0.46),
    ),
}

CLASSES = tuple(SHAPES)
CONTAINERS = ("bowl", "mug", "boat")
SUPPORTS = ("car", "house", "teapot")
