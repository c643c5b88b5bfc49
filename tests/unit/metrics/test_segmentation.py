"""Mask overlap: laws of the mean over objects, and of referring expressions."""

import math

import numpy as np
import pytest

from paligemma.errors import ShapeError
from paligemma.metrics.segmentation import mask_iou, mean_mask_iou, pair, referring_scores
from paligemma.results import Segment


def _segment(label: str, columns: slice, score: float = 1.0) -> Segment:
    mask = np.zeros((10, 20), bool)
    mask[:, columns] = True
    return Segment(label, (float(columns.start), 0.0, float(columns.stop), 10.0), mask, score)


LEFT, RIGHT, DOG = _segment("cat", slice(0, 8)), _segment("cat", slice(12, 20)), _segment("dog", slice(8, 12))


def test_iou_is_shared_pixels_over_all_pixels() -> None:
    assert mask_iou(LEFT.mask, LEFT.mask) == 1.0
    assert mask_iou(LEFT.mask, _segment("cat", slice(4, 12)).mask) == pytest.approx(4 / 12)
    assert mask_iou(np.zeros((3, 3), bool), np.zeros((3, 3), bool)) == 0.0
    with pytest.raises(ShapeError, match=r"\(10, 20\) and \(3, 3\)"):
        mask_iou(LEFT.mask, np.zeros((3, 3), bool))


def test_a_perfect_prediction_scores_one_in_any_order() -> None:
    assert mean_mask_iou([[DOG, RIGHT, LEFT]], [[LEFT, RIGHT, DOG]]).mean == 1.0


def test_a_missed_object_counts_zero_and_an_extra_one_is_only_counted() -> None:
    score = mean_mask_iou([[LEFT, _segment("bird", slice(0, 20))], []], [[LEFT, RIGHT], [DOG]])
    assert score.mean == pytest.approx(1 / 3)
    assert (score.n_references, score.n_missed, score.n_extra) == (3, 2, 1)


def test_another_label_is_no_partner() -> None:
    assert mean_mask_iou([[_segment("dog", slice(0, 8))]], [[LEFT]]).mean == 0.0


def test_one_prediction_cannot_serve_two_objects() -> None:
    everything = _segment("cat", slice(0, 20))
    assert mean_mask_iou([[everything]], [[LEFT, RIGHT]]).mean == pytest.approx((8 / 20) / 2)


def test_pairs_are_formed_from_the_highest_overlap_down() -> None:
    assert pair(np.array([[0.9, 0.8], [0.8, 0.0]])) == {0: (0, 0.9)}
    assert pair(np.array([[0.5, 0.6], [0.4, 0.3]])) == {1: (0, 0.6), 0: (1, 0.4)}
    assert pair(np.zeros((0, 3))) == pair(np.zeros((3, 0))) == {}


def test_without_references_the_mean_is_nan() -> None:
    assert math.isnan(mean_mask_iou([[LEFT]], [[]]).mean)
    assert math.isnan(referring_scores([], [], []).miou)


def test_an_invalid_answer_to_an_expression_counts_zero() -> None:
    scores = referring_scores([LEFT, None], [LEFT.mask, RIGHT.mask], [LEFT.box_xyxy_px, RIGHT.box_xyxy_px])
    assert (scores.miou, scores.box_accuracy, scores.n_invalid, scores.n_total) == (0.5, {0.5: 0.5, 0.75: 0.5}, 1, 2)


def test_unlike_numbers_of_pictures_are_refused() -> None:
    with pytest.raises(ShapeError, match="1 pictures predicted, 0 referred to"):
        mean_mask_iou([[]], [])
    with pytest.raises(ShapeError, match="1 answers, 0 masks, 0 boxes"):
        referring_scores([None], [], [])
