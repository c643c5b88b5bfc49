"""Released checkpoints, where somebody has them: they load whole, and say what is in two photographs.

PALIGEMMA_TEST_WEIGHTS=<folder of checkpoints> python3 -m pytest -q -m weights tests
"""

import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from paligemma import PaliGemma, load
from paligemma.checkpoints import identify
from paligemma.presets import MODEL_PRESETS

pytestmark = pytest.mark.weights

HOME = os.environ.get("PALIGEMMA_TEST_WEIGHTS", "")
FLOWER_XYXY, PAGODA_XYXY = (170, 85, 446, 360), (63, 28, 372, 410)  # drawn by hand


def checkpoints() -> list[Path]:
    """The folder itself, or the checkpoints in it."""
    if not HOME:
        return [Path("none")]
    if (Path(HOME) / "config.json").is_file() or Path(HOME).suffix == ".npz":
        return [Path(HOME)]
    inside = [path for path in sorted(Path(HOME).iterdir()) if (path / "config.json").is_file()]
    return inside + sorted(Path(HOME).glob("*.npz"))


@pytest.fixture(scope="module", params=checkpoints(), ids=lambda path: path.name)
def pg(request: pytest.FixtureRequest) -> PaliGemma:
    assert identify(request.param), request.param
    return load(request.param, device="auto")


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    (left, top), (right, bottom) = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    inside = max(0.0, float(right - left)) * max(0.0, float(bottom - top))
    return inside / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - inside)


def test_sizes_are_those_of_a_preset(pg: PaliGemma) -> None:
    known = {(preset.vision, preset.text.width, preset.text.depth) for preset in MODEL_PRESETS.values()}
    assert (pg.config.vision, pg.config.text.width, pg.config.text.depth) in known


@pytest.mark.parametrize(
    ("photo", "words"),
    [("flower.jpg", ("flower", "dahlia")), ("china.jpg", ("building", "pagoda", "temple", "tower", "palace", "house"))],
)
def test_captions_name_what_is_there(pg: PaliGemma, photo: str, words: tuple[str, ...]) -> None:
    said = pg.caption(load_sample_image(photo)).text.lower()
    assert any(word in said for word in words), said


@pytest.mark.parametrize(
    ("photo", "label", "box_xyxy"),
    [("flower.jpg", "flower", FLOWER_XYXY), ("china.jpg", "building", PAGODA_XYXY)],
)
def test_boxes_lie_on_what_is_there(pg: PaliGemma, photo: str, label: str, box_xyxy: tuple[int, int, int, int]) -> None:
    found = pg.detect(load_sample_image(photo), label)
    assert max((overlap(one.box_xyxy_px, box_xyxy) for one in found), default=0.0) > 0.7, found


def test_a_prompt_in_a_batch_answers_as_alone(pg: PaliGemma) -> None:
    photo = load_sample_image("flower.jpg")
    prompts = ["caption en", "answer en what colour is the flower?"]
    together = [answer.text for answer in pg.generate([photo, photo], prompts)]
    assert together == [pg.generate([photo], [prompt])[0].text for prompt in prompts]
