"""Outlines of the shapes: polygons in a unit square around the origin, x to the right and y down.

A picture is stretched to a square before the model sees it, by up to 3:2. The elongated shapes are therefore at least
2.5 times as long as wide: a stretched square (at most 1.5) stays apart from a stretched rectangle (at least 1.67).
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Polygon = NDArray[np.float64]  # [n, 2] as x, y
Part = tuple[Polygon, bool]  # True adds the polygon's area, False cuts it out

SHAPES: tuple[str, ...] = (
    "circle", "square", "triangle", "star", "rectangle", "oval",
    "diamond", "cross", "heart", "moon", "arrow", "ring",
)  # fmt: skip

ELONGATED = {"rectangle", "oval"}
ELONGATION = (2.5, 3.2)  # length / width

# How far a shape may be turned and still go by its name, in degrees to either side (180: any way round).
MAX_TURN_DEG: dict[str, float] = {
    "circle": 0, "square": 14, "triangle": 180, "star": 180, "rectangle": 12, "oval": 12,
    "diamond": 12, "cross": 14, "heart": 25, "moon": 180, "arrow": 180, "ring": 0,
}  # fmt: skip


def plural(shape: str) -> str:
    """`circles`, `crosses`."""
    return shape + ("es" if shape.endswith("s") else "s")


def _ellipse(rx: float, ry: float, cx: float = 0.0, cy: float = 0.0, n: int = 40) -> Polygon:
    t = np.linspace(0.0, 2 * math.pi, n, endpoint=False)
    return np.stack([cx + rx * np.cos(t), cy + ry * np.sin(t)], axis=1)


def _spokes(radii: tuple[float, ...]) -> Polygon:
    t = np.arange(len(radii)) * (2 * math.pi / len(radii)) - math.pi / 2
    return np.stack([np.cos(t) * radii, np.sin(t) * radii], axis=1)


def _heart() -> Polygon:
    t = np.linspace(0.0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 32, (y - 2.5) / 32], axis=1)


@lru_cache(maxsize=256)
def parts(shape: str, elongation: float = 1.0) -> tuple[Part, ...]:
    """The polygons of a shape, to be painted in order.

    Args:
        shape: one of SHAPES.
        elongation: length over width; only the shapes in ELONGATED heed it.

    Returns:
        Polygons float64[n, 2] within about [-0.55, 0.55], each with whether it adds or cuts.
    """
    if shape == "circle":
        return ((_ellipse(0.5, 0.5), True),)
    if shape == "ring":
        return ((_ellipse(0.5, 0.5), True), (_ellipse(0.27, 0.27), False))
    if shape == "oval":
        return ((_ellipse(0.5, 0.5 / elongation), True),)
    if shape == "moon":
        return ((_ellipse(0.5, 0.5), True), (_ellipse(0.44, 0.44, cx=0.26), False))
    return ((_polygon(shape, elongation), True),)


def _polygon(shape: str, elongation: float) -> Polygon:
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.44
    if shape == "rectangle":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [0.5, 0.5 / elongation]
    if shape == "triangle":
        return _spokes((0.55, 0.55, 0.55))
    if shape == "star":
        return _spokes((0.54, 0.22) * 5)
    if shape == "diamond":
        return np.array([[0, -0.54], [0.37, 0], [0, 0.54], [-0.37, 0]])
    if shape == "heart":
        return _heart()
    if shape == "cross":
        a, b = 0.5, 0.17  # half length and half width of the arms
        quarter = np.array([[-b, -a], [b, -a], [b, -b]])
        turns = (
            np.array(turn) for turn in ([[1, 0], [0, 1]], [[0, 1], [-1, 0]], [[-1, 0], [0, -1]], [[0, -1], [1, 0]])
        )
        return np.concatenate([quarter @ turn for turn in turns])
    if shape == "arrow":
        upper = np.array([[0.54, 0.0], [0.08, -0.4], [0.08, -0.16], [-0.5, -0.16]])  # tip, head, shaft
        return np.concatenate([upper, upper[:0:-1] * [1, -1]])
    raise KeyError(shape)
