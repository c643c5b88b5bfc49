"""Rows of any table as examples: which columns hold the picture, the prompt and the answer.

Columns(image="img", prefix="answer en {question}", suffix="{answers[0]}")

{"img": …, "question": "what is it?", "answers": ["a cat"], "id": 7}
    →  Example((…,), "answer en what is it?", "a cat", meta={"id": 7})
"""

import io
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma.data.example import Example
from paligemma.data.record import Record
from paligemma.data.sources.paths import picture_path
from paligemma.errors import DataError, ImageError, OptionError, nearest
from paligemma.processing.image import load_image
from paligemma.processing.picture_file import open_picture, read_file

Find = Callable[[str, str], Any]  # the name of a picture in a row, how messages call the row → the picture

_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
_INDEX = re.compile(r"\[([^\[\]]+)\]")


def nowhere(name: str, where: str) -> Any:
    """For tables that stand in no folder.

    Raises:
        DataError: always.
    """
    raise DataError(f"{where}: the picture is the name {name!r}: expected its bytes, or say in which folder: images=…")


def in_folder(name: str, where: str, *, folder: Path, allow_outside: bool = False) -> Path:
    """A picture by its name in a folder, by the rule that holds for every source (`paths.py`)."""
    return picture_path(folder, name, where, allow_outside=allow_outside)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a table keeps what.

    Each value is the name of a column; or a template with names in braces, "answer en {question}", that may pick from
    lists and nested columns, "{answers[0]}"; or, after "=", a text that is the same in every row, "=caption en".

    Attributes:
        image: a picture, a list of them, or nothing (null); None: no picture. Where a table has `images` and no
            `image`, that is taken.
        prefix, suffix: text.
        weight: a number; None: 1. A table with the columns prefix and suffix, as this package writes it, is read like
            JSONL: a column weight is used, and meta is spread out.
        images: a column of lists of pictures, in place of `image`.

    Raises:
        OptionError: a template that cannot be read.
    """

    image: str | None = "image"
    prefix: str = "prefix"
    suffix: str = "suffix"
    weight: str | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        for said in self._said():
            _pieces(said)

    @property
    def is_own(self) -> bool:
        """Whether the table is laid out as this package writes it."""
        return (self.prefix, self.suffix) == ("prefix", "suffix")

    def names(self) -> frozenset[str]:
        """Every column that is read."""
        return frozenset(name for said in self._said() for _, name, _, _ in _pieces(said) if name)

    def check(self, columns: Iterable[str], where: str) -> None:
        """Whether a table has the columns.

        Raises:
            DataError: one is not there; the message offers the nearest.
        """
        there = list(columns)
        for name in sorted(self.names()):
            if name not in there and not (name == "image" == self.image and "images" in there):
                raise _unknown(name, there, where)

    def example(self, row: Mapping[str, Any], where: str, find: Find = nowhere) -> Example:
        """The example of a row.

        Args:
            find: the picture that a name in the row stands for.

        Raises:
            DataError: a column is missing, empty or of the wrong kind, or a picture is not there.
        """
        image = self._image_of(row)
        cell = None if image is None else _value(image, row, where)
        used = self.names() | {str(image)}
        weight: Any = 1.0
        if self.weight is not None:
            weight = _value(self.weight, row, where)
        elif self.is_own:
            weight, used = row.get("weight"), used | {"weight", "unlearned"}
            weight = 1.0 if weight is None else weight
        meta = {key: value for key, value in row.items() if key not in used}
        if self.is_own:
            meta = _spread(meta)
            for empty in ("image", "images"):
                if meta.get(empty, ...) is None:
                    del meta[empty]
        return Example(
            pictures(cell, where, find),
            _text(self.prefix, row, where),
            _text(self.suffix, row, where),
            _weight(weight, where),
            where,
            meta,
            _stretches(row.get("unlearned"), where) if self.is_own else (),
        )

    def picture_names(self) -> frozenset[str]:
        """The columns that pictures are in."""
        image = self.images or self.image
        named = frozenset() if image is None else frozenset(name for _, name, _, _ in _pieces(image) if name)
        return named | {"images"} if image == "image" else named

    def shown(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """The pictures of a row as they stand in it, names as names; () where there are none."""
        image = self._image_of(row)
        try:
            return () if image is None else pictures(_value(image, row, ""), "", lambda name, _: name)
        except DataError:
            return ()

    def id_of(self, row: Mapping[str, Any]) -> str | None:
        """The id of a row, as text; None where it has none. Only the columns of `id_names` are looked at."""
        found = None if "id" in self.names() else row.get("id")
        if self.is_own and found is None and row.get("meta") is not None:
            found = _spread({"meta": row["meta"]}).get("id")
        return None if found is None else str(found)

    def id_names(self, there: Iterable[str]) -> list[str]:
        """The columns of a table in which an id may be."""
        return [
            name for name in there if (name == "id" and name not in self.names()) or (name == "meta" and self.is_own)
        ]

    def _image_of(self, row: Mapping[str, Any]) -> str | None:
        image = self.images or self.image
        if image == "image" and (row.get("image") is None and row.get("images") is not None):
            return "images"
        return image

    def _said(self) -> tuple[str, ...]:
        said = (self.images or self.image, self.prefix, self.suffix, self.weight)
        return tuple(x for x in said if x is not None)


def pictures(cell: Any, where: str, find: Find = nowhere) -> tuple[Any, ...]:
    """The pictures of a cell: PIL images, arrays, bytes, {"bytes": …, "path": …}, names, or lists of those.

    Raises:
        DataError: nothing that is a picture.
    """
    if cell is None:
        return ()
    if isinstance(cell, list | tuple):
        return tuple(picture for one in cell for picture in pictures(one, where, find))
    if isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes):
        return (cell["bytes"],)
    if isinstance(cell, Mapping) and isinstance(cell.get("path"), str):
        cell = cell["path"]
    if isinstance(cell, str) and cell:
        return (find(cell, where),)
    if isinstance(cell, bytes | Image.Image | Path) or (isinstance(cell, np.ndarray) and cell.ndim > 1):
        return (cell,)
    raise DataError(
        f"{where}: the picture is {_told(cell)}: expected a picture, its bytes, a name, or {{bytes, path}}. "
        "Say which column holds it: Columns(image=…)."
    )


def encoded(image: Any, where: str) -> tuple[bytes, str | None]:
    """A picture as the bytes of a file, and the file's name where it has one.

    Files and bytes stay as they are; pixels become PNG, which loses nothing.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if isinstance(image, bytes | bytearray | memoryview):
            return bytes(image), None
        if isinstance(image, str | Path):
            return read_file(Path(image)), Path(image).name
        picture = image if isinstance(image, Image.Image) else Image.fromarray(load_image(image))
        if picture.mode not in ("RGB", "L", "RGBA") or "transparency" in picture.info:
            picture = picture.convert("RGBA") if picture.has_transparency_data else Image.fromarray(load_image(picture))
        file = io.BytesIO()
        # Through an array: what a PIL image carries along, such as an EXIF turn that was applied, is left behind.
        Image.fromarray(np.asarray(picture)).save(file, "PNG")
        return file.getvalue(), None
    except ImageError as error:
        raise DataError(f"{where}: {error}") from None


def decoded(data: bytes, where: str) -> Any:
    """uint8[H, W, 3] of a picture file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return load_image(data)
    except ImageError as error:
        raise DataError(f"{where}: {error}") from None


def kind_of(data: bytes) -> str:
    """How the name of a picture file ends, by its content: "jpg", "png", …; "" where it is no picture."""
    try:
        kind = (open_picture(data, "", None).format or "").lower()
    except ImageError:
        return ""
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind)


@lru_cache(maxsize=1024)
def _pieces(said: str) -> tuple[tuple[str, str, tuple[str, ...], str], ...]:
    """A template as (text before, column, what is picked from it, format); the last may be text alone."""
    if said.startswith("="):
        return ((said[1:], "", (), ""),)
    if "{" not in said:
        return (("", said, (), ""),)
    found = []
    try:
        for text, field, form, _ in string.Formatter().parse(said):
            named = _FIELD.fullmatch(field) if field else None
            if field is not None and named is None:
                raise ValueError(f"{{{field}}}")
            found.append((text, *((named[1], tuple(_INDEX.findall(named[2]))) if named else ("", ())), form or ""))
    except ValueError as error:
        raise OptionError(
            f"the template {said!r} cannot be read ({error}): expected names of columns in braces, such as "
            "'answer en {question}'. A brace itself is written twice."
        ) from None
    return tuple(found)


def _value(said: str, row: Mapping[str, Any], where: str) -> Any:
    """What a column holds, whatever it is; a template of more than one column is text."""
    pieces = _pieces(said)
    if len(pieces) == 1 and pieces[0][1] and not pieces[0][0] and not pieces[0][3]:
        return _cell(row, pieces[0][1], pieces[0][2], where)
    return _text(said, row, where)


def _text(said: str, row: Mapping[str, Any], where: str) -> str:
    if said.startswith("=") or "{" in said:
        pieces = _pieces(said)
        return "".join(
            text + (_filled(row, column, path, form, where) if column else "") for text, column, path, form in pieces
        )
    value = _cell(row, said, (), where)
    if not isinstance(value, str):
        hint = f"Write '{{{said}}}' for a number as text."
        if value is None:
            hint = "Leave the row out, or write an empty text."
        elif not isinstance(value, int | float | np.number):
            hint = f"Pick one with '{{{said}[0]}}' or '{{{said}[key]}}'."
        raise DataError(f"{where}: '{said}' is {_told(value)}: expected text. {hint}")
    return value


def _filled(row: Mapping[str, Any], name: str, path: tuple[str, ...], form: str, where: str) -> str:
    value = _cell(row, name, path, where)
    if not isinstance(value, str | int | float | np.number):
        raise DataError(
            f"{where}: '{name}' is {_told(value)}: expected text or a number. Pick one with '{{{name}[0]}}' or "
            f"'{{{name}[key]}}'."
        )
    try:
        return format(value, form)
    except ValueError as error:
        raise DataError(
            f"{where}: '{name}' is {value!r}: expected something for the format {form!r} ({error})."
        ) from None


def _cell(row: Mapping[str, Any], name: str, path: tuple[str, ...], where: str) -> Any:
    if name not in row:
        raise _unknown(name, row, where)
    value, told = row[name], name
    for key in path:
        told = f"{told}[{key}]"
        try:
            value = value[key] if isinstance(value, Mapping) else value[int(key)]
        except (KeyError, IndexError, TypeError, ValueError):
            raise DataError(
                f"{where}: no {told}: '{name}' is {_told(row[name])}. Pick what each row has, or leave the row out."
            ) from None
    return value


def _unknown(name: str, there: Iterable[str], where: str) -> DataError:
    known = [str(column) for column in there]
    listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    return DataError(
        f"{where}: no column '{name}': there are {listed or 'none'}.{nearest(name, known)} Say which column holds "
        "what: Columns(image=…, prefix=…, suffix=…), a fixed text as '=caption en'."
    )


def said_by(record: Record) -> Iterator[str]:
    """Every text of a record of which a prompt or an answer can be made."""
    yield from (item.label for item in record.instances)
    yield from (item.text for item in record.written)
    for asked in record.questions:
        yield from (asked.question, *asked.answers)


def texts_of(row: Example | Record) -> Iterator[str]:
    """Everything in a row that is text, what stands in its meta included."""
    yield from (row.prefix, row.suffix) if isinstance(row, Example) else said_by(row)
    yield from _texts_in(row.meta)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*_texts_in(key), *_texts_in(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)


def require_text(text: str, where: str) -> None:
    """Whether a text can be written.

    Raises:
        DataError: it holds half of a character, as files do that were cut or read in another encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{where}: {text[:60]!r} holds half of a character at {error.start}: expected whole ones. Mend it."
        raise DataError(message, kind="not UTF-8") from None


def _weight(weight: Any, where: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float | np.number) or not 0 <= weight < float("inf"):
        raise DataError(f"{where}: 'weight' is {weight!r}: expected a finite number of 0 or more.")
    return float(weight)


def _stretches(said: Any, where: str) -> tuple[tuple[int, int], ...]:
    try:
        pairs = tuple((int(first), int(last)) for first, last in said or ())
        if any(not 0 <= first < last for first, last in pairs):
            raise ValueError
        return pairs
    except (TypeError, ValueError):
        raise DataError(f"{where}: 'unlearned' is {said!r}: expected pairs of first and last character.") from None


def _spread(meta: dict[str, Any]) -> dict[str, Any]:
    """With the column meta, a JSON object, in the place of its keys."""
    inner = meta.get("meta", ...)
    if inner is not None and not isinstance(inner, str):
        return meta
    try:
        keys = json.loads(inner) if inner else {}
    except ValueError:
        return meta
    return {**{k: v for k, v in meta.items() if k != "meta"}, **keys} if isinstance(keys, dict) else meta


def _told(value: Any) -> str:
    if value is None:
        return "empty (null)"
    if isinstance(value, list | tuple | Mapping | str) and not value:
        return f"an empty {type(value).__name__}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "a group of " + ", ".join(str(key) for key in list(value)[:8])
    return f"a {type(value).__name__}"
