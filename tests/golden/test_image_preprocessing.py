"""The original's decoding, resizing and value ranges.

Stated tolerance: one grey level where the exact value is next to a whole one. Ours follows TensorFlow's order of
operations, so the resized pictures are equal to the last bit and tested so.

Not ours, not tested and not copied here: the other kernels (area, lanczos3, mitchellcubic, nearest, bicubic) and crops,
which belong to pre-training augmentation.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from paligemma.config import Resize
from paligemma.processing.image import load_image, resize, to_pixels, video_pixels

DATA = Path(__file__).parent / "data" / "image_preprocessing"
FILES = {name: DATA / entry["file"] for name, entry in json.loads((DATA / "index.json").read_text())["images"].items()}


@pytest.fixture(scope="module")
def pictures() -> dict[str, NDArray[np.uint8]]:
    return {name: load_image(path) for name, path in FILES.items()}


def channels_last(pixels: object) -> NDArray[np.float32]:
    return np.moveaxis(np.asarray(pixels), -3, -1)


def test_every_picture_is_decoded_as_the_original_does(pictures):
    """Grey repeated, alpha dropped, palettes looked up, 16 bits cut to the high byte."""
    with np.load(DATA / "decoded.npz") as decoded:
        assert set(decoded) == set(pictures)
        for name in decoded:
            np.testing.assert_array_equal(pictures[name], decoded[name], err_msg=name)


@pytest.mark.parametrize(
    ("file", "size", "how"),
    [
        ("resize_antialias_uint8", 56, "bv_bilinear_aa"),
        ("resize224_antialias_uint8", 224, "bv_bilinear_aa"),
        ("resize224_noantialias_uint8", 224, "bv_bilinear"),
        ("resize_rect_antialias_uint8", (42, 70), "bv_bilinear_aa"),
    ],
)
def test_resized_pictures_are_equal_to_the_last_bit(pictures, file: str, size: int | tuple[int, int], how: Resize):
    with np.load(DATA / f"{file}.npz") as expected:
        for name in expected:
            np.testing.assert_array_equal(resize(pictures[name], size, how), expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("file", "size", "how"),
    [
        ("resize_antialias_range", 56, "bv_bilinear_aa"),
        ("resize_noantialias_range", 56, "bv_bilinear"),
        ("resize224_antialias_range", 224, "bv_bilinear_aa"),
    ],
)
def test_pixels_in_their_range_are_equal_to_the_last_bit(pictures, file: str, size: int, how: Resize):
    with np.load(DATA / f"{file}.npz") as expected:
        for name in expected:
            ours = channels_last(to_pixels(pictures[name], size, how))
            assert ours.dtype == np.float32
            np.testing.assert_array_equal(ours, expected[name], err_msg=name)


def test_the_uncut_resize_differs_from_the_cut_one_by_less_than_a_level(pictures):
    """float_bilinear_aa has no golden of its own: cut to whole levels it must give the golden of bv_bilinear_aa."""
    with np.load(DATA / "resize_antialias_uint8.npz") as expected:
        for name in expected:
            uncut = resize(pictures[name], 56, "float_bilinear_aa")
            assert uncut.dtype == np.float32
            np.testing.assert_array_equal(np.clip(uncut, 0, 255).astype(np.uint8), expected[name], err_msg=name)


def test_two_pictures_of_an_example_are_stacked_as_the_original_does(pictures):
    with np.load(DATA / "multi_frame.npz") as expected:
        ours = np.stack([channels_last(to_pixels(pictures[name], 56, "bv_bilinear")) for name in ("photo", "wide")])
        np.testing.assert_array_equal(ours, expected["stacked_photo_wide"])


def test_video_frames_stay_uncut_and_a_short_clip_starts_over(pictures):
    with np.load(DATA / "multi_frame.npz") as expected:
        ours = video_pixels([pictures[name] for name in ("photo", "tall", "exact")], 56, 4)
        np.testing.assert_array_equal(channels_last(ours), expected["video_photo_tall_exact_replicated_to_4"])


@pytest.mark.parametrize("kind", ["color", "gray"])
def test_jpeg_bytes_decode_within_a_few_levels_of_either_dct(kind: str):
    with np.load(DATA / "jpeg.npz") as data:
        ours = load_image(data[f"{kind}/jpeg_bytes"].tobytes()).astype(int)
        assert np.abs(ours - data[f"{kind}/decoded_precise"]).max() <= 2
        assert np.abs(ours - data[f"{kind}/decoded_default"]).max() <= 8
