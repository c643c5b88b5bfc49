"""Another outline for every shape: what still goes by the name and stands in no training picture.

A circle with a scalloped rim, a star of six points, a square with round corners: whoever knows the name knows them, a
model that has learned one outline by heart does not.
"""

import math
from functools import lru_cache

import numpy as np

from paligemma.data.world.shapes import Part, Polygon

# How far round a corner begins to bend, over the shorter of its two sides.
_BEND = {"square": 0.3, "rectangle": 0.36, "triangle": 0.22, "diamond": 0.25}


@lru_cache(maxsize=256)
def variant_parts(shape: str, elongation: float = 1.0) -> tuple[Part, ...]:
    """The polygons of a shape's other outline; arguments and value as those of `shapes.parts`."""
    if shape == "circle":
        return ((_scalloped(0.5, 14), True),)
    if shape == "ring":
        return ((_scalloped(0.5, 14), True), (_superellipse(0.32, 0.32, 2.0), False))
    if shape == "oval":
        return ((_superellipse(0.5, 0.5 / elongation, 1.6), True),)
    if shape == "moon":  # a thinner crescent
        return ((_superellipse(0.5, 0.5, 2.0), True), (_superellipse(0.46, 0.46, 2.0, cx=0.18), False))
    if shape == "star":
        return ((_spokes(6, 0.54, 0.27), True),)
    if shape == "heart":
        return ((_wide_heart(), True),)
    if shape == "arrow":  # a notched head on a thin shaft
        upper = np.array([[0.54, 0.0], [0.05, -0.42], [0.17, -0.08], [-0.5, -0.08]])
        return ((np.concatenate([upper, upper[:0:-1] * [1, -1]]), True),)
    if shape == "cross":  # arms that widen outwards
        arm = np.array([[-0.22, -0.5], [0.22, -0.5], [0.1, -0.1]])
        turns = ([[1, 0], [0, 1]], [[0, 1], [-1, 0]], [[-1, 0], [0, -1]], [[0, -1], [1, 0]])
        return ((np.concatenate([arm @ np.array(turn) for turn in turns]), True),)
    return ((_rounded(_CORNERS[shape] * [1.0, 1 / elongation], _BEND[shape]), True),)


_CORNERS: dict[str, Polygon] = {
    "square": np.array([[-0.44, -0.44], [0.44, -0.44], [0.44, 0.44], [-0.44, 0.44]]),
    "rectangle": np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]),
    "triangle": np.array([[0.0, -0.55], [0.42, 0.4], [-0.42, 0.4]]),
    "diamond": np.array([[0.0, -0.54], [0.37, 0.0], [0.0, 0.54], [-0.37, 0.0]]),
}


def _scalloped(radius: float, n: int) -> Polygon:
    t = np.linspace(0.0, 2 * math.pi, 8 * n, endpoint=False)
    r = radius * (0.93 + 0.07 * np.cos(n * t))
    return np.stack([r * np.cos(t), r * np.sin(t)], axis=1)


def _superellipse(rx: float, ry: float, power: float, cx: float = 0.0) -> Polygon:
    """|(x - cx) / rx|^power + |y / ry|^power = 1: 2 is an ellipse, less is pointed."""
    t = np.linspace(0.0, 2 * math.pi, 48, endpoint=False)
    c, s = np.cos(t), np.sin(t)
    bend = 2 / power
    return np.stack([cx + rx * np.sign(c) * np.abs(c) ** bend, ry * np.sign(s) * np.abs(s) ** bend], axis=1)


def _spokes(n: int, outer: float, inner: float) -> Polygon:
    t = np.arange(2 * n) * (math.pi / n) - math.pi / 2
    r = np.where(np.arange(2 * n) % 2, inner, outer)
    return np.stack([r * np.cos(t), r * np.sin(t)], axis=1)


def _wide_heart() -> Polygon:
    """Two half circles on a triangle with straight sides."""
    right = np.linspace(-math.pi, 0.0, 16)  # over the top, from the notch outwards
    lobe = np.stack([0.26 + 0.26 * np.cos(right), -0.15 + 0.26 * np.sin(right)], axis=1)
    return np.concatenate([lobe, [[0.0, 0.48]], lobe[::-1] * [-1, 1]])


def _rounded(corners: Polygon, bend: float) -> Polygon:
    """A polygon whose corners are quarter bends: quadratic curves that begin and end on the sides."""
    points = []
    for before, corner, after in zip(np.roll(corners, 1, 0), corners, np.roll(corners, -1, 0), strict=True):
        to_before, to_after = before - corner, after - corner
        reach = bend * min(np.hypot(*to_before), np.hypot(*to_after))
        start, end = (corner + reach * side / np.hypot(*side) for side in (to_before, to_after))
        for t in np.linspace(0.0, 1.0, 6)[:, None]:
            points.append((1 - t) ** 2 * start + 2 * t * (1 - t) * corner + t**2 * end)
    return np.stack(points)
