"""What happens beside training: a line per step in a file, and validation.

The bar on the screen is in `progress.py`, TensorBoard and Weights & Biases in `trackers.py`.
"""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from paligemma.checkpoints.staging import replace_text
from paligemma.data.loader import Loader
from paligemma.errors import OptionError
from paligemma.train.loop import FitOptions, Loss, StepReport, precision
from paligemma.train.loss import target_counts
from paligemma.train.parallel import even_parts, is_sharded, settle
from paligemma.train.progress import Progress
from paligemma.train.ranks import Ranks
from paligemma.train.state import TrainState

__all__ = ["JsonLog", "LeftOut", "Progress", "Validate", "read_log", "rows_left_out", "tell_left_out"]


class JsonLog:
    """One JSON object per step and per validation, appended to a file that survives interruptions.

    A resumed run first drops the lines of steps that it will do again.
    """

    def __init__(self, path: Path, *, resumed_at: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed_at]
            replace_text(path, "".join(f"{line}\n" for line in kept))
        self.path, self._held = path, list[str]()

    def write(self, **values: Any) -> None:
        """One line; where the disk is full it waits for the next."""
        self._held.append(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")
        self._flush()

    def _flush(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(self._held))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # a line that is half there would spoil the next
            if len(self._held) == 1:
                told = f"{self.path}: cannot be written ({error.strerror}): its lines are held back."
                warnings.warn(told, stacklevel=3)
            return
        self._held.clear()

    def after_step(self, state: TrainState, report: StepReport) -> None:
        values = {key: value for key, value in vars(report).items() if value not in ((), None)}
        self.write(kind="step", **{**values, "factors": list(report.factors)})

    def finish(self, state: TrainState) -> None:
        """What was held back, once more."""
        if self._held:
            self._flush()


class LeftOut:
    """Which rows could not be read and were left out, over all ranks, told once at the end.

    Args:
        say: takes a line for people, on the first rank.
        log: takes all of them, on the first rank.
        held_out: looks at the rows of the other split, which are told apart.
        before: those of the run so far, where it goes on.
    """

    def __init__(
        self,
        say: Callable[[str], Any],
        ranks: Ranks | None = None,
        *,
        log: "JsonLog | None" = None,
        held_out: "Validate | None" = None,
        before: Iterable[str] = (),
    ) -> None:
        self.say, self.ranks, self.log, self.held_out = say, ranks or Ranks(), log, held_out
        self.seen: dict[str, None] = dict.fromkeys(before)

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self.seen.update(dict.fromkeys(report.broken))

    def finish(self, state: TrainState) -> None:
        held_out = {} if self.held_out is None else self.held_out.broken
        for what, seen in (("rows", self.seen), ("held-out rows", held_out)):
            rows = list(dict.fromkeys(row for part in self.ranks.all(list(seen)) for row in part))
            if rows and self.ranks.is_first:
                if self.log is not None:
                    self.log.write(kind="left out", step=state.step, what=what, rows=rows)
                tell_left_out(self.say, rows, what, more="in log.jsonl")


def tell_left_out(say: Callable[[str], Any], rows: Sequence[str], what: str, more: str, n_shown: int = 5) -> None:
    """Say how many rows were left out, and the first of them; `more` says where the others stand."""
    say(f"{len(rows):,} {what} could not be read and were left out:")
    for row in rows[:n_shown]:
        say(f"  {row}")
    if len(rows) > n_shown:
        say(f"  and {len(rows) - n_shown:,} more, {more}")


def read_log(path: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The lines of one kind, in order; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("kind") == kind:
            rows.append(row)
    return rows


def rows_left_out(path: Path) -> list[str]:
    """Training rows that a run left out so far, as its log says."""
    return [row for step in read_log(path) for row in step.get("broken", ())]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line).get("step", 0))
    except ValueError:
        return float("inf")


class Validate:
    """The loss on a whole held-out set, at the end and every so many steps; `score` is its negative, for the best.

    Attributes:
        values: of the last validation; at: the step that it was made after, -1 before the first.
        broken: what was wrong with this rank's rows that were left out.
    """

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
        if every is not None and every < 1:
            raise OptionError(f"eval_every={every}: expected at least 1, or None.")
        self.loader, self.options, self.loss, self.every = loader, options, loss, every
        self.log, self.also, self.ranks = log, also, ranks or Ranks()
        self.values: dict[str, float] = {}
        self.at = -1
        self.broken: dict[str, None] = {}

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if self.every is not None and report.step % self.every == 0:
            self._run(state)

    def finish(self, state: TrainState) -> None:
        """At the end; not where a signal stopped the run, since whoever sends one does not wait long."""
        if self.at != state.step and state.step >= self.options.steps:
            self._run(state)

    def score(self, state: TrainState) -> float | None:
        """Larger is better; None where these weights were not validated."""
        return -self.values["loss"] if self.at == state.step else None

    @torch.no_grad()
    def _run(self, state: TrainState) -> None:
        was_training = state.model.training
        state.model.eval()
        total = count = 0.0
        device = state.model.projector.weight.device
        for data in self.loader.once():
            self.broken.update(dict.fromkeys(data.broken))
            parts = even_parts(data.parts, state.model.config, self.ranks) if is_sharded(state.model) else data.parts
            for part in parts:
                with precision(state.model, device, self.options):
                    total += self.loss(state.model, part.to(device)).total.item()
            count += sum(target_counts(part, self.options.normalization) for part in data.parts)
        settle(state.model)
        total, count = self.ranks.sums([total, count], device)
        self.values = {"loss": total / max(count, 1.0)}
        for measure in self.also:
            self.values |= measure(state)
        self.at = state.step
        if self.log is not None:
            self.log.write(kind="validation", step=state.step, **self.values)
        state.model.train(was_training)
