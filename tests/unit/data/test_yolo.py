"""YOLO folders: the ways a data.yaml names pictures, boxes and outlines there and back, rows that cannot be read."""

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma.data.check import check
from paligemma.data.loader import Loader, LoaderOptions
from paligemma.data.record import Instance, Mask, Record
from paligemma.data.rows import open_rows
from paligemma.data.sources.outline import join_outlines, outline, split_outlines
from paligemma.data.sources.yolo import find_yolo
from paligemma.data.sources.yolo_write import write_yolo
from paligemma.errors import DataError, OptionError
from paligemma.processing.image import load_image
from tests.picture_folders import SIZE_HW, all_of, annotations, boxes, drawn_records, picture
from tests.training_runs import processor


def folder(at, rows="", *, file="images/train/a.png", text="labels/train/a.txt", **said):
    """A data set of one picture."""
    picture(at / file)
    (at / text).parent.mkdir(parents=True, exist_ok=True)
    (at / text).write_text(rows)
    said = {"names": ["cat", "dog"], "train": "images/train"} | said
    (at / "data.yaml").write_text(yaml.safe_dump({key: value for key, value in said.items() if value is not None}))
    return at


def test_rows_become_boxes_and_outlines(tmp_path):
    rows = "0 0.5 0.5 0.25 0.5\n\n1 0.25 0.25 0.5 0.25 0.5 0.75\n"
    source = find_yolo(folder(tmp_path, rows))["train"]
    (record,) = all_of(source)
    polygon = (16.0, 12.0, 32.0, 12.0, 32.0, 36.0)
    assert record.instances == (
        Instance("cat", (24.0, 12.0, 40.0, 36.0)),
        Instance("dog", (16.0, 12.0, 32.0, 36.0), Mask(SIZE_HW, polygons=(polygon,))),
    )
    assert (record.id, record.where, record.size_hw) == ("images/train/a", "labels/train/a.txt", SIZE_HW)
    assert (source.labels, source.problems) == (("cat", "dog"), ())


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("images/train/a.png", "labels/train/a.txt", {}),
        ("images/train/sub dir/ä.png", "labels/train/sub dir/ä.txt", {}),
        ("train/images/a.png", "train/labels/a.txt", {"train": "train/images"}),
        ("train/images/a.png", "train/labels/a.txt", {"train": "../train/images"}),  # as Roboflow writes it
        ("images/a/1.png", "labels/a/1.txt", {"train": ["images/a"]}),
        ("pictures/a.png", "pictures/a.txt", {"train": "pictures"}),
        ("images/a.png", "labels/a.txt", {"train": "list.txt"}),
        ("images/a.png", "labels/a.txt", {"path": "/content/not/there", "train": "images"}),
        ("inner/images/a.png", "inner/labels/a.txt", {"path": "inner", "train": "images"}),
        ("images/train/a.png", "labels/train/a.txt", {"names": {0: "cat", 1: "dog"}, "test": "images/test"}),
        ("images/train/a.JPG", "labels/train/a.txt", {"kpt_shape": [1, 2]}),
    ],
)
def test_pictures_and_their_rows_are_found(tmp_path, file, text, said):
    row = "1 0.5 0.5 0.25 0.5" + (" 0.1 0.2" if "kpt_shape" in said else "")
    (tmp_path / "list.txt").write_text("./images/a.png\n")
    found = find_yolo(folder(tmp_path, row, file=file, text=text, **said))
    assert list(found) == ["train"]
    (record,) = all_of(found["train"])
    assert record.instances == (Instance("dog", (24.0, 12.0, 40.0, 36.0)),)
    assert find_yolo(tmp_path / "data.yaml")["train"][0] == record


def test_a_picture_without_rows_has_no_objects(tmp_path):
    picture(folder(tmp_path) / "images" / "train" / "b.png")
    assert [record.instances for record in all_of(find_yolo(tmp_path)["train"])] == [(), ()]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0 0.5 0.5 0.25", "4 values: expected class x y width height"),
        ("0 0.5 0.5 0.25 0.5 0.9", "6 values.*A score belongs to predictions"),
        ("2 0.5 0.5 0.25 0.5", "class 2: expected one of 0 to 1"),
        ("0.5 0.5 0.5 0.25 0.5", "class 0.5"),
        ("-1 0.5 0.5 0.25 0.5", "class -1"),
        ("cat 0.5 0.5 0.25 0.5", "expected numbers, class first"),
        ("0 nan 0.5 0.25 0.5", "expected finite numbers"),
        ("0 inf 0.5 0.25 0.5", "expected finite numbers"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, message):
    source = find_yolo(folder(tmp_path, f"0 0.5 0.5 0.1 0.1\n{row}"))["train"]
    with pytest.raises(DataError, match=rf"labels/train/a\.txt line 2: .*{message}") as error:
        source[0]
    assert "\n" not in str(error.value)


def test_rows_that_are_not_utf8_and_broken_pictures_are_named(tmp_path):
    source = find_yolo(folder(tmp_path))["train"]
    (tmp_path / "labels/train/a.txt").write_bytes(b"0 \xff")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8"):
        source[0]
    (tmp_path / "images/train/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"labels/train/a\.txt: .*is empty"):
        source[0]


def test_boxes_outside_are_left_for_the_check(tmp_path):
    record = find_yolo(folder(tmp_path, "0 1 1 1 -1"))["train"][0]
    assert record.instances[0].box_xyxy_px == (32.0, 72.0, 96.0, 24.0)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"names": None, "nams": []}, "names is empty.*Did you mean 'nams'"),
        ({"names": {"cat": 0}}, "expected whole numbers from 0"),
        ({"train": "images/trian"}, "images/trian is not there.* Did you mean 'images/train'"),
        ({"train": None, "tain": "x"}, "no train, val or test.*Did you mean 'tain'"),
        ({"train": "../out"}, "lies outside"),
        ({"train": 3}, "expected a folder of pictures"),
        ({"val": "images/none"}, "val: images/none is not there"),
        ({"train": "empty"}, "no pictures in empty"),
        ({"path": ".."}, "path: .. lies outside"),
        ({"names": [False, True]}, "a name is False, which YAML makes of words such as no.*quotes"),
    ],
)
def test_a_data_yaml_that_cannot_be_used_is_refused(tmp_path, said, message):
    picture(tmp_path / "out" / "a.png")
    (tmp_path / "set" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match=message):
        find_yolo(folder(tmp_path / "set", **said))


def test_a_line_of_a_list_that_names_no_picture_is_an_error_of_its_row(tmp_path):
    picture(tmp_path / "x.png")
    path = folder(tmp_path / "set", "0 0.5 0.5 0.25 0.5\n", train="list.txt")
    (path / "list.txt").write_text("images/train/a.png\n/etc/passwd\nimages/train/b.png\n../x.png\nnul\0.png\n")
    found = find_yolo(path)["train"]
    assert len(found[0].instances) == 1
    assert found.problems == ()
    kinds = ("path outside", "missing picture", "path outside", "missing picture")
    for index, kind in enumerate(kinds, 1):
        with pytest.raises(DataError, match=rf"list.txt line {index + 1}: the picture") as error:
            found[index]
        assert error.value.kind == kind
    findings = check(open_rows(path, task="detect", keep_all=True))
    assert findings.counts == {"missing picture": 2, "path outside": 2}
    loader = Loader(open_rows(path, task="detect")["train"], processor(), LoaderOptions(batch_size=5, skip_broken=True))
    step = loader.step(0)
    assert len(step.broken) == 4
    assert step.names == ("labels/train/a.txt",)


def test_roboflows_folders_that_were_not_made_are_passed_over(tmp_path):
    path = folder(tmp_path, train="../train/images", val="../valid/images", file="train/images/a.png")
    assert list(find_yolo(path)) == ["train"]


def test_pictures_elsewhere_are_read_where_they_are_allowed(tmp_path):
    picture(tmp_path / "out" / "a.png")
    found = find_yolo(folder(tmp_path / "set", train=str(tmp_path / "out")), allow_outside=True)
    assert len(all_of(found["train"])) == 1


def test_a_picture_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    picture(tmp_path / "out.png")
    (folder(tmp_path / "set") / "images/train/z.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(DataError, match="symbolic link"):
        find_yolo(tmp_path / "set")["train"][1]


def test_rows_without_picture_and_shared_rows_are_problems(tmp_path):
    path = folder(tmp_path)
    picture(path / "images/train/a.jpg")
    (path / "labels/train/b.txt").write_text("")
    problems = find_yolo(path)["train"].problems
    assert [problem[: problem.index(",")] for problem in problems] == [
        "1 text files without a picture", "1 text files that two pictures share",
    ]  # fmt: skip


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_a_picture_that_lies_on_its_side_is_measured_upright(tmp_path, name, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    folder(tmp_path, file=f"images/train/{name}")
    picture(tmp_path / "images/train" / name, exif=exif)
    record = find_yolo(tmp_path)["train"][0]
    assert record.size_hw == load_image(record.images[0]).shape[:2]
    assert record.size_hw == (SIZE_HW if turn < 5 else SIZE_HW[::-1])


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_large_pictures_are_measured_by_their_heads(tmp_path, name):
    picture(folder(tmp_path, file=f"images/train/{name}") / "images/train" / name, (400, 300))
    assert find_yolo(tmp_path)["train"][0].size_hw == (400, 300)


def test_what_is_written_reads_back_the_same(tmp_path):
    records = drawn_records(tmp_path / "in", masks=False)
    for split in ("train", "valid", "test"):
        file = write_yolo(records, tmp_path / "out", split)
    assert list(find_yolo(file)) == ["train", "valid", "test"]
    for source in find_yolo(tmp_path / "out").values():
        new = all_of(source)
        assert sorted(map(boxes, new)) == sorted(map(boxes, records))
        assert source.labels == tuple(dict.fromkeys(i.label for record in records for i in record.instances))
        assert {r.images[0].name for r in new} == {r.images[0].name for r in records}


def test_masks_of_drawn_scenes_come_back_bit_by_bit(tmp_path):
    records = drawn_records(tmp_path / "in")
    write_yolo(records, tmp_path / "out")
    back = {record.images[0].name: record for record in all_of(find_yolo(tmp_path / "out")["train"])}
    for record in records:
        assert annotations(back[record.images[0].name])[1] == annotations(record)[1]


sides = st.integers(1, 8000)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.lists(st.tuples(*[st.floats(-100, 8100)] * 4), min_size=1, max_size=5))
def test_any_box_comes_back_within_a_thousandth_of_a_pixel(tmp_path_factory, height, width, said):
    path = tmp_path_factory.mktemp("any")
    instances = tuple(Instance("x", box) for box in said)
    record = Record((picture(path / "a.png", (2, 2)),), (height, width), instances)
    write_yolo([record], path / "out")
    Image.new("1", (width, height)).save(path / "out/images/train/a.png")
    back = find_yolo(path / "out")["train"][0]
    assert np.allclose([i.box_xyxy_px for i in back.instances], said, rtol=0, atol=1e-6)


corners = st.tuples(*[st.decimals(0, 800, places=2).map(float)] * 2)
polygons = st.lists(
    st.lists(corners, min_size=3, max_size=6, unique=True).map(lambda points: tuple(n for p in points for n in p)),
    min_size=1,
    max_size=3,
    unique_by=lambda polygon: polygon[:2],
)


@settings(max_examples=60, deadline=None)
@given(polygons)
def test_outlines_come_back_exactly_several_of_one_thing_too(tmp_path_factory, said):
    path = tmp_path_factory.mktemp("any")
    starts = [polygon[:2] for polygon in said]
    others = [tuple(polygon[i : i + 2]) for polygon in said for i in range(2, len(polygon), 2)]
    if set(starts) & set(others):
        return  # a corner on the first one of another: joined, nobody can tell where one ends
    record = Record(
        (picture(path / "a.png", (801, 803)),), None, (Instance("x", (0, 0, 1, 1), Mask((801, 803), tuple(said))),)
    )
    write_yolo([record], path / "out")
    (back,) = find_yolo(path / "out")["train"][0].instances
    assert back.mask.polygons == tuple(said)


masks = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32), st.sampled_from([0.2, 0.5, 0.9]))


@settings(max_examples=200, deadline=None)
@given(masks)
def test_an_outline_fills_to_exactly_its_mask(drawn):
    height, width, seed, share = drawn
    mask = np.random.default_rng(seed).random((height, width)) < share
    found = outline(mask)
    assert np.array_equal(Mask((height, width), polygons=found).pixels(), mask)
    if found:
        joined = join_outlines(found)
        assert split_outlines(joined) == found
        assert np.array_equal(Mask((height, width), polygons=(joined,)).pixels(), mask)


def test_outlines_that_end_where_they_began_are_taken_apart_again():
    """As many tools write them, the first corner again at the end."""
    first, second = (0.0, 0.0, 10.0, 0.0, 5.0, 8.0), (20.0, 0.0, 30.0, 0.0, 25.0, 8.0)
    for polygons in (((*first, 0.0, 0.0), second), (first, (*second, 20.0, 0.0))):
        assert split_outlines(join_outlines(polygons)) == (first, second)


def test_a_hole_stays_a_hole(tmp_path):
    mask = np.zeros(SIZE_HW, bool)
    mask[5:40, 5:40], mask[10:20, 10:20], mask[42:45, 50:60] = True, False, True
    record = Record((picture(tmp_path / "a.png"),), SIZE_HW, (Instance("x", (5, 5, 60, 45), Mask.of(mask)),))
    write_yolo([record], tmp_path / "out")
    (back,) = find_yolo(tmp_path / "out")["train"][0].instances
    assert np.array_equal(back.mask.pixels(), mask)


def test_class_numbers_stay_when_a_split_is_added(tmp_path):
    def record(label):
        return Record((picture(tmp_path / "a.png"),), SIZE_HW, (Instance(label, (0.0, 0.0, 8.0, 8.0)),))

    write_yolo([record("cat")], tmp_path / "out", labels=("dog", "cat"))
    write_yolo([record("cow"), record("cat")], tmp_path / "out", "val")
    found = find_yolo(tmp_path / "out")
    assert found["valid"].labels == ("dog", "cat", "cow")
    assert [sorted(r.instances[0].label for r in all_of(split)) for split in found.values()] == [
        ["cat"],
        ["cat", "cow"],
    ]


def test_a_split_that_is_there_is_replaced_only_when_asked(tmp_path):
    records = [Record((picture(tmp_path / name),)) for name in ("a.png", "b.png")]
    write_yolo(records, tmp_path / "out", labels=("x",))
    with pytest.raises(OptionError, match="the split 'train' is there already"):
        write_yolo(records, tmp_path / "out")
    write_yolo(records[1:], tmp_path / "out", overwrite=True)
    files = {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert files == {"data.yaml", "b.png", "b.txt"}


def test_a_writing_that_breaks_off_leaves_nothing(tmp_path):
    records = [Record((picture(tmp_path / "a.png"),)), Record((tmp_path / "missing.png",))]
    with pytest.raises(DataError, match=r"missing\.png"):
        write_yolo(records, tmp_path / "out", labels=("x",))
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_lists_beside_the_pictures_are_no_lost_rows(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("0 0.5 0.5 0.25 0.5")
    (tmp_path / "train.txt").write_text("./a.png\n")
    (tmp_path / "val.txt").write_text("./b.png\n")
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: train.txt\nval: val.txt\n")
    assert {split: (len(s), s.problems) for split, s in find_yolo(tmp_path).items()} == {
        "train": (1, ()), "valid": (1, ()),
    }  # fmt: skip


def test_rows_that_are_a_link_out_of_the_folder_are_refused_unless_allowed(tmp_path):
    folder(tmp_path / "data", "")
    (tmp_path / "secret").write_text("0 0.5 0.5 0.25 0.5")
    text = tmp_path / "data" / "labels" / "train" / "a.txt"
    text.unlink()
    text.symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="leads outside"):
        find_yolo(tmp_path / "data")["train"][0]
    assert len(find_yolo(tmp_path / "data", allow_outside=True)["train"][0].instances) == 1


def test_lists_may_divide_one_folder(tmp_path):
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png")
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.25 0.5")
    (tmp_path / "labels" / "lost.txt").write_text("0 0.5 0.5 0.25 0.5")
    (tmp_path / "train.txt").write_text("images/a.png\nimages/b.png\n")
    (tmp_path / "val.txt").write_text("images/c.png\n")
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: train.txt\nval: val.txt\n")
    found = find_yolo(tmp_path)
    assert {split: len(source) for split, source in found.items()} == {"train": 2, "valid": 1}
    lost = tmp_path / "labels" / "lost.txt"
    assert {source.problems for source in found.values()} == {(f"1 text files without a picture, the first {lost}",)}
