"""TensorFlow's kernels of resizing and its fast JPEG decoding, as the original's preprocessing calls them.

Stated tolerance: one grey level where the exact value is next to a whole one. Ours follows TensorFlow's order of
operations: no pixel differs.
"""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from paligemma.data.robust import KERNELS, decode_fast
from paligemma.processing.image import load_image
from paligemma.processing.kernels import Kernel, cut, resample
from paligemma.processing.resize import bilinear, bilinear_antialias

DATA = Path(__file__).parent / "data" / "image_preprocessing"


@pytest.fixture(scope="module")
def decoded():
    with np.load(DATA / "decoded.npz") as pictures:
        return dict(pictures)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("kernel", ["area", "bicubic", "lanczos3", "mitchellcubic", "nearest"])
def test_every_kernel_is_equal_to_the_last_bit(decoded, kernel: Kernel, antialias: bool):
    """Shrunk (photo), enlarged (tiny), and one side of each (tall)."""
    with np.load(DATA / f"resize_{kernel}_{'' if antialias else 'no'}antialias_uint8.npz") as expected:
        assert set(expected) == {"tall", "photo", "tiny"}
        for name in expected:
            ours = resample(decoded[name], 56, 56, kernel, antialias=antialias)
            assert ours.dtype == np.float32
            np.testing.assert_array_equal(cut(ours), expected[name], err_msg=name)


@pytest.mark.parametrize(("file", "n_pictures"), [("resize_small_uint8", 6), ("resize_long_uint8", 6)])
def test_area_is_equal_where_the_aspect_ratio_is_kept(decoded, file: str, n_pictures: int):
    with np.load(DATA / f"{file}.npz") as expected:
        assert len(expected) == n_pictures
        for name in expected:
            ours = resample(decoded[name], *expected[name].shape[:2], "area", antialias=False)
            np.testing.assert_array_equal(cut(ours), expected[name], err_msg=name)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("file", "size"), [("resize", 56), ("resize224", 224)])
def test_bilinear_is_the_one_that_the_model_is_fed_with(decoded, file: str, size: int, antialias: bool):
    for name, picture in decoded.items():
        ours = resample(picture, size, size, "bilinear", antialias=antialias)
        other = (bilinear_antialias if antialias else bilinear)(picture, size, size)
        np.testing.assert_array_equal(ours, other, err_msg=name)
    if antialias:
        with np.load(DATA / f"{file}_antialias_uint8.npz") as expected:
            for name in expected:
                ours = cut(resample(decoded[name], size, size, "bilinear", antialias=True))
                np.testing.assert_array_equal(ours, expected[name], err_msg=name)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_big_pictures_are_summed_in_strips_like_small_ones(kernel: Kernel, antialias: bool):
    """A column of a picture does not depend on how many columns stand beside it."""
    picture = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    wide = resample(picture, 333, 900, kernel, antialias=antialias)
    narrow = resample(picture[:, :2].copy(), 333, 2, kernel, antialias=antialias)
    if kernel != "mitchellcubic":  # at their own width the others change nothing along a row (a sine of pi is not 0)
        np.testing.assert_allclose(wide[:, 0], narrow[:, 0], atol=1e-3)
    as_levels = resample(picture.astype(np.float32), 333, 900, kernel, antialias=antialias)
    np.testing.assert_array_equal(as_levels, wide)


@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_a_plain_picture_stays_plain(kernel: Kernel):
    plain = np.full((37, 91, 3), 200, np.uint8)
    for antialias in (True, False):
        np.testing.assert_allclose(resample(plain, 24, 120, kernel, antialias=antialias), 200, rtol=2e-5)


def test_kernels_of_robust_preprocessing_are_known():
    assert set(KERNELS) < set(get_args(Kernel))


def test_the_fast_dct_reads_what_the_original_reads_by_default():
    """Not one level differs; the accurate one, which Pillow takes otherwise, differs in two values of three."""
    with np.load(DATA / "jpeg.npz") as data:
        file = data["color/jpeg_bytes"].tobytes()
        np.testing.assert_array_equal(decode_fast(file), data["color/decoded_default"])
        np.testing.assert_array_equal(load_image(file), data["color/decoded_precise"])
        assert (data["color/decoded_default"] != data["color/decoded_precise"]).mean() > 0.5
