"""Pascal VOC: an XML file of boxes beside each picture.

    Annotations/a.xml  JPEGImages/a.jpg  ImageSets/Main/train.txt  val.txt  test.txt      official, also in VOCdevkit/…
    train/a.xml  train/a.jpg  valid/…  test/…                                             Roboflow

VOC counts pixels from 1 and includes the last one, so a box (xmin, ymin, xmax, ymax) has the edges (xmin - 1, ymin - 1,
xmax, ymax). Many tools, Roboflow among them, write edges as they are: `find_voc` takes Roboflow's layout so, and any
other with `one_based=False`.
"""

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.parsers import expat

from paligemma.data.record import Instance, Record
from paligemma.data.sources.folder import (
    SUFFIXES,
    Names,
    open_text,
    picture_size,
    read_text,
    refuse_existing,
    replaced,
    save_picture,
    single_picture,
    size_of,
    split_name,
)
from paligemma.data.sources.jsonl import SPLITS
from paligemma.data.sources.paths import is_inside, leads_out, picture_path
from paligemma.errors import DataError, nearest
from paligemma.results import BoxXyxyPx

LABELS = "labels.txt"  # ours: VOC itself keeps no list of classes
_SETS = {"train": "train", "valid": "val", "test": "test"}
_EXTRAS = ("pose", "truncated", "difficult")
_OLD_LINE = re.compile(r"(.+?)\s+(?:-1|0|1)")  # "2008_000008 -1", the lists of one class


class Voc:
    """Pictures with their boxes, by number.

    Args:
        names: of the XML files, without ending.
        annotations: their folder.
        images: folder of the pictures.
        labels: class names; () gathers them from all files, in alphabetical order, when first asked for.
        one_based: boxes count pixels from 1 and include the last, as VOC's own; False: edges, as Roboflow's.
        allow_outside: let files name pictures elsewhere.

    Raises:
        DataError: no name.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        annotations: str | Path,
        images: str | Path,
        labels: Sequence[str] = (),
        one_based: bool = True,
        allow_outside: bool = False,
    ) -> None:
        if not names:
            raise DataError(f"{annotations}: no XML files: expected one for each picture. Is this the right folder?")
        self.annotations, self.images = Path(annotations), Path(images)
        self.one_based, self.allow_outside = one_based, allow_outside
        self._names = list(names)
        self._labels = tuple(labels)

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        """How messages call a picture: by the name of its XML file."""
        return f"{self.annotations.name}/{self._names[index]}.xml"

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """All class names; files that cannot be read add none, their rows say why."""
        if self._labels:
            return self._labels
        found: set[str] = set()
        for index in range(len(self)):
            try:
                found |= {_said(thing, "name") for thing in self._tree(index).findall("object")}
            except DataError:
                continue
        return tuple(sorted(found - {""}))

    @property
    def problems(self) -> tuple[str, ...]:
        """Names that stand twice in the list."""
        twice = [name for name, n in Counter(self._names).items() if n > 1]
        return (f"{len(twice):,} names are listed twice, the first {twice[0]}",) if twice else ()

    def __getitem__(self, index: int) -> Record:
        """The record of a picture; meta["objects"] holds pose, truncated and difficult of each object.

        Raises:
            DataError: the XML file is missing, damaged or declares entities, a box is not four finite numbers, or the
                picture is not there or not allowed.
        """
        where, tree = self.where(index), self._tree(index)
        picture = self._picture(tree, index)
        sides = [_said(tree, f"size/{side}") for side in ("height", "width")]
        size = (int(sides[0]), int(sides[1])) if all(s.isdecimal() and int(s) > 0 for s in sides) else None
        instances, extras = [], []
        for number, thing in enumerate(tree.findall("object"), 1):
            label, called = _said(thing, "name"), f"{where} object {number}"
            if not label:
                raise DataError(f"{called}: no name: expected a label.")
            instances.append(Instance(label, self._box(thing, called)))
            extras.append({key: said for key in _EXTRAS if (said := _said(thing, key))})
        meta: dict[str, Any] = {"objects": tuple(extras)} if any(extras) else {}
        size = size or picture_size(picture, where)
        return Record((picture,), size, tuple(instances), id=self._names[index], where=where, meta=meta)

    def _tree(self, index: int) -> ET.Element:
        name, where = self._names[index], self.where(index)
        file = self.annotations / f"{name}.xml"
        if leads_out(name) or not (self.allow_outside or is_inside(self.annotations, file)):
            raise DataError(f"{where} lies outside {self.annotations}: expected a name inside. Mend the list of names.")
        try:
            data = file.read_bytes()
        except OSError:
            known = [path.stem for path in file.parent.glob(f"{name[:3].replace('[', '?')}*.xml")]
            raise DataError(f"{where}: no such file: expected an XML file.{nearest(name, known)}") from None
        return read_xml(data, where)

    def _picture(self, tree: ET.Element, index: int) -> Path:
        """As the file names it; where it names none, the one that is called like the XML file."""
        named, stem, where = _said(tree, "filename"), self._names[index], self.where(index)
        if not named or not Path(named).suffix:
            stem = named or stem
            beside = [f"{stem}{suffix}" for suffix in (".jpg", *sorted(SUFFIXES))]
            named = next((name for name in beside if (self.images / name).is_file()), beside[0])
        return picture_path(self.images, named, where, allow_outside=self.allow_outside, also=())

    def _box(self, thing: ET.Element, where: str) -> BoxXyxyPx:
        said = [_said(thing, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = (float(edge) for edge in said)
        except ValueError:
            raise DataError(f"{where}: bndbox {said}: expected numbers xmin, ymin, xmax and ymax.") from None
        if not all(math.isfinite(edge) for edge in (left, top, right, bottom)):
            raise DataError(f"{where}: bndbox {said}: expected finite numbers.")
        return (left - 1, top - 1, right, bottom) if self.one_based else (left, top, right, bottom)


def find_voc(folder: str | Path, *, one_based: bool | None = None, allow_outside: bool = False) -> dict[str, Voc]:
    """The splits of a folder; one without lists of names is all "train".

    Args:
        one_based: as in `Voc`; None: True with an `Annotations` folder, False where XML files lie beside the pictures.

    Raises:
        DataError: nothing that looks like VOC, or several years of it.
    """
    path = voc_base(Path(folder))
    if one_based is None:
        one_based = (path / "Annotations").is_dir()
    options = {"one_based": one_based, "allow_outside": allow_outside}
    labels = _labels(path)
    found: dict[str, Voc] = {}
    if (path / "Annotations").is_dir():
        inside = {"annotations": path / "Annotations", "images": path / "JPEGImages"}
        if not inside["images"].is_dir():
            inside["images"] = path / "images" if (path / "images").is_dir() else path
        for place in inside.values():
            if not allow_outside and not is_inside(path, place):
                raise DataError(f"{place} leads out of {path}: expected a folder inside. Allow it: allow_outside=True.")
        for split, words in SPLITS.items():
            lists = [path / "ImageSets" / "Main" / f"{word}.txt" for word in words]
            file = next((file for file in lists if file.is_file()), None)
            if file is not None:
                found[split] = Voc(_listed(file, inside["annotations"]), labels=labels, **inside, **options)  # type: ignore[arg-type]
        if not found:
            both = path / "ImageSets" / "Main" / "trainval.txt"
            names = _listed(both, inside["annotations"]) if both.is_file() else _xml_names(inside["annotations"])
            found["train"] = Voc(names, labels=labels, **inside, **options)  # type: ignore[arg-type]
        return found
    for split, words in SPLITS.items():
        beside = next((path / word for word in words if _xml_names(path / word)), None)
        if beside is not None:
            found[split] = Voc(_xml_names(beside), annotations=beside, images=beside, labels=labels, **options)  # type: ignore[arg-type]
    if not found and _xml_names(path):
        found["train"] = Voc(_xml_names(path), annotations=path, images=path, labels=labels, **options)  # type: ignore[arg-type]
    if not found:
        raise DataError(f"{folder}: no Pascal VOC: expected Annotations/ and JPEGImages/, or train/*.xml.")
    return found


def voc_base(path: Path) -> Path:
    """The folder that holds Annotations/: the one given, or the only year in it.

    Raises:
        DataError: several years.
    """
    if (path / "Annotations").is_dir():
        return path
    years = sorted(inner.parent for inner in (*path.glob("VOC*/Annotations"), *path.glob("VOCdevkit/VOC*/Annotations")))
    if len(years) > 1:
        raise DataError(f"{path} holds {', '.join(year.name for year in years)}: expected one. Name its folder.")
    return years[0] if years else path


def read_xml(data: bytes, where: str) -> ET.Element:
    """The tree of an XML file; one that declares a document type or entities is refused: those can grow without end.

    Raises:
        DataError: refused, or not XML.
    """
    builder = ET.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: Any) -> None:
        raise DataError(f"{where}: declares a document type or entities: expected plain XML. Take the DOCTYPE out.")

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DataError(f"{where}: not XML ({error}): expected a VOC annotation. Fetch or write it again.") from None
    tree = builder.close()
    if tree.tag != "annotation":
        raise DataError(f"{where}: <{tree.tag}>: expected <annotation> with size and object. Is this a VOC file?")
    return tree


def write_voc(
    records: Iterable[Record],
    folder: str | Path,
    split: str = "train",
    labels: Sequence[str] = (),
    *,
    overwrite: bool = False,
    left_out: Counter[str] | None = None,
) -> Path:
    """Write JPEGImages/, Annotations/ and ImageSets/Main/{split}.txt; boxes count from 1, in whole pixels.

    Edges are rounded; a box thinner than a pixel is widened to one. Pictures stay as they are, PNG too.

    Args:
        labels: class names; they are kept in labels.txt, after those that are there.
        overwrite: replace this split where it is there already; its files go, unless another split lists them.
        left_out: counts what the format cannot carry.

    Returns:
        The list of names.

    Raises:
        OptionError: the split is there already, or an unknown split.
        DataError: a picture that cannot be read, a label that is not among `labels`, or no records.
    """
    folder, split = Path(folder), split_name(split)
    left_out = Counter() if left_out is None else left_out
    sets = folder / "ImageSets" / "Main"
    file = sets / f"{_SETS[split]}.txt"
    refuse_existing(split, file, overwrite=overwrite)
    pictures, texts = folder / "JPEGImages", folder / "Annotations"
    others = {line for other in sets.glob("*.txt") if other != file for line in read_text(other, "names").splitlines()}
    old = set(read_text(file, "names").splitlines() if file.exists() else ()) - others
    taken = [path.name for place in (pictures, texts) if place.is_dir() for path in place.iterdir()]
    names = Names([name for name in taken if Path(name).stem not in old], by_stem=True)
    known = dict.fromkeys((*_labels(folder), *labels))
    written = []
    for record in records:
        if not single_picture(record):
            left_out["records of no picture or of several"] += 1
            continue
        for item in record.instances:
            if labels and item.label not in known:
                raise DataError(
                    f"{record.where}: the label {item.label!r} is none of the {len(known)} of the data set: expected "
                    f"one of labels=….{nearest(item.label, known)} Add it there."
                )
            known.setdefault(item.label)
        name = names.of(record.images[0], record.id)
        save_picture(record.images[0], pictures / name, record.where)
        tree = _annotation(record, name, left_out)
        with replaced(texts / f"{Path(name).stem}.xml") as part:
            tree.write(part, encoding="utf-8")
        written.append((Path(name).stem, name))
    if not written:
        raise DataError(f"no records for {file}: expected at least one picture.")
    for path, rows in ((folder / LABELS, known), (file, [stem for stem, _ in written])):
        with replaced(path) as part, open_text(part) as out:
            out.writelines(f"{row}\n" for row in rows)
    _remove(old, written, pictures, texts)
    return file


def _remove(old: set[str], written: Sequence[tuple[str, str]], pictures: Path, texts: Path) -> None:
    """What the split held before and holds no longer."""
    kept = dict(written)
    for path in [*pictures.iterdir(), *texts.iterdir()]:
        if path.stem in old and path.name not in (kept.get(path.stem), f"{path.stem}.xml" * (path.stem in kept)):
            path.unlink()


def _annotation(record: Record, name: str, left_out: Counter[str]) -> "ET.ElementTree[ET.Element]":
    height, width = size_of(record)
    root = ET.Element("annotation")
    _put(root, "folder", "JPEGImages")
    _put(root, "filename", name)
    _put(ET.SubElement(root, "source"), "database", "paligemma, pixels from 1")
    size = ET.SubElement(root, "size")
    for side, value in (("width", width), ("height", height), ("depth", 3)):
        _put(size, side, str(value))
    _put(root, "segmented", "0")
    extras = record.meta.get("objects", ())
    extras = extras if isinstance(extras, list | tuple) and len(extras) == len(record.instances) else ()
    for number, item in enumerate(record.instances):
        if item.is_crowd:
            left_out["crowd regions"] += 1
            continue
        left_out["masks"] += item.mask is not None
        thing = ET.SubElement(root, "object")
        _put(thing, "name", item.label)
        said = extras[number] if extras and isinstance(extras[number], dict) else {}
        for key, plain in zip(_EXTRAS, ("Unspecified", "0", "0"), strict=True):
            _put(thing, key, str(said.get(key, plain)))
        box = ET.SubElement(thing, "bndbox")
        left, top, right, bottom = whole_pixels(item.box_xyxy_px)
        for edge, value in (("xmin", left + 1), ("ymin", top + 1), ("xmax", right), ("ymax", bottom)):
            _put(box, edge, str(value))
    for what in ("texts", "words", "questions"):
        left_out[what] += len(getattr(record, what))
    ET.indent(root)
    return ET.ElementTree(root)


def whole_pixels(box: BoxXyxyPx) -> tuple[int, int, int, int]:
    """Edges rounded to whole pixels; a side that would have none gets the one it lies in."""
    rounded = [math.floor(edge + 0.5) for edge in box]
    for low, high in ((0, 2), (1, 3)):
        if rounded[low] >= rounded[high] and box[low] < box[high]:
            rounded[low] = math.floor((box[low] + box[high]) / 2)
            rounded[high] = rounded[low] + 1
    return rounded[0], rounded[1], rounded[2], rounded[3]


def _put(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text


def _said(tree: ET.Element, path: str) -> str:
    return (tree.findtext(path) or "").strip()


def _labels(path: Path) -> tuple[str, ...]:
    file = path / LABELS
    if not file.is_file():
        return ()
    return tuple(dict.fromkeys(line.strip() for line in read_text(file, "class names").splitlines() if line.strip()))


def _listed(file: Path, annotations: Path) -> list[str]:
    names = []
    for line in read_text(file, "a list of names").splitlines():
        name = line.strip()
        old = _OLD_LINE.fullmatch(name)
        if old and not (annotations / f"{name}.xml").is_file():
            name = old[1]
        if name:
            names.append(name)
    if not names:
        raise DataError(f"{file}: no names: expected one a line. Is this the right file?")
    return names


def _xml_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.xml")) if folder.is_dir() else []
