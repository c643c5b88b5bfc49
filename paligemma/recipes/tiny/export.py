"""Stage 4: the folder that is shipped, and its scores."""

import json
from pathlib import Path

import torch

from paligemma.checkpoints import write
from paligemma.config import PaliGemmaConfig
from paligemma.evals.tiny import TinyReport
from paligemma.models.mask_vae import MaskVae

CARD = """# tiny

The embedded model of the package: a whole PaliGemma 2 in small, taught from nothing by `paligemma/recipes/tiny` on the
procedural picture world (`paligemma/data/world`). It knows that world and nothing else. Licence: Apache-2.0.

Made again by: `{command}`

{facts}

## Held-out scores

1,000 pictures each, drawn from seeds that training never sees; printed again by `paligemma eval tiny`.

```
{scores}
```
"""


def export(config: PaliGemmaConfig, work: Path, target: Path) -> None:
    """Write the averaged weights of a run as a Hugging Face folder in float16, with tokenizer and mask codes."""
    state = torch.load(work / "state.pt", map_location="cpu", weights_only=True)
    weights = {name: tensor.contiguous() for name, tensor in state["average"].items()}
    write(target, config, weights, dtype="float16", overwrite=True, beside=[work / "tokenizer.model"])
    MaskVae.from_npz(work / "mask_vae.npz").to_npz(target / "mask_vae.npz", dtype="float16")
    facts = {"steps": state["step"], **state["options"]}
    (target / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def write_card(target: Path, report: TinyReport, command: str) -> None:
    """README.md and scores.json beside the weights: how they were made and what they score."""
    (target / "scores.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    facts = json.loads((target / "training.json").read_text())
    table = "\n".join(["| option | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])
    (target / "README.md").write_text(CARD.format(command=command, facts=table, scores=report.table()))
