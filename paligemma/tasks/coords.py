"""Boxes <-> location tokens: a fraction of a side becomes one of 1024 bins, in the order ymin, xmin, ymax, xmax.

    index = clip(round_half_to_even(float32(fraction) * 1023), 0, 1023)      fraction = index / 1023

The picture is stretched to a square before the model sees it, so fractions of its sides need no correction. Sources:
big_vision pp/proj/paligemma/segmentation.py (encoding), evaluators/proj/paligemma/transfers/segmentation.py (decoding).
"""

import math
from collections.abc import Sequence

import numpy as np

from paligemma.errors import TaskError
from paligemma.results import BoxXyxyPx

BoxYxyxNorm = tuple[float, float, float, float]  # top, left, bottom, right as fractions of height and width

N_LOC = 1024
# 1023 inverts the encoding and is what the references' metrics use; their demos divide by 1024.
DIVISOR = 1023


def encode_coord(fraction: float) -> int:
    """A fraction of a side -> its bin; fractions beyond 0…1 land on the first or last bin."""
    scaled = np.round(np.float32(fraction) * np.float32(N_LOC - 1))
    return int(np.clip(scaled, 0, N_LOC - 1))


def decode_coord(index: int, *, divisor: int = DIVISOR) -> float:
    """A bin -> a fraction of a side, within half a bin of what was encoded."""
    return index / divisor


def on_step(index: int, step: int) -> int:
    """The nearest of the bins 0, step, 2 step, … and the last."""
    return min(round(index / step) * step, N_LOC - 1)


def loc_tokens(box_yxyx_norm: Sequence[float]) -> str:
    """Four fractions -> `<locYMIN><locXMIN><locYMAX><locXMAX>`, exactly as the reference writes them.

    Raises:
        TaskError: not four finite numbers.
    """
    return _spell(_bins(box_yxyx_norm))


def _bins(box_yxyx_norm: Sequence[float]) -> list[int]:
    if len(box_yxyx_norm) != 4 or not all(math.isfinite(c) for c in box_yxyx_norm):
        raise TaskError(f"box {tuple(box_yxyx_norm)}: expected four finite numbers.")
    return [encode_coord(c) for c in box_yxyx_norm]


def _spell(bins: Sequence[int]) -> str:
    return "".join(f"<loc{index:04d}>" for index in bins)


def box_to_norm(box_xyxy_px: Sequence[float], size_hw: tuple[int, int]) -> BoxYxyxNorm:
    """Left, top, right, bottom in pixels -> top, left, bottom, right as fractions."""
    if len(box_xyxy_px) != 4:
        raise TaskError(f"box {tuple(box_xyxy_px)}: expected left, top, right, bottom in pixels.")
    (h, w), (x1, y1, x2, y2) = size_hw, box_xyxy_px
    if h <= 0 or w <= 0:
        raise TaskError(f"size_hw={size_hw}: expected the height and width of the picture, both positive.")
    return (y1 / h, x1 / w, y2 / h, x2 / w)


def box_to_tokens(box_xyxy_px: Sequence[float], size_hw: tuple[int, int]) -> str:
    """Left, top, right, bottom in pixels of the original picture -> four location tokens.

    Parts outside of the picture are cut off. A side that is too short for two bins is widened by one bin, outwards on
    the nearer edge: two equal tokens would read as no box at all.

    Raises:
        TaskError: not four finite numbers, a box without area (right <= left or bottom <= top), or one that lies
            outside of the picture.
    """
    box_yxyx_norm = box_to_norm(box_xyxy_px, size_hw)
    bins = _bins(box_yxyx_norm)
    y1, x1, y2, x2 = box_yxyx_norm
    if not (x2 > x1 and y2 > y1):
        raise TaskError(f"box {tuple(box_xyxy_px)} has no area: expected left < right and top < bottom in pixels.")
    if x2 <= 0 or y2 <= 0 or x1 >= 1 or y1 >= 1:
        height, width = size_hw
        raise TaskError(f"box {tuple(box_xyxy_px)} lies outside of the picture: expected pixels of {width}×{height}.")
    for low, high in ((0, 2), (1, 3)):
        if bins[low] == bins[high]:
            upwards = (box_yxyx_norm[low] + box_yxyx_norm[high]) / 2 * (N_LOC - 1) >= bins[low]
            if (upwards and bins[high] < N_LOC - 1) or bins[low] == 0:
                bins[high] += 1
            else:
                bins[low] -= 1
    return _spell(bins)


def bins_to_box(bins_yxyx: Sequence[int], size_hw: tuple[int, int], *, divisor: int = DIVISOR) -> BoxXyxyPx:
    """Four bins -> left, top, right, bottom in pixels (not rounded)."""
    h, w = size_hw
    y1, x1, y2, x2 = (decode_coord(index, divisor=divisor) for index in bins_yxyx)
    return (x1 * w, y1 * h, x2 * w, y2 * h)
