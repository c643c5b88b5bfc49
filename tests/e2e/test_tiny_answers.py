"""The embedded model on the picture inside the package: the first thing that a newcomer sees must be true."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma
from paligemma.cli.main import main
from paligemma.cli.pictures import EXAMPLE_LABELS
from tests.embedded import needs_good_tiny

PICTURE = Path(str(files("paligemma") / "assets" / "example" / "shapes.png"))

# Where the things of the picture stand: left, top, right, bottom in pixels (assets/example/README.md).
THINGS = {
    "red circle": (40, 36, 144, 140),
    "blue square": (198, 44, 294, 140),
    "green triangle": (39, 166, 145, 259),
    "purple star": (178, 155, 305, 282),
    "orange heart": (334, 179, 426, 261),
}


@pytest.fixture(scope="module")
def pg() -> paligemma.PaliGemma:
    return paligemma.load("tiny")


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return both / (area - both)


@needs_good_tiny
def test_detect_finds_the_things_where_they_are(pg: paligemma.PaliGemma):
    found = pg.detect(PICTURE, list(THINGS))
    hits = [
        name for name, box in THINGS.items() if any(d.label == name and iou(d.box_xyxy_px, box) > 0.5 for d in found)
    ]
    assert len(hits) >= 4, found


@needs_good_tiny
def test_segment_gives_masks_of_the_size_of_the_picture(pg: paligemma.PaliGemma):
    (circle,) = pg.segment(PICTURE, ["red circle"])
    assert circle.mask.shape == (300, 448)
    assert circle.mask[88, 92]
    assert not circle.mask[36:42, 40:46].any(), "a circle does not fill the corners of its box"


@needs_good_tiny
def test_answers_and_captions_speak_of_what_is_there(pg: paligemma.PaliGemma):
    assert pg.answer(PICTURE, "what colour is the heart?").text == "orange"
    assert pg.answer(PICTURE, "is there a star?", choices=["yes", "no"]).text == "yes"
    assert "circle" in pg.caption(PICTURE).text


@needs_good_tiny
def test_detect_without_any_words_shows_what_it_can_do(capsys: pytest.CaptureFixture[str]):
    assert main(["detect", "--json"]) == 0
    out, err = capsys.readouterr()
    (answer,) = [json.loads(line) for line in out.splitlines()]
    assert {"red circle", "purple star"} <= {found["label"] for found in answer["detections"]} <= set(EXAMPLE_LABELS)
    assert all(word in err for word in ("tiny", "bundled", "red circle ; blue square"))


def test_the_bundled_picture_is_the_one_that_its_readme_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = PICTURE.with_name("README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(text.split("```python\n")[1].split("```")[0], {})
    drawn, bundled = (np.asarray(Image.open(path)).astype(int) for path in ("shapes.png", PICTURE))
    assert drawn.shape == bundled.shape
    assert abs(drawn - bundled).mean() < 0.1, "letters may be drawn a little otherwise by another FreeType"
