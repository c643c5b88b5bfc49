"""The scores that the package states for its embedded model are those that the model has."""

import math

import pytest

import paligemma
from paligemma.evals.tiny import evaluate
from tests.embedded import scores

N = 60


@pytest.fixture(scope="module")
def slice_of_scores() -> dict[str, dict[str, float]]:
    return evaluate(paligemma.load("tiny"), limit=N, batch_size=30, progress=False).to_dict()


@pytest.mark.parametrize("world", ["plain", "full"])
@pytest.mark.parametrize("score", ["ap50", "mask_iou", "answers"])
def test_the_stated_score_is_the_score_up_to_sampling(
    slice_of_scores: dict[str, dict[str, float]], world: str, score: str
) -> None:
    stated, got = scores()[world][score], slice_of_scores[world][score]
    # Four standard errors of a share over as many pictures; questions of one picture are not independent.
    assert abs(stated - got) < 4 * math.sqrt(0.25 / N), (world, score)
