"""Stretch a picture to the square that the image tower sees; the four ways that the references know.

Pillow does the bicubic one. The bilinear ones are TensorFlow's, written out in float32 in its order of operations,
because big_vision cuts the result to whole grey levels: where the exact value is whole, the last bit decides.

Sources: transformers SiglipImageProcessor (Pillow backend); big_vision pp/ops_image.py; TensorFlow resize_bilinear and
scale_and_translate kernels.
"""

import math
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paligemma.config import Resize
from paligemma.errors import ImageError, OptionError, nearest

Picture = NDArray[np.uint8]  # uint8[H, W, 3]
Levels = NDArray[np.float32]  # float32[H, W, 3], grey levels 0 to 255


def resize(image: Picture, size: int | tuple[int, int], how: Resize) -> Picture | Levels:
    """A picture at another size; the aspect ratio is not kept.

    Args:
        image: uint8[H, W, 3].
        size: side in pixels of a square, or (height, width).
        how: "hf_bicubic": Pillow bicubic, rounded. "bv_bilinear", "bv_bilinear_aa": TensorFlow bilinear without and
            with antialias, cut to whole levels. "float_bilinear_aa": with antialias, not cut.

    Returns:
        uint8[h, w, 3], or for "float_bilinear_aa" float32[h, w, 3] in 0 to 255.

    Raises:
        ImageError: not uint8[H, W, 3]. OptionError: an unknown way.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(
            f"resize got {image.dtype}{list(image.shape)}: expected uint8[H, W, 3]. Pass pictures through load_image()."
        )
    height, width = (size, size) if isinstance(size, int) else size
    if how == "hf_bicubic":
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    if how == "bv_bilinear":
        return bilinear(image, height, width).astype(np.uint8)
    if how == "bv_bilinear_aa":
        return _cut(bilinear_antialias(image, height, width))
    if how == "float_bilinear_aa":
        return bilinear_antialias(image, height, width)
    known = get_args(Resize)
    raise OptionError(f"resize={how!r}: expected one of {', '.join(known)}.{nearest(str(how), known)}")


def bilinear(image: Picture, height: int, width: int) -> Levels:
    """Plain bilinear with half-pixel centres: each level from the 2 × 2 nearest, however much the picture shrinks."""
    top, bottom, down = _neighbours(image.shape[0], height)
    left, right, along = _neighbours(image.shape[1], width)
    along, down = along[None, :, None], down[:, None, None]
    # Only the rows and columns that are looked at become float.
    rows = [image[index].astype(np.float32) for index in (top, bottom)]
    upper, lower = (row[:, left] + (row[:, right] - row[:, left]) * along for row in rows)
    out: Levels = upper + (lower - upper) * down
    return out


def bilinear_antialias(image: Picture, height: int, width: int) -> Levels:
    """Bilinear with the triangle widened by the factor of shrinking: every level of the picture has its say."""
    rows = _weighted(image, *_triangle(image.shape[0], height))
    columns = _weighted(np.ascontiguousarray(rows.transpose(1, 0, 2)), *_triangle(image.shape[1], width))
    return np.ascontiguousarray(columns.transpose(1, 0, 2))


def _neighbours(n_in: int, n_out: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Index below, index above and the share of the one above, for each output pixel of a side."""
    scale = np.float32(n_in) / np.float32(n_out)
    place = (np.arange(n_out, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(place)
    below = np.maximum(floor, 0).astype(np.intp)
    above = np.minimum(np.ceil(place), n_in - 1).astype(np.intp)
    return below, above, place - floor


def _triangle(n_in: int, n_out: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """First input pixel int[n_out] and weights float32[n_out, K] of each output pixel of a side, unused ones 0."""
    one, half = np.float32(1), np.float32(0.5)
    scale = one / (np.float32(n_out) / np.float32(n_in))
    widened = max(scale, one)
    centre = (np.arange(n_out, dtype=np.float32) + half) * scale
    first = np.clip(np.ceil(centre - widened - half), 0, n_in - 1).astype(np.intp)
    last = np.clip(np.floor(centre + widened - half), 0, n_in - 1).astype(np.intp)
    source = first[:, None] + np.arange(math.ceil(2 * widened) + 1)
    distance = np.abs((source.astype(np.float32) + half - centre[:, None]) * (one / widened))
    weights = np.maximum(one - distance, 0).astype(np.float32)
    weights[source > last[:, None]] = 0
    total = np.zeros(n_out, np.float32)
    for k in range(weights.shape[1]):  # one after another, as the kernel adds them
        total += weights[:, k]
    return first, weights * (one / total)[:, None]


def _weighted(image: NDArray[np.uint8] | Levels, first: NDArray[np.intp], weights: NDArray[np.float32]) -> Levels:
    """Weighted sums over the first axis, added in the order of the input."""
    total = np.zeros((len(first), *image.shape[1:]), np.float32)
    for k in range(weights.shape[1]):
        total += image[np.minimum(first + k, len(image) - 1)] * weights[:, k, None, None]
    return total


def _cut(levels: Levels) -> Picture:
    """Whole levels by truncation, as a cast in TensorFlow does; weights may add up to a hair above 1."""
    return np.clip(levels, 0, 255).astype(np.uint8)
