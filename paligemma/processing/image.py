"""Pictures in any of the usual forms → uint8[H, W, 3] → the float32[3, R, R] in [-1, 1] that the image tower sees."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor

from paligemma.config import Alpha, Resize
from paligemma.errors import ImageError, OptionError, ShapeError, nearest
from paligemma.processing.picture_file import MAX_PIXELS, open_picture, orientation, read_file
from paligemma.processing.resize import Levels, Picture, bilinear, resize

__all__ = ["MAX_PIXELS", "load_image", "open_rgb", "resize", "to_pixels", "video_pixels"]

_TURNS = {  # EXIF orientation → what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


_BACK = {6: 8, 8: 6}  # the other turns undo themselves


def load_image(
    source: Any,
    *,
    alpha: Alpha = "drop",
    exif_orientation: bool = True,
    max_pixels: int | None = MAX_PIXELS,
    draft: int | None = None,
) -> Picture:
    """Any picture as uint8[H, W, 3].

    Grey is repeated in three channels, a palette looked up, CMYK, YCbCr, LAB and HSV converted, 16 bits cut to the high
    8, of an animation the first frame taken. The content of a file decides its format, not its name.

    Args:
        source: path, `bytes` of a file, PIL image, or uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        alpha: "drop" transparency and keep the colour beneath (big_vision), or lay the picture on "white"
            (transformers 5).
        exif_orientation: turn files and bytes upright. PIL images and arrays stay as they are.
        max_pixels: largest picture that is decoded; None for any.
        draft: a side in pixels. JPEG files and bytes are decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of their
            size that still covers a square of that side. Faster, and not the pixels of the references. None: whole.

    Raises:
        ImageError: missing, empty, damaged, cut short, too large, or nothing that is a picture.
    """
    rgb = open_rgb(source, alpha=alpha, exif_orientation=exif_orientation, max_pixels=max_pixels, draft=draft)
    return rgb if isinstance(rgb, np.ndarray) else np.array(rgb)


def open_rgb(
    source: Any,
    *,
    alpha: Alpha = "drop",
    exif_orientation: bool = True,
    max_pixels: int | None = MAX_PIXELS,
    draft: int | None = None,
) -> Picture | Image.Image:
    """As `load_image`, but a decoded picture stays Pillow's, mode RGB: two copies fewer on the way to `to_pixels`."""
    if alpha not in get_args(Alpha):
        raise OptionError(f"alpha={alpha!r}: expected 'drop' or 'white'.{nearest(str(alpha), get_args(Alpha))}")
    if draft is not None and draft < 1:
        raise OptionError(f"draft={draft}: expected a side of 1 pixel or more, or None to decode at full size.")
    if isinstance(source, Image.Image):
        return _from_pil(source, "the PIL image", alpha, 1, max_pixels)
    if isinstance(source, np.ndarray) or hasattr(source, "__array__"):
        return _from_array(np.asarray(source), alpha)
    if isinstance(source, str | os.PathLike):
        name = str(Path(source))
        data = read_file(Path(source))
    elif isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        name = f"the picture of {len(data)} bytes"
    else:
        raise ImageError(
            f"{type(source).__name__} is not a picture: expected a path, bytes, a PIL image or a uint8[H, W, 3] array."
        )
    with open_picture(data, name, max_pixels) as picture:
        turn = orientation(picture)
        if not exif_orientation:
            # Pillow turns some formats (TIFF) while it decodes them, whether asked or not.
            turn = _BACK.get(turn, turn) if _turns_itself(picture, max_pixels) else 1
        elif _turns_itself(picture, max_pixels):
            turn = 1
        return _from_pil(picture, name, alpha, turn, max_pixels, draft)


def to_pixels(image: Picture | Image.Image, resolution: int, how: Resize, *, out: Tensor | None = None) -> Tensor:
    """What the image tower sees of a picture.

    Args:
        image: uint8[H, W, 3], or what `open_rgb` gives.
        resolution: side R in pixels; the picture is stretched to a square.
        how: see `resize`.
        out: float32[3, R, R] on the CPU to write into; or uint8, for the whole levels that `how` gives, unless it is
            "float_bilinear_aa": a quarter of the bytes, and the tower makes the same numbers of them.

    Returns:
        float32[3, R, R], level 0 is -1, level 255 is 1; or `out`.
    """
    planes: list[NDArray[Any]]
    if how == "hf_bicubic":
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        sized = picture.resize((resolution, resolution), Image.Resampling.BICUBIC)
        side = (resolution, resolution)
        planes = [np.frombuffer(sized.tobytes("raw", channel), np.uint8).reshape(side) for channel in "RGB"]
    else:
        planes = list(resize(np.asarray(image), resolution, how).transpose(2, 0, 1))
    if out is not None and out.dtype == torch.uint8:
        for plane, place in zip(planes, out.numpy(), strict=True):
            np.copyto(place, plane, casting="no")
        return out
    levels = np.empty((len(planes), resolution, resolution), np.float32) if out is None else out.numpy()
    # Level 0..255 to -1..1. The references write (x / 255 - 0.5) / 0.5 and x / 255 * 2 - 1; doubling is exact, so both
    # round like this, in two passes over memory, which is what costs time.
    for plane, place in zip(planes, levels, strict=True):
        np.divide(plane, np.float32(127.5), out=place, dtype=np.float32)
        np.subtract(place, np.float32(1), out=place)
    return torch.from_numpy(levels) if out is None else out


def video_pixels(frames: Sequence[Picture], resolution: int, n_frames: int) -> Tensor:
    """Frames of a clip as big_vision prepares them: bilinear without antialias, not cut to whole levels.

    Args:
        frames: uint8[H, W, 3] each, already sampled in time. A clip of fewer than `n_frames` starts over.

    Returns:
        float32[n_frames, 3, R, R] in [-1, 1].

    Source: big_vision pp/proj/paligemma/video.py.
    """
    if not frames or n_frames < 1:
        raise ShapeError(f"{len(frames)} frames for a clip of {n_frames}: expected at least one of each.")
    chosen = [frames[i % len(frames)] for i in range(n_frames)]
    levels = [bilinear(frame, resolution, resolution) for frame in chosen]
    return torch.stack([_channels_first(np.float32(2) * (x / np.float32(255)) - np.float32(1)) for x in levels])


def _channels_first(image: Levels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _turns_itself(picture: Image.Image, max_pixels: int | None) -> bool:
    """Whether Pillow has turned a picture upright by the time that it is decoded: its orientation is 1 then."""
    too_large = max_pixels is not None and picture.width * picture.height > max_pixels  # refused, and not decoded here
    if picture.format != "TIFF" or orientation(picture) == 1 or too_large:
        return False
    with contextlib.suppress(Exception):  # what is wrong with it is said where it is decoded
        picture.load()
    return orientation(picture) == 1


def _from_array(array: NDArray[Any], alpha: Alpha) -> Picture:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not fits or 0 in array.shape:
        hint = "Multiply by 255 and cast." if array.dtype.kind == "f" else "Bring it into that form first."
        if array.ndim == 3 and array.shape[0] in (1, 3, 4) and not fits:
            hint = "Move the channels to the end: array.transpose(1, 2, 0)."
        raise ImageError(
            f"an array {array.dtype}{list(array.shape)} is not a picture: expected uint8 [H, W, 3], [H, W, 4] or "
            f"[H, W]. {hint}"
        )
    if array.ndim == 3 and array.shape[2] == 3:
        return array
    return np.array(_to_rgb(Image.fromarray(np.ascontiguousarray(array)), alpha))


def _from_pil(
    picture: Image.Image, name: str, alpha: Alpha, turn: int, max_pixels: int | None, draft: int | None = None
) -> Image.Image:
    width, height = picture.size
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} × {height} = {width * height:,} pixels: expected at most {max_pixels:,}, more may be "
            "a decompression bomb. If you trust it, raise max_pixels (of load_image or the Processor)."
        )
    try:
        if draft is not None:
            picture.draft(picture.mode, (draft, draft))  # JPEG only; other formats ignore it
        picture.load()
        upright = picture.transpose(_TURNS[turn]) if turn in _TURNS else picture
        return _to_rgb(upright, alpha)
    except Exception as error:  # plugins raise nearly anything on damaged data: OSError, SyntaxError, struct.error, …
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ImageError(
            f"{name} cannot be decoded ({reason[:120]}): expected a whole picture. It is damaged or cut short, "
            "fetch it again."
        ) from error


def _to_rgb(picture: Image.Image, alpha: Alpha) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _to_8_bit(picture)
    if picture.mode in ("RGBa", "La"):  # alpha multiplied in
        picture = picture.convert("RGBA" if picture.mode == "RGBa" else "LA")
    if alpha == "white" and picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    if picture.mode == "LAB":
        lab, rgb = (ImageCms.ImageCmsProfile(ImageCms.createProfile(space)) for space in ("LAB", "sRGB"))
        picture = ImageCms.ImageCmsTransform(lab, rgb, "LAB", "RGB").apply(picture)
    if picture.mode == "RGB" and picture.format in ("JPEG", None):
        return picture  # convert() would copy it
    return picture.convert("RGB")


def _to_8_bit(picture: Image.Image) -> Image.Image:
    """Grey of 16 or more bits as 8: the high byte, as TensorFlow's decoder; Pillow would clip nearly all to white.

    Mode I holds 16 bits in files; made in memory and nowhere above 255, it holds 8. Mode F holds 0 to 1, or 0 to 255.
    """
    levels = np.asarray(picture)
    if picture.mode == "F":
        levels = np.nan_to_num(levels, nan=0.0)
        eight_bit = levels * 255 if levels.max() <= 1 else levels
    elif picture.mode == "I" and picture.format is None and levels.max() <= 255:
        eight_bit = levels
    else:
        eight_bit = np.clip(levels, 0, 65535).astype(np.int64) >> 8
    return Image.fromarray(np.clip(eight_bit, 0, 255).astype(np.uint8))
