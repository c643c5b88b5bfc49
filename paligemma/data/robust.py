"""The robust preprocessing of pre-training: a kernel of resizing drawn anew for every picture, JPEG, a slight crop.

    robust(picture, 224, rng)                 uint8[224, 224, 3]: kernel and JPEG, which move nothing
    robust_record(record, 224, rng)           the slight crop as well, with boxes, masks, words and regions
    Augmented(source, crop_options())         the slight crop of prompts, whose boxes stand in their texts

Pictures come out at the size of the model, where its own resize changes nothing. `robust` alone does not crop, since
it cannot move the boxes of a text.

Sources: big_vision pp/proj/paligemma/robustness.py (`resize_r`, `random_jpeg`); the PaliGemma report (arXiv 2407.07726)
for the slight crop. Published: the kernels, the qualities, that both ways of the DCT are equally likely. Ours: the
probability of JPEG and all numbers of the crop.
"""

import dataclasses
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paligemma.data.augment import AugmentOptions, Load, augment
from paligemma.data.moves import stretch_record
from paligemma.data.record import Record
from paligemma.errors import ImageError, OptionError
from paligemma.processing.image import load_image
from paligemma.processing.kernels import Kernel, cut, resample
from paligemma.processing.resize import Picture, resize

KERNELS: tuple[Kernel, ...] = ("bilinear", "bicubic", "lanczos3", "area", "mitchellcubic")


@dataclass(frozen=True, kw_only=True)
class RobustOptions:
    """The distortions of pre-training.

    Attributes:
        resize: draw the kernel, with or without antialias, of all ten alike; False: bilinear with antialias.
        jpeg_probability: of a JPEG round trip; ours.
        jpeg_quality: least and greatest quality, both included.
        crop_area, crop_aspect: of the slight crop, as in `AugmentOptions`; ours. A crop_area of (1, 1) crops nothing.
        min_visible: as in `AugmentOptions`; ours.
    """

    resize: bool = True
    jpeg_probability: float = 0.2
    jpeg_quality: tuple[int, int] = (75, 95)
    crop_area: tuple[float, float] = (0.8, 1.0)
    crop_aspect: tuple[float, float] = (0.9, 1.1)
    min_visible: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.jpeg_probability <= 1:
            raise OptionError(f"robust jpeg_probability={self.jpeg_probability}: expected 0 to 1.")
        quality = tuple(self.jpeg_quality)
        if len(quality) != 2 or not 1 <= quality[0] <= quality[1] <= 100 or any(int(q) != q for q in quality):
            raise OptionError(
                f"robust jpeg_quality={quality}: expected (least, greatest), whole numbers of 1 to 100, in this order."
            )
        crop_options(self)  # checks the rest


def crop_options(options: RobustOptions | None = None) -> AugmentOptions:
    """The slight crop as an augmentation, for `augment` and `Augmented`."""
    options = options or RobustOptions()
    area = tuple(options.crop_area)
    return AugmentOptions(
        crop=0.0 if area == (1, 1) else 1.0,
        crop_area=options.crop_area,
        crop_aspect=options.crop_aspect,
        min_visible=options.min_visible,
    )


def robust(
    picture: Picture, resolution: int, rng: np.random.Generator, options: RobustOptions | None = None
) -> Picture:
    """A picture as pre-training saw it, all of it.

    Args:
        picture: uint8[H, W, 3].
        resolution: side of the model's square in pixels.

    Returns:
        uint8[resolution, resolution, 3].

    Raises:
        ImageError: no such picture.
    """
    options = options or RobustOptions()
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise ImageError(
            f"robust got {picture.dtype}{list(picture.shape)}: expected uint8[H, W, 3]. Pass pictures through "
            "load_image()."
        )
    variant = int(rng.integers(2 * len(KERNELS)))
    has_jpeg, is_fast = rng.random(2) < (options.jpeg_probability, 0.5)
    quality = int(rng.integers(options.jpeg_quality[0], options.jpeg_quality[1] + 1))
    if options.resize:
        kernel, antialias = KERNELS[variant // 2], variant % 2 == 0
        sized = cut(resample(picture, resolution, resolution, kernel, antialias=antialias))
    else:
        sized = resize(picture, resolution, "bv_bilinear_aa").astype(np.uint8)
    return jpeg_round_trip(sized, quality, fast=bool(is_fast)) if has_jpeg else sized


def robust_record(
    record: Record,
    resolution: int,
    rng: np.random.Generator,
    options: RobustOptions | None = None,
    *,
    load: Load = load_image,
) -> Record:
    """A record as pre-training saw it: its pictures slightly cropped, then as `robust`, with all places moved along.

    Returns:
        The record with pictures uint8[resolution, resolution, 3] and its geometry in their pixels.
    """
    options = options or RobustOptions()
    cropped = augment(record, rng, crop_options(options), load=load)
    pictures = [load(image) for image in cropped.images]
    if pictures and cropped.size_hw is None:
        cropped = dataclasses.replace(cropped, size_hw=pictures[0].shape[:2])
    images = tuple(robust(picture, resolution, rng, options) for picture in pictures)
    return dataclasses.replace(stretch_record(cropped, (resolution, resolution)), images=images)


def jpeg_round_trip(picture: Picture, quality: int, *, fast: bool) -> Picture:
    """A picture written as JPEG (4:2:0, accurate integer DCT) and read back.

    Args:
        picture: uint8[H, W, 3].
        quality: 1…100.
        fast: read with the fast integer DCT, else with the accurate one.
    """
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return decode_fast(file.getvalue()) if fast else np.array(Image.open(file))


def decode_fast(data: bytes) -> Picture:
    """A JPEG of three channels in 4:2:0 by libjpeg's fast integer DCT, as TensorFlow reads it by default.

    Pillow reaches that DCT only through its decoder's switch for drafts, which also repeats chroma instead of
    smoothing it. So the planes are taken apart, and libjpeg's smooth upsampling and colours are done here.
    """
    with Image.open(io.BytesIO(data)) as file:
        file.draft("YCbCr", file.size)
        file.decoderconfig = (1, 1)  # scale, draft
        planes = np.asarray(file).astype(np.int32)
    height, width = planes.shape[:2]
    y = planes[..., 0]
    cb, cr = (_smooth(planes[::2, ::2, i], height, width) - 128 for i in (1, 2))
    half = 1 << 15
    red = y + ((_fixed(1.402) * cr + half) >> 16)
    green = y + ((-_fixed(0.344136286) * cb - _fixed(0.714136286) * cr + half) >> 16)
    blue = y + ((_fixed(1.772) * cb + half) >> 16)
    picture: Picture = np.clip(np.stack([red, green, blue], axis=-1), 0, 255).astype(np.uint8)
    return picture


def _fixed(factor: float) -> int:
    return int(factor * (1 << 16) + 0.5)


def _smooth(plane: NDArray[np.int32], height: int, width: int) -> NDArray[np.int32]:
    """Twice the size, 3/4 of the nearer and 1/4 of the farther one each way; libjpeg's h2v2_fancy_upsample."""
    out = np.empty((2 * plane.shape[0], 2 * plane.shape[1]), np.int32)
    beside = np.pad(plane, ((1, 1), (0, 0)), "edge")
    for row, other in ((0, beside[:-2]), (1, beside[2:])):
        sums = np.pad(3 * plane + other, ((0, 0), (1, 1)), "edge")
        near = 3 * sums[:, 1:-1]
        out[row::2, 0::2] = (near + sums[:, :-2] + 8) >> 4
        out[row::2, 1::2] = (near + sums[:, 2:] + 7) >> 4
    return out[:height, :width]
