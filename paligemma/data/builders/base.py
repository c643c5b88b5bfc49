"""What every builder is: a record becomes a prompt and its answer, and comes back from them."""

import hashlib
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from paligemma.data.example import Example
from paligemma.data.record import Instance, Record, require_box
from paligemma.errors import DataError, OptionError, TaskError, nearest
from paligemma.results import BoxXyxyPx
from paligemma.tasks.base import MaskDecoder, SizeHw

SAID = ("question_lang", "text_lang", "text_style")  # in meta, of what stands in the prompt: never another row's
RECORD_ID = "record_id"  # in meta, where a record has several rows: their ids are 17-0, 17-1, …
Choice = Literal["cycle", "random", "first"]
Order = Literal["random", "raster", "source", "area"]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """How often a record was seen, for what is cycled over epochs.

    Attributes:
        seed: of the run.
        epoch: from 0.
    """

    seed: int = 0
    epoch: int = 0


class Builder(Protocol):
    """A prompt of the pre-training grammar, both ways."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> str:
        """What a record must hold, as messages say it."""
        ...

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example of a record; None where the record holds nothing for it.

        Args:
            rng: of every random choice.
            labels: all class names of the data set, in the order of its ids.
            turn: what `choice="cycle"` walks by; without one it draws from `rng`.

        Raises:
            DataError: something that a prompt or a suffix cannot carry; it names the record.
        """
        ...

    def reads(self, prefix: str) -> bool:
        """Whether a prompt is one of this builder's."""
        ...

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """What prompt and answer say: boxes within half a bin of 1023, all else as it was.

        Args:
            size_hw: height and width of the picture in pixels.
            mask_decoder: int[n, 16] -> float32[n, 64, 64]; without one, objects come back without masks.

        Raises:
            DataError: a prompt of another kind, or an answer that does not follow the grammar.
        """
        ...


def choice_no_replacement(n: int, *, seed: int, key: str, epoch: int) -> int:
    """Which of n items a record shows in an epoch: all of them in random order before any is shown again.

    Every walk through the items has an order of its own. No state is kept: the epoch says it all, so a run that goes on
    after a stop chooses the same. big_vision's op of this name counts visits instead (`pp/ops_general.py`).

    Args:
        n: how many items.
        seed: of the run.
        key: of the record.
        epoch: from 0.

    Raises:
        OptionError: no item, or a negative epoch or seed.
    """
    if n < 1 or epoch < 0 or seed < 0:
        raise OptionError(f"n={n}, seed={seed}, epoch={epoch}: expected one item or more, seed and epoch of 0 or more.")
    walk, place = divmod(epoch, n)
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    rng = np.random.default_rng([seed, walk, int.from_bytes(digest, "little")])
    return int(rng.permutation(n)[place])


def pick(n: int, choice: Choice, rng: np.random.Generator, turn: Turn | None, key: str) -> int:
    """One of n items as `choice` says."""
    if choice == "first":
        return 0
    if choice == "cycle" and turn is not None:
        return choice_no_replacement(n, seed=turn.seed, key=key, epoch=turn.epoch)
    return int(rng.integers(n))


def key_of(record: Record, name: str) -> str:
    """What cycling goes by: the record, and which builder asks."""
    return f"{name} {record.id or record.where}"


def raster_order(boxes_xyxy: Sequence[Sequence[float]]) -> list[int]:
    """Indices of boxes line by line from the top, in a line from the left.

    A box belongs to a line when its middle lies within the height of the line's first, which is the one whose middle is
    highest, and the first's middle within the box's: a tall sign is no line of all that stands beside it. The picture
    world reads its texts by the same rule.
    """
    lines: list[list[int]] = []
    for i in sorted(range(len(boxes_xyxy)), key=lambda i: (boxes_xyxy[i][1] + boxes_xyxy[i][3], boxes_xyxy[i][0])):
        first = boxes_xyxy[lines[-1][0]] if lines else boxes_xyxy[i]
        middle, middle_of_first = (boxes_xyxy[i][1] + boxes_xyxy[i][3]) / 2, (first[1] + first[3]) / 2
        if lines and middle < first[3] and middle_of_first >= boxes_xyxy[i][1]:
            lines[-1].append(i)
        else:
            lines.append([i])
    return [i for line in lines for i in sorted(line, key=lambda i: boxes_xyxy[i][0])]


def arranged(boxes_xyxy: Sequence[BoxXyxyPx], order: Order, rng: np.random.Generator) -> list[int]:
    """Indices of boxes in an order; "area" is the largest first."""
    if order == "random":
        return [int(i) for i in rng.permutation(len(boxes_xyxy))]
    if order == "raster":
        return raster_order(boxes_xyxy)
    if order == "area":
        return sorted(range(len(boxes_xyxy)), key=lambda i: -_area(boxes_xyxy[i]))
    return list(range(len(boxes_xyxy)))


def _area(box: BoxXyxyPx) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def unique(items: Sequence[str]) -> list[str]:
    """Without repeats, in the order of the first."""
    return list(dict.fromkeys(items))


def absent_labels(record: Record, labels: Sequence[str]) -> list[str]:
    """Class names of the data set that nothing in the record goes by, crowds and what a crop cut off included.

    Raises:
        DataError: the data set has no class names.
    """
    if not labels:
        raise DataError(
            f"{record.where}: what is not there is drawn from the class names of the data set: expected some, found "
            "none. Hand in labels, or ask only for what is there."
        )
    present = {instance.label for instance in record.instances} | set(record.hidden)
    return [label for label in unique(labels) if label not in present]


def known_size(record: Record) -> SizeHw:
    """Height and width of the record's picture.

    Raises:
        DataError: not known.
    """
    if record.size_hw is None:
        raise DataError(
            f"{record.where}: the picture's size is not known: boxes are in pixels, so size_hw is needed. Set it."
        )
    return record.size_hw


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Errors of tasks and masks, with the name of the record in front."""
    try:
        yield
    except (TaskError, DataError) as error:
        message, kind = str(error), getattr(error, "kind", "unreadable row")
        raise DataError(message if message.startswith(f"{where}: ") else f"{where}: {message}", kind=kind) from None


def check_choice(field: str, value: str, allowed: Any) -> None:
    """A field whose type is a Literal holds one of its values.

    Raises:
        OptionError: another one.
    """
    known = get_args(allowed)
    if value not in known:
        raise OptionError(f"{field}={value!r}: expected one of {', '.join(known)}.{nearest(str(value), known)}")


def check_count(field: str, value: int | None, least: int = 0) -> None:
    """A number of things, or None.

    Raises:
        OptionError: too few, or no whole number.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise OptionError(f"{field}={value!r}: expected a whole number of {least} or more.")


def example_of(
    record: Record, prefix: str, suffix: str, unlearned: tuple[tuple[int, int], ...] = (), **meta: Any
) -> Example:
    """The example; its meta is the record's, its id and what the prompt does not say."""
    own = {key: value for key, value in record.meta.items() if key not in SAID}
    named = {"id": record.id} if record.id else {}
    return Example(
        record.images,
        prefix,
        suffix,
        where=record.where,
        meta={**own, **named, **meta},
        unlearned=unlearned,
        size_hw=record.size_hw if "<loc" in prefix + suffix else None,  # of other texts it does not matter
    )


def lowered(text: str) -> str:
    """In small letters as the reference writes them: A to Z alone, so that É stays É."""
    return text.translate(_SMALL)


_SMALL = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def answered_example(
    record: Record, prefix: str, suffix: str, references: list[str], *, lower: bool, **meta: Any
) -> Example:
    """The example; where several texts would be right, its meta holds them all, for scores: "references"."""
    if lower:
        suffix, references = lowered(suffix), [lowered(text) for text in references]
    if len(references) > 1:
        meta["references"] = references
    return example_of(record, prefix, suffix, **meta)


def record_of(example: Example, size_hw: SizeHw, *, meta: dict[str, Any] | None = None, **fields: Any) -> Record:
    """The record that an example came from, as far as it says."""
    known = {**example.meta, **(meta or {})}
    id = str(known.get("id", ""))
    if RECORD_ID in known and id.startswith(f"{known[RECORD_ID]}-"):
        id = str(known[RECORD_ID])
    # What `example_of` and conversions add is no part of the record's own.
    kept = {key: value for key, value in known.items() if key not in ("id", RECORD_ID, "references", *SAID)}
    return Record(example.images, size_hw, id=id, where=example.where, meta=kept, **fields)


def check_reads(builder: Builder, example: Example) -> None:
    """The prompt is one of the builder's.

    Raises:
        DataError: it is not.
    """
    if not builder.reads(example.prefix):
        raise DataError(
            f"{example.where}: the prompt {example.prefix[:80]!r} is none of '{builder.name}': expected one that this "
            "builder writes. Read it with read_example, which looks for the builder."
        )


@dataclass(frozen=True)
class OneOf:
    """One of several prompts, drawn anew each time among those that the record can answer.

    Attributes:
        builders: to draw from.
        weights: how often each is drawn where all apply; None: equally often.
    """

    builders: tuple[Builder, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "builders", tuple(self.builders))
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        weights = self.weights if self.weights is not None else (1.0,) * len(self.builders)
        if not self.builders or len(weights) != len(self.builders) or not all(0 < w < float("inf") for w in weights):
            raise OptionError(
                f"{len(self.builders)} builders with weights {weights}: expected one positive weight for each of one "
                "builder or more."
            )

    @property
    def name(self) -> str:
        return " | ".join(builder.name for builder in self.builders)

    @property
    def needs(self) -> str:
        return " or ".join(unique([builder.needs for builder in self.builders]))

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example of the builder drawn; one that does not apply is left out and the draw repeated."""
        left = list(range(len(self.builders)))
        weights = np.asarray(self.weights if self.weights is not None else [1.0] * len(left))
        while left:
            shares = weights[left] / weights[left].sum()
            drawn = left.pop(int(rng.choice(len(left), p=shares)))
            example = self.builders[drawn].build(record, rng, labels, turn=turn)
            if example is not None:
                return example
        return None

    def reads(self, prefix: str) -> bool:
        return any(builder.reads(prefix) for builder in self.builders)

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """As the first builder reads it that knows the prompt."""
        check_reads(self, example)
        builder = next(builder for builder in self.builders if builder.reads(example.prefix))
        return builder.read(example, size_hw, mask_decoder=mask_decoder)


class Records(Protocol):
    """A source of records; `labels` may be there as well."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    def where(self, index: int) -> str: ...


class Built:
    """A source of examples: the records of another source, through a builder.

    Every choice is drawn from (seed, epoch, index) alone, so an example is the same in any worker, at any time.

    Args:
        records: a source of records.
        builder: what is made of them.
        seed: of all choices.
        augment: (record, rng) -> record, applied before building.
        skip_empty: a record that the builder does not apply to is replaced by the next that it applies to; otherwise
            it is an error.
        labels: class names of the whole data set; None: those of the source, which may be one split of several.
    """

    def __init__(
        self,
        records: Records,
        builder: Builder,
        *,
        seed: int = 0,
        augment: Callable[[Record, np.random.Generator], Record] | None = None,
        skip_empty: bool = False,
        labels: tuple[str, ...] | None = None,
    ) -> None:
        check_count("seed", seed)
        self.records, self.builder, self.seed = records, builder, seed
        self.augment, self.skip_empty = augment, skip_empty
        self._labels = labels

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names of the data set; () where it has none."""
        return tuple(getattr(self.records, "labels", ())) if self._labels is None else self._labels

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        return self.varied(index, 0)

    def where(self, index: int) -> str:
        """How messages call a row."""
        return self.records.where(index)

    def applies(self, index: int) -> bool:
        """Whether the builder makes anything of a record, as it stands.

        Raises:
            DataError: it cannot be read.
        """
        rng = np.random.default_rng([self.seed, 0, index])
        record = sound(self.records[index])
        return self.builder.build(record, rng, self.labels, turn=Turn(seed=self.seed)) is not None

    def varied(self, index: int, epoch: int) -> Example:
        """The example of a row in an epoch.

        Raises:
            DataError: a record that cannot be read, or one (with skip_empty: every one) that the builder does not
                apply to.
        """
        n = len(self.records)
        index = range(n)[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        turn = Turn(seed=self.seed, epoch=epoch)
        for step in range(n if self.skip_empty else 1):
            record = sound(self.records[(index + step) % n])
            if self.augment is not None:
                record = self.augment(record, rng)
            example = self.builder.build(record, rng, self.labels, turn=turn)
            if example is not None:
                return example
        if self.skip_empty:
            raise DataError(
                f"none of the {n:,} records has anything for '{self.builder.name}': expected {self.builder.needs}. "
                "Choose another builder."
            )
        raise DataError(
            f"{self.records.where(index)} has nothing for '{self.builder.name}': expected {self.builder.needs}. Leave "
            "it out, or go on to the next one with skip_empty=True."
        )


def sound(record: Record) -> Record:
    """The record, whose boxes and masks are those of its picture, whether a builder looks at them or not.

    Raises:
        DataError: a box that is turned over or outside of the picture, or a mask of another one; with the row's name.
    """
    for what, box in record.boxes:
        try:
            require_box(box, record.size_hw, "")
        except DataError as error:
            told = f"{record.where}: {what[:60]!r}{error} Or go on without such rows: loader.skip_broken=true."
            raise DataError(told, kind=error.kind) from None
    for instance in record.instances:
        if instance.mask is not None:
            with naming(record.where):
                instance.mask.require_sound()
    return record


def without_crowds(record: Record) -> list[Instance]:
    """The record's single things."""
    return [instance for instance in record.instances if not instance.is_crowd]
