"""Builders of questions that a data set holds, both ways.

    answer en where is the cat?                      ->  on the sofa
    question de on the sofa                          ->  wo ist die Katze?

Outer white space is cut off, as everywhere in prompts and answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paligemma.data.builders.base import (
    Choice,
    Turn,
    answered_example,
    check_choice,
    check_reads,
    example_of,
    key_of,
    naming,
    pick,
    record_of,
)
from paligemma.data.builders.languages import check_language
from paligemma.data.example import Example
from paligemma.data.record import Asked, Record
from paligemma.tasks.base import MaskDecoder, SizeHw, plain_text
from paligemma.tasks.vqa import AnswerTask, QuestionTask


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """What both ways have in common.

    Attributes:
        lang: only questions in this language; None: in any.
        question_choice: which of several questions: "cycle" over epochs, "random" or "first".
        choice: which of several answers, alike; cycling goes on when all questions were asked once.
    """

    lang: str | None = None
    question_choice: Choice = "cycle"
    choice: Choice = "cycle"

    name = "asking"
    needs = "a question with an answer"

    def __post_init__(self) -> None:
        check_choice("question_choice", self.question_choice, Choice)
        check_choice("choice", self.choice, Choice)
        check_language(self.lang)

    def turns(self, record: Record) -> int:
        """How many turns ask all of a record's questions once."""
        return len(self._asked(record)) if self.question_choice == "cycle" else 1

    def reads(self, prefix: str) -> bool:
        words = prefix.split(" ", 2)
        return len(words) == 3 and words[0] == self.name and bool(words[1]) and bool(words[2].strip())

    def _asked(self, record: Record) -> list[Asked]:
        """The questions that are asked, each with the answers that say something."""
        found = (
            replace(asked, answers=tuple(answer for answer in asked.answers if answer.strip()))
            for asked in record.questions
            if self.lang in (None, asked.lang)
        )
        return [asked for asked in found if asked.answers]

    def _drawn(self, record: Record, rng: np.random.Generator, turn: Turn | None) -> tuple[Asked, str] | None:
        """A question of the record and one of its answers."""
        questions = self._asked(record)
        if not questions:
            return None
        key = key_of(record, self.name)
        number = pick(len(questions), self.question_choice, rng, turn, key)
        asked = questions[number]
        if turn is not None and self.question_choice == "cycle":
            turn = Turn(seed=turn.seed, epoch=turn.epoch // len(questions))  # another answer once all were asked
        return asked, asked.answers[pick(len(asked.answers), self.choice, rng, turn, f"{key} {number}")]


@dataclass(frozen=True, kw_only=True)
class AnswerBuilder(_Asking):
    """`answer {lang} {question}` -> an answer (PaliGemma report, 3.2.5).

    Attributes:
        answer_lang: what the prompt names: the language of the answer. "en": pre-training has English answers to
            questions in 35 languages. None: the question's; otherwise the example's meta names that one, as
            "question_lang".
        lower: write answers in small letters, as several transfers of the reference do.
    """

    answer_lang: str | None = "en"
    lower: bool = False

    name = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_language(self.answer_lang, "answer_lang")

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example, the question's other answers in its references; None without an answered question."""
        drawn = self._drawn(record, rng, turn)
        if drawn is None:
            return None
        asked, answer = drawn
        named = self.answer_lang or asked.lang
        with naming(record.where):
            prefix, suffix = AnswerTask().prefix(asked.question, named), plain_text(answer, "answer")
        other: dict[str, Any] = {} if named == asked.lang else {"question_lang": asked.lang}
        right = [one.strip() for one in asked.answers]
        return answered_example(record, prefix, suffix, right, lower=self.lower, **other)

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The question with its answer, and with the others that stand in the references."""
        check_reads(self, example)
        _, lang, question = example.prefix.split(" ", 2)
        lang = str(example.meta.get("question_lang", lang))
        asked = Asked(question.strip(), example.references, lang)
        return record_of(example, size_hw, questions=(asked,))


@dataclass(frozen=True, kw_only=True)
class QuestionBuilder(_Asking):
    """`question {lang} {English answer}` -> a question in that language that has it (PaliGemma report, 3.2.5)."""

    name = "question"

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None without an answered question."""
        drawn = self._drawn(record, rng, turn)
        if drawn is None:
            return None
        asked, answer = drawn
        with naming(record.where):
            return example_of(record, QuestionTask().prefix(answer, asked.lang), plain_text(asked.question, "question"))

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The question with this one answer."""
        check_reads(self, example)
        _, lang, answer = example.prefix.split(" ", 2)
        asked = Asked(example.suffix.strip(), (answer.strip(),), lang)
        return record_of(example, size_hw, questions=(asked,))
