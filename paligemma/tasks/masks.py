"""Masks of the picture's size <-> 64 x 64 maps of the box: the pixels around the mask auto-encoder.

Sources: big_vision pp/proj/paligemma/segmentation.py (crop) and evaluators/proj/paligemma/transfers/segmentation.py
(paste).
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paligemma.errors import OptionError, TaskError
from paligemma.results import BoolMask

MASK_SIDE = 64
# Box edges fall between pixels. "cut": fractions are cut off, as in big_vision's evaluator. "round": to the nearest
# pixel, as in the published demo; box tokens of a box of whole pixels then give back that box on pictures of up to 1023
# pixels, where "cut" moves half of its edges by one pixel.
Edges = Literal["cut", "round"]


def crop_mask(mask: NDArray[Any], box_yxyx_norm: Sequence[float]) -> NDArray[np.float32]:
    """Cut a mask to its box and stretch the cut to 64 x 64 (bilinear, antialiased).

    A box that rounds to no pixel takes the one pixel that it lies in, where the reference would fail.

    Args:
        mask: bool[H, W], or uint8[H, W] of 0 and 255.
        box_yxyx_norm: top, left, bottom, right as fractions; rows round(H * top) … round(H * bottom), half to even.

    Returns:
        float32[64, 64] in [0, 1].

    Raises:
        TaskError: a mask that is no bool or uint8 matrix, or is empty.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or 0 in mask.shape or mask.dtype not in (np.bool_, np.uint8):
        raise TaskError(f"mask is {mask.dtype}{list(mask.shape)}: expected bool[H, W], or uint8[H, W] of 0 and 255.")
    (height, width), (y1, x1, y2, x2) = mask.shape, box_yxyx_norm
    top, bottom = _bounds(y1, y2, height)
    left, right = _bounds(x1, x2, width)
    crop = mask[top:bottom, left:right].astype(np.float32)
    if mask.dtype == np.uint8:
        crop /= 255
    small = Image.fromarray(crop).resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(small, np.float32), 0.0, 1.0)


def _bounds(low: float, high: float, side: int) -> tuple[int, int]:
    """First and one-past-last pixel, at least one pixel apart and inside of the picture."""
    first, last = (int(np.clip(np.round(np.float32(side) * np.float32(edge)), 0, side)) for edge in (low, high))
    if last <= first:
        first = min(max(int((low + high) / 2 * side), 0), side - 1)
        last = first + 1
    return first, last


def pixel_box(
    box_xyxy_px: Sequence[float], size_hw: tuple[int, int], *, edges: Edges = "cut"
) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom in whole pixels of the picture; None where nothing is left."""
    if edges not in get_args(Edges):
        raise OptionError(f"edges={edges!r}: expected 'cut' or 'round'.")
    whole = int if edges == "cut" else round
    height, width = size_hw
    x1, y1, x2, y2 = (whole(edge) for edge in box_xyxy_px)
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def paste_mask(
    map_64: NDArray[np.float32], box_xyxy_px: Sequence[float], size_hw: tuple[int, int], *, edges: Edges = "cut"
) -> BoolMask:
    """Stretch a decoded map into its box: bool[H, W], true where the stretched map is > 0, false outside of the box.

    Args:
        map_64: float32[64, 64], foreground > 0.
        box_xyxy_px: left, top, right, bottom.
        size_hw: height and width of the picture.
        edges: how the box becomes whole pixels.
    """
    mask = np.zeros(size_hw, bool)
    box = pixel_box(box_xyxy_px, size_hw, edges=edges)
    if box is not None:
        x1, y1, x2, y2 = box
        stretched = Image.fromarray(np.asarray(map_64, np.float32)).resize(
            (x2 - x1, y2 - y1), Image.Resampling.BILINEAR
        )
        mask[y1:y2, x1:x2] = np.asarray(stretched) > 0
    return mask
