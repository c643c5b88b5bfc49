"""Average precision against pycocotools, and its laws."""

import contextlib
import io

import numpy as np
import pytest

from paligemma.errors import OptionError, ShapeError
from paligemma.metrics.detection import COCO_THRESHOLDS, average_precision, box_iou
from paligemma.results import Detection, Segment

LABELS = ("cat", "dog", "bird", "never there")


def _scene(rng: np.random.Generator, n: int, *, tie_scores: bool, n_labels: int) -> list[Detection]:
    found = []
    for _ in range(n):
        x, y = rng.integers(0, 60, 2)
        w, h = rng.integers(10, 40, 2)  # shaken by at most 8, so that no box loses its area
        score = float(rng.integers(1, 5)) / 5 if tie_scores else float(rng.random())
        found.append(Detection(LABELS[rng.integers(n_labels)], (float(x), float(y), float(x + w), float(y + h)), score))
    return found


def _world(seed: int, tie_scores: bool) -> tuple[list[list[Detection]], list[list[Detection]]]:
    """References at random; predictions are shaken references, false alarms and doubles."""
    rng = np.random.default_rng(seed)
    references = [_scene(rng, int(rng.integers(0, 6)), tie_scores=False, n_labels=3) for _ in range(25)]
    predictions = []
    for wanted in references:
        found = _scene(rng, int(rng.integers(0, 3)), tie_scores=tie_scores, n_labels=4)
        for item in wanted:
            for _ in range(int(rng.integers(0, 3))):
                box = tuple(float(edge + rng.integers(-4, 5)) for edge in item.box_xyxy_px)
                score = float(rng.integers(1, 5)) / 5 if tie_scores else float(rng.random())
                found.append(Detection(item.label, box, score))  # type: ignore[arg-type]
        predictions.append(found)
    return predictions, references


def _pycocotools(
    predictions: list[list[Detection]], references: list[list[Detection]]
) -> tuple[float, float, float, np.ndarray]:
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    def row(item: Detection, image: int, n: int) -> dict[str, object]:
        x1, y1, x2, y2 = item.box_xyxy_px
        return {
            "id": n, "image_id": image, "category_id": LABELS.index(item.label) + 1, "score": item.score,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0,
        }  # fmt: skip

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        rows = [row(item, i, 0) for i, wanted in enumerate(references, 1) for item in wanted]
        truth.dataset = {
            "images": [{"id": i, "width": 100, "height": 100} for i in range(1, len(references) + 1)],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(LABELS)],
            "annotations": [{**r, "id": n} for n, r in enumerate(rows, 1)],
        }
        truth.createIndex()
        found = truth.loadRes([row(item, i, 0) for i, items in enumerate(predictions, 1) for item in items])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    table = evaluation.eval["precision"][:, :, :, 0, 2].mean(axis=1).T  # [classes, thresholds], -1 without references
    return evaluation.stats[0], evaluation.stats[1], evaluation.stats[2], table


@pytest.mark.parametrize("tie_scores", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_average_precision_equals_pycocotools(seed: int, tie_scores: bool) -> None:
    predictions, references = _world(seed, tie_scores)
    ours = average_precision(predictions, references)
    ap, ap50, ap75, table = _pycocotools(predictions, references)
    assert (ours.mean, ours.at(0.5), ours.at(0.75)) == pytest.approx((ap, ap50, ap75), abs=1e-12)
    assert 0.02 < ap < 0.98  # a world in which there is something to compare
    for label, row in zip(ours.classes, ours.table, strict=True):
        np.testing.assert_allclose(row, table[LABELS.index(label)], atol=1e-12)


def test_a_perfect_prediction_scores_one_and_silence_scores_zero() -> None:
    _, references = _world(3, False)
    assert average_precision(references, references).mean == 1.0
    assert average_precision([[] for _ in references], references).mean == 0.0


def test_a_low_scored_false_alarm_costs_nothing_and_a_high_scored_one_does() -> None:
    truth = [[Detection("cat", (0.0, 0.0, 10.0, 10.0), 0.0)]]
    right, wrong = Detection("cat", (0.0, 0.0, 10.0, 10.0), 0.5), (50.0, 50.0, 60.0, 60.0)
    assert average_precision([[right, Detection("cat", wrong, 0.1)]], truth).mean == 1.0
    assert average_precision([[right, Detection("cat", wrong, 0.9)]], truth).mean == pytest.approx(0.5)


def test_two_predictions_cannot_share_one_reference() -> None:
    box = (0.0, 0.0, 10.0, 10.0)
    truth = [[Detection("cat", box, 0.0), Detection("cat", (20.0, 20.0, 30.0, 30.0), 0.0)]]
    doubled = average_precision([[Detection("cat", box, 0.9), Detection("cat", box, 0.8)]], truth)
    assert doubled.mean == pytest.approx(51 / 101)  # recall reaches 0.5: 51 of 101 points


def test_a_label_without_references_is_not_scored() -> None:
    truth = [[Detection("cat", (0.0, 0.0, 10.0, 10.0), 0.0)]]
    found = [[Detection("cat", (0.0, 0.0, 10.0, 10.0), 0.3), Detection("dog", (0.0, 0.0, 10.0, 10.0), 0.9)]]
    scores = average_precision(found, truth)
    assert scores.classes == ("cat",)
    assert scores.per_class == {"cat": 1.0}


def test_masks_are_compared_by_pixels_not_by_boxes() -> None:
    half = np.zeros((10, 10), bool)
    half[:, :5] = True
    box = (0.0, 0.0, 10.0, 10.0)
    truth = [[Segment("cat", box, np.ones((10, 10), bool), 0.0)]]
    found = [[Segment("cat", box, half, 0.9)]]
    assert average_precision(found, truth, kind="box").at(0.95) == 1.0
    by_mask = average_precision(found, truth, kind="mask")
    assert by_mask.at(0.5) == 1.0
    assert by_mask.at(0.55) == 0.0


def test_without_any_reference_the_mean_is_nan_not_a_number_that_looks_like_a_score() -> None:
    assert np.isnan(average_precision([[]], [[]]).mean)


def test_the_summary_names_thresholds_as_papers_do() -> None:
    _, references = _world(1, False)
    summary = average_precision(references, references, iou_thresholds=(0.5, 0.75)).to_dict()
    assert summary["AP50"] == summary["AP75"] == summary["AP"] == 1.0


def test_box_iou_of_boxes_without_area_is_zero() -> None:
    flat = (5.0, 5.0, 5.0, 9.0)
    assert box_iou([flat, (0.0, 0.0, 10.0, 10.0)], [flat, (5.0, 0.0, 15.0, 10.0)]).tolist() == [[0, 0], [0, 1 / 3]]


def test_wrong_use_is_refused_with_the_values_in_the_message() -> None:
    with pytest.raises(ShapeError, match="1 pictures predicted, 2 referred to"):
        average_precision([[]], [[], []])
    with pytest.raises(OptionError, match=r"expected one or more numbers in \(0, 1\]"):
        average_precision([[]], [[]], iou_thresholds=(0.0,))
    with pytest.raises(OptionError, match=r"no average precision at IoU 0.42"):
        average_precision([[]], [[]], iou_thresholds=COCO_THRESHOLDS).at(0.42)
