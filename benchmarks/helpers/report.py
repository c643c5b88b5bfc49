"""From raw seconds to one table."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from helpers.worker import N_DECODE

Runs = dict[str, dict[str, list[dict[str, Any]]]]  # dtype -> side -> one answer of the worker per round
NAMES = {"encode": "image encode", "prefill": "prefill, 256 + 4 tokens", "decode": f"decode, {N_DECODE} tokens"}


@dataclass(frozen=True)
class Row:
    """One cell of either side.

    Attributes:
        what, dtype, batch, unit: which cell.
        ours, peer: medians.
        spread: of either side, half the interquartile range as a fraction of the median, the larger of the two.
        ratio: above 1 this package is better, whichever way the unit points.
    """

    what: str
    dtype: str
    batch: int | None
    unit: str
    ours: float
    peer: float
    spread: float
    ratio: float


def rows_of(runs: Runs) -> list[Row]:
    rows: list[Row] = []
    for dtype, sides in runs.items():
        ours, peer = sides["paligemma"], sides["transformers"]
        for cell in ours[0]["seconds"]:
            what, batch = cell.split("/")
            a, b = ([s for run in side for s in run["seconds"][cell]] for side in (ours, peer))
            rows.append(_row(NAMES[what], dtype, int(batch), what == "decode", a, b))
        for key, what in (("load_s", "load"), ("first_answer_s", "load + first token, cold")):
            rows.append(_row(what, dtype, None, False, [run[key] for run in ours], [run[key] for run in peer]))
        a, b = ([run["peak_bytes"] / 2**30 for run in side] for side in (ours, peer))
        rows.append(
            Row("peak memory", dtype, None, "GiB", _median(a), _median(b), _spread(a, b), _median(b) / _median(a))
        )
    return rows


def _row(what: str, dtype: str, batch: int | None, is_decode: bool, ours: list[float], peer: list[float]) -> Row:
    a, b = _median(ours), _median(peer)
    if is_decode:
        tokens = N_DECODE * (batch or 1)
        return Row(what, dtype, batch, "tokens/s", tokens / a, tokens / b, _spread(ours, peer), b / a)
    return Row(what, dtype, batch, "s", a, b, _spread(ours, peer), b / a)


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _spread(*sides: list[float]) -> float:
    def one(values: list[float]) -> float:
        if len(values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / 2 / _median(values)

    return max(one(values) for values in sides)


def geometric_mean(rows: list[Row]) -> float:
    return math.exp(sum(math.log(row.ratio) for row in rows) / len(rows))


def disagreement(runs: Runs) -> dict[str, float]:
    """Largest difference of the last logits between the sides, over their scale: both must have done the same work."""
    out = {}
    for dtype, sides in runs.items():
        a, b = (sides[name][0]["probe"] for name in ("paligemma", "transformers"))
        out[dtype] = max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(abs(x) for x in b)
    return out


def markdown(rows: list[Row]) -> str:
    lines = [
        "| | dtype | batch | paligemma | transformers | unit | ratio | spread |",
        "|---|---|---:|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        d = 3 if row.ours < 10 else 2
        lines.append(
            f"| {row.what} | {row.dtype} | {row.batch or ''} | {row.ours:.{d}f} | {row.peer:.{d}f} "
            f"| {row.unit} | {row.ratio:.2f} | ±{100 * row.spread:.0f} % |"
        )
    worst = min(rows, key=lambda row: row.ratio)
    lines.append("")
    lines.append(
        f"Ratio above 1: this package is faster or smaller. Geometric mean {geometric_mean(rows):.3f}; lowest "
        f"{worst.ratio:.2f} ({worst.what}, {worst.dtype}{f', batch {worst.batch}' if worst.batch else ''})."
    )
    return "\n".join(lines)
