"""YOLO as Ultralytics lays it out: a data.yaml, pictures, and a text file of boxes or outlines beside each.

    data.yaml      names: [cat, dog]  train: images/train  val: images/val     folders, lists of folders, .txt of paths
    images/train/a.jpg  labels/train/a.txt                                     or train/images/a.jpg train/labels/a.txt

    0 0.5 0.5 0.25 0.1                     class, middle x, middle y, width, height as fractions of the picture
    0 0.1 0.1 0.4 0.1 0.4 0.3 …            class, then the corners of an outline

A picture without a text file has no objects.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from paligemma.data.record import Instance, Mask, Polygon, Record
from paligemma.data.sources.compact import Compact
from paligemma.data.sources.folder import is_picture, picture_size, pictures_of, read_text
from paligemma.data.sources.jsonl import SPLITS
from paligemma.data.sources.outline import split_outlines
from paligemma.data.sources.paths import is_inside, picture_path
from paligemma.data.sources.splits import trying
from paligemma.errors import DataError, nearest

_PIXEL_DECIMALS = 6  # what had no more comes back as it was
_YAML_NAMES = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")


class Yolo:
    """Pictures of one split with their objects, by number.

    Args:
        pictures: their files.
        labels: class names in the order of their numbers, or by number.
        root: folder whose part "images" becomes "labels" in the path of a text file.
        has_keypoints: rows go on after the box; what follows is left out.
        allow_outside: let pictures lie outside of `root`, also through symbolic links.

    Raises:
        DataError: no picture.
    """

    def __init__(
        self,
        pictures: Sequence[Path],
        labels: Sequence[str] | Mapping[int, str],
        *,
        root: str | Path,
        has_keypoints: bool = False,
        allow_outside: bool = False,
    ) -> None:
        if not pictures:
            raise DataError(f"{root}: no pictures: expected at least one. Is this the right folder?")
        self.root = Path(root)
        self._pictures = Compact(str(picture) for picture in pictures)
        self._names = dict(labels) if isinstance(labels, Mapping) else dict(enumerate(labels))
        self.labels = tuple(dict.fromkeys(self._names[number] for number in sorted(self._names)))
        self.has_keypoints, self.allow_outside = has_keypoints, allow_outside
        self.lists: frozenset[Path] = frozenset()  # text files that name pictures, and belong to none
        self.refused: Mapping[Path, DataError] = {}  # pictures that a list names and that may not be read, or are gone

    def __len__(self) -> int:
        return len(self._pictures)

    def where(self, index: int) -> str:
        """How messages call a picture: by the name of its text file."""
        return os.path.relpath(self.text_of(Path(self._pictures[index])), self.root)

    def text_of(self, picture: Path) -> Path:
        """The text file of a picture: the last folder "images" of its path becomes "labels"."""
        try:
            base, inner = self.root, picture.relative_to(self.root)
        except ValueError:
            base, inner = Path(picture.anchor), picture.relative_to(picture.anchor)
        parts = list(inner.parts)
        folders = parts[:-1]
        if "images" in folders:
            parts[len(folders) - 1 - folders[::-1].index("images")] = "labels"
        return base.joinpath(*parts).with_suffix(".txt")

    def __getitem__(self, index: int) -> Record:
        """The record of a picture; of the picture only the head is read, for its size.

        Raises:
            DataError: a row of the text file that is no box and no outline, or an unknown class; a damaged picture; a
                line of a list that names none.
        """
        picture, where = Path(self._pictures[index]), self.where(index)
        if (refused := self.refused.get(picture)) is not None:
            raise DataError(str(refused), kind=refused.kind)
        name = os.path.relpath(picture, self.root)
        picture_path(self.root, name, where, allow_outside=self.allow_outside, also=())
        size, text = picture_size(picture, where), self.text_of(picture)
        if not self.allow_outside and not is_inside(self.root, text):
            raise DataError(f"{where} leads outside {self.root}: expected a file inside. Copy it in.")
        instances = []
        if text.is_file():
            for number, line in enumerate(read_text(text, "a text file of boxes").splitlines(), 1):
                if line.strip():
                    instances.append(self._instance(line.split(), size, f"{where} line {number}"))
        return Record((picture,), size, tuple(instances), id=Path(name).with_suffix("").as_posix(), where=where)

    @property
    def problems(self) -> tuple[str, ...]:
        """Text files without a picture, and those that two pictures share; the folders are listed anew each time.

        A picture of another split counts: lists of pictures may divide one folder.
        """
        pictures = map(Path, self._pictures)
        texts = Counter(self.text_of(picture) for picture in pictures if picture not in self.refused)
        shared = [text for text, n in texts.items() if n > 1]
        folders = {text.parent for text in texts}
        lost = sorted(
            text
            for folder in folders
            for known in [_stems(folder)]
            for text in folder.glob("*.txt")
            if text not in texts
            and text.stem not in known
            and text not in self.lists
            and not text.name.lower().startswith(("classes", "readme"))
        )
        told = (("text files without a picture", lost), ("text files that two pictures share", shared))
        return tuple(f"{len(files):,} {what}, the first {files[0]}" for what, files in told if files)

    def _instance(self, said: Sequence[str], size_hw: tuple[int, int], where: str) -> Instance:
        try:
            number, *values = (float(word) for word in said)
        except ValueError:
            raise DataError(f"{where}: {' '.join(said)[:80]!r}: expected numbers, class first.") from None
        if not all(abs(value) < 1e9 for value in (number, *values)):  # False for what is no number
            raise DataError(f"{where}: {' '.join(said)[:80]!r}: expected finite numbers.")
        if number not in self._names:
            known = f"one of 0 to {max(self._names)}" if self._names else "one of names"
            raise DataError(f"{where}: class {said[0]}: expected {known}, {len(self._names)} names. Mend data.yaml.")
        label = self._names[int(number)]
        values = values[:4] if self.has_keypoints else values
        height, width = size_hw
        if len(values) == 4:
            x, y, w, h = values
            edges = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            left, top, right, bottom = (_pixel(edge) for edge in edges)
            return Instance(label, (left, top, right, bottom))
        if len(values) < 6 or len(values) % 2:
            raise DataError(
                f"{where}: {len(values) + 1} values: expected class x y width height, or class and three corners or "
                "more. A score belongs to predictions: leave it out."
            )
        outer: Polygon = tuple(_pixel(v * (height if i % 2 else width)) for i, v in enumerate(values))
        box = (min(outer[::2]), min(outer[1::2]), max(outer[::2]), max(outer[1::2]))
        return Instance(label, box, Mask(size_hw, polygons=split_outlines(outer)))


def _stems(texts: Path) -> set[str]:
    """Names of the pictures that the text files of a folder can belong to, without ending."""
    folders, parts = [texts], list(texts.parts)
    if "labels" in parts:
        parts[len(parts) - 1 - parts[::-1].index("labels")] = "images"
        folders.append(Path(*parts))
    return {path.stem for folder in folders if folder.is_dir() for path in folder.iterdir() if is_picture(path.name)}


def find_yolo(
    folder: str | Path, *, allow_outside: bool = False, failed: dict[str, DataError] | None = None
) -> dict[str, Yolo]:
    """The splits that a data.yaml names.

    Args:
        folder: with the data.yaml, or the file itself.
        allow_outside: let it name folders and pictures elsewhere.
        failed: takes splits that cannot be opened, in place of an error.

    Raises:
        DataError: no data.yaml, no names or no pictures, or a folder that is not there or not allowed.
    """
    file = yolo_file(Path(folder))
    if file is None:
        raise DataError(f"{folder}: no data.yaml: expected one with names and train. Name the file, or write it.")
    said = read_yaml(file)
    names = names_of(said, file)
    root = root_of(said, file, allow_outside)
    found: dict[str, Yolo] = {}
    lists: list[Path] = []
    refused: dict[Path, DataError] = {}
    for split, words in SPLITS.items():
        key = next((word for word in words if said.get(word)), None)
        if key is None:
            continue
        with trying(split, failed):
            entries = said[key] if isinstance(said[key], list) else [said[key]]
            pictures: list[Path] = []
            for entry in entries:
                place = _place(root, entry, f"{file.name} {key}", allow_outside)
                if place is None and (split == "test" or _is_roboflows(split, entry)):
                    continue  # Roboflow names all three folders whether it made them or not
                if place is None:
                    known = [path.relative_to(root).as_posix() for path in root.glob("*/*") if path.is_dir()]
                    hint = nearest(str(entry), known)
                    raise DataError(f"{file}: {key}: {entry} is not there: expected a folder of pictures.{hint}")
                if place.is_file():
                    lists.append(place)
                pictures += _listed(place, root, allow_outside, refused) if place.is_file() else pictures_of(place)
            if pictures:
                found[split] = Yolo(
                    pictures, names, root=root, has_keypoints="kpt_shape" in said, allow_outside=allow_outside
                )
            elif split != "test" and not all(_is_roboflows(split, entry) for entry in entries):
                raise DataError(f"{file}: {key}: no pictures in {said[key]}: expected at least one. Check the folder.")
    if not found and not failed:
        raise DataError(
            f"{file}: no train, val or test: expected a folder of pictures for each.{nearest('train', said)}"
        )
    for source in found.values():
        source.lists, source.refused = frozenset(lists), refused
    return found


def _is_roboflows(split: str, entry: Any) -> bool:
    """Whether a folder of held-out pictures is called as Roboflow does: "../valid/images"."""
    return split == "valid" and str(entry).removeprefix("../") == "valid/images"


def yolo_file(path: Path) -> Path | None:
    """The data.yaml of a folder: by its name, or the only yaml file there that has names."""
    if path.is_file():
        return path
    named = next((path / name for name in _YAML_NAMES if (path / name).is_file()), None)
    if named is not None:
        return named
    files = sorted((*path.glob("*.yaml"), *path.glob("*.yml")))
    others = [file for file in files if b"\nnames:" in b"\n" + file.read_bytes()]
    return others[0] if len(others) == 1 else None


def _pixel(value: float) -> float:
    return round(value, _PIXEL_DECIMALS) + 0.0  # no minus zero


def read_yaml(file: Path) -> dict[str, Any]:
    """What a data.yaml says.

    Raises:
        DataError: it cannot be read, or is no mapping.
    """
    try:
        said = yaml.safe_load(read_text(file, "a data.yaml"))
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2024-02-30 is a ValueError of Python's
        reason = str(error).replace("\n", " ")[:120]
        raise DataError(f"{file}: not YAML ({reason}): expected names, train and val. Mend the file.") from None
    if not isinstance(said, dict):
        raise DataError(f"{file}: a {type(said).__name__}: expected names, train and val. Is this the right file?")
    return said


def names_of(said: Mapping[str, Any], file: Path) -> dict[int, str]:
    """Class names by number.

    Raises:
        DataError: none, or numbers that are none.
    """
    names = said.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        hint = nearest("names", map(str, said)) if names is None else ""
        told = "empty" if not names else f"a {type(names).__name__}"
        raise DataError(f"{file}: names is {told}: expected the names of the classes, a list or by number.{hint}")
    if wrong := [name for name in names.values() if isinstance(name, bool) or name is None]:
        raise DataError(
            f"{file}: a name is {wrong[0]!r}, which YAML makes of words such as no, yes, on, off and null: expected "
            'text. Put it in quotes, "no".'
        )
    if not all(isinstance(number, int) and number >= 0 for number in names):
        raise DataError(f"{file}: names by {list(names)[:5]}: expected whole numbers from 0. Mend the file.")
    return {number: str(name) for number, name in names.items()}


def root_of(said: Mapping[str, Any], file: Path, allow_outside: bool) -> Path:
    """The folder that `path` names; where that is not there, and for relative ones, the file's own."""
    here = file.parent
    path = said.get("path")
    if not isinstance(path, str) or not path:
        return here
    place = here / path
    if not place.is_dir() or is_inside(here, place):
        return place if place.is_dir() else here  # written for another machine
    if not allow_outside:
        raise DataError(
            f"{file}: path: {path} lies outside {here}: expected a folder inside. Leave 'path' out, or allow it with "
            "allow_outside=True (--allow-outside)."
        )
    return place


def _place(root: Path, entry: Any, where: str, allow_outside: bool) -> Path | None:
    """A folder or file of pictures; Roboflow's "../train/images" stands beside the yaml."""
    if not isinstance(entry, str) or not entry:
        raise DataError(f"{where}: {entry!r}: expected a folder of pictures.")
    place = Path(os.path.normpath(root / entry))
    if place.exists() and (allow_outside or is_inside(root, place)):
        return place
    stripped = Path(os.path.normpath(root / entry.removeprefix("../")))
    if stripped.exists() and is_inside(root, stripped):
        return stripped
    if place.exists():
        raise DataError(
            f"{where}: {entry} lies outside {root}: expected a folder inside. Move it, or allow it with "
            "allow_outside=True (--allow-outside)."
        )
    return None


def _listed(file: Path, root: Path, allow_outside: bool, refused: dict[Path, DataError]) -> list[Path]:
    """The pictures that a .txt names, one a line; "./" is the folder of the file.

    Args:
        refused: takes what is wrong with a line, which is an error of its row and not of the list.
    """
    found = []
    for number, line in enumerate(read_text(file, "a list of pictures").splitlines(), 1):
        name, where = line.strip(), f"{file.name} line {number}"
        if not name:
            continue
        base = file.parent if name.startswith("./") else root
        try:
            found.append(picture_path(base, name, where, allow_outside=allow_outside, also=()))
        except DataError as error:
            found.append(base / name)
            refused[found[-1]] = error
    return found
