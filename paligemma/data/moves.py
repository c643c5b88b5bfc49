"""Pictures, boxes and masks through a window: the geometry of crops, zooms and flips.

A `Window` is a rectangle of whole pixels that becomes the picture. It may reach beyond the picture, where a border is
drawn, and it may be mirrored. No pixel is resampled: the model's own resize stretches every window to its square.

    window = Window(10, 20, 300, 200)                x, y, width, height in the old picture
    look(picture, window)                            the new picture
    move_instance(instance, window, size_hw, 0.25)   the new instance; None where too little of it is left
"""

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from paligemma.data.record import Instance, Mask, Polygon, Record, Text, Word
from paligemma.errors import DataError
from paligemma.processing.resize import Picture
from paligemma.results import BoolMask, BoxXyxyPx

Boxed = TypeVar("Boxed", Text, Word)


@dataclass(frozen=True)
class Window:
    """What becomes the picture, in pixels of the old one.

    Attributes:
        x, y: left and top edge; negative ones lie outside.
        width, height: of the new picture.
        flipped: mirrored left to right.
    """

    x: int
    y: int
    width: int
    height: int
    flipped: bool = False

    def is_whole(self, size_hw: tuple[int, int]) -> bool:
        """Whether the new picture is the old one, mirrored or not."""
        return (self.x, self.y, self.height, self.width) == (0, 0, *size_hw)

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.height, self.width


def whole(size_hw: tuple[int, int], flipped: bool = False) -> Window:
    """The window that shows all of a picture and nothing else."""
    return Window(0, 0, size_hw[1], size_hw[0], flipped)


def look(picture: Picture, window: Window) -> Picture:
    """uint8[H, W, 3] -> uint8[window.height, window.width, 3]; what lies beyond has the picture's mean colour."""
    height, width = picture.shape[:2]
    if not window.is_whole((height, width)):
        top, left = max(window.y, 0), max(window.x, 0)
        bottom, right = min(window.y + window.height, height), min(window.x + window.width, width)
        seen = picture[top:bottom, left:right]
        if seen.shape[:2] != window.size_hw:
            canvas = np.empty((*window.size_hw, 3), np.uint8)
            canvas[:] = np.round(picture.reshape(-1, 3).mean(0)).astype(np.uint8)
            canvas[top - window.y : bottom - window.y, left - window.x : right - window.x] = seen
            seen = canvas
        picture = np.ascontiguousarray(seen)
    return np.ascontiguousarray(picture[:, ::-1]) if window.flipped else picture


def move_box(box_xyxy_px: BoxXyxyPx, window: Window) -> BoxXyxyPx:
    """A box in pixels of the new picture, cut off at its edges; without area where nothing of it is in the window."""
    x1, y1, x2, y2 = box_xyxy_px
    x1, x2 = (min(max(edge - window.x, 0.0), float(window.width)) for edge in (x1, x2))
    y1, y2 = (min(max(edge - window.y, 0.0), float(window.height)) for edge in (y1, y2))
    if window.flipped:
        x1, x2 = window.width - x2, window.width - x1
    return (x1, y1, x2, y2)


def visible_share(box_xyxy_px: BoxXyxyPx, window: Window, size_hw: tuple[int, int], name: str) -> float:
    """How much of a box, as far as it lies in the picture, is in the window.

    Raises:
        DataError: a box without area or outside of the picture.
    """
    x1, y1, x2, y2 = box_xyxy_px
    height, width = size_hw
    left, top, right, bottom = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    area = (right - left) * (bottom - top) if right > left and bottom > top else 0.0
    if not area > 0:
        raise DataError(
            f"{name} has the box {tuple(box_xyxy_px)}: expected left < right and top < bottom inside of the picture of "
            f"{width}×{height}. Mend it or leave it out."
        )
    across = min(right, window.x + window.width) - max(left, window.x)
    down = min(bottom, window.y + window.height) - max(top, window.y)
    return across * down / area if across > 0 and down > 0 else 0.0


def move_mask(mask: Mask, window: Window) -> tuple[Mask, float]:
    """The mask in the window and how much of it is left, 0…1.

    Polygons stay polygons and are not drawn: they are moved and clipped by Sutherland and Hodgman's rule, which joins
    the parts of an outline that falls apart by lines along the window's edge, without area. Run lengths are decoded,
    cut and encoded again.
    """
    if mask.counts is not None:
        before = mask.pixels()
        after = _look_mask(before, window)
        total = int(before.sum())
        return Mask.of(after), int(after.sum()) / total if total else 0.0
    # Outlines that lie in the window come back as they were, so that what is all visible has a share of exactly 1.
    kept = tuple(clipped for polygon in mask.polygons if (clipped := _clip(polygon, window)))
    total_area = sum(_area(polygon) for polygon in mask.polygons)
    moved = tuple(_placed(polygon, window) for polygon in kept)
    return Mask(window.size_hw, moved), sum(map(_area, kept)) / total_area if total_area else 0.0


def mask_box(mask: Mask) -> BoxXyxyPx | None:
    """The smallest box around a mask; None for one without pixels or corners."""
    if mask.counts is None:
        if not mask.polygons:
            return None
        xs, ys = ([edge for p in mask.polygons for edge in p[first::2]] for first in (0, 1))
        return (min(xs), min(ys), max(xs), max(ys))
    pixels = mask.pixels()
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not rows.size:
        return None
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def move_instance(
    instance: Instance, window: Window, size_hw: tuple[int, int], min_visible: float, name: str = "the instance"
) -> Instance | None:
    """The instance in the window; None where less than `min_visible` of its mask (or box) is left.

    A box that the window cuts is drawn tight around what is left of the mask, where there is one.
    """
    share = visible_share(instance.box_xyxy_px, window, size_hw, name)
    box, mask = move_box(instance.box_xyxy_px, window), instance.mask
    if mask is not None:
        if mask.size_hw != size_hw:
            raise DataError(
                f"{name} has a mask of {mask.size_hw[1]}×{mask.size_hw[0]} in a picture of {size_hw[1]}×{size_hw[0]}: "
                "expected the picture's size. Mend the annotations."
            )
        try:
            mask.require_sound()
        except DataError as error:
            raise DataError(f"{name}: {error}", kind="bad mask") from None
        if share == 0:
            return None  # before anything is decoded
        before = mask
        mask, mask_share = move_mask(before, window)
        if share < 1 and mask_box(before) is not None:  # an empty mask says nothing of the box
            tight = mask_box(mask)
            if tight is None:
                return None
            box, share = _common(box, tight), mask_share
    if share <= 0 or share < min_visible or not (box[2] > box[0] and box[3] > box[1]):
        return None
    return dataclasses.replace(instance, box_xyxy_px=box, mask=mask)


def move_record(
    record: Record, window: Window, size_hw: tuple[int, int], *, min_visible: float, min_visible_words: float
) -> Record | None:
    """All geometry of a record in the window, its pictures left as they are.

    Of a thing that is dropped although some of it can be seen, the label stands in the new record's `hidden`.

    Returns:
        The record; None where nothing would be left of its instances, its regions or its words.

    Raises:
        DataError: a box without area or outside of the picture, a mask of another size.
    """
    where = record.where
    instances = [
        move_instance(item, window, size_hw, min_visible, f"{where}: instance {i} {item.label!r}")
        for i, item in enumerate(record.instances)
    ]
    hidden = {
        item.label: None
        for item, moved in zip(record.instances, instances, strict=True)
        if moved is None and move_instance(item, window, size_hw, 0.0) is not None
    }
    texts = [_move_boxed(x, window, size_hw, min_visible, f"{where}: the region {x.text!r}") for x in record.texts]
    words = [_move_boxed(x, window, size_hw, min_visible_words, f"{where}: the word {x.text!r}") for x in record.words]
    regions = [after for before, after in zip(record.texts, texts, strict=True) if before.box_xyxy_px is not None]
    if any(kind and not any(kind) for kind in (instances, regions, words)):
        return None
    return dataclasses.replace(
        record,
        size_hw=window.size_hw,
        instances=tuple(item for item in instances if item is not None),
        texts=tuple(item for item in texts if item is not None),
        words=tuple(item for item in words if item is not None),
        hidden=tuple({**dict.fromkeys(record.hidden), **hidden}),
    )


def stretch_record(record: Record, size_hw: tuple[int, int]) -> Record:
    """The geometry of a record whose picture is stretched to another size; its pictures are left as they are."""
    if record.size_hw is None:
        return dataclasses.replace(record, size_hw=size_hw)
    down, across = size_hw[0] / record.size_hw[0], size_hw[1] / record.size_hw[1]

    def box(old: BoxXyxyPx) -> BoxXyxyPx:
        return (old[0] * across, old[1] * down, old[2] * across, old[3] * down)

    def boxed(item: Boxed) -> Boxed:
        return item if item.box_xyxy_px is None else dataclasses.replace(item, box_xyxy_px=box(item.box_xyxy_px))

    return dataclasses.replace(
        record,
        size_hw=size_hw,
        instances=tuple(
            dataclasses.replace(
                item,
                box_xyxy_px=box(item.box_xyxy_px),
                mask=None if item.mask is None else _stretch_mask(item.mask, size_hw),
            )
            for item in record.instances
        ),
        texts=tuple(boxed(item) for item in record.texts),
        words=tuple(boxed(item) for item in record.words),
    )


def _move_boxed(item: Boxed, window: Window, size_hw: tuple[int, int], min_visible: float, name: str) -> Boxed | None:
    if item.box_xyxy_px is None:
        return item
    share = visible_share(item.box_xyxy_px, window, size_hw, name)
    box = move_box(item.box_xyxy_px, window)
    has_area = box[2] > box[0] and box[3] > box[1]
    return dataclasses.replace(item, box_xyxy_px=box) if has_area and share >= min_visible else None


def _look_mask(mask: BoolMask, window: Window) -> BoolMask:
    height, width = mask.shape
    out = np.zeros(window.size_hw, bool)
    top, left = max(window.y, 0), max(window.x, 0)
    bottom, right = min(window.y + window.height, height), min(window.x + window.width, width)
    if bottom > top and right > left:
        out[top - window.y : bottom - window.y, left - window.x : right - window.x] = mask[top:bottom, left:right]
    return out[:, ::-1] if window.flipped else out


def _stretch_mask(mask: Mask, size_hw: tuple[int, int]) -> Mask:
    """Polygons scale; pixels are taken from the nearest."""
    (old_height, old_width), (height, width) = mask.size_hw, size_hw
    if mask.counts is None:
        scale = (width / old_width, height / old_height)
        return Mask(size_hw, tuple(tuple(edge * scale[i % 2] for i, edge in enumerate(p)) for p in mask.polygons))
    rows = ((np.arange(height) + 0.5) * old_height / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * old_width / width).astype(np.intp)
    return Mask.of(mask.pixels()[rows][:, columns])


def _clip(polygon: Polygon, window: Window) -> Polygon:
    """The part of an outline in the window, in pixels of the old picture; () where nothing has area."""
    left, top, right, bottom = window.x, window.y, window.x + window.width, window.y + window.height
    xs, ys = polygon[::2], polygon[1::2]
    if min(xs) >= left and max(xs) <= right and min(ys) >= top and max(ys) <= bottom:
        return polygon
    corners = list(zip(xs, ys, strict=True))
    for axis, limit, keeps_above in ((0, left, True), (0, right, False), (1, top, True), (1, bottom, False)):
        corners = _clip_edge(corners, axis, float(limit), keeps_above)
        if not corners:
            return ()
    clipped = tuple(edge for corner in corners for edge in corner)
    return clipped if len(corners) >= 3 and _area(clipped) > 0 else ()


def _clip_edge(
    corners: list[tuple[float, float]], axis: int, limit: float, keeps_above: bool
) -> list[tuple[float, float]]:
    """One step of Sutherland and Hodgman: corners on the wrong side of a line give way to crossings of the line."""
    kept: list[tuple[float, float]] = []
    for before, after in zip([corners[-1], *corners[:-1]], corners, strict=True):
        was_in, is_in = ((c[axis] >= limit) if keeps_above else (c[axis] <= limit) for c in (before, after))
        if was_in != is_in:
            share = (limit - before[axis]) / (after[axis] - before[axis])
            other = before[1 - axis] + share * (after[1 - axis] - before[1 - axis])
            kept.append((limit, other) if axis == 0 else (other, limit))
        if is_in:
            kept.append(after)
    return kept


def _placed(polygon: Polygon, window: Window) -> Polygon:
    """An outline in pixels of the new picture."""
    if window.flipped:
        return tuple(
            window.width - (edge - window.x) if i % 2 == 0 else edge - window.y for i, edge in enumerate(polygon)
        )
    return tuple(edge - (window.x, window.y)[i % 2] for i, edge in enumerate(polygon))


def _area(polygon: Polygon) -> float:
    """Area of an outline by the shoelace formula."""
    xs, ys = np.asarray(polygon[::2]), np.asarray(polygon[1::2])
    return abs(float(xs @ np.roll(ys, -1) - ys @ np.roll(xs, -1))) / 2


def _common(one: BoxXyxyPx, other: BoxXyxyPx) -> BoxXyxyPx:
    return (max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
