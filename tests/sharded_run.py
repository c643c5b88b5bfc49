"""A small run under torchrun, by its settings: what the tests of several processes start.

torchrun … tests/sharded_run.py rows.jsonl OUT '{"sharded": true, "steps": 4, …}'
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from paligemma.models.lora import LoraOptions, add_lora
from paligemma.train.loop import FitOptions, StepReport, fit
from paligemma.train.optim import Optimizer
from paligemma.train.parallel import mesh_of, shard
from paligemma.train.ranks import Ranks
from paligemma.train.snapshots import Snapshots
from paligemma.train.state import TrainState
from tests.training_runs import loader_of, optim_options, state_of


class Watch:
    """Keeps what is told, and dies where it is asked to: on one rank, the first time that torchrun starts it."""

    def __init__(self, ranks: Ranks, die_at: int | None) -> None:
        self.told: list[list[float]] = []
        self.ranks, self.die_at = ranks, die_at

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self.told.append([report.loss, report.n_examples, report.n_targets])
        is_first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if report.step == self.die_at and is_first_life and self.ranks.rank == self.ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self, state: TrainState) -> None:
        pass


def begin(
    options: FitOptions, ranks: Ranks, *, sharded: bool, lora: bool, base: str, optim: dict[str, Any]
) -> TrainState:
    state = state_of(options, **optim)
    if base == "bfloat16":
        state.model.to(torch.bfloat16)
    if lora:
        add_lora(state.model, LoraOptions(rank=4), seed=3)
    if sharded:
        shard(state.model, mesh_of(ranks, torch.device("cpu")))
    if sharded or lora:
        chosen = optim_options(**optim)
        state.optimizer = Optimizer(state.model.named_parameters(), chosen, total_steps=options.steps)
    return state


def main(path: Path, out: Path, given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join("cpu")
    sharded = given.get("sharded", False)
    options = FitOptions(steps=given.get("steps", 4), save_every=given.get("save_every"), **given.get("fit", {}))
    state = begin(
        options, ranks, sharded=sharded, lora=given.get("lora", False), base=given.get("base", "float32"),
        optim=given.get("optim", {}),
    )  # fmt: skip
    state.model.text.recompute = state.model.vision.recompute = given.get("recompute", False)
    snapshots = None
    if "snapshots" in given:
        snapshots = Snapshots(Path(given["snapshots"]), ranks=ranks, sharded=sharded)
        snapshot = snapshots.latest()
        if snapshot is not None:
            state.restore(snapshot)
    watch = Watch(ranks, given.get("die_at"))
    loader = loader_of(path, batch_size=6, rank=ranks.rank, world_size=ranks.world_size, **given.get("loader", {}))
    fit(state, loader, options, hooks=[watch], ranks=ranks, snapshots=snapshots)
    (out / f"losses-{ranks.rank}.json").write_text(json.dumps(watch.told))
    weights = {name: _whole(value).contiguous() for name, value in state.model.state_dict().items()}
    save_file(weights, out / f"weights-{ranks.rank}.safetensors")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    # As the command line does under torchrun: threads of a group whose other members have left can abort an end.
    sys.stderr.flush()
    os._exit(0)
