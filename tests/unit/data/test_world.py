"""The picture world: seeds, scenes and pixels."""

import dataclasses
import itertools

import numpy as np
import pytest

from paligemma.data import world
from paligemma.data.world import BACKGROUNDS, COLOURS, FONTS, SHAPES, TEXTURES, Background, Scene, Thing
from paligemma.data.world.fonts import cap_height
from paligemma.data.world.palette import MIN_CONTRAST, distance, shade
from paligemma.data.world.sample import LONG_SIDE_PX, MIN_VISIBLE
from paligemma.data.world.shapes import parts
from paligemma.errors import OptionError

WORLDS = ("plain", "full")
GRAY_GROUND = Background(kind="flat", colour="gray", rgbs=((128, 128, 128), (128, 128, 128)))


def scenes(name, n=120, split="train"):
    return [world.sample_scene(seed, name, split) for seed in range(n)]


def alone(thing, size_hw=(160, 160), background=GRAY_GROUND):
    return world.render(Scene(size_hw=size_hw, background=background, things=(thing,)))


def shape_thing(shape, **fields):
    defaults = {"colour": "red", "rgb": (220, 20, 30), "centre_xy_px": (80.0, 80.0), "size_px": 100.0}
    long = {"elongation": 2.8} if shape in ("rectangle", "oval") else {}
    return Thing(kind="shape", shape=shape, **(defaults | long | fields))


def text_thing(text, font, **fields):
    defaults = {"colour": "black", "rgb": (10, 10, 10), "centre_xy_px": (80.0, 80.0), "size_px": 40.0}
    return Thing(kind="text", text=text, font=font, **(defaults | fields))


@pytest.mark.parametrize("name", WORLDS)
def test_a_seed_gives_the_same_scene_and_the_same_pixels(name):
    for seed in range(20):
        first, second = world.sample_scene(seed, name), world.sample_scene(seed, name)
        assert first == second
        assert np.array_equal(world.render(first).image, world.render(second).image)


def test_different_seeds_worlds_and_splits_give_different_scenes():
    every = [s for name in WORLDS for split in ("train", "held_out") for s in scenes(name, 100, split)]
    assert len(set(every)) == len(every)


def test_no_training_seed_reaches_a_held_out_scene():
    held_out = {s for name in WORLDS for s in scenes(name, 100, "held_out")}
    seeds = [*range(300), *(2**32 + k for k in range(50)), *(2**k for k in range(33, 64))]
    assert not any(world.sample_scene(seed, name) in held_out for seed in seeds for name in WORLDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "plane"), "Did you mean 'plain'"),
        ((0, "full", "test"), "split 'test' does not exist: one of train, held_out"),
        ((-1, "full"), "seed -1 is negative"),
    ],
)
def test_a_world_that_does_not_exist_is_refused_by_name(arguments, message):
    with pytest.raises(OptionError, match=message):
        world.sample_scene(*arguments)


@pytest.mark.parametrize("name", WORLDS)
def test_pictures_have_the_promised_sizes(name):
    sizes = [scene.size_hw for scene in scenes(name)]
    assert all(LONG_SIDE_PX[0] <= max(size) <= LONG_SIDE_PX[1] for size in sizes)
    ratios = [h / w for h, w in sizes]
    assert min(ratios) >= 0.66
    assert max(ratios) <= 1.51
    assert min(ratios) < 0.75
    assert max(ratios) > 1.35


@pytest.mark.parametrize("name", WORLDS)
def test_masks_are_disjoint_and_boxes_tight(name):
    for scene in scenes(name):
        drawn = world.render(scene)
        assert drawn.image.shape == (*scene.size_hw, 3)
        assert np.sum(drawn.masks, axis=0).max() == 1
        for mask, box in zip(drawn.masks, drawn.boxes_xyxy_px, strict=True):
            yx = np.argwhere(mask)
            assert box == (yx[:, 1].min(), yx[:, 0].min(), yx[:, 1].max() + 1, yx[:, 0].max() + 1)


def test_enough_of_every_thing_can_be_seen():
    hidden_somewhere = 0
    for scene in scenes("full", 150):
        drawn = world.render(scene)
        for thing, mask in zip(scene.things, drawn.masks, strict=True):
            whole = int(alone(thing, scene.size_hw).masks[0].sum())
            assert mask.sum() >= MIN_VISIBLE * whole
            hidden_somewhere += mask.sum() < whole
    assert hidden_somewhere > 20  # the world does have overlaps


def test_plain_pictures_are_one_to_three_separate_solid_shapes_on_one_colour():
    for scene in scenes("plain"):
        drawn = world.render(scene)
        assert 1 <= len(scene.things) <= 3
        assert scene.background.kind == "flat"
        assert all(thing.kind == "shape" and thing.texture == "solid" for thing in scene.things)
        for thing, mask in zip(scene.things, drawn.masks, strict=True):
            assert np.array_equal(mask, alone(thing, scene.size_hw).masks[0])
        for a, b in itertools.combinations(drawn.boxes_xyxy_px, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for left, top, right, bottom in drawn.boxes_xyxy_px:
            assert max(right - left, bottom - top) >= 0.13 * min(scene.size_hw)


def test_the_full_world_shows_everything_there_is():
    every = scenes("full", 500)
    things = [thing for scene in every for thing in scene.things]
    assert {thing.shape for thing in things if thing.kind == "shape"} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.texture for thing in things} == set(TEXTURES)
    assert {thing.font for thing in things if thing.kind == "text"} == set(FONTS)
    assert {scene.background.kind for scene in every} == set(BACKGROUNDS)
    assert {len(scene.things) for scene in every} == {1, 2, 3, 4, 5, 6}


def test_shades_of_two_colours_are_never_alike():
    rng = np.random.default_rng(0)
    shades = {name: [shade(name, rng) for _ in range(60)] for name in COLOURS}
    for a, b in itertools.combinations(COLOURS, 2):
        assert min(distance(x, y) for x in shades[a] for y in shades[b]) > 55, (a, b)


@pytest.mark.parametrize("name", WORLDS)
def test_every_thing_stands_out_from_its_background(name):
    for scene in scenes(name):
        for thing in scene.things:
            assert thing.colour != scene.background.colour
            assert min(distance(thing.rgb, rgb) for rgb in scene.background.rgbs) >= MIN_CONTRAST


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_the_area_of_its_polygons(shape):
    thing = shape_thing(shape)
    drawn = alone(thing)
    unit = [(points, adds) for points, adds in parts(shape, thing.elongation)]
    inside = drawn.masks[0]
    assert np.all(np.abs(drawn.image[inside].astype(int) - thing.rgb).mean(axis=1) < 60)
    assert np.median(np.abs(drawn.image[inside].astype(int) - thing.rgb)) == 0
    if shape == "moon":  # its cut reaches beyond its outer circle: no plain sum of areas
        return
    steps = [(p, np.roll(p, -1, axis=0), adds) for p, adds in unit]
    area = sum((1 if adds else -1) * abs(np.sum(p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0])) / 2 for p, q, adds in steps)
    outline_px = sum(np.linalg.norm(q - p, axis=1).sum() for p, q, _ in steps) * thing.size_px
    # The drawn edge is never half a pixel off.
    assert abs(inside.sum() - area * thing.size_px**2) < 0.5 * outline_px


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_centred_in_the_picture_lies_where_it_was_put(shape):
    moved = shape_thing(shape, centre_xy_px=(91.0, 73.0))
    assert np.array_equal(np.roll(alone(shape_thing(shape)).masks[0], (-7, 11), (0, 1)), alone(moved).masks[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_no_two_shapes_look_alike_after_any_stretch(shape):
    """Best overlap of a shape with any other, both in their own boxes (so whatever the stretch), stays below 1."""

    def boxed(name, angle):
        drawn = alone(shape_thing(name, angle_deg=angle, size_px=120.0))
        left, top, right, bottom = (int(v) for v in drawn.boxes_xyxy_px[0])
        crop = drawn.masks[0][top:bottom, left:right]
        ys = (np.arange(48) * crop.shape[0]) // 48
        xs = (np.arange(48) * crop.shape[1]) // 48
        return crop[np.ix_(ys, xs)]

    # In its box a circle is an oval and a square a rectangle: those pairs differ by their elongation instead.
    same_in_box = {"circle": "oval", "oval": "circle", "square": "rectangle", "rectangle": "square"}
    mine = boxed(shape, 0.0)
    for other in SHAPES:
        if other in (shape, same_in_box.get(shape)):
            continue
        theirs = boxed(other, 0.0)
        assert (mine & theirs).sum() / (mine | theirs).sum() < 0.9, other


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_a_texture_mixes_two_shades_and_leaves_the_silhouette(texture):
    for shape in SHAPES:
        solid = alone(shape_thing(shape))
        drawn = alone(shape_thing(shape, texture=texture, second_rgb=(20, 40, 220), texture_angle_deg=30.0))
        assert np.array_equal(drawn.masks[0], solid.masks[0])
        inside = drawn.image[drawn.masks[0]].astype(int)
        reddish = (np.abs(inside - (220, 20, 30)).sum(axis=1) < 150).mean()
        bluish = (np.abs(inside - (20, 40, 220)).sum(axis=1) < 150).mean()
        assert reddish > 0.15, shape
        assert bluish > 0.05, shape
        untouched = np.all(solid.image == 128, axis=2)
        assert np.all(drawn.image[untouched] == 128)


@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_a_background_stays_between_its_two_colours(kind):
    low, high = (60, 90, 120), (120, 150, 200)
    ground = Background(kind=kind, colour="blue", rgbs=(low, high), angle_deg=25.0, period_px=14.0, seed=3)
    image = alone(shape_thing("circle", size_px=10.0), background=ground).image[:60]
    assert np.all((image >= low) & (image <= high))
    assert (image.std(axis=(0, 1)).min() > 3) == (kind != "flat")


@pytest.mark.parametrize("name", sorted(FONTS))
def test_a_font_has_every_letter_and_digit_and_tells_them_apart(name):
    from string import ascii_letters, digits

    pictures = {}
    for character in ascii_letters + digits:
        drawn = alone(text_thing(character, name, size_px=60.0))
        ink = drawn.image[drawn.masks[0]].min()
        assert ink < 40, character
        pictures[character] = drawn.image.tobytes()
    assert len(set(pictures.values())) == 62


def test_all_fonts_differ():
    pictures = {name: alone(text_thing("Rag7", name)).image.tobytes() for name in FONTS}
    assert len(set(pictures.values())) == len(FONTS)


@pytest.mark.parametrize("angle", [-6.0, 0.0, 5.0])
def test_the_mask_of_a_text_holds_all_of_its_ink(angle):
    for name in FONTS:
        drawn = alone(text_thing("gold", name, angle_deg=angle))
        dark = drawn.image.max(axis=2) < 70
        assert dark.sum() > 100
        assert (dark & ~drawn.masks[0]).sum() <= 0.01 * dark.sum(), name
        left, top, right, bottom = drawn.boxes_xyxy_px[0]
        ys, xs = np.nonzero(dark)
        slack = 2 + 2 * abs(angle)
        assert xs.min() - left <= slack
        assert right - xs.max() <= slack + 1
        assert ys.min() - top <= slack
        assert bottom - ys.max() <= slack + 1


def test_letters_stay_legible_in_the_square_the_model_sees():
    found = 0
    for scene in scenes("full", 200):
        for index in scene.texts:
            thing = scene.things[index]
            assert thing.size_px * cap_height(thing.font) * 112 / max(scene.size_hw) >= 10
            found += 1
    assert found > 60


def test_scenes_are_values():
    scene = world.sample_scene(0, "full")
    with pytest.raises(dataclasses.FrozenInstanceError):
        scene.size_hw = (1, 1)
    assert {scene: 1}[world.sample_scene(0, "full")] == 1
