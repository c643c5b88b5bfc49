"""Parquet sources: rows by number through row groups, pictures inside as bytes.

A Parquet file is read a row group at a time. Of a file only the first row of each group is kept; a few decoded groups
stay in memory, bounded in bytes. So what a worker holds does not grow with the number of rows.

    train-00000-of-00002.parquet  train-00001-of-00002.parquet  valid.parquet   →   {"train": …, "valid": …}
    data/train/part-0.parquet …                                                      also by the folder's name
"""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from paligemma.data.example import Example
from paligemma.data.sources.columns import Columns, encoded, in_folder
from paligemma.data.sources.identity import picture_key, repeated_ids
from paligemma.data.sources.jsonl import SPLITS
from paligemma.data.sources.paths import is_hidden
from paligemma.data.sources.splits import trying
from paligemma.errors import DataError, MissingExtra, OptionError, nearest

CACHE_BYTES = 64 * 2**20
GROUP_BYTES = 4 * 2**20  # a shuffled reader decodes a whole group for a row: small groups
GROUP_ROWS = 1000


class Parquet:
    """Rows of one or several Parquet files.

    Args:
        path: a file, a folder of shards, or a list of files.
        columns: which column holds what.
        split: of a folder with several: "train", "valid" or "test".
        images: folder of pictures that rows name instead of holding them; default that of the file.
        allow_outside: let rows name absolute paths and paths that leave the folder.
        cache_bytes: decoded row groups that are kept; the last one is kept however large it is.

    Raises:
        DataError: no such file, not Parquet, no rows, or a column that is not there.
        MissingExtra: without pyarrow.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        columns: Columns | None = None,
        split: str | None = None,
        images: str | Path | None = None,
        allow_outside: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.paths = _files(path, split)
        self.columns = columns or Columns()
        self.images = None if images is None else Path(images)
        self.allow_outside, self.cache_bytes = allow_outside, cache_bytes
        (self._starts, self._files, self._groups), self._damaged = _layout(self.paths, self.columns)
        if not len(self):
            if self._damaged:
                raise self._damaged[0]
            raise DataError(f"{self.paths[0]}: no rows: expected at least one. Is this the right file?")
        self._cache: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}  # other processes read for themselves

    def where(self, index: int) -> str:
        """How messages call a row; counted from 0 in each file."""
        file, _, _, row = self._place(index)
        return f"{self.paths[file].name} row {row}"

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in the file.

        Raises:
            DataError: its row group is damaged, or a text is not UTF-8.
        """
        file, group, inside, _ = self._place(index)
        table = self._table(file, group, index)
        try:
            row: dict[str, Any] = table.slice(inside, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            message = f"{self.where(index)}: not UTF-8 ({error.reason}): write the table's texts as UTF-8."
            raise DataError(message, kind="not UTF-8") from None
        return row

    def __getitem__(self, index: int) -> Example:
        """The example of a row; pictures are not decoded.

        Raises:
            DataError: as `row`, or a value of the wrong kind.
        """
        file = self._place(index)[0]
        folder = self.images or self.paths[file].parent
        find = partial(in_folder, folder=folder, allow_outside=self.allow_outside)
        return self.columns.example(self.row(index), self.where(index), find)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Files that cannot be read, and rows with an id that an earlier one has; only columns of ids are read."""
        return (*map(str, self._damaged), *repeated_ids(self._ids, self.where))

    def _ids(self) -> Iterator[tuple[int, str]]:
        for index, row in self._some(self.columns.id_names):
            if (identity := self.columns.id_of(row)) is not None:
                yield index, identity

    def picture_keys(self) -> Iterator[Hashable]:
        """For every row what its pictures are told by; the columns of pictures are read through once."""
        named, n = self.columns.picture_names(), 0
        for index, row in self._some(lambda there: [name for name in there if name in named]):
            yield from repeat((), index - n)  # rows that cannot be read
            yield tuple(map(picture_key, self.columns.shown(row)))
            n = index + 1
        yield from repeat((), len(self) - n)

    def _some(self, chosen: Callable[[Sequence[str]], list[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Some columns of every row, of row groups that can be read; reading a row says what is wrong with others."""
        arrow, _ = _arrow()
        for number, path in enumerate(self.paths):
            if number not in self._files:  # damaged, or empty
                continue
            with _open(path) as opened:
                names = chosen(opened.schema_arrow.names)
                for at in np.flatnonzero(self._files == number) if names else ():
                    with suppress(OSError, ValueError, arrow.ArrowException):  # not UTF-8 is a ValueError
                        table = opened.read_row_group(int(self._groups[at]), columns=names, use_threads=False)
                        yield from enumerate(table.to_pylist(), int(self._starts[at]))

    def _place(self, index: int) -> tuple[int, int, int, int]:
        """File, row group of it, row in the group, row in the file."""
        index = range(len(self))[index]  # IndexError beyond the end, and rows from behind
        at = int(np.searchsorted(self._starts, index, side="right")) - 1
        file = int(self._files[at])
        first = int(self._starts[np.searchsorted(self._files, file)])
        return file, int(self._groups[at]), index - int(self._starts[at]), index - first

    def _table(self, file: int, group: int, index: int) -> Any:
        key = (file, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        arrow, _ = _arrow()
        opened = _open(self.paths[file])
        try:
            with opened:
                table = opened.read_row_group(group, use_threads=False)
        except (OSError, ValueError, arrow.ArrowException) as error:
            raise DataError(
                f"{self.where(index)}: row group {group} cannot be read ({_line(error)}): expected a whole file. "
                "Fetch it again."
            ) from None
        self._cache[key] = table
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > self.cache_bytes:
            self._cache.popitem(last=False)
        return table


def find_parquet(
    folder: str | Path, *, failed: dict[str, DataError] | None = None, **options: Any
) -> dict[str, Parquet]:
    """The splits of a folder by the names of its files, or {"train": …} for a single file or names that say none.

    Args:
        failed: takes splits that cannot be opened, in place of an error.
        options: those of `Parquet`.

    Raises:
        DataError: no Parquet file.
    """
    path = Path(folder)
    if path.is_file():
        return {"train": Parquet(path, **options)}
    found = {}
    for split, files in shards_by_split(path, ".parquet").items():
        with trying(split, failed):
            found[split] = Parquet(files, **options)
    return found


def shards_by_split(folder: Path, suffix: str) -> dict[str, list[Path]]:
    """Shards of a folder and those in it, in the order of their numbers, by the split that their names say.

    Raises:
        DataError: none there.
    """
    files = list(files_inside(folder, suffix))
    if not files:
        raise DataError(f"{folder}: no files *{suffix}: expected at least one. Check the path.")
    return {split: [folder / name for name in names] for split, names in by_split(files).items()}


def files_inside(folder: Path, suffix: str) -> Iterator[str]:
    """Files of a folder and those in it whose names end so, by their path inside."""
    for path in folder.rglob(f"*{suffix}"):
        if path.is_file() and not is_hidden(inside := path.relative_to(folder)):
            yield str(inside)


def by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Paths inside a folder by the split that their name says, or a folder on their way does; else "train"."""
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=by_number):
        *folders, file = PurePath(name).parts
        named = (split_of(part) for part in (file, *reversed(folders)))
        found.setdefault(next((split for split in named if split), "train"), []).append(name)
    return {split: found[split] for split in SPLITS if split in found}


def by_number(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names by the numbers in them: shard-2 before shard-10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def write_parquet(
    examples: Iterable[Example], path: str | Path, *, group_bytes: int = GROUP_BYTES, group_rows: int = GROUP_ROWS
) -> int:
    """Write examples with their pictures inside; `datasets` reads those as its Image.

    Columns: image {bytes, path} (or images, a list, where some example has several), prefix, suffix, weight, meta (a
    JSON object) and unlearned. Files stay as they are, pixels become PNG. The file appears when it is whole.

    Returns:
        how many examples.

    Raises:
        DataError: no example, or a picture that cannot be read. MissingExtra: without pyarrow.
    """
    path = Path(path)
    _, parquet = _arrow()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    is_several, n = False, 0
    writer = parquet.ParquetWriter(part, _schema(is_several))
    try:
        for rows in _groups(examples, group_bytes, group_rows):
            if not is_several and any(len(row["images"]) > 1 for row in rows):
                writer.close()
                is_several, writer = True, _widened(part)
            writer.write_table(_table(rows, is_several), row_group_size=len(rows))
            n += len(rows)
        writer.close()
        if not n:
            raise DataError(f"no examples for {path}: expected at least one.")
        part.replace(path)
    finally:
        writer.close()
        part.unlink(missing_ok=True)
    return n


def _groups(examples: Iterable[Example], group_bytes: int, group_rows: int) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    n_bytes = 0
    for example in examples:
        files = [encoded(image, example.where) for image in example.images]
        rows.append(
            {
                "images": [{"bytes": data, "path": name} for data, name in files],
                "prefix": example.prefix,
                "suffix": example.suffix,
                "weight": example.weight,
                "meta": json.dumps(example.meta, ensure_ascii=False, default=str) if example.meta else None,
                "unlearned": [list(stretch) for stretch in example.unlearned] or None,
            }
        )
        n_bytes += sum(len(data) for data, _ in files)
        if n_bytes >= group_bytes or len(rows) >= group_rows:
            yield rows
            rows, n_bytes = [], 0
    if rows:
        yield rows


def _schema(is_several: bool) -> Any:
    arrow, _ = _arrow()
    picture = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    stretches = arrow.list_(arrow.list_(arrow.int64()))
    texts = {"prefix": arrow.string(), "suffix": arrow.string(), "weight": arrow.float64(), "meta": arrow.string()}
    kinds = {"images" if is_several else "image": arrow.list_(picture) if is_several else picture, **texts}
    # What `datasets` itself writes, so that it shows pictures as pictures.
    features: dict[str, Any] = {name: {"dtype": str(kind), "_type": "Value"} for name, kind in texts.items()}
    features["weight"]["dtype"] = "float64"
    shown = {"_type": "Image"}
    features |= {"images": {"feature": shown, "_type": "List"}} if is_several else {"image": shown}
    pair = {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"}
    features["unlearned"] = {"feature": pair, "_type": "List"}
    told = json.dumps({"info": {"features": {name: features[name] for name in (*kinds, "unlearned")}}})
    return arrow.schema([*kinds.items(), ("unlearned", stretches)], metadata={"huggingface": told})


def _table(rows: list[dict[str, Any]], is_several: bool) -> Any:
    arrow, _ = _arrow()
    if not is_several:
        rows = [{**row, "image": next(iter(row["images"]), None)} for row in rows]
    return arrow.Table.from_pylist(rows, _schema(is_several))


def _widened(path: Path) -> Any:
    """A writer of lists of pictures that begins with the rows of a file of single ones, in its place."""
    _, parquet = _arrow()
    single = path.with_name(f"{path.name}1")
    path.replace(single)
    writer = parquet.ParquetWriter(path, _schema(True))
    try:
        with _open(single) as opened:
            for group in range(opened.metadata.num_row_groups):
                rows = opened.read_row_group(group).to_pylist()
                wide = [{**row, "images": [] if row["image"] is None else [row["image"]]} for row in rows]
                writer.write_table(_table(wide, True), row_group_size=len(wide))
    finally:
        single.unlink()
    return writer


def _files(path: str | Path | Sequence[str | Path], split: str | None) -> list[Path]:
    """The files that a path, a folder or a list names."""
    if not isinstance(path, str | Path):
        if not path:
            raise DataError("no Parquet files: expected at least one.")
        return [file for one in path for file in _files(one, split)]
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file: expected a Parquet file or a folder of them. Check the path.")
    if path.is_file():
        return [path]
    found = shards_by_split(path, ".parquet")
    if split is None and len(found) > 1:
        raise DataError(f"{path} holds {', '.join(found)}: expected to be told which. Say split='train'.")
    chosen = split or next(iter(found))
    if chosen not in found:
        raise OptionError(f"split={split!r}: {path} holds {', '.join(found)}.{nearest(chosen, found)}")
    return found[chosen]


def _layout(paths: Sequence[Path], columns: Columns) -> tuple[tuple[Any, Any, Any], tuple[DataError, ...]]:
    """First row, file and number in it of every row group; the rows end with one more start, the total.

    And what is wrong with files that cannot be opened, which have none.
    """
    starts, files, groups = [0], [], []
    damaged: list[DataError] = []
    for number, path in enumerate(paths):
        try:
            whole = _open(path)
        except DataError as error:
            damaged.append(error)
            continue
        with whole as opened:
            columns.check(opened.schema_arrow.names, path.name)
            for group in range(opened.metadata.num_row_groups):
                starts.append(starts[-1] + opened.metadata.row_group(group).num_rows)
                files.append(number)
                groups.append(group)
    return (np.array(starts, np.int64), np.array(files, np.int32), np.array(groups, np.int32)), tuple(damaged)


def split_of(name: str) -> str | None:
    """The split that a name says, as one of its words; None of a name that says none.

    Raises:
        DataError: it says two.
    """
    words = set(re.split(r"[^a-z]+", name.lower()))
    found = [split for split, known in SPLITS.items() if words & set(known)]
    if len(found) > 1:
        raise DataError(f"{name}: {' and '.join(found)} in one name: expected one split. Rename the file.")
    return found[0] if found else None


def _open(path: Path) -> Any:
    _, parquet = _arrow()
    try:
        return parquet.ParquetFile(path, memory_map=False, pre_buffer=False)
    except (OSError, ValueError) as error:  # arrow's own errors are kinds of these
        raise DataError(
            f"{path}: not a Parquet file, or cut off ({_line(error)}): expected a whole file. Fetch it again."
        ) from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _arrow() -> tuple[Any, Any]:
    """pyarrow and its Parquet module.

    Raises:
        MissingExtra: not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data", "reading and writing Parquet") from None
    return pyarrow, pyarrow.parquet
