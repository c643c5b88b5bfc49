"""Records to a Pascal VOC folder: pictures, an XML file for each, a PNG of object numbers where there are masks."""

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma.data.example import naming
from paligemma.data.record import Instance, Record
from paligemma.data.sources.folder import (
    SEVERAL,
    Names,
    emptied,
    open_text,
    read_text,
    refuse_existing,
    replaced,
    save_picture,
    single_picture,
    size_of,
    split_name,
)
from paligemma.data.sources.voc import BOX_OF, EXTRAS, LABELS, MASKS, OUTSIDE, listed_labels
from paligemma.errors import DataError, nearest
from paligemma.results import BoxXyxyPx

_TAG = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)  # what XML lets an element be called
_SETS = {"train": "train", "valid": "val", "test": "test"}


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

    Edges are rounded; a box thinner than a pixel is widened to one. Pictures stay as they are, PNG too. Masks become a
    PNG in SegmentationObject/, where a pixel is of one object: of several the smallest, which would else disappear.

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
    known = dict.fromkeys((*listed_labels(folder), *labels))
    with emptied(folder) as stage:
        written = _write(records, stage, names, known, bool(labels), left_out)
        if not written:
            raise DataError(f"no records for {file}: expected at least one picture.")
        for name in written:  # nothing takes its place before all of it is there
            for made, place in zip(_files(stage, name), _files(folder, name), strict=True):
                if made.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    made.replace(place)
                else:
                    place.unlink(missing_ok=True)
    for path, rows in ((folder / LABELS, known), (file, [name.stem for name in written])):
        with replaced(path) as part, open_text(part) as out:
            out.writelines(f"{row}\n" for row in rows)
    _remove(old, {path for name in written for path in _files(folder, name)}, folder)
    return file


def _write(
    records: Iterable[Record], folder: Path, names: Names, known: dict[str, None], is_closed: bool,
    left_out: Counter[str],
) -> list[Path]:  # fmt: skip
    """Pictures, XML files and masks of records; their names.

    Args:
        known: labels, to which new ones are added; is_closed: none may be.
    """
    written: list[Path] = []
    for record in records:
        if not single_picture(record):
            left_out[SEVERAL] += 1
            continue
        for item in record.instances:
            if is_closed and item.label not in known:
                raise DataError(
                    f"{record.where}: the label {item.label!r} is none of the {len(known)} of the data set: expected "
                    f"one of labels=….{nearest(item.label, known)} Add it there."
                )
            known.setdefault(item.label)
        name = names.of(record.images[0], record.id)
        picture, text, drawn = _files(folder, Path(name))
        save_picture(record.images[0], picture, record.where)
        things = [item for item in record.instances if not item.is_crowd]
        left_out["crowd regions"] += len(record.instances) - len(things)
        with naming(record.where):
            numbers = _object_numbers(record, things, left_out)
        with replaced(text) as part:
            tree = _annotation(record, name, is_segmented=numbers is not None, left_out=left_out)
            tree.write(part, encoding="utf-8")
        if numbers is not None:
            with replaced(drawn) as part:
                numbers.save(part, format="PNG")
        for what in ("texts", "words", "questions"):
            left_out[what] += len(getattr(record, what))
        left_out.update(f"meta '{key}'" for key in record.meta if key != "objects")
        written.append(Path(name))
    return written


def _files(folder: Path, name: Path) -> list[Path]:
    """What a picture's name stands for; the last is there only with masks."""
    return [
        folder / "JPEGImages" / name,
        folder / "Annotations" / f"{name.stem}.xml",
        folder / MASKS / f"{name.stem}.png",
    ]


def _remove(old: set[str], kept: set[Path], folder: Path) -> None:
    """What the split held before and holds no longer."""
    for place in ("JPEGImages", "Annotations", MASKS):
        for path in (folder / place).glob("*"):
            if path.stem in old and path not in kept:
                path.unlink()


def _annotation(
    record: Record, name: str, *, is_segmented: bool, left_out: Counter[str]
) -> "ET.ElementTree[ET.Element]":
    height, width = size_of(record)
    root = ET.Element("annotation")
    _put(root, "folder", "JPEGImages")
    _put(root, "filename", name)
    _put(ET.SubElement(root, "source"), "database", "paligemma, pixels from 1")
    size = ET.SubElement(root, "size")
    for side, value in (("width", width), ("height", height), ("depth", 3)):
        _put(size, side, str(value))
    _put(root, "segmented", str(int(is_segmented)))
    extras = record.meta.get("objects", ())
    extras = extras if isinstance(extras, list | tuple) and len(extras) == len(record.instances) else ()
    for number, item in enumerate(record.instances):
        if item.is_crowd:
            continue
        thing = ET.SubElement(root, "object")
        _put(thing, "name", item.label)
        said = extras[number] if extras and isinstance(extras[number], dict) else {}
        plain = dict(zip(EXTRAS, ("Unspecified", "0", "0"), strict=True))
        for key, value in {**plain, **said}.items():
            if isinstance(value, str | int | float) and _TAG.fullmatch(key) and key not in BOX_OF:
                _put(thing, key, str(int(value) if isinstance(value, bool) else value))
            else:
                left_out[f"'{key}' of single objects"] += 1
        box = ET.SubElement(thing, "bndbox")
        left, top, right, bottom = whole_pixels(item.box_xyxy_px)
        for edge, value in (("xmin", left + 1), ("ymin", top + 1), ("xmax", right), ("ymax", bottom)):
            _put(box, edge, str(value))
    ET.indent(root)
    return ET.ElementTree(root)


def _object_numbers(record: Record, things: Sequence[Instance], left_out: Counter[str]) -> Image.Image | None:
    """The PNG of masks, the n-th thing's pixels n; None without masks."""
    masks = {n: thing.mask.pixels() for n, thing in enumerate(things, 1) if thing.mask is not None}
    if not masks:
        return None
    numbers = np.zeros(size_of(record), np.uint8)
    for n, mask in sorted(masks.items(), key=lambda one: -int(one[1].sum())):
        if n >= OUTSIDE:
            left_out["masks beyond the 254th object"] += 1
        elif mask.shape != numbers.shape:
            raise DataError(
                f"{record.where}: a mask of {mask.shape[1]}×{mask.shape[0]} on a picture of {numbers.shape[1]}×"
                f"{numbers.shape[0]}: expected the same size."
            )
        else:
            numbers[mask] = n
    hidden = (n < OUTSIDE and bool((numbers[mask] != n).any()) for n, mask in masks.items())
    left_out["parts of masks under smaller ones"] += sum(hidden)
    image = Image.fromarray(numbers)
    image.putpalette(_palette())
    return image


def _palette() -> bytes:
    """VOC's colours: the bits of a number dealt out to red, green and blue in turn, the lowest to the highest bits."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # [256, 8]
    colours = np.zeros((256, 3), np.uint8)
    for i in range(8):
        colours[:, i % 3] |= bits[:, i] << (7 - i // 3)
    return colours.tobytes()


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
