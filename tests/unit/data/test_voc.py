"""Pascal VOC: both layouts, its way of counting pixels, unsafe and broken XML, there and back."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from paligemma.data.check import check
from paligemma.data.record import Instance, Mask, Record
from paligemma.data.rows import open_rows
from paligemma.data.sources.voc import find_voc
from paligemma.data.sources.voc_write import whole_pixels, write_voc
from paligemma.errors import DataError, OptionError
from tests.picture_folders import SIZE_HW, all_of, boxes, drawn_records, picture

OBJECT = """<object><name>{}</name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult>
<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""
XML = """<annotation><filename>{}</filename><path>/home/someone/a.jpg</path>
<size><width>64</width><height>48</height><depth>3</depth></size>{}</annotation>"""


def folder(path, xml=None, *, names="a\n", pictures="JPEGImages", texts="Annotations"):
    picture(path / pictures / "a.jpg")
    (path / texts).mkdir(parents=True, exist_ok=True)
    (path / texts / "a.xml").write_text(xml or XML.format("a.jpg", OBJECT.format("cat")))
    if names is not None:
        (path / "ImageSets" / "Main").mkdir(parents=True)
        (path / "ImageSets" / "Main" / "train.txt").write_text(names)
    return path


def test_an_xml_file_becomes_a_record(tmp_path):
    source = find_voc(folder(tmp_path))["train"]
    (record,) = all_of(source)
    assert record.instances == (Instance("cat", (10.0, 20.0, 40.0, 30.0)),)
    assert (record.size_hw, record.id, record.where) == (SIZE_HW, "a", "Annotations/a.xml")
    (said,) = record.meta["objects"]
    assert [part["name"] for part in said.pop("part")] == ["head"]
    assert said == {"pose": "Left", "truncated": "1", "difficult": "0"}
    assert source.labels == ("cat",)


def test_edges_that_count_from_0_are_read_as_they_are(tmp_path):
    source = find_voc(folder(tmp_path), one_based=False)["train"]
    assert source[0].instances[0].box_xyxy_px == (11.0, 21.0, 40.0, 30.0)


@pytest.mark.parametrize("where", ["train", "."])
def test_xml_beside_the_pictures_has_edges_unless_told_otherwise(tmp_path, where):
    path = folder(tmp_path, names=None, pictures=where, texts=where)
    assert find_voc(path)["train"][0].instances[0].box_xyxy_px == (11.0, 21.0, 40.0, 30.0)
    assert find_voc(path, one_based=True)["train"][0].instances[0].box_xyxy_px == (10.0, 20.0, 40.0, 30.0)


@pytest.mark.parametrize(
    ("options", "inner"),
    [
        ({}, ""),
        ({"names": "a -1\n"}, ""),
        ({"names": None}, ""),
        ({"names": None, "pictures": "images"}, ""),
        ({}, "VOC2012"),
        ({}, "VOCdevkit/VOC2007"),
        ({"names": None, "pictures": "train", "texts": "train"}, ""),
        ({"names": None, "pictures": ".", "texts": "."}, ""),
    ],
)
def test_the_usual_layouts_are_found(tmp_path, options, inner):
    folder(tmp_path / inner, **options)
    found = find_voc(tmp_path)
    assert {split: [r.id for r in all_of(source)] for split, source in found.items()} == {"train": ["a"]}


def test_trainval_is_what_is_learned_beside_a_test_list(tmp_path):
    folder(tmp_path, names=None)
    sets = tmp_path / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "trainval.txt").write_text("a\n")
    (sets / "test.txt").write_text("a\n")
    assert {split: len(source) for split, source in find_voc(tmp_path).items()} == {"test": 1, "train": 1}


def test_a_test_set_alone_is_nothing_to_learn(tmp_path):
    folder(tmp_path, names=None)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("a\n")
    assert list(find_voc(tmp_path)) == ["test"]


def test_what_a_mac_leaves_beside_files_is_no_annotation(tmp_path):
    folder(tmp_path, names=None)
    (tmp_path / "Annotations" / "._a.xml").write_bytes(b"\0\5\x16\7")
    assert len(find_voc(tmp_path)["train"]) == 1


def test_two_years_in_one_folder_have_to_be_told_apart(tmp_path):
    folder(tmp_path / "VOC2007"), folder(tmp_path / "VOC2012")
    with pytest.raises(DataError, match="holds VOC2007, VOC2012"):
        find_voc(tmp_path)


BOMB = '<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><annotation><filename>&b;</filename></annotation>'


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (BOMB, "declares a document type or entities"),
        ('<!DOCTYPE annotation SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
        ("<annotation>", "not XML"),
        ("", "not XML"),
        ("<svg/>", "<svg>: expected <annotation>"),
        (XML.format("a.jpg", OBJECT.format("")), "object 1: no name"),
        (XML.format("a.jpg", "<object><name>cat</name></object>"), "object 1: bndbox"),
        (XML.format("a.jpg", OBJECT.format("cat").replace("11", "nan")), "expected finite numbers"),
        (XML.format("a.jpg", OBJECT.format("cat").replace("11", "x")), "expected numbers xmin"),
        (XML.format("b.jpg", ""), "b.jpg is not in .* Did you mean 'a.jpg'"),
        (XML.format("../a.jpg", ""), "lies outside"),
        (XML.format("/etc/passwd.jpg", ""), "lies outside"),
    ],
)
def test_an_xml_file_that_cannot_be_used_is_named(tmp_path, xml, message):
    folder(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text(xml)
    source = find_voc(tmp_path)["train"]
    with pytest.raises(DataError, match=rf"Annotations/a\.xml.*{message}") as error:
        source[0]
    assert "\n" not in str(error.value)


def test_entities_are_found_in_any_encoding(tmp_path):
    folder(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_bytes(BOMB.encode("utf-16"))
    with pytest.raises(DataError, match="declares a document type"):
        find_voc(tmp_path)["train"][0]


@pytest.mark.parametrize(
    ("names", "message"),
    [("b\n", r"b\.xml: no such file.*Did you mean"), ("../a\n", "lies outside"), ("\n", "no names")],
)
def test_a_list_that_names_what_is_not_there_is_refused(tmp_path, names, message):
    folder(tmp_path, names=names)
    (tmp_path / "Annotations" / "bb.xml").write_text("")
    with pytest.raises(DataError, match=message):
        find_voc(tmp_path)["train"][0]


def test_size_and_name_of_the_picture_are_found_where_the_file_does_not_say(tmp_path):
    record = find_voc(folder(tmp_path, "<annotation><size><width>0</width></size></annotation>"))["train"][0]
    assert (record.size_hw, record.images[0].name) == (SIZE_HW, "a.jpg")


def test_names_that_stand_twice_are_a_problem(tmp_path):
    assert find_voc(folder(tmp_path, names="a\na\n"))["train"].problems == ("1 names are listed twice, the first a",)


def test_what_is_written_reads_back_the_same(tmp_path):
    records = drawn_records(tmp_path / "in", masks=False)
    for split in ("train", "valid", "test"):
        write_voc(records, tmp_path / "out", split)
    found = find_voc(tmp_path / "out")
    assert list(found) == ["train", "valid", "test"]
    labels = tuple(dict.fromkeys(i.label for record in records for i in record.instances))
    for source in found.values():
        assert list(map(boxes, all_of(source))) == list(map(boxes, records))
        assert source.labels == labels
        assert [r.size_hw for r in all_of(source)] == [r.size_hw for r in records]


def test_what_the_objects_were_like_is_kept(tmp_path):
    (record,) = all_of(find_voc(folder(tmp_path / "in"))["train"])
    (said,) = record.meta["objects"]
    said["occluded"] = "1"  # as later years and other tools write it
    left_out = Counter()
    write_voc([record], tmp_path / "out", left_out=left_out)
    (back,) = find_voc(tmp_path / "out")["train"][0].meta["objects"]
    assert back == {key: value for key, value in said.items() if key != "part"}
    assert +left_out == {"'part' of single objects": 1}, "boxes of parts would count from somewhere else"
    numbers = dataclasses.replace(record, meta={"objects": [{"difficult": 1, "truncated": True}]})
    write_voc([numbers], tmp_path / "numbers")
    (back,) = find_voc(tmp_path / "numbers")["train"][0].meta["objects"]
    assert (back["difficult"], back["truncated"]) == ("1", "1")


def test_groups_without_end_inside_each_other_are_read_to_a_depth(tmp_path):
    path = folder(tmp_path)
    file = next((path / "Annotations").glob("*.xml"))
    deep = "<a>" * 3000 + "x" + "</a>" * 3000
    file.write_text(file.read_text().replace("</object>", f"{deep}</object>", 1))
    (record,) = all_of(find_voc(path)["train"])
    assert record.instances[0].label == "cat"
    json.dumps(record.meta)


def test_edges_are_rounded_and_no_box_gets_lost():
    assert whole_pixels((0.4, 0.5, 10.4, 10.5)) == (0, 1, 10, 11)
    assert whole_pixels((3.6, 3.1, 4.4, 3.2)) == (4, 3, 5, 4)
    assert whole_pixels((5.0, 5.0, 3.0, 3.0)) == (5, 5, 3, 3)  # turned over: left for the check


def test_a_split_that_is_there_is_replaced_only_when_asked(tmp_path):
    a, b, c = (Record((picture(tmp_path / name),)) for name in ("a.png", "b.png", "c.png"))
    write_voc([a, b], tmp_path / "out")
    write_voc([c], tmp_path / "out", "val")
    with pytest.raises(OptionError, match="the split 'train' is there already"):
        write_voc([a], tmp_path / "out")
    write_voc([b, c], tmp_path / "out", overwrite=True)
    files = {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert files == {
        "b.png", "b.xml", "c.png", "c.xml", "c-1.png", "c-1.xml", "train.txt", "val.txt", "labels.txt",
    }  # fmt: skip
    assert [r.id for r in all_of(find_voc(tmp_path / "out")["train"])] == ["b", "c-1"]


def numbers_png(path, numbers, mode="P"):
    """What SegmentationObject holds: pixels are numbers of objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(numbers, np.uint8))
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    image.convert(mode).save(path)
    return path


def test_object_numbers_become_masks(tmp_path):
    numbers = np.zeros(SIZE_HW, np.uint8)
    numbers[5:9, 6:20], numbers[9, 6:20], numbers[20:22, 30:50] = 2, 255, 3  # 255 is the line round an object
    folder(tmp_path, XML.format("a.jpg", "".join(map(OBJECT.format, ("cat", "dog", "cow")))))
    for mode in ("P", "L"):
        numbers_png(tmp_path / "SegmentationObject" / "a.png", numbers, mode)
        cat, dog, cow = find_voc(tmp_path)["train"][0].instances
        assert cat.mask is None  # wholly behind the others: the box is known, no pixel is
        for thing, number in ((dog, 2), (cow, 3)):
            assert (thing.mask.pixels() == (numbers == number)).all()


def test_a_list_of_segmented_pictures_alone_is_read(tmp_path):
    folder(tmp_path, names=None)
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("a\n")
    assert [record.id for record in all_of(find_voc(tmp_path)["valid"])] == ["a"]


def cut(path):
    numbers_png(path, np.random.default_rng(0).integers(0, 2, SIZE_HW))
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: numbers_png(path, np.full(SIZE_HW, 2)), "has an object 2: expected numbers up to 1"),
        (lambda path: numbers_png(path, np.ones((64, 48))), "has 48×64 pixels: expected the picture's 64×48"),
        (lambda path: numbers_png(path, np.ones(SIZE_HW), "RGB"), "has colours \\(RGB\\): expected one number a pixel"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (cut, "cannot be decoded"),
    ],
)
def test_masks_that_do_not_fit_are_named_and_counted(tmp_path, spoil, message):
    folder(tmp_path)
    (tmp_path / "SegmentationObject").mkdir()
    spoil(tmp_path / "SegmentationObject" / "a.png")
    source = find_voc(tmp_path)["train"]
    with pytest.raises(DataError, match=rf"^Annotations/a\.xml: SegmentationObject/a\.png {message}") as error:
        source[0]
    assert "\n" not in str(error.value)
    assert check({"train": source}).counts == {"bad mask": 1}


def test_masks_that_lead_out_of_the_folder_are_refused_unless_allowed(tmp_path):
    path = folder(tmp_path / "voc")
    (path / "SegmentationObject").mkdir()
    outside = numbers_png(tmp_path / "a.png", np.ones(SIZE_HW))
    (path / "SegmentationObject" / "a.png").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of its folder"):
        find_voc(path)["train"][0]
    assert find_voc(path, allow_outside=True)["train"][0].instances[0].mask.pixels().all()


def test_masks_that_are_written_read_back_the_same(tmp_path):
    records = drawn_records(tmp_path / "in")
    left_out = Counter()
    write_voc(records, tmp_path / "out", left_out=left_out)
    kept = [
        [sorted((i.label, i.box_xyxy_px, i.mask.pixels().tobytes()) for i in record.instances) for record in group]
        for group in (records, all_of(find_voc(tmp_path / "out")["train"]))
    ]
    assert kept[0] == kept[1]
    assert +left_out == {"texts": 2 * 4}
    assert len(list((tmp_path / "out" / "SegmentationObject").iterdir())) == 4


def test_of_two_masks_on_a_pixel_the_smaller_keeps_it(tmp_path):
    large, small = np.ones(SIZE_HW, bool), np.zeros(SIZE_HW, bool)
    small[10:20, 10:30] = True
    things = [Instance("cup", (10, 10, 30, 20), Mask.of(small)), Instance("table", (0, 0, 64, 48), Mask.of(large))]
    record = Record((picture(tmp_path / "a.png"),), SIZE_HW, tuple(things))
    left_out = Counter()
    write_voc([record], tmp_path / "out", left_out=left_out)
    cup, table = find_voc(tmp_path / "out")["train"][0].instances
    assert (cup.mask.pixels() == small).all()
    assert (table.mask.pixels() == (large & ~small)).all()
    assert +left_out == {"parts of masks under smaller ones": 1}


def test_a_split_written_again_keeps_no_mask_of_before(tmp_path):
    records = drawn_records(tmp_path / "in")
    write_voc(records, tmp_path / "out")
    write_voc(drawn_records(tmp_path / "in", masks=False), tmp_path / "out", overwrite=True)
    assert all(i.mask is None for record in all_of(find_voc(tmp_path / "out")["train"]) for i in record.instances)
    assert not list((tmp_path / "out" / "SegmentationObject").iterdir())


def test_masks_have_the_colours_of_the_devkit(tmp_path):
    write_voc(drawn_records(tmp_path / "in"), tmp_path / "out")
    palette = Image.open(next((tmp_path / "out" / "SegmentationObject").iterdir())).getpalette()
    colours = {1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0), 20: (0, 64, 128)}  # its first classes
    assert {n: tuple(palette[3 * n : 3 * n + 3]) for n in colours} == colours


@pytest.mark.parametrize(
    ("head", "encoding", "is_read"),
    [
        ('<?xml version="1.0" encoding="ISO-8859-1"?>', "latin-1", True),  # said, and Python can read it
        ("", "latin-1", False),
        ('<?xml version="1.0" encoding="GBK"?>', "gbk", False),
        ('<?xml version="1.0" encoding="nonesuch"?>', "latin-1", False),
    ],
)
def test_other_encodings_are_read_where_they_are_said_and_named_where_not(tmp_path, head, encoding, is_read):
    label = "鱼" if encoding == "gbk" else "Käse"
    folder(tmp_path)
    xml = head + XML.format("a.jpg", OBJECT.format(label))
    (tmp_path / "Annotations" / "a.xml").write_bytes(xml.encode(encoding))
    source = find_voc(tmp_path)["train"]
    if is_read:
        assert source[0].instances[0].label == label
        return
    with pytest.raises(DataError, match=r"^Annotations/a\.xml: not UTF-8") as error:
        source[0]
    assert error.value.kind == "not UTF-8"
    assert source.labels == ()


def test_prompts_of_every_split_speak_of_the_classes_of_all(tmp_path):
    """VOC keeps no list of classes: each split knows those of its own files."""
    folder(tmp_path, XML.format("a.jpg", OBJECT.format("cat") + OBJECT.format("dog")))
    (tmp_path / "Annotations" / "b.xml").write_text(XML.format("b.jpg", OBJECT.format("cat")))
    picture(tmp_path / "JPEGImages" / "b.jpg", seed=1)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("b\n")
    found = open_rows(tmp_path, task="detect", task_fields=(("ask", "all"),))
    assert {split: rows[0].prefix for split, rows in found.items()} == {
        "train": "detect cat ; dog", "valid": "detect cat ; dog"
    }  # fmt: skip
