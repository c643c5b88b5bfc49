"""Any format to any other: equal annotations there and back, and nothing dropped without a word."""

import json
from collections import Counter

import numpy as np
import pytest

from paligemma.data.builders import BUILDERS, Built, OneOf, builder_of
from paligemma.data.check import check
from paligemma.data.convert import READERS, WRITERS, convert, read_records, write_jsonl, write_split
from paligemma.data.example import Example
from paligemma.data.record import Asked, Instance, Mask, Record, Text
from paligemma.data.rows import open_rows
from paligemma.data.sources.coco_write import write_coco
from paligemma.data.sources.folder import Names
from paligemma.data.sources.jsonl import Jsonl, find_splits
from paligemma.data.sources.open import open_data, sniff
from paligemma.data.sources.paths import picture_path
from paligemma.data.sources.voc_write import write_voc
from paligemma.data.sources.yolo_write import write_yolo
from paligemma.errors import DataError, OptionError
from tests.picture_folders import SIZE_HW, all_of, annotations, boxes, drawn_records, picture


@pytest.fixture
def coco(tmp_path):
    """Two splits of drawn scenes with whole-pixel boxes, one picture without any."""
    records = drawn_records(tmp_path / "drawn", 5, masks=False)
    write_coco(records[:4], tmp_path / "coco", split="train")
    write_coco(records[3:], tmp_path / "coco", split="valid")
    return tmp_path / "coco"


def by_picture(source):
    """What each picture of a source has, by its content."""
    return {record.images[0].read_bytes(): boxes(record) for record in all_of(source)}


def half_a_bin(record):
    """Half a bin of 1023, in pixels of the longer side."""
    return max(record.size_hw) / 1023 / 2


def test_round_the_formats_and_back_annotations_are_equal(tmp_path, coco):
    ways = [("coco", "yolo"), ("yolo", "voc"), ("voc", "coco_official")]
    for source, target in ways:
        done = convert(tmp_path / source, tmp_path / target, to=target)
        assert (done.left_out, done.problems, done.n_rows) == ({}, (), {"train": 4, "valid": 3})
    first, last = open_data(coco), open_data(tmp_path / "coco_official")
    assert list(last) == ["train", "valid"]
    for split in first:
        assert by_picture(last[split]) == by_picture(first[split])
        assert set(last[split].labels) == set(first["train"].labels) | set(first["valid"].labels)
    assert last["train"].labels == last["valid"].labels


def test_through_prompts_boxes_come_back_within_half_a_bin(tmp_path, coco):
    done = convert(coco, tmp_path / "rows", to="jsonl", build=BUILDERS["detect"])
    assert (done.n_rows["train"], sniff(tmp_path / "rows")) == (4, "jsonl")
    back = convert(tmp_path / "rows", tmp_path / "back", to="coco")
    assert back.problems == ()
    first, last = open_data(coco), open_data(tmp_path / "back")
    for split in first:
        new = {record.images[0].read_bytes(): record for record in all_of(last[split])}
        for old in all_of(first[split]):
            if not old.instances and old.images[0].read_bytes() not in new:
                continue
            same = new[old.images[0].read_bytes()]
            assert same.size_hw == old.size_hw
            assert sorted(i.label for i in same.instances) == sorted(i.label for i in old.instances)
            left = list(same.instances)
            for item in old.instances:
                near = min(
                    (i for i in left if i.label == item.label),
                    key=lambda i: np.abs(np.subtract(i.box_xyxy_px, item.box_xyxy_px)).max(),
                )
                left.remove(near)
                far = np.abs(np.subtract(near.box_xyxy_px, item.box_xyxy_px)).max()
                assert far <= half_a_bin(old) + 1e-6


def test_masks_go_to_yolo_and_back_bit_by_bit(tmp_path):
    records = drawn_records(tmp_path / "in")
    write_coco(records, tmp_path / "coco")
    done = convert(tmp_path / "coco", tmp_path / "yolo", to="yolo")
    assert done.left_out == {"texts": 8}
    convert(tmp_path / "yolo", tmp_path / "back", to="coco")
    back = {r.images[0].read_bytes(): annotations(r)[:2] for r in all_of(open_data(tmp_path / "back")["train"])}
    assert back == {r.images[0].read_bytes(): annotations(r)[:2] for r in records}


def test_polygons_go_to_yolo_and_back_exactly(tmp_path):
    parts = ((1.25, 2.5, 30.0, 2.5, 9.75, 40.01), (40.0, 5.0, 50.5, 5.0, 45.0, 15.33))
    instances = (
        Instance("x", (1.25, 2.5, 50.5, 40.01), Mask(SIZE_HW, polygons=parts)),
        Instance("y", (1.25, 2.5, 30.0, 40.01), Mask(SIZE_HW, polygons=parts[:1])),
    )
    write_coco([Record((picture(tmp_path / "a.png"),), SIZE_HW, instances)], tmp_path / "coco")
    convert(tmp_path / "coco", tmp_path / "yolo", to="yolo")
    convert(tmp_path / "yolo", tmp_path / "back", to="coco")
    assert open_data(tmp_path / "back")["train"][0].instances == instances


def test_what_a_format_cannot_carry_is_counted(tmp_path):
    mask = Mask.of(np.ones(SIZE_HW, bool))
    instances = (Instance("x", (0, 0, 64, 48), mask), Instance("x", (0, 0, 64, 48), mask, is_crowd=True))
    record = Record((picture(tmp_path / "a.png"),), SIZE_HW, instances, (Text("a"),), (), (Asked("q", ("a",)),))
    write_coco([record], tmp_path / "coco")
    left_out = {to: convert(tmp_path / "coco", tmp_path / to, to=to).left_out for to in ("yolo", "voc")}
    assert left_out == {
        "yolo": {"crowd regions": 1, "texts": 1, "questions": 1},
        "voc": {"crowd regions": 1, "texts": 1, "questions": 1},
    }


def test_prompts_say_all_of_a_record_or_count_what_they_do_not(tmp_path):
    """Every caption and question has its row; what a prompt cannot say is counted."""
    mask = Mask.of(np.ones(SIZE_HW, bool))
    things = (Instance("x", (0, 0, 64, 48), mask), Instance("y", (0, 0, 9, 9)))
    crowd = Instance("x", (0, 0, 64, 48), mask, is_crowd=True)
    texts = tuple(Text(word, lang) for word, lang in (("a", "en"), ("b", "en"), ("c", "de")))
    asked = (Asked("who?", ("he", "him")), Asked("why?", ("so",)))
    record = Record((picture(tmp_path / "a.png"),), SIZE_HW, (*things, crowd), texts, (), asked, id="7")
    write_coco([record], tmp_path / "coco")

    made = convert(tmp_path / "coco", tmp_path / "captions", to="jsonl", build=BUILDERS["caption"])
    rows = all_of(find_splits(tmp_path / "captions")["train"])
    assert sorted((row.prefix, row.suffix) for row in rows) == [
        ("caption de", "c"), ("caption en", "a"), ("caption en", "b"),
    ]  # fmt: skip
    assert made.left_out == {"boxes": 2, "masks": 1, "crowd regions": 1, "questions": 2, "further answers": 1}

    both = OneOf((BUILDERS["detect"], BUILDERS["caption"], BUILDERS["answer"]))
    made = convert(tmp_path / "coco", tmp_path / "all", to="jsonl", build=both)
    assert (made.n_rows, made.left_out) == ({"train": 6}, {"masks": 1, "crowd regions": 1})
    tables = find_splits(tmp_path / "all")
    assert tables["train"].problems == ()  # rows of one record are no repeated ids
    assert {row.meta["record_id"] for row in all_of(tables["train"])} == {"7"}
    assert check(tables).n_errors == 0
    assert convert(tmp_path / "all", tmp_path / "back", to="coco").problems == ()
    (back,) = all_of(open_data(tmp_path / "back")["train"])
    assert Counter(back.texts) == Counter(texts)
    assert {one.question: one.answers for one in back.questions} == {"who?": ("he", "him"), "why?": ("so",)}
    assert {item.label for item in back.instances} == {"x", "y"}
    assert back.id == "7"

    # What is lost is told by content: a question that was made up stands for none that was asked.
    for builder in (BUILDERS["count"], builder_of("grounded_caption", from_instances=True)):
        made = convert(tmp_path / "coco", tmp_path / builder.name, to="jsonl", build=builder)
        assert made.left_out["questions"] == 2
        assert made.left_out["texts"] == 3


def test_a_mixture_is_converted_row_by_row_whatever_its_weights(tmp_path, coco):
    write_jsonl(
        [Example((picture(tmp_path / f"{i}.png", seed=i),), "caption en", f"text {i}") for i in range(7)],
        tmp_path / "rows",
    )
    sources = {
        "rare": {"data": "rows", "weight": 0.001, "limit": 5},
        "often": {"data": str(coco), "task": "detect", "weight": 9},
    }
    (tmp_path / "mixture.yaml").write_text(json.dumps({"sources": sources}))
    found = open_rows(tmp_path / "mixture.yaml")
    done = write_split(found["train"], tmp_path / "out", to="jsonl")
    rows = all_of(find_splits(tmp_path / "out")["train"])
    captions = [row.suffix for row in rows if row.prefix == "caption en"]
    assert len(captions) == len(set(captions)) == 5
    n_empty = sum(not record.instances for record in all_of(open_data(coco)["train"]))
    assert (len(rows) - 5, done.left_out.get("records without what the prompt needs", 0)) == (4 - n_empty, n_empty)
    assert len({row.images[0].read_bytes() for row in rows if row.prefix != "caption en"}) == 4 - n_empty
    # To annotations, the annotations behind a builder go as they are.
    write_split(found["train"], tmp_path / "back", to="coco")
    back = open_data(tmp_path / "back")["train"]
    assert by_picture(open_data(coco)["train"]).items() <= by_picture(back).items()
    assert sum(len(record.texts) for record in all_of(back)) == 5


def test_held_out_splits_of_a_mixture_are_converted_row_by_row_too(tmp_path):
    record = Record((picture(tmp_path / "a.png"),), SIZE_HW, texts=tuple(Text(f"text {i}") for i in range(4)))
    boxed = Record((picture(tmp_path / "b.png", seed=1),), SIZE_HW, (Instance("cat", (3, 4, 33, 34)),))
    for split in ("train", "valid"):
        write_coco([record], tmp_path / "texts", split=split)
        write_coco([boxed], tmp_path / "boxes", split=split)
    sources = {"a": {"data": "texts", "task": "caption"}, "b": {"data": "boxes", "task": "detect"}}
    (tmp_path / "mixture.yaml").write_text(json.dumps({"sources": sources}))
    valid = open_rows(tmp_path / "mixture.yaml")["valid"]
    assert write_split(valid, tmp_path / "rows", to="jsonl").n_rows == 5
    write_split(valid, tmp_path / "back", to="coco")
    back = all_of(open_data(tmp_path / "back")["train"])
    assert [len(one.texts) for one in back] == [4, 0]
    assert back[1].instances[0].box_xyxy_px == (3, 4, 33, 34)
    assert check({"valid": valid}).n_rows == {"valid: source 1": 1, "valid: source 2": 1}


@pytest.mark.parametrize("to", ["yolo", "voc", "coco"])
def test_a_mask_that_is_none_costs_its_record_alone(tmp_path, to):
    bad = Instance("cat", (1, 1, 9, 9), Mask(SIZE_HW, ((1, 1, 9, 9),)))
    records = [Record((picture(tmp_path / "a.png"),), SIZE_HW, (bad,), where="image 1"),
               Record((picture(tmp_path / "b.png", seed=1),), SIZE_HW, (Instance("cat", (1, 1, 9, 9)),))]  # fmt: skip
    with pytest.raises(DataError, match=r"image 1: cat: .*three corners"):
        write_split(Listed(records), tmp_path / "out", to=to)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    done = write_split(Listed(records), tmp_path / "out", to=to, skip_broken=True)
    assert (done.n_rows, len(done.problems)) == (1, 1)


class Listed(list):
    """Records that were made by hand."""

    labels = ("cat",)


@pytest.mark.parametrize("to", ["jsonl", "parquet", "hf", "wds", "coco", "yolo", "voc"])
def test_half_a_character_costs_its_row_alone(tmp_path, to):
    said = [Example((picture(tmp_path / f"{i}.png", seed=i),), "detect x", f"{CAT[:36]} {label}", where=f"row {i}")
            for i, label in enumerate(["cat", "cut \ud83d"])]  # fmt: skip
    beside = picture(tmp_path / "2.png", seed=2)
    said.append(Example((beside,), "detect x", f"{CAT[:36]} cat", meta={"notes": ["cut \ud83d"]}))
    with pytest.raises(DataError, match=r"row 1.*half of a character"):
        write_split(said, tmp_path / "out", to=to)
    done = write_split(said, tmp_path / "again", to=to, skip_broken=True)
    assert (done.n_rows, len(done.problems)) == (1, 2)


def test_pixels_that_several_rows_show_are_written_once(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    other = pixels.reshape(9, 8, 3)  # the same bytes in another shape
    said = [Example((image,), "caption en", str(i), meta={"id": f"7-{i}", "record_id": "7"})
            for i, image in enumerate([pixels, pixels.copy(), other])]  # fmt: skip
    write_jsonl(said, tmp_path / "out")
    source = find_splits(tmp_path / "out")["train"]
    assert [row.images[0].name for row in all_of(source)] == ["7.png", "7.png", "7-1.png"]


@pytest.mark.parametrize("to", ["wds", "voc", "jsonl", "parquet", "hf"])
def test_a_split_that_breaks_off_leaves_what_was_there(tmp_path, to):
    def rows(n: int, broken: bool) -> list[Example]:
        found = [
            Example((picture(tmp_path / f"{i}.png", seed=i),), "detect cat", CAT, where=f"row {i}") for i in range(n)
        ]
        return (
            [*found, Example((tmp_path / "missing.png",), "detect cat", CAT, where="the last row")] if broken else found
        )

    out = tmp_path / "out"
    with pytest.raises(DataError):
        write_split(rows(2, True), out, to=to)
    assert not [file for file in out.rglob("*") if file.is_file()] or to == "jsonl"
    write_split(rows(2, False), out, to=to, overwrite=to == "jsonl")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(DataError):
        write_split(rows(3, True), out, to=to, overwrite=True)
    after = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert before.items() <= after.items()
    assert to == "jsonl" or before == after


def test_rows_that_a_format_leaves_out_are_not_counted_as_written(tmp_path):
    path = picture(tmp_path / "a.png")
    done = write_split(Listed([Record((path, path)), Record((path,))]), tmp_path / "out", to="coco")
    assert done.n_rows == 1


def test_a_question_that_nobody_answered_is_no_loss(tmp_path):
    asked = (Asked("who?", ()), Asked("what?", ("cat", "a cat")))
    write_coco([Record((picture(tmp_path / "a.png"),), SIZE_HW, questions=asked)], tmp_path / "coco")
    made = convert(tmp_path / "coco", tmp_path / "rows", to="jsonl", build=BUILDERS["answer"])
    assert (made.n_rows, made.left_out) == ({"train": 1}, {})
    made = convert(tmp_path / "coco", tmp_path / "asked", to="jsonl", build=BUILDERS["question"])
    assert made.left_out == {"further answers": 1}


def test_every_expression_of_a_record_is_written(tmp_path):
    mask = np.zeros(SIZE_HW, bool)
    mask[5:20, 5:20] = True
    things = tuple(Instance(f"the cat {i}", (5, 5, 20, 20), Mask.of(mask)) for i in range(3))
    write_coco([Record((picture(tmp_path / "a.png"),), SIZE_HW, things)], tmp_path / "coco")
    referring = builder_of("referring", mask_encoder=lambda crops: np.zeros((len(crops), 16), np.int64))
    made = convert(tmp_path / "coco", tmp_path / "rows", to="jsonl", build=referring)
    assert made.n_rows == {"train": 3}
    assert not made.left_out.get("masks")
    rows = all_of(find_splits(tmp_path / "rows")["train"])
    assert sorted(row.prefix for row in rows) == [thing.label for thing in things]


def test_prompts_that_read_anything_do_not_break_the_count(tmp_path):
    thing = Instance("x", (0, 0, 9, 9), Mask.of(np.ones(SIZE_HW, bool)))
    record = Record((picture(tmp_path / "a.png"),), SIZE_HW, (thing,), (Text("a"),))
    write_coco([record], tmp_path / "coco")
    referring = builder_of("referring", mask_encoder=lambda crops: np.zeros((len(crops), 16), np.int64))
    for number, both in enumerate(((referring, BUILDERS["caption"]), (BUILDERS["caption"], referring))):
        made = convert(tmp_path / "coco", tmp_path / str(number), to="jsonl", build=OneOf(both))
        assert (made.n_rows, made.left_out) == ({"train": 2}, {})


def test_coco_keeps_the_numbers_of_pictures_where_they_are_free(tmp_path):
    ids = ["139", "", "0139", "139", "2", "x"]
    records = [Record((picture(tmp_path / f"{i}.png", seed=i),), SIZE_HW, id=id) for i, id in enumerate(ids)]
    write_coco(records, tmp_path / "coco")
    tree = json.loads((tmp_path / "coco" / "train" / "_annotations.coco.json").read_text())
    numbers = [image["id"] for image in tree["images"]]
    assert numbers == [139, 1, 2, 3, 4, 5]
    assert len(set(numbers)) == len(ids)


def test_losses_that_no_rule_of_a_format_names_are_counted_too(tmp_path):
    unlike = Instance("x", (10, 10, 50, 40), Mask(SIZE_HW, polygons=((20, 20, 40, 20, 30, 39.0),)))
    record = Record(
        (picture(tmp_path / "a.png"),), SIZE_HW, (unlike,), meta={"camera": "left", "when": np.datetime64("2024-01-01")}
    )
    left_out = {}
    for write in (write_yolo, write_voc, write_coco):
        left_out[write] = Counter()
        write([record], tmp_path / write.__name__, left_out=left_out[write])
    meta = {"meta 'camera'": 1, "meta 'when'": 1}
    assert +left_out[write_yolo] == {"boxes unlike their outlines": 1, **meta}
    assert +left_out[write_voc] == meta
    assert +left_out[write_coco] == {"meta 'when'": 1}
    (back,) = all_of(open_data(tmp_path / "write_yolo")["train"])
    assert back.instances[0].box_xyxy_px == (20, 20, 40, 39)


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "jsonl"])
def test_fields_of_single_annotations_are_counted_as_lost(tmp_path, coco, to):
    file = coco / "train" / "_annotations.coco.json"
    tree = json.loads(file.read_text())
    n = len(tree["annotations"])
    tree["annotations"] = [{**note, "score": 0.5, "attributes": {"wet": True}} for note in tree["annotations"]]
    file.write_text(json.dumps(tree))
    build = BUILDERS["detect"] if to == "jsonl" else None
    lost = convert(coco, tmp_path / "out", to=to, build=build).left_out
    assert (lost["'score' of single annotations"], lost["'attributes' of single annotations"]) == (n, n)


@pytest.mark.parametrize("to", ["jsonl", "wds"])
def test_fields_that_a_format_has_for_itself_are_counted(tmp_path, to):
    taken = {"weight": "3 kg", "prefix": "Dr", "image": "scan"}
    said = Example((picture(tmp_path / "a.png"),), "caption en", "a", meta={**taken, "by": "me"})
    done = write_split([said], tmp_path / "out", to=to)
    assert done.left_out == {f"meta '{key}'": 1 for key in taken}
    assert open_data(tmp_path / "out")["train"][0].meta["by"] == "me"


def test_what_further_rows_of_a_picture_say_otherwise_is_counted(tmp_path):
    shown = picture(tmp_path / "a.png")
    rows = [Example((shown,), "detect cat", f"{CAT[:36]} cat", meta={"id": f"r{i}", "source": by, "n": 1})
            for i, by in enumerate(("A", "B"))]  # fmt: skip
    done = write_split(rows, tmp_path / "out", to="coco")
    assert done.left_out == {"ids of further rows of a picture": 1, "meta 'source'": 1}
    taken = Record((shown,), SIZE_HW, meta={"width": "broad", "file_name": "x"})
    left_out = Counter()
    write_coco([taken], tmp_path / "taken", left_out=left_out)
    assert +left_out == {"meta 'width'": 1, "meta 'file_name'": 1}


@pytest.mark.parametrize("to", ["wds", "parquet", "jsonl", "hf", "coco"])
def test_a_broken_picture_costs_its_row_alone(tmp_path, to):
    (tmp_path / "b.jpg").write_text("no picture")
    rows = [Example((path,), "detect cat", f"{CAT[:36]} cat", where=path.name)
            for path in (picture(tmp_path / "a.png"), tmp_path / "b.jpg")]  # fmt: skip
    done = write_split(rows, tmp_path / "out", to=to, skip_broken=True)
    kept = to in ("parquet", "jsonl", "hf")  # which copy files unseen: `data check` finds it there
    assert (done.n_rows, len(done.problems)) == ((2, 0) if kept else (1, 1))


@pytest.mark.parametrize("write", [write_coco, write_yolo, write_voc])
def test_records_of_several_pictures_are_counted(tmp_path, write):
    path = picture(tmp_path / "a.png")
    left_out = Counter()
    write([Record((path, path)), Record((path,)), Record(())], tmp_path / "out", labels=("x",), left_out=left_out)
    assert left_out["records of no picture or of several"] == 2


def rows(folder, *said):
    picture(folder / "a.png")
    picture(folder / "b.png", seed=1)
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in said))
    return folder


A, CAT, DOG = {"image": "a.png"}, "<loc0000><loc0000><loc0512><loc0512> cat", "<loc0100><loc0100><loc0300><loc0300> dog"


def test_rows_of_one_picture_become_one_record(tmp_path):
    path = rows(
        tmp_path / "rows",
        A | {"prefix": "detect cat", "suffix": CAT},
        {"image": "b.png", "prefix": "detect cat", "suffix": ""},
        A | {"prefix": "detect cat ; dog", "suffix": f"{CAT} ; {DOG}"},
        A | {"prefix": "caption en", "suffix": "a cat"},
        A | {"prefix": "caption en", "suffix": "a cat"},
        A | {"prefix": "caption de", "suffix": "eine Katze"},
        A | {"prefix": "answer en where is it?", "suffix": "here"},
        A | {"prefix": "ocr", "suffix": "EXIT NOW"},
    )
    convert(path, tmp_path / "out", to="coco")
    one, two = all_of(open_data(tmp_path / "out")["train"])
    assert [i.label for i in one.instances] == ["cat", "dog"]
    assert one.texts == (Text("a cat"), Text("eine Katze", "de"))
    assert [asked.question for asked in one.questions] == ["where is it?"]
    assert [word.text for word in one.words] == ["EXIT", "NOW"]
    assert two.instances == ()


def test_rows_that_say_nothing_about_the_picture_are_reported(tmp_path):
    path = rows(
        tmp_path / "rows",
        A | {"prefix": "what is it?", "suffix": "a cat"},
        A | {"prefix": "detect cat", "suffix": "<loc0000><loc0000> cat"},
        A | {"prefix": "detect cat", "suffix": CAT},
        {"image": None, "prefix": "hello", "suffix": "you"},
    )
    done = convert(path, tmp_path / "out", to="yolo")
    assert len(done.problems) == 2
    assert "train.jsonl line 1: the prompt 'what is it?' says nothing" in done.problems[0]
    assert "train.jsonl line 2" in done.problems[1]
    assert done.left_out == {"rows without a picture": 1}
    assert len(open_data(tmp_path / "out")["train"][0].instances) == 1


def test_masks_that_nobody_can_read_are_counted(tmp_path):
    path = rows(tmp_path, A | {"prefix": "segment cat", "suffix": CAT.replace(" cat", " " + "<seg001>" * 16 + " cat")})
    done = convert(path, tmp_path / "out", to="voc")
    assert done.left_out == {"masks": 1}
    assert [i.label for i in open_data(tmp_path / "out")["train"][0].instances] == ["cat"]


def test_a_broken_row_stops_or_is_reported(tmp_path, coco):
    (coco / "train" / "leer.png").unlink(missing_ok=True)
    next((coco / "train").glob("*.png")).unlink()
    with pytest.raises(DataError, match="is not in"):
        convert(coco, tmp_path / "out", to="yolo")
    assert not (tmp_path / "out" / "data.yaml").exists()
    done = convert(coco, tmp_path / "out", to="yolo", skip_broken=True)
    assert (len(done.problems), done.n_rows["train"]) == (1, 3)
    assert "is not in" in done.problems[0]


def test_records_without_what_the_prompt_needs_are_counted(tmp_path, coco):
    with pytest.raises(DataError, match="no examples"):
        convert(coco, tmp_path / "out", to="jsonl", build=BUILDERS["caption"])
    assert not list((tmp_path / "out").glob("*.jsonl"))
    made = convert(
        coco, tmp_path / "own", to="jsonl",
        build=lambda record, rng, labels: Example(record.images, "how many?", str(len(record.instances)))
        if record.instances else None,
    )  # fmt: skip
    assert made.left_out == {"records without what the prompt needs": 1}


def test_choices_that_make_no_sense_are_refused(tmp_path, coco):
    for options, message in (
        ({"to": "jsonl"}, "expected a builder"),
        ({"to": "yol"}, "Did you mean 'yolo'"),
        ({"to": "yolo", "format": "coc"}, "Did you mean 'coco'"),
        ({"to": "yolo", "image": "x"}, "Did you mean 'images'"),
    ):
        with pytest.raises(OptionError, match=message):
            convert(coco, tmp_path / "out", **options)
    with pytest.raises(OptionError, match="is the data itself"):
        convert(coco, coco, to="yolo")
    convert(coco, tmp_path / "out", to="yolo")
    with pytest.raises(OptionError, match="is there already"):
        convert(coco, tmp_path / "out", to="yolo")
    convert(coco, tmp_path / "out", to="yolo", overwrite=True)


@pytest.mark.parametrize("to", [name for name, writer in WRITERS.items() if writer.holds == "records"])
def test_what_is_written_is_known_again_by_its_content(tmp_path, coco, to):
    convert(coco, tmp_path / "out", to=to)
    assert sniff(tmp_path / "out") == to.removesuffix("_official")


def test_single_files_are_known_by_their_content(tmp_path, coco):
    convert(coco, tmp_path / "yolo", to="yolo")
    path = rows(tmp_path / "rows", A | {"prefix": "p", "suffix": "s"})
    assert sniff(coco / "train" / "_annotations.coco.json") == "coco"
    assert sniff(tmp_path / "yolo" / "data.yaml") == "yolo"
    assert sniff(path / "train.jsonl") == "jsonl"


SPOILS = {  # format: what becomes of its held-out split
    "jsonl": lambda folder: (folder / "test.jsonl").write_text(""),
    "coco": lambda folder: (folder / "test" / "_annotations.coco.json").write_text("{"),
    "yolo": lambda folder: (folder / "data.yaml").write_text(
        (folder / "data.yaml").read_text().replace("images/val", "images/none")
    ),
    "voc": lambda folder: (folder / "ImageSets" / "Main" / "test.txt").write_text(""),
    "parquet": lambda folder: (folder / "test.parquet").write_bytes(b"PAR1"),
    "wds": lambda folder: (folder / "test-000000.tar").write_bytes(b""),
}


@pytest.mark.parametrize("to", SPOILS)
def test_a_split_that_cannot_be_opened_is_an_error_or_kept_apart(tmp_path, coco, to):
    folder, build = tmp_path / f"as-{to}", BUILDERS["detect"] if WRITERS[to].holds == "examples" else None
    convert(coco, folder, to=to, build=build)
    (folder / "test").mkdir(exist_ok=True)
    SPOILS[to](folder)
    with pytest.raises(DataError):
        open_data(folder)
    failed = {}
    found = open_data(folder, failed=failed)
    assert found.keys() | failed.keys() >= {"train", "valid"}
    assert "train" in found
    assert list(failed) == ["valid" if to == "yolo" else "test"]


def test_what_is_no_data_set_or_several_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_data(tmp_path / "none")
    with pytest.raises(DataError, match="no format that is known"):
        open_data(tmp_path)
    rows(tmp_path, A | {"prefix": "p", "suffix": "s"})
    write_coco([Record((picture(tmp_path / "a.png"),))], tmp_path)
    with pytest.raises(OptionError, match="holds jsonl and coco: expected to be told which"):
        open_data(tmp_path)
    assert len(open_data(tmp_path, format="coco", allow_outside=False, one_based=None)["train"]) == 1
    assert set(READERS) >= {"jsonl", "coco", "yolo", "voc"}


def test_rows_are_written_with_their_pictures(tmp_path):
    one, two = picture(tmp_path / "1" / "a b.png"), picture(tmp_path / "2" / "a b.png", seed=1)
    examples = [
        Example((one,), "p", "s ü", 2.0, meta={"id": 5, "odd": {1, 2}}),
        Example((two, one), "p", "sss", unlearned=((0, 2),)),
        Example((), "p", "s"),
        Example((np.zeros((4, 4, 3), np.uint8),), "p", "s"),
    ]
    file = write_jsonl(examples, tmp_path / "out")
    write_jsonl(examples, tmp_path / "out", "val")
    assert list(find_splits(tmp_path / "out")) == ["train", "valid"]
    for source in find_splits(tmp_path / "out").values():
        new = all_of(source)
        assert [(e.prefix, e.suffix, e.weight) for e in new] == [(e.prefix, e.suffix, e.weight) for e in examples]
        assert [[p.name for p in e.images] for e in new[:3]] == [["a b.png"], ["a b-1.png", "a b.png"], []]
        assert new[0].meta == {"id": 5}
        assert new[1].images[0].read_bytes() == two.read_bytes()
    assert Jsonl(file)[1].unlearned == ((0, 2),)


def test_a_picture_that_is_there_is_never_replaced_by_another(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    file = write_jsonl([Example((picture(tmp_path / "a.png"),), "p", "s")], tmp_path / "out")
    assert (tmp_path / "out" / "a.png").read_bytes() == b"mine"
    assert Jsonl(file)[0].images[0].name == "a-1.png"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_annotations.train.jsonl", "a-1.png", "a.png",
    ]  # fmt: skip


def test_names_are_unique_on_disks_that_do_not_tell_a_from_capital_a():
    names = Names(["taken.png"], by_stem=True)
    given = [names.of(name) for name in ("A.png", "a.jpg", "a.png", "TAKEN.jpg", "x\n.png")]
    assert given == ["A.png", "a-1.jpg", "a-2.png", "TAKEN-1.jpg", "x_.png"]


def test_the_nearest_name_is_found_in_the_folder_that_was_named(tmp_path):
    picture(tmp_path / "images" / "sub" / "cat_0001.png")
    assert picture_path(tmp_path, "sub/cat_0001.png", "row 1") == tmp_path / "images" / "sub" / "cat_0001.png"
    with pytest.raises(DataError, match=r"row 1: .*Did you mean 'sub/cat_0001\.png'"):
        picture_path(tmp_path, "sub/cat_001.png", "row 1")


def test_a_source_with_prompts_is_written_as_it_is_and_read_back(tmp_path, coco):
    built = Built(open_data(coco)["train"], BUILDERS["detect"], skip_empty=True)
    done = write_split(built, tmp_path / "rows", to="jsonl")
    assert (done.n_rows, done.problems, done.left_out.get("masks")) == (len(built), (), None)
    again = write_split(Jsonl(done.file), tmp_path / "voc", to="voc", split="valid")
    assert again.n_rows == len(built)
    assert list(open_data(tmp_path / "voc")) == ["valid"]


def test_records_are_read_lazily_from_examples(tmp_path):
    source = Jsonl(rows(tmp_path, A | {"prefix": "detect cat", "suffix": CAT}) / "train.jsonl")
    (record,) = read_records(source)
    assert (record.size_hw, [i.label for i in record.instances]) == (SIZE_HW, ["cat"])
