"""Every example runs on `tiny` from an empty folder, says something, and is short enough to read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.embedded import needs_good_tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# A phrase of what each example prints; an example without an entry here fails the test below.
SAYS = {
    "demo": "answers, as pictures, in",
    "export_coco": "annotations on 3 pictures",
    "likelihoods": "log p('yes')",
    "many_pictures": "ring",
    "masks": "of the picture, score",
    "mixture": "step 1000: Batch(8 examples",
    "quickstart": "caption:",
    "raw_prompts": "stream",
}
ANSWERS_MATTER = ("many_pictures", "masks")  # what these print depends on what tiny sees


def run(example: Path, folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, marks=needs_good_tiny if path.stem in ANSWERS_MATTER else ()) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_example_runs_from_anywhere_and_says_what_it_promises(example: Path, tmp_path: Path):
    assert SAYS[example.stem] in run(example, tmp_path)
    pictures = list(tmp_path.rglob("*.png"))
    assert bool(pictures) == (example.stem in ("demo", "masks"))
    for picture in pictures:
        Image.open(picture).load()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_shorter_than_sixty_lines(example: Path):
    assert len(example.read_text().splitlines()) < 60
