"""The loop: read it on one screen. What varies is handed in, as values (`FitOptions`) or as functions (hooks).

for every step:  parts of the step ─▶ loss sums ─▶ backward      gradients add up over parts and ranks
                 divided once by what the whole step counts       ─▶ clip ─▶ update ─▶ hooks ─▶ snapshot
"""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import save_file

from paligemma.data.loader import Loader, StepData
from paligemma.errors import OptionError, TrainingError
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import IMAGE_FIELDS, ROW_FIELDS, Batch
from paligemma.train.loss import LossSums, Normalization, TokenLoss, cross_entropy, loss_sums, target_counts
from paligemma.train.parallel import even_parts, is_sharded, settle
from paligemma.train.ranks import Ranks
from paligemma.train.snapshots import Snapshots
from paligemma.train.state import TrainState

Loss = Callable[[PaliGemmaModel, Batch], LossSums]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What the loop does.

    Attributes:
        steps: updates of the whole run.
        normalization: the number by which the loss of a step is divided (`loss.py`).
        label_smoothing: of the default loss.
        precision: of the arithmetic; weights and moments stay in their own dtype (float32).
        dropout: in the decoder, at the reference's places.
        compile: every block through torch.compile, once for all lengths; the first steps take a minute more.
        save_every: steps between snapshots; save_minutes: minutes between them; either or both, None for never.
        keep: snapshots that stay.
        max_loss: a larger loss of a step counts as exploded; a uniform guess over Gemma's words costs 12.5.
        seed: of dropout; step n draws the same numbers whatever came before.
    """

    steps: int
    normalization: Normalization = "per_example"
    label_smoothing: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    compile: bool = False
    save_every: int | None = None
    save_minutes: float | None = 10.0
    keep: int = 2
    max_loss: float = 100.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"steps={self.steps}: expected at least 1.")
        if self.save_every is not None and self.save_every < 1:
            raise OptionError(f"save_every={self.save_every}: expected at least 1, or None.")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout={self.dropout}: expected at least 0 and less than 1.")
        if self.precision not in ("float32", "bfloat16"):
            raise OptionError(f"precision={self.precision!r}: expected float32 or bfloat16.")


@dataclass(frozen=True)
class StepReport:
    """What one step did, over all ranks.

    Attributes:
        step: updates done, this one included.
        loss: of the step, before its update.
        grad_norm: before clipping.
        factors: schedule factor of every parameter group.
        n_examples: seen; n_images: through the tower.
        n_tokens: real ones, image tokens included; n_targets: those that are learned.
        n_slots: with padding.
        seconds: from the data's arrival to the update.
        wait_s: for the data.
        n_cut, n_silenced: examples whose text was cut; who lost the whole suffix to that.
        broken: rows left out, of all ranks.
    """

    step: int
    loss: float
    grad_norm: float
    factors: tuple[float, ...]
    n_examples: int
    n_images: int
    n_tokens: int
    n_targets: int
    n_slots: int
    seconds: float
    wait_s: float
    n_cut: int = 0
    n_silenced: int = 0
    broken: tuple[str, ...] = ()


class Hook(Protocol):
    """Something that happens beside training; runs on every rank, in the order given."""

    def after_step(self, state: TrainState, report: StepReport) -> None: ...

    def finish(self, state: TrainState) -> None: ...


@dataclass(frozen=True)
class FitResult:
    """How a run ended: `finished`, or stopped by a signal with its state saved."""

    step: int
    finished: bool
    last: StepReport | None = field(default=None, repr=False)


def fit(
    state: TrainState,
    loader: Loader,
    options: FitOptions,
    *,
    loss: Loss | None = None,
    hooks: Sequence[Hook] = (),
    snapshots: Snapshots | None = None,
    score: Callable[[TrainState], float | None] | None = None,
    ranks: Ranks | None = None,
    failure_folder: Path | None = None,
) -> FitResult:
    """Train from `state.step` to `options.steps`.

    Args:
        loss: in place of cross-entropy; must return a sum, which is divided once per step.
        snapshots: where the state is saved; None saves nothing.
        score: of the state now, larger is better; the best snapshot is kept.
        failure_folder: where the data of a step are written whose loss is no number.

    Raises:
        TrainingError: the loss is no number or has exploded, or a last snapshot cannot be written.
        DataError: a row that cannot be read, unless the loader may skip it.
    """
    ranks = ranks or Ranks()
    loss = loss or default_loss(options)
    prepare(state.model, options)
    saved, arrived, report = time.monotonic(), time.monotonic(), None
    kept = state.step if snapshots is not None and state.step in snapshots.steps() else -1
    best = -math.inf if snapshots is None else snapshots.best_score()
    with _stop_on_sigterm() as asked_to_stop, _writing_ends(snapshots):
        for data in loader.steps(state.step, options.steps):
            wait_s = time.monotonic() - arrived
            report = train_step(state, data, options, loss, ranks, failure_folder, wait_s)
            for hook in hooks:
                hook.after_step(state, report)
            stop = ranks.any(asked_to_stop.is_set())
            if stop:
                break
            if snapshots is not None:
                worth = score(state) if score else None
                if _is_due(state.step, options, saved, ranks, is_best=worth is not None and worth > best):
                    snapshots.save(state.step, state.tensors(), state.values(), score=worth)
                    saved, kept = time.monotonic(), state.step
                best = max(best, -math.inf if worth is None else worth)
            arrived = time.monotonic()
        # The state first: nothing that comes after it, and no second signal, may cost what was learned.
        if snapshots is not None:
            _save_last(state, snapshots, score, kept, ranks)
        for hook in hooks:
            hook.finish(state)
        if snapshots is not None and score is not None:
            snapshots.rate(state.step, score(state))
    return FitResult(state.step, state.step >= options.steps, report)


def train_step(
    state: TrainState,
    data: StepData,
    options: FitOptions,
    loss: Loss,
    ranks: Ranks,
    failure_folder: Path | None = None,
    wait_s: float = 0.0,
) -> StepReport:
    """One update; the state has moved on when it returns.

    Raises:
        TrainingError: the loss or a gradient is no number, or has exploded: nothing was updated.
    """
    started, device = time.monotonic(), state.model.projector.weight.device
    torch.manual_seed(hash((options.seed, state.step, ranks.rank)) % 2**63)
    counts = [float(sum(target_counts(part, options.normalization) for part in data.parts))]
    counts += [float(len(data.broken)), *map(float, _sizes(data))]
    count, n_broken, *sizes = ranks.sums(counts, device)
    broken = tuple(row for part in ranks.all(data.broken) for row in part) if n_broken else ()
    total = 0.0
    parts = even_parts(data.parts, state.model.config, ranks) if is_sharded(state.model) else data.parts
    for part in parts:
        with precision(state.model, device, options):
            sums = loss(state.model, part.to(device, non_blocking=True))
        if sums.total.requires_grad:  # no weight that learns had a part in a text beside a tower, or the other way
            (sums.total / max(count, 1.0)).backward()  # type: ignore[no-untyped-call]
        elif is_sharded(state.model):
            settle(state.model)
        total += sums.total.item()
    ranks.add_gradients(state.optimizer.parameters)
    (mean,) = (value / max(count, 1.0) for value in ranks.sums([total], device))
    if not (math.isfinite(mean) and mean <= options.max_loss):
        raise _failure(state, data, mean, options, failure_folder, ranks)
    norm = state.optimizer.update(state.step)
    if not math.isfinite(norm):
        raise _failure(state, data, norm, options, failure_folder, ranks, what="the norm of the gradients")
    factors = tuple(state.optimizer.factors(state.step))
    state.step += 1
    n_examples, n_images, n_tokens, n_targets, n_slots, n_cut, n_silenced = (int(size) for size in sizes)
    return StepReport(
        state.step, mean, norm, factors, n_examples, n_images, n_tokens, n_targets, n_slots,
        time.monotonic() - started, wait_s, n_cut, n_silenced, broken,
    )  # fmt: skip


def default_loss(options: FitOptions, token_loss: TokenLoss | None = None) -> Loss:
    """The loss of the suffix, as the options say: cross-entropy, or another loss of single tokens."""
    of_tokens = token_loss or cross_entropy(options.label_smoothing)

    def loss(model: PaliGemmaModel, batch: Batch) -> LossSums:
        return loss_sums(model, batch, normalization=options.normalization, token_loss=of_tokens)

    return loss


def prepare(model: PaliGemmaModel, options: FitOptions) -> None:
    """Training mode, dropout where it acts, and compiled blocks where they are asked for; more than once is fine."""
    model.train()
    for block in model.text.blocks:
        block.dropout = options.dropout  # type: ignore[assignment]
    if options.compile:
        model.text.whole_rows = True
        for block in (*model.vision.blocks, *model.text.blocks):
            if "forward" not in vars(block):
                # Below hooks: what gathers the weights of a sharded block stays outside.
                block.forward = torch.compile(block.forward, dynamic=True)


def precision(model: PaliGemmaModel, device: torch.device, options: FitOptions) -> AbstractContextManager[Any]:
    """The arithmetic of a forward pass."""
    if options.precision == "float32":
        return contextlib.nullcontext()
    # The cache would keep every gathered weight of a sharded model until the pass is over.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=not is_sharded(model))


def _sizes(data: StepData) -> tuple[int, ...]:
    parts = data.parts
    return (
        sum(part.n_examples for part in parts),
        sum(0 if part.images is None else len(part.images) for part in parts),
        sum(int(part.mask_input.sum()) for part in parts),
        sum(int(part.mask_loss.sum()) for part in parts),
        sum(part.tokens.numel() for part in parts),
        data.n_cut,
        data.n_silenced,
    )


def _save_last(
    state: TrainState, snapshots: Snapshots, score: Callable[[TrainState], float | None] | None, kept: int, ranks: Ranks
) -> None:
    """The state at the end, unless it is what was saved last; where it fails, it fails on every rank."""
    failure = None
    try:
        if state.step == kept:
            snapshots.finish(strict=True)
        else:
            worth = score(state) if score else None
            snapshots.save(state.step, state.tensors(), state.values(), score=worth, wait=True)
    except TrainingError as error:
        failure = str(error)
    told = next((text for text in ranks.all(failure) if text), None)
    if told is not None:
        raise TrainingError(told)


@contextlib.contextmanager
def _writing_ends(snapshots: Snapshots | None) -> Iterator[None]:
    """What stops a run on every rank does not stop the snapshot that is being written."""
    try:
        yield
    except TrainingError:
        if snapshots is not None:
            snapshots.finish()
        raise


def _is_due(step: int, options: FitOptions, saved: float, ranks: Ranks, *, is_best: bool) -> bool:
    by_steps = options.save_every is not None and step % options.save_every == 0
    by_time = options.save_minutes is not None and time.monotonic() - saved > 60 * options.save_minutes
    return step < options.steps and ranks.any(by_steps or by_time or is_best)


def _failure(
    state: TrainState,
    data: StepData,
    value: float,
    options: FitOptions,
    folder: Path | None,
    ranks: Ranks,
    what: str = "the loss",
) -> TrainingError:
    where = ""
    if folder is not None:
        path = folder / f"failed-step-{state.step:06d}" / (f"rank-{ranks.rank}" if ranks.world_size > 1 else "")
        path.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(data.parts):
            fields = {name: getattr(part, name) for name in (*ROW_FIELDS, *IMAGE_FIELDS, "weights")}
            kept = {name: t.detach().cpu().contiguous() for name, t in fields.items() if t is not None}
            save_file(kept, path / f"part-{number}.safetensors")
        (path / "examples.json").write_text(json.dumps({"step": state.step, "examples": data.names}, indent=1) + "\n")
        where = f" The data of the step are in {path}."
    expected = "a finite number" if not math.isfinite(value) else f"at most {options.max_loss:g}"
    return TrainingError(
        f"step {state.step}: {what} is {value:g}: expected {expected}. Lower the learning rate, clip, or look at the "
        f"examples.{where}"
    )


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in the main thread; the old handler comes back afterwards."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
