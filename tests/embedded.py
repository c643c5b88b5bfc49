"""What the weights in the package are known to do, as written beside them by the recipe that made them."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

ASSETS = Path(str(files("paligemma") / "assets"))
TINY = ASSETS / "tiny"
GOOD_AP50 = 0.8  # the aim of the issue that brought tiny


def scores(name: str = "tiny") -> dict[str, Any]:
    """The held-out scores of shipped weights, by world."""
    values: dict[str, Any] = json.loads((ASSETS / name / "scores.json").read_text())
    return values


needs_good_tiny = pytest.mark.skipif(
    scores()["plain"]["ap50"] < GOOD_AP50,
    reason=f"tiny scores AP50 {scores()['plain']['ap50']:.2f} on plain pictures; this asks for {GOOD_AP50}",
)
