"""WebDataset tars as a source of rows by number: any example is one seek away, on disks and in buckets.

The files of a tar with one key, the name up to its first dot, make an example:

    0001.jpg  0001.json             {"prefix": …, "suffix": …} or other fields for `Columns`
    0002.jpg  0002.prefix.txt  0002.suffix.txt
    0003.0.jpg  0003.1.jpg  0003.json        several pictures, in the order of their names
    0004.jpg  0004.txt              caption or class (.cls) as the suffix; Columns(prefix="=caption en")

Where the members lie is found once and kept beside the shard (`tar_index.py`). Nothing stays open between two reads:
so a source is plain values, the same in a forked and in a spawned process, and in threads.
"""

import contextlib
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from paligemma.data.example import Example
from paligemma.data.sources.columns import Columns, decoded, encoded, kind_of
from paligemma.data.sources.identity import ENDS
from paligemma.data.sources.parquet import by_number, shards_by_split
from paligemma.data.sources.splits import trying
from paligemma.data.sources.storage import (
    far_files,
    far_folder,
    fetch_index,
    is_address,
    name_of,
    open_shard,
    read_members,
    send_index,
    state_of,
)
from paligemma.data.sources.tar_index import (
    PICTURES,
    KeptIndex,
    Member,
    State,
    cut,
    kept_index,
    read_index,
    scan,
    to_bytes,
    write_file,
)
from paligemma.errors import DataError, OptionError, nearest

OURS = ("image", "prefix", "suffix", "weight", "unlearned")  # fields of an example's .json that mean something to us
TEXTS = frozenset({"txt", "cls", "text", "caption"})
MAX_SHARDS = 1_000_000
N_READERS = 8  # shards of a bucket that are looked through at a time


class Tars:
    """Examples of WebDataset tars.

    Args:
        shards: a tar, a folder of them, a pattern such as "shard-{000000..000009}.tar" or "shards/*.tar", or a list of
            those; paths, or addresses that fsspec knows: s3://…, gs://…, https://….
        columns: where the fields of an example lie; columns are the fields of its .json, and its files by what follows
            the key: "txt", "cls", "left.png". `image` is all of its pictures.
        split: of a folder with several: "train", "valid" or "test".
        index_folder: where indexes are kept; default: beside each shard, and where that cannot be written, as long as
            this source lives.

    Attributes:
        problems: what is wrong with the shards: cut off, damaged, double keys.

    Raises:
        DataError: no such shard, compressed, or no example in any. MissingExtra: an address without fsspec.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        columns: Columns | None = None,
        split: str | None = None,
        index_folder: str | Path | None = None,
    ) -> None:
        self.columns = columns or Columns()
        self.shards = _shards(shards, split)
        kept, self._spare = None if index_folder is None else Path(index_folder), _Spare()
        if kept:
            kept.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(N_READERS if any(map(is_address, self.shards)) else 1) as pool:
            self._indexes = list(pool.map(partial(_indexed, kept=kept, spare=self._spare.folder), self.shards))
        self._starts = np.cumsum([0, *(len(kept_index(*one)) for one in self._indexes)])
        self.problems: tuple[str, ...] = tuple(told for one in self._indexes for told in kept_index(*one).problems())
        if not len(self):
            none = f"{self.shards[0]}: no examples: expected files such as 0001.jpg and 0001.json."
            raise DataError(self.problems[0] if self.problems else none)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spare": None}  # a copy in another process does not own the folder

    def where(self, index: int) -> str:
        """How messages call an example: shard and key."""
        shard, opened, i = self._place(index)
        return f"{name_of(self.shards[shard])} {opened.key(i)}"

    def files(self, index: int, kinds: Iterable[str] | None = None) -> dict[str, bytes]:
        """The files of an example by what follows the key, as bytes; some of them, or all.

        Raises:
            DataError: a file is cut off, or the shard cannot be reached.
        """
        shard, opened, i = self._place(index)
        wanted = None if kinds is None else set(kinds)
        members = [member for member in opened.members(i) if wanted is None or member.kind in wanted]
        name, size = self.shards[shard], self._indexes[shard][1].size
        for member in members:
            if member.offset + member.size > size:
                raise DataError(cut(name_of(name), f"{opened.key(i)}.{member.kind}", size))
        return dict(zip((member.kind for member in members), read_members(name, members), strict=True))

    def row(self, index: int) -> dict[str, Any]:
        """An example as a row: the fields of its .json, its texts, `image` with all its pictures, other files as bytes.

        Raises:
            DataError: as `files`, or text that is not UTF-8, or JSON that is none.
        """
        _, opened, i = self._place(index)
        asked = self.columns.names()
        kinds = [m.kind for m in opened.members(i) if _is_read(m.kind) or m.kind in asked]
        files, where = self.files(index, kinds), self.where(index)
        shown = sorted((kind for kind in files if _last(kind) in PICTURES), key=by_number)
        row: dict[str, Any] = {kind: data for kind, data in files.items() if kind in shown or not _is_read(kind)}
        for kind, data in files.items():
            if _last(kind) in TEXTS:
                row[kind.removesuffix(".txt")] = _text(data, f"{where}.{kind}")  # prefix.txt is the column prefix
            elif _last(kind) == "json":
                told = _json(data, f"{where}.{kind}")
                row |= told if kind == "json" and isinstance(told, dict) else {kind.removesuffix(".json"): told}
        if shown or "image" not in row:
            row["image"] = [files[kind] for kind in shown]
        return row

    def __getitem__(self, index: int) -> Example:
        """The example; its pictures are not decoded.

        Raises:
            DataError: as `row`, or a field is missing, or files of unknown kinds stand where pictures are expected.
        """
        row, where = self.row(index), self.where(index)
        if (self.columns.images or self.columns.image) == "image" and row.get("image") == [] and "images" not in row:
            _, opened, i = self._place(index)
            others = sorted(member.kind for member in opened.members(i) if not _is_read(member.kind))
            if others:
                raise DataError(
                    f"{where}: no picture beside .{', .'.join(others)}: expected .jpg, .png, .webp or another picture.",
                    kind="missing picture",
                )
        if self.columns.is_own and "suffix" not in row:
            text = next((kind for kind in ("txt", "caption", "text", "cls") if kind in row), None)
            row |= {} if text is None else {"suffix": row.pop(text)}
        example = self.columns.example(row, where)
        meta = {k: v for k, v in example.meta.items() if k != "image" and not isinstance(v, bytes)}
        return dataclasses.replace(example, meta=meta)

    def picture_keys(self) -> Iterator[Hashable] | None:
        """For every example what its pictures are told by; None for shards in a store, where a look costs too much."""
        return None if any(map(is_address, self.shards)) else self._keys()

    def _keys(self) -> Iterator[Hashable]:
        shown = self.columns.picture_names()
        for number, shard in enumerate(self.shards):
            opened = kept_index(*self._indexes[number])
            with Path(shard).open("rb") as file:
                for i in range(len(opened)):
                    members = [one for one in opened.members(i) if _last(one.kind) in PICTURES]
                    if "image" not in shown:  # which stands for all of them
                        members = [one for one in members if one.kind in shown]
                    yield tuple(_key(file, member) for member in members)

    def _place(self, index: int) -> tuple[int, KeptIndex, int]:
        """Shard, its index, example in it."""
        index = range(len(self))[index]  # IndexError beyond the end, and examples from behind
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, kept_index(*self._indexes[shard]), index - int(self._starts[shard])


def find_tars(folder: str | Path, *, failed: dict[str, DataError] | None = None, **options: Any) -> dict[str, Tars]:
    """The splits of a folder by the names of its shards, or {"train": …} for anything else; options are `Tars`'.

    Args:
        failed: takes splits that cannot be opened, in place of an error.

    Raises:
        DataError: no tar.
    """
    shards: Mapping[str, Sequence[str | Path]] | None = None
    if is_address(folder):
        shards = far_folder(str(folder))
    elif Path(folder).is_dir():
        shards = shards_by_split(Path(folder), ".tar")
    if not shards:
        return {"train": Tars(folder, **options)}
    found = {}
    for split, files in shards.items():
        with trying(split, failed):
            found[split] = Tars(files, **options)
    return found


def write_tars(
    examples: Iterable[Example], folder: str | Path, *, per_shard: int = 1000, name: str = "shard"
) -> list[Path]:
    """Write examples as WebDataset tars `name`-000000.tar …; the same examples give the same bytes.

    An example is 000000017.jpg (or .0.jpg, .1.jpg, …) and 000000017.json with prefix, suffix and what else it holds.
    Pictures are the bytes of their files; pixels become PNG. A shard appears when it is whole.

    Returns:
        the shards.

    Raises:
        DataError: no example, or a picture that cannot be read.
    """
    if per_shard < 1:
        raise OptionError(f"per_shard={per_shard}: expected at least 1.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[Path, Path] = {}  # what has its own name when all of it is there -> that name
    numbered = enumerate(examples)
    try:
        while chunk := list(itertools.islice(numbered, 1)):
            path = folder / f"{name}-{len(parts):06d}.tar"
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            parts[part] = path
            with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
                for number, example in itertools.chain(chunk, itertools.islice(numbered, per_shard - 1)):
                    for member, data in _members(example):
                        head = tarfile.TarInfo(f"{number:09d}.{member}")  # mtime 0, nobody's: the same bytes every time
                        head.size = len(data)
                        tar.addfile(head, io.BytesIO(data))
        if not parts:
            raise DataError(f"no examples for {folder}: expected at least one.")
        for part, path in parts.items():
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return list(parts.values())


def expand(pattern: str) -> list[str]:
    """Names of a pattern with braces, as shells and WebDataset expand them: a-{00..02}.tar, {train,valid}.tar.

    Raises:
        OptionError: a range that ends before it begins, or names more than a million shards.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        first, last, width = int(span[1]), int(span[2]), len(span[1])
        if not 0 <= last - first < MAX_SHARDS:
            raise OptionError(f"{pattern}: {{{found[1]}}} expected a first number, '..' and a last one not below it.")
        middles = [f"{i:0{width}d}" for i in range(first, last + 1)]
    else:
        middles = found[1].split(",")
    before, after = pattern[: found.start()], expand(pattern[found.end() :])
    return [f"{before}{middle}{rest}" for middle in middles for rest in after]


class _Spare:
    """A folder for indexes that have no better place; it goes when its source goes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="paligemma-tars-"))
        weakref.finalize(self, _remove, self.folder, os.getpid())


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked reader that ends leaves the folder to its owner
        shutil.rmtree(folder, ignore_errors=True)


def _indexed(shard: str, kept: Path | None, spare: Path) -> tuple[Path, State, int]:
    """The index of a shard, made where there is none: its file, what it is valid for, and when it was made."""
    state, is_far = state_of(shard), is_address(shard)
    unique = f"{name_of(shard)}.{hashlib.sha256(shard.encode()).hexdigest()[:16]}.index"
    places = [kept / unique] if kept else [spare / unique] if is_far else [Path(f"{shard}.index"), spare / unique]
    data = None
    for path in places:
        if is_far and not kept and (data := fetch_index(shard)) is not None:
            write_file(path, data)
        if read_index(path, state) is not None:
            return path, state, path.stat().st_mtime_ns
    with open_shard(shard) as file:
        index = scan(file, state.size, name_of(shard))
    data = to_bytes(index, state)
    if not len(index.members):  # perhaps no tar: nothing is left beside it
        places = [spare / unique]
    elif is_far and not kept:
        send_index(shard, data)
    for path in places[:-1]:
        with contextlib.suppress(OSError):  # a folder that cannot be written
            write_file(path, data)
            return path, state, path.stat().st_mtime_ns
    write_file(places[-1], data)
    return places[-1], state, places[-1].stat().st_mtime_ns


def _shards(given: str | Path | Sequence[str | Path], split: str | None) -> list[str]:
    """The tars that a path, folder, pattern or list names, in the order of their numbers."""
    if not isinstance(given, str | Path):
        return [shard for one in given for shard in _shards(one, split)]
    if str(given).startswith("pipe:"):
        raise DataError(f"{given}: a command: expected a path or an address. Use s3://…, gs://… or https://….")
    found: list[str] = []
    for name in expand(str(given)):
        if is_address(name):
            inside = far_folder(name)
            found += far_files(name) if inside is None else _of_split(name, inside, split) if inside else []
        elif Path(name).is_dir():
            found += map(str, _of_split(name, shards_by_split(Path(name), ".tar"), split))
        else:
            found += sorted(glob.glob(name), key=by_number) if "*" in name else [name]
    if not found:
        raise DataError(f"{given}: no tar: expected at least one. Check the path.")
    return found


def _of_split(name: str, found: Mapping[str, Sequence[Any]], split: str | None) -> Sequence[Any]:
    """The shards of the split that is asked for; of the only one where none is."""
    if split is None and len(found) > 1:
        raise DataError(f"{name} holds {', '.join(found)}: expected to be told which. Say split='train'.")
    chosen = split or next(iter(found))
    if chosen not in found:
        raise OptionError(f"split={split!r}: {name} holds {', '.join(found)}.{nearest(chosen, found)}")
    return found[chosen]


def _key(file: BinaryIO, member: Member) -> Hashable:
    """As `picture_key`, of a file inside a tar."""
    file.seek(member.offset)
    head = file.read(min(ENDS, member.size))
    file.seek(member.offset + max(0, member.size - ENDS))
    return member.size, zlib.crc32(head), zlib.crc32(file.read(min(ENDS, member.size)))


def _last(kind: str) -> str:
    return kind.rsplit(".", 1)[-1]


def _is_read(kind: str) -> bool:
    return _last(kind) in PICTURES or _last(kind) in TEXTS or _last(kind) == "json"


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason}): save the file as UTF-8.") from None


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason}): save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}): expected an object with prefix and suffix.") from None


def packable(example: Example) -> bool:
    """Whether the pictures of an example can be written into a tar; only those of other formats are decoded.

    Raises:
        DataError: one cannot be read.
    """
    return bool(_members(example))


def _members(example: Example) -> list[tuple[str, bytes]]:
    """The files of an example, by what follows the key."""
    files = [encoded(image, example.where)[0] for image in example.images]
    named = []
    for i, data in enumerate(files):
        kind = kind_of(data)
        if kind not in PICTURES:
            data, kind = encoded(decoded(data, example.where), example.where)[0], "png"
        named.append((kind if len(files) == 1 else f"{i}.{kind}", data))
    kept = {key: value for key, value in example.meta.items() if key not in OURS}
    row = {**kept, "prefix": example.prefix, "suffix": example.suffix}
    row |= {} if example.weight == 1 else {"weight": example.weight}
    row |= {"unlearned": example.unlearned} if example.unlearned else {}
    return [*named, ("json", json.dumps(row, ensure_ascii=False, default=str).encode())]
