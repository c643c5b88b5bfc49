"""Rows from JSONL files and the steps made of them: the same at any time, from any step, for any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma.data.loader import StepData
from paligemma.data.sources.jsonl import Jsonl, find_splits
from paligemma.errors import DataError, OptionError
from tests.training_runs import loader_of, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 7)


def write(folder: Path, *rows: object) -> Path:
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "a.png")
    path = folder / "train.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


GOOD = {"image": "a.png", "prefix": "caption en", "suffix": "a cat"}


def test_rows_become_examples(tmp_path):
    rows = (
        GOOD,
        "",
        {**GOOD, "image": ["a.png", "a.png"], "weight": 2, "id": 7},
        {**GOOD, "image": None, "suffix": "ü"},
    )
    source = Jsonl(write(tmp_path, *rows))
    assert len(source) == 3
    one, two, three = (source[i] for i in range(3))
    assert (one.images, one.prefix, one.suffix) == ((tmp_path / "a.png",), "caption en", "a cat")
    assert (len(two.images), two.weight, two.meta, two.where) == (2, 2.0, {"id": 7}, "train.jsonl line 3")
    assert (three.images, three.suffix) == ((), "ü")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": "a.png"', "line 1: not JSON"),
        ("[1]", "a list: expected an object"),
        ({"image": "a.png", "prefx": "x", "suffix": "y"}, "no column 'prefix'.*Did you mean 'prefx'"),
        ({**GOOD, "suffix": 3}, "'suffix' is a int: expected text"),
        ({"prefix": "x", "suffix": "y", "picture": "a.png"}, "no column 'image'"),
        ({**GOOD, "image": "b.png"}, "b.png is not in"),
        ({**GOOD, "image": "../a.png"}, "lies outside"),
        ({**GOOD, "image": "/etc/passwd"}, "lies outside"),
        ({**GOOD, "weight": -1}, "'weight' is -1"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, message):
    source = Jsonl(write(tmp_path, row))
    with pytest.raises(DataError, match=message):
        source[0]


def test_a_row_that_is_not_utf8_is_named(tmp_path):
    path = write(tmp_path, GOOD)
    path.write_bytes(path.read_bytes() + b'\n{"image": "a.png", "prefix": "x", "suffix": "\xff"}')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        Jsonl(path)[1]


def test_pictures_elsewhere_are_found_where_they_are_allowed(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "images" / "c.png")
    path = write(tmp_path, {**GOOD, "image": "c.png"}, {**GOOD, "image": str(tmp_path / "a.png")})
    assert Jsonl(path)[0].images == (tmp_path / "images" / "c.png",)
    assert Jsonl(path, allow_outside=True)[1].images == (tmp_path / "a.png",)


@pytest.mark.parametrize(
    "places",
    [
        {"train": "train.jsonl", "valid": "val.jsonl"},
        {"train": "_annotations.train.jsonl", "valid": "_annotations.valid.jsonl", "test": "_annotations.test.jsonl"},
        {"train": "train/_annotations.jsonl", "valid": "valid/_annotations.jsonl"},
        {"train": "dataset/_annotations.train.jsonl", "test": "dataset/_annotations.test.jsonl"},
        {"test": "test.jsonl"},
    ],
)
def test_the_splits_of_a_folder_are_found(tmp_path, places):
    for place in places.values():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(json.dumps(GOOD))
    found = find_splits(tmp_path)
    assert {split: str(source.path.relative_to(tmp_path)) for split, source in found.items()} == places


def test_a_folder_without_examples_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected train\.jsonl"):
        find_splits(tmp_path)
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        find_splits(tmp_path)


def same(a: StepData, b: StepData) -> bool:
    return a.names == b.names and all(
        torch.equal(x.tokens, y.tokens) and torch.equal(x.pixels, y.pixels)
        for x, y in zip(a.parts, b.parts, strict=True)
    )


def test_every_epoch_sees_every_row_once_in_another_order(rows):
    loader = loader_of(rows, batch_size=7)
    first, second = ([row for row, _ in loader.draws(step)] for step in (0, 1))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert {epoch for _, epoch in loader.draws(1)} == {1}
    assert loader_of(rows, batch_size=7, seed=6).draws(0) != loader.draws(0)
    assert loader_of(rows, batch_size=7, shuffle=False).draws(1) == [(row, 1) for row in range(7)]


def test_batches_go_on_across_the_end_of_an_epoch(rows):
    by_three, by_seven = loader_of(rows, batch_size=3), loader_of(rows, batch_size=7)
    line = [i for step in range(7) for i in by_three.draws(step)]
    assert line == [i for step in range(3) for i in by_seven.draws(step)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_starts_later_sees_the_same_steps(rows, workers):
    loader = loader_of(rows, workers=workers)
    whole, later = list(loader.steps(0, 6)), list(loader.steps(4, 6))
    assert len(whole) == 6
    assert all(same(a, b) for a, b in zip(whole[4:], later, strict=True))
    assert all(same(a, b) for a, b in zip(whole, loader_of(rows).steps(0, 6), strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_a_step_out(rows, world_size):
    whole = sorted(loader_of(rows).step(2).names)
    parts = [loader_of(rows, rank=rank, world_size=world_size).step(2).names for rank in range(world_size)]
    assert sorted(name for names in parts for name in names) == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_examples_of_like_length_stand_together_and_packing_saves_slots(rows):
    bucketed = loader_of(rows, batch_size=7, part_size=4, multiple_of=1).step(0)
    assert [part.n_examples for part in bucketed.parts] == [4, 3]
    assert bucketed.parts[0].length <= bucketed.parts[1].length
    padded = loader_of(rows, batch_size=7, multiple_of=1).step(0).parts[0]
    packed = loader_of(rows, batch_size=7, multiple_of=1, arrange="pack").step(0).parts[0]
    assert packed.tokens.numel() <= padded.tokens.numel()
    assert packed.n_examples == padded.n_examples == 7


def test_a_text_that_is_cut_is_counted(rows):
    whole, cut, silent = (loader_of(rows, batch_size=7, max_text=n).step(0) for n in (None, 8, 3))
    assert (whole.n_cut, whole.n_silenced) == (0, 0)
    assert 0 < cut.n_cut < 7
    assert cut.n_silenced == 0
    assert (silent.n_cut, silent.n_silenced) == (7, 7)
    assert not silent.parts[0].mask_loss.any()


def test_an_error_in_a_worker_reads_as_it_does_here(tmp_path):
    path = write_rows(tmp_path, 4)
    (tmp_path / "train-1.png").write_bytes(b"not a picture")
    messages = []
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"train\.jsonl line 2: .*train-1\.png") as caught:
            list(loader_of(path, workers=workers).steps(0, 2))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[1]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"part_size": 0}, {"arrange": "packed"}, {"workers": -1}, {"world_size": 9}]
)
def test_options_that_make_no_sense_are_refused(rows, options):
    with pytest.raises(OptionError, match=r"loader\."):
        loader_of(rows, **options)


def test_a_null_image_leaves_the_word_to_images(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    row = {"image": None, "images": ["a.png", "b.png"], "prefix": "caption en", "suffix": "two"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    source = Jsonl(tmp_path / "train.jsonl")
    assert [path.name for path in source[0].images] == ["a.png", "b.png"] == list(source.pictures_of(0))


def test_a_null_video_leaves_the_word_to_image(tmp_path):
    """As tables of pictures and clips are written, where every row has every column."""
    source = Jsonl(write(tmp_path, {**GOOD, "video": None}, {"video": None, "prefix": "caption en", "suffix": "x"}))
    assert [path.name for path in source[0].images] == ["a.png"] == list(source.pictures_of(0))
    with pytest.raises(DataError, match="the video is None"):
        source[1]
