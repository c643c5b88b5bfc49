"""From what a user names to examples: prompts as they are, annotations through builders, mixtures from YAML."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml

from paligemma.data.augment import AugmentOptions
from paligemma.data.convert import write_split
from paligemma.data.example import Example
from paligemma.data.mixture import Mixture
from paligemma.data.record import Record, Word
from paligemma.data.rows import open_rows
from paligemma.data.sources.coco_write import write_coco
from paligemma.data.sources.parquet import write_parquet
from paligemma.data.world.records import WorldRecords
from paligemma.errors import DataError, OptionError
from tests.training_runs import write_rows


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_split(WorldRecords(6), folder, to="coco", split="train")
    write_split(WorldRecords(3, split="held_out"), folder, to="coco", split="valid")
    return folder


def test_annotations_become_prompts_of_the_task(coco):
    found = open_rows(coco, task="detect", task_fields=(("order", "raster"),))
    assert {split: len(source) for split, source in found.items()} == {"train": 6, "valid": 3}
    example = found["train"][0]
    assert example.prefix.startswith("detect ")
    assert example.suffix.startswith("<loc")
    again = open_rows(coco, task="detect", task_fields=(("order", "raster"),))["train"]
    assert [again[i].suffix for i in range(6)] == [found["train"][i].suffix for i in range(6)]


def test_several_tasks_are_drawn_from_anew_in_every_pass(coco):
    source = open_rows(coco, task="detect, caption,count")["train"]
    words = {source.varied(i, epoch).prefix.split()[0] for i in range(6) for epoch in range(8)}
    assert words == {"detect", "caption", "answer"}


def test_only_the_train_split_is_augmented(coco):
    plain, changed = (open_rows(coco, task="detect", augmentation=o) for o in (None, AugmentOptions(crop=1.0)))
    assert any(plain["train"][i].suffix != changed["train"][i].suffix for i in range(6))
    assert all(plain["valid"][i] == changed["valid"][i] for i in range(3))


def test_what_a_question_says_of_left_does_not_keep_boxes_from_being_mirrored(coco):
    flipped = AugmentOptions(flip=1.0)
    plain, mirrored = (open_rows(coco, task="detect", augmentation=o)["train"] for o in (None, flipped))
    assert all(plain[i].suffix != mirrored[i].suffix for i in range(6))
    asked, same = (open_rows(coco, task="answer", augmentation=o)["train"] for o in (None, flipped))
    told = [i for i in range(6) if any("left" in q.question for q in asked.records[i].questions)]
    assert told  # `coco` asks what is left of things
    assert all(asked[i].images == same[i].images for i in told)


def test_prompts_refuse_a_task_and_annotations_want_one(coco, tmp_path):
    write_rows(tmp_path, 3)
    assert open_rows(tmp_path)["train"][0].prefix == "caption en"
    with pytest.raises(OptionError, match="holds prompts already"):
        open_rows(tmp_path, task="detect")
    with pytest.raises(DataError, match=r"holds annotations and no prompts: expected a task.*--task detect"):
        open_rows(coco)
    with pytest.raises(OptionError, match=r"has no field 'ordr'.*Did you mean 'order'"):
        open_rows(coco, task="detect", task_fields=(("ordr", "raster"),))


def test_a_mixture_of_formats_is_one_source(coco, tmp_path):
    write_rows(tmp_path / "rows", 5)
    write_rows(tmp_path / "rows", 2, name="valid.jsonl")
    tree = {
        "sources": {
            "things": {"data": str(coco), "task": "detect", "weight": 3},
            "words": {"data": "rows", "weight": 1},
        },
        "exhaustion": "drop",
    }
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(tree))
    found = open_rows(file)
    assert isinstance(found["train"], Mixture)
    assert len(found["train"]) == 11
    assert found["train"].shares == (0.75, 0.25)
    assert len(found["valid"]) == 5
    firsts = {found["train"][i].prefix.split()[0] for i in range(11)}
    assert firsts == {"detect", "caption"}
    assert [found["valid"][i].prefix.split()[0] for i in range(5)] == ["detect"] * 3 + ["caption"] * 2


def mixture_file(coco, folder, **fields):
    write_rows(folder / "rows", 8)
    sources = {"things": {"data": str(coco), "task": "detect, count"}, "words": {"data": "rows", "limit": 6}}
    for source in sources.values():
        source.update(fields)
    file = folder / "mixture.yaml"
    file.write_text(yaml.safe_dump({"sources": sources}))
    return file


@pytest.mark.parametrize(
    ("reweight", "shares"),
    [
        ((), (6 / 12, 6 / 12)),
        ((("count", 3.0),), (12 / 18, 6 / 18)),  # half of what the source asks
        ((("count", 3.0), ("detect", 3.0)), (18 / 24, 6 / 24)),
        ((("words", 3.0), ("segment", 9.0)), (6 / 24, 18 / 24)),
        ((("things", 0.5), ("detect", 2.0)), (3 / 9, 6 / 9)),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [{}, {"weight": 5}])
def test_one_mixture_serves_several_stages(reweight, shares, weight, temperature, coco, tmp_path):
    """A factor is one of shares, whatever evens the weights out."""
    file = mixture_file(coco, tmp_path, **weight)
    file.write_text(file.read_text() + f"temperature: {temperature}\n")
    assert open_rows(file, reweight=reweight)["train"].shares == pytest.approx(shares)


def test_a_task_for_all_sources_is_reweighted_too(coco, tmp_path):
    tree = {"sources": {"a": {"data": str(coco)}, "b": {"data": str(coco), "task": "presence"}}}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(tree))
    found = open_rows(tmp_path / "mixture.yaml", task="detect", reweight=(("detect", 3.0),))["train"]
    assert found.shares == (0.75, 0.25)


def test_yaml_that_merges_is_read(tmp_path):
    write_rows(tmp_path / "rows", 3)
    write_rows(tmp_path / "more", 3)
    (tmp_path / "mixture.yaml").write_text(
        "sources:\n  a: &a {data: rows, weight: 2}\n  b: {<<: *a, data: more}\n  c: {<<: *a, weight: 4}\n"
    )
    assert open_rows(tmp_path / "mixture.yaml")["train"].shares == (0.25, 0.25, 0.5)


@pytest.mark.parametrize("temperature", ["1000", "high"])
def test_odd_temperatures_are_evened_out_or_told(temperature, coco, tmp_path):
    file = mixture_file(coco, tmp_path)
    file.write_text(file.read_text() + f"temperature: {temperature}\n")
    if temperature == "high":
        with pytest.raises(OptionError, match="temperature='high'"):
            open_rows(file, reweight=(("words", 3.0),))
    else:
        assert open_rows(file, reweight=(("words", 3.0),))["train"].shares == pytest.approx((0.25, 0.75), abs=1e-3)


def test_two_sources_of_one_name_are_refused(tmp_path):
    write_rows(tmp_path / "rows", 3)
    (tmp_path / "mixture.yaml").write_text("sources:\n  a: {data: rows}\n  a: {data: rows, weight: 2}\n")
    with pytest.raises(DataError, match="'a' stands there twice"):
        open_rows(tmp_path / "mixture.yaml")


@pytest.mark.parametrize(
    ("reweight", "message"),
    [
        ((("detekt", 2.0),), "Did you mean 'detect'"),
        ((("wrods", 2.0),), "Did you mean 'words'"),
        ((("detect", 0.0),), "above 0"),
    ],
)
def test_what_reweights_nothing_is_refused(reweight, message, coco, tmp_path):
    with pytest.raises(OptionError, match=message):
        open_rows(mixture_file(coco, tmp_path), reweight=reweight)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sources": {}}, "expected `sources:`"),
        ({"sources": {"a": {"weight": 1}}}, "source 'a': expected `data:`"),
        ({"sources": {"a": {"data": "rows", "weigth": 3}}}, "source 'a' has no 'weigth'. Did you mean 'weight'"),
        ({"sources": {"a": "rows"}, "temprature": 2}, "no field 'temprature'.*Did you mean 'temperature'"),
        ({"sources": {"a": {"data": "nowhere"}}}, "nowhere: no such file or folder"),
        ({"sources": {"a": {"data": "rows", "augmentation": {"flip": 0.5}}}}, "'augmentation', which is one for all"),
        ({"sources": {"a": "rows"}, "seed": "a"}, "seed: 'a': expected a whole number"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_said_in_a_line(tree, message, tmp_path):
    write_rows(tmp_path / "rows", 3)
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(DataError, match=message):
        open_rows(file)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"data": "rows", "format": []}, r"format=\[\]: expected one of auto, jsonl"),
        ({"data": "table", "columns": "text"}, "columns='text': expected a mapping with image, prefix, suffix"),
        ({"data": "rows", "weight": 10**30}, "the weight of a is 1000.*below 1e12"),
    ],
)
def test_options_of_a_source_of_the_wrong_kind_are_said_in_a_line(source, message, tmp_path):
    write_rows(tmp_path / "rows", 3)
    write_parquet([Example((), "p", "s")], tmp_path / "table" / "train.parquet")
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump({"sources": {"a": source}}))
    with pytest.raises(OptionError, match=message):
        open_rows(file)


def test_long_readings_drop_words_anywhere_instead_of_their_end(tmp_path):
    words = tuple(Word(f"w{i}", (10.0 * i, 0.0, 10.0 * i + 8, 8.0)) for i in range(30))
    write_coco([Record((np.zeros((20, 320, 3), np.uint8),), (20, 320), words=words)], tmp_path)
    options = {"task": "ocr", "text_length": lambda text: len(text.split()), "max_text": 20}
    source = open_rows(tmp_path, **options)["train"]
    found = [source.varied(0, epoch).suffix.split() for epoch in range(20)]
    assert {len(text) for text in found} == {12}
    assert any("w29" in text for text in found)  # the end is as likely as the beginning
    assert any("w0" in text for text in found)
    assert len(open_rows(tmp_path, task="ocr")["train"][0].suffix.split()) == 30


def test_held_out_rows_without_anything_can_be_scored_by_every_builder(tmp_path):
    """Whether a row is held out is decided before it is asked, and must not hang on what is drawn."""
    empty = [dataclasses.replace(record, instances=()) for record in (WorldRecords(60)[i] for i in range(60))]
    write_coco(empty, tmp_path, split="valid", labels=WorldRecords(1).labels)
    write_split(WorldRecords(3), tmp_path, to="coco", split="train")
    for task in ("count", "presence", "multi_presence", "detect,count"):
        rows = open_rows(tmp_path, task=task)["valid"]
        asked = [rows[i] for i in range(len(rows))]
        assert len(asked) == 60
        assert {example.suffix for example in asked} <= {"0", "no", "none"}
