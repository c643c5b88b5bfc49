"""Questions about what is in a picture, made from boxes by rules, as pre-training made them from OpenImages.

    answer en What objects are in the image?            ->  cat, sofa
    answer en Is dog in the image?                      ->  no
    answer en Which of dog, cat, sofa are in the image? ->  cat, sofa
    answer en How many cat?                             ->  2

The questions are those of the PaliGemma report, 3.2.5; the form of the answers is not published, so it is ours. A
region of many (`is_crowd`) is in the picture like anything else, but nobody knows how many it holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paligemma.data.builders.base import (
    Order,
    Turn,
    absent_labels,
    arranged,
    check_choice,
    check_count,
    check_reads,
    example_of,
    naming,
    record_of,
    unique,
)
from paligemma.data.builders.languages import check_language
from paligemma.data.example import Example
from paligemma.data.record import Asked, Record
from paligemma.errors import DataError, OptionError, TaskError, nearest
from paligemma.tasks.base import MaskDecoder, SizeHw
from paligemma.tasks.grammar import check_label
from paligemma.tasks.vqa import AnswerTask

COMMA = ", "


def _check_share(field: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise OptionError(f"{field}={value!r}: expected a share in 0…1.")


def _check_question(question: str, gap: str = "") -> None:
    if not question.strip() or (gap and question.count(gap) != 1):
        raise OptionError(f"question={question!r}: expected text" + (f" with {gap} once." if gap else "."))


def _fill(question: str, gap: str, value: str) -> str:
    return question.replace(gap, value) if gap else question


def _value(question: str, gap: str, asked: str) -> str | None:
    """What stands in the gap of a question; None where it is another question."""
    if not gap:
        return "" if asked == question else None
    head, tail = question.split(gap)
    inside = len(asked) - len(head) - len(tail)
    if inside < 1 or not asked.startswith(head) or not asked.endswith(tail):
        return None
    return asked[len(head) : len(head) + inside]


@dataclass(frozen=True, kw_only=True)
class _Ruled:
    """What the four questions have in common.

    Attributes:
        question: the question's text; another wording may be given, with the same gap.
        lang: of question and answer, named by the prompt.
    """

    question: str
    lang: str = "en"

    _gap = ""

    def __post_init__(self) -> None:
        check_language(self.lang)
        _check_question(self.question, self._gap)

    def _example(self, record: Record, value: str, answer: str) -> Example:
        prefix = AnswerTask().prefix(_fill(self.question, self._gap, value), self.lang)
        return example_of(record, prefix, answer)

    def _asked_about(self, prefix: str) -> str | None:
        start = f"answer {self.lang} "
        return _value(self.question, self._gap, prefix.removeprefix(start)) if prefix.startswith(start) else None

    def reads(self, prefix: str) -> bool:
        return self._asked_about(prefix) is not None

    def _record(self, example: Example, size_hw: SizeHw, **meta: Any) -> Record:
        question = example.prefix.removeprefix(f"answer {self.lang} ")
        asked = Asked(question, example.references, str(example.meta.get("question_lang", self.lang)))
        return record_of(example, size_hw, questions=(asked,), meta=meta)


@dataclass(frozen=True, kw_only=True)
class ListBuilder(_Ruled):
    """`answer en What objects are in the image?` -> the labels of what is there, each once, joined by ", ".

    Attributes:
        order: of the labels, by the first thing of each: "raster" (lines from the top), "random", "source" or "area"
            (largest first).
    """

    question: str = "What objects are in the image?"
    order: Order = "raster"

    name = "list_objects"
    needs = "instances"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, Order)

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None without instances."""
        order = arranged([item.box_xyxy_px for item in record.instances], self.order, rng)
        names = unique([record.instances[i].label for i in order])
        if not names:
            return None
        with naming(record.where):
            return self._example(record, "", _joined(names))

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The question with its answer, and the labels in meta as "present"."""
        check_reads(self, example)
        return self._record(example, size_hw, present=_split(example.suffix))


@dataclass(frozen=True, kw_only=True)
class PresenceBuilder(_Ruled):
    """`answer en Is {thing} in the image?` -> yes or no.

    Attributes:
        p_yes: share of questions about what is there; where only one of the two can be asked, it is.
        yes, no: the answers.
    """

    question: str = "Is {thing} in the image?"
    p_yes: float = 0.5
    yes: str = "yes"
    no: str = "no"

    name = "presence"
    needs = "instances, or class names of the data set"
    _gap = "{thing}"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("p_yes", self.p_yes)

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None where nothing can be asked."""
        present = unique([item.label for item in record.instances])
        absent = absent_labels(record, labels) if self.p_yes < 1 else []
        says_yes = bool(present) and (rng.random() < self.p_yes or not absent)
        names = present if says_yes else absent
        if not names:
            return None
        with naming(record.where):
            thing = check_label(names[int(rng.integers(len(names)))])
            return self._example(record, thing, self.yes if says_yes else self.no)

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The question with its answer, and the label in meta as "present" or "absent"."""
        check_reads(self, example)
        thing = self._asked_about(example.prefix)
        side = {self.yes: "present", self.no: "absent"}.get(example.suffix.strip())
        return self._record(example, size_hw, **({side: (thing,)} if side else {}))


@dataclass(frozen=True, kw_only=True)
class MultiPresenceBuilder(_Ruled):
    """`answer en Which of {thing}, {thing}, … are in the image?` -> those that are, in asked order, joined by ", ".

    How many of them are there is drawn uniformly from what is possible.

    Attributes:
        n_things: how many are asked about; fewer where there are fewer.
        none: the answer where none of them is there.
    """

    question: str = "Which of {things} are in the image?"
    n_things: int = 3
    none: str = "none"

    name = "multi_presence"
    needs = "instances, or class names of the data set"
    _gap = "{things}"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_things", self.n_things, 1)

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None where nothing can be asked."""
        present = unique([item.label for item in record.instances])
        absent = absent_labels(record, labels)
        n = min(self.n_things, len(present) + len(absent))
        if not n:
            return None
        n_present = int(rng.integers(max(0, n - len(absent)), min(n, len(present)) + 1))
        names = [present[i] for i in rng.choice(len(present), n_present, replace=False)] if n_present else []
        names += [absent[i] for i in rng.choice(len(absent), n - n_present, replace=False)] if n > n_present else []
        names = [names[i] for i in rng.permutation(n)]
        with naming(record.where):
            if self.none in names:
                raise DataError(
                    f"a label is {self.none!r}, the answer for nothing: expected another word. Choose another none."
                )
            return self._example(
                record, _joined(names), _joined([name for name in names if name in present]) or self.none
            )

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The question with its answer, and the labels in meta as "present" and "absent"."""
        check_reads(self, example)
        things = _split(self._asked_about(example.prefix) or "")
        present = () if example.suffix.strip() == self.none else _split(example.suffix)
        if not set(present) <= set(things):
            return self._record(example, size_hw)  # somebody else's answer
        absent = tuple(thing for thing in things if thing not in present)
        return self._record(example, size_hw, present=present, absent=absent)


@dataclass(frozen=True, kw_only=True)
class CountBuilder(_Ruled):
    """`answer en How many {thing}?` -> a number.

    Attributes:
        thing: always ask about this label; None: about one of the record's that has no region of many, or an absent
            one.
        p_absent: share of questions about a class name that nothing in the picture goes by, answered by 0; all, where
            nothing can be counted, unless it is 0. They need class names, and without any only what is there is
            counted. The picture world asks as often.
    """

    question: str = "How many {thing}?"
    thing: str | None = None
    p_absent: float = 0.15

    name = "count"
    needs = "instances that are no regions of many"
    _gap = "{thing}"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("p_absent", self.p_absent)
        if self.thing is not None:
            try:
                check_label(self.thing, "thing")
            except TaskError as error:
                raise OptionError(str(error)) from None

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None where nothing can be counted, as where a label has a region of many."""
        here = {item.label for item in record.instances}
        if self.thing is not None and labels and self.thing not in {*labels, *here}:
            raise DataError(
                f"{record.where}: thing={self.thing!r} is none of the {len(labels)} classes of the data set: expected "
                f"one of them, or every answer is 0.{nearest(self.thing, labels)}"
            )
        crowds = {item.label for item in record.instances if item.is_crowd} | set(record.hidden)
        names = [self.thing] if self.thing is not None else unique([item.label for item in record.instances])
        names = [name for name in names if name not in crowds]
        absent = absent_labels(record, labels) if labels and self.thing is None else []
        if absent and self.p_absent and (not names or rng.random() < self.p_absent):
            names = absent  # never a matter of chance whether there is an example: held-out rows are chosen by it
        if not names:
            return None
        with naming(record.where):
            thing = check_label(names[int(rng.integers(len(names)))])
            return self._example(record, thing, str(sum(item.label == thing for item in record.instances)))

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The question with its answer, and in meta {label: number} as "count"."""
        check_reads(self, example)
        number = example.suffix.strip()
        is_number = number.isascii() and number.isdigit()
        counts = {"count": {self._asked_about(example.prefix): int(number)}} if is_number else {}
        return self._record(example, size_hw, **counts)


def _joined(names: Sequence[str]) -> str:
    """Names as a list in a sentence.

    Raises:
        DataError: a name with a comma, which would be two.
    """
    for name in names:
        check_label(name)
        if "," in name:
            raise DataError(f"the label {name!r} holds ',', which separates labels here: expected none. Rename it.")
    return COMMA.join(names)


def _split(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.strip().split(COMMA) if name)
