"""Detection with and without noise, segmentation, referring expressions: what is written, and what is refused."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from paligemma.data import world
from paligemma.data.builders import BUILDERS, Turn, builder_of, noise_boxes, read_example
from paligemma.data.example import Example
from paligemma.data.record import Instance, Mask, Record
from paligemma.errors import DataError, OptionError
from paligemma.metrics.segmentation import mask_iou
from paligemma.models.mask_vae import MaskVae
from paligemma.tasks.grammar import parse_entries
from tests.embedded import TINY

GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "detection_segmentation"
SIZE = (1023, 2046)  # one bin is one pixel high and two wide
BOX_PX, BOX = (40.0, 10.0, 440.0, 110.0), "<loc0010><loc0020><loc0110><loc0220>"
LABELS = ("dog", "cat", "car", "bus", "sofa")
RECORD = Record(
    ("a.jpg",),
    SIZE,
    instances=(
        Instance("cat", BOX_PX),
        Instance("dog", (1200, 500, 1600, 700)),
        Instance("cat", (800, 20, 900, 90)),
        Instance("sofa", (0, 0, 1000, 1000), is_crowd=True),
    ),
    where="row 3",
)
BARE = replace(RECORD, instances=())


@cache
def vae() -> MaskVae:
    return MaskVae.from_npz(TINY / "mask_vae.npz")


def build(name, record=RECORD, seed=0, labels=LABELS, turn=None, **fields):
    return builder_of(name, **fields).build(record, np.random.default_rng(seed), labels, turn=turn)


def listed(example):
    return [entry.label for entry in parse_entries(example.suffix)[0]]


def asked(example, verb="detect"):
    return example.prefix.removeprefix(f"{verb} ").split(" ; ")


def scene_record(seed, name="plain"):
    scene = world.sample_scene(seed, name)
    drawn = world.render(scene)
    things = zip(scene.things, drawn.boxes_xyxy_px, drawn.masks, strict=True)
    instances = tuple(Instance(thing.name, box, Mask.of(mask)) for thing, box, mask in things)
    return Record((drawn.image,), scene.size_hw, instances=instances, where=f"scene {seed}"), drawn


def test_one_thing_is_written_as_the_grammar_has_it():
    record = replace(RECORD, instances=RECORD.instances[:1])
    example = build("detect", record)
    assert (example.prefix, example.suffix, example.unlearned) == ("detect cat", f"{BOX} cat", ())


def test_things_and_labels_are_in_random_order_whatever_their_labels():
    orders = Counter(tuple(listed(build("detect", seed=seed))) for seed in range(120))
    assert set(orders) == {("cat", "dog", "cat"), ("cat", "cat", "dog"), ("dog", "cat", "cat")}
    assert all(count > 20 for count in orders.values())
    prompts = Counter(build("detect", seed=seed).prefix for seed in range(120))
    assert set(prompts) == {"detect cat ; dog", "detect dog ; cat"}
    assert all(count > 35 for count in prompts.values())


def test_the_order_is_a_field():
    def boxes(order):
        return [item.box_xyxy_px for item in read_example(build("detect", order=order), SIZE).instances]

    cat, dog, other = (item.box_xyxy_px for item in RECORD.instances[:3])
    assert boxes("source") == [cat, dog, other]
    assert boxes("raster") == [cat, other, dog]
    assert boxes("area") == [dog, cat, other]


def test_absent_things_are_asked_for_and_not_listed():
    example = build("detect", n_absent=2)
    assert sorted(asked(example)) == ["bus", "car", "cat", "dog"]  # the sofa is a crowd: it is there
    assert sorted(listed(example)) == ["cat", "cat", "dog"]
    places = Counter(asked(build("detect", seed=seed, n_absent=1)).index("dog") for seed in range(90))
    assert set(places) == {0, 1, 2}
    assert len(asked(build("detect", n_absent=99))) == 4
    assert build("detect", BARE) is None
    empty = build("detect", BARE, n_absent=1)
    assert (len(asked(empty)), empty.suffix) == (1, "")
    with pytest.raises(DataError, match=r"^row 3: what is not there is drawn from the class names"):
        build("detect", labels=(), n_absent=1)


def test_all_classes_are_asked_for_in_the_order_of_the_data_set():
    assert build("detect", ask="all").prefix == "detect dog ; cat ; car ; bus", "the sofa is a region of many"
    assert build("detect", BARE, ask="all").suffix == ""
    with pytest.raises(DataError, match=r"^row 3: ask='all' names all classes of the data set"):
        build("detect", ask="all", labels=())
    typo = replace(RECORD, instances=(Instance("catt", BOX_PX),))
    with pytest.raises(DataError, match=r"^row 3: the label 'catt' is none of .* 5 classes.*Did you mean 'cat'"):
        build("detect", typo, ask="all")


def test_what_is_there_and_not_listed_is_not_asked_for_among_all():
    assert "cat" not in asked(build("detect", replace(RECORD, instances=(), hidden=("cat",)), ask="all"))
    for seed in range(20):
        example = build("detect", seed=seed, ask="all", max_objects=1)
        assert {"dog", "cat"} & set(asked(example)) == set(listed(example))


def test_a_box_is_called_what_alone_was_asked_for():
    box = "<loc0010><loc0020><loc0110><loc0220>"
    assert read_example(Example((), "detect cat", box), SIZE).instances[0].label == "cat"
    with pytest.raises(DataError, match="a box without a label"):
        read_example(Example((), "detect cat ; dog", box), SIZE)


def test_a_mask_thinner_than_a_pixel_is_none():
    sliver = Instance("cat", (10.6, 10, 11.4, 20), Mask(SIZE, ((10.6, 10, 11.4, 10, 11.4, 20, 10.6, 20),)))
    whole = np.zeros(SIZE, bool)
    whole[10:40, 10:40] = True
    record = replace(RECORD, instances=(sliver, Instance("dog", (10, 10, 40, 40), Mask.of(whole))))
    encoder = {"mask_encoder": lambda crops: np.zeros((len(crops), 16), np.int64)}
    assert build("segment", record, without_mask="skip", **encoder).prefix == "segment dog"
    with pytest.raises(DataError, match=r"row 3.*no pixel"):
        build("segment", record, **encoder)


def test_a_constant_prompt_replaces_the_labels():
    example = build("detect", prefix="find everything")
    assert example.prefix == "find everything"
    assert build("detect", BARE, prefix="find everything").suffix == ""
    back = builder_of("detect", prefix="find everything").read(example, SIZE)
    assert sorted(item.label for item in back.instances) == ["cat", "cat", "dog"]


def test_too_many_things_are_left_out_at_random():
    instances = tuple(Instance(f"thing {i}", (10 * i, 0, 10 * i + 9, 9)) for i in range(10))
    kept = Counter()
    for seed in range(500):
        example = build("detect", replace(RECORD, instances=instances), seed, max_objects=4)
        assert len(listed(example)) == 4
        assert sorted(asked(example)) == sorted(listed(example))
        kept.update(listed(example))
    assert all(145 < count < 255 for count in kept.values())  # 200 expected, standard deviation 11


@pytest.mark.parametrize("label", ["a;b", "<loc>", "a\nb", " a", ""])
def test_labels_that_the_grammar_cannot_carry_name_the_record(label):
    with pytest.raises(DataError, match=r"^row 3: (label|thing|an empty)") as refused:
        build("detect", replace(RECORD, instances=(Instance(label, BOX_PX),)))
    assert "\n" not in str(refused.value)


def test_parts_outside_are_cut_off():
    record = replace(RECORD, instances=(Instance("cat", (-50, -50, 440, 110)),))
    assert build("detect", record).suffix == "<loc0000><loc0000><loc0110><loc0220> cat"


def test_noise_fills_the_sequence_and_its_places_are_not_learned():
    for seed in range(30):
        example = build("detect_noise", seed=seed, fill_to=12)
        entries, problems = parse_entries(example.suffix)
        assert problems == ()
        assert example.prefix == "detect all classes"
        assert sorted(e.label for e in entries[:3]) == ["cat", "cat", "dog"]
        assert [e.label for e in entries[3:]] == ["noise"] * 9
        assert example.unlearned == tuple(e.box_span for e in entries[3:])
        assert all(len(example.suffix[a:b]) == 4 * len("<loc0000>") for a, b in example.unlearned)
        assert all(e.has_area for e in entries)
        for back in (read_example(example, SIZE), builder_of("detect_noise", fill_to=12).read(example, SIZE)):
            assert sorted(item.label for item in back.instances) == ["cat", "cat", "dog"]
    assert build("detect_noise", seed=1) == build("detect_noise", seed=1)


def test_noise_without_things_things_without_noise_and_a_fixed_number_of_noise():
    example = build("detect_noise", BARE, fill_to=5)
    assert listed(example) == ["noise"] * 5
    assert example.unlearned[0] == (0, 36)
    full = build("detect_noise", fill_to=2)
    assert (len(listed(full)), full.unlearned) == (3, ())
    few = build("detect", n_noise=2, noise_label="nothing here")
    assert listed(few)[3:] == ["nothing here"] * 2
    assert few.prefix in ("detect cat ; dog", "detect dog ; cat")
    with pytest.raises(DataError, match=r"^row 3: a thing is called 'noise' as noise is"):
        build("detect_noise", replace(RECORD, instances=(Instance("noise", BOX_PX),)))


def test_noise_is_told_from_a_class_of_that_name():
    """What is not learned is noise; where nothing says so, a class called noise is a class."""
    example = build("detect", n_noise=3)
    assert len(read_example(example, SIZE).instances) == 3
    real = build("detect", replace(RECORD, instances=(Instance("noise", BOX_PX),)))
    assert [item.label for item in read_example(real, SIZE).instances] == ["noise"]


def test_half_of_the_noise_lies_near_real_boxes_and_half_anywhere():
    real = [(1000.0, 400.0, 1100.0, 500.0), (-100.0, 0.0, 50.0, 200.0)]
    boxes = np.array(noise_boxes(4000, real, SIZE, np.random.default_rng(0)))
    assert ((boxes >= 0) & (boxes <= [2046, 1023, 2046, 1023])).all()
    assert (boxes[:, 2] > boxes[:, 0]).all()
    assert (boxes[:, 3] > boxes[:, 1]).all()
    cut = np.array([[1000, 400, 1100, 500], [0, 0, 50, 200]], float)
    sides = np.tile(cut[:, 2:] - cut[:, :2], 2)
    near = (np.abs(boxes[:, None] - cut) <= 0.1 * sides + 1e-9).all(-1)
    assert 2000 <= near.any(1).sum() < 2010  # a random one is near by chance
    assert (near.sum(0) > 900).all()
    middles = (boxes[~near.any(1), :2] + boxes[~near.any(1), 2:]) / 2 / [2046, 1023]
    assert ((middles.min(0) < 0.1) & (middles.max(0) > 0.9)).all()
    only_random = np.array(noise_boxes(50, [], SIZE, np.random.default_rng(0)))
    assert only_random.shape == (50, 4)


def test_broken_answers_are_refused_by_name():
    for suffix in ("hello", "<loc0001><loc0002> cat", "<loc0100><loc0100><loc0100><loc0200> cat"):
        with pytest.raises(DataError, match=r"^row 9: .*expected boxes with labels"):
            read_example(Example((), "detect cat", suffix, where="row 9"), SIZE)


def test_boxes_are_those_of_the_reference():
    cases = json.loads((GOLDEN / "boxes_to_loc.json").read_text())["cases"]
    n_checked = 0
    for case in cases:
        (y1, x1, y2, x2), bins = case["box"], case["bins"]
        if not (bins[2] > bins[0] and bins[3] > bins[1] and x1 < 1 and y1 < 1 and x2 > 0 and y2 > 0):
            continue  # no box of anything: builders refuse those without area and widen those of one bin
        record = Record(("a.jpg",), (1, 1), instances=(Instance("cat", (x1, y1, x2, y2)),))
        assert build("detect", record).suffix == f"{case['loc']} cat"
        n_checked += 1
    assert n_checked >= 10


def test_masks_are_those_of_the_reference():
    reference = MaskVae.from_npz(GOLDEN / "vae_params.npz")
    arrays = np.load(GOLDEN / "mask_to_suffix.npz")
    for case in json.loads((GOLDEN / "mask_to_suffix.json").read_text()):
        mask = arrays[f"{case['case']}/mask"] > 0
        (height, width), (y1, x1, y2, x2) = mask.shape, case["bbox"]
        box = (x1 * width, y1 * height, x2 * width, y2 * height)
        record = Record(("a.jpg",), mask.shape, instances=(Instance(case["sentence"], box, Mask.of(mask)),))
        example = build("referring", record, mask_encoder=reference.encode_array)
        assert (example.prefix, example.suffix) == (case["prefix"], case["suffix"])
        locs, segs = case["suffix"][:36], case["suffix"][36:]
        segment = build("segment", record, mask_encoder=reference.encode_array)
        assert segment.prefix == f"segment {case['sentence']}"
        assert segment.suffix == f"{locs} {segs} {case['sentence']}"


def test_masks_come_back_as_their_codes_say():
    for seed in range(4):
        record, drawn = scene_record(seed)
        if not record.instances:
            continue
        example = build("segment", record, order="source", mask_encoder=vae().encode_array)
        back = read_example(example, record.size_hw, vae().decode_array)
        assert [item.label for item in back.instances] == [item.label for item in record.instances]
        for item, truth, box in zip(back.instances, drawn.masks, drawn.boxes_xyxy_px, strict=True):
            mask = item.mask.pixels()
            assert mask_iou(mask, truth) > 0.6
            x1, y1, x2, y2 = (round(edge) for edge in box)
            mask[y1:y2, x1:x2] = False
            assert not mask.any()
        without = read_example(example, record.size_hw)
        assert all(item.mask is None for item in without.instances)
        assert [item.box_xyxy_px for item in without.instances] == [item.box_xyxy_px for item in back.instances]


def test_things_without_masks_are_named_or_left_out():
    record, _ = scene_record(1)
    bare = replace(record, instances=(Instance("cat", (0, 0, 9, 9)), *record.instances))
    with pytest.raises(DataError, match=r"^scene 1: 1 of \d+ instances have no mask, the first is instance 0 'cat'"):
        build("segment", bare, mask_encoder=vae().encode_array)
    example = build("segment", bare, mask_encoder=vae().encode_array, without_mask="skip")
    assert sorted(listed(example)) == sorted(item.label for item in record.instances)
    with pytest.raises(OptionError, match="'segment' without mask_encoder"):
        build("segment", record)
    empty = replace(record, instances=(Instance("cat", (0, 0, 9, 9)),))
    assert build("segment", empty, mask_encoder=vae().encode_array, without_mask="skip") is None
    small = replace(record, instances=(Instance("cat", (0, 0, 9, 9), Mask.of(np.ones((3, 3), bool))),))
    with pytest.raises(DataError, match=r"^scene 1: the mask of 'cat' has shape \(3, 3\)"):
        build("segment", small, mask_encoder=vae().encode_array)


def test_a_referring_expression_is_the_whole_prompt_and_each_has_its_turn():
    mask = Mask.of(np.ones((50, 80), bool))
    names = ("the left one", "the right one", "both")
    boxes = ((0, 0, 40, 50), (40, 0, 80, 50), (0, 0, 80, 50))
    instances = tuple(Instance(name, box, mask) for name, box in zip(names, boxes, strict=True))
    record = Record(("a.jpg",), (50, 80), instances=instances, where="row 5")
    examples = [
        build("referring", record, turn=Turn(epoch=epoch), mask_encoder=vae().encode_array) for epoch in range(3)
    ]
    assert sorted(e.prefix for e in examples) == sorted(names)
    for example in examples:
        assert " " not in example.suffix
        assert read_example(example, (50, 80)) is None
        (item,) = BUILDERS["referring"].read(example, (50, 80), mask_decoder=vae().decode_array).instances
        assert item.label == example.prefix
        truth = np.zeros((50, 80), bool)
        x1, y1, x2, y2 = boxes[names.index(example.prefix)]
        truth[y1:y2, x1:x2] = True
        assert mask_iou(item.mask.pixels(), truth) > 0.9
    assert build("referring", replace(record, instances=()), mask_encoder=vae().encode_array) is None
