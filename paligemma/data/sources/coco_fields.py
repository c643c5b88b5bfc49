"""Single fields of COCO files, as they stand in JSON: sizes, boxes, masks, captions, questions; each checked."""

from collections.abc import Mapping
from typing import Any

from paligemma.data.record import FAR, Asked, Mask, Text
from paligemma.errors import DataError, nearest
from paligemma.results import BoxXyxyPx

READ = frozenset(  # fields of annotations; their own numbers and areas follow from the rest
    {
        "id", "image_id", "category_id", "bbox", "area", "segmentation", "iscrowd", "caption", "lang", "style",
        "question", "answers", "utf8_string", "legibility",
    }
)  # fmt: skip


def size_of_row(row: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    size = (row.get("height"), row.get("width"))
    if size == (None, None):
        return None
    height, width = size
    if not all(_is_number(side) and 1 <= side < FAR for side in size):  # type: ignore[operator]
        raise DataError(
            f"{where}: width {str(width)[:40]}, height {str(height)[:40]}: expected pixels, both above 0 and below "
            f"{FAR:,}. Mend the file.",
            kind="broken picture",
        )
    return int(height), int(width)  # type: ignore[arg-type]


def box_of(note: Mapping[str, Any], where: str, *, may_lack: bool = False) -> BoxXyxyPx | None:
    box = note.get("bbox")
    if box is None and may_lack:
        return None
    if box is None:
        hint = nearest("bbox", note)
        raise DataError(
            f"{where} has no bbox: expected [left, top, width, height] in pixels.{hint}", kind="wrong column"
        )
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(edge) for edge in box):
        raise DataError(
            f"{where} has bbox {str(box)[:80]}: expected four finite numbers, [left, top, width, height].",
            kind="wrong column",
        )
    left, top, width, height = (float(edge) for edge in box)
    return left, top, left + width, top + height


def is_crowd(note: Mapping[str, Any], where: str) -> bool:
    said = note.get("iscrowd") or 0
    if str(said) not in ("0", "1", "True", "False"):
        raise DataError(f"{where} has iscrowd {str(said)[:40]!r}: expected 0 or 1.", kind="wrong column")
    return str(said) in ("1", "True")


def needed_box(note: Mapping[str, Any], where: str) -> BoxXyxyPx:
    box = box_of(note, where)
    assert box is not None
    return box


def mask_of(said: Any, size_hw: tuple[int, int], where: str) -> Mask | None:
    # Some exporters of boxes write one polygon without corners.
    return None if said is None or said in ([], [[]]) else mask_as_said(said, size_hw, where)


def mask_as_said(said: Any, size_hw: tuple[int, int], where: str) -> Mask:
    """A mask as COCO writes it: polygons, or run lengths {"size": [height, width], "counts": …}.

    Raises:
        DataError: neither, or of another size than the picture.
    """
    if isinstance(said, dict):
        counts, size = said.get("counts"), said.get("size")
        plain = isinstance(counts, list) and all(isinstance(run, int) for run in counts)
        if not (plain or isinstance(counts, str)):
            raise DataError(f"{where} has a mask with counts {str(counts)[:40]}: expected COCO's run lengths.")
        if not isinstance(size, list) or tuple(size) != size_hw:
            height, width = size_hw
            raise DataError(
                f"{where} has a mask of size {size}: expected [{height}, {width}], height and width of the picture. "
                "Encode the mask again."
            )
        return Mask(size_hw, counts=counts if isinstance(counts, str) else tuple(counts or ()))
    if not isinstance(said, list) or not all(
        isinstance(polygon, list) and all(_is_number(number) for number in polygon) for polygon in said
    ):
        raise DataError(f"{where} has segmentation {str(said)[:60]}: expected polygons [[x1, y1, x2, y2, …], …].")
    return Mask(size_hw, polygons=tuple(tuple(float(number) for number in polygon) for polygon in said))


def text_of(note: Mapping[str, Any], where: str) -> Text:
    lang, style = str(note.get("lang", "en")), str(note.get("style", "caption"))
    return Text(string_of(note, "caption", where), lang, box_of(note, where, may_lack=True), style)


def asked_of(note: Mapping[str, Any], where: str) -> Asked:
    answers = note.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{where} has answers {str(answers)[:60]}: expected a list of texts.")
    return Asked(string_of(note, "question", where), tuple(answers), str(note.get("lang", "en")))


def string_of(note: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(note[key], str):
        raise DataError(f"{where}: '{key}' is {str(note[key])[:60]!r}: expected text.")
    return str(note[key])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # no NaN, no infinity
