"""`check` finds each kind of fault, counts it, and finds nothing where nothing is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paligemma.data.builders import Built
from paligemma.data.check import check
from paligemma.data.duplicates import Twins, near_twins
from paligemma.data.findings import KINDS, table_lines
from paligemma.data.labels import likely_typos, one_edit
from paligemma.data.mixture import Mixture, Part
from paligemma.data.record import Asked, Instance, Mask, Record, Text, Word
from paligemma.data.rows import builders_of, no_codes
from paligemma.data.sources.jsonl import Jsonl
from paligemma.data.sources.tars import Tars, write_tars
from paligemma.data.world import render, sample_scene
from paligemma.errors import OptionError

BOX = "<loc0100><loc0100><loc0500><loc0600>"
TURNED = "<loc0500><loc0100><loc0100><loc0600>"


class Records:
    """Records that were made by hand."""

    labels = ("cat", "dog")

    def __init__(self, *records: Record) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def drawn(seed: int) -> np.ndarray:
    return render(sample_scene(seed, "full")).image


def folder(path: Path, rows: list[object], pictures: int = 3, first: int = 0, name: str = "train.jsonl") -> Jsonl:
    path.mkdir(exist_ok=True)
    for i in range(pictures):
        Image.fromarray(drawn(first + i)).save(path / f"{i}.png")
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (path / name).write_bytes(b"\n".join(lines))
    return Jsonl(path / name)


def row(image: str = "0.png", prefix: str = "caption en", suffix: str = "a cat", **more: object) -> dict[str, object]:
    return {"image": image, "prefix": prefix, "suffix": suffix, **more}


def test_nothing_is_found_where_nothing_is_wrong(tmp_path):
    source = folder(
        tmp_path, [row(), row("1.png"), row("2.png", "detect cat", f"{BOX} cat"), row(prefix="ocr", suffix="")]
    )
    findings = check({"train": source})
    assert findings.found == []
    assert findings.n_rows == {"train": 4}
    assert findings.n_pictures == {"train": 3}
    assert findings.labels["train"] == {"cat": 1}
    assert "nothing found" in table_lines(findings)


@pytest.mark.parametrize(
    ("faulty", "kind"),
    [
        (row("nowhere.png"), "missing picture"),
        (row("/etc/hostname"), "path outside"),
        (row("../secret.png"), "path outside"),
        ({"image": "0.png", "prefix": "caption en", "sufix": "a cat"}, "wrong column"),
        ({"picture": "0.png", "prefix": "caption en", "suffix": "a cat"}, "wrong column"),
        (row(suffix=3), "wrong column"),
        (b'{"image": "0.png", "prefix": "caption en", "suffix": "\xff\xfe"}', "not UTF-8"),
        (b'{"image": "0.png", ', "unreadable row"),
        (row("broken.png"), "broken picture"),
        (row("empty.png"), "broken picture"),
        (row(suffix="  "), "empty suffix"),
        (row(prefix="detect cat", suffix=f"{TURNED} cat"), "turned-over box"),
        (row(prefix="detect cat", suffix=BOX[:27] + " cat"), "malformed suffix"),
    ],
)
def test_each_fault_of_a_row_is_found_and_counted(tmp_path, faulty, kind):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrest is missing")
    (tmp_path / "empty.png").write_bytes(b"")
    findings = check({"train": folder(tmp_path, [row(), faulty, row("1.png"), faulty])})
    assert findings.counts == {kind: 1 if kind == "broken picture" else 2}
    assert findings.n_errors == (0 if KINDS[kind][0] == "warning" else findings.counts[kind])
    (line,) = [line for line in table_lines(findings) if line.startswith(("error: ", "warning: "))]
    assert line.startswith(f"{KINDS[kind][0]}: {kind} ×")


def test_faults_of_annotations_are_found():
    picture = drawn(1)
    height, width = picture.shape[:2]

    def record(name: str, *instances: Instance, **more: object) -> Record:
        return Record((picture,), (height, width), tuple(instances), where=name, **more)

    whole = Mask.of(np.ones((height, width), bool))
    findings = check(
        {
            "train": Records(
                record("fine", Instance("cat", (1, 1, 20, 20), whole), id="1"),
                record("turned", Instance("cat", (20, 1, 1, 20))),
                record("negative", Instance("cat", (-30, 1, 20, 20))),
                record("outside", Instance("cat", (width + 5, 1, width + 9, 20))),
                record("flat", Instance("cat", (5, 5, 5, 9))),
                record("short mask", Instance("cat", (1, 1, 20, 20), Mask((height, width), counts=(5, 5)))),
                record("two corners", Instance("cat", (1, 1, 20, 20), Mask((height, width), ((1, 1, 5, 5),)))),
                record("label", Instance("cat;dog", (1, 1, 20, 20))),
                record("again", id="1"),
                record("no words", texts=(Text(" "),)),
                record("flat word", words=(Word("STOP", (5, 5, 5, 9)),)),
                record("region outside", texts=(Text("far", box_xyxy_px=(width + 5, 1, width + 9, 20)),)),
            )
        }
    )
    assert findings.counts == {
        "bad mask": 2, "turned-over box": 3, "box outside": 2, "bad label": 1, "duplicate id": 1,
        "box over the edge": 1, "empty suffix": 1,
    }  # fmt: skip


@pytest.mark.parametrize("turn", [1, 3, 6])
def test_boxes_on_a_picture_that_is_turned_when_opened_are_worth_a_look(tmp_path, turn):
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[0x0112] = turn
    Image.new("RGB", (40, 40), "red").save(path, exif=exif)
    cat = Record((path,), (40, 40), (Instance("cat", (1, 1, 20, 20)),), where="cat")
    found = check({"train": Records(cat, Record((path,), (40, 40), texts=(Text("a cat"),), where="text"))})
    assert found.counts == ({} if turn == 1 else {"turned by EXIF": 1})


def test_half_a_character_is_found(tmp_path):
    assert check({"train": folder(tmp_path, [row(suffix="cut \ud83d"), row("1.png")])}).counts == {"not UTF-8": 1}


def test_texts_beyond_the_limit_are_measured_by_the_given_tokenizer(tmp_path):
    source = folder(tmp_path, [row(suffix="one two three"), row(suffix="one")])
    findings = check({"train": source}, length=lambda example: len(example.suffix.split()), max_text=2)
    assert findings.counts == {"text too long": 1}
    assert "3 tokens, 2 are seen" in findings.found[0].message


def test_pictures_that_turn_up_in_two_splits_are_found_by_their_content(tmp_path):
    train = folder(tmp_path / "train", [row(), row("1.png"), row("2.png")])
    valid = folder(tmp_path / "valid", [row("same.bmp"), row("small.jpg"), row("new.png")], pictures=0)
    picture = Image.open(tmp_path / "train" / "1.png")
    picture.save(tmp_path / "valid" / "same.bmp")
    smaller = Image.open(tmp_path / "train" / "2.png")
    smaller.resize((smaller.width * 3 // 4, smaller.height * 3 // 4)).save(tmp_path / "valid" / "small.jpg", quality=85)
    Image.fromarray(drawn(77)).save(tmp_path / "valid" / "new.png")
    findings = check({"train": train, "valid": valid})
    assert findings.counts == {"same picture in two splits": 1, "similar pictures in two splits": 1}
    (exact,), (near,) = (findings.of(f"{word} in two splits") for word in ("same picture", "similar pictures"))
    assert "line 1 shows the picture of train: train.jsonl line 2" in exact.message
    assert "line 2 looks like train: train.jsonl line 3" in near.message


def test_different_pictures_are_not_taken_for_each_other():
    twins = Twins()
    for seed in range(40):
        twins.add("train" if seed % 2 else "valid", str(seed), drawn(seed))
    assert list(near_twins(twins)) == []
    assert list(twins.exact()) == []


def test_labels_that_look_like_misspellings():
    counts = {
        "bicycle": 50,
        "bicylce": 2,
        "Bicycle": 1,
        "dogs": 3,
        "dog": 30,
        "cat": 40,
        "car": 2,
        "grass": 9,
        "gras": 1,
    }
    assert set(likely_typos(counts)) == {
        ("bicylce", "bicycle"),
        ("Bicycle", "bicycle"),
        ("dogs", "dog"),
        ("gras", "grass"),
    }
    assert one_edit("abcde", "abde")
    assert one_edit("abcde", "abdce")
    assert not one_edit("abcde", "abcde")
    assert not one_edit("abcde", "badce")


def test_labels_that_train_never_shows(tmp_path):
    train = folder(tmp_path / "a", [row("0.png", "detect cat", f"{BOX} cat")])
    valid = folder(tmp_path / "b", [row("0.png", "detect dog", f"{BOX} dog")], first=50)
    findings = check({"train": train, "valid": valid})
    assert findings.counts == {"label only held out": 1}
    assert findings.to_dict()["findings"][0]["examples"][0]["message"] == "'dog': 1 times in valid, never in train"


def test_faults_of_tars_and_clips_are_found(tmp_path):
    rows = folder(tmp_path / "rows", [row(), row("1.png"), row("2.png")])
    (shard,) = write_tars([rows[i] for i in range(3)], tmp_path / "tars")
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) * 2 // 3])
    findings = check({"train": Tars(shard)})
    assert findings.counts == {"cut archive": 1}
    assert findings.n_errors >= 1
    clips = folder(tmp_path / "clips", [{"video": "frames", "prefix": "caption en", "suffix": "a cat"}], pictures=0)
    (tmp_path / "clips" / "frames").mkdir()
    assert check({"train": clips}).counts == {"no frames": 1}


def test_sources_of_a_mixture_may_share_pictures_and_labels(tmp_path):
    rows = folder(tmp_path, [row(prefix="detect cat", suffix=f"{BOX} cat"), row("1.png")])
    mixture = Mixture({"boxes": Part(source=rows), "texts": Part(source=rows)})
    assert check({"train": mixture}).counts == {}
    held_out = folder(tmp_path / "held", [row(prefix="detect cow", suffix=f"{BOX} cow")])
    found = check({"train": mixture, "valid": held_out})
    assert found.counts == {"same picture in two splits": 1, "label only held out": 1}


def test_what_only_a_builder_refuses_is_told(tmp_path):
    picture = drawn(1)
    size = picture.shape[:2]
    fine = Mask.of(np.ones(size, bool))
    records = Records(
        Record((picture,), size, (Instance("cat", (1, 1, 20, 20), fine),), where="fine"),
        Record((picture,), size, (Instance("cat", (1, 1, 20, 20)),), where="bare"),
    )
    builder = builders_of("segment", {}, no_codes)
    (found,) = check({"train": Built(records, builder)}).found
    assert found.kind == "unreadable row"
    assert found.message.startswith("bare: 1 of 1 instances have no mask")
    with pytest.raises(OptionError, match="'segment' without mask_encoder"):
        check({"train": Built(records, builders_of("segment", {}))})


def test_every_text_and_every_task_is_looked_at():
    """Training shows another caption in each epoch; what is wrong with any of them is found at once."""
    picture = drawn(0)
    texts = tuple(Text(f"caption {i}" + " long" * (100 * (i == 3))) for i in range(5))
    things = (Instance("cat", (4.0, 4.0, 20.0, 20.0)),)
    records = Records(*(Record((picture,), (112, 112), things, texts=texts, where=f"r{i}") for i in range(6)))
    built = Built(records, builders_of("detect,caption", {}))
    found = check({"train": built}, length=lambda example: len(example.suffix.split()), max_text=50, decode=False)
    assert found.counts == {"text too long": 6}


def test_a_mask_that_is_none_costs_its_own_record_alone_whatever_is_asked_of_it():
    """Which expressions a record has depends on its masks."""
    pictures = [np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 9, np.uint8)]
    masks = [Mask((40, 40), counts=(5,)), Mask.of(np.pad(np.ones((16, 16), bool), ((4, 20), (4, 20))))]
    things = [Instance("cat", (4.0, 4.0, 20.0, 20.0), mask) for mask in masks]
    records = Records(*(Record((pictures[i],), (40, 40), (things[i],), where=f"r{i}") for i in range(2)))
    built = Built(records, builders_of("referring", {"without_mask": "skip"}, mask_encoder=no_codes))
    found = check({"train": built})
    assert found.counts == {"bad mask": 1}
    assert found.tasks["train"].total() == 1, "the other record is asked about"


def test_what_no_prompt_says_may_hold_half_a_character(tmp_path):
    """It is learned by nobody; a conversion, which would have to write it, refuses it."""
    turned = row(prefix="detect cat", suffix=f"{TURNED} cat", tweet="cut \ud83d")
    assert check({"train": folder(tmp_path, [row(tweet="cut \ud83d"), turned])}).counts == {"turned-over box": 1}


def test_half_a_character_is_found_wherever_a_record_has_it():
    half = "ok \ud83d"
    made = (
        {"instances": (Instance(half, (4.0, 4.0, 20.0, 20.0)),)},
        {"texts": (Text("a"), Text(half))},
        {"questions": (Asked("what?", ("yes", half)),)},
    )
    records = Records(*(Record((drawn(i),), (112, 112), where=f"r{i}", **fields) for i, fields in enumerate(made)))
    assert check({"train": records}).of("not UTF-8")
    assert check({"train": records}).counts["not UTF-8"] == len(made)
    built = Built(records, builders_of("caption", {}))
    assert check({"train": built}).counts["not UTF-8"] == len(made), "told once, not with each of its captions"


def test_clips_are_told_by_all_of_their_frames():
    """Many begin with the same black frame."""
    black = np.zeros((24, 32, 3), np.uint8)

    def clip(*seeds: int) -> Record:
        return Record((black, *(np.resize(drawn(seed), (24, 32, 3)) for seed in seeds)), where=f"clip {seeds}")

    apart = {"train": Records(clip(1, 2)), "valid": Records(clip(3, 4))}
    assert check(apart).of("same picture in two splits") == []
    same = {"train": Records(clip(1, 2)), "valid": Records(clip(1, 2))}
    assert len(check(same).of("same picture in two splits")) == 1


def test_misspelt_labels_and_pictures_shown_twice_are_found_in_a_data_set(tmp_path):
    rows = [row(f"{i}.png", "detect bicycle", f"{BOX} bicycle") for i in range(6)]
    source = folder(tmp_path, [*rows, row("again.png", "detect bicylce", f"{BOX} bicylce")], pictures=6)
    (tmp_path / "again.png").write_bytes((tmp_path / "0.png").read_bytes())
    findings = check({"train": source})
    assert findings.counts == {"likely typo": 1, "same picture twice": 1}
    assert findings.n_errors == 0
    lines = table_lines(findings)
    assert any("'bicylce' (1 times) may mean 'bicycle' (6 times)" in line for line in lines)
    balance = lines[next(i for i, line in enumerate(lines) if line.split()[:1] == ["label"]) + 1 :][:2]
    assert [line.split() for line in balance] == [["bicycle", "6"], ["bicylce", "1"]]
