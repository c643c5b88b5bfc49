"""The batches of every step, by the number of the step: any step can be drawn first, and is always the same.

Examples stand in one endless line, epoch after epoch, each epoch a permutation of the source that depends on nothing
but the seed and the epoch's number (`order.py`), or a mixture's own line (`mixture.py`). Step n takes the next
`batch_size` of them, ranks share those out, and each rank cuts its share into parts. So the state of a loader is one
number, seeking costs nothing, and another number of ranks or workers repeats and skips nothing.

    epoch 0: 3 1 4 0 2    epoch 1: 0 2 1 3 4    …        batch_size 3:  [3 1 4] [0 2 | 0] [2 1 3] …
"""

import contextlib
import ctypes
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from paligemma.data.example import Example, naming
from paligemma.data.mixture import fetch
from paligemma.data.order import Draw, Line
from paligemma.data.sources.folder import require_upright
from paligemma.errors import DataError, OptionError, PaliGemmaError, nearest
from paligemma.processing.batch import Batch, Item, collate, pack
from paligemma.processing.processor import Processor
from paligemma.processing.prompt import Sequence as Row
from paligemma.processing.prompt import fit
from paligemma.processing.resize import Picture
from paligemma.tasks.grammar import check_area, parse_entries

Distort = Callable[[Picture, int, np.random.Generator], Picture]  # picture, resolution, random numbers
Arrange = Literal["bucket", "pack"]


class Source(Protocol):
    """Examples by number.

    A source may also have: `varied(index, epoch)`, rows that differ from pass to pass; `is_ordered`, rows that are
    places of a line without end (a mixture); `is_sequential`, rows that can only be had in their order (a stream).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How examples become the batches of a step.

    Attributes:
        batch_size: examples per step, over all ranks and parts.
        part_size: examples of one part at most: what is in memory at once. None: all of a rank's share.
        arrange: "bucket" sorts the examples of a step by length, so that those of a part are padded to much the same;
            "pack" puts several into a row.
        shuffle: a new order every epoch; False keeps that of the source.
        max_text: text tokens of an example, bos to eos; a longer one is cut at its end, as in the reference (which
            counts one less: its inputs leave out the last token). None cuts nothing.
        multiple_of: round row lengths up, so that a compiled model meets few shapes.
        skip_broken: leave out rows that cannot be read and count them, instead of stopping at the first.
        workers: processes that read ahead; 0 reads in this one.
        seed: of the order.
    """

    batch_size: int = 8
    part_size: int | None = None
    arrange: Arrange = "bucket"
    shuffle: bool = True
    max_text: int | None = None
    multiple_of: int = 8
    skip_broken: bool = False
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "multiple_of"):
            if getattr(self, name) < 1:
                raise OptionError(f"loader.{name}={getattr(self, name)}: expected at least 1.")
        for name in ("part_size", "max_text"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise OptionError(f"loader.{name}={value}: expected at least 1, or None.")
        if self.workers < 0:
            raise OptionError(f"loader.workers={self.workers}: expected 0 or more.")
        if self.arrange not in get_args(Arrange):
            hint = nearest(str(self.arrange), get_args(Arrange))
            raise OptionError(f"loader.arrange={self.arrange!r}: expected bucket or pack.{hint}")


@dataclass(frozen=True)
class StepData:
    """What one rank sees of a step.

    Attributes:
        parts: batches whose gradients add up; may be empty where all of the rank's examples were broken.
        n_cut: examples whose text was cut to `max_text`; `n_silenced` of them lost their whole suffix.
        broken: what was wrong with the rows left out.
        names: how messages call the examples, in the order they were drawn.
    """

    parts: tuple[Batch, ...]
    names: tuple[str, ...] = ()
    n_cut: int = 0
    n_silenced: int = 0
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loader:
    """Steps of a source, from `seek` on.

        loader = Loader(source, processor, LoaderOptions(batch_size=32))
        for data in loader.steps(first=120, last=1000): …

    Args:
        rank, world_size: this process and how many share every step.
        distort: what happens to every picture on its way, with random numbers of its place in the line.
    """

    source: Source
    processor: Processor
    options: LoaderOptions
    rank: int = 0
    world_size: int = 1
    distort: Distort | None = None

    def __post_init__(self) -> None:
        if self.options.shuffle and getattr(self.source, "is_sequential", False):
            raise OptionError(
                "loader.shuffle=True for a stream: expected False, its rows can only be had in their order. Shuffle in "
                "the stream itself (shuffle_buffer=…), or read it without streaming."
            )
        if self.options.batch_size < self.world_size:
            raise OptionError(
                f"loader.batch_size={self.options.batch_size}: expected at least one example for each of "
                f"{self.world_size} processes."
            )

    @property
    def n_examples(self) -> int:
        """Examples of an epoch."""
        return len(self.source)

    def steps_per_epoch(self) -> float:
        return self.n_examples / self.options.batch_size

    def draws(self, step: int) -> list[Draw]:
        """What a whole step takes, over all ranks: rows with their pass; of a mixture, places of its line."""
        first = step * self.options.batch_size
        places = range(first, first + self.options.batch_size)
        if getattr(self.source, "is_ordered", False):
            return [Draw(place, 0) for place in places]
        return [self.line.at(place) for place in places]

    @property
    def line(self) -> Line:
        """The order of a source whose rows have none of their own."""
        return Line(self.n_examples, self.options.seed if self.options.shuffle else None)

    def example(self, place: int) -> tuple[Example, Item]:
        """One example of the line by its place, and the row with pixels that becomes of it.

        Raises:
            DataError: a row that cannot be read; the message names it.
        """
        step, within = divmod(place, self.options.batch_size)
        example = fetch(self.source, self.draws(step)[within])
        return example, read_item(
            example, self.processor, self.options.max_text, distort=self.distort, seed=self.options.seed, place=place
        )

    def step(self, number: int) -> StepData:
        """What this rank sees of a step.

        Raises:
            DataError: a row that cannot be read, unless `skip_broken`; the message names the row.
        """
        first = number * self.options.batch_size
        numbered = list(enumerate(self.draws(number), first))
        return self._read(numbered[self.rank :: self.world_size])

    def once(self) -> Iterator[StepData]:
        """The whole source once, in its own order, this rank's share of every batch: for validation."""
        for start in range(0, self.n_examples, self.options.batch_size):
            rows = range(start, min(start + self.options.batch_size, self.n_examples))
            yield self._read([(row, Draw(row, 0)) for row in rows[self.rank :: self.world_size]])

    def _read(self, numbered: Sequence[tuple[int, Draw]]) -> StepData:
        """Texts first, since they say which rows go together; then the pictures of each part, into one block."""
        texts: list[_Text] = []
        broken: list[str] = []
        for place, draw in numbered:
            try:
                texts.append(read_text(fetch(self.source, draw), self.processor, self.options.max_text, place))
            except PaliGemmaError as error:
                if not self.options.skip_broken:
                    raise
                broken.append(str(error))
        parts: list[Batch] = []
        kept: list[_Text] = []
        size = self.options.part_size or max(1, len(texts))
        # The sort is stable: equal lengths keep the order they were drawn in.
        by_length = sorted(texts, key=lambda text: len(text.sequence))
        for start in range(0, len(by_length), size):
            part = by_length[start : start + size]
            pictures = _Pictures(
                self.processor, self.distort, self.options.seed, sum(len(t.example.images) for t in part)
            )
            items: list[Item] = []
            for text in part:
                try:
                    items.append(Item(text.sequence, pixels=pictures(text), weight=text.example.weight))
                    kept.append(text)
                except PaliGemmaError as error:
                    if not self.options.skip_broken:
                        raise
                    broken.append(str(error))
            if items:
                parts.append(arranged(items, self.options, max(len(text.sequence) for text in texts)))
        kept.sort(key=lambda text: text.place)
        return StepData(
            tuple(parts),
            tuple(text.example.where for text in kept),
            sum(text.is_cut for text in kept),
            sum(text.is_silenced for text in kept),
            tuple(broken),
        )

    def steps(self, first: int, last: int) -> Iterator[StepData]:
        """Steps `first` … `last` - 1 in order, read ahead by the workers.

        Raises:
            DataError: as `step`, when its turn has come.
        """
        if not self.options.workers:
            for number in range(first, last):
                yield self.step(number)
            return
        reader = DataLoader(
            _Steps(self), sampler=range(first, last), batch_size=None, num_workers=self.options.workers,
            prefetch_factor=2, worker_init_fn=_one_thread,
        )  # fmt: skip
        for data in reader:
            if isinstance(data, Exception):
                raise data
            yield data


@dataclass(frozen=True)
class _Text:
    """An example whose text is laid out, its pictures still on the disk.

    Attributes:
        place: in the line, which seeds what is random about its pictures.
        is_cut: whether the text was cut; is_silenced: whether that cost the whole suffix.
    """

    example: Example
    sequence: Row
    place: int
    is_cut: bool
    is_silenced: bool


class _Pictures:
    """Pictures of a part as pixels in one block; one that several examples are about is read once, and encoded once.

    Distorted ones are not shared: every example draws its own distortion, whichever rank it falls to.
    """

    def __init__(self, processor: Processor, distort: Distort | None, seed: int, n: int) -> None:
        self.processor, self.distort, self.seed = processor, distort, seed
        side = processor.config.vision.resolution
        # Whole levels travel as bytes; the device makes numbers of them.
        dtype = torch.uint8 if processor.has_whole_levels else torch.float32
        self.block, self.n = torch.empty(n, 3, side, side, dtype=dtype), 0
        self.seen: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, text: _Text) -> Tensor | None:
        """uint8[n, 3, R, R] levels, or float32 pixels, of an example's pictures; None where it has none.

        Raises:
            DataError: one cannot be read; the row's name stands in front.
        """
        images = text.example.images
        if not images:
            return None
        if text.example.size_hw is not None and self.processor.config.processing.exif_orientation:
            require_upright(images[0], text.example.size_hw, text.example.where)
        key: tuple[Any, ...] = (
            tuple(str(image) if isinstance(image, str | os.PathLike) else id(image) for image in images)
            if self.distort is None
            else (text.place,)
        )
        if key not in self.seen:
            pictures: list[Any] = list(images)
            with naming(text.example.where):
                if self.distort is not None:
                    rng = np.random.default_rng([self.seed, text.place])
                    side = self.processor.config.vision.resolution
                    pictures = [self.distort(self.processor.load_image(image), side, rng) for image in images]
                space = self.block[self.n : self.n + len(images)]
                self.seen[key] = self.processor.pixels(pictures, out=space)
            self.n += len(images)
        return self.seen[key]


def read_text(example: Example, processor: Processor, max_text: int | None, place: int = 0) -> _Text:
    """An example's row, cut to `max_text` tokens; its pictures are not looked at.

    Raises:
        DataError: text that cannot be used, with the row's name in front.
    """
    if "<loc" in example.suffix:
        _, flat = check_area(example.suffix, parse_entries(example.suffix)[0])
        if flat:
            raise DataError(f"{example.where}: {flat[0]}. Mend the row.", kind="turned-over box")
    with naming(example.where):
        sequence = processor.sequence(len(example.images), example.prefix, example.suffix, where=example.where)
        if example.unlearned:
            sequence = _silence(sequence, example, processor)
    if max_text is None or len(sequence) - sequence.n_image_tokens <= max_text:
        return _Text(example, sequence, place, False, False)
    sequence = fit(sequence, sequence.n_image_tokens + max_text)
    return _Text(example, sequence, place, True, not sequence.mask_loss.any())


def read_item(
    example: Example, processor: Processor, max_text: int | None, *, distort: Distort | None = None, seed: int = 0,
    place: int = 0,
) -> Item:  # fmt: skip
    """An example as a row with its pixels.

    Args:
        distort: as `Loader` takes it; seed, place: what its random numbers come from.

    Raises:
        DataError: a picture or text that cannot be used, with the row's name in front.
    """
    text = read_text(example, processor, max_text, place)
    pixels = _Pictures(processor, distort, seed, len(example.images))(text)
    return Item(text.sequence, pixels=pixels, weight=example.weight)


def _silence(sequence: Row, example: Example, processor: Processor) -> Row:
    """The row without loss on the tokens of `example.unlearned`.

    The suffix is tokenised stretch by stretch, which gives the same tokens where stretches begin and end at location
    tokens; anything else is refused.
    """
    ids: list[int] = []
    learned: list[bool] = []
    end = 0
    for first, last in [*example.unlearned, (len(example.suffix), len(example.suffix))]:
        for text, counts in ((example.suffix[end:first], True), (example.suffix[first:last], False)):
            found = processor.tokenizer.encode(text) if text else []
            ids += found
            learned += [counts] * len(found)
        end = last
    start = int(sequence.mask_loss.argmax())
    if ids != sequence.tokens[start : start + len(ids)].tolist():
        raise DataError(
            f"{example.where}: unlearned={example.unlearned} cuts through tokens of {example.suffix[:60]!r}: expected "
            "stretches that begin and end at location tokens."
        )
    mask_loss = sequence.mask_loss.copy()
    mask_loss[start : start + len(ids)] &= np.array(learned, bool)
    return dataclasses.replace(sequence, mask_loss=mask_loss)


def arranged(items: Sequence[Item], options: LoaderOptions, longest: int) -> Batch:
    """Items of a part, alike in length, as rows; packed ones are no longer than the longest example of the step."""
    if options.arrange == "bucket":
        return collate(items, multiple_of=options.multiple_of)
    return pack(items[::-1], longest, multiple_of=options.multiple_of)  # longest first fills rows best


GRACE_S = 60.0  # a reader that nobody ends after SIGTERM ends itself


class _Steps(Dataset[Any]):
    """Steps by number for worker processes; an error travels as a value, so that its message arrives unchanged."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, number: int) -> StepData | Exception:
        try:
            return self.loader.step(number)
        except PaliGemmaError as error:
            return error


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: pixels of a batch would go back to the system, to be cleared again page by page.

    A reader then holds about two batches. Does nothing on other systems.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in ((-3, 1 << 30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
            libc.mallopt(option, value)


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    # SIGTERM to a whole process group asks the trainer to save: readers must not die before it has.
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(GRACE_S, os._exit, (0,)).start())
