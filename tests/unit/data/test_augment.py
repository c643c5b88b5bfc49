"""Augmentation for transfers: what is changed, what goes along, and what is left alone."""

import dataclasses
import unicodedata

import numpy as np
import pytest

from paligemma.data import world
from paligemma.data.augment import Augmented, AugmentOptions, augment, augment_example, recolour
from paligemma.data.builders import BUILDERS, LANGUAGES, builder_of
from paligemma.data.example import Example
from paligemma.data.guards import _COLOURS, _SIDES, names_colour, names_side
from paligemma.data.moves import Window, look, mask_box, move_instance, move_mask, move_record
from paligemma.data.record import Asked, Instance, Mask, Record, Text, Word
from paligemma.errors import DataError, OptionError
from paligemma.tasks.grammar import parse_entries

FLIP = AugmentOptions(flip=1.0)
EVERYTHING = AugmentOptions(flip=0.5, crop=0.7, crop_area=(0.3, 0.9), scale=(0.6, 1.6), colour=0.3, hue=0.1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scene(seed: int, split: str = "plain") -> Record:
    """A picture of the world with boxes and masks of what is not text, and the text as words."""
    drawn_from = world.sample_scene(seed, split)
    drawn = world.render(drawn_from)
    things = list(zip(drawn_from.things, drawn.boxes_xyxy_px, drawn.masks, strict=True))
    return Record(
        (drawn.image,),
        drawn.image.shape[:2],
        instances=tuple(Instance(t.name, tuple(box), Mask.of(mask)) for t, box, mask in things if t.kind != "text"),
        words=tuple(Word(t.text, tuple(box)) for t, box, _ in things if t.kind == "text"),
        where=f"scene {seed}",
    )


def plain(width: int = 40, height: int = 20, **fields) -> Record:
    """A picture whose red is the column and whose green is the row."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Record((image,), (height, width), where="a.jpg", **fields)


def test_off_by_default_and_then_nothing_is_read():
    record, example = Record(("missing.jpg",)), Example(("missing.jpg",), "detect cat", "")
    assert not AugmentOptions().is_on
    assert augment(record, rng(), AugmentOptions()) is record
    assert augment_example(example, rng(), AugmentOptions()) is example


def test_what_was_not_drawn_is_not_read_either():
    record = Record(("missing.jpg",))
    options = AugmentOptions(flip=1e-9, crop=1e-9)
    assert augment(record, rng(), options) is record


def test_a_flip_mirrors_pixels_boxes_masks_and_regions():
    outline = (2.0, 3.0, 10.0, 3.0, 10.0, 9.0)
    pixels = np.zeros((20, 40), bool)
    pixels[3:9, 2:10] = True
    box = (2.0, 3.0, 10.0, 9.0)
    record = plain(
        instances=(Instance("cat", box, Mask((20, 40), (outline,))), Instance("dog", box, Mask.of(pixels))),
        texts=(Text("a cat", box_xyxy_px=box), Text("two animals")),
    )
    seen = augment(record, rng(), FLIP)
    np.testing.assert_array_equal(seen.images[0], record.images[0][:, ::-1])
    assert [item.box_xyxy_px for item in seen.instances] == [(30, 3, 38, 9)] * 2
    assert seen.instances[0].mask.polygons == ((38, 3, 30, 3, 30, 9),)
    np.testing.assert_array_equal(seen.instances[1].mask.pixels(), pixels[:, ::-1])
    assert seen.texts == (Text("a cat", box_xyxy_px=(30, 3, 38, 9)), Text("two animals"))


@pytest.mark.parametrize(
    "said",
    [
        {"texts": (Text("a cat on the left"),)},
        {"instances": (Instance("right shoe", (0, 0, 5, 5)),)},
        {"questions": (Asked("which way does it turn?", ("clockwise",)),)},
        {"questions": (Asked("was steht links?", ("ein Hund",), "de"),)},
        {"words": (Word("OPEN", (0, 0, 9, 9)),)},
        {"words": (Word("OPEN"),)},
    ],
)
def test_what_a_flip_would_make_wrong_is_not_flipped(said):
    record = plain(**said)
    assert augment(record, rng(), FLIP) is record


def test_words_are_flipped_when_asked_for():
    seen = augment(plain(words=(Word("OPEN", (0, 0, 9, 9)),)), rng(), AugmentOptions(flip=1.0, flip_text=True))
    assert seen.words[0].box_xyxy_px == (31, 0, 40, 9)


def test_both_tables_know_all_languages_but_those_written_without_spaces():
    anywhere = {"zh", "ja", "ko", "th"}
    assert set(_SIDES) == set(_COLOURS) == set(LANGUAGES) - anywhere


@pytest.mark.parametrize(
    "text",
    [
        "the leftmost cup", "Turn RIGHT.", "on the left-hand side", "rechts im Bild", "eine linke Hand",
        "à gauche de l'arbre", "la main droite", "a la izquierda", "il gatto a destra", "à direita", "het linkerraam",
        "слева от дома", "правая рука", "左边的猫", "右側の犬", "왼쪽 고양이", "오른쪽에", "ทางซ้าย", "على اليمين",
        "बाईं ओर", "বাম দিকে", "vlevo nahoře", "po prawej", "solda bir kedi", "bên trái", "vasemmalla", "til venstre",
        "åt höger", "balra", "kushoto", "kiri", "sa kaliwa", "lijevo", "în stânga", "αριστερά", "בצד שמאל", "سمت چپ",
        "ఎడమ వైపు", "праворуч", "te taha mauī", "لليسار قليلا", "إلى اليمين", "للأيمن", "στο δεξί χέρι", "दाहिने हाथ में",
        "बायें ओर", "soluna bak", "sağındaki kedi", "soldakiler", unicodedata.normalize("NFD", "bên phải"),
    ],
)  # fmt: skip
def test_sides_are_found_in_every_language(text: str):
    assert names_side([text])
    assert not names_colour([text])


@pytest.mark.parametrize(
    "text",
    ["turn_left", "left_arrow", "hand_right", "turnRight", "left2", "topleft", "in the northeast corner",
     "a westbound lane", "den vänstra katten", "الركن الايمن", "बायी ओर"],
)  # fmt: skip
def test_sides_are_found_in_names_of_classes_and_in_other_spellings(text: str):
    assert names_side([text])


def test_colours_are_found_in_names_of_classes():
    assert names_colour(["red_light"])
    assert names_colour(["trafficGreen"])
    assert not names_colour(["infra_redux"])


@pytest.mark.parametrize("text", ["a bright copyright sign", "a leaflet, cleft", "Recht und Linkedin", "solar panel"])
def test_words_that_only_hold_a_side_are_none(text: str):
    assert not names_side([text])


@pytest.mark.parametrize(
    "text",
    ["a red car", "rotes Auto", "coche rojo", "une voiture verte", "红色的车", "赤い車", "빨간 차", "красная машина",
     "carro vermelho", "لون أحمر", "लाल गाड़ी", "xe màu đỏ", "what colour is it", "kırmızı araba", "รถสีแดง"],
)  # fmt: skip
def test_colours_are_found(text: str):
    assert names_colour([text])


@pytest.mark.parametrize("polygons", [((),), ((1.0, 1.0, 5.0, 5.0, 7.0),), ((1.0, 1.0, 5.0, 5.0),)])
def test_an_outline_of_fewer_than_three_corners_is_a_fault_of_its_row(polygons):
    mask = Mask((8, 8), polygons)
    record = Record((np.zeros((8, 8, 3), np.uint8),), (8, 8), (Instance("x", (1, 1, 5, 5), mask),), where="row 7")
    with pytest.raises(DataError, match=r"row 7.*three corners") as caught:
        augment(record, rng(), FLIP)
    assert caught.value.kind == "bad mask"


def test_a_picture_that_cannot_be_opened_is_named_by_its_row():
    class Rows:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Example((b"",), "detect x", "<loc0000><loc0000><loc0100><loc0100> x", where="shard.tar 17")

    with pytest.raises(DataError, match=r"shard\.tar 17: .*empty"):
        Augmented(Rows(), FLIP)[0]


def test_hues_turn_only_where_no_colour_is_named():
    red = np.full((8, 8, 3), (220, 30, 30), np.uint8)
    options = AugmentOptions(hue=0.5)
    named = Record((red,), (8, 8), instances=(Instance("red square", (0, 0, 8, 8)),))
    assert augment(named, rng(1), options) is named
    seen = augment(Record((red,), (8, 8)), rng(1), options)
    assert np.abs(seen.images[0][0, 0].astype(int) - red[0, 0]).max() > 25


def test_colours_change_as_named():
    gray = np.full((4, 4, 3), 100, np.uint8)
    assert (recolour(gray, (1.5, 1, 1)) == 150).all()
    assert (recolour(gray, (1, 1.5, 0.2), 0.3) == 100).all()  # no contrast, no colour, no hue
    halves = np.concatenate([gray, gray + 100])
    np.testing.assert_array_equal(np.unique(recolour(halves, (1, 0.5, 1))), [125, 175])
    vivid = np.full((4, 4, 3), (200, 50, 100), np.uint8)
    faded = recolour(vivid, (1, 1, 0.5))[0, 0].astype(int)
    luma = np.array([200, 50, 100]) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(faded, (np.array([200, 50, 100]) + luma) / 2, atol=1)
    np.testing.assert_array_equal(recolour(vivid), vivid)
    turned = recolour(np.full((1, 1, 3), (120, 100, 90), np.uint8), turn=0.25)
    back = recolour(turned, turn=0.75)
    np.testing.assert_allclose(back[0, 0], (120, 100, 90), atol=1)


def test_a_crop_shows_a_part_and_boxes_are_where_the_pixels_are():
    record = plain(instances=(Instance("cat", (10, 5, 30, 15)),))
    sizes = set()
    for seed in range(30):
        seen = augment(record, rng(seed), AugmentOptions(crop=1.0, crop_area=(0.3, 0.8)))
        image, (x1, y1, x2, y2) = seen.images[0], seen.instances[0].box_xyxy_px
        assert seen.size_hw == image.shape[:2]
        assert 0.25 < image.size / record.images[0].size < 0.85
        # The picture says where it was taken from.
        left, top = image[0, 0, 0], image[0, 0, 1]
        assert (x1 + left, y1 + top) == (max(10, left), max(5, top))
        assert (x2 + left, y2 + top) == (min(30, left + image.shape[1]), min(15, top + image.shape[0]))
        sizes.add(seen.size_hw)
    assert len(sizes) > 20


def test_zooming_out_puts_the_picture_on_its_mean_colour_and_zooming_in_shows_a_part():
    record = plain(instances=(Instance("cat", (10, 5, 30, 15)),))
    for seed in range(10):
        out = augment(record, rng(seed), AugmentOptions(scale=(0.5, 0.5)))
        assert out.size_hw == (40, 80)
        x, y = int(out.instances[0].box_xyxy_px[0]) - 10, int(out.instances[0].box_xyxy_px[1]) - 5
        np.testing.assert_array_equal(out.images[0][y : y + 20, x : x + 40], record.images[0])
        border = np.ones((40, 80), bool)
        border[y : y + 20, x : x + 40] = False
        assert (out.images[0][border] == np.round(record.images[0].mean((0, 1)))).all()
        assert augment(record, rng(seed), AugmentOptions(scale=(2, 2))).size_hw == (10, 20)
    zooms = [augment(record, rng(seed), AugmentOptions(scale=(0.5, 2))).size_hw[1] / 40 for seed in range(60)]
    assert 20 < sum(zoom > 1 for zoom in zooms) < 40


def test_things_that_are_hardly_left_are_dropped_and_never_all():
    near, far = Instance("near", (0, 0, 4, 4)), Instance("far", (36, 16, 40, 20))
    options = AugmentOptions(crop=1.0, crop_area=(0.1, 0.3), min_visible=0.5)
    kept = [augment(plain(instances=(near, far)), rng(seed), options) for seed in range(60)]
    assert all(len(seen.instances) >= 1 for seen in kept)
    assert {len(seen.instances) for seen in kept} == {1, 2}
    # Where two stand in opposite corners, only the whole picture holds both regions and instances.
    both = plain(instances=(near,), words=(Word("far", (36, 16, 40, 20)),))
    for seed in range(20):
        seen = augment(both, rng(seed), options)
        assert seen.size_hw == (20, 40)
        assert len(seen.instances) == len(seen.words) == 1


def test_what_a_crop_leaves_of_a_thing_is_neither_listed_nor_denied():
    """A tenth of a dog in the picture is no dog to be found, and no answer says that there is none."""
    cat, dog = Instance("cat", (0, 0, 20, 20)), Instance("dog", (18, 0, 38, 20))
    crowd = Instance("bird", (19, 0, 39, 20), is_crowd=True)
    labels = ("cat", "dog", "bird", "cow")
    record = move_record(
        plain(instances=(cat, dog, crowd)), Window(0, 0, 20, 20), (20, 40), min_visible=0.25, min_visible_words=1.0
    )
    assert [item.label for item in record.instances] == ["cat"]
    assert record.hidden == ("dog", "bird")
    asked = {name: set() for name in ("presence", "multi_presence", "count", "detect")}
    for name, pairs in asked.items():
        fields = {"detect": {"n_absent": 3}, "count": {"p_absent": 0.5}}.get(name, {})
        for seed in range(40):
            example = builder_of(name, **fields).build(record, rng(seed), labels)
            pairs.add((example.prefix, example.suffix))
        assert not any(word in prefix for prefix, _ in pairs for word in ("dog", "bird")), name
        assert any("cow" in prefix for prefix, _ in pairs), name
    gone = move_record(
        plain(instances=(cat, dog)), Window(0, 0, 18, 20), (20, 40), min_visible=0.25, min_visible_words=1.0
    )
    assert gone.hidden == ()


def test_half_a_word_is_no_word():
    word, cat = Word("OPEN", (0, 0, 40, 4)), Instance("cat", (0, 0, 40, 4))
    window_keeps = [
        (len(seen.instances), len(seen.words))
        for seed in range(40)
        for seen in [augment(plain(instances=(cat,), words=(word, Word("IN", (18, 8, 22, 12)))), rng(seed),
                             AugmentOptions(crop=1.0, crop_area=(0.4, 0.6)))]
    ]  # fmt: skip
    assert (1, 1) in window_keeps
    assert all(n >= 1 for _, n in window_keeps)


def test_where_a_word_stands_nobody_knows_no_part_is_cut_off():
    record = plain(words=(Word("OPEN"),))
    assert augment(record, rng(), AugmentOptions(crop=1.0, scale=(2, 2))) is record


def test_a_cut_box_is_drawn_around_what_is_left_of_the_mask():
    pixels = np.zeros((20, 40), bool)
    pixels[np.arange(20), np.arange(20)] = True  # a diagonal: its upper half is in the left half
    diagonal = Instance("line", (0, 0, 20, 20), Mask.of(pixels))
    moved = move_instance(diagonal, Window(0, 0, 10, 20), (20, 40), 0.25)
    assert moved.box_xyxy_px == (0, 0, 10, 10) == mask_box(moved.mask)
    polygon = Instance("line", (0, 0, 20, 20), Mask((20, 40), ((0.0, 0.0, 20.0, 20.0, 18.0, 20.0),)))
    moved = move_instance(polygon, Window(0, 0, 10, 20), (20, 40), 0.2)
    assert moved.box_xyxy_px == pytest.approx((0, 0, 10, 100 / 9)) == mask_box(moved.mask)
    assert move_instance(polygon, Window(0, 0, 5, 20), (20, 40), 0.25) is None


def test_a_polygon_that_falls_apart_keeps_its_pixels():
    """A U cut by a window above its bottom: the two arms stay, what joins them has no area."""
    arms = (2.0, 0.0, 6.0, 0.0, 6.0, 14.0, 20.0, 14.0, 20.0, 0.0, 24.0, 0.0, 24.0, 18.0, 2.0, 18.0)
    mask = Mask((20, 40), (arms,))
    moved, share = move_mask(mask, Window(0, 0, 40, 10))
    expected = look(np.repeat(mask.pixels()[..., None], 3, 2).astype(np.uint8), Window(0, 0, 40, 10))[..., 0] > 0
    np.testing.assert_array_equal(moved.pixels(), expected)
    assert share == pytest.approx((2 * 4 * 10) / (2 * 4 * 18 + 14 * 4), abs=1e-6)


def test_several_pictures_change_alike_and_only_those_of_one_size_are_cropped():
    frames = tuple(plain().images[0] + shift for shift in (0, 3, 9))
    for seed in range(10):
        seen = augment(Record(frames, (20, 40)), rng(seed), AugmentOptions(flip=0.5, crop=1.0))
        for shift, image in zip((3, 9), seen.images[1:], strict=True):
            np.testing.assert_array_equal(image, seen.images[0] + shift)
    other = np.zeros((10, 10, 3), np.uint8)
    seen = augment(Record((frames[0], other), (20, 40)), rng(), AugmentOptions(flip=1.0, crop=1.0))
    np.testing.assert_array_equal(seen.images[0], frames[0][:, ::-1])
    assert seen.images[1].shape == (10, 10, 3)


def test_moved_boxes_lie_around_the_shapes_of_the_picture_world():
    """Things are found again by their masks, which are moved by other code than boxes."""
    n_moved = 0
    for seed in range(25):
        record = scene(seed)
        seen = augment(record, rng(seed), dataclasses.replace(EVERYTHING, flip_text=True))
        for item in seen.instances:
            x1, y1, x2, y2 = mask_box(item.mask)
            assert np.abs(np.subtract(item.box_xyxy_px, (x1, y1, x2, y2))).max() <= 1
            assert item.mask.size_hw == seen.size_hw == seen.images[0].shape[:2]
        n_moved += seen.size_hw != record.size_hw
    assert n_moved > 15


def test_annotations_that_do_not_fit_the_picture_are_refused():
    cat = Instance("cat", (0, 0, 5, 5))
    for record, said in (
        (
            dataclasses.replace(plain(instances=(cat,)), size_hw=(40, 20)),
            "a.jpg: the picture is 40×20, its annotations",
        ),
        (plain(instances=(Instance("cat", (5, 5, 5, 9)),)), r"a.jpg: instance 0 'cat' has the box \(5, 5, 5, 9\): exp"),
        (plain(instances=(Instance("cat", (50, 5, 60, 9)),)), "inside of the picture of 40×20"),
        (plain(words=(Word("OPEN", (9, 9, 3, 3)),)), "the word 'OPEN' has the box"),
        (plain(instances=(dataclasses.replace(cat, mask=Mask.of(np.ones((3, 3), bool))),)), "a mask of 3×3 in a pict"),
    ):
        with pytest.raises(DataError, match=said):
            augment(record, rng(), AugmentOptions(flip=1.0, flip_text=True))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"flip": 1.2}, "augmentation flip=1.2: expected 0 to 1"),
        ({"hue": 0.7}, "hue=0.7: expected 0 to 0.5"),
        ({"colour": -0.1}, "colour=-0.1"),
        ({"crop_area": (0.9, 0.5)}, r"crop_area=\(0.9, 0.5\): expected \(least, greatest\)"),
        ({"scale": (0.1, 1.0)}, r"scale=\(0.1, 1.0\): .*from 0.25 to 4"),
        ({"tries": 0}, "tries=0"),
    ],
)
def test_options_out_of_range_are_refused(fields, said):
    with pytest.raises(OptionError, match=said):
        AugmentOptions(**fields)


# Prompts, whose boxes stand in their texts.

BOX, MIRRORED = "<loc0100><loc0200><loc0300><loc0400>", "<loc0100><loc0623><loc0300><loc0823>"
IMAGE = np.arange(1200, dtype=np.uint16).reshape(20, 20, 3).astype(np.uint8)


def encode(maps):
    """A small mask codec: how much of each sixteenth is covered, in 128 steps."""
    covered = maps.reshape(len(maps), 4, 16, 4, 16).mean((2, 4))
    return np.round(covered * 127).astype(np.int64).reshape(-1, 16)


def decode(codes):
    return np.repeat(np.repeat(codes.reshape(-1, 4, 4) - 63.5, 16, 1), 16, 2).astype(np.float32)


@pytest.mark.parametrize(
    ("prefix", "suffix", "mirrored_prefix", "mirrored_suffix"),
    [
        ("detect cat", f"{BOX} cat", "detect cat", f"{MIRRORED} cat"),
        ("detect cat ; dog", f"{BOX} cat ; {BOX} dog", "detect cat ; dog", f"{MIRRORED} cat ; {MIRRORED} dog"),
        (f"caption {BOX}", "a cat", f"caption {MIRRORED}", "a cat"),
        ("detect cat", f" {BOX}cat;{BOX}  dog ; ", "detect cat", f" {MIRRORED}cat;{MIRRORED}  dog ; "),
        ("caption en", "a cat", "caption en", "a cat"),
    ],
)
def test_boxes_of_texts_are_mirrored_and_all_else_stays_as_it_was_written(
    prefix, suffix, mirrored_prefix, mirrored_suffix
):
    seen = augment_example(Example((IMAGE,), prefix, suffix, weight=2.0, meta={"id": 1}), rng(), FLIP)
    np.testing.assert_array_equal(seen.images[0], IMAGE[:, ::-1])
    assert (seen.prefix, seen.suffix, seen.weight, seen.meta) == (mirrored_prefix, mirrored_suffix, 2.0, {"id": 1})


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("caption en", "a cat to the left of a dog"),
        ("the cat on the right", BOX),
        ("ocr", f"{BOX} OPEN"),
    ],
)
def test_texts_that_a_flip_would_make_wrong_are_not_flipped(prefix, suffix):
    example = Example((IMAGE,), prefix, suffix)
    assert augment_example(example, rng(), FLIP) is example
    assert augment_example(example, rng(), AugmentOptions(crop=1.0)).images[0].shape != IMAGE.shape


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("ocr", "OPEN"),
        ("detect cat", "<loc0100><loc0200><loc0300> cat"),
        ("detect cat", "<loc0300><loc0200><loc0100><loc0400> cat"),
        ("segment cat", f"{BOX} {'<seg001>' * 16} cat"),
        ("segment cat", f"{BOX} {'<seg001>' * 15} cat"),
    ],
)
def test_of_texts_that_cannot_be_moved_only_the_picture_changes_colour(prefix, suffix):
    example = Example((IMAGE,), prefix, suffix)
    assert augment_example(example, rng(), dataclasses.replace(FLIP, crop=1.0)) is example
    painted = augment_example(example, rng(), dataclasses.replace(FLIP, crop=1.0, colour=0.5))
    assert (painted.prefix, painted.suffix) == (prefix, suffix)
    assert painted.images[0].shape == IMAGE.shape
    assert not np.array_equal(painted.images[0], IMAGE)


def test_boxes_in_one_of_several_pictures_are_not_moved():
    example = Example((IMAGE, IMAGE), "detect cat", f"{BOX} cat")
    assert augment_example(example, rng(), FLIP) is example


@pytest.mark.parametrize(("gap", "label"), [(" ", " cat"), ("", "")])
def test_masks_go_through_the_decoder_and_back(gap, label):
    codes = np.tile([[0, 40, 90, 127]], (4, 1)).reshape(1, 16)
    written = "".join(f"<seg{c:03d}>" for c in codes[0])
    example = Example((np.zeros((640, 640, 3), np.uint8),), "segment cat", f"{BOX}{gap}{written}{label}")
    seen = augment_example(example, rng(), FLIP, mask_encoder=encode, mask_decoder=decode)
    (entry,) = parse_entries(seen.suffix)[0]
    # Decoded and cut at its threshold, half of the columns is full; mirrored, it is the other half.
    np.testing.assert_allclose(np.reshape(entry.codes, (4, 4)), [[127, 127, 0, 0]] * 4, atol=6)
    assert seen.suffix.startswith(f"{MIRRORED}{gap}<seg")
    assert seen.suffix.endswith(f">{label}")


def test_objects_that_a_crop_cuts_off_are_taken_out_of_the_answer():
    near, far = "<loc0000><loc0000><loc0100><loc0100> cat", "<loc0900><loc0900><loc1023><loc1023> dog"
    options = AugmentOptions(crop=1.0, crop_area=(0.2, 0.5), min_visible=0.6)
    seen = set()
    for seed in range(60):
        got = augment_example(Example((IMAGE,), "detect cat ; dog", f"{near} ; {far}"), rng(seed), options)
        assert got.prefix == "detect cat ; dog"
        entries, problems = parse_entries(got.suffix)
        assert not problems
        assert not got.suffix.endswith(("; ", ";"))
        assert entries
        seen.add(tuple(entry.label for entry in entries))
    assert seen >= {("cat",), ("dog",)}


def test_stretches_without_loss_go_along_with_their_boxes():
    """Noise boxes do not keep a crop that has lost every real one."""
    noise = "<loc0900><loc0900><loc1023><loc1023>"
    suffix = f"{BOX} cat ; {noise} noise"
    span = (suffix.index(noise), suffix.index(noise) + len(noise))
    example = Example((IMAGE,), "detect all classes", suffix, unlearned=(span,))
    lengths = set()
    for seed in range(40):
        got = augment_example(example, rng(seed), AugmentOptions(flip=0.5, crop=1.0, crop_area=(0.2, 0.9)))
        entries = parse_entries(got.suffix)[0]
        assert entries[0].label == "cat"
        assert got.unlearned == tuple(entry.box_span for entry in entries if entry.label == "noise")
        lengths.add(len(entries))
    assert lengths == {1, 2}


def test_a_region_to_caption_is_never_cut_off():
    for seed in range(30):
        got = augment_example(
            Example((IMAGE,), f"caption {BOX}", "a cat"), rng(seed), AugmentOptions(crop=1.0, crop_area=(0.1, 0.4))
        )
        assert got.suffix == "a cat"
        assert len(parse_entries(got.prefix)[0]) == 1


def test_building_first_or_augmenting_first_is_the_same_up_to_a_bin():
    options = AugmentOptions(flip=0.5, crop=0.8, crop_area=(0.4, 0.9), scale=(0.7, 1.5), min_visible=0.3)
    builder = BUILDERS["detect"]
    compared = 0
    for seed in range(40):
        record = dataclasses.replace(scene(seed), words=())
        record = dataclasses.replace(
            record, instances=tuple(Instance(item.label, item.box_xyxy_px) for item in record.instances)
        )
        if not record.instances:
            continue
        first = augment_example(builder.build(record, rng(1)), rng(seed), options)
        last = builder.build(augment(record, rng(seed), options), rng(1))
        np.testing.assert_array_equal(first.images[0], augment(record, rng(seed), options).images[0])
        one, two = (sorted((e.label, e.bins) for e in parse_entries(text.suffix)[0]) for text in (first, last))
        if [label for label, _ in one] != [label for label, _ in two]:
            continue  # a share next to the threshold
        compared += 1
        bins = np.array([[bins for _, bins in found] for found in (one, two)])
        assert np.abs(bins[0] - bins[1]).max() <= 3  # half a bin of the whole picture is more than half a bin of a crop
    assert compared > 25


class Shelf:
    """Examples in memory, as a source."""

    def __init__(self, n: int = 4) -> None:
        self.rows = [Example((IMAGE,), "detect cat", f"{BOX} cat", where=f"row {i}") for i in range(n)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]

    def where(self, index: int) -> str:
        return self.rows[index].where


def test_a_source_shows_its_rows_otherwise_every_epoch_and_alike_for_a_seed():
    shown = Augmented(Shelf(), AugmentOptions(crop=1.0), seed=3)
    assert len(shown) == 4
    assert shown.where(2) == "row 2"
    assert not shown.is_sequential
    suffixes = {shown.varied(i, epoch).suffix for i in range(4) for epoch in range(5)}
    assert len(suffixes) == 20
    again = Augmented(Shelf(), AugmentOptions(crop=1.0), seed=3)
    assert again.varied(2, 1).suffix == shown.varied(2, 1).suffix
    assert again[-1].suffix == shown[3].suffix == shown.varied(3, 0).suffix
    assert Augmented(Shelf(), AugmentOptions(crop=1.0), seed=4)[2].suffix != shown[2].suffix
    assert Augmented(Shelf(), AugmentOptions())[0].images[0] is IMAGE
