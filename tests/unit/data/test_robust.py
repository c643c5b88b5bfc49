"""The robust preprocessing of pre-training."""

import io
from collections import Counter
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from paligemma.config import Resize
from paligemma.data import world
from paligemma.data.augment import augment
from paligemma.data.record import Instance, Mask, Record, Text, Word
from paligemma.data.robust import KERNELS, RobustOptions, crop_options, jpeg_round_trip, robust, robust_record
from paligemma.errors import ImageError, OptionError
from paligemma.processing.image import resize
from paligemma.processing.kernels import cut, resample

PLAIN = RobustOptions(jpeg_probability=0, crop_area=(1, 1))


def picture(seed: int = 5):
    return world.render(world.sample_scene(seed, "full")).image


def photo(height: int = 90, width: int = 120):
    """Smooth colours with fine noise, where kernels differ."""
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(height)[:, None, None] / 5 + np.arange(width)[:, None] / 7 + np.arange(3)) * 90 + 128
    return np.clip(waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("how", get_args(Resize))
def test_the_models_own_resize_changes_nothing_afterwards(how: Resize):
    for seed in range(12):
        seen = robust(picture(seed), 56, np.random.default_rng(seed), RobustOptions(jpeg_probability=0.5))
        assert seen.dtype == np.uint8
        assert seen.shape == (56, 56, 3)
        np.testing.assert_array_equal(resize(seen, 56, how), seen)


def test_all_ten_ways_of_resizing_are_drawn_about_equally_often():
    source = photo()
    ways = {
        (kernel, antialias): cut(resample(source, 28, 28, kernel, antialias=antialias)).tobytes()
        for kernel in KERNELS
        for antialias in (True, False)
    }
    assert len(set(ways.values())) == 9  # area is the same with and without
    drawn = Counter(robust(source, 28, np.random.default_rng(seed), PLAIN).tobytes() for seed in range(1000))
    assert set(drawn) == set(ways.values())
    for (kernel, _), result in ways.items():
        assert (2 if kernel == "area" else 1) * 65 < drawn[result] < (2 if kernel == "area" else 1) * 135


def test_jpeg_comes_as_often_as_asked_with_every_quality_and_either_dct():
    source = photo(64, 64)
    options = RobustOptions(resize=False, jpeg_probability=0.5)
    ways = {
        jpeg_round_trip(source, quality, fast=fast).tobytes(): (quality, fast)
        for quality in range(75, 96)
        for fast in (True, False)
    }
    drawn = [robust(source, 64, np.random.default_rng(seed), options) for seed in range(1500)]
    found = Counter(ways.get(seen.tobytes(), "none") for seen in drawn)
    assert sum(found.values()) == 1500
    assert 650 < found["none"] < 850
    assert all(np.array_equal(seen, source) for seen in drawn if seen.tobytes() not in ways)
    assert {quality for quality, _ in set(found) - {"none"}} == set(range(75, 96))
    n_fast = sum(n for way, n in found.items() if way != "none" and way[1])
    assert 0.4 < n_fast / (1500 - found["none"]) < 0.6


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (15, 17), (16, 16), (33, 50)])
def test_a_round_trip_keeps_size_and_looks_of_any_picture(height: int, width: int, fast: bool):
    source = np.broadcast_to(np.linspace(40, 200, width)[None, :, None], (height, width, 3)).astype(np.uint8).copy()
    seen = jpeg_round_trip(source, 95, fast=fast)
    assert seen.shape == source.shape
    assert np.abs(seen.astype(int) - source).max() < 12


def test_the_two_dcts_differ_by_a_few_levels_only():
    accurate, fast = (jpeg_round_trip(photo(), 90, fast=fast).astype(int) for fast in (False, True))
    assert 0 < np.abs(accurate - fast).max() <= 8
    file = io.BytesIO()
    Image.fromarray(photo()).save(file, "JPEG", quality=90)
    np.testing.assert_array_equal(accurate, np.asarray(Image.open(file)))


def test_the_same_seed_gives_the_same_picture_and_leaves_the_given_one():
    source = picture()
    kept = source.copy()
    options = RobustOptions(jpeg_probability=1)
    one, two = (robust(source, 56, np.random.default_rng(7), options) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(source, kept)
    assert not np.array_equal(one, robust(source, 56, np.random.default_rng(8), options))


def test_without_a_drawn_kernel_it_is_bilinear_with_antialias():
    options = RobustOptions(resize=False, jpeg_probability=0)
    for seed in range(5):
        seen = robust(picture(), 56, np.random.default_rng(seed), options)
        np.testing.assert_array_equal(seen, resize(picture(), 56, "bv_bilinear_aa"))


def record():
    """A dark square on a light ground, with everything that has a place."""
    image = np.full((100, 200, 3), 230, np.uint8)
    image[40:60, 80:120] = 20
    box, outline = (80.0, 40.0, 120.0, 60.0), (80.0, 40.0, 120.0, 40.0, 120.0, 60.0, 80.0, 60.0)
    return Record(
        (image,),
        (100, 200),
        instances=(
            Instance("box", box, Mask((100, 200), (outline,))),
            Instance("box", box, Mask.of(image[..., 0] < 100)),
            Instance("box", box),
        ),
        texts=(Text("a box"), Text("the box", box_xyxy_px=box)),
        words=(Word("box", box),),
    )


def test_a_record_is_cropped_with_all_that_has_a_place():
    edges = set()
    for seed in range(20):
        seen = robust_record(record(), 64, np.random.default_rng(seed))
        assert seen.size_hw == (64, 64)
        assert seen.images[0].shape == (64, 64, 3)
        dark = seen.images[0][..., 0] < 125
        rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        places = [item.box_xyxy_px for item in (*seen.instances, seen.texts[1], *seen.words)]
        assert len(places) == 5
        for place in places:
            assert np.abs(np.subtract(place, box)).max() <= 1
        for item in seen.instances[:2]:
            assert (item.mask.pixels() & dark).sum() > 0.8 * (item.mask.pixels() | dark).sum()
        edges.add(places[0])
    assert len(edges) > 15  # the crops differ


def test_a_crop_of_everything_only_stretches():
    seen = robust_record(record(), 50, np.random.default_rng(0), PLAIN)
    assert seen.instances[2].box_xyxy_px == (20, 20, 30, 30)
    assert seen.texts[0] == Text("a box")
    assert seen.words[0].box_xyxy_px == (20, 20, 30, 30)
    assert seen.instances[0].mask.polygons == ((20, 20, 30, 20, 30, 30, 20, 30),)


def test_the_slight_crop_can_be_had_alone():
    cropped = augment(record(), np.random.default_rng(0), crop_options())
    height, width = cropped.size_hw
    assert 0.79 < height * width / (100 * 200) < 1
    assert cropped.images[0].shape[:2] == (height, width)


def test_options_and_pictures_that_make_no_sense_are_refused():
    for fields, said in (
        ({"jpeg_probability": 1.5}, "jpeg_probability=1.5: expected 0 to 1"),
        ({"jpeg_quality": (95, 75)}, r"jpeg_quality=\(95, 75\): expected \(least, greatest\)"),
        ({"jpeg_quality": (75.5, 95)}, "whole numbers"),
        ({"crop_area": (0.8, 1.2)}, r"crop_area=\(0.8, 1.2\): expected"),
    ):
        with pytest.raises(OptionError, match=said):
            RobustOptions(**fields)
    with pytest.raises(ImageError, match=r"robust got float64\[4, 4, 3\]: expected uint8"):
        robust(np.zeros((4, 4, 3)), 56, np.random.default_rng(0))
    with pytest.raises(OptionError, match=r"kernel='bicubik': expected one of .*Did you mean 'bicubic'"):
        resample(picture(), 5, 5, "bicubik", antialias=True)
    with pytest.raises(OptionError, match="at least 1 pixel"):
        resample(picture(), 0, 5, "bicubic", antialias=True)
    with pytest.raises(ImageError, match="resample got"):
        resample(np.zeros((4, 4), np.uint8), 5, 5, "bicubic", antialias=True)
