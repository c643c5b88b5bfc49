"""The rows of a transfer: held out evenly, weighted by task, measured before anything is trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from paligemma.data.augment import AugmentOptions
from paligemma.data.check import check
from paligemma.data.mixture import Mixture, Part
from paligemma.data.sources.coco_write import write_coco
from paligemma.data.sources.jsonl import Jsonl
from paligemma.data.sources.tars import write_tars
from paligemma.data.world.records import WorldRecords
from paligemma.errors import DataError, OptionError
from paligemma.recipes.rows import Weighted, measure, order_of, splits
from tests.training_runs import processor, write_rows


def test_every_tenth_row_is_held_out_where_there_is_no_other_split(tmp_path):
    write_rows(tmp_path, 40)
    train, held, told = splits(tmp_path, 0.1)
    assert (len(train), len(held)) == (36, 4)
    assert "10th row" in told
    seen = [train[i].where for i in range(36)] + [held[i].where for i in range(4)]
    assert len(set(seen)) == 40  # no row twice, none lost
    assert [held[i].where for i in range(4)] == [f"train.jsonl line {n}" for n in (6, 16, 26, 36)]


def test_a_valid_split_is_held_out_whole(tmp_path):
    write_rows(tmp_path, 6)
    write_rows(tmp_path, 3, name="valid.jsonl")
    train, held, told = splits(tmp_path, 0.1)
    assert (len(train), len(held), told) == (6, 3, "the valid split")


def test_weights_multiply_those_of_the_rows_by_task(tmp_path):
    rows = [
        {"images": [], "prefix": "detect cat", "suffix": "a", "weight": 3.0},
        {"images": [], "prefix": "caption en", "suffix": "b"},
        {"images": [], "prefix": "my own words", "suffix": "c"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Weighted(Jsonl(tmp_path / "train.jsonl"), [("detect", 2.0), ("raw", 0.0)])
    assert [found[i].weight for i in range(len(found))] == [6.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([("detekt", 1.0)], r"there is no task 'detekt': expected caption, .*Did you mean 'detect'"),
        ([("detect", -1.0)], "detect has -1.0: expected a number of 0 or more"),
    ],
)
def test_weights_that_make_no_sense_are_refused(tmp_path, weights, message):
    with pytest.raises(OptionError, match=message):
        Weighted(Jsonl(write_rows(tmp_path, 2)), weights)


def test_texts_are_measured_as_the_loader_will_cut_them(tmp_path):
    from tests.training_runs import loader_of

    path = write_rows(tmp_path, 12)
    for max_text in (None, 12, 9, 8):
        lengths = measure(Jsonl(path), processor(), max_text)
        (data,) = [loader_of(path, batch_size=12, shuffle=False, max_text=max_text).step(0)]
        assert (lengths.n, lengths.n_cut, lengths.n_silenced) == (12, data.n_cut, data.n_silenced)
    whole = measure(Jsonl(path), processor(), None)
    assert whole.told(None) is None
    cut = measure(Jsonl(path), processor(), whole.longest - 1)
    assert 0 < cut.n_cut < 12
    assert f"--set loader.max_text={whole.longest}" in str(cut.told(whole.longest - 1))


def test_a_run_that_would_learn_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"max_text=3 cuts the whole suffix of all 5 rows .*--set loader\.max_text=\d+"):
        measure(Jsonl(write_rows(tmp_path, 5)), processor(), 3)


def test_rows_of_one_picture_are_held_out_together(tmp_path):
    write_rows(tmp_path, 20)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(line for line in lines for _ in range(5)) + "\n")
    train, held, _ = splits(tmp_path, 0.1)
    assert (len(train), len(held)) == (90, 10)
    learned, asked = ({rows[i].images for i in range(len(rows))} for rows in (train, held))
    assert not learned & asked
    assert len(asked) == 2


def coco_with_empty_pictures(folder):
    records = WorldRecords(12)
    bare = [replace(records[i], instances=()) if i in (1, 6) else records[i] for i in range(12)]
    write_coco(bare, folder, labels=records.labels)
    return folder


def test_a_picture_without_things_does_not_bring_a_held_out_one_into_training(tmp_path):
    folder = coco_with_empty_pictures(tmp_path)
    train, held, _ = splits(folder, 0.25, task="detect")
    learned = {train.varied(i, epoch).images for i in range(len(train)) for epoch in range(3)}
    asked = [held[i].images for i in range(len(held))]
    assert not learned & set(asked)
    assert len(asked) == len(set(asked))
    assert len(learned) + len(asked) == 10


def test_held_out_rows_are_not_augmented(tmp_path):
    folder = coco_with_empty_pictures(tmp_path)
    train, held, _ = splits(folder, 0.25, task="detect", augmentation=AugmentOptions(crop=1.0))
    assert all(isinstance(held[i].images[0], Path) for i in range(len(held)))
    assert any(not isinstance(train[i].images[0], Path) for i in range(len(train)))


def test_a_cut_tar_stops_a_run_unless_it_may_be_passed_over(tmp_path):
    rows = Jsonl(write_rows(tmp_path / "rows", 6))
    (shard,) = write_tars([rows[i] for i in range(6)], tmp_path / "tars")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])
    with pytest.raises(DataError, match=r"cut off.*--set loader\.skip_broken=true"):
        splits(tmp_path / "tars", 0.0)
    train, _, _ = splits(tmp_path / "tars", 0.0, skip_broken=True)
    assert 0 < len(train) < 6


def test_ids_used_twice_stop_a_run_unless_told_otherwise(tmp_path):
    path = write_rows(tmp_path, 5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, identity in zip(rows, ("a", 7, None, "7", "b"), strict=True):
        row["id"] = identity
    path.write_text("\n\n".join(json.dumps(row) for row in rows))  # blank lines count as lines, not as rows
    told = "train.jsonl line 7: id 7 is also that of train.jsonl line 3"
    with pytest.raises(DataError, match=rf"^train: {told} To go on without: --set loader\.skip_broken=true"):
        splits(path, 0.0)
    assert len(splits(path, 0.0, skip_broken=True)[0]) == 5
    (found,) = check({"train": Jsonl(path)}).of("duplicate id")
    assert found.message == told


def test_rows_of_which_none_can_be_used_are_no_training(tmp_path):
    path = write_rows(tmp_path, 4)
    path.write_text(path.read_text().replace("suffix", "sufix"))
    with pytest.raises(DataError, match=r"none of the rows looked at can be used; the first: .*no column 'suffix'"):
        measure(Jsonl(path), processor(), 128, skip_broken=True)


def test_what_decides_the_order_of_a_mixture_is_part_of_a_run(tmp_path):
    rows = Jsonl(write_rows(tmp_path, 4))

    def order(weight: float) -> str | None:
        parts = {"a": Part(source=rows, weight=weight), "b": Part(source=rows, weight=1.0)}
        return order_of(Weighted(Mixture(parts), ()))

    assert order(1) == order(1) != order(2)
    assert order_of(rows) is None
