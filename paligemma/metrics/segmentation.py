"""Overlap of masks: every object with misses as 0, and referring expressions with one answer each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma.errors import ShapeError
from paligemma.metrics.detection import box_iou, iou_matrix
from paligemma.results import BoolMask


def mask_iou(a: BoolMask, b: BoolMask) -> float:
    """Intersection over union of two bool[H, W] masks; 0 where both are empty."""
    if a.shape != b.shape:
        raise ShapeError(f"masks have shapes {a.shape} and {b.shape}: expected one size, that of the picture.")
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 0.0


@dataclass(frozen=True)
class MaskIou:
    """Overlap of predicted and reference masks.

    Attributes:
        mean: over all reference objects, an object without a partner counting 0; nan without references.
        n_references: reference objects.
        n_missed: those without any overlapping prediction of the same label.
        n_extra: predictions that are nobody's partner.
    """

    mean: float
    n_references: int
    n_missed: int
    n_extra: int


def mean_mask_iou(predictions: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]]) -> MaskIou:
    """Mean mask IoU over all reference objects, a missed object as 0.

    Within a picture and label, pairs are formed greedily from the highest IoU down; no object has two partners.

    Args:
        predictions, references: per picture, objects with `label` and `mask` bool[H, W], e.g. `Segment`.

    Raises:
        ShapeError: unlike numbers of pictures, or masks of unlike size within a picture.
    """
    if len(predictions) != len(references):
        raise ShapeError(
            f"{len(predictions)} pictures predicted, {len(references)} referred to: expected as many of both."
        )
    ious: list[float] = []
    n_extra = 0
    for found, wanted in zip(predictions, references, strict=True):
        for label in {item.label for item in (*found, *wanted)}:
            mine = [item for item in found if item.label == label]
            theirs = [item for item in wanted if item.label == label]
            paired = pair(iou_matrix(mine, theirs, "mask"))
            ious += [paired.get(r, (0, 0.0))[1] for r in range(len(theirs))]
            n_extra += len(mine) - len(paired)
    mean = float(np.mean(ious)) if ious else float("nan")
    return MaskIou(mean, len(ious), sum(iou == 0 for iou in ious), n_extra)


def pair(iou: NDArray[np.float64]) -> dict[int, tuple[int, float]]:
    """Column -> (row, IoU): disjoint pairs with IoU > 0, highest first; the first of equals."""
    pairs: dict[int, tuple[int, float]] = {}
    rows: set[int] = set()
    for flat in np.argsort(-iou, axis=None, kind="stable"):
        row, column = divmod(int(flat), iou.shape[1])
        if iou[row, column] <= 0:
            break
        if row not in rows and column not in pairs:
            pairs[column] = (row, float(iou[row, column]))
            rows.add(row)
    return pairs


@dataclass(frozen=True)
class Referring:
    """Scores of referring-expression segmentation; names as in the reference evaluator.

    Attributes:
        miou: mean over expressions of the mask IoU, an invalid answer counting 0.
        box_accuracy: IoU threshold -> share of expressions whose box reaches it.
        n_invalid: answers that are no valid box and mask.
        n_total: expressions.
    """

    miou: float
    box_accuracy: dict[float, float]
    n_invalid: int
    n_total: int


def referring_scores(
    predictions: Sequence[Any | None],
    reference_masks: Sequence[BoolMask],
    reference_boxes_xyxy_px: Sequence[Sequence[float]],
    *,
    thresholds: Sequence[float] = (0.5, 0.75),
) -> Referring:
    """RefCOCO scores: one predicted `Segment`, or None for an invalid answer, per expression.

    Source: big_vision evaluators/proj/paligemma/transfers/segmentation.py.
    """
    n = len(predictions)
    if not n == len(reference_masks) == len(reference_boxes_xyxy_px):
        raise ShapeError(
            f"{n} answers, {len(reference_masks)} masks, {len(reference_boxes_xyxy_px)} boxes: expected as many."
        )
    masks, boxes = [], []
    for found, mask, box in zip(predictions, reference_masks, reference_boxes_xyxy_px, strict=True):
        masks.append(0.0 if found is None else mask_iou(found.mask, mask))
        boxes.append(0.0 if found is None else float(box_iou([found.box_xyxy_px], [box])[0, 0]))
    accuracy = {float(t): float(np.mean([iou >= t for iou in boxes])) if n else float("nan") for t in thresholds}
    return Referring(float(np.mean(masks)) if n else float("nan"), accuracy, sum(p is None for p in predictions), n)
