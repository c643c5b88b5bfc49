"""Tables and tars say which rows have one id or one picture, by their content, without decoding a picture."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma.data.example import Example
from paligemma.data.sources.columns import Columns
from paligemma.data.sources.hub import HubDataset
from paligemma.data.sources.identity import ENDS, picture_key, repeated_ids
from paligemma.data.sources.parquet import Parquet, write_parquet
from paligemma.data.sources.tars import Tars, write_tars
from paligemma.data.subset import held_out, problems_of
from paligemma.errors import DataError
from paligemma.recipes.rows import splits

pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
N_PICTURES, EACH = 10, 4


def rows(*, double: bool = False) -> list[Example]:
    """Four questions about each of ten pictures, in no order; pixels, so that files of one picture are equal."""
    pictures = np.random.default_rng(0).integers(0, 256, (N_PICTURES, 8, 8, 3)).astype(np.uint8)
    order = np.random.default_rng(1).permutation(N_PICTURES * EACH)
    return [
        Example(
            (pictures[n % N_PICTURES],), "answer en what?", str(n % N_PICTURES), meta={"id": f"q{n // (1 + double)}"}
        )
        for n in order.tolist()
    ]


def parquet(examples: list[Example], folder: Path) -> Parquet:
    write_parquet(examples, folder / "train.parquet", group_rows=7)
    return Parquet(folder / "train.parquet")


def hub(examples: list[Example], folder: Path) -> HubDataset:
    table = datasets.Dataset.from_dict(
        {
            "image": [example.images[0].tolist() for example in examples],
            "prefix": [example.prefix for example in examples],
            "suffix": [example.suffix for example in examples],
            "id": [example.meta["id"] for example in examples],
        }
    )
    to_picture = datasets.Image()
    pictures = [to_picture.encode_example(example.images[0]) for example in examples]
    table = table.remove_columns("image").add_column("image", pictures).cast_column("image", to_picture)
    table.save_to_disk(str(folder / "saved"))
    return HubDataset(folder / "saved")


def tars(examples: list[Example], folder: Path) -> Tars:
    write_tars(examples, folder, per_shard=15, name="train")
    return Tars(folder)


Open = Callable[[list[Example], Path], Any]


@pytest.mark.parametrize("open_", [parquet, hub, tars])
def test_rows_of_one_picture_are_held_out_together(open_: Open, tmp_path: Path):
    learned, held, told = held_out(open_(rows(), tmp_path), 0.2)
    asked = [{split[i].suffix for i in range(len(split))} for split in (learned, held)]
    assert not asked[0] & asked[1]
    assert (len(asked[1]), len(held), len(learned)) == (2, 2 * EACH, 8 * EACH)
    assert "picture" in told


def test_of_several_files_of_an_example_only_its_picture_counts(tmp_path: Path):
    """One photograph with other masks beside it is one picture, where the columns say which file is the picture."""
    import tarfile

    photographs = [bytes([i]) * 100 for i in range(N_PICTURES)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(N_PICTURES * EACH):
            files = {"jpg": photographs[n % N_PICTURES], "png": bytes([n]) * 50, "txt": str(n % N_PICTURES).encode()}
            for kind, data in files.items():
                head = tarfile.TarInfo(f"{n:03d}.{kind}")
                head.size = len(data)
                tar.addfile(head, io.BytesIO(data))
    columns = Columns(image="jpg", prefix="=caption en", suffix="txt")
    learned, held, _ = held_out(Tars(tmp_path / "a.tar", columns=columns), 0.2)
    asked = [{split[i].suffix for i in range(len(split))} for split in (learned, held)]
    assert not asked[0] & asked[1]
    assert len(held) == 2 * EACH
    assert held_out(Tars(tmp_path / "a.tar"), 0.2)[2] == "every 5th row of train"


@pytest.mark.parametrize("open_", [parquet, hub])
def test_ids_of_tables_that_are_there_twice_are_told(open_: Open, tmp_path: Path):
    assert list(problems_of(open_(rows(), tmp_path))) == []
    source = open_(rows(double=True), tmp_path / "double")
    told = list(problems_of(source))
    assert len(told) == N_PICTURES * EACH // 2
    for line in told:
        there, _, first = line.partition(" is also that of ")
        second, _, identity = there.partition(": id ")
        both = [source[i] for i in range(len(source)) if source.where(i) in (first, second)]
        assert [example.meta["id"] for example in both] == [identity] * 2


def test_a_run_stops_at_an_id_that_a_table_has_twice(tmp_path: Path):
    parquet(rows(double=True), tmp_path)
    with pytest.raises(DataError, match=r"id q\d+ is also that of .*skip_broken=true"):
        splits(tmp_path, 0.0)
    told: list[str] = []
    splits(tmp_path, 0.0, skip_broken=True, say=told.append)
    assert len(told) == N_PICTURES * EACH // 2


def test_columns_that_are_asked_for_are_no_ids(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"id": ["cat", "cat"], "meta": [json.dumps({"id": 1})] * 2}), tmp_path / "a.parquet"
    )
    source = Parquet(tmp_path / "a.parquet", columns=Columns(image=None, prefix="=caption en", suffix="id"))
    assert source.problems == ()
    assert list(source.picture_keys()) == [(), ()]


def test_equal_hashes_are_no_equal_ids():
    class Always(str):
        __hash__ = lambda self: 7  # noqa: E731
        __eq__ = str.__eq__

    ids = ["a", "b", "a", "c", "b"]
    told = repeated_ids(lambda: [(i, Always(one)) for i, one in enumerate(ids)], "row {}".format)
    assert told == ("row 2: id a is also that of row 0", "row 4: id b is also that of row 1")


def test_long_files_are_told_apart_by_their_ends():
    middle = bytes(4 * ENDS)
    assert picture_key(b"a" + middle) != picture_key(b"b" + middle)
    assert picture_key(middle + b"a") != picture_key(middle + b"b")
    assert picture_key(middle) == picture_key(bytes(4 * ENDS))
    assert picture_key(middle) != picture_key(bytes(4 * ENDS + 1))
    assert picture_key("a.jpg") != picture_key("b.jpg")
