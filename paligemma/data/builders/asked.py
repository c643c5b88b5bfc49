"""Builders of questions that a data set holds, both ways.

    answer en where is the cat?                      ->  on the sofa
    question de on the sofa                          ->  wo ist die Katze?

Outer white space is cut off, as everywhere in prompts and answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
class AnswerBuilder:
    """`answer {lang} {question}` -> an answer (PaliGemma report, 3.2.5).

    Attributes:
        lang: only questions in this language; None: in any.
        answer_lang: what the prompt names: the language of the answer. "en": pre-training has English answers to
            questions in 35 languages. None: the question's; otherwise the example's meta names that one, as
            "question_lang".
        question_choice: which of several questions: "cycle" over epochs, "random" or "first".
        choice: which of several answers, alike; cycling goes on when all questions were asked once.
        lower: write answers in small letters, as several transfers of the reference do.
    """

    lang: str | None = None
    answer_lang: str | None = "en"
    question_choice: Choice = "cycle"
    choice: Choice = "cycle"
    lower: bool = False

    name = "answer"
    needs = "a question with an answer"

    def __post_init__(self) -> None:
        check_choice("question_choice", self.question_choice, Choice)
        check_choice("choice", self.choice, Choice)
        check_language(self.lang)
        check_language(self.answer_lang, "answer_lang")

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None without an answered question."""
        drawn = _question(record, self.lang, self.question_choice, self.choice, rng, turn, self.name)
        if drawn is None:
            return None
        asked, answer = drawn
        named = self.answer_lang or asked.lang
        with naming(record.where):
            prefix, suffix = AnswerTask().prefix(asked.question, named), plain_text(answer, "answer")
        other: dict[str, Any] = {} if named == asked.lang else {"question_lang": asked.lang}
        return answered_example(
            record, prefix, suffix, [one.strip() for one in asked.answers], lower=self.lower, **other
        )

    def turns(self, record: Record) -> int:
        """How many turns ask all of a record's questions once; the answers of one stand in its references."""
        return len(_asked(record, self.lang)) if self.question_choice == "cycle" else 1

    def reads(self, prefix: str) -> bool:
        return _is_question(prefix, self.name)

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The question with its answer, and with the others that stand in the references."""
        check_reads(self, example)
        _, lang, question = example.prefix.split(" ", 2)
        lang = str(example.meta.get("question_lang", lang))
        asked = Asked(question.strip(), example.references, lang)
        return record_of(example, size_hw, questions=(asked,))


@dataclass(frozen=True, kw_only=True)
class QuestionBuilder:
    """`question {lang} {English answer}` -> a question in that language that has the answer (PaliGemma report, 3.2.5).

    Attributes:
        lang: only questions in this language; None: in any.
        question_choice, choice: which of several questions and answers, as in `AnswerBuilder`.
    """

    lang: str | None = None
    question_choice: Choice = "cycle"
    choice: Choice = "cycle"

    name = "question"
    needs = "a question with an answer"

    def __post_init__(self) -> None:
        check_choice("question_choice", self.question_choice, Choice)
        check_choice("choice", self.choice, Choice)
        check_language(self.lang)

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None without an answered question."""
        drawn = _question(record, self.lang, self.question_choice, self.choice, rng, turn, self.name)
        if drawn is None:
            return None
        asked, answer = drawn
        with naming(record.where):
            return example_of(record, QuestionTask().prefix(answer, asked.lang), plain_text(asked.question, "question"))

    def turns(self, record: Record) -> int:
        """How many turns show all of a record's questions once."""
        return len(_asked(record, self.lang)) if self.question_choice == "cycle" else 1

    def reads(self, prefix: str) -> bool:
        return _is_question(prefix, self.name)

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The question with this one answer."""
        check_reads(self, example)
        _, lang, answer = example.prefix.split(" ", 2)
        asked = Asked(example.suffix.strip(), (answer.strip(),), lang)
        return record_of(example, size_hw, questions=(asked,))


def _asked(record: Record, lang: str | None) -> list[Asked]:
    return [asked for asked in record.questions if asked.answers and lang in (None, asked.lang)]


def _question(
    record: Record,
    lang: str | None,
    question_choice: Choice,
    choice: Choice,
    rng: np.random.Generator,
    turn: Turn | None,
    name: str,
) -> tuple[Asked, str] | None:
    """A question of the record and one of its answers."""
    questions = _asked(record, lang)
    if not questions:
        return None
    key = key_of(record, name)
    number = pick(len(questions), question_choice, rng, turn, key)
    asked = questions[number]
    if turn is not None and question_choice == "cycle":
        turn = Turn(seed=turn.seed, epoch=turn.epoch // len(questions))  # another answer once all were asked
    return asked, asked.answers[pick(len(asked.answers), choice, rng, turn, f"{key} {number}")]


def _is_question(prefix: str, verb: str) -> bool:
    words = prefix.split(" ", 2)
    return len(words) == 3 and words[0] == verb and bool(words[1]) and bool(words[2].strip())
