"""Average precision of boxes or masks, as COCO computes it.

Source: pycocotools 2.0 `cocoeval.py` (area range "all", no crowds), checked against it in the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from paligemma.errors import OptionError, ShapeError

COCO_THRESHOLDS: tuple[float, ...] = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
_RECALLS = np.linspace(0.0, 1.0, 101)


class Found(Protocol):
    """What is compared: `Detection`, `Segment`, or anything with these fields. References need no score."""

    @property
    def label(self) -> str: ...
    @property
    def box_xyxy_px(self) -> tuple[float, float, float, float]: ...


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision by label and IoU threshold.

    Attributes:
        table: float[classes, thresholds]; rows in the order of `classes`, columns of `thresholds`.
        classes: labels that occur in the references; others are not scored, as in COCO.
        n_references: objects to find.
    """

    table: NDArray[np.float64]
    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    n_references: int

    @property
    def mean(self) -> float:
        """Over classes and thresholds; nan without references."""
        return float(self.table.mean()) if self.table.size else float("nan")

    def at(self, threshold: float) -> float:
        """Mean over classes at one IoU threshold: `at(0.5)` is AP50."""
        column = [i for i, t in enumerate(self.thresholds) if abs(t - threshold) < 1e-9]
        if not column:
            raise OptionError(
                f"no average precision at IoU {threshold}: computed at {self.thresholds}. Ask for it there."
            )
        return float(self.table[:, column[0]].mean()) if self.table.size else float("nan")

    @property
    def per_class(self) -> dict[str, float]:
        """Label -> mean over thresholds."""
        return {label: float(row.mean()) for label, row in zip(self.classes, self.table, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON types, thresholds as keys like "AP50"."""
        named = {f"AP{round(100 * t)}": self.at(t) for t in self.thresholds}
        return {"AP": self.mean, **named, "per_class": self.per_class, "n_references": self.n_references}


def average_precision(
    predictions: Sequence[Sequence[Found]],
    references: Sequence[Sequence[Found]],
    *,
    iou_thresholds: Sequence[float] = COCO_THRESHOLDS,
    kind: Literal["box", "mask"] = "box",
    max_detections: int = 100,
) -> AveragePrecision:
    """Area under the precision-recall curve per label and IoU threshold, at 101 recall points.

    Predictions of a picture and label are matched in order of falling score, each to the free reference of highest IoU.

    Args:
        predictions: per picture, objects with `label`, `score`, `box_xyxy_px`, and `mask` bool[H, W] if kind is "mask".
        references: per picture, the same without scores.
        kind: whether IoU is that of boxes or of masks.
        max_detections: best-scored predictions per picture and label that count.

    Raises:
        ShapeError: unlike numbers of pictures.
    """
    if len(predictions) != len(references):
        raise ShapeError(
            f"{len(predictions)} pictures predicted, {len(references)} referred to: expected as many of both."
        )
    if not iou_thresholds or not all(0 < t <= 1 for t in iou_thresholds):
        raise OptionError(f"iou_thresholds={tuple(iou_thresholds)}: expected one or more numbers in (0, 1].")
    thresholds = np.asarray(iou_thresholds, np.float64)
    pool: dict[str, _Pool] = {}
    for found, wanted in zip(predictions, references, strict=True):
        for label in {item.label for item in wanted} | {item.label for item in found}:
            mine = sorted((p for p in found if p.label == label), key=_falling_score)[:max_detections]
            theirs = [r for r in wanted if r.label == label]
            pool.setdefault(label, _Pool()).add(mine, theirs, kind, thresholds)
    classes = tuple(sorted(label for label, one in pool.items() if one.n_references))
    table = np.array([pool[label].curve_areas(thresholds) for label in classes]).reshape(len(classes), len(thresholds))
    n_references = sum(one.n_references for one in pool.values())
    return AveragePrecision(table, classes, tuple(float(t) for t in iou_thresholds), n_references)


def _falling_score(item: Any) -> float:
    return -float(item.score)


class _Pool:
    """Everything about one label, over pictures."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.hits: list[NDArray[np.bool_]] = []  # per picture bool[thresholds, predictions]
        self.n_references = 0

    def add(self, mine: list[Any], theirs: list[Any], kind: str, thresholds: NDArray[np.float64]) -> None:
        self.n_references += len(theirs)
        self.scores += [float(item.score) for item in mine]
        self.hits.append(match(iou_matrix(mine, theirs, kind), thresholds))

    def curve_areas(self, thresholds: NDArray[np.float64]) -> list[float]:
        order = np.argsort(-np.asarray(self.scores), kind="mergesort")  # stable: equal scores keep the pictures' order
        hits = np.concatenate(self.hits, axis=1)[:, order]
        areas = []
        for row in hits:
            n_true, n_false = np.cumsum(row), np.cumsum(~row)
            recall = n_true / self.n_references
            precision = n_true / (n_true + n_false)
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(recall, _RECALLS, side="left")
            areas.append(float(np.append(envelope, 0.0)[np.minimum(at, len(envelope))].mean()))
        return areas


def match(iou: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool[thresholds, predictions]: which predictions, best first, get a reference of at least this IoU.

    Args:
        iou: float[predictions, references], rows in order of falling score.
    """
    hits = np.zeros((len(thresholds), iou.shape[0]), bool)
    if not iou.size:
        return hits
    for t, threshold in enumerate(thresholds):
        free = iou.copy()
        for p in range(iou.shape[0]):
            # Of equal IoUs the last one, as pycocotools does.
            best = iou.shape[1] - 1 - int(np.argmax(free[p, ::-1]))
            if free[p, best] >= min(threshold, 1 - 1e-10):
                hits[t, p] = True
                free[:, best] = -1.0
    return hits


def iou_matrix(mine: Sequence[Any], theirs: Sequence[Any], kind: str = "box") -> NDArray[np.float64]:
    """float64[len(mine), len(theirs)] intersection over union of boxes or masks."""
    if not mine or not theirs:
        return np.zeros((len(mine), len(theirs)))
    if kind == "box":
        return box_iou([item.box_xyxy_px for item in mine], [item.box_xyxy_px for item in theirs])
    if kind != "mask":
        raise OptionError(f"kind={kind!r}: expected 'box' or 'mask'.")
    shapes = {item.mask.shape for item in (*mine, *theirs)}
    if len(shapes) != 1:
        raise ShapeError(f"masks of one picture have shapes {sorted(shapes)}: expected one size, that of the picture.")
    theirs_mHW = np.stack([item.mask for item in theirs])
    areas = np.count_nonzero(theirs_mHW, axis=(1, 2))
    shared = np.stack([np.count_nonzero(theirs_mHW & item.mask, axis=(1, 2)) for item in mine]).astype(np.float64)
    union = np.array([np.count_nonzero(item.mask) for item in mine])[:, None] + areas[None] - shared
    return _ratio(shared, union)


def box_iou(a_xyxy: Any, b_xyxy: Any) -> NDArray[np.float64]:
    """float64[n, m] intersection over union of float[n, 4] and float[m, 4] boxes (left, top, right, bottom).

    A box without area has IoU 0 with everything.
    """
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (a_xyxy, b_xyxy))
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    area_a, area_b = (np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1) for boxes in (a, b))
    union = area_a[:, None] + area_b[None] - shared
    return _ratio(shared, union)


def _ratio(shared: NDArray[np.float64], union: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(union > 0, shared / np.where(union > 0, union, 1.0), 0.0)
