"""JSONL sources: one row per line, `{"image": "a.jpg", "prefix": "caption en", "suffix": "a cat"}`.

A folder may hold its splits in any of these ways; what is missing is simply not there:

    train.jsonl  valid.jsonl  test.jsonl                          pictures beside them, or under images/
    _annotations.train.jsonl  _annotations.valid.jsonl  …         Roboflow, flat
    train/_annotations.jsonl  valid/…                             Roboflow, one folder per split
    dataset/_annotations.train.jsonl  …                           Roboflow's PaliGemma export
"""

import json
from array import array
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from paligemma.data.example import Example
from paligemma.data.sources.identity import repeated_ids
from paligemma.data.sources.paths import picture_path
from paligemma.data.sources.splits import trying
from paligemma.errors import DataError, nearest

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test",),
}
COLUMNS = ("image", "images", "video", "prefix", "suffix", "weight", "unlearned")
_PLACES = ("{}.jsonl", "_annotations.{}.jsonl", "annotations.{}.jsonl", "{}/_annotations.jsonl", "{}/annotations.jsonl")


class Jsonl:
    """Rows of a JSONL file by number; only their places in the file are kept in memory, 8 bytes a row.

    Args:
        path: the file.
        images: folder of the pictures; default the file's own, or images/ beside it when a picture is only there.
        allow_outside: let rows name absolute paths and paths that leave the folder.

    Raises:
        DataError: no such file, or no row in it.
    """

    def __init__(self, path: str | Path, *, images: str | Path | None = None, allow_outside: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file: expected a JSONL file of examples. Check the path.")
        self.folder = Path(images) if images is not None else self.path.parent
        self.allow_outside = allow_outside
        self._offsets, self._lines = array("q"), array("q")  # line numbers only where some lines are blank
        with self.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        if self._lines and self._lines[-1] == len(self._lines):
            self._lines = array("q")
        if not self._offsets:
            raise DataError(f"{self.path}: no rows: expected one JSON object per line. Is this the right file?")

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        """How messages call a row."""
        return f"{self.path.name} line {self._lines[index] if self._lines else index + 1}"

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in the file.

        Raises:
            DataError: it is not a JSON object in UTF-8.
        """
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            row = json.loads(line.decode("utf-8-sig"))  # Windows begins a file with a mark
        except UnicodeDecodeError as error:
            message = f"{self.where(index)}: not UTF-8 ({error.reason}): save the file as UTF-8."
            raise DataError(message, kind="not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(index)}: not JSON ({error}): expected one object per line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{self.where(index)}: a {type(row).__name__}: expected an object with {_names()}.")
        return row

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Rows with an id that an earlier one has; the file is read through once."""
        return repeated_ids(self._ids, self.where)

    def _ids(self) -> Iterator[tuple[int, str]]:
        with self.path.open("rb") as file:
            for index, line in enumerate(line for line in file if line.strip()):
                if b'"id"' in line and (identity := _id(line)) is not None:
                    yield index, identity

    def __getitem__(self, index: int) -> Example:
        """The example of a row; its pictures are looked for, not opened.

        Raises:
            DataError: a column is missing or of the wrong kind, or a picture is not there or not allowed.
        """
        row, where = self.row(index), self.where(index)
        for column in ("prefix", "suffix"):
            if column not in row:
                raise _wrong(f"{where}: no column '{column}': expected {_names()}.{nearest(column, row)}")
            if not isinstance(row[column], str):
                raise _wrong(f"{where}: '{column}' is a {type(row[column]).__name__}: expected text.")
        weight = row.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e300:
            raise _wrong(f"{where}: 'weight' is {repr(weight)[:40]}: expected a finite number of 0 or more.")
        meta = {key: value for key, value in row.items() if key not in COLUMNS}
        images, unlearned = self.images(row, where), _stretches(row, where)
        return Example(images, row["prefix"], row["suffix"], float(weight), where, meta, unlearned)

    def pictures_of(self, index: int) -> tuple[str, ...]:
        """Names of a row's pictures as they stand in it; () where it cannot be read or names none."""
        try:
            row = self.row(index)
        except DataError:
            return ()
        named = row.get("video") or row.get("image") or row.get("images")
        return tuple(str(name) for name in (named if isinstance(named, list) else [named]) if name)

    def images(self, row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
        """What a row's `image`, `images` or `video` name: files, or the frames of a clip.

        Raises:
            DataError: nothing is named, or it is not there or not allowed.
        """
        if row.get("video") is not None or ("video" in row and not {"image", "images"} & row.keys()):
            from paligemma.data.sources.video import clip_of_row

            return clip_of_row(row, self.folder, where, allow_outside=self.allow_outside)
        if "image" not in row and "images" not in row:
            raise _wrong(f"{where}: no column 'image': expected {_names()}.{nearest('image', row)}")
        named = row.get("images") if row.get("image") is None else row["image"]
        named = [] if named is None else named if isinstance(named, list) else [named]
        return tuple(picture_path(self.folder, name, where, allow_outside=self.allow_outside) for name in named)


def find_splits(folder: str | Path, *, failed: dict[str, DataError] | None = None, **options: Any) -> dict[str, Jsonl]:
    """The splits of a folder, or {"train": …} for a single file; options are those of `Jsonl`.

    Args:
        failed: takes splits that cannot be opened, in place of an error.

    Raises:
        DataError: nothing that looks like a split.
    """
    path = Path(folder)
    if path.is_file():
        return {"train": Jsonl(path, **options)}
    found: dict[str, Jsonl] = {}
    for base in (path, path / "dataset"):
        for split, words in SPLITS.items():
            candidates = [base / place.format(word) for word in words for place in _PLACES]
            file = next((candidate for candidate in candidates if candidate.is_file()), None)
            if file is not None and split not in found:
                with trying(split, failed):
                    found[split] = Jsonl(file, **options)
    if not found and not failed:
        raise DataError(
            f"{path}: no examples: expected train.jsonl, _annotations.train.jsonl or train/_annotations.jsonl with "
            "rows of image, prefix and suffix."
        )
    return found


def _id(line: bytes) -> str | None:
    """The id of a row, as text; None where it has none or cannot be read."""
    try:
        found = json.loads(line).get("id")
    except (ValueError, AttributeError):
        return None
    return None if found is None else str(found)


def _names() -> str:
    return "image, prefix and suffix"


def _wrong(message: str) -> DataError:
    return DataError(message, kind="wrong column")


def _stretches(row: Mapping[str, Any], where: str) -> tuple[tuple[int, int], ...]:
    """The column `unlearned`, [[first, one past the last], …] characters of the suffix, as `Example` has them."""
    given = row.get("unlearned") or []
    fits = isinstance(given, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in given
    )
    if not fits or any(not 0 <= first < last <= len(row["suffix"]) for first, last in given):
        raise _wrong(f"{where}: 'unlearned' is {given!r}: expected [[first, last], …], characters of the suffix.")
    return tuple((first, last) for first, last in given)
