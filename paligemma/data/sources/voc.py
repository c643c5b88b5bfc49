"""Pascal VOC: an XML file of boxes beside each picture, and a PNG of object numbers where it has masks.

    Annotations/a.xml  JPEGImages/a.jpg  ImageSets/Main/train.txt  val.txt  test.txt      official, also in VOCdevkit/…
    SegmentationObject/a.png                                              pixel n is of the n-th object of the XML file
    train/a.xml  train/a.jpg  valid/…  test/…                                             Roboflow

VOC counts pixels from 1 and includes the last one, so a box (xmin, ymin, xmax, ymax) has the edges (xmin - 1, ymin - 1,
xmax, ymax). Many tools, Roboflow among them, write edges as they are: `find_voc` takes Roboflow's layout so, and any
other with `one_based=False`.
"""

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
import numpy.typing as npt

from paligemma.data.record import Instance, Mask, Record
from paligemma.data.sources.compact import Compact
from paligemma.data.sources.folder import SUFFIXES, picture_size, read_text
from paligemma.data.sources.jsonl import SPLITS
from paligemma.data.sources.paths import is_inside, leads_out, picture_path
from paligemma.data.sources.splits import trying
from paligemma.errors import DataError, ImageError, nearest
from paligemma.processing.picture_file import DAMAGED, open_picture, read_file
from paligemma.results import BoxXyxyPx

LABELS = "labels.txt"  # ours: VOC itself keeps no list of classes
MASKS = "SegmentationObject"
OUTSIDE = 255  # of these PNG: no object, among others the line that VOC draws round each
EXTRAS = ("pose", "truncated", "difficult")
BOX_OF = ("name", "bndbox")  # of an object; all else stands in meta["objects"]
_OLD_LINE = re.compile(r"(.+?)\s+(?:-1|0|1)")  # "2008_000008 -1", the lists of one class


class Voc:
    """Pictures with their boxes, by number.

    Args:
        names: of the XML files, without ending.
        annotations: their folder.
        images: folder of the pictures.
        masks: folder of the PNG of object numbers; pictures without one have boxes alone.
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
        masks: str | Path | None = None,
        labels: Sequence[str] = (),
        one_based: bool = True,
        allow_outside: bool = False,
    ) -> None:
        if not names:
            raise DataError(f"{annotations}: no XML files: expected one for each picture. Is this the right folder?")
        self.annotations, self.images = Path(annotations), Path(images)
        self.masks = None if masks is None else Path(masks)
        self.one_based, self.allow_outside = one_based, allow_outside
        self._names = Compact(names)
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
        """The record of a picture; meta["objects"] holds what else each object says: pose, truncated, …

        Raises:
            DataError: the XML file is missing, damaged or declares entities, a box is not four finite numbers, the
                picture is not there or not allowed, or the masks are of another size or of more objects.
        """
        where, tree = self.where(index), self._tree(index)
        picture = self._picture(tree, index)
        sides = [_said(tree, f"size/{side}") for side in ("height", "width")]
        is_size = all(s.isdecimal() and len(s) < 7 and int(s) > 0 for s in sides)
        size = (int(sides[0]), int(sides[1])) if is_size else None
        size = size or picture_size(picture, where)
        things = tree.findall("object")
        masks = self._masks(index, size, len(things))
        instances, extras = [], []
        for number, thing in enumerate(things, 1):
            label, called = _said(thing, "name"), f"{where} object {number}"
            if not label:
                raise DataError(f"{called}: no name: expected a label.")
            instances.append(Instance(label, self._box(thing, called), masks.get(number)))
            extras.append(_beside(thing))
        meta: dict[str, Any] = {"objects": tuple(extras)} if any(extras) else {}
        return Record((picture,), size, tuple(instances), id=self._names[index], where=where, meta=meta)

    def _tree(self, index: int) -> ET.Element:
        name, where = self._names[index], self.where(index)
        file = self.annotations / f"{name}.xml"
        if "\0" in name or leads_out(name) or not (self.allow_outside or is_inside(self.annotations, file)):
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

    def _masks(self, index: int, size_hw: tuple[int, int], n_objects: int) -> dict[int, Mask]:
        """Masks by the number of their object, from 1; {} without a PNG."""
        file = None if self.masks is None else self.masks / f"{self._names[index]}.png"
        if file is None or not file.is_file():
            return {}
        where = self.where(index)
        if not self.allow_outside and not is_inside(self.masks or file.parent, file):
            message = f"{where}: {file} leads out of its folder: expected a file inside. Allow it: allow_outside=True."
            raise DataError(message, kind="path outside")
        numbers = _object_numbers(file, size_hw, n_objects, where)
        there = set(np.unique(numbers).tolist()) - {0, OUTSIDE}
        return {number: Mask.of(numbers == number) for number in there}

    def _box(self, thing: ET.Element, where: str) -> BoxXyxyPx:
        said = [_said(thing, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = (float(edge) for edge in said)
        except ValueError:
            raise DataError(f"{where}: bndbox {said}: expected numbers xmin, ymin, xmax and ymax.") from None
        if not all(math.isfinite(edge) for edge in (left, top, right, bottom)):
            raise DataError(f"{where}: bndbox {said}: expected finite numbers.")
        return (left - 1, top - 1, right, bottom) if self.one_based else (left, top, right, bottom)


def find_voc(
    folder: str | Path, *, one_based: bool | None = None, allow_outside: bool = False,
    failed: dict[str, DataError] | None = None,
) -> dict[str, Voc]:  # fmt: skip
    """The splits of a folder; one without lists of names is all "train".

    Args:
        one_based: as in `Voc`; None: True with an `Annotations` folder, False where XML files lie beside the pictures.
        failed: takes splits that cannot be opened, in place of an error.

    Raises:
        DataError: nothing that looks like VOC, or several years of it.
    """
    path = voc_base(Path(folder))
    if one_based is None:
        one_based = (path / "Annotations").is_dir()
    options = {"one_based": one_based, "allow_outside": allow_outside}
    labels = listed_labels(path)
    found: dict[str, Voc] = {}
    if (path / "Annotations").is_dir():
        inside = {"annotations": path / "Annotations", "images": path / "JPEGImages"}
        if not inside["images"].is_dir():
            inside["images"] = path / "images" if (path / "images").is_dir() else path
        if (path / MASKS).is_dir():
            inside["masks"] = path / MASKS
        for place in inside.values():
            if not allow_outside and not is_inside(path, place):
                raise DataError(f"{place} leads out of {path}: expected a folder inside. Allow it: allow_outside=True.")
        for split, words in SPLITS.items():
            lists = [path / "ImageSets" / kind / f"{word}.txt" for kind in ("Main", "Segmentation") for word in words]
            file = next((file for file in lists if file.is_file()), None)
            if file is not None:
                with trying(split, failed):
                    found[split] = Voc(_listed(file, inside["annotations"]), labels=labels, **inside, **options)  # type: ignore[arg-type]
        both = path / "ImageSets" / "Main" / "trainval.txt"  # what some years have in place of both
        if not (found or failed) or (both.is_file() and not found.keys() & {"train", "valid"}):
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
    except DataError:
        raise
    except (ValueError, LookupError) as error:  # Python's, of a declared encoding that it cannot read
        message = f"{where}: not UTF-8 ({error}): save the file as UTF-8, and say so in its first line."
        raise DataError(message, kind="not UTF-8") from None
    except expat.ExpatError as error:
        if b"encoding=" not in data[:200] and not _is_utf8(data):
            raise DataError(f"{where}: not UTF-8: save the file as UTF-8.", kind="not UTF-8") from None
        raise DataError(f"{where}: not XML ({error}): expected a VOC annotation. Fetch or write it again.") from None
    tree = builder.close()
    if tree.tag != "annotation":
        raise DataError(f"{where}: <{tree.tag}>: expected <annotation> with size and object. Is this a VOC file?")
    return tree


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _beside(thing: ET.Element, known: tuple[str, ...] = BOX_OF, depth: int = 4) -> dict[str, Any]:
    """What an object says besides name and box: texts, and groups of them, such as the parts of a body, as lists.

    Args:
        depth: how many groups inside each other are read.
    """
    found: dict[str, Any] = {}
    for child in thing:
        if child.tag in known:
            continue
        if len(child) and depth:
            found.setdefault(child.tag, [])
            if isinstance(found[child.tag], list):
                found[child.tag].append(_beside(child, (), depth - 1))
        elif said := (child.text or "").strip():
            found[child.tag] = said
    return found


def _said(tree: ET.Element, path: str) -> str:
    return (tree.findtext(path) or "").strip()


def listed_labels(path: Path) -> tuple[str, ...]:
    """The classes of a folder that we wrote, in their order; () of any other."""
    file = path / LABELS
    if not file.is_file():
        return ()
    return tuple(dict.fromkeys(line.strip() for line in read_text(file, "class names").splitlines() if line.strip()))


def _object_numbers(file: Path, size_hw: tuple[int, int], n_objects: int, where: str) -> npt.NDArray[np.uint8]:
    """uint8[H, W] of a PNG whose pixels are numbers of objects, 0 and `OUTSIDE` none.

    Raises:
        DataError: not such a picture, of another size, or with more objects than there are.
    """

    def wrong(what: str, expected: str) -> DataError:
        return DataError(f"{where}: {MASKS}/{file.name} {what}: expected {expected}. Save it again.", kind="bad mask")

    height, width = size_hw
    try:
        picture = open_picture(read_file(file), f"{MASKS}/{file.name}", None)
    except ImageError as error:
        raise DataError(f"{where}: {error}", kind="bad mask") from None
    with picture:
        if picture.mode not in ("P", "L"):
            raise wrong(f"has colours ({picture.mode})", "one number a pixel, with a palette or gray")
        if picture.size != (width, height):
            raise wrong(f"has {picture.width}×{picture.height} pixels", f"the picture's {width}×{height}")
        try:
            numbers = np.asarray(picture)
        except DAMAGED as error:
            raise wrong(f"cannot be decoded ({error})", "a whole PNG") from None
    if (largest := int(numbers.max(initial=0, where=numbers != OUTSIDE))) > n_objects:
        raise wrong(f"has an object {largest}", f"numbers up to {n_objects}, the objects of the XML file")
    return numbers


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
    return sorted(path.stem for path in folder.glob("*.xml") if path.name[0] != ".") if folder.is_dir() else []
