"""The rows of a transfer: held out evenly, weighted by task, measured before anything is trained."""

import json

import pytest

from paligemma.data.sources.jsonl import Jsonl
from paligemma.errors import DataError, OptionError
from paligemma.recipes.rows import Weighted, measure, splits
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
