"""TensorBoard and Weights & Biases, both extras: the numbers of `log.jsonl` where their users look for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from paligemma.errors import MissingExtra, OptionError, nearest
from paligemma.train.loop import StepReport
from paligemma.train.state import TrainState

Tracker = Literal["tensorboard", "wandb"]


class Sink(Protocol):
    """Takes numbers by name."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Track:
    """A hook that hands every step, and every validation, to a tracker.

    Args:
        validation: gives the values of the newest validation and the step it was made after.
    """

    def __init__(self, sink: Sink, validation: Any = None) -> None:
        self.sink, self.validation, self._told = sink, validation, -1

    def after_step(self, state: TrainState, report: StepReport) -> None:
        seconds = max(report.seconds + report.wait_s, 1e-9)
        values = {
            "train/loss": report.loss,
            "train/grad_norm": report.grad_norm,
            "speed/tokens_per_s": report.n_tokens / seconds,
            "speed/images_per_s": report.n_images / seconds,
            "speed/wait_s": report.wait_s,
        }
        values |= {f"schedule/group_{i}": factor for i, factor in enumerate(report.factors)}
        self.sink.write(report.step, values)
        self._validated()

    def finish(self, state: TrainState) -> None:
        self._validated()
        self.sink.close()

    def _validated(self) -> None:
        if self.validation is not None and self.validation.at > self._told:
            self._told = self.validation.at
            self.sink.write(self._told, {f"valid/{name}": value for name, value in self.validation.values.items()})


class TensorBoard:
    """Event files under `folder`: `tensorboard --logdir FOLDER` shows them."""

    def __init__(self, folder: Path, *, first: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("tensorboard", "tensorboard", "trackers=[tensorboard]") from None
        # A resumed run does some steps again: what was written of them is hidden.
        self._writer: Any = SummaryWriter(str(folder), purge_step=first + 1 if first else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run at Weights & Biases, or offline with WANDB_MODE=offline; a resumed run goes on in the same one."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtra("wandb", "wandb", "trackers=[wandb]") from None
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / "wandb.id"
        known = name.read_text().strip() if name.exists() else None
        self._run: Any = wandb.init(
            project="paligemma", dir=str(folder), id=known, resume="allow", config=dict(settings)
        )
        name.write_text(self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def require_trackers(names: tuple[str, ...]) -> None:
    """
    Raises:
        OptionError: a name that is no tracker, with the nearest.
    """
    for name in names:
        if name not in get_args(Tracker):
            raise OptionError(
                f"trackers={list(names)}: expected tensorboard and wandb.{nearest(str(name), get_args(Tracker))}"
            )


def sink_of(name: str, folder: Path, settings: Mapping[str, Any], *, first: int = 0) -> Sink:
    """A tracker by name.

    Raises:
        MissingExtra: its package is not installed.
    """
    return TensorBoard(folder / "tensorboard", first=first) if name == "tensorboard" else Wandb(folder, settings)
