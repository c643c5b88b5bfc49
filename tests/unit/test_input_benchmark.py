"""benchmarks/input_pipeline.py in small: a whole table, sides that agree, readers that do not grow, short seeks.

How long anything takes is for the benchmark to say.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("sklearn")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc"),
]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "input_pipeline.py"
FEW, MANY = 500, 100_000
SIDES = {"alone", "files", "tars", "made", "draft", "peer"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The page and the numbers of a run over few and small pictures."""
    out = tmp_path_factory.mktemp("benchmark") / "table.md"
    options = "--quick --resolutions 28 56 --sources 160x120 --pictures 8 --batch 4 --rounds 2 --steps 4"
    command = [sys.executable, str(SCRIPT), *options.split(), "--rows", str(MANY), str(FEW), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out.read_text(), json.loads(out.with_suffix(".json").read_text())


def test_the_page_has_a_row_for_every_side_source_and_resolution(saved: tuple[str, dict[str, Any]]):
    page, numbers = saved
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| 160 × 120")]
    assert len(rows) == 4 * 2
    assert {len(row) for row in rows} == {8}
    assert sum("draft decoding (other pixels)" in row[2] for row in rows) == 2
    for word in ("Python", "torch", "transformers", "datasets", "pillow", "cores", "Memory:", "Seek:"):
        assert word in page
    for row, cell in zip(numbers["rows"], numbers["runs"]["cells"], strict=True):
        assert set(cell["seconds"]) == SIDES
        assert all(len(seconds) == 2 for seconds in cell["seconds"].values())
        assert min(*row["per_s"].values(), *row["over_alone"].values(), *row["peer_over"].values()) > 0


def test_pixels_and_tokens_are_the_peers(saved: tuple[str, dict[str, Any]]):
    for row in saved[1]["rows"]:
        assert row["n_pixels"] == 8 * 3 * row["resolution"] ** 2
        assert row["unlike_pixels"] == row["unlike_tokens"] == 0
        assert 0 < row["draft_apart"] < 1  # 120 // 28 and 120 // 56 allow a fraction, so it was one


def test_a_reader_holds_no_more_of_many_rows_than_of_few(saved: tuple[str, dict[str, Any]]):
    """A reader that kept its rows, or only their places as Python's numbers, would hold 3 MB more at the least."""
    grown = saved[1]["memory"]["growth_mb"]
    assert grown < 2, f"{MANY:,} rows instead of {FEW} cost {grown:.1f} MB"


def test_a_far_example_is_reached_by_reading_one_row(saved: tuple[str, dict[str, Any]]):
    seek = saved[1]["seek"]
    assert seek["position"] == 10**9
    assert seek["rows_read"] == 1
