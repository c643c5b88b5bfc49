"""The rows of a transfer: which are learned, which are held out, how much each counts, how long they are."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from paligemma.data.example import Example
from paligemma.data.mixture import Mixture, fetch
from paligemma.data.order import Draw
from paligemma.data.rows import open_rows
from paligemma.data.subset import Subset, problems_of
from paligemma.errors import DataError, OptionError, PaliGemmaError, nearest
from paligemma.evals.folder import KINDS, RAW, kind_of
from paligemma.processing.processor import Processor
from paligemma.tasks.coords import N_LOC, on_step

LOOK = 512  # rows whose text is measured before a run


class Rows(Protocol):
    """Examples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Changed:
    """Rows of a source, each changed by `changed`; in the source's own order where it has one."""

    def __init__(self, source: Rows) -> None:
        self.source = source
        self.is_ordered = getattr(source, "is_ordered", False)
        self.is_sequential = getattr(source, "is_sequential", False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        return self.varied(index, 0)

    def varied(self, index: int, epoch: int) -> Example:
        """The row as it is shown in an epoch."""
        return self.changed(fetch(self.source, Draw(index, epoch)))

    def changed(self, example: Example) -> Example:
        """What becomes of a row."""
        return example


class Weighted(Changed):
    """Rows whose weight in the loss is multiplied by that of their task.

    Args:
        weights: (task, factor) pairs; a task is "caption", "answer", "question", "detect", "segment", "read" or "raw".

    Raises:
        OptionError: a task that does not exist, or a factor below 0.
    """

    def __init__(self, source: Rows, weights: Sequence[tuple[str, float]]) -> None:
        known = (*KINDS.values(), RAW)
        for task, factor in weights:
            if task not in known:
                raise OptionError(
                    f"task_weights: there is no task {task!r}: expected {', '.join(known)}.{nearest(task, known)}"
                )
            if factor < 0:
                raise OptionError(f"task_weights: {task} has {factor}: expected a number of 0 or more.")
        super().__init__(source)
        self.factors = dict(weights)

    def changed(self, example: Example) -> Example:
        return dataclasses.replace(example, weight=example.weight * self.factors.get(kind_of(example.prefix), 1.0))


class OnSteps(Changed):
    """Rows whose suffixes say places in every n-th location token: 0, n, 2 n, … and the last."""

    def __init__(self, source: Rows, step: int) -> None:
        super().__init__(source)
        self.step = step

    def changed(self, example: Example) -> Example:
        return dataclasses.replace(example, suffix=_BOX.sub(self._moved, example.suffix))

    def _moved(self, found: re.Match[str]) -> str:
        bins = [on_step(int(bin_), self.step) for bin_ in re.findall(r"\d{4}", found[0])]
        for low, high in ((0, 2), (1, 3)):
            if bins[high] <= bins[low]:  # a thing smaller than a step
                bins[high] = on_step(min(bins[low] + self.step, N_LOC - 1), self.step)
                bins[low] = min(bins[low], on_step(max(0, bins[high] - self.step), self.step))
        return "".join(f"<loc{bin_:04d}>" for bin_ in bins)


_BOX = re.compile(r"(?:<loc\d{4}>){4}")


@dataclass(frozen=True)
class Lengths:
    """How long the texts of some rows are, in tokens.

    Attributes:
        n: rows measured.
        longest: text tokens of the longest row, bos to eos; `longest_target` learned of them at most.
        n_images: most pictures of a row.
        n_cut: rows longer than allowed; `n_silenced` of them lose their whole suffix.
    """

    n: int
    longest: int
    longest_target: int
    n_images: int
    n_cut: int
    n_silenced: int

    def told(self, max_text: int | None) -> str | None:
        """A line for people where something is cut; None where nothing is."""
        if not self.n_cut or max_text is None:
            return None
        lost = f", {self.n_silenced} of them lose their whole suffix" if self.n_silenced else ""
        return (
            f"{self.n_cut} of {self.n} rows looked at are longer than max_text={max_text} tokens and are cut{lost}; "
            f"the longest takes {self.longest}. To keep them whole: --set loader.max_text={self.longest}"
        )


def splits(
    data: str | Path,
    valid_share: float,
    *,
    skip_broken: bool = False,
    say: Callable[[str], Any] | None = None,
    **options: Any,
) -> tuple[Rows, Rows, str]:
    """What is learned, what is held out, and where that comes from.

    Without a valid or test split, every n-th picture of the training split is held out with all its rows, whatever
    their order; of a mixture or a stream nothing is.

    Args:
        skip_broken: pass over what is wrong with whole files, such as a tar that is cut; `say` takes it.
        options: those of `open_rows`.

    Raises:
        DataError: no examples there, or something is wrong with a file. OptionError: no train split.
    """
    found = open_rows(data, valid_share=valid_share, **options)
    if "train" not in found:
        raise OptionError(f"{data}: no train split: expected one beside {', '.join(found)}.")
    tell_problems(found, skip_broken=skip_broken, say=say)
    train = found["train"]
    for split in ("valid", "test", "held"):
        if split in found:
            n = f"every {round((len(train) + len(found[split])) / max(1, len(found[split])))}th row of train"
            return train, found[split], n if split == "held" else f"the {split} split"
    return train, Subset(train, ()), "nothing"


def tell_problems(
    found: Mapping[str, Any],
    *,
    skip_broken: bool = False,
    say: Callable[[str], Any] | None = None,
    how: str = "--set loader.skip_broken=true",
) -> None:
    """Refuse what is wrong with whole files, or say it where it is to be passed over.

    Args:
        how: to pass over it, for the message.

    Raises:
        DataError: something is wrong.
    """
    told = [f"{split}: {problem}" for split, source in found.items() for problem in problems_of(source)]
    if told and not skip_broken:
        more = f" ({len(told) - 1} more)" if len(told) > 1 else ""
        raise DataError(f"{told[0]}{more} To go on without: {how}.")
    if say is not None:
        for problem in told:
            say(f"passed over: {problem}")


def mixture_of(rows: Any) -> Mixture | None:
    """The mixture behind some rows; None where they are of a single source."""
    inner = rows
    while not isinstance(inner, Mixture) and hasattr(inner, "source"):
        inner = inner.source
    return inner if isinstance(inner, Mixture) else None


def order_of(rows: Any) -> str | None:
    """What decides the order of a mixture's examples; None for a single source, whose rows and seed say it all."""
    mixture = mixture_of(rows)
    return None if mixture is None else mixture.identity


def measure(
    rows: Rows, processor: Processor, max_text: int | None, *, limit: int = LOOK, skip_broken: bool = False
) -> Lengths:
    """Lengths of at most `limit` rows, evenly chosen. Pictures are opened only for augmentation and clips.

    Raises:
        DataError: every row loses its whole suffix to `max_text`, so that there would be nothing to learn; or a row
            cannot be used, unless `skip_broken`.
    """
    lengths, targets, images, n_silenced = [], [], [], 0
    first: PaliGemmaError | None = None
    n = min(len(rows), limit) if getattr(rows, "is_sequential", False) else len(rows)
    step = max(1, n // limit)
    for index in range(0, n, step):
        try:
            example = rows[index]
            sequence = processor.sequence(len(example.images), example.prefix, example.suffix, where=example.where)
        except PaliGemmaError as error:
            if not skip_broken:
                raise
            first = first or error
            continue
        text = len(sequence) - sequence.n_image_tokens
        first_target = int(sequence.mask_loss.argmax()) - sequence.n_image_tokens
        n_silenced += max_text is not None and first_target >= max_text
        lengths.append(text)
        targets.append(int(sequence.mask_loss.sum()))
        images.append(len(example.images))
    if first is not None and not lengths:
        raise DataError(f"none of the rows looked at can be used; the first: {first}")
    if lengths and n_silenced == len(lengths):
        raise DataError(
            f"max_text={max_text} cuts the whole suffix of all {len(lengths)} rows looked at: expected room for prefix "
            f"and suffix. The longest row takes {max(lengths)} tokens: --set loader.max_text={max(lengths)}."
        )
    n_cut = 0 if max_text is None else sum(length > max_text for length in lengths)
    return Lengths(
        len(lengths), max(lengths, default=0), max(targets, default=0), max(images, default=0), n_cut, n_silenced
    )
