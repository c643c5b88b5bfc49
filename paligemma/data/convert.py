"""Any data set to any other format.

    convert("animals-coco/", "animals-yolo/", to="yolo")
    convert("animals-coco/", "rows/", to="jsonl", build=BUILDERS["detect"])
    convert("rows/", "back/", to="coco")                       prompts are read by the builders that write them

Formats of records (coco, yolo, voc) hold annotations, formats of examples (jsonl) prompts and answers. What a format
cannot carry is counted, never dropped in silence. A format is one line in `WRITERS`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from paligemma.data.builders import Builder, Built, read_example
from paligemma.data.example import Example
from paligemma.data.mixing import Chain
from paligemma.data.mixture import Mixture, Once
from paligemma.data.record import Record
from paligemma.data.sources.coco_write import write_coco
from paligemma.data.sources.columns import require_text, texts_of
from paligemma.data.sources.folder import SEVERAL, picture_size
from paligemma.data.sources.identity import content_of
from paligemma.data.sources.jsonl_write import write_jsonl
from paligemma.data.sources.open import READERS, open_data, sniff
from paligemma.data.sources.packed import write_parquet_split, write_saved_split, write_tar_split
from paligemma.data.sources.tars import packable
from paligemma.data.sources.voc_write import write_voc
from paligemma.data.sources.yolo_write import write_yolo
from paligemma.data.subset import problems_of, unread_of
from paligemma.data.unfold import Build, Unfolded, joined, lost, numbered
from paligemma.errors import DataError, ImageError, OptionError, nearest

__all__ = [
    "READERS", "WRITERS", "Converted", "Split", "Writer", "all_labels", "convert", "holds_records", "read_records",
    "sniff", "write_jsonl", "write_split",
]  # fmt: skip

Read = Callable[[Example, tuple[int, int]], Record | None]


@dataclass(frozen=True)
class Writer:
    """How a format is written.

    Attributes:
        holds: "records" or "examples".
        takes: whether a row can be written at all, where that can only be known by reading its pictures; raises
            DataError.
        write: (rows, folder, *, split, overwrite, left_out) -> path; of records with labels too.
    """

    holds: Literal["records", "examples"]
    write: Callable[..., Path]
    takes: Callable[[Any], Any] | None = None


WRITERS: dict[str, Writer] = {
    "jsonl": Writer("examples", write_jsonl),
    "parquet": Writer("examples", write_parquet_split),
    "wds": Writer("examples", write_tar_split, packable),
    "hf": Writer("examples", write_saved_split),
    "coco": Writer("records", write_coco),
    "coco_official": Writer("records", partial(write_coco, layout="official")),
    "yolo": Writer("records", write_yolo),
    "voc": Writer("records", write_voc),
}


@dataclass(frozen=True)
class Split:
    """What came of one split; the fields are those of `Converted`."""

    file: Path
    n_rows: int
    left_out: dict[str, int]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Converted:
    """What came of a conversion.

    Attributes:
        files: the file that was written for each split.
        n_rows: rows written, by split.
        left_out: what the new format cannot carry, with counts.
        problems: rows that could not be used and what else was wrong, a sentence each.
    """

    files: dict[str, Path]
    n_rows: dict[str, int]
    left_out: dict[str, int]
    problems: tuple[str, ...]


def convert(
    data: str | Path,
    out: str | Path,
    *,
    to: str,
    format: str = "auto",
    build: Builder | Build | None = None,
    read: Read | None = None,
    overwrite: bool = False,
    skip_broken: bool = False,
    seed: int = 0,
    **options: Any,
) -> Converted:
    """Write every split of a data set in another format.

    Args:
        to: one of `WRITERS`.
        format: of the data; "auto" looks at it.
        build: makes the prompt and answer of a record, for formats of examples: a builder, or a function of record,
            random numbers and labels; None of a record means that it does not apply, which is counted. Captions,
            regions and questions of a record become a row each, and so does what each of several builders says.
        read: what an example says about its picture of that height and width; None of a prompt that says nothing.
            Default: as the builders read it, masks left out. Rows of one picture become one record.
        overwrite: replace splits that are there already.
        skip_broken: go on after a row that cannot be read, and report it.
        seed: of what is random in `build`.
        options: of the reader, as in `open_data`.

    Raises:
        OptionError: unknown formats, no builder where one is needed, a split that is there already.
        DataError: a row that cannot be read.
    """
    writer = _writer(to)
    refuse_itself(data, out)
    sources = open_data(data, format=format, **options)
    labels = all_labels(sources, read) if writer.holds == "records" or build is not None else ()
    done = {
        split: write_split(
            source, out, to=to, split=split, labels=labels, build=build, read=read, overwrite=overwrite,
            skip_broken=skip_broken, seed=seed + number,
        )
        for number, (split, source) in enumerate(sources.items())
    }  # fmt: skip
    left_out: Counter[str] = Counter()
    for one in done.values():
        left_out.update(one.left_out)
    problems = tuple(f"{split}: {problem}" for split, one in done.items() for problem in one.problems)
    files = {split: one.file for split, one in done.items()}
    return Converted(files, {split: one.n_rows for split, one in done.items()}, dict(left_out), problems)


def write_split(
    source: Any,
    out: str | Path,
    *,
    to: str,
    split: str = "train",
    labels: Sequence[str] | None = None,
    build: Builder | Build | None = None,
    read: Read | None = None,
    overwrite: bool = False,
    skip_broken: bool = False,
    seed: int = 0,
) -> Split:
    """Write one source as a split of a data set; options as those of `convert`.

    Args:
        source: of records or of examples.
        labels: class names in the order of their ids, the same for all splits; None: the source's own.

    Raises:
        OptionError, DataError: as `convert`.
    """
    source = source.once() if isinstance(source, Mixture) else source
    writer, is_records = _writer(to), holds_records(source)
    report = _Report(skip_broken)
    whole = source.mixture if isinstance(source, Once) else source
    report.problems += problems_of(whole)
    report.left_out.update(unread_of(whole))
    labels = (source.labels if is_records else ()) if labels is None else labels
    rows: Iterable[Any] = report.rows(source, seed) if is_records or writer.holds == "examples" else ()
    options: dict[str, Any] = {"split": split, "overwrite": overwrite, "left_out": report.left_out}
    if writer.holds == "records":
        rows = rows if is_records else read_records(source, read, report)
        options["labels"] = labels
    elif is_records:
        if build is None:
            raise OptionError(
                f"annotations and a format of prompts, {to}: expected a builder. Say build=BUILDERS['detect'] "
                "(--task detect)."
            )
        unfolded = Unfolded(build, labels, seed)
        rows = (row for record in rows for row in report.unfolded(unfolded, record))
    file = writer.write(report.counted(rows, writer.takes if skip_broken else None), out, **options)
    n_rows = report.n_rows - report.left_out[SEVERAL]
    return Split(file, n_rows, dict(+report.left_out), tuple(report.problems))


def holds_records(source: Any) -> bool:
    """Whether a source holds annotations, of which a builder makes prompts."""
    return hasattr(source, "labels") and not isinstance(source, Built)


def at(source: Any, index: int) -> tuple[Any, int]:
    """The source behind a row, where several stand one after another, and the row's number there."""
    found: tuple[Any, int] = source.at(index) if isinstance(source, Once | Chain) else (source, index)
    return found


def refuse_itself(data: str | Path, out: str | Path) -> None:
    """Whether a data set would be written over itself while it is read.

    Raises:
        OptionError: it would.
    """
    if Path(data).exists() and Path(out).exists() and Path(data).samefile(out):
        raise OptionError(f"{out} is the data itself: expected another folder. Name a new one.")


def _writer(to: str) -> Writer:
    if to not in WRITERS:
        raise OptionError(f"to={to!r}: expected one of {', '.join(WRITERS)}.{nearest(str(to), WRITERS)}")
    return WRITERS[to]


def all_labels(sources: Mapping[str, Any], read: Read | None = None) -> tuple[str, ...]:
    """Labels of all splits, so that a class has the same number in each; sources of examples are read for them."""
    found: dict[str, None] = {}
    for source in sources.values():
        rows: Any = source.once() if isinstance(source, Mixture) else source
        labels = rows.labels if holds_records(rows) else _labels_of(rows, read or read_example)
        found |= dict.fromkeys(labels)
    return tuple(found)


class _Report:
    """What is counted on the way."""

    def __init__(self, skip_broken: bool) -> None:
        self.skip_broken = skip_broken
        self.left_out: Counter[str] = Counter()
        self.n_rows = 0
        self.problems: list[str] = []

    def rows(self, source: Any, seed: int) -> Iterator[Any]:
        """The rows of a source; of one behind a builder, all that the builder can ask about them."""
        for index in range(len(source)):
            inner, number = at(source, index)
            if isinstance(inner, Built):
                record = self.tried(partial(inner.records.__getitem__, number))
                if record is not None:
                    yield from self.unfolded(Unfolded(inner.builder, inner.labels, seed), record)
            elif (row := self.tried(partial(inner.__getitem__, number))) is not None:
                yield row

    def unfolded(self, unfolded: Unfolded, record: Record) -> Iterator[Example]:
        """All prompts of a record, and a count of what they do not say."""
        n_before = len(self.problems)
        made = [pair for pair in (self.tried(one) for one in unfolded.tries(record)) if pair is not None]
        yield from numbered([example for example, _ in made])
        if len(self.problems) == n_before:
            self.left_out["records without what the prompt needs"] += not made
            self.left_out.update(lost(record, made) if made else ())

    def tried(self, read: Callable[[], Any]) -> Any:
        """What `read` gives; None where it fails and that is allowed."""
        try:
            return read()
        except (DataError, ImageError) as error:
            if not self.skip_broken:
                raise
            self.problems.append(str(error))
            return None

    def counted(self, rows: Iterable[Any], takes: Callable[[Any], Any] | None = None) -> Iterator[Any]:
        for row in rows:
            if self.tried(partial(_writable, row)) and (takes is None or self.tried(partial(takes, row))):
                self.n_rows += 1
                yield row


def _writable(row: Record | Example) -> bool:
    """Whether writers can carry what a row says.

    Raises:
        DataError: half of a character, as files hold that were cut or read in a wrong encoding; or a mask that is none.
    """
    if isinstance(row, Record):
        for item in row.instances:
            if item.mask is not None:
                try:
                    item.mask.require_sound()
                except DataError as error:
                    raise DataError(f"{row.where}: {item.label}: {error}", kind="bad mask") from None
    for text in texts_of(row):
        require_text(text, row.where)
    return True


def read_records(source: Any, read: Read | None = None, report: _Report | None = None) -> Iterator[Record]:
    """Records of a source of examples: rows of the same picture become one, in the order of the first.

    Only numbers of rows are kept in memory. A row that says nothing about its picture, such as a bare question, is
    named among the problems.
    """
    report = report or _Report(False)
    read = read or read_example
    groups: dict[Any, list[int]] = {}
    for index in range(len(source)):
        inner, number = at(source, index)
        if isinstance(inner, Built):  # the record is there: nothing goes through prompts
            record = report.tried(partial(inner.records.__getitem__, number))
            if record is not None:
                yield record
            continue
        example = report.tried(partial(inner.__getitem__, number))
        if example is not None:
            groups.setdefault(tuple(content_of(image) for image in example.images) or ("row", index), []).append(index)
    for indices in groups.values():
        found: Record | None = None
        size: tuple[int, int] | None = None
        for index in indices:
            example = source[index]
            if not example.images:
                report.left_out["rows without a picture"] += 1
                continue
            size = size or report.tried(partial(picture_size, example.images[0], example.where))
            if size is None:
                break
            record = _read(example, size, read, report)
            report.left_out["weights"] += example.weight != 1
            if record is not None:
                if found is not None:
                    report.left_out.update(_overruled(found, record))
                found = record if found is None else joined(found, record)
        if found is None and size is not None:  # the picture stays, as one that nothing is known about
            found = Record(source[indices[0]].images, size, where=source.where(indices[0]))
        if found is not None:
            yield found


def _overruled(first: Record, other: Record) -> Counter[str]:
    """What a further row of a picture says otherwise than the first: one record has one id and one of each field."""
    found = Counter({"ids of further rows of a picture": int(bool(other.id) and other.id != first.id)})
    found.update(f"meta '{key}'" for key, value in other.meta.items() if first.meta.get(key, value) != value)
    return +found


def _read(example: Example, size_hw: tuple[int, int], read: Read, report: _Report) -> Record | None:
    try:
        record = read(example, size_hw)
    except DataError as error:
        report.problems.append(str(error))  # an answer that is no annotation: reported, the rest goes on
        return None
    if record is None:
        report.problems.append(
            f"{example.where}: the prompt {example.prefix[:60]!r} says nothing about the picture: expected one that a "
            "builder writes. Hand in read=…"
        )
        return None
    if "<seg" in example.suffix:
        report.left_out["masks"] += sum(item.mask is None for item in record.instances)
    return record


def _labels_of(source: Any, read: Read) -> list[str]:
    """All labels of a source of examples, in the order they are met; rows that cannot be read add none."""
    found: dict[str, None] = {}
    for index in range(len(source)):
        inner, number = at(source, index)
        if isinstance(inner, Built):
            found |= dict.fromkeys(inner.labels)
            continue
        try:
            record = read(inner[number], (1024, 1024))  # labels do not depend on the size
        except (DataError, ImageError):
            continue
        found |= dict.fromkeys(item.label for item in record.instances) if record is not None else {}
    return list(found)
