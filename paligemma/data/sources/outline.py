"""The outline of a mask as polygons that fill to exactly its pixels, and several outlines as one.

YOLO rows hold one polygon. Several are joined at their first corners by lines that go there and back, which enclose
nothing; `split_outlines` takes such a line apart again. A hole is joined the same way, but from another corner, so that
it is never taken for a part of its own: COCO's rule of filling flips at every border.
"""

from collections import defaultdict
from itertools import pairwise

import numpy as np

from paligemma.data.record import Polygon
from paligemma.results import BoolMask

Point = tuple[float, float]  # x, y


def outline(mask: BoolMask) -> tuple[Polygon, ...]:
    """Polygons along the edges of pixels: one for each piece without holes, else one for all.

    Args:
        mask: bool[H, W].

    Returns:
        x1, y1, x2, y2, … in pixel edges; () for an empty mask.
    """
    loops = _loops(np.pad(np.asarray(mask, bool), 1))
    if all(_area(loop) > 0 for loop in loops):
        return tuple(_flat(loop) for loop in loops)
    star = _points(join_outlines(tuple(_flat(loop) for loop in loops)))
    return (_flat(star[1:]),)


def join_outlines(polygons: tuple[Polygon, ...]) -> Polygon:
    """One polygon that goes round each in turn, always back to the first corner of the first."""
    if len(polygons) == 1:
        return polygons[0]
    first, *others = (_open(_points(polygon)) for polygon in polygons)
    star = [*first, first[0]]
    for points in others:
        star += [*points, points[0], first[0]]
    return _flat(star)


def split_outlines(polygon: Polygon) -> tuple[Polygon, ...]:
    """Inverse of `join_outlines`; a polygon that was not joined comes back as it is."""
    points = _points(polygon)
    returns = [i for i, point in enumerate(points) if i and point == points[0]]
    if len(returns) < 2 or returns[-1] != len(points) - 1:
        return (polygon,)
    parts = [points[: returns[0]]]
    for start, end in pairwise(returns):
        part = points[start + 1 : end]
        if len(part) < 4 or part[0] != part[-1]:
            return (polygon,)
        parts.append(part[:-1])
    return tuple(_flat(part) for part in parts) if len(parts[0]) >= 3 else (polygon,)


def _loops(padded: BoolMask) -> list[list[Point]]:
    """Closed walks along pixel edges with the mask on the right hand; corners only."""
    steps: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for dx, dy, a, b in (
        (1, 0, padded[1:, :], padded[:-1, :]),  # top edge, to the right
        (-1, 0, padded[:-1, :], padded[1:, :]),  # bottom edge, to the left
        (0, 1, padded[:, :-1], padded[:, 1:]),  # right edge, down
        (0, -1, padded[:, 1:], padded[:, :-1]),  # left edge, up
    ):
        for y, x in np.argwhere(a & ~b).tolist():
            # In coordinates of the padded mask less 1, the corner that the step starts from.
            start = (x - 1 + (dx < 0), y) if dx else (x, y - 1 + (dy < 0))
            steps[start].append((dx, dy))
    loops = []
    for start in sorted(steps, key=lambda corner: (corner[1], corner[0])):
        while steps[start]:
            loops.append(_walk(start, steps))
    return loops


def _walk(start: tuple[int, int], steps: defaultdict[tuple[int, int], list[tuple[int, int]]]) -> list[Point]:
    corners: list[Point] = []
    at, last = start, (0, 0)
    while True:
        ways = steps[at]
        if not ways:
            break
        # Where two pixels touch at a corner: turn right, which keeps to the same pixel.
        way = (-last[1], last[0]) if len(ways) > 1 and (-last[1], last[0]) in ways else ways[0]
        ways.remove(way)
        if way != last:
            corners.append((float(at[0]), float(at[1])))
        at, last = (at[0] + way[0], at[1] + way[1]), way
        if at == start:
            break
    return corners


def _area(points: list[Point]) -> float:
    """Positive for a walk with its inside on the right hand, y pointing down."""
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(points, [*points[1:], points[0]], strict=True)) / 2


def _open(points: list[Point]) -> list[Point]:
    """Without the last corner where it is the first again, which would read as the end of a part."""
    return points[:-1] if len(points) > 3 and points[0] == points[-1] else points


def _points(polygon: Polygon) -> list[Point]:
    return list(zip(polygon[::2], polygon[1::2], strict=True))


def _flat(points: list[Point]) -> Polygon:
    return tuple(number for point in points for number in point)
