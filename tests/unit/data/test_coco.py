"""COCO files: all their kinds of annotations, the usual layouts, and what is wrong named with its row."""

import gc
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from paligemma.data.check import check
from paligemma.data.record import Asked, Instance, Mask, Record, Text, Word
from paligemma.data.sources.coco import Coco, find_coco
from paligemma.data.sources.coco_write import write_coco
from paligemma.data.sources.compact import Compact
from paligemma.errors import DataError, OptionError
from paligemma.results import mask_to_rle, pack_counts
from tests.picture_folders import SIZE_HW, all_of, annotations, drawn_records, picture

IMAGE = {"id": 7, "file_name": "a.png", "height": 48, "width": 64}
BOX = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 10], "iscrowd": 0}
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]


def said(row: dict[str, Any]) -> dict[str, Any]:
    """The fields that a row has; ... stands for one that it lacks."""
    return {key: value for key, value in row.items() if value is not ...}


def write(folder: Path, name: str = "train.json", **tables: Any) -> Path:
    picture(folder / "a.png")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": [IMAGE], "annotations": [BOX], "categories": CATEGORIES} | tables))
    return path


def test_boxes_masks_captions_and_words_of_one_file_become_a_record(tmp_path):
    mask = np.zeros(SIZE_HW, bool)
    mask[20:30, 10:40] = True
    rle = mask_to_rle(mask)
    notes = [
        BOX | {"segmentation": [[10, 20, 40, 20, 40, 30]]},
        BOX | {"segmentation": rle, "iscrowd": 1},
        BOX | {"segmentation": rle | {"counts": pack_counts(rle["counts"])}, "category_id": 5},
        {"id": 2, "image_id": 7, "caption": "ein Bild", "lang": "de"},
        {"id": 3, "image_id": 7, "utf8_string": "STOP", "bbox": [1, 2, 3, 4]},
        {"id": 4, "image_id": 7, "bbox": [1, 2, 3, 4], "legibility": "illegible"},
    ]
    record = Coco(write(tmp_path, annotations=notes, images=[IMAGE | {"license": 4}]))[0]
    box = (10.0, 20.0, 40.0, 30.0)
    assert [(i.label, i.box_xyxy_px, i.is_crowd) for i in record.instances] == [
        ("cat", box, False), ("cat", box, True), ("dog", box, False),
    ]  # fmt: skip
    assert record.instances[0].mask == Mask(SIZE_HW, polygons=((10.0, 20.0, 40.0, 20.0, 40.0, 30.0),))
    assert all(np.array_equal(i.mask.pixels(), mask) for i in record.instances[1:])
    assert record.texts == (Text("ein Bild", "de"),)
    assert record.words == (Word("STOP", (1.0, 2.0, 4.0, 6.0)),)
    assert (record.id, record.size_hw, record.images) == ("7", SIZE_HW, (tmp_path / "a.png",))
    assert record.meta == {"license": 4, "n_illegible": 1}
    assert record.where == "train.json image 7 (a.png)"


def test_coco_text_keeps_its_tables_by_number(tmp_path):
    picture(tmp_path / "a.png")
    note = {"id": 9, "image_id": 7, "bbox": [1, 2, 3, 4], "utf8_string": "hé", "legibility": "legible"}
    tables = {"imgs": {"7": IMAGE}, "anns": {"9": note}, "cats": {}, "imgToAnns": {"7": [9]}}
    (tmp_path / "cocotext.json").write_text(json.dumps(tables))
    source = Coco(tmp_path / "cocotext.json")
    assert source[0].words == (Word("hé", (1.0, 2.0, 4.0, 6.0)),)
    assert source.labels == ()


def test_boxes_that_are_turned_over_or_outside_are_left_for_the_check(tmp_path):
    notes = [BOX | {"bbox": [-5, 20, 500, -10]}]
    assert Coco(write(tmp_path, annotations=notes))[0].instances[0].box_xyxy_px == (-5, 20, 495, 10)


def test_labels_are_the_categories_in_the_order_of_their_ids(tmp_path):
    assert Coco(write(tmp_path, categories=CATEGORIES[::-1])).labels == ("cat", "dog")


@pytest.mark.parametrize(
    ("root", "others", "notes", "labels"),
    [
        ("pets", "pets", [BOX], ("cat", "dog")),
        ("pets", "animal", [BOX], ("pets", "cat", "dog")),
        ("pets", "pets", [BOX, BOX | {"category_id": 0}], ("pets", "cat", "dog")),
    ],
)
def test_the_super_category_of_roboflow_is_no_label_unless_it_is_one(tmp_path, root, others, notes, labels):
    categories = [{"id": 0, "name": root, "supercategory": "none"}]
    categories += [row | {"supercategory": others} for row in CATEGORIES]
    assert Coco(write(tmp_path, categories=categories, annotations=notes)).labels == labels


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"category_id": 99}, r"annotation 1 has category_id 99: expected one of 3 \(cat\), 5 \(dog\)"),
        ({"category_id": None}, "category_id None"),
        ({"bbox": None}, "has no bbox"),
        ({"bbox": [1, 2, 3]}, "expected four finite numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "expected four finite numbers"),
        ({"bbox": [1, 2, "3", 4]}, "expected four finite numbers"),
        ({"bbox": [1, 2, 10**400, 4]}, "expected four finite numbers"),
        ({"segmentation": {"size": [64, 48], "counts": [64 * 48]}}, r"mask of size \[64, 48\]: expected \[48, 64\]"),
        ({"segmentation": {"size": [48, 64], "counts": None}}, "expected COCO's run lengths"),
        ({"segmentation": "x"}, "expected polygons"),
        ({"caption": 3}, "'caption' is '3': expected text"),
        ({"iscrowd": "no"}, "iscrowd 'no': expected 0 or 1"),
        ({"category_id": ..., "categoryid": 1}, "category_id None.*Did you mean 'categoryid'"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_named_when_its_row_is_read(tmp_path, note, message):
    source = Coco(write(tmp_path, annotations=[said(BOX | note)]))
    with pytest.raises(DataError, match=rf"train\.json image 7 \(a\.png\).*{message}") as error:
        source[0]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"file_name": "b.png"}, "b.png is not in .* Did you mean 'a.png'"),
        ({"file_name": "/etc/passwd"}, "lies outside"),
        ({"file_name": "../a.png"}, "lies outside"),
        ({"file_name": "C:/a.png"}, "lies outside"),
        ({"file_name": None}, "the picture is None"),
        ({"file_name": ..., "filename": "a.png"}, "no file_name: expected .* Did you mean 'filename'"),
        ({"file_name": "a\0.png"}, "is not in"),
        ({"file_name": "x" * 5000}, "is not in"),
        ({"height": 0}, "height 0: expected pixels"),
        ({"id": None}, "no id"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(tmp_path, image, message):
    with pytest.raises(DataError, match=message):
        Coco(write(tmp_path, images=[said(IMAGE | image)]))[0]


def test_a_link_that_leads_out_of_the_folder_is_refused_unless_allowed(tmp_path):
    outside = picture(tmp_path / "outside" / "b.png")
    path = write(tmp_path / "inside", images=[IMAGE | {"file_name": "b.png"}])
    (tmp_path / "inside" / "b.png").symlink_to(outside)
    with pytest.raises(DataError, match=r"lies outside .* through a symbolic link"):
        Coco(path)[0]
    assert Coco(path, allow_outside=True)[0].images == (tmp_path / "inside" / "b.png",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a list: expected an object"),
        ('{"image": []}', "no 'images'.*Did you mean 'image'"),
        ('{"images": [{"id": 1}], "anotations": []}', "no 'annotations'.*Did you mean 'anotations'"),
        ('{"images": []}', "no pictures"),
        ('{"images": [3]}', "an image 3"),
        ('{"images": {}}', "'images' is a dict: expected a list"),
        ('{"images": [{"id": 1}], "categories": [{"id": "a"}]}', "a category"),
        (b"\xff\xfe{}", "not UTF-8"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_file_that_is_no_coco_is_refused(tmp_path, text, message):
    path = tmp_path / "train.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        Coco(path)


def test_ids_that_are_used_twice_and_lost_annotations_are_problems_of_the_file(tmp_path):
    picture(tmp_path / "b.png")
    images = [IMAGE, IMAGE | {"file_name": "b.png"}, IMAGE | {"id": 8}]
    notes = [BOX, BOX, BOX | {"id": 2, "image_id": 99}, BOX | {"id": 3, "image_id": 8, "category_id": 5}]
    categories = [*CATEGORIES, {"id": 6, "name": "cat"}, {"id": 5, "name": "cow"}]
    source = Coco(write(tmp_path, images=images, annotations=notes, categories=categories))
    problems = "\n".join(source.problems)
    for said in (
        "1 image ids are used twice, the first 7: a.png and b.png",
        "1 annotation ids are used twice, the first 1",
        "1 annotations of pictures that are not there, first annotation 2 of image 99",
        "2 categories are called 'cat'",
        "category id 5 is both 'dog' and 'cow'",
    ):
        assert said in problems
    for index, message in ((0, "another image has this id"), (1, "another image"), (2, "means two categories")):
        with pytest.raises(DataError, match=message):
            source[index]


def test_a_size_that_the_file_does_not_say_is_read_from_the_picture(tmp_path):
    assert Coco(write(tmp_path, images=[{"id": 7, "file_name": "a.png"}]))[0].size_hw == SIZE_HW


@pytest.mark.parametrize(
    ("file", "pictures", "name"),
    [
        ("train/_annotations.coco.json", "train", "a.png"),
        ("annotations/instances_train2017.json", "train2017", "a.png"),
        ("annotations/instances_train2017.json", "images/train2017", "a.png"),
        ("annotations/instances_train2017.json", "train2017", "train2017/a.png"),
        ("annotations/instances_train.json", "images/train", "a.png"),
        ("annotations/instances_train.json", "images", "a.png"),
        ("train.json", "images", "a.png"),
        ("train.json", ".", "a.png"),
        ("train.json", "train", "deep/er/a.png"),
        ("annotations.json", "images", "a.png"),
        ("annotations/train.json", "train", "a.png"),
    ],
)
def test_the_usual_layouts_are_found(tmp_path, file, pictures, name):
    place = tmp_path / pictures / name.removeprefix("train2017/")
    picture(place)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    tables = {"images": [IMAGE | {"file_name": name}], "annotations": [BOX], "categories": CATEGORIES}
    (tmp_path / file).write_text(json.dumps(tables))
    found = find_coco(tmp_path)
    assert list(found) == ["train"]
    assert os.path.samefile(found["train"][0].images[0], place)


def test_instances_and_captions_of_a_split_are_joined_by_image_id(tmp_path):
    write(tmp_path, "annotations/instances_val2017.json")
    caption = {"id": 1, "image_id": 7, "caption": "a cat"}
    both = [IMAGE, IMAGE | {"id": 8}]
    path = write(tmp_path, "annotations/captions_val2017.json", images=both, annotations=[caption])
    path.write_text(json.dumps({"images": both, "annotations": [caption]}))
    source = find_coco(tmp_path)["valid"]
    assert source.problems == ()
    one, two = all_of(source)
    assert (len(one.instances), one.texts) == (1, (Text("a cat"),))
    assert (two.instances, two.texts) == ((), ())


def test_a_folder_without_coco_is_refused(tmp_path):
    with pytest.raises(DataError, match="no COCO files"):
        find_coco(tmp_path)


def test_a_linked_folder_of_pictures_is_refused_unless_allowed(tmp_path):
    write(tmp_path / "data", "annotations/instances_train2017.json")
    picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "data" / "train2017").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="leads out of"):
        find_coco(tmp_path / "data")
    assert find_coco(tmp_path / "data", allow_outside=True)["train"][0].images[0].is_file()


@pytest.mark.parametrize("layout", ["roboflow", "official"])
def test_what_is_written_reads_back_the_same(tmp_path, layout):
    records = drawn_records(tmp_path / "in")
    asked = Asked("what?", ("this", "that"), "fr")
    records.append(
        Record(
            (picture(tmp_path / "in" / "q.png"),),
            SIZE_HW,
            (Instance("cat", (0.1, 0.2, 30.7, 40.3), Mask(SIZE_HW, ((1.25, 2.5, 30.0, 2.5, 9.0, 40.3),)), True),),
            (Text("there", box_xyxy_px=(1.0, 2.0, 3.0, 4.0)), Text("long", style="describe")),
            (Word("EXIT", (5.0, 6.0, 9.0, 9.5)), Word("lost")),
            (asked,),
        )
    )
    for split in ("train", "valid"):
        write_coco(records, tmp_path / "out", split=split, layout=layout)
    found = find_coco(tmp_path / "out")
    assert list(found) == ["train", "valid"]
    for source in found.values():
        assert source.problems == ()
        assert list(map(annotations, all_of(source))) == list(map(annotations, records))
        same = zip(all_of(source), records, strict=True)
        assert all(new.images[0].read_bytes() == old.images[0].read_bytes() for new, old in same)
        labels = dict.fromkeys(i.label for record in records for i in record.instances)
        assert source.labels == tuple(labels)


polygon = st.lists(st.tuples(st.floats(0, 64), st.floats(0, 48)), min_size=3, max_size=6).map(
    lambda points: tuple(number for point in points for number in point)
)
edges = st.tuples(st.floats(0, 30), st.floats(0, 30), st.floats(31, 64), st.floats(31, 48))
things = st.builds(
    Instance,
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    edges,
    st.none()
    | st.builds(lambda p: Mask(SIZE_HW, polygons=tuple(p)), st.lists(polygon, min_size=1, max_size=3))
    | st.integers(0, 2**32).map(lambda seed: Mask.of(np.random.default_rng(seed).random(SIZE_HW) < 0.5)),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(things, max_size=4))
def test_any_instances_come_back_bit_by_bit(tmp_path_factory, instances):
    folder = tmp_path_factory.mktemp("any")
    record = Record((np.zeros((*SIZE_HW, 3), np.uint8),), None, tuple(instances))
    back = Coco(write_coco([record], folder))[0]
    assert back.size_hw == SIZE_HW
    for new, old in zip(back.instances, instances, strict=True):
        assert (new.label, new.is_crowd) == (old.label, old.is_crowd)
        assert new.box_xyxy_px == pytest.approx(old.box_xyxy_px, abs=1e-12)
        assert (new.mask is None) == (old.mask is None)
        if old.mask is not None:
            assert new.mask.polygons == old.mask.polygons
            assert np.array_equal(new.mask.pixels(), old.mask.pixels())


@pytest.mark.parametrize("layout", ["roboflow", "official"])
def test_pycocotools_reads_what_we_write(tmp_path, layout):
    records = drawn_records(tmp_path / "in")
    mask = Mask(SIZE_HW, polygons=((1.0, 2.0, 30.0, 2.0, 9.0, 40.0), (40.0, 5.0, 50.0, 5.0, 45.0, 15.0)))
    instances = (Instance("cat", (1.0, 2.0, 50.0, 40.0), mask), Instance("dog", (0.0, 0.0, 3.0, 3.0)))
    records.append(Record(records[-1].images, SIZE_HW, instances, words=(Word("hi", (1.0, 1.0, 9.0, 9.0)),)))
    theirs = COCO(str(write_coco(records, tmp_path / "out", layout=layout)))
    names = {row["id"]: row["name"] for row in theirs.loadCats(theirs.getCatIds())}
    for id, record in zip(theirs.getImgIds(), records, strict=True):
        rows = theirs.loadAnns(theirs.getAnnIds(imgIds=[id], iscrowd=False))
        rows = [row for row in rows if "utf8_string" not in row]
        for row, item in zip(rows, record.instances, strict=True):
            left, top, width, height = row["bbox"]
            assert (names[row["category_id"]], (left, top, left + width, top + height)) == (
                item.label,
                item.box_xyxy_px,
            )
            if item.mask is not None:
                assert np.array_equal(theirs.annToMask(row).astype(bool), item.mask.pixels())
    captions = next((tmp_path / "out").rglob("*captions*.json"))
    assert [row["caption"] for row in COCO(str(captions)).loadAnns([1, 2])] == ["a scene", "eine Szene"]


def test_pictures_get_names_of_their_own(tmp_path):
    one, two = picture(tmp_path / "1" / "a.png"), picture(tmp_path / "2" / "A.png", seed=1)
    records = [
        Record((one,)), Record((two,)), Record((one,)), Record((one.read_bytes(),), id="x/y"),
        Record((np.zeros((4, 4, 3), np.uint8),)),
    ]  # fmt: skip
    names = [record.images[0].name for record in all_of(Coco(write_coco(records, tmp_path / "out")))]
    assert names == ["a.png", "A-1.png", "a-2.png", "x_y.png", "000005.png"]


def test_a_split_that_is_there_is_replaced_only_when_asked(tmp_path):
    records = [Record((picture(tmp_path / name),)) for name in ("a.png", "b.png")]
    write_coco(records, tmp_path / "out")
    with pytest.raises(OptionError, match="the split 'train' is there already"):
        write_coco(records[:1], tmp_path / "out")
    write_coco(records[:1], tmp_path / "out", split="val")
    path = write_coco(records[1:], tmp_path / "out", overwrite=True)
    assert {file.name for file in path.parent.iterdir()} == {"_annotations.coco.json", "b.png"}


@pytest.mark.parametrize("layout", ["roboflow", "official"])
def test_a_conversion_that_breaks_off_leaves_nothing_and_keeps_what_was(tmp_path, layout):
    records = [Record((picture(tmp_path / "a.png"),))]
    path = write_coco(records, tmp_path / "out", layout=layout)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}

    def broken():
        yield Record((picture(tmp_path / "c.png"),))
        raise DataError("row 2")

    with pytest.raises(DataError, match="row 2"):
        write_coco(broken(), tmp_path / "out", layout=layout, overwrite=True)
    with pytest.raises(DataError, match="row 2"):
        write_coco(broken(), tmp_path / "out", split="test", layout=layout)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before
    assert len(Coco(path, images=next((tmp_path / "out").rglob("a.png")).parent)) == 1


def test_a_label_that_is_not_in_the_list_is_named(tmp_path):
    record = Record((picture(tmp_path / "a.png"),), SIZE_HW, (Instance("cta", (1, 2, 3, 4)),))
    with pytest.raises(DataError, match=r"'cta' is none of the 2.*Did you mean 'cat'"):
        write_coco([record], tmp_path / "out", labels=("cat", "dog"))


def test_a_large_file_is_kept_as_bytes_and_read_as_before(tmp_path):
    def objects(n: int) -> int:
        images = [IMAGE | {"id": i, "file_name": f"{i}.png"} for i in range(n)]
        notes = [BOX | {"id": 3 * i + k, "image_id": i, "bbox": [k, 1.5, 3, 4]} for i in range(n) for k in range(3)]
        path = tmp_path / f"{n}.json"
        path.write_text(json.dumps({"images": images, "annotations": notes, "categories": CATEGORIES}))
        gc.collect()
        before = len(gc.get_objects())
        source = Coco(path)
        gc.collect()
        made = len(gc.get_objects()) - before
        assert len(source) == n
        assert source.row(n - 1) == images[-1]
        picture(tmp_path / f"{n - 1}.png")
        assert [i.box_xyxy_px[:2] for i in source[n - 1].instances] == [(0, 1.5), (1, 1.5), (2, 1.5)]
        assert pickle.loads(pickle.dumps(source))[n - 1] == source[n - 1]
        return made

    few, many = objects(10), objects(2000)
    assert many - few < 50  # 8,000 dictionaries as objects


def test_values_kept_as_bytes_are_a_sequence():
    values = [{"a": 1.1, "ü": None}, [], "x\\n", 7, {"b": [1e300, -0.0, "\\ud800"]}]
    kept = Compact(iter(values))
    assert list(kept) == values
    assert kept[-1] == values[-1]
    assert kept[1:3] == values[1:3]
    with pytest.raises(IndexError):
        kept[5]
    assert len(Compact([])) == 0


@pytest.mark.parametrize(("said", "is_crowd"), [("0", False), (0, False), (None, False), ("1", True), (True, True)])
def test_a_crowd_may_be_said_as_text(tmp_path, said, is_crowd):
    assert Coco(write(tmp_path, annotations=[BOX | {"iscrowd": said}]))[0].instances[0].is_crowd is is_crowd


@pytest.mark.parametrize("far", [1e12, -1e7, 1e299])
def test_a_corner_out_of_all_sight_never_reaches_the_filling_of_polygons(tmp_path, far):
    source = Coco(write(tmp_path, annotations=[BOX | {"segmentation": [[1, 1, far, 1, 1, 9]]}]))
    with pytest.raises(DataError, match="1,000,000 pixels away"):
        source[0].instances[0].mask.pixels()
    assert check({"train": source}).counts["bad mask"] == 1
