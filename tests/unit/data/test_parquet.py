"""Parquet: rows by number, pictures inside, what `datasets` reads; the same elsewhere, and bounded in memory."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paligemma.data.example import Example
from paligemma.data.sources.columns import Columns
from paligemma.data.sources.parquet import Parquet, find_parquet, write_parquet
from paligemma.errors import DataError, OptionError
from paligemma.processing.image import load_image
from tests.held_memory import growth_bytes

pytest.importorskip("pyarrow")


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (5, 7, 3)).astype(np.uint8)


def examples(n: int) -> list[Example]:
    return [Example((picture(i),), f"caption {i}", f"a thing {i}", 1.0 + i, meta={"id": i}) for i in range(n)]


def same(read: Example, written: Example) -> bool:
    return (read.prefix, read.suffix, read.weight, read.meta, read.unlearned) == (
        written.prefix, written.suffix, written.weight, written.meta, written.unlearned,
    ) and all(
        np.array_equal(load_image(a), load_image(b)) for a, b in zip(read.images, written.images, strict=True)
    )  # fmt: skip


def read_row(source: Parquet, index: int) -> Example:
    return source[index]


def test_examples_survive_the_way_there_and_back(tmp_path):
    rows = [*examples(9), Example((), "none", "ü", meta={"ä": [1, {"b": None}]}, unlearned=((0, 1),))]
    assert write_parquet(rows, tmp_path / "train.parquet", group_rows=4) == 10
    source = Parquet(tmp_path)
    assert len(source) == 10
    assert all(same(source[i], row) for i, row in enumerate(rows))
    assert same(source[-1], rows[-1])
    assert (source.where(7), source[7].where) == ("train.parquet row 7",) * 2
    with pytest.raises(IndexError):
        source[10]


def test_several_pictures_may_first_come_late(tmp_path):
    rows = [*examples(5), Example((picture(0), picture(1)), "two", "things"), *examples(2)]
    write_parquet(rows, tmp_path / "a.parquet", group_rows=2)
    source = Parquet(tmp_path / "a.parquet")
    assert all(same(source[i], row) for i, row in enumerate(rows))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_files_inside_keep_their_bytes_and_names(tmp_path):
    Image.fromarray(picture(1)).save(tmp_path / "a.jpg")
    write_parquet([Example((tmp_path / "a.jpg",), "p", "s")], tmp_path / "a.parquet")
    row = Parquet(tmp_path / "a.parquet").row(0)
    assert row["image"] == {"bytes": (tmp_path / "a.jpg").read_bytes(), "path": "a.jpg"}


def test_datasets_shows_our_pictures_as_pictures(tmp_path):
    datasets = pytest.importorskip("datasets")
    single, several = tmp_path / "one.parquet", tmp_path / "two.parquet"
    write_parquet(examples(3), single)
    write_parquet([Example((picture(0), picture(1)), "two", "things")], several)
    one = datasets.Dataset.from_parquet(str(single), cache_dir=str(tmp_path / "cache"))
    assert isinstance(one.features["image"], datasets.Image)
    assert np.array_equal(np.asarray(one[2]["image"]), picture(2))
    two = datasets.load_dataset("parquet", data_files=str(several), split="train", cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(np.asarray(two[0]["images"][1]), picture(1))


def test_foreign_tables_are_read_by_their_columns_and_their_folder(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    Image.fromarray(picture(3)).save(tmp_path / "a.png")
    table = arrow.Table.from_pylist([{"file": "a.png", "question": "what?", "answer": 3}])
    parquet.write_table(table, tmp_path / "qa.parquet")
    source = Parquet(tmp_path, columns=Columns(image="file", prefix="answer en {question}", suffix="{answer}"))
    assert (source[0].prefix, source[0].suffix) == ("answer en what?", "3")
    assert np.array_equal(load_image(source[0].images[0]), picture(3))
    with pytest.raises(DataError, match=r"qa\.parquet: no column 'image': there are file, question, answer"):
        Parquet(tmp_path)


def test_the_splits_of_a_folder_are_found_in_the_order_of_their_numbers(tmp_path):
    rows = examples(4)
    for i, name in enumerate(["train-10.parquet", "train-9.parquet", "validation.parquet", "test/0.parquet"]):
        write_parquet(rows[i : i + 1], tmp_path / name)
    found = find_parquet(tmp_path)
    assert {split: [source[i].prefix for i in range(len(source))] for split, source in found.items()} == {
        "train": ["caption 1", "caption 0"], "valid": ["caption 2"], "test": ["caption 3"],
    }  # fmt: skip
    assert list(find_parquet(tmp_path / "validation.parquet")) == ["train"]
    assert len(Parquet(tmp_path, split="train")) == len(Parquet([*sorted(tmp_path.glob("train-*"))])) == 2
    with pytest.raises(DataError, match="holds train, valid, test: expected to be told which"):
        Parquet(tmp_path)
    with pytest.raises(OptionError, match=r"split='trian'.*Did you mean 'train'"):
        Parquet(tmp_path, split="trian")


def test_a_split_is_any_word_of_a_name_and_hidden_files_are_none(tmp_path):
    rows = examples(3)
    for i, name in enumerate(["cc3m-train-0000.parquet", "cc3m-validation-0000.parquet", "__MACOSX/test.parquet"]):
        write_parquet(rows[i : i + 1], tmp_path / name)
    (tmp_path / "._cc3m-train-0000.parquet").write_bytes(b"\0\5\x16\7")
    assert {split: source[0].prefix for split, source in find_parquet(tmp_path).items()} == {
        "train": "caption 0", "valid": "caption 1",
    }  # fmt: skip
    write_parquet(rows, tmp_path / "train-test.parquet")
    with pytest.raises(DataError, match="train and test in one name"):
        find_parquet(tmp_path)


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(examples(3), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file, or cut off"):
        Parquet(path)
    with pytest.raises(DataError, match="no such file"):
        Parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="no examples"):
        write_parquet([], tmp_path / "c.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_damage_in_the_middle_costs_only_its_rows(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(examples(8), path, group_rows=2)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    source = Parquet(path)
    with pytest.raises(DataError, match=r"a\.parquet row 0: row group 0 cannot be read"):
        source[0]
    assert source[7].prefix == "caption 7"


def test_kept_groups_are_bounded_in_bytes(tmp_path):
    write_parquet(examples(20), tmp_path / "a.parquet", group_rows=1)
    source = Parquet(tmp_path / "a.parquet", cache_bytes=1000)
    for i in (*range(20), 3, 3):
        assert source[i].prefix == f"caption {i}"
        assert sum(table.nbytes for table in source._cache.values()) <= 1000
    tight = Parquet(tmp_path / "a.parquet", cache_bytes=1)
    assert [tight[i].prefix for i in (0, 0, 1)] == ["caption 0", "caption 0", "caption 1"]


def test_a_spawned_process_reads_the_same(tmp_path):
    write_parquet(examples(6), tmp_path / "a.parquet", group_rows=2)
    source = Parquet(tmp_path / "a.parquet")
    here = source[4]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_row, (source, 4)) == here


def test_memory_does_not_grow_with_the_rows(tmp_path):
    def write(n: int) -> Path:
        path = tmp_path / f"{n}.parquet"
        write_parquet((Example((), "caption en", f"thing number {i}") for i in range(n)), path)
        return path

    # 200,000 rows as Python objects would hold 40 MB; allowed are the kept groups and the footer of one file.
    assert growth_bytes("Parquet", "parquet", write(2_000), write(200_000), 200_000) < 12 * 2**20


def test_a_text_in_another_encoding_costs_its_row_alone(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(np.array([0, 2, 4], np.int32)), pyarrow.py_buffer(b"\xff\xfeab")]
    )
    columns = {"image": [[], []], "prefix": ["caption en"] * 2, "suffix": texts}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    source = Parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"^train\.parquet row 0: not UTF-8") as error:
        source[0]
    assert error.value.kind == "not UTF-8"
    assert source[1].suffix == "ab"
