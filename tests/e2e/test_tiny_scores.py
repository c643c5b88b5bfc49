"""The scores that the package states for its embedded models are those that they have."""

import math

import pytest

import paligemma
from paligemma.evals.tiny import evaluate
from paligemma.presets import EMBEDDED
from tests.embedded import scores

PICTURES = {"tiny": 60, "tiny-hi": 60}  # of each set


@pytest.fixture(scope="module", params=EMBEDDED)
def scored(request: pytest.FixtureRequest) -> tuple[str, dict[str, dict[str, float]]]:
    name = request.param
    return name, evaluate(paligemma.load(name), limit=PICTURES[name], batch_size=30, progress=False).to_dict()


@pytest.mark.parametrize("world", ["plain", "full"])
@pytest.mark.parametrize("score", ["ap50", "mask_iou", "answers"])
def test_the_stated_score_is_the_score_up_to_sampling(
    scored: tuple[str, dict[str, dict[str, float]]], world: str, score: str
) -> None:
    name, by_world = scored
    stated, got = scores(name)[world][score], by_world[world][score]
    # Four standard errors of a share over as many pictures; questions of one picture are not independent.
    assert abs(stated - got) < 4 * math.sqrt(0.25 / PICTURES[name]), (name, world, score)
