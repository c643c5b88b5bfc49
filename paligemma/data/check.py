"""What is wrong with a data set, found before a training run finds it: every row read, every picture decoded.

    findings = check({"train": source, "valid": other})       findings.counts, findings.n_errors

Errors stop a training run or teach it something wrong; warnings are worth a look. Kinds and what they mean:
`findings.KINDS`; what people read: `findings.table_lines`.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from paligemma.data.builders import Built
from paligemma.data.duplicates import Twins, near_twins
from paligemma.data.example import Example
from paligemma.data.findings import KINDS, Finding, Findings
from paligemma.data.labels import likely_typos
from paligemma.data.mixing import Chain
from paligemma.data.mixture import Mixture
from paligemma.data.record import Record, require_box, same_shape
from paligemma.data.sources.columns import require_text, said_by
from paligemma.data.sources.folder import turned_by
from paligemma.data.subset import problems_of
from paligemma.data.unfold import Unfolded
from paligemma.errors import DataError, OptionError, PaliGemmaError
from paligemma.processing.image import load_image
from paligemma.processing.picture_file import is_turned
from paligemma.results import BoxXyxyPx
from paligemma.tasks.grammar import check_area, parse_entries, stray_tokens

Length = Callable[[Example], int]  # text tokens of an example, bos to eos

_MAY_BE_EMPTY = ("detect", "segment", "ocr")  # prompts that nothing is an answer to


def check(
    splits: Mapping[str, Any],
    *,
    length: Length | None = None,
    max_text: int | None = None,
    decode: bool = True,
    progress: Callable[[int], Any] | None = None,
    failed: Mapping[str, DataError] | None = None,
) -> Findings:
    """Read every row of every split.

    Args:
        splits: split -> source of examples or records.
        length: text tokens of an example; None measures no text.
        max_text: most of them.
        decode: decode every picture; False only looks whether its file is there, and compares no pictures.
        progress: called after every row with 1.
        failed: splits that could not be opened, and why.
    """
    findings = Findings()
    for split, error in (failed or {}).items():
        findings.n_rows[split] = findings.n_pictures[split] = 0
        kind = _kind_of(error)
        findings.found.append(Finding("file" if kind == "unreadable row" else kind, split, str(error)))
    twins = Twins()
    for split, source in _apart(splits):
        look = _Look(findings, split, length, max_text, twins if decode else None)
        for problem in problems_of(source):
            look.of_file.add(problem)
            look.note(_kind_of_file(problem), problem)
        for index in range(len(source)):
            look.row(source, index)
            if progress is not None:
                progress(1)
        findings.n_rows[split] = len(source)
        findings.n_pictures[split] = look.n_pictures
    _compare_pictures(findings, twins)
    _compare_labels(findings)
    return findings


def _apart(splits: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Splits with the sources of a mixture one by one: every row of theirs once, whatever their weights."""
    for split, source in splits.items():
        if isinstance(source, Chain):
            yield from _apart({f"{split}: source {i}": inner for i, inner in enumerate(source.sources, 1)})
        elif isinstance(source, Mixture):
            yield from _apart({f"{split}: {name}": part.source for name, part in source.parts.items()})
        else:
            yield split, source


class _Look:
    """The rows of one split, one after another."""

    def __init__(
        self, findings: Findings, split: str, length: Length | None, max_text: int | None, twins: Twins | None
    ) -> None:
        self.findings, self.split, self.length, self.max_text, self.twins = findings, split, length, max_text, twins
        self.labels = findings.labels.setdefault(split, Counter())
        self.tasks = findings.tasks.setdefault(split, Counter())
        self.of_file: set[str] = set()  # what was told of the whole file, and is not told again of a row
        self.ids: dict[str, str] = {}
        self.sizes: dict[str, tuple[int, int] | None] = {}  # pictures seen, by file: decoded once
        self.n_pictures = 0

    def note(self, kind: str, message: str) -> None:
        self.findings.found.append(Finding(kind, self.split, message))

    def row(self, source: Any, index: int) -> None:
        built = source if isinstance(source, Built) else None
        n_before = len(self.findings.found)
        try:
            # The record itself, not what stands in for one that has nothing to ask.
            row = source[index] if built is None else built.records[index]
        except PaliGemmaError as error:
            if str(error) not in self.of_file:
                self.note(_kind_of(error), str(error))
            return
        size = self._pictures(row)
        said = row.id if isinstance(row, Record) else row.meta.get("id")
        if said is not None and (identity := str(said)):
            told = f"{row.where}: id {identity} is also that of {self.ids.get(identity)}"
            if identity in self.ids and told not in self.of_file:
                self.note("duplicate id", told)
            self.ids.setdefault(identity, row.where)
        if isinstance(row, Record):
            if row.size_hw is not None and size is not None:
                (h, w), (height, width) = row.size_hw, size
                if not same_shape((h, w), (height, width)):
                    turned = turned_by(row.images[0])
                    told = f"{row.where}: annotated as {w}×{h}, the picture is {width}×{height}{turned}"
                    self.note("another shape", told)
                elif self._is_turned(row):
                    self.note("turned by EXIF", f"{row.where}: the picture is turned when it is opened")
            self._record(row, row.size_hw or size)
        else:
            self._example(row)
        if built is not None:
            self._built(built, index, is_told=any(one.is_error for one in self.findings.found[n_before:]))

    def _built(self, source: Built, index: int, *, is_told: bool) -> None:
        """All prompts and answers that the builders make of a record: each of its texts, regions and questions.

        Args:
            is_told: of the record itself something was told, which is why none can be made.
        """
        told: set[str] = set()
        for make in Unfolded(source.builder, source.labels, source.seed).tries(source.records[index]):
            try:
                made = make()
            except OptionError:
                raise  # it would be so of every row
            except PaliGemmaError as error:
                if not is_told and str(error) not in told:  # of each text the same, for what is wrong with a box
                    told.add(str(error))
                    self.note(_kind_of(error), str(error))
                continue
            if made is not None:
                self._example(made[0], is_built=True)

    def _pictures(self, row: Record | Example) -> tuple[int, int] | None:
        """Height and width of the first picture, None where it cannot be read."""
        sizes: list[tuple[int, int] | None] = []
        if _is_clip(row):  # told by all of its frames: many clips begin with the same black one
            frames = [image for image in row.images if image.shape == row.images[0].shape]
            self.n_pictures += len(row.images)
            if self.twins is not None:
                self.twins.add(self.split, row.where, np.concatenate(frames))
            height, width = row.images[0].shape[:2]
            return int(height), int(width)
        for image in row.images:
            name = (
                str(image) if not isinstance(image, bytes | np.ndarray) else hashlib.blake2b(bytes(image)).hexdigest()
            )
            if name not in self.sizes:
                self.sizes[name] = self._decoded(image, row.where)
                self.n_pictures += 1
            sizes.append(self.sizes[name])
        return sizes[0] if sizes else None

    def _is_turned(self, record: Record) -> bool:
        """Whether opening the picture turns it, and something says where things are in it."""
        has_places = record.instances or any(item.box_xyxy_px for item in record.written)
        return bool(has_places) and is_turned(record.images[0])

    def _decoded(self, image: Any, where: str) -> tuple[int, int] | None:
        if self.twins is None:
            return None
        try:
            picture = load_image(image)
        except PaliGemmaError as error:
            self.note("broken picture", f"{where}: {error}")
            return None
        self.twins.add(self.split, where, picture)
        return picture.shape[0], picture.shape[1]

    def _record(self, record: Record, size_hw: tuple[int, int] | None) -> None:
        self._texts(record.where, said_by(record))
        for instance in record.instances:
            self.labels[instance.label] += 1
            if not instance.label.strip() or set(instance.label) & set(";<>\n"):
                self.note("bad label", f"{record.where}: the label {instance.label!r}")
            if instance.mask is not None:
                try:
                    instance.mask.pixels()
                except DataError as error:
                    self.note("bad mask", f"{record.where}: {instance.label}: {error}")
        for what, box in record.boxes:
            self._box(f"{record.where}: {what[:60]!r}", box, size_hw)
        for asked in record.questions:
            if not all(answer.strip() for answer in asked.answers):
                self.note("empty suffix", f"{record.where}: an empty answer of {asked.question[:60]!r}")
        for text in record.texts:
            if not text.text.strip():
                self.note("empty suffix", f"{record.where}: an empty {text.style}")

    def _texts(self, where: str, texts: Iterable[str]) -> bool:
        """Whether all can be written; the first that cannot is told of."""
        try:
            for text in texts:
                require_text(text, where)
        except DataError as error:
            self.note("not UTF-8", str(error))
            return False
        return True

    def _box(self, name: str, box_xyxy_px: BoxXyxyPx, size_hw: tuple[int, int] | None) -> None:
        try:
            require_box(box_xyxy_px, size_hw, name)
        except DataError as error:
            self.note(error.kind, str(error))
            return
        x1, y1, x2, y2 = box_xyxy_px
        if size_hw is not None and (min(x1, y1) < -1 or x2 > size_hw[1] + 1 or y2 > size_hw[0] + 1):
            told = f"{name} at left {x1:g}, top {y1:g}, right {x2:g}, bottom {y2:g}"
            self.note("box over the edge", f"{told}: the picture is {size_hw[1]}×{size_hw[0]}")

    def _example(self, example: Example, *, is_built: bool = False) -> None:
        """What a prompt and its answer say.

        Args:
            is_built: from a record, with which its things and what it is written in were looked at.
        """
        task = example.prefix.split(" ", 1)[0]
        self.tasks[task] += 1
        if not is_built and not self._texts(example.where, (example.prefix, example.suffix)):
            return
        entries, problems = parse_entries(example.suffix)
        if entries:
            for entry in entries:
                if task != "ocr" and not is_built:  # there they are words of the picture
                    self.labels[entry.label] += 1
            _, flat = check_area(example.suffix, entries)
            for problem in flat:
                self.note("turned-over box", f"{example.where}: {problem}")
            for problem in problems:
                self.note("malformed suffix", f"{example.where}: {problem}")
        else:
            for problem in stray_tokens(example.suffix):
                self.note("malformed suffix", f"{example.where}: {problem}")
        if not example.suffix.strip() and task not in _MAY_BE_EMPTY:
            self.note("empty suffix", f"{example.where}: the suffix of {example.prefix[:60]!r} is empty")
        if self.length is not None and self.max_text is not None:
            try:
                n = self.length(example)
            except PaliGemmaError as error:
                self.note("unreadable row", str(error))
                return
            if n > self.max_text:
                self.note("text too long", f"{example.where}: {n} tokens, {self.max_text} are seen")


def _is_clip(row: Record | Example) -> bool:
    """Whether the pictures of a row are frames, which come decoded."""
    frames = row.images
    return len(frames) > 1 and all(
        isinstance(one, np.ndarray) and one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3 for one in frames
    )


_PHRASES = (  # what errors of sources say -> their kind, where they do not name it themselves
    ("not UTF-8", "not UTF-8"),
    (r"box.* outside of the picture", "box outside"),
    ("no column", "wrong column"),
    ("no frames", "no frames"),
    ("cut off", "cut archive"),
    (r"lies? outside", "path outside"),
    ("no such file|is not in ", "missing picture"),
    ("run-length|run lengths|polygon|a mask of size", "bad mask"),
    ("no frame|not one frame", "no frames"),
)


def _kind_of(error: PaliGemmaError) -> str:
    kind = getattr(error, "kind", "unreadable row")
    if kind in KINDS and kind != "unreadable row":
        return kind
    return next((kind for phrase, kind in _PHRASES if re.search(phrase, str(error))), "unreadable row")


def _kind_of_file(problem: str) -> str:
    if "duplicate" in problem or "twice" in problem or "is also that of" in problem:
        return "duplicate id"
    return "cut archive" if "cut off" in problem else "file"


def _compare_pictures(findings: Findings, twins: Twins) -> None:
    """Sources of one mixture may share pictures."""
    for first, second in twins.exact():
        if first[0] != second[0] and _split(first[0]) == _split(second[0]):
            continue
        kind = "same picture twice" if first[0] == second[0] else "same picture in two splits"
        message = f"{second[1]} shows the picture of {first[0]}: {first[1]}"
        findings.found.append(Finding(kind, second[0], message))
    for first, second in near_twins(twins):
        if _split(first[0]) == _split(second[0]):
            continue
        message = f"{second[1]} looks like {first[0]}: {first[1]}"
        findings.found.append(Finding("similar pictures in two splits", second[0], message))


def _split(name: str) -> str:
    """The split of a source, which may be one of several of a mixture (`_apart`)."""
    return name.partition(": ")[0]


def _compare_labels(findings: Findings) -> None:
    total: Counter[str] = sum(findings.labels.values(), Counter())
    for rare, frequent in likely_typos(total):
        split = next(name for name, counter in findings.labels.items() if counter[rare])
        message = f"{rare!r} ({total[rare]} times) may mean {frequent!r} ({total[frequent]} times)"
        findings.found.append(Finding("likely typo", split, message))
    train = {label for split, counter in findings.labels.items() if _split(split) == "train" for label in counter}
    if train:
        for split, counter in findings.labels.items():
            for label in sorted(set(counter) - train):
                message = f"{label!r}: {counter[label]} times in {split}, never in train"
                findings.found.append(Finding("label only held out", split, message))
