"""The folder that is shipped: weights in float16, tokenizer, mask codes, the lessons behind them, their scores."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from paligemma.checkpoints import read, write
from paligemma.checkpoints.rules import TABLE
from paligemma.config import PaliGemmaConfig
from paligemma.evals.tiny import TinyReport
from paligemma.models.mask_vae import MaskVae

HISTORY = "training.json"
CARD = """# {name}

The embedded model of the package: a whole PaliGemma 2 in small, taught from nothing by `paligemma/recipes/tiny` on the
procedural picture world (`paligemma/data/world`). It knows that world and nothing else. Licence: Apache-2.0.

| lesson | steps | pixels | examples a step | learning rate | cooled down over | seed |
|---|---:|---:|---:|---:|---:|---:|
{lessons}

## Held-out scores

1,000 pictures each, drawn from seeds that training never sees; printed again by `paligemma eval tiny --model FOLDER`.

```
{scores}
```
"""
COLUMNS = ("lesson", "steps", "resolution", "examples_per_step", "lr", "cooldown", "seed")


def export(config: PaliGemmaConfig, model: Path, target: Path, history: list[dict[str, Any]]) -> None:
    """Write a taught model as a Hugging Face folder in float16, without the rows that pad its table.

    Args:
        history: the lessons behind the weights, one after another; keys are `COLUMNS`.
    """
    _, weights = read(model, dtype=torch.float32)
    weights = {**weights, TABLE: weights[TABLE][: config.text.vocab_size].clone()}
    write(target, config, weights, dtype="float16", overwrite=True, beside=[model / "tokenizer.model"])
    MaskVae.from_npz(model / "mask_vae.npz").to_npz(target / "mask_vae.npz", dtype="float16")
    (target / HISTORY).write_text(json.dumps(history, indent=1) + "\n")


def history_of(start: Path | None) -> list[dict[str, Any]]:
    """The lessons that a model went through before, one that is not known where it does not say; none without one."""
    if start is None:
        return []
    file = start / HISTORY
    said = json.loads(file.read_text()) if file.is_file() else None
    return said if isinstance(said, list) else [{"lesson": f"before, not known ({start.name})"}]


def lesson_of(name: str, run: Path) -> dict[str, Any]:
    """The numbers of a stage that was carried out in a folder."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    return {
        "lesson": name,
        "steps": tree["fit"]["steps"],
        "resolution": tree["resolution"],
        "examples_per_step": tree["loader"]["batch_size"],
        "lr": tree["lr"],
        "cooldown": tree["optim"]["schedule"]["cooldown"]["percent"],
        "seed": tree["loader"]["seed"],
    }


def write_card(target: Path, report: TinyReport, name: str) -> None:
    """README.md and scores.json beside the weights: how they were made and what they score."""
    (target / "scores.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    lessons = "\n".join(
        "| " + " | ".join("" if (said := lesson.get(column)) is None else f"{said}" for column in COLUMNS) + " |"
        for lesson in history_of(target)
    )
    (target / "README.md").write_text(CARD.format(name=name, lessons=lessons, scores=report.table()))
