"""Learning-rate schedules as values: a factor between 0 and 1 for every step, counted from 0.

    Schedule(kind="cosine", warmup=Duration(percent=0.05)).factor(step, total_steps=1000)

The factor multiplies both the learning rate and the weight decay (`optim.py`). Source: big_vision utils.py
`create_learning_rate_schedule`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from paligemma.errors import OptionError, nearest

Kind = Literal["cosine", "linear", "rsqrt", "stair", "constant"]


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A part of a run in exactly one unit; the default is no time at all.

    Attributes:
        steps: optimiser steps.
        epochs: passes over the examples.
        examples: examples seen.
        percent: share of all steps, 0..1 (big_vision's word: 0.05 is five percent).
    """

    steps: float | None = None
    epochs: float | None = None
    examples: float | None = None
    percent: float | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) > 1:
            raise OptionError(f"a duration in {' and '.join(given)}: expected one unit. Leave out the others.")
        for name, value in given.items():
            if value < 0 or (name == "percent" and value > 1):
                limit = "between 0 and 1" if name == "percent" else "0 or more"
                raise OptionError(f"a duration of {value} {name}: expected {limit}.")

    def _given(self) -> dict[str, float]:
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}

    @property
    def value(self) -> float:
        """The number, whatever its unit; 0 of no time at all."""
        return next(iter(self._given().values()), 0.0)

    def in_steps(self, total_steps: int, *, batch_size: int | None = None, n_examples: int | None = None) -> int:
        """Whole steps, rounded half to even; at least 1 unless the duration is zero.

        Args:
            total_steps: of the run.
            batch_size: examples per step; needed for epochs and examples.
            n_examples: in an epoch; needed for epochs.

        Raises:
            OptionError: the unit needs a size that is not known here.
        """
        given = self._given()
        if not given:
            return 0
        ((unit, value),) = given.items()
        if not value:
            return 0
        if unit == "percent":
            value *= total_steps
        elif unit != "steps":
            if batch_size is None or (unit == "epochs" and n_examples is None):
                raise OptionError(
                    f"a duration in {unit} needs the size of {'a batch' if batch_size is None else 'an epoch'}, which "
                    "is not known here. Give it in steps or percent."
                )
            value = value * (n_examples or 1) / batch_size if unit == "epochs" else value / batch_size
        return max(1, round(value))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The course of a learning rate.

    Attributes:
        kind: "cosine" falls to 0; "linear" to `end`, along a power of what is left; "rsqrt" as 1 / sqrt(1 + steps
            since warm-up / timescale), which needs no end in sight; "stair" takes `stairs`; "constant".
        warmup: linear rise at the start; the very first update then has factor 0.
        cooldown: linear fall at the end, multiplied in.
        end: of a linear schedule.
        power: of a linear schedule; 2 falls fast at first.
        stairs: (step, factor) pairs in order; each factor holds from its step on, 1 before the first.
        timescale: of "rsqrt": steps, or a duration.
        shift: of "rsqrt", what counts as passed already when warm-up ends: steps, or a duration.
    """

    kind: Kind = "cosine"
    warmup: Duration = Duration()
    cooldown: Duration = Duration()
    end: float = 0.0
    power: float = 1.0
    stairs: tuple[tuple[int, float], ...] = ()
    timescale: Duration | float = 10_000.0
    shift: Duration | float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            kinds = get_args(Kind)
            raise OptionError(f"schedule {self.kind!r}: expected one of {', '.join(kinds)}.{nearest(self.kind, kinds)}")
        scale = self.timescale.value if isinstance(self.timescale, Duration) else self.timescale
        if scale <= 0:
            raise OptionError(f"timescale={self.timescale}: expected more than 0 steps.")

    def factor(
        self, step: int, total_steps: int, *, batch_size: int | None = None, n_examples: int | None = None
    ) -> float:
        """The multiplier at a step, 0..1.

        Args:
            step: counted from 0.
            total_steps: of the run; further arguments as in `Duration.in_steps`.
        """
        sizes = {"batch_size": batch_size, "n_examples": n_examples}
        warmup = self.warmup.in_steps(total_steps, **sizes)
        cooldown = self.cooldown.in_steps(total_steps, **sizes)
        shift, timescale = (
            value.in_steps(total_steps, **sizes) if isinstance(value, Duration) else value
            for value in (self.shift, self.timescale)
        )
        factor = self._course(step, warmup, total_steps, shift, timescale)
        if warmup:
            factor *= min(1.0, step / warmup)
        if cooldown:
            factor *= min(1.0, (total_steps - step) / cooldown)
        return max(0.0, factor)

    def _course(self, step: int, warmup: int, total_steps: int, shift: float, timescale: float) -> float:
        if self.kind == "constant":
            return 1.0
        if self.kind == "stair":
            return next((factor for start, factor in reversed(self.stairs) if step >= start), 1.0)
        if self.kind == "rsqrt":
            return 1 / math.sqrt(1 + (max(step - warmup, 0) + shift) / timescale)
        progress = min(1.0, max(0.0, (step - warmup) / max(1, total_steps - warmup)))
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return self.end + (1 - self.end) * math.pow(1 - progress, self.power)
