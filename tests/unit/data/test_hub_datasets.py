"""Hugging Face datasets: tables by number with undecoded pictures, and streams in their own order."""

import multiprocessing

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from paligemma.data.example import Example
from paligemma.data.order import Line
from paligemma.data.sources.columns import Columns
from paligemma.data.sources.hub import HubDataset, StreamSource, _is_on_hub, open_hub
from paligemma.data.sources.packed import open_datasets, write_saved_split
from paligemma.errors import DataError, OptionError
from paligemma.processing.image import load_image

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (5, 7, 3)).astype(np.uint8)


def table(n: int):
    rows = {
        "image": [Image.fromarray(picture(i)) for i in range(n)],
        "question": [f"what {i}?" for i in range(n)],
        "label": [i % 2 for i in range(n)],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


COLUMNS = Columns(prefix="answer en {question}", suffix="label")


def numbers(source, indices) -> list[int]:
    return [int(source[i].prefix.split()[-1].rstrip("?")) for i in indices]


def stream(n: int = 40, n_shards: int = 4, **options) -> StreamSource:
    return StreamSource(table(n).to_iterable_dataset(num_shards=n_shards), columns=COLUMNS, n_examples=n, **options)


def read_row(source, index: int):
    return source[index]


def test_rows_become_examples_and_labels_their_names():
    source = HubDataset(table(5), columns=COLUMNS)
    assert len(source) == 5
    example = source[3]
    assert (example.prefix, example.suffix, example.where) == ("answer en what 3?", "b", "the dataset row 3")
    assert isinstance(example.images[0], bytes), "left to our own decoder"
    assert np.array_equal(load_image(example.images[0]), picture(3))
    assert numbers(source, [-1, 0]) == [4, 0]
    with pytest.raises(IndexError):
        source[5]


def test_class_labels_inside_lists_and_groups_come_as_their_names():
    kind = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features(
        {
            "labels": datasets.List(kind), "things": datasets.List({"category": kind, "area": datasets.Value("int64")}),
            "group": {"kind": kind}, "unknown": kind,
        }
    )  # fmt: skip
    rows = {
        "labels": [[1, 0]], "things": [[{"category": 0, "area": 5}, {"category": 1, "area": 7}]],
        "group": [{"kind": 1}], "unknown": [-1],
    }  # fmt: skip
    data = datasets.Dataset.from_dict(rows, features=features)
    said = "{labels[0]} {things[0][category]} {things[1][category]} {group[kind]} {things[1][area]}"
    for source in (
        HubDataset(data, columns=Columns(image=None, prefix="=p", suffix=said)),
        StreamSource(data.to_iterable_dataset(), columns=Columns(image=None, prefix="=p", suffix=said), n_examples=1),
    ):
        assert source[0].suffix == "dog cat dog dog 7"
        assert source[0].meta["unknown"] is None
    as_numpy = HubDataset(data.with_format("numpy"), columns=Columns(image=None, prefix="=p", suffix="{group[kind]}"))
    assert as_numpy[0].suffix == "dog"
    with pytest.raises(DataError):  # nobody knows the class: no answer "-1"
        HubDataset(data, columns=Columns(image=None, prefix="=p", suffix="{unknown}"))[0]


def test_lists_of_pictures_are_left_undecoded():
    pictures = [[Image.fromarray(picture(0)), Image.fromarray(picture(1))], []]
    features = datasets.Features({"images": datasets.List(datasets.Image()), "prefix": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"images": pictures, "prefix": ["p", "q"]}, features=features)
    source = HubDataset(data, columns=Columns(suffix="=s"))
    assert [np.array_equal(load_image(image), picture(i)) for i, image in enumerate(source[0].images)] == [True, True]
    assert source[1].images == ()


def test_saved_folders_are_opened_by_their_splits(tmp_path):
    table(4).save_to_disk(tmp_path / "one")
    assert numbers(HubDataset(tmp_path / "one", columns=COLUMNS), [2]) == [2]
    both = datasets.DatasetDict({"train": table(4), "validation": table(3)})
    both.save_to_disk(tmp_path / "both")
    source = HubDataset(tmp_path / "both", split="validation", columns=COLUMNS)
    assert (len(source), source[1].where) == (3, "both validation row 1")
    with pytest.raises(DataError, match="both holds train, validation: expected to be told which"):
        HubDataset(tmp_path / "both", columns=COLUMNS)
    with pytest.raises(DataError, match=r"no split 'validaton': .*Did you mean 'validation'"):
        HubDataset(tmp_path / "both", split="validaton", columns=COLUMNS)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_pictures_is_a_data_set(tmp_path, streaming):
    for i in range(4):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(path)
    columns = Columns(prefix="=classify", suffix="label")
    options = {"n_examples": 4} if streaming else {}
    source = open_hub(
        "imagefolder",
        data_dir=str(tmp_path / "pictures"),
        split="train",
        streaming=streaming,
        columns=columns,
        **options,
    )
    found = [source[i] for i in range(4)]
    assert sorted(example.suffix for example in found) == ["a", "a", "b", "b"]
    shown = {load_image(example.images[0]).tobytes() for example in found}
    assert shown == {picture(i).tobytes() for i in range(4)}


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_named_by_rows_lie_in_the_folder_that_is_given(tmp_path, streaming):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(
        '{"image": "a.png", "prefix": "p", "suffix": "s"}\n{"image": "/etc/hostname", "prefix": "p", "suffix": "s"}\n'
    )
    files = {"data_files": str(tmp_path / "rows.jsonl"), "split": "train", "streaming": streaming}
    options = {"n_examples": 2} if streaming else {}
    source = open_hub("json", images=tmp_path, **files, **options)
    assert source[0].images == (tmp_path / "a.png",)
    with pytest.raises(DataError, match=r"row 1.*lies outside"):
        source[1]
    with pytest.raises(DataError, match=r"the picture is the name 'a\.png'"):
        open_hub("json", **files, **options)[0]


def test_what_datasets_cannot_open_is_told_in_one_line(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for name, options in [
        (str(tmp_path / "nowhere"), {}), ("parquet", {"data_files": str(tmp_path / "bad.parquet")}),
        ("json", {"data_files": str(tmp_path / "gone.json")}),
    ]:  # fmt: skip
        with pytest.raises(DataError, match="`datasets` cannot read it") as caught:
            HubDataset(name, split="train", **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no column 'prefix': there are image, question, label"):
        HubDataset(table(2))
    with pytest.raises(OptionError, match="data_dir"):
        HubDataset(table(2), data_dir="x")
    with pytest.raises(OptionError, match="streaming=True"):
        HubDataset(table(2).to_iterable_dataset())


def test_a_stream_is_read_in_its_order():
    source = stream()
    assert source.is_sequential
    assert numbers(source, [0, 1, 1, 4, 39]) == [0, 1, 1, 4, 39]
    assert numbers(source, [3, 2, 0]) == [3, 2, 0], "a number behind begins anew"
    assert source.where(4) == source[4].where == "the dataset row 4 of the stream"
    assert np.array_equal(load_image(source[4].images[0]), picture(4))


def test_a_jump_gives_what_reading_on_would_give():
    for options in ({}, {"shuffle_buffer": 10, "seed": 3}):
        source = stream(**options)
        for epoch in (0, 1, 0):
            order = [source.varied(i, epoch).prefix for i in range(40)]
            assert len({*order}) == 40
            assert [stream(**options).varied(i, epoch).prefix for i in (17, 31)] == [order[17], order[31]]
            assert [source.varied(i, epoch).prefix for i in (5, 17, 31)] == [order[i] for i in (5, 17, 31)]


def test_a_shuffled_stream_differs_by_seed_and_by_pass():
    def orders(seed: int) -> list[list[str]]:
        source = stream(shuffle_buffer=20, seed=seed)
        return [[source.varied(i, epoch).prefix for i in range(40)] for epoch in (0, 1)]

    first, other = orders(0), orders(1)
    assert first == orders(0)
    assert first[0] != first[1] != other[1]
    assert first[0] != other[0]


class _Rows(Dataset):
    def __init__(self, source: StreamSource) -> None:
        self.source = source

    def __getitem__(self, index: int) -> str:
        return self.source[index].prefix


def test_every_worker_sees_the_whole_stream():
    source = stream(12, 4)
    assert numbers(source, [0, 1]) == [0, 1], "a pass is open here when the workers begin"
    loader = DataLoader(
        _Rows(source), sampler=range(12), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    assert list(loader) == [f"answer en what {i}?" for i in range(12)]
    assert numbers(source, [2]) == [2]


def test_another_process_reads_the_same():
    table_source, stream_source = HubDataset(table(5), columns=COLUMNS), stream(5)
    assert numbers(stream_source, [1]) == [1]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_row, (table_source, 3)) == table_source[3]
        assert pool.apply(read_row, (stream_source, 3)) == stream_source[3]


def test_the_length_of_a_stream_is_known_or_asked_for():
    source = StreamSource(table(5).to_iterable_dataset(), columns=COLUMNS)
    with pytest.raises(DataError, match="expected n_examples"):
        len(source)
    assert len(stream(7)) == 7
    long = StreamSource(table(5).to_iterable_dataset(), columns=COLUMNS, n_examples=9)
    with pytest.raises(DataError, match="row 7 of the stream: the stream ended before it: expected 9 rows"):
        long[7]
    assert numbers(long, [2]) == [2]
    for options in ({"n_examples": 0}, {"shuffle_buffer": -1}):
        with pytest.raises(OptionError):
            StreamSource(table(5).to_iterable_dataset(), columns=COLUMNS, **options)


def test_a_number_of_rows_is_that_of_train_or_of_the_split_that_is_named(tmp_path):
    datasets.DatasetDict({"train": table(6), "validation": table(3)}).save_to_disk(tmp_path / "both")
    options = {"columns": COLUMNS, "streaming": True}
    with pytest.raises(DataError, match="validation: a stream that does not say"):
        len(open_datasets(tmp_path / "both", n_examples=4, **options)["valid"])
    found = open_datasets(tmp_path / "both", n_examples={"train": 4, "valid": 3}, **options)
    assert {split: len(source) for split, source in found.items()} == {"train": 4, "valid": 3}
    assert len(open_datasets(tmp_path / "both", split="validation", n_examples=2, **options)["valid"]) == 2


def test_only_a_split_that_is_not_there_is_passed_over(tmp_path):
    table(3).save_to_disk(tmp_path / "train")
    both = datasets.DatasetDict({"train": table(3), "validation": table(3).remove_columns("label")})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="no column 'label'"):
        open_datasets(tmp_path / "both", columns=COLUMNS)
    both["validation"] = table(2)
    both.save_to_disk(tmp_path / "whole")
    assert set(open_datasets(tmp_path / "whole", columns=COLUMNS)) == {"train", "valid"}


@pytest.mark.parametrize(
    ("name", "is_on_hub"),
    [
        ("hf://datasets/a/b.png", True), ("zip://a.png::hf://datasets/a/b.zip", True),
        ("/home/me/private.png::hf://x", False), ("file:///etc/passwd::hf://x", False), ("hf://x::/etc/passwd", False),
        ("https://example.org/a.png", False),
    ],
)  # fmt: skip
def test_addresses_lead_to_the_hub_or_nowhere(name, is_on_hub):
    assert _is_on_hub(name) is is_on_hub


def test_the_loader_reads_a_stream_step_by_step():
    source = stream(10)
    line = Line(len(source), None)
    assert [source.varied(*line.at(place)).prefix for place in (8, 9, 10, 11)] == [
        f"answer en what {i}?" for i in (8, 9, 0, 1)
    ]


def test_a_stream_goes_on_after_an_error_that_passes():
    broken = {"yes"}

    def rows():
        for i in range(8):
            if i == 3 and broken:
                broken.clear()
                raise ConnectionError("reset by peer")
            yield {"image": picture(i), "question": f"what {i}?", "label": "a"}

    source = StreamSource(datasets.IterableDataset.from_generator(rows), columns=COLUMNS, n_examples=8)
    assert numbers(source, [0, 2]) == [0, 2]
    with pytest.raises(DataError, match="reset by peer"):
        source[3]
    assert numbers(source, [4, 7]) == [4, 7]


def test_what_is_written_is_what_datasets_saves(tmp_path):
    """By split, pictures as its Image, and a split that is replaced is not the old one out of a cache."""
    rows = [Example((np.full((4, 6, 3), i, np.uint8),), "caption en", f"number {i}") for i in range(3)]
    write_saved_split(rows, tmp_path, split="train")
    write_saved_split(rows[:1], tmp_path, split="valid")
    found = datasets.load_from_disk(str(tmp_path))
    assert {name: len(split) for name, split in found.items()} == {"train": 3, "valid": 1}
    assert isinstance(found["train"].features["image"], datasets.Image)
    assert np.array_equal(np.asarray(found["train"][2]["image"]), rows[2].images[0])
    with pytest.raises(OptionError, match="is there already"):
        write_saved_split(rows, tmp_path, split="train")
    write_saved_split(rows[1:], tmp_path, split="train", overwrite=True)
    again = open_datasets(tmp_path)["train"]
    assert [again[i].suffix for i in range(len(again))] == ["number 1", "number 2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset_dict.json", "train", "valid"]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "mine.png").write_bytes(b"a picture of another format")
    with pytest.raises(OptionError, match="is there already"):
        write_saved_split(rows, tmp_path, split="test", overwrite=True)
    assert (tmp_path / "test" / "mine.png").exists(), "a folder that was not written so is not replaced"
