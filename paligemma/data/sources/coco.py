"""COCO: boxes, masks, captions and words of pictures, in one JSON file or in several about the same pictures.

    train/_annotations.coco.json  valid/…  test/…                        Roboflow, pictures beside the file
    annotations/instances_train2017.json  captions_train2017.json  …     official, pictures in train2017/ or images/…
    train.json  val.json  annotations.json                               pictures beside them, or under images/

Boxes stand as the file has them, turned over and outside of the picture too: `paligemma data check` counts those.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paligemma.data.record import Instance, Record, Word
from paligemma.data.sources.coco_fields import (
    READ,
    asked_of,
    box_of,
    is_crowd,
    mask_of,
    needed_box,
    size_of_row,
    string_of,
    text_of,
)
from paligemma.data.sources.compact import Compact
from paligemma.data.sources.folder import picture_size, read_text
from paligemma.data.sources.jsonl import SPLITS
from paligemma.data.sources.paths import is_inside, picture_path
from paligemma.data.sources.splits import trying
from paligemma.errors import DataError, nearest

CAPTION_FILE = "_captions.coco.json"
_KNOWN = ("id", "file_name", "width", "height")
_KINDS = ("instances", "captions")
_YEAR = re.compile(r"(?:19|20)\d\d$")


class Coco:
    """Pictures of a COCO file with what is annotated about them, by number in the order of the file.

    Args:
        path: the file, or several about the same pictures, such as instances and captions: they are joined by image id.
        images: folder of the pictures; default the file's own.
        allow_outside: let file names be absolute, and lead out of the folder.

    Attributes:
        labels: names of the categories in the order of their ids; without Roboflow's unused super-category and without
            the category of words.
        problems: what is wrong with the file as a whole: ids used twice, annotations of pictures that are not there.

    Raises:
        DataError: no such file, not JSON in UTF-8, not COCO's tables, or no picture in it.
    """

    def __init__(
        self, path: str | Path | Sequence[str | Path], *, images: str | Path | None = None, allow_outside: bool = False
    ) -> None:
        self.paths = tuple(Path(one) for one in ([path] if isinstance(path, str | Path) else path))
        self.path = self.paths[0]
        self.images = Path(images) if images is not None else self.path.parent
        self.allow_outside = allow_outside
        rows: list[dict[str, Any]] = []
        notes: dict[Any, list[dict[str, Any]]] = {}  # image id → annotations
        self._categories: dict[Any, str] = {}
        self._unclear: dict[str, set[Any]] = {"image": set(), "category": set()}  # ids that mean two things
        problems: list[str] = []
        self.left_out: Counter[str] = Counter()  # what annotations hold and records have no place for
        categories: dict[Any, dict[str, Any]] = {}
        for file in self.paths:
            tables = _tables(file)
            problems += self._add_images(tables["images"], file, rows)
            problems += self._add_categories(tables["categories"], file, categories)
            problems += _add_annotations(tables["annotations"], file, rows, notes)
        for own in notes.values():
            for note in own:
                self.left_out.update(f"'{key}' of single annotations" for key in note if key not in READ)
        if not rows:
            raise DataError(f"{self.path}: no pictures: expected rows in 'images'. Is this the right file?")
        self.labels = _labels(categories, notes)
        self._rows = Compact(rows)
        self._notes = Compact(notes.get(row.get("id"), ()) for row in rows)
        self.problems = tuple(problems)
        self._name = self.path.name
        if self._name.startswith("_"):  # Roboflow calls the file of every split the same
            self._name = f"{self.path.absolute().parent.name}/{self._name}"

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """How messages call a row."""
        return self._where(self._rows[index])

    def _where(self, row: Mapping[str, Any]) -> str:
        return f"{self._name} image {row.get('id')} ({row.get('file_name')})"

    def row(self, index: int) -> dict[str, Any]:
        """An image as it stands in the file."""
        row: dict[str, Any] = self._rows[index]
        return row

    def __getitem__(self, index: int) -> Record:
        """The record of a picture; nothing is decoded. Its size comes from the file, or else from the picture's head.

        Raises:
            DataError: the picture is not there or not allowed, or an annotation cannot be used: an unknown category, no
                box or not four finite numbers, a mask of another size, two pictures of one id.
        """
        row = self.row(index)
        where = self._where(row)
        if row.get("id") is None:
            raise DataError(f"{where}: no id: expected a number. Give every image one.")
        if row["id"] in self._unclear["image"]:
            raise DataError(f"{where}: another image has this id: expected one. Give every image its own.")
        if "file_name" not in row:
            message = f"{where}: no file_name: expected the name of the picture.{nearest('file_name', row)}"
            raise DataError(message, kind="wrong column")
        picture = picture_path(self.images, row["file_name"], where, allow_outside=self.allow_outside)
        size = size_of_row(row, where) or picture_size(picture, where)
        found: dict[str, list[Any]] = {"instances": [], "texts": [], "words": [], "questions": []}
        n_illegible = 0
        for note in self._notes[index]:
            called = f"{where}: annotation {note.get('id')}"
            if "caption" in note:
                found["texts"].append(text_of(note, called))
            elif "question" in note:
                found["questions"].append(asked_of(note, called))
            elif "utf8_string" in note:
                found["words"].append(Word(string_of(note, "utf8_string", called), box_of(note, called, may_lack=True)))
            elif "legibility" in note:  # COCO-Text: a place of text that nobody could read
                n_illegible += 1
            else:
                label = self._label(note, called)
                mask = mask_of(note.get("segmentation"), size, called)
                found["instances"].append(Instance(label, needed_box(note, called), mask, is_crowd(note, called)))
        meta = {key: value for key, value in row.items() if key not in _KNOWN}
        if n_illegible:
            meta["n_illegible"] = n_illegible
        parts = {kind: tuple(items) for kind, items in found.items()}
        return Record((picture,), size, id=str(row["id"]), where=where, meta=meta, **parts)

    def _add_images(self, given: Iterable[Any], file: Path, rows: list[dict[str, Any]]) -> list[str]:
        """Append the pictures of a file to `rows`; what is wrong with them."""
        known = {row.get("id"): row for row in rows if row.get("id") is not None}
        seen: set[Any] = set()
        twice: list[str] = []
        other: list[str] = []
        for row in given:
            if not isinstance(row, dict) or not isinstance(row.get("id"), int | str | None):
                raise DataError(f"{file}: an image {str(row)[:80]}: expected an object with id and file_name.")
            id = row.get("id")
            same = known.get(id)
            if same is not None:
                (twice if id in seen else other).append(f"{id}: {same.get('file_name')} and {row.get('file_name')}")
            if same is None or same.get("file_name") != row.get("file_name"):
                rows.append(row)
                if same is not None:
                    self._unclear["image"].add(id)
            elif id not in seen:
                other.pop()  # the same picture in several files: they are joined
            if id is not None:
                known.setdefault(id, row)
                seen.add(id)
        told = (("are used twice", twice), ("are other pictures than in the file before", other))
        return [f"{file.name}: {len(ids):,} image ids {what}, the first {ids[0]}" for what, ids in told if ids]

    def _add_categories(self, rows: Iterable[Any], file: Path, categories: dict[Any, dict[str, Any]]) -> list[str]:
        problems = []
        names: Counter[str] = Counter()
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not isinstance(row.get("id"), int):
                raise DataError(f"{file}: a category {str(row)[:80]}: expected an object with id and name.")
            names[row["name"]] += 1
            if categories.get(row["id"], row)["name"] != row["name"]:
                self._unclear["category"].add(row["id"])
                both = f"{categories[row['id']]['name']!r} and {row['name']!r}"
                problems.append(f"{file.name}: category id {row['id']} is both {both}")
            categories.setdefault(row["id"], row)
            self._categories.setdefault(row["id"], row["name"])
        twice = [name for name, n in names.items() if n > 1]
        return problems + [f"{file.name}: {names[name]} categories are called {name!r}" for name in twice]

    def _label(self, note: Mapping[str, Any], where: str) -> str:
        id = note.get("category_id")
        if not isinstance(id, int) or id not in self._categories:
            known = ", ".join(f"{k} ({v})" for k, v in sorted(self._categories.items())[:8]) or "none"
            more = ", …" if len(self._categories) > 8 else ""
            hint = "" if "category_id" in note else nearest("category_id", note)
            raise DataError(f"{where} has category_id {id!r}: expected one of {known}{more}. Add the category.{hint}")
        if id in self._unclear["category"]:
            raise DataError(f"{where} has category_id {id}, which means two categories: expected one. Renumber them.")
        return self._categories[id]


def find_coco(
    folder: str | Path, *, images: str | Path | None = None, allow_outside: bool = False,
    failed: dict[str, DataError] | None = None,
) -> dict[str, Coco]:  # fmt: skip
    """The splits of a folder, or {"train": …} for a single file; instances and captions of a split are joined.

    Args:
        images: folder of the pictures, where they are in none of the usual places.
        allow_outside: as `Coco`; also lets folders of pictures be symbolic links that lead out of `folder`.
        failed: takes splits that cannot be opened, in place of an error.

    Raises:
        DataError: nothing that looks like COCO, or as `Coco`.
    """
    path = Path(folder)
    if path.is_file():
        return {"train": Coco(path, images=images, allow_outside=allow_outside)}
    found = {}
    for split, files in coco_files(path).items():
        place = Path(images) if images is not None else _pictures(path, files[0])
        if images is None and not allow_outside and not is_inside(path, place):
            raise DataError(
                f"{place} leads out of {path} through a symbolic link: expected a folder inside. Move it, name it with "
                "images=…, or allow it with allow_outside=True (--allow-outside)."
            )
        with trying(split, failed):
            found[split] = Coco(files, images=place, allow_outside=allow_outside)
            name = str(found[split].row(0).get("file_name"))
            if images is None and not os.path.isfile(place / name) and os.path.isfile(path / name):
                found[split].images = path  # names that begin with the folder of their split
    if not found and not failed:
        raise DataError(
            f"{path}: no COCO files: expected train/_annotations.coco.json, annotations/instances_train2017.json or "
            "train.json with images, annotations and categories."
        )
    return found


def coco_files(path: Path) -> dict[str, list[Path]]:
    """The files of each split by their names; nothing is opened."""
    found: dict[str, list[Path]] = {}
    for split, words in SPLITS.items():
        roboflow = [path / word / name for word in words for name in ("_annotations.coco.json", CAPTION_FILE)]
        files = [file for file in roboflow if file.is_file()] or _official(path, words)
        if not files:
            plain = [base / f"{word}.json" for base in (path, path / "annotations") for word in words]
            files = [file for file in plain if file.is_file()][:1]
        if files:
            found[split] = files
    if not found:
        whole = [
            path / place for place in ("annotations.json", "_annotations.coco.json", "annotations/annotations.json")
        ]
        files = [file for file in whole if file.is_file()][:1]
        found = {"train": files} if files else {}
    return found


def _official(path: Path, words: Sequence[str]) -> list[Path]:
    """instances_{split}{year}.json and captions_… of one year, the newest."""
    by_year: dict[str, list[Path]] = {}
    for base in (path / "annotations", path):
        for kind in _KINDS:
            for word in words:
                for file in sorted(base.glob(f"{kind}_{word}*.json")):
                    year = file.stem.removeprefix(f"{kind}_{word}")
                    if not year or _YEAR.match(year):
                        by_year.setdefault(year, []).append(file)
    return by_year[max(by_year)] if by_year else []


def _pictures(path: Path, file: Path) -> Path:
    """The folder that holds the pictures of a file."""
    stem = file.stem.split("_", 1)[-1] if file.stem.startswith(tuple(f"{kind}_" for kind in _KINDS)) else file.stem
    word = _YEAR.sub("", stem)
    named = [path / base / name for name in (stem, word) if name != "annotations" for base in ("", "images")]
    for place in named:
        if place.is_dir() and file.parent != place:
            return place
    if file.parent.name == "annotations":
        return path
    return file.parent


def _tables(path: Path) -> dict[str, list[Any]]:
    """The tables of a file as lists, COCO-Text's too."""
    text = read_text(path, "a COCO file")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}): expected a COCO file. Fetch or write it again.") from None
    if not isinstance(data, dict):
        raise DataError(
            f"{path}: a {type(data).__name__}: expected an object with images, annotations and categories. A list of "
            "results says nothing about pictures: put it in as 'annotations'."
        )
    if "imgs" in data and "images" not in data:  # COCO-Text
        names = {"images": "imgs", "annotations": "anns", "categories": "cats"}
        data = {name: _listed(data.get(old)) for name, old in names.items()}
    for name in ("images", "annotations", "categories"):
        if name not in data and (name == "images" or nearest(name, data)):
            raise DataError(f"{path}: no '{name}': expected images, annotations and categories.{nearest(name, data)}")
        if not isinstance(data.get(name, []), list):
            raise DataError(f"{path}: '{name}' is a {type(data[name]).__name__}: expected a list.")
    return {name: data.get(name, []) for name in ("images", "annotations", "categories")}


def _listed(table: Any) -> list[Any]:
    return list(table.values()) if isinstance(table, dict) else []


def _add_annotations(
    given: Iterable[Any], file: Path, rows: list[dict[str, Any]], notes: dict[Any, list[dict[str, Any]]]
) -> list[str]:
    """Add the annotations of a file to those of its pictures in `notes`; what is wrong with them."""
    problems = []
    images = {row.get("id") for row in rows}
    ids: set[Any] = set()
    n_twice, twice = 0, None
    unknown: list[dict[str, Any]] = []
    for row in given:
        if not isinstance(row, dict) or not isinstance(row.get("image_id"), int | str | None):
            raise DataError(f"{file}: an annotation {str(row)[:80]}: expected an object with image_id.")
        if isinstance(id := row.get("id"), int | str):
            n_twice, twice = (n_twice + 1, twice if n_twice else id) if id in ids else (n_twice, twice)
            ids.add(id)
        if row.get("image_id") in images:
            notes.setdefault(row["image_id"], []).append(row)
        else:
            unknown.append(row)
    if n_twice:
        problems.append(f"{file.name}: {n_twice:,} annotation ids are used twice, the first {twice}")
    if unknown:
        lost = unknown[0]
        hint = "" if "image_id" in lost else nearest("image_id", lost)
        first = f"annotation {lost.get('id')} of image {lost.get('image_id')}"
        problems.append(
            f"{file.name}: {len(unknown):,} annotations of pictures that are not there, first {first}{hint}"
        )
    return problems


def _labels(categories: dict[Any, dict[str, Any]], notes: dict[Any, list[dict[str, Any]]]) -> tuple[str, ...]:
    """Names of the categories, less those that no thing can have."""
    used: set[Any] = set()
    words: set[Any] = set()
    for own in notes.values():
        for note in own:
            if isinstance(id := note.get("category_id"), int):
                (words if "utf8_string" in note else used).add(id)
    words -= used
    others = [row for row in categories.values() if row["id"] != 0]
    root = categories.get(0)
    is_root = bool(others) and root is not None and all(row.get("supercategory") == root["name"] for row in others)
    if is_root and 0 not in used:
        words = words | {0}  # Roboflow's: the project's own name
    left = sorted(id for id in categories if id not in words)
    return tuple(dict.fromkeys(categories[id]["name"] for id in left))
