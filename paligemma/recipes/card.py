"""What lies beside a tuned model for people: a card, the curves of loss and learning rate, a page of answers."""

import math
from pathlib import Path
from typing import Any

from paligemma.evals.folder import FolderReport
from paligemma.presets import EMBEDDED
from paligemma.train.hooks import read_log

CARD = """---
library_name: paligemma
{base_line}license: gemma
tags: [paligemma, vision-language]
---
# {name}

{base} taught with [paligemma](https://pypi.org/project/paligemma/) on {n_train:,} examples of {data}: {steps:,} steps
of {batch}, {method}. The licence and the terms of use are those of the base model.

```python
import paligemma

pg = paligemma.load({where})
```

## Scores

{scores}

## Course

{course}

![Loss and learning rate](curves.png)

## Every setting

```yaml
{settings}```
"""


def write_card(
    folder: Path,
    recipe: dict[str, Any],
    report: FolderReport | None,
    before: dict[str, Any] | None,
    *,
    n_train: int,
) -> Path:
    """README.md of a run, and its curves where matplotlib is installed."""
    import yaml

    steps = read_log(folder / "log.jsonl")
    drawn = draw_curves(folder)
    losses = [row["loss"] for row in steps]
    course = "No step was logged."
    if losses:
        tail = losses[-max(1, len(losses) // 20) :]
        course = f"Loss {losses[0]:.3f} at the first step, {sum(tail) / len(tail):.3f} over the last {len(tail)}."
    text = CARD.format(
        base=recipe["model"],
        base_line=_base_line(str(recipe["model"])),
        name=folder.name,
        n_train=n_train,
        data=Path(str(recipe["data"])).name,
        steps=recipe["fit"]["steps"],
        batch=recipe["loader"]["batch_size"],
        method={"full": "all weights", "frozen": "the decoder"}.get(recipe["method"], f"adapters ({recipe['method']})"),
        where=_loaded_from(folder, str(recipe["model"])),
        scores=_score_table(report, before),
        course=course,
        settings=yaml.safe_dump(recipe, sort_keys=False),
    )
    if not drawn:
        text = text.replace("![Loss and learning rate](curves.png)\n\n", "")
    path = folder / "README.md"
    path.write_text(text)
    return path


def _loaded_from(folder: Path, base: str) -> str:
    """What `paligemma.load` takes: the whole weights, or the base with the adapter."""
    if (folder / "model").exists():
        return f'"{folder / "model"}"'
    return f'"{base}", adapter="{folder / "adapter"}"' if (folder / "adapter").exists() else f'"{base}"'


def _base_line(model: str) -> str:
    """The hub's metadata of where a model comes from; only hub ids can stand there."""
    if Path(model).exists() or model in EMBEDDED:
        return ""
    return f"base_model: {model if '/' in model else f'google/{model}'}\n"


def _score_table(report: FolderReport | None, before: dict[str, Any] | None) -> str:
    if report is None:
        return "No rows were held out."
    lines = ["| | before | after | rows |", "|---|---:|---:|---:|"]
    for kind, metrics in report.scores.items():
        for name, value in metrics.items():
            old = (before or {}).get(kind, {}).get(name)
            shown = ["-" if v is None or math.isnan(v) else f"{v:.3f}" for v in (old, value)]
            lines.append(f"| {kind}: {name} | {shown[0]} | {shown[1]} | {report.n_rows[kind]} |")
    return "\n".join(lines)


def draw_curves(folder: Path) -> bool:
    """curves.png of a run: loss (every step, smoothed, validation) above the schedule; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps, validations = read_log(folder / "log.jsonl"), read_log(folder / "log.jsonl", "validation")
    if not steps:
        return False
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    x, loss = [row["step"] for row in steps], [row["loss"] for row in steps]
    above.plot(x, loss, color="#9db7d5", linewidth=0.8, label="each step")
    above.plot(x, _smoothed(loss), color="#1f4e8c", linewidth=1.8, label="smoothed")
    if validations:
        above.plot(
            [row["step"] for row in validations], [row["loss"] for row in validations], "o-", color="#d1495b",
            markersize=5, label="held out",
        )  # fmt: skip
    above.set_ylabel("loss")
    above.grid(alpha=0.25)
    above.legend(frameon=False)
    factors = list(zip(*[row["factors"] for row in steps], strict=False))
    for number, course in enumerate(dict.fromkeys(factors)):
        below.plot(x, course, linewidth=1.5, label=f"group {number + 1}")
    below.set_ylabel("learning rate\n(share of its peak)")
    below.set_xlabel("step")
    below.set_ylim(bottom=0)
    below.grid(alpha=0.25)
    figure.savefig(folder / "curves.png", dpi=130)
    return True


def _smoothed(values: list[float]) -> list[float]:
    keep = 1 - 1 / max(2, min(50, len(values) // 10))
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
