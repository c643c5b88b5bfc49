"""What happens beside training: a line per step in a file, a bar on the screen, validation, pictures of the course."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from paligemma.data.loader import Loader
from paligemma.train.flops import step_work
from paligemma.train.loop import FitOptions, Loss, StepReport, precision
from paligemma.train.loss import target_counts
from paligemma.train.ranks import Ranks
from paligemma.train.state import TrainState


class JsonLog:
    """One JSON object per step and per validation, appended to a file that survives interruptions.

    A resumed run first drops the lines of steps that it will do again.
    """

    def __init__(self, path: Path, *, resumed_at: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed_at]
            path.write_text("".join(f"{line}\n" for line in kept))
        self.path = path

    def write(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")

    def after_step(self, state: TrainState, report: StepReport) -> None:
        values = {key: value for key, value in vars(report).items() if value not in ((), None)}
        self.write(kind="step", **{**values, "factors": list(report.factors)})

    def finish(self, state: TrainState) -> None:
        """Nothing is held back, so nothing is left to do."""


def read_log(path: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The lines of one kind, in order; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("kind") == kind:
            rows.append(row)
    return rows


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line).get("step", 0))
    except ValueError:
        return float("inf")


class Progress:
    """A bar with loss, tokens and images per second, MFU where the peak is known, memory, time left."""

    def __init__(
        self, total_steps: int, *, first: int = 0, peak_flops: float | None = None, file: TextIO | None = None
    ) -> None:
        self.bar = tqdm(total=total_steps, initial=first, unit="step", file=file or sys.stderr, dynamic_ncols=True)
        self.peak_flops = peak_flops
        self._recent: deque[StepReport] = deque(maxlen=20)

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self._recent.append(report)
        seconds = sum(r.seconds + r.wait_s for r in self._recent)
        told = {
            "loss": f"{sum(r.loss for r in self._recent) / len(self._recent):.3f}",
            "tokens/s": f"{sum(r.n_tokens for r in self._recent) / seconds:,.0f}",
            "images/s": f"{sum(r.n_images for r in self._recent) / seconds:,.1f}",
        }
        if self.peak_flops:
            told["MFU"] = f"{sum(model_flops(state, r) for r in self._recent) / seconds / self.peak_flops:.0%}"
        told["memory"] = f"{memory_bytes(state) / 2**30:.1f} GiB"
        self.bar.set_postfix(told, refresh=False)
        self.bar.update(1)

    def finish(self, state: TrainState) -> None:
        self.bar.close()


def model_flops(state: TrainState, report: StepReport) -> float:
    """FLOPs of a step as it was: examples of equal length are assumed within it."""
    config, trained = state.model.config, state.trained()
    n_rows = max(1, report.n_examples)
    return step_work(
        config,
        n_images=report.n_images,
        n_rows=n_rows,
        row_length=round(report.n_slots / n_rows),
        n_targets=report.n_targets,
        trained=lambda component: any(_is_of(component, name) for name in trained),
        adapter_values=sum(p.numel() for name, p in trained.items() if ".adapters." in name),
    ).total


def _is_of(component: str, name: str) -> bool:
    if ".adapters." in name:
        return False
    if component == "embedding":
        return name.startswith("text.embedding")
    if component == "text":
        return name.startswith("text.blocks")
    return name.startswith(component)


def memory_bytes(state: TrainState) -> int:
    """Peak memory of the device so far; on a CPU what is resident now."""
    device = state.model.projector.weight.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0
    import resource

    return int(status.read_text().split()[1]) * resource.getpagesize()


class Validate:
    """The loss on a whole held-out set, at the end and every so many steps; `score` is its negative, for the best."""

    def __init__(
        self,
        loader: Loader,
        options: FitOptions,
        loss: Loss,
        *,
        every: int | None = None,
        log: JsonLog | None = None,
        also: Sequence[Callable[[TrainState], dict[str, float]]] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.loader, self.options, self.loss, self.every = loader, options, loss, every
        self.log, self.also, self.ranks = log, also, ranks or Ranks()
        self.values: dict[str, float] = {}
        self._at = -1

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if self.every is not None and report.step % self.every == 0:
            self._run(state)

    def finish(self, state: TrainState) -> None:
        if self._at != state.step:
            self._run(state)

    def score(self, state: TrainState) -> float | None:
        """Larger is better; None before the first validation."""
        return -self.values["loss"] if "loss" in self.values else None

    @torch.no_grad()
    def _run(self, state: TrainState) -> None:
        was_training = state.model.training
        state.model.eval()
        total = count = 0.0
        device = state.model.projector.weight.device
        for data in self.loader.once():
            for part in data.parts:
                with precision(device, self.options):
                    total += self.loss(state.model, part.to(device)).total.item()
                count += target_counts(part, self.options.normalization)
        total, count = self.ranks.sums([total, count], device)
        self.values = {"loss": total / max(count, 1.0)}
        for measure in self.also:
            self.values |= measure(state)
        self._at = state.step
        if self.log is not None:
            self.log.write(kind="validation", step=state.step, **self.values)
        state.model.train(was_training)
