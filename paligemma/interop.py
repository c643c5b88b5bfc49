"""Results in the words of other packages: supervision's `Detections`, and COCO's JSON.

to_supervision(pg.detect(photo, ["cat"]))            boxes, scores, classes and masks for its annotators and trackers
to_coco(pg.segment(photo, ["cat"]), image_ids=42)    rows that pycocotools' `loadRes` reads
coco_file([("a.jpg", result), …])                    a whole file: pictures, categories and scored annotations
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from paligemma.errors import MissingExtra, OptionError, nearest
from paligemma.results import (
    BoolMask,
    Detection,
    Detections,
    ReadText,
    Segment,
    Segments,
    Word,
    mask_from_rle,
    mask_to_rle,
    pack_counts,
    unpack_counts,
)

Found = Detections | Segments | ReadText
ImageId = int | str
_TEXT = "text"  # the one category of words; what they say stands in `utf8_string`, as in COCO-Text


def to_supervision(result: Found, *, classes: Sequence[str] | None = None) -> Any:
    """A `supervision.Detections`: xyxy in pixels, confidence, class_id, mask of segments, `data["class_name"]`.

    Args:
        result: of one picture.
        classes: labels in the order of their class ids; by default the labels of this result, sorted.

    Raises:
        MissingExtra: supervision is not installed.
        OptionError: a label that is not among `classes`.
    """
    try:
        import supervision
    except ImportError as e:
        raise MissingExtra("supervision", "supervision", "to_supervision") from e
    items = _items(result)
    if not items:
        return supervision.Detections.empty()
    names = [item.text if isinstance(item, Word) else item.label for item in items]
    ids = {name: i for i, name in enumerate(classes if classes is not None else sorted(set(names)))}
    return supervision.Detections(
        xyxy=np.array([item.box_xyxy_px for item in items], np.float32),
        mask=np.stack([item.mask for item in items]) if isinstance(result, Segments) else None,
        confidence=np.array([item.score for item in items], np.float32),
        class_id=np.array([_category(name, ids) for name in names], int),
        data={"class_name": np.array(names)},
    )


def to_coco(
    results: Found | Sequence[Found],
    image_ids: ImageId | Sequence[ImageId] = 1,
    *,
    categories: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """COCO result rows: image_id, category_id, bbox [left, top, width, height], score, and segmentation of masks.

    Each row also says its `label`, and `file_name` where pictures are named by files, so that the list can be read
    without the tables it refers to. pycocotools ignores both.

    Args:
        results: of one picture, or of several.
        image_ids: one id, or as many as results. A file name becomes the number that it is (`000000000139.jpg`: 139),
            otherwise itself.
        categories: label -> id; by default the labels of all results, sorted, from 1. Words are of category "text".

    Raises:
        OptionError: unlike numbers of results and ids, or a label without category.
    """
    pictures = [results] if isinstance(results, Detections | Segments | ReadText) else list(results)
    ids = [image_ids] if isinstance(image_ids, int | str) else list(image_ids)
    if len(ids) != len(pictures):
        raise OptionError(f"{len(pictures)} results and {len(ids)} image ids: expected one id per result.")
    table = coco_categories(pictures) if categories is None else categories
    rows = []
    for picture, image in zip(pictures, ids, strict=True):
        named = {"file_name": image} if isinstance(image, str) else {}
        rows += [{"image_id": _image_id(image), **named, **_row(item, table)} for item in _items(picture)]
    return rows


def coco_categories(results: Iterable[Found]) -> dict[str, int]:
    """Label -> id from 1, over all results, in alphabetical order."""
    labels = {_label(item) for result in results for item in _items(result)}
    return {label: i for i, label in enumerate(sorted(labels), 1)}


def coco_file(named: Iterable[tuple[str, Found]], *, categories: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A whole COCO file, ready for `json.dump`: `images`, `categories`, and `annotations` with their scores.

    pycocotools opens it as a data set; its `annotations` alone are a results list for `loadRes`.

    Args:
        named: (file name, result) of each picture.
        categories: label -> id; by default the labels of all results, sorted, from 1.
    """
    pairs = list(named)
    table = coco_categories(result for _, result in pairs) if categories is None else dict(categories)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (name, result) in enumerate(pairs, 1):
        size = getattr(result, "size_hw", None)
        images.append({"id": i, "file_name": name, **({"height": size[0], "width": size[1]} if size else {})})
        for row in to_coco(result, i, categories=table):
            _, _, width, height = row["bbox"]
            area = float(np.count_nonzero(mask_of(row))) if "segmentation" in row else width * height
            annotations.append({"id": len(annotations) + 1, **row, "area": area, "iscrowd": 0})
    return {
        "images": images,
        "categories": [{"id": i, "name": label} for label, i in sorted(table.items(), key=lambda pair: pair[1])],
        "annotations": annotations,
    }


def from_coco(
    rows: Iterable[Mapping[str, Any]], categories: Mapping[int, str] | None = None
) -> dict[ImageId, Detections | Segments]:
    """COCO rows -> image id -> `Segments` where every row of a picture has an encoded mask, else `Detections`.

    Args:
        rows: results, or annotations of a data set (score 1 where they have none).
        categories: id -> label; by default the `label` that `to_coco` wrote.

    Raises:
        OptionError: a row without label and without category in the table.
    """
    pictures: dict[ImageId, list[Mapping[str, Any]]] = {}
    for row in rows:
        pictures.setdefault(row["image_id"], []).append(row)
    out: dict[ImageId, Detections | Segments] = {}
    for image, mine in pictures.items():
        labels = [_name(row, categories) for row in mine]
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (map(float, row["bbox"]) for row in mine)]
        scores = [float(row.get("score", 1.0)) for row in mine]
        if all(isinstance(row.get("segmentation"), dict) for row in mine):
            masks = [mask_of(row) for row in mine]
            found = [Segment(*fields) for fields in zip(labels, boxes, masks, scores, strict=True)]
            out[image] = Segments(found, size_hw=masks[0].shape)
        else:
            out[image] = Detections(Detection(*fields) for fields in zip(labels, boxes, scores, strict=True))
    return out


def mask_of(row: Mapping[str, Any]) -> BoolMask:
    """bool[H, W] of a row's run-length encoding, compressed or not."""
    rle = row["segmentation"]
    counts = rle["counts"]
    return mask_from_rle({"size": rle["size"], "counts": unpack_counts(counts) if isinstance(counts, str) else counts})


def _row(item: Detection | Segment | Word, categories: Mapping[str, int]) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(edge) for edge in item.box_xyxy_px)
    label = _label(item)
    row: dict[str, Any] = {
        "category_id": _category(label, categories),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": float(item.score),
        "label": label,
    }
    if isinstance(item, Segment):
        rle = mask_to_rle(item.mask)
        row["segmentation"] = {"size": rle["size"], "counts": pack_counts(rle["counts"])}
    if isinstance(item, Word):
        row["utf8_string"] = item.text
    return row


def _items(result: Found) -> list[Any]:
    return list(result.words) if isinstance(result, ReadText) else list(result)


def _label(item: Detection | Segment | Word) -> str:
    return _TEXT if isinstance(item, Word) else item.label


def _category(label: str, categories: Mapping[str, int]) -> int:
    if label not in categories:
        known = ", ".join(map(repr, list(categories)[:10])) or "none"
        raise OptionError(f"label {label!r} has no category: known are {known}.{nearest(label, categories)} Add it.")
    return categories[label]


def _image_id(image: ImageId) -> ImageId:
    stem = PurePath(image).stem if isinstance(image, str) else ""
    return int(stem) if stem.isascii() and stem.isdigit() else image


def _name(row: Mapping[str, Any], categories: Mapping[int, str] | None) -> str:
    if categories is not None and row["category_id"] in categories:
        return categories[row["category_id"]]
    if "label" in row:
        return str(row["label"])
    raise OptionError(
        f"category {row['category_id']} of image {row['image_id']} has no label: hand in categories={{id: label}}."
    )
