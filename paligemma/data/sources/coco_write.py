"""Records to a COCO folder, picture by picture.

    roboflow   train/_annotations.coco.json and the pictures beside it     valid/  test/
    official   annotations/instances_train2017.json, pictures in train2017/   val2017/  test2017/

Captions and questions go to a file of their own, as in COCO: pycocotools wants a category of every annotation beside
boxes. `find_coco` joins both.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Literal, get_args

from paligemma.data.record import Mask, Record
from paligemma.data.sources.coco import CAPTION_FILE
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
from paligemma.errors import DataError, OptionError, nearest
from paligemma.results import BoxXyxyPx, pack_counts, unpack_counts

Layout = Literal["roboflow", "official"]
WORDS = "text"  # the category of words, as in `paligemma.interop`
_YEAR = "2017"
_TAKEN = ("id", "file_name", "height", "width")  # what COCO itself says of a picture under these names


def write_coco(
    records: Iterable[Record],
    folder: str | Path,
    *,
    split: str = "train",
    labels: Sequence[str] = (),
    layout: Layout = "roboflow",
    overwrite: bool = False,
    left_out: Counter[str] | None = None,
) -> Path:
    """Write records with their pictures; files are copied, pixels become PNG.

    Args:
        labels: names of the categories in the order of their ids, from 1; () takes them in the order they are met.
        overwrite: replace this split where it is there already.
        left_out: counts what the format cannot carry.

    Returns:
        The file with the boxes; that of the captions where there is nothing but captions.

    Raises:
        OptionError: the split is there already, or an unknown split or layout.
        DataError: a picture that cannot be read, a label that is not among `labels`, or no records.
    """
    if layout not in get_args(Layout):
        raise OptionError(f"layout={layout!r}: expected roboflow or official.{nearest(layout, get_args(Layout))}")
    folder, split = Path(folder), split_name(split)
    left_out = Counter() if left_out is None else left_out
    if layout == "official":
        pictures = folder / f"{split.replace('valid', 'val')}{_YEAR}"
        files = [folder / "annotations" / f"{kind}_{pictures.name}.json" for kind in ("instances", "captions")]
    else:
        pictures = folder / split
        files = [pictures / "_annotations.coco.json", pictures / CAPTION_FILE]
    refuse_existing(split, pictures, *files, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as spool:
        tables = _Tables(Path(spool), labels)
        with staged(pictures) as (part,):
            names = Names([file.name for file in files])
            for record in records:
                if not single_picture(record):
                    left_out[SEVERAL] += 1
                    continue
                name = names.of(record.images[0], record.id)
                save_picture(record.images[0], part / name, record.where)
                tables.add(record, name, left_out)
            if not tables.n_images:
                raise DataError(f"no records for {pictures}: expected at least one picture.")
            at = [part / file.name for file in files] if layout == "roboflow" else files
            written = tables.write(at[0], at[1], join=layout == "roboflow")
    for file in files:
        if layout == "official" and file not in written:
            file.unlink(missing_ok=True)
    return next(file for file in files if file.name == written[0].name)


class _Tables:
    """The rows of the files, on disk until all are there."""

    def __init__(self, spool: Path, labels: Sequence[str]) -> None:
        self._spool = {name: spool / name for name in ("images", "annotations", "captions")}
        self._files: dict[str, IO[str]] = {name: open_text(path) for name, path in self._spool.items()}
        self._ids = {label: id for id, label in enumerate(dict.fromkeys(labels), 1)}
        self._is_closed = bool(labels)
        self._n: Counter[str] = Counter()
        self._image_ids: set[int] = set()
        self._free = 1

    @property
    def n_images(self) -> int:
        return self._n["images"]

    def add(self, record: Record, name: str, left_out: Counter[str]) -> None:
        height, width = size_of(record)
        id = self._image_id(record.id)
        more = {key: value for key, value in record.meta.items() if is_json(value) and key not in _TAKEN}
        left_out.update(f"meta '{key}'" for key in record.meta.keys() - more)
        self._row("images", {**more, "id": id, "file_name": name, "height": height, "width": width})
        for item in record.instances:
            row: dict[str, Any] = {"image_id": id, "category_id": self._category(item.label, record.where)}
            row |= {**_boxed(item.box_xyxy_px), "iscrowd": int(item.is_crowd)}
            if item.mask is not None:
                row["segmentation"], row["area"] = _segmentation(item.mask, record.where)
            self._row("annotations", row)
        for word in record.words:
            # A category that only words have is no label when it is read again.
            category = self._ids.setdefault(WORDS, len(self._ids) + 1)
            row = {"image_id": id, "category_id": category, "utf8_string": word.text, "area": 0.0, "iscrowd": 0}
            self._row("annotations", row | (_boxed(word.box_xyxy_px) if word.box_xyxy_px else {}))
        for text in record.texts:
            row = {"image_id": id, "caption": text.text, "lang": text.lang, "style": text.style}
            self._row("captions", row | (_boxed(text.box_xyxy_px) if text.box_xyxy_px else {}))
        for asked in record.questions:
            row = {"image_id": id, "question": asked.question, "answers": list(asked.answers), "lang": asked.lang}
            self._row("captions", row)

    def _image_id(self, said: str) -> int:
        """A number that the source gives the picture, as long as it is free: scores and results name pictures by it."""
        id = int(said) if said.isascii() and said.isdecimal() and len(said) < 16 and str(int(said)) == said else None
        if id is None or id in self._image_ids:
            id = self._free
            while id in self._image_ids:
                id += 1
            self._free = id + 1
        self._image_ids.add(id)
        return id

    def write(self, main: Path, captions: Path, *, join: bool) -> list[Path]:
        """Write the files that hold something.

        Args:
            join: captions go to `main` where there is nothing else.
        """
        for file in self._files.values():
            file.close()
        written = []
        if self._ids or not self._n["captions"]:
            self._write(main, "annotations", [{"id": id, "name": name} for name, id in self._ids.items()])
            written.append(main)
        if self._n["captions"]:
            written.append(main if join and not written else captions)
            self._write(written[-1], "captions", None)
        return written

    def _row(self, table: str, row: dict[str, Any]) -> None:
        self._n[table] += 1
        row = row if table == "images" else {"id": self._n[table], **row}
        self._files[table].write(json.dumps(row, ensure_ascii=False) + "\n")

    def _category(self, label: str, where: str) -> int:
        if label not in self._ids and self._is_closed:
            raise DataError(
                f"{where}: the label {label!r} is none of the {len(self._ids)} of the data set: expected one of "
                f"labels=….{nearest(label, self._ids)} Add it there."
            )
        return self._ids.setdefault(label, len(self._ids) + 1)

    def _write(self, path: Path, table: str, categories: list[dict[str, Any]] | None) -> None:
        with replaced(path) as part, open_text(part) as out:
            out.write('{"info": {}, "licenses": []')
            if categories is not None:
                out.write(f',\n"categories": {json.dumps(categories, ensure_ascii=False)}')
            for name, source in (("images", "images"), ("annotations", table)):
                out.write(f',\n"{name}": [')
                with self._spool[source].open(encoding="utf-8", newline="\n") as rows:
                    for number, row in enumerate(rows):
                        out.write((",\n" if number else "\n") + row.rstrip("\n"))
                out.write("]")
            out.write("}\n")


def is_json(value: Any) -> bool:
    """Whether a value of meta can be written as JSON and be the same again."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(is_json(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _boxed(box: BoxXyxyPx) -> dict[str, Any]:
    left, top, right, bottom = (float(edge) for edge in box)
    width, height = right - left, bottom - top
    return {"bbox": [left, top, width, height], "area": max(width, 0.0) * max(height, 0.0)}


def _segmentation(mask: Mask, where: str) -> tuple[Any, float]:
    """COCO's form of a mask, as it is stored, and its area in pixels; of polygons the area that they enclose."""
    if mask.counts is None:
        areas = []
        for polygon in mask.polygons:
            xs, ys = polygon[::2], polygon[1::2]
            turned = zip(xs, ys, (*xs[1:], *xs[:1]), (*ys[1:], *ys[:1]), strict=False)
            areas.append(abs(sum(x1 * y2 - x2 * y1 for x1, y1, x2, y2 in turned)) / 2)
        return [list(polygon) for polygon in mask.polygons], float(sum(areas))
    try:
        runs = unpack_counts(mask.counts) if isinstance(mask.counts, str) else list(mask.counts)
    except ValueError as error:
        raise DataError(f"{where}: a mask that cannot be read ({error}): expected COCO's run lengths.") from None
    # Compressed: the only form of run lengths that pycocotools takes with and without iscrowd.
    return {"size": list(mask.size_hw), "counts": pack_counts(runs)}, float(sum(runs[1::2]))
