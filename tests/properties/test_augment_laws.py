"""Laws of moving pictures: what is undone is as it was, masks and boxes agree, nothing leaves the picture."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paligemma.data.augment import AugmentOptions, augment, augment_example
from paligemma.data.example import Example
from paligemma.data.moves import Window, look, mask_box, move_box, move_instance, move_mask, stretch_record, whole
from paligemma.data.record import Instance, Mask, Record, Text, Word
from paligemma.data.robust import RobustOptions, robust, robust_record

FLIP = AugmentOptions(flip=1.0, flip_text=True)
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 48)


def _picture(draw: st.DrawFn, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(draw(seeds)).integers(0, 256, (height, width, 3), dtype=np.uint8)


@st.composite
def boxes(draw: st.DrawFn, height: int, width: int) -> tuple[float, float, float, float]:
    """Inside of the picture, edges on eighths of pixels, so that mirroring them is exact."""
    (y1, y2), (x1, x2) = (
        sorted(draw(st.lists(st.integers(0, 8 * side), min_size=2, max_size=2, unique=True)))
        for side in (height, width)
    )
    return (x1 / 8, y1 / 8, x2 / 8, y2 / 8)


@st.composite
def masked(draw: st.DrawFn, height: int, width: int) -> Instance:
    """An instance with its box tight around its mask, polygons or pixels."""
    if draw(st.booleans()):
        xs, ys = (st.integers(0, 8 * side).map(lambda edge: edge / 8) for side in (width, height))
        corners = draw(st.lists(st.tuples(xs, ys), min_size=3, max_size=6))
        mask = Mask((height, width), (tuple(edge for corner in corners for edge in corner),))
        if move_mask(mask, whole((height, width)))[1] == 1:  # an outline without area is none
            return Instance("thing", mask_box(mask), mask)
    x1, y1, x2, y2 = draw(boxes(height, width))
    pixels = np.zeros((height, width), bool)
    pixels[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
    pixels &= np.random.default_rng(draw(seeds)).random((height, width)) < draw(st.floats(0.3, 1))
    pixels[min(int(y1), height - 1), min(int(x1), width - 1)] = True
    mask = Mask.of(pixels)
    return Instance("thing", mask_box(mask), mask)


@st.composite
def records(draw: st.DrawFn) -> Record:
    height, width = draw(sides), draw(sides)
    some = st.lists(masked(height, width), max_size=3)
    places = st.lists(boxes(height, width), max_size=2)
    return Record(
        (_picture(draw, height, width),),
        (height, width),
        instances=(*draw(some), *(Instance("thing", box) for box in draw(places))),
        texts=tuple(Text("a thing", box_xyxy_px=box) for box in draw(places)),
        words=tuple(Word("thing", box) for box in draw(places)),
    )


@st.composite
def windows(draw: st.DrawFn, height: int, width: int) -> Window:
    """Anything that touches the picture, larger or smaller than it."""
    new_height, new_width = draw(st.integers(1, 2 * height)), draw(st.integers(1, 2 * width))
    x = draw(st.integers(min(0, width - new_width), max(0, width - new_width)))
    y = draw(st.integers(min(0, height - new_height), max(0, height - new_height)))
    return Window(x, y, new_width, new_height, draw(st.booleans()))


@st.composite
def all_options(draw: st.DrawFn) -> AugmentOptions:
    shares = st.floats(0, 1)
    area, scale = (
        sorted([draw(st.floats(0.05, 1)), draw(st.floats(0.05, 1))]),
        sorted([draw(st.floats(0.5, 2)), draw(st.floats(0.5, 2))]),
    )
    return AugmentOptions(
        flip=draw(shares), flip_text=draw(st.booleans()), crop=draw(shares), crop_area=tuple(area), scale=tuple(scale),
        colour=draw(st.floats(0, 0.5)), hue=draw(st.floats(0, 0.5)), min_visible=draw(shares),
        min_visible_words=draw(shares), tries=draw(st.integers(1, 4)),
    )  # fmt: skip


def _equal(one: Record, two: Record) -> None:
    np.testing.assert_array_equal(one.images[0], two.images[0])
    assert dataclasses.replace(one, images=()) == dataclasses.replace(two, images=())


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(records(), seeds)
def test_a_flip_twice_is_the_identity_on_pixels_boxes_and_masks(record: Record, seed: int):
    once = augment(record, _rng(seed), FLIP)
    _equal(augment(once, _rng(seed), FLIP), record)
    np.testing.assert_array_equal(once.images[0], record.images[0][:, ::-1])


@given(records(), seeds)
def test_a_crop_to_the_whole_picture_is_the_identity(record: Record, seed: int):
    _equal(augment(record, _rng(seed), AugmentOptions(crop=1.0, crop_area=(1, 1))), record)


@given(st.data())
def test_a_moved_mask_has_the_moved_box_within_a_pixel(data: st.DataObject):
    height, width = data.draw(sides), data.draw(sides)
    instance = data.draw(masked(height, width))
    window = data.draw(windows(height, width))
    moved = move_instance(instance, window, (height, width), 0.0)
    assert instance.mask is not None
    left = mask_box(move_mask(instance.mask, window)[0])
    if moved is None:  # nothing is left, or so little that it has no width
        assert left is None or min(left[2] - left[0], left[3] - left[1]) < 1
        return
    assert moved.mask is not None
    assert left is not None
    assert moved.mask.size_hw == window.size_hw
    assert mask_box(moved.mask) == left
    assert np.abs(np.subtract(left, moved.box_xyxy_px)).max() <= 1


@given(st.data())
def test_moving_pixels_of_a_mask_is_moving_those_of_the_picture(data: st.DataObject):
    """A mask drawn into a picture moves like the picture, whose border is dark where the picture is mostly dark."""
    height, width = data.draw(sides), data.draw(sides)
    instance = data.draw(masked(height, width))
    window = data.draw(windows(height, width))
    assert instance.mask is not None
    before = instance.mask.pixels()
    drawn = np.repeat(before[..., None], 3, 2).astype(np.uint8) * 255
    after, share = move_mask(Mask.of(before), window)
    inside = (np.arange(window.height) + window.y >= 0) & (np.arange(window.height) + window.y < height)
    across = (np.arange(window.width) + window.x >= 0) & (np.arange(window.width) + window.x < width)
    known = inside[:, None] & (across[::-1] if window.flipped else across)
    np.testing.assert_array_equal(after.pixels()[known], look(drawn, window)[..., 0][known] == 255)
    assert not after.pixels()[~known].any()
    assert share == (after.pixels().sum() / before.sum() if before.any() else 0)


@given(st.data())
def test_a_polygon_in_a_window_inside_of_it_covers_what_its_pixels_cover_up_to_the_edge(data: st.DataObject):
    """Clipping outlines and clipping pixels differ at most in pixels that an outline runs through."""
    height, width = data.draw(st.integers(4, 48)), data.draw(st.integers(4, 48))
    x1, y1, x2, y2 = data.draw(boxes(height, width))
    outline = (x1, y1, x2, y1, x2, y2, x1, y2) if data.draw(st.booleans()) else (x1, y1, x2, (y1 + y2) / 2, x1, y2)
    window = data.draw(windows(height, width))
    mask = Mask((height, width), (outline,))
    as_polygon, as_pixels = move_mask(mask, window)[0].pixels(), move_mask(Mask.of(mask.pixels()), window)[0].pixels()
    assert (as_polygon != as_pixels).sum() <= 2 * (height + width)


@given(records(), seeds, all_options())
def test_whatever_happens_boxes_lie_inside_and_sizes_agree(record: Record, seed: int, options: AugmentOptions):
    seen = augment(record, _rng(seed), options)
    height, width = seen.images[0].shape[:2]
    assert seen.size_hw == (height, width)
    for box in [item.box_xyxy_px for item in (*seen.instances, *seen.texts, *seen.words)]:
        assert 0 <= box[0] < box[2] <= width
        assert 0 <= box[1] < box[3] <= height
    for item in seen.instances:
        assert item.mask is None or item.mask.size_hw == (height, width)
    for kind in ("instances", "texts", "words"):
        assert bool(getattr(seen, kind)) == bool(getattr(record, kind))
        assert len(getattr(seen, kind)) <= len(getattr(record, kind))


@given(records(), seeds, all_options())
def test_the_same_seed_gives_the_same_record_and_the_given_one_stays(
    record: Record, seed: int, options: AugmentOptions
):
    kept = record.images[0].copy()
    one, two = (augment(record, _rng(seed), options) for _ in range(2))
    _equal(one, two)
    np.testing.assert_array_equal(record.images[0], kept)


@given(records(), seeds)
def test_off_is_the_same_object(record: Record, seed: int):
    rng = _rng(seed)
    assert augment(record, rng, AugmentOptions(min_visible=1.0)) is record
    assert rng.random() == _rng(seed).random()  # and draws nothing


bins = st.lists(st.integers(0, 1023), min_size=2, max_size=2, unique=True).map(sorted)


@given(st.lists(st.tuples(bins, bins), max_size=4), st.tuples(bins, bins), sides, sides, seeds)
def test_a_flip_twice_is_the_identity_on_texts(answered, asked, height, width, seed):
    def written(box) -> str:
        (y1, y2), (x1, x2) = box
        return "".join(f"<loc{index:04d}>" for index in (y1, x1, y2, x2))

    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    suffix = " ; ".join(f"{written(box)} thing" for box in answered)
    example = Example((image,), f"caption {written(asked)}", suffix)
    once = augment_example(example, _rng(seed), FLIP)
    twice = augment_example(once, _rng(seed), FLIP)
    assert (twice.prefix, twice.suffix) == (example.prefix, example.suffix)
    np.testing.assert_array_equal(twice.images[0], image)
    assert len(once.suffix) == len(suffix)


@given(st.data())
def test_stretching_keeps_fractions(data: st.DataObject):
    record = data.draw(records())
    size = data.draw(st.tuples(sides, sides))
    seen = stretch_record(record, size)
    for before, after in zip(record.instances, seen.instances, strict=True):
        fractions = [
            (box[0] / w, box[1] / h, box[2] / w, box[3] / h)
            for box, (h, w) in ((before.box_xyxy_px, record.size_hw), (after.box_xyxy_px, size))
        ]
        np.testing.assert_allclose(*fractions, atol=1e-9)
        assert after.mask is None or after.mask.pixels().shape == size


@given(st.data())
def test_robust_preprocessing_is_pure_and_gives_the_models_square(data: st.DataObject):
    record, seed = data.draw(records()), data.draw(seeds)
    resolution = data.draw(st.integers(1, 40))
    options = RobustOptions(jpeg_probability=data.draw(st.floats(0, 1)))
    one, two = (robust_record(record, resolution, _rng(seed), options) for _ in range(2))
    _equal(one, two)
    assert one.images[0].shape == (resolution, resolution, 3)
    assert one.size_hw == (resolution, resolution)
    picture = record.images[0]
    np.testing.assert_array_equal(*(robust(picture, resolution, _rng(seed), options) for _ in range(2)))


@given(st.data())
def test_a_moved_box_holds_the_pixels_that_it_held(data: st.DataObject):
    height, width = data.draw(sides), data.draw(sides)
    x1, y1, x2, y2 = (int(edge) for edge in data.draw(boxes(height, width)))
    window = data.draw(windows(height, width))
    marked = np.zeros((height, width), bool)
    marked[y1:y2, x1:x2] = True
    expected = move_mask(Mask.of(marked), window)[0].pixels()
    left, top, right, bottom = (int(edge) for edge in move_box((x1, y1, x2, y2), window))
    drawn = np.zeros(window.size_hw, bool)
    drawn[top:bottom, left:right] = True
    np.testing.assert_array_equal(drawn, expected)
