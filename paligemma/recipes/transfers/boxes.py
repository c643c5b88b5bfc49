"""Boxes and masks of rows: RefCOCO's answers, and the box that WidgetCap draws into the picture."""

import math
from typing import Any

import numpy as np

from paligemma.data.record import Mask
from paligemma.data.sources.coco_fields import mask_as_said
from paligemma.errors import DataError
from paligemma.processing.resize import Picture
from paligemma.recipes.transfers.base import BOX, Columns, Row, Setting, Transfer, Turn, column, text
from paligemma.results import BoolMask, BoxXyxyPx, Segment
from paligemma.tasks.coords import BoxYxyxNorm, box_to_norm
from paligemma.tasks.segmentation import SegmentTask

MASK: Columns = ("segmentation", "mask")
RED = (255, 0, 0)


def box_of(row: Row, size_hw: tuple[int, int], where: str) -> BoxXyxyPx:
    """A row's box: `box_xyxy_px`, COCO's `bbox` (left, top, width, height in pixels), or `box_yxyx_norm` (top, left,
    bottom, right as fractions of the sides).

    Raises:
        DataError: not there, not four finite numbers, or turned over.
    """
    name = column(row, BOX, where)
    given = row[name]
    fits = isinstance(given, list | tuple) and len(given) == 4
    if not fits or any(isinstance(c, bool) or not isinstance(c, int | float) for c in given):
        raise DataError(f"{where}: '{name}' is {given!r}: expected four numbers.", kind="wrong column")
    a, b, c, d = (float(value) for value in given)
    box = a, b, c, d
    if name == "bbox":
        box = a, b, a + c, b + d
    elif name == "box_yxyx_norm":
        height, width = size_hw
        box = b * width, a * height, d * width, c * height
    if not all(math.isfinite(edge) for edge in box):
        raise DataError(f"{where}: '{name}' is {given!r}: expected finite numbers.", kind="wrong column")
    if box[2] <= box[0] or box[3] <= box[1]:
        message = f"{where}: '{name}' is {given!r}: expected left < right and top < bottom. Mend the row."
        raise DataError(message, kind="turned-over box")
    return box


def norm_box_of(row: Row, size_hw: tuple[int, int], where: str) -> BoxYxyxNorm:
    """A row's box as fractions of the sides: top, left, bottom, right."""
    return box_to_norm(box_of(row, size_hw, where), size_hw)


def outlined(picture: Picture, box_yxyx_norm: BoxYxyxNorm) -> Picture:
    """A picture with the red outline of a box, one pixel wide; parts outside of it are not drawn.

    An edge at fraction f lies on pixel int(f · (side - 1)), as TensorFlow's draw_bounding_boxes has it.

    Args:
        picture: uint8[H, W, 3], at the size that the model sees.
    """
    out = picture.copy()
    height, width = picture.shape[:2]
    top, left, bottom, right = (
        int(np.float32(edge) * np.float32(side - 1))
        for edge, side in zip(box_yxyx_norm, (height, width, height, width), strict=True)
    )
    rows, columns = slice(max(top, 0), max(bottom + 1, 0)), slice(max(left, 0), max(right + 1, 0))
    for y in (top, bottom):
        if 0 <= y < height:
            out[y, columns] = RED
    for x in (left, right):
        if 0 <= x < width:
            out[rows, x] = RED
    return out


def mask_of(row: Row, where: str) -> Mask:
    """A row's mask: polygons [[x, y, …], …] in pixels, with `height` and `width` of the picture in the row; or run
    lengths {"size": [height, width], "counts": …}, both as COCO writes them.

    Raises:
        DataError: something else.
    """
    name = column(row, MASK, where)
    given: Any = row[name]
    if isinstance(given, dict) and {"size", "counts"} <= set(given):
        size = given["size"]
    else:
        size = [row[column(row, (side,), where)] for side in ("height", "width")] if isinstance(given, list) else None
    if given and size is not None:
        if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            message = f"{where}: '{name}' has the size {str(size)[:60]}: expected [height, width] in pixels."
            raise DataError(message, kind="bad mask")
        return mask_as_said(given, (size[0], size[1]), f"{where}: '{name}'")
    raise DataError(
        f"{where}: '{name}' is a {type(given).__name__}: expected polygons [[x, y, …], …], or {{size, counts}}.",
        kind="wrong column",
    )


def referred_box(row: Row, mask: BoolMask, where: str) -> BoxXyxyPx:
    """The row's box, or where it has none the one around its mask.

    Raises:
        DataError: neither a box nor a pixel in the mask.
    """
    if any(name in row for name in BOX):
        return box_of(row, (mask.shape[0], mask.shape[1]), where)
    if not mask.any():
        raise DataError(f"{where}: the mask is empty: expected at least one pixel. Leave the row out.")
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)


def referring(row: Row, turn: Turn) -> tuple[str, list[str]]:
    """Row: {"sentence", "segmentation" or "mask", and a box (else the one around the mask)}.

    The prompt is the bare sentence, the answer four location and sixteen mask tokens, without spaces or label.
    """
    mask = mask_of(row, turn.where)
    pixels = mask.pixels()
    box = referred_box(row, pixels, turn.where)
    task = SegmentTask(referring=True, spaced=False)
    found = [Segment("", box, pixels, 1.0)]
    return text(row, ("sentence",), turn.where), [task.suffix(found, mask.size_hw, mask_encoder=turn.mask_encoder)]


TRANSFERS = {
    # The reference draws one sentence of a picture in every pass: 100 of them over 24,407 pictures.
    "refcoco_seg": Transfer(
        name="refcoco_seg", prompt="{sentence}", answer=MASK, choose="only", build=referring, also=(("sentence",),),
        text_length=48, passes_over="pictures",
        settings={
            224: Setting(epochs=100, lr=3e-5, dropout=0.1, label_smoothing=0.3),
            448: Setting(epochs=100, lr=1e-5, label_smoothing=0.3),
            896: Setting(epochs=100, lr=1e-5, label_smoothing=0.3, batch_size=64),
        },
        metrics=("mIoU", "box accuracy at IoU 0.5 and 0.75"),
        sets=("val, testA, testB of RefCOCO and RefCOCO+", "val, test of RefCOCOg"),
        final_split="the train splits of all three, without pictures of any test split",
        dflt="5 epochs, 448 px, batch 64",
    ),
}  # fmt: skip
