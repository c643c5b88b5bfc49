"""TensorFlow's kernels of resizing, which pre-training drew from: each with its order of operations in float32.

    resample(picture, 224, 224, "lanczos3", antialias=True)       float32[224, 224, 3], as tf.image.resize

The order matters because big_vision cuts the result to whole levels: in a plain area the last bit decides between 254
and 255. So sums are never left to a matrix product, which adds in an order of its own; a strip of output rows at a time
is summed instead, out of the cache.

    bilinear, bicubic with antialias, lanczos3, mitchellcubic    weights of a window that is normalised; rows first
    bicubic without antialias                                    a table of 1024 steps, beyond the border weight 0
    bilinear without antialias                                   2 x 2 nearest (`resize.bilinear`)
    area                                                         mean of what an output pixel covers; antialias or not
    nearest                                                      the pixel under the centre; antialias or not

A picture that has the size already is resampled like any other (mitchellcubic blurs it), as in a graph whose sizes are
not known beforehand; called eagerly, tf.image.resize would hand it back.

Sources: TensorFlow scale_and_translate, resize_bicubic, resize_area and resize_nearest_neighbor kernels.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from paligemma.errors import ImageError, OptionError, nearest
from paligemma.processing.resize import Levels, Picture, bilinear

Kernel = Literal["bilinear", "bicubic", "lanczos3", "area", "mitchellcubic", "nearest"]
Floats = NDArray[np.float32]
# Input pixels int[n_out, K] of each output pixel of a side, in the order of their summing, and their float32 weights.
Window = tuple[NDArray[np.intp], Floats]

_F = np.float32
_STRIP = 1 << 16  # numbers of output that are summed at once: they stay in the cache, and big pictures cost no memory


def resample(image: Picture | Levels, height: int, width: int, kernel: Kernel, *, antialias: bool) -> Levels:
    """A picture at another size; the aspect ratio is not kept.

    Args:
        image: uint8 or float32 [H, W, 3].
        kernel: see the top of this file.
        antialias: widen the kernel by the factor of shrinking, so that every level of the picture has its say.

    Returns:
        float32[height, width, 3]; cubic and Lanczos kernels overshoot 0…255.

    Raises:
        ImageError: no such picture. OptionError: an unknown kernel or a size below 1.
    """
    fits = image.dtype in (np.uint8, np.float32) and image.ndim == 3 and image.shape[2] == 3 and 0 not in image.shape
    if not fits:
        raise ImageError(
            f"resample got {image.dtype}{list(image.shape)}: expected uint8 or float32 [H, W, 3]. Pass pictures "
            "through load_image()."
        )
    if height < 1 or width < 1:
        raise OptionError(f"resample to {height} × {width}: expected a height and a width of at least 1 pixel.")
    if kernel not in get_args(Kernel):
        known = get_args(Kernel)
        raise OptionError(f"kernel={kernel!r}: expected one of {', '.join(known)}.{nearest(str(kernel), known)}")
    (n_rows, n_columns), (rows, columns) = image.shape[:2], (height, width)
    if kernel == "nearest":
        return image[_nearest(n_rows, rows)][:, _nearest(n_columns, columns)].astype(np.float32)
    if kernel == "area":
        along = _along(_swapped(image), *_covered(n_columns, columns))
        down = _along(_swapped(along), *_covered(n_rows, rows))
        return down * (_F(1) / ((_F(n_rows) / _F(rows)) * (_F(n_columns) / _F(columns))))
    if kernel == "bilinear" and not antialias:
        return bilinear(image, height, width)  # type: ignore[arg-type]  # it takes levels as well
    windows = [_window(kernel, n_in, n_out, antialias) for n_in, n_out in ((n_rows, rows), (n_columns, columns))]
    down = _along(image, *windows[0])
    return _swapped(_along(_swapped(down), *windows[1]))


def cut(levels: Levels) -> Picture:
    """Whole levels by truncation, as big_vision's op casts them."""
    return np.clip(levels, 0, 255).astype(np.uint8)


def _swapped(image: NDArray[np.uint8] | Levels) -> Levels:
    """Rows as columns, in an order of memory of their own."""
    return np.ascontiguousarray(image.transpose(1, 0, 2))  # type: ignore[return-value]


def _along(image: NDArray[np.uint8] | Levels, index: NDArray[np.intp], weights: Floats) -> Levels:
    """Weighted sums over the first axis, added in the order of the window."""
    rows = np.ascontiguousarray(image).reshape(len(image), -1)
    total = np.zeros((len(index), rows.shape[1]), np.float32)
    strip = max(1, _STRIP // rows.shape[1])
    for start in range(0, len(index), strip):
        used, shares, out = index[start : start + strip], weights[start : start + strip], total[start : start + strip]
        first = int(used.min())
        block = rows[first : int(used.max()) + 1].astype(np.float32, copy=False)
        used = used - first
        product = np.empty_like(out)
        for k in range(used.shape[1]):
            block.take(used[:, k], axis=0, out=product, mode="clip")  # "raise" would copy through a buffer
            product *= shares[:, k, None]
            out += product
    return total.reshape(len(index), *image.shape[1:])


def _window(kernel: Kernel, n_in: int, n_out: int, antialias: bool) -> Window:
    if kernel == "bicubic" and not antialias:
        return _bicubic_table(n_in, n_out)
    radius, shape = _SHAPES[kernel]
    return _spread(n_in, n_out, radius, shape, antialias)


def _spread(n_in: int, n_out: int, radius: float, shape: Callable[[Floats], Floats], antialias: bool) -> Window:
    """The window of a kernel around the centre of each output pixel, its weights made to sum to 1."""
    inverse = _F(1) / (_F(n_out) / _F(n_in))
    widened = max(inverse, _F(1)) if antialias else _F(1)
    reach = _F(radius) * widened
    centre = (np.arange(n_out, dtype=np.float32) + _F(0.5)) * inverse
    first = np.clip(np.ceil(centre - reach - _F(0.5)), 0, n_in - 1).astype(np.intp)
    last = np.clip(np.floor(centre + reach - _F(0.5)), 0, n_in - 1).astype(np.intp)
    index = first[:, None] + np.arange(min(2 * math.ceil(reach) + 1, n_in))
    distance = np.abs((index.astype(np.float32) + _F(0.5) - centre[:, None]) * (_F(1) / widened))
    weights = shape(distance)
    weights[index > last[:, None]] = 0
    return np.minimum(index, n_in - 1), weights * (_F(1) / _summed(weights))[:, None]


def _summed(weights: Floats) -> Floats:
    """Sums over the second axis, added one after another as the kernels do."""
    total = np.zeros(len(weights), np.float32)
    for k in range(weights.shape[1]):
        total += weights[:, k]
    return total


def _triangle(x: Floats) -> Floats:
    weight: Floats = np.maximum(_F(1) - x, _F(0))
    return weight


def _keys(x: Floats) -> Floats:
    """Keys' cubic with a = -0.5."""
    near = ((_F(1.5) * x - _F(2.5)) * x) * x + _F(1)
    far = ((_F(-0.5) * x + _F(2.5)) * x - _F(4)) * x + _F(2)
    return np.where(x >= 2, _F(0), np.where(x >= 1, far, near))


def _mitchell(x: Floats) -> Floats:
    """Mitchell and Netravali's cubic with B = C = 1/3; it does not go through the points."""
    near = ((_F(7) / _F(6) * x - _F(2)) * x) * x + _F(8) / _F(9)
    far = ((_F(-7) / _F(18) * x + _F(2)) * x - _F(10) / _F(3)) * x + _F(16) / _F(9)
    return np.where(x >= 2, _F(0), np.where(x >= 1, far, near))


def _lanczos3(x: Floats) -> Floats:
    pi, three = _F(math.pi), _F(3)
    safe = np.maximum(x, _F(1e-3))
    # Sines in float64, then rounded: nearer to a C library's sinf than numpy's float32 sine is.
    sines = [np.sin(angle.astype(np.float64)).astype(np.float32) for angle in (pi * safe, pi * safe / three)]
    value = three * sines[0] * sines[1] / (pi * pi * safe * safe)
    return np.where(x > three, _F(0), np.where(x <= _F(1e-3), _F(1), value))


_SHAPES: dict[str, tuple[float, Callable[[Floats], Floats]]] = {  # radius in pixels, weight at a distance
    "bilinear": (1.0, _triangle),
    "bicubic": (2.0, _keys),
    "lanczos3": (3.0, _lanczos3),
    "mitchellcubic": (2.0, _mitchell),
}
_STEPS = 1024  # of the table of weights


def _bicubic_table(n_in: int, n_out: int) -> Window:
    """Four neighbours with the weights of the nearest of 1024 steps; those beyond the border weigh nothing."""
    near, far = np.arange(_STEPS + 1) / _STEPS, np.arange(_STEPS + 1) / _STEPS + 1
    a = -0.5
    inner = (((a + 2) * near - (a + 3)) * near * near + 1).astype(np.float32)
    outer = (((a * far - 5 * a) * far + 8 * a) * far - 4 * a).astype(np.float32)
    scale = _F(n_in) / _F(n_out)
    place = (np.arange(n_out, dtype=np.float32) + _F(0.5)) * scale - _F(0.5)
    below = np.floor(place)
    step = np.rint((place - below) * _F(_STEPS)).astype(np.intp)
    weights = np.stack([outer[step], inner[step], inner[_STEPS - step], outer[_STEPS - step]], axis=1)
    index = below.astype(np.intp)[:, None] + np.arange(-1, 3)
    weights[(index < 0) | (index >= n_in)] = 0
    return np.clip(index, 0, n_in - 1), weights * (_F(1) / _summed(weights))[:, None]


def _covered(n_in: int, n_out: int) -> Window:
    """The input pixels that an output pixel covers, and how much of each; whole ones weigh 1."""
    scale = _F(n_in) / _F(n_out)
    start = np.arange(n_out, dtype=np.float32) * scale
    end = np.arange(1, n_out + 1, dtype=np.float32) * scale
    first, last = np.floor(start).astype(np.intp), np.ceil(end).astype(np.intp)
    index = first[:, None] + np.arange(int((last - first).max()))
    low, high = index.astype(np.float32), (index + 1).astype(np.float32)
    is_cut_below, is_cut_above = low < start[:, None], high > end[:, None]
    weights = np.where(
        is_cut_below,
        np.where(is_cut_above, scale, high - start[:, None]),
        np.where(is_cut_above, end[:, None] - low, _F(1)),
    ).astype(np.float32)
    weights[index >= last[:, None]] = 0
    return np.clip(index, 0, n_in - 1), weights


def _nearest(n_in: int, n_out: int) -> NDArray[np.intp]:
    scale = _F(n_in) / _F(n_out)
    place = np.floor((np.arange(n_out, dtype=np.float32) + _F(0.5)) * scale)
    index: NDArray[np.intp] = np.clip(place, 0, n_in - 1).astype(np.intp)
    return index
