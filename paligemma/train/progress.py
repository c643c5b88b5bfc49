"""How a run is doing, on the screen: one line that is redrawn on a terminal, a line now and then anywhere else.

1200/3500  12:40 left  loss 0.412  12.3k tok/s  34.1 img/s  MFU 41%  61.0 GiB  ██████████▍
"""

import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from paligemma.train.flops import step_work
from paligemma.train.loop import StepReport
from paligemma.train.state import TrainState

RECENT = 20  # steps whose mean is shown
BAR = (10, 40)  # narrowest and widest, in characters
EIGHTHS = " ▏▎▍▌▋▊▉"
LINE_EVERY_S = (10.0, 60.0)  # where nobody can redraw: often at first, then more rarely


class Progress:
    """Loss, tokens and images per second, MFU where the peak is known, memory and time left.

    Args:
        total_steps: of the whole run; first: done before this process.
        peak_flops: of the device, in the precision of the run.
        file: where it is shown, stderr by default; what is no terminal gets whole lines.
    """

    def __init__(
        self, total_steps: int, *, first: int = 0, peak_flops: float | None = None, file: TextIO | None = None
    ) -> None:
        self.total, self.peak_flops, self.file = total_steps, peak_flops, file or sys.stderr
        self._recent: deque[tuple[StepReport, float]] = deque(maxlen=RECENT)
        self._started = self._told = time.monotonic()
        self._first = self._step = first
        self._bar = None
        if self.file.isatty():
            self._bar = tqdm(total=total_steps, initial=first, file=self.file, bar_format="{desc}", leave=True)
            self._bar.set_description_str(f"{first}/{total_steps}  the first step is under way")

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self._recent.append((report, model_flops(state, report) if self.peak_flops else 0.0))
        self._step = report.step
        if self._bar is not None:
            if time.monotonic() - self._told > self._bar.mininterval or report.step == self.total:
                self._bar.set_description_str(self.line(state, columns_of(self.file)), refresh=False)
                self._told = time.monotonic()
            self._bar.update(1)
        elif self._is_due(report.step):
            print(f"step {self.line(state, None)}", file=self.file, flush=True)
            self._told = time.monotonic()

    def finish(self, state: TrainState) -> None:
        if self._bar is not None and self._recent:
            self._bar.set_description_str(self.line(state, columns_of(self.file)))
        if self._bar is not None:
            self._bar.close()

    def line(self, state: TrainState, columns: int | None) -> str:
        """What is shown, at most `columns` wide with a bar where there is room; None: everything, and no bar."""
        reports = [report for report, _ in self._recent]
        seconds = max(sum(report.seconds + report.wait_s for report in reports), 1e-9)
        told = [
            f"{self._step}/{self.total}",
            self._time_left(),
            f"loss {sum(report.loss for report in reports) / len(reports):.3f}",
            f"{short(sum(report.n_tokens for report in reports) / seconds)} tok/s",
            f"{short(sum(report.n_images for report in reports) / seconds)} img/s",
        ]
        if self.peak_flops:
            told.append(f"MFU {sum(flops for _, flops in self._recent) / seconds / self.peak_flops:.0%}")
        memory = memory_bytes(state)
        if memory:
            told.append(f"{memory / 2**30:.1f} GiB")
        text = "  ".join(told)
        if columns is None:
            return text
        room = min(columns - len(text) - 3, BAR[1])  # the last column is never written: some terminals would wrap
        return f"{text}  {bar(self._step / self.total, room)}" if room >= BAR[0] else text[: columns - 1]

    def _time_left(self) -> str:
        """By the clock and since the start, so that validations and snapshots count."""
        elapsed, done = time.monotonic() - self._started, self._step - self._first
        if self._step >= self.total:
            return f"{clock(elapsed)} in all" if not self._first else f"{clock(elapsed)} since resumed"
        return f"{clock(elapsed / max(done, 1) * (self.total - self._step))} left"

    def _is_due(self, step: int) -> bool:
        if step - self._first <= 2 or step == self.total:
            return True
        low, high = LINE_EVERY_S
        now = time.monotonic()
        return now - self._told >= min(high, max(low, (now - self._started) / 50))


def columns_of(file: TextIO) -> int:
    """Width of the terminal that a file is, as it is now."""
    try:
        return os.get_terminal_size(file.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def bar(share: float, columns: int) -> str:
    """A bar of so many characters, filled to an eighth of one."""
    eighths = round(min(max(share, 0.0), 1.0) * columns * 8)
    filled = "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
    return filled.ljust(columns, "·")


def short(value: float) -> str:
    """Three digits and a unit: 7.25, 34.1, 812, 12.3k, 1.20M."""
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (float("inf"), "G")):
        if value < limit * 0.9995:
            scaled = value / (limit / 1e3) if unit != "G" else value / 1e9
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    raise AssertionError(value)


def clock(seconds: float) -> str:
    """0:07, 12:40, 3:05:00, 2 d 4 h."""
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes % 60:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


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
    """Peak memory of the device so far; on a CPU what is resident now; 0 where nobody can tell."""
    device = state.model.projector.weight.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0
    import resource

    return int(status.read_text().split()[1]) * resource.getpagesize()
