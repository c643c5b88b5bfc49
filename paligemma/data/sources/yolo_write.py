"""Records to a YOLO folder as Ultralytics lays it out: pictures, a text file beside each, the data.yaml."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from paligemma.data.example import naming
from paligemma.data.record import Instance, Mask, Polygon, Record
from paligemma.data.sources.folder import (
    SEVERAL,
    Names,
    open_text,
    refuse_existing,
    replaced,
    save_picture,
    single_picture,
    size_of,
    split_name,
    staged,
)
from paligemma.data.sources.jsonl import SPLITS
from paligemma.data.sources.outline import join_outlines, outline
from paligemma.data.sources.yolo import names_of, read_yaml, root_of
from paligemma.errors import DataError, nearest

_DECIMALS = 12  # of a side of 8,000 px these are 1e-8 px
_YAML_SPLITS = {"train": "train", "valid": "val", "test": "test"}


def write_yolo(
    records: Iterable[Record],
    folder: str | Path,
    split: str = "train",
    labels: Sequence[str] = (),
    *,
    overwrite: bool = False,
    left_out: Counter[str] | None = None,
) -> Path:
    """Write images/{split}, labels/{split} and data.yaml; a split that is there already keeps its class numbers.

    A mask becomes its outline: polygons as they are, run lengths along the edges of pixels, several pieces joined into
    one line (`outline.py`). The box of such a row is that of the outline.

    Args:
        labels: class names in the order of their numbers; names that data.yaml has already come first. () takes them
            in the order they are met.
        overwrite: replace this split where it is there already.
        left_out: counts what the format cannot carry.

    Returns:
        The data.yaml.

    Raises:
        OptionError: the split is there already, or an unknown split.
        DataError: a picture that cannot be read, a label that is not among `labels`, or no records.
    """
    folder, split = Path(folder), split_name(split)
    left_out = Counter() if left_out is None else left_out
    key, file = _YAML_SPLITS[split], folder / "data.yaml"
    places = (folder / "images" / key, folder / "labels" / key)
    refuse_existing(split, *places, overwrite=overwrite)
    said = read_yaml(file) if file.exists() else {}
    for word in SPLITS[split] if said else ():
        if said.pop(word, None) and not overwrite:
            refuse_existing(split, file, overwrite=False)
    if said and not os.path.samefile(root_of(said, file, True), folder):
        raise DataError(f"{file}: path: {said['path']} is another folder: expected none. Write to a new folder.")
    said.pop("path", None)
    old = names_of(said, file) if said else {}
    ids = {name: number for number, name in sorted(old.items())}
    for label in labels:
        ids.setdefault(label, _next(ids))
    known = set(labels)
    n = 0
    with staged(*places) as (pictures, texts):
        names = Names(by_stem=True)
        for record in records:
            if not single_picture(record):
                left_out[SEVERAL] += 1
                continue
            record = dataclasses.replace(record, size_hw=size_of(record))
            name = names.of(record.images[0], record.id)
            save_picture(record.images[0], pictures / name, record.where)
            rows = [row for item in record.instances if (row := _row(item, record, ids, known, left_out))]
            with open_text((texts / name).with_suffix(".txt")) as out:
                out.writelines(f"{row}\n" for row in rows)
            for what in ("texts", "words", "questions"):
                left_out[what] += len(getattr(record, what))
            left_out.update(f"meta '{key}'" for key in record.meta)
            n += 1
        if not n:
            raise DataError(f"no records for {places[0]}: expected at least one picture.")
        said = {**said, key: f"images/{key}", "names": {number: name for name, number in ids.items()}}
        if "nc" in said:
            said["nc"] = len(ids)
    with replaced(file) as part, open_text(part) as out:
        yaml.safe_dump(said, out, allow_unicode=True, sort_keys=False)
    return file


def _row(item: Instance, record: Record, ids: dict[str, int], known: set[str], left_out: Counter[str]) -> str | None:
    if item.is_crowd:
        left_out["crowd regions"] += 1
        return None
    if known and item.label not in known:
        raise DataError(
            f"{record.where}: the label {item.label!r} is none of the {len(known)} of the data set: expected one of "
            f"labels=….{nearest(item.label, known)} Add it there."
        )
    number = ids.setdefault(item.label, _next(ids))
    height, width = size_of(record)
    polygons = _polygons(item.mask, record.where) if item.mask is not None else ()
    if polygons:
        corners = join_outlines(polygons)
        around = [edge(corners[axis::2]) for edge in (min, max) for axis in (0, 1)]
        # When it is read, the box is that of the outline; tools differ by up to a pixel.
        left_out["boxes unlike their outlines"] += any(
            abs(a - b) > 1 for a, b in zip(around, item.box_xyxy_px, strict=True)
        )
        values = [v / (height if i % 2 else width) for i, v in enumerate(corners)]
    else:
        if item.mask is not None:
            left_out["masks without a pixel"] += 1
        x1, y1, x2, y2 = item.box_xyxy_px
        values = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    return " ".join([str(number), *(_number(value) for value in values)])


def _polygons(mask: Mask, where: str) -> tuple[Polygon, ...]:
    with naming(where):
        mask.require_sound()
        return mask.polygons if mask.counts is None else outline(mask.pixels())


def _next(ids: Mapping[str, int]) -> int:
    return max(ids.values(), default=-1) + 1


def _number(value: float) -> str:
    text = f"{value:.{_DECIMALS}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
