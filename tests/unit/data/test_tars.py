"""WebDataset tars: any example by number, from disks and stores; what is cut or damaged is told; nobody holds much."""

import gzip
import hashlib
import io
import json
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paligemma.data.check import check
from paligemma.data.example import Example
from paligemma.data.sources.columns import Columns, encoded
from paligemma.data.sources.open import open_data
from paligemma.data.sources.tars import Tars, expand, find_tars, write_tars
from paligemma.errors import DataError, OptionError
from paligemma.processing.image import load_image
from paligemma.recipes.rows import splits
from tests.held_memory import growth_bytes


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (5, 7, 3)).astype(np.uint8)


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, "PNG")
    return file.getvalue()


def examples(n: int) -> list[Example]:
    return [Example((picture(i),), f"caption {i}", f"a thing {i}", meta={"id": i}) for i in range(n)]


def tar_of(path: Path, *files: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            head = tarfile.TarInfo(name)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))
    return path


def same(read: Example, written: Example) -> bool:
    return (read.prefix, read.suffix, read.weight, read.meta, read.unlearned) == (
        written.prefix, written.suffix, written.weight, written.meta, written.unlearned,
    ) and all(
        np.array_equal(load_image(a), load_image(b)) for a, b in zip(read.images, written.images, strict=True)
    )  # fmt: skip


def read_example(source: Tars, index: int) -> Example:
    return source[index]


def test_examples_survive_the_way_there_and_back(tmp_path):
    Image.fromarray(picture(1)).save(tmp_path / "a.jpg")
    rows = [
        *examples(4),
        Example((picture(0), tmp_path / "a.jpg", Image.fromarray(picture(2))), "three", "things", weight=0.5),
        Example((), "none", "ü", meta={"ä": [1, {"b": None}]}, unlearned=((0, 1),)),
        Example(tuple(picture(i) for i in range(12)), "a clip", "in order"),
    ]
    shards = write_tars(rows, tmp_path / "out", per_shard=3)
    assert [shard.name for shard in shards] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    source = Tars(tmp_path / "out")
    assert (len(source), source.problems) == (7, ())
    assert all(same(source[i], row) for i, row in enumerate(rows))
    assert source[4].images[1] == (tmp_path / "a.jpg").read_bytes()
    assert source.where(4) == source[4].where == "shard-000001.tar 000000004"
    with pytest.raises(IndexError):
        source[7]


def test_the_same_examples_give_the_same_bytes(tmp_path):
    sums = [
        [
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in write_tars(examples(5), tmp_path / name, per_shard=2)
        ]
        for name in ("a", "b")
    ]
    assert sums[0] == sums[1]
    with pytest.raises(OptionError, match="per_shard=0"):
        write_tars(examples(1), tmp_path, per_shard=0)
    with pytest.raises(DataError, match="no examples"):
        write_tars([], tmp_path)


def test_webdataset_reads_what_we_write(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    shards = write_tars([*examples(3), Example((picture(5), picture(6)), "two", "things")], tmp_path, per_shard=2)
    read = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in read] == [f"{i:09d}" for i in range(4)]
    assert np.array_equal(np.asarray(read[2]["png"]), picture(2))
    assert (read[2]["json"]["prefix"], read[2]["json"]["id"]) == ("caption 2", 2)
    assert np.array_equal(np.asarray(read[3]["1.png"]), picture(6))


def test_we_read_what_webdataset_writes(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "wd-%03d.tar"), maxcount=2, verbose=0) as sink:
        for i in range(5):
            sink.write({"__key__": f"sub/{i:04d}", "png": Image.fromarray(picture(i)), "cls": i, "txt": f"thing {i}"})
    source = Tars(tmp_path, columns=Columns(prefix="=caption en", suffix="txt"))
    assert len(source) == 5
    assert all(
        same(source[i], Example((picture(i),), "caption en", f"thing {i}", meta={"cls": str(i)})) for i in range(5)
    )
    assert source.where(3) == "wd-001.tar sub/0003"


def test_texts_and_fields_beside_a_picture_are_its_example(tmp_path):
    path = tar_of(
        tmp_path / "a.tar",
        ("d/1.prefix.txt", b"caption en\n"), ("d/1.png", png(1)), ("d/1.suffix.txt", "kätt".encode()),
        ("d/2.png", png(2)), ("d/2.json", b'{"prefix": "q", "id": 4}'), ("d/2.txt", b"answer"), ("d/README", b"x"),
        ("d/3.JPG", png(3)), ("d/._3.jpg", b"junk"), ("d/3.json", b'{"prefix": "q", "suffix": "s"}'),
        ("d/1.ignored.npy", b"123"),
    )  # fmt: skip
    source = Tars(path)
    assert len(source) == 3
    assert same(source[0], Example((picture(1),), "caption en", "kätt"))
    assert same(source[1], Example((picture(2),), "q", "answer", meta={"id": 4}))
    assert same(source[2], Example((picture(3),), "q", "s"))
    assert source.files(0)["ignored.npy"] == b"123"


def test_marks_at_the_beginning_of_a_text_are_no_part_of_it(tmp_path):
    mark = b"\xef\xbb\xbf"
    path = tar_of(tmp_path / "a.tar", ("0.png", png(0)), ("0.json", mark + b'{"prefix": "p", "suffix": "s"}'),
                  ("1.png", png(1)), ("1.txt", mark + b"a cat"))  # fmt: skip
    source = Tars(path)
    assert (source[0].prefix, source[0].suffix) == ("p", "s")
    assert Tars(path, columns=Columns(prefix="=p", suffix="txt"))[1].suffix == "a cat"


def test_columns_pick_fields_and_files(tmp_path):
    path = tar_of(
        tmp_path / "a.tar", ("1.left.png", png(1)), ("1.right.png", png(2)), ("1.json", b'{"qa": {"q": "why?"}}'),
        ("1.cls", b"7"),
    )  # fmt: skip
    source = Tars(path, columns=Columns(image="right.png", prefix="answer en {qa[q]}", suffix="{cls}"))
    assert same(source[0], Example((picture(2),), "answer en why?", "7"))
    with pytest.raises(DataError, match=r"a\.tar 1: no column 'prefix'.*'=caption en'"):
        Tars(path)[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\xff", "1.json: not UTF-8"), (b"{", "1.json: not JSON"), (b'{"prefix": 1}', "'prefix' is a int")],
)
def test_fields_that_cannot_be_read_are_named(tmp_path, data, message):
    source = Tars(tar_of(tmp_path / "a.tar", ("1.json", data), ("1.txt", b"x")))
    with pytest.raises(DataError, match=message):
        source[0]


def test_files_of_a_key_need_not_be_neighbours_and_double_ones_are_told(tmp_path):
    path = tar_of(
        tmp_path / "a.tar", ("1.png", png(1)), ("2.png", png(2)), ("1.json", b'{"prefix": "a", "suffix": "b"}'),
        ("1.png", png(3)), ("2.json", b'{"prefix": "c", "suffix": "d"}'),
    )  # fmt: skip
    source = Tars(path)
    assert len(source) == 2
    assert same(source[0], Example((picture(1),), "a", "b"))
    assert source.problems == ("a.tar: 1.png is there twice: the first is used. Give every example its own key.",)
    assert Tars(path).problems == source.problems, "also from the kept index"


def test_long_names_and_links(tmp_path):
    path = tmp_path / "a.tar"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(path, "w", format=form) as tar:
            for name in ("ö" * 120 + "/1.txt", "b/1.json"):
                head = tarfile.TarInfo(name)
                data = b'{"prefix": "p", "suffix": "s"}'
                head.size = len(data)
                tar.addfile(head, io.BytesIO(data))
            link = tarfile.TarInfo("c/1.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        source = Tars(path)
        assert source.where(0) == f"a.tar {'ö' * 120}/1"
        assert source[1].suffix == "s"
        assert source.problems[0].startswith("a.tar: c/1.png is a link")


@pytest.mark.parametrize("lost", [1, 600, 1200, 5000])
def test_everything_before_a_cut_is_read(tmp_path, lost):
    (path,) = write_tars([*examples(6), Example((np.zeros((90, 90, 3), np.uint8),), "p", "s")], tmp_path)
    whole = Tars(path, index_folder=tmp_path / "index")
    ends = [max(m.offset + m.size for m in whole._place(i)[1].members(i)) for i in range(7)]
    path.write_bytes(path.read_bytes()[: ends[-1] - lost])
    source = Tars(path)
    assert len(source.problems) == 1
    assert f"after {ends[-1] - lost:,} bytes" in source.problems[0]
    n_whole = sum(end <= ends[-1] - lost for end in ends)
    assert all(same(source[i], example) for i, example in enumerate(examples(n_whole)))
    for i in range(n_whole, len(source)):
        with pytest.raises(DataError, match=r"is cut off after [\d,]+ bytes: expected more\. Fetch the shard again"):
            source[i]


def test_a_cut_between_two_members_is_told(tmp_path):
    (path,) = write_tars(examples(3), tmp_path)
    at = Tars(path)._place(2)[1].members(2)[0].offset - 512
    path.write_bytes(path.read_bytes()[:at])
    source = Tars(path)
    assert len(source) == 2
    assert same(source[1], examples(3)[1])
    assert source.problems == (
        f"{path.name}: ends after {at:,} bytes without a tar's end: it is cut off. Fetch the shard again.",
    )


def test_an_example_whose_last_files_are_lost_is_no_example(tmp_path):
    files = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("json", b'{"prefix": "p"}'), ("png", png(i)))]
    path = tar_of(tmp_path / "a.tar", *files)
    path.write_bytes(path.read_bytes()[: 4 * 1024 + 1024])
    source = Tars(path, columns=Columns(suffix="=s"))
    assert same(source[1], Example((picture(1),), "p", "s"))
    with pytest.raises(DataError, match=r"a\.tar: 2\.png is cut off after 5,120 bytes"):
        source[2]


def test_damage_in_a_header_ends_what_can_be_read(tmp_path):
    (path,) = write_tars(examples(3), tmp_path)
    at = Tars(path)._place(1)[1].members(1)[0].offset - 512
    data = bytearray(path.read_bytes())
    data[at : at + 300] = b"\xff" * 300
    path.write_bytes(data)
    source = Tars(path)
    assert len(source) == 1
    assert f"damaged after {at:,} of" in source.problems[0]


def test_what_is_no_plain_tar_is_refused(tmp_path):
    (path,) = write_tars(examples(1), tmp_path)
    packed = tmp_path / "b.tar"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "d.tar").write_bytes(b"")
    tar_of(tmp_path / "e.tar")
    for name, message in [
        ("b.tar", r"compressed with gzip: .*gunzip b\.tar"), ("c.tar", "not a tar"), ("d.tar", "not a tar"),
        ("e.tar", "no examples"), ("f.tar", "No such file"), ("g-*.tar", "no tar"), ("pipe:cat a.tar", "a command"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            Tars(name if name.startswith("pipe") else tmp_path / name)


def test_a_shard_that_is_none_costs_its_own_examples_alone(tmp_path):
    (path,) = write_tars(examples(3), tmp_path, name="train")
    for number, data in ((1, b""), (2, path.read_bytes()[:300])):
        (tmp_path / f"train-{number:06d}.tar").write_bytes(data)
    source = find_tars(tmp_path)["train"]
    assert (len(source), len(source.problems)) == (3, 2)
    assert all("not a tar, or cut off" in problem for problem in source.problems)
    assert check({"train": source}).counts == {"cut archive": 2}
    with pytest.raises(DataError, match="not a tar, or cut off"):
        splits(tmp_path, 0.0)
    assert len(splits(tmp_path, 0.0, skip_broken=True)[0]) == 3
    assert sorted(file.name for file in tmp_path.glob("*.index")) == ["train-000000.tar.index"]


def test_a_last_example_that_is_whole_is_read_though_its_picture_has_another_format(tmp_path):
    shown = io.BytesIO()
    Image.fromarray(picture(0)).save(shown, "JPEG")
    said = json.dumps({"prefix": "p", "suffix": "s"}).encode()
    png = encoded(picture(1), "x")[0]
    files = (("1.jpg", shown.getvalue()), ("1.json", said), ("2.png", png), ("2.json", said))
    path = tar_of(tmp_path / "a.tar", *files)
    data = path.read_bytes()
    path.write_bytes(data[: len(data.rstrip(b"\0")) + -len(data.rstrip(b"\0")) % 512])  # the end of the tar is gone
    source = Tars(path)
    assert "without a tar's end" in source.problems[0]
    assert [source[i].suffix for i in range(2)] == ["s", "s"]


def test_an_index_is_kept_and_made_anew_when_its_shard_changes(tmp_path):
    (path,) = write_tars(examples(3), tmp_path)
    index = tmp_path / f"{path.name}.index"
    Tars(path)
    first = index.read_bytes()
    index.touch()
    stamp = index.stat().st_mtime_ns
    assert same(Tars(path)[2], examples(3)[2])
    assert index.stat().st_mtime_ns == stamp, "used as it was"
    write_tars(examples(5), tmp_path)
    assert len(Tars(path)) == 5
    second = index.read_bytes()
    for spoiled in (b"", first, second[:40], second[:-30], b"junk" * 100):
        index.write_bytes(spoiled)
        assert same(Tars(path)[4], examples(5)[4])
        assert index.read_bytes() == second


def test_where_no_index_can_be_kept_it_goes_with_its_source(tmp_path):
    (path,) = write_tars(examples(3), tmp_path)
    (tmp_path / f"{path.name}.index").mkdir()  # in its place, so that it cannot be written, by nobody
    source = Tars(path)
    kept = source._indexes[0][0]
    assert kept.is_file()
    assert tmp_path not in kept.parents
    assert same(source[2], examples(3)[2])
    del source
    assert not kept.exists()
    elsewhere = Tars(path, index_folder=tmp_path / "indexes")
    assert elsewhere._indexes[0][0].parent == tmp_path / "indexes"


@pytest.mark.parametrize("way", ["spawn", "fork"])
def test_another_process_reads_the_same(tmp_path, way):
    write_tars(examples(6), tmp_path, per_shard=2)
    source = Tars(tmp_path)
    here = source[3]
    with multiprocessing.get_context(way).Pool(1) as pool:
        assert pool.apply(read_example, (source, 3)) == here
    assert source[3] == here


def test_shards_are_named_by_patterns_folders_and_lists(tmp_path):
    shards = write_tars(examples(12), tmp_path / "a", per_shard=1, name="train")
    write_tars(examples(2), tmp_path / "a", name="val")
    everything = [f"caption {i}" for i in range(12)]
    for given in (f"{tmp_path}/a/train-{{000000..000011}}.tar", f"{tmp_path}/a/train-*.tar", [*shards]):
        assert [example.prefix for example in map(Tars(given).__getitem__, range(12))] == everything
    assert {split: len(source) for split, source in find_tars(tmp_path).items()} == {"train": 12, "valid": 2}
    assert len(Tars(tmp_path, split="valid")) == 2
    with pytest.raises(DataError, match="holds train, valid"):
        Tars(tmp_path)
    with pytest.raises(OptionError, match="Did you mean 'valid'"):
        Tars(tmp_path, split="vlid")


def test_braces_expand_as_in_a_shell():
    assert expand("a-{8..11}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]
    assert expand("{x,y}/{00..01}") == ["x/00", "x/01", "y/00", "y/01"]
    with pytest.raises(OptionError, match="expected a first number"):
        expand("{9..1}")
    with pytest.raises(OptionError, match="expected a first number"):
        expand("{0..99999999999}")


def test_stores_are_read_like_disks(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for path in write_tars(examples(5), tmp_path, per_shard=2):
        store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    for given in ("memory://bucket/shard-{000000..000002}.tar", "memory://bucket/", "memory://bucket/shard-*.tar"):
        source = Tars(given)
        assert all(same(source[i], example) for i, example in enumerate(examples(5)))
    assert store.exists("/bucket/shard-000001.tar.index")
    assert not list(tmp_path.glob("*.index"))
    cut = store.cat_file("/bucket/shard-000000.tar")[:2000]
    store.pipe_file("/bucket/shard-000000.tar", cut)
    assert "after 2,000 bytes" in Tars("memory://bucket/shard-000000.tar").problems[0]
    for given, message in [
        ("memory://bucket/gone.tar", "gone.tar cannot be read"), ("memory://nowhere/*.tar", "no tar"),
        ("nosuch://bucket/a.tar", "nosuch"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            Tars(given)
    store.rm("/bucket", recursive=True)


def test_splits_of_a_folder_in_a_store_stay_apart(tmp_path):
    store = pytest.importorskip("fsspec").filesystem("memory")
    for number, name in enumerate(("train-000000", "train-000001", "val-000000", "test/a")):
        (shard,) = write_tars(examples(2 + number), tmp_path / str(number))
        store.pipe_file(f"/set/{name}.tar", shard.read_bytes())
    there = {"train": 2 + 3, "valid": 4, "test": 5}
    for address in ("memory://set", "memory://set/"):
        assert {split: len(rows) for split, rows in open_data(address).items()} == there
        assert {split: len(Tars(address, split=split)) for split in there} == there
        with pytest.raises(DataError, match=r"holds train, valid, test: expected to be told which"):
            Tars(address)
    store.pipe_file("/other/rows.jsonl", b"{}")
    for address in ("memory://other", "memory://other/rows.jsonl", "memory://gone"):
        with pytest.raises(DataError, match=r"expected (a tar|at least one)"):
            open_data(address)
    store.rm("/set", recursive=True)
    store.rm("/other", recursive=True)


def many(path: Path, n: int) -> Path:
    """A tar of n examples of text, its headers made at once: tarfile would take most of a test's time."""
    body = json.dumps({"prefix": "caption en", "suffix": "a thing"}).encode()
    head = tarfile.TarInfo(f"{0:09d}.json")
    head.size = len(body)
    blocks = np.zeros((n, 1024), np.uint8)
    blocks[:, :512] = np.frombuffer(head.tobuf(tarfile.USTAR_FORMAT), np.uint8)
    blocks[:, 512 : 512 + len(body)] = np.frombuffer(body, np.uint8)
    digits = np.arange(n)[:, None] // 10 ** np.arange(8, -1, -1) % 10
    blocks[:, :9] = digits + ord("0")
    blocks[:, 148:156] = ord(" ")
    sums = blocks[:, :512].sum(1, dtype=np.int64)
    blocks[:, 148:154] = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8 + ord("0")
    blocks[:, 154:156] = (0, ord(" "))
    path.write_bytes(blocks.tobytes() + bytes(1024))
    return path


def test_memory_does_not_grow_with_the_rows(tmp_path):
    def write(n: int) -> Path:
        path = many(tmp_path / f"{n}.tar", n)
        assert len(Tars(path)) == n  # the index is made here, once, for all who read
        return path

    large = write(200_000)
    # The whole index of 200,000 rows is 10 MB; a reader asks it for the lines of an example.
    assert growth_bytes("Tars", "tars", write(2_000), large, 200_000) < 2 * 2**20
    large.unlink()  # pytest would keep its 200 MB


def test_a_store_that_fails_later_is_named(tmp_path):
    store = pytest.importorskip("fsspec").filesystem("memory")
    (shard,) = write_tars(examples(2), tmp_path)
    store.pipe_file("/later/a.tar", shard.read_bytes())
    source = Tars("memory://later/a.tar")
    store.rm("/later", recursive=True)
    with pytest.raises(DataError, match=r"^memory://later/a\.tar cannot be read"):
        source[0]


def test_a_file_that_is_no_picture_is_not_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.mp4", b"frames"), ("1.txt", b"a cat"), ("2.jfif", b"picture"), ("2.txt", b"a dog")):
            head = tarfile.TarInfo(name)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))
    source = Tars(tmp_path / "a.tar", columns=Columns(prefix="=caption en", suffix="txt"))
    with pytest.raises(DataError, match=r"^a\.tar 1: no picture beside \.mp4: expected \.jpg"):
        source[0]
    assert source[1].images == (b"picture",)
