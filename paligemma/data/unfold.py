"""All that builders can ask about a record, and what of the record they leave unsaid: what a conversion writes.

In training a record is seen many times, each time another caption of it. On disk everything has a row of its own.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from paligemma.data.builders import Builder, OneOf, Turn
from paligemma.data.builders.base import RECORD_ID
from paligemma.data.example import Example
from paligemma.data.record import Asked, Instance, Record, Word
from paligemma.errors import DataError, PaliGemmaError

Build = Callable[[Record, np.random.Generator, Sequence[str]], Example | None]
Made = tuple[Example, Any]  # and the builder that made it


@dataclass(frozen=True)
class Unfolded:
    """Rows of records.

    Attributes:
        build: a builder, several (`OneOf`), or a function of record, random numbers and labels.
        labels: class names of the data set.
        seed: of what is random.
    """

    build: Builder | Build | None
    labels: Sequence[str]
    seed: int = 0

    def tries(self, record: Record) -> Iterator[Callable[[], Made | None]]:
        """What makes one row each, for each builder and each text, region or question; None where there is nothing."""
        words = f"{record.id} {record.where}".encode("utf-8", "surrogatepass")
        rng = np.random.default_rng([self.seed, *words])
        for builder in self.build.builders if isinstance(self.build, OneOf) else (self.build,):
            try:
                n_turns = max(1, getattr(builder, "turns", lambda _: 1)(record))
            except PaliGemmaError:
                n_turns = 1  # the row itself says what is wrong with the record
            for turn in range(n_turns):
                yield partial(self._made, builder, record, rng, turn)

    def _made(self, builder: Any, record: Record, rng: np.random.Generator, turn: int) -> Made | None:
        if hasattr(builder, "build"):
            example = builder.build(record, rng, self.labels, turn=Turn(seed=self.seed, epoch=turn))
        else:
            example = builder(record, rng, self.labels)
        return None if example is None else (example, builder)


def numbered(rows: Sequence[Example]) -> list[Example]:
    """Rows of one record: each with an id of its own, that of the record kept beside."""
    if len(rows) < 2:
        return list(rows)
    named = (
        {"id": f"{row.meta['id']}-{n}", RECORD_ID: row.meta["id"]} if "id" in row.meta else {}
        for n, row in enumerate(rows)
    )
    return [replace(row, meta={**row.meta, **ids}) for row, ids in zip(rows, named, strict=True)]


def lost(record: Record, made: Sequence[Made]) -> Counter[str]:
    """What a record holds and its rows do not say, found by reading them; of unknown builders nothing is known."""
    found, n_masks, n_referred = Record(record.images), 0, 0
    for example, builder in made:
        if not hasattr(builder, "read"):
            return Counter()
        try:
            read = builder.read(example, record.size_hw or (1024, 1024))
        except DataError:  # only what cannot be counted
            continue
        found = joined(found, read)
        here = len(_CODES.findall(example.suffix))
        if builder.name == "referring":  # each row has another thing's
            n_referred += here
        else:
            n_masks = max(n_masks, here)
    held, said = _things(record), _things(found)
    missing = Counter({what: (things - said[what]).total() for what, things in held.items()})
    missing["masks"] = max(0, sum(item.mask is not None for item in _single(record)) - max(n_masks, n_referred))
    missing["crowd regions"] = len(record.instances) - len(_single(record))
    return +missing


def _things(record: Record) -> dict[str, Counter[Any]]:
    return {
        "boxes": Counter(item.label for item in _single(record)),
        "texts": Counter((x.text.strip().casefold(), x.lang, x.style, x.box_xyxy_px is None) for x in record.texts),
        "words": Counter(piece for word in record.words for piece in word.text.split()),
        "questions": Counter(asked.question.strip() for asked in record.questions if asked.answers),
        "further answers": Counter(
            (asked.question.strip(), answer.strip().casefold())
            for asked in record.questions
            if asked.answers
            for answer in set(asked.answers[1:]) - {asked.answers[0]}
            if answer.strip()
        ),
    }


def _single(record: Record) -> list[Instance]:
    return [item for item in record.instances if not item.is_crowd]


_CODES = re.compile(r"(?:<seg[0-9]{3}>){16}")


def joined(a: Record, b: Record) -> Record:
    """Both in one: what both say stands once, with its mask where one has it; what one says twice stays twice."""
    masks = {(item.label, item.box_xyxy_px): item.mask for item in b.instances if item.mask is not None}
    instances = [
        item if item.mask is not None else replace(item, mask=masks.get((item.label, item.box_xyxy_px)))
        for item in a.instances
    ]
    return replace(
        a,
        instances=_union(instances, b.instances, lambda item: (item.label, item.box_xyxy_px)),
        texts=_union(a.texts, b.texts),
        words=_placed(_union(a.words, b.words)),
        questions=_answered(a.questions, b.questions),
        meta={**b.meta, **a.meta},
    )


def _placed(words: Sequence[Word]) -> tuple[Word, ...]:
    """Words without those that have no box and are said by ones that have."""
    said = Counter(piece for word in words if word.box_xyxy_px is not None for piece in word.text.split())
    kept = []
    for word in words:
        pieces = Counter(word.text.split())
        if word.box_xyxy_px is None and pieces and pieces <= said:
            said -= pieces
        else:
            kept.append(word)
    return tuple(kept)


def _answered(a: Sequence[Asked], b: Sequence[Asked]) -> tuple[Asked, ...]:
    """The questions of both; one that both ask stands once, with what either answers."""
    found, free = list(a), list(range(len(a)))
    for asked in b:
        key = asked.question.strip(), asked.lang
        i = next((i for i in free if (found[i].question.strip(), found[i].lang) == key), None)
        if i is None:
            found.append(asked)
            continue
        free.remove(i)
        more = [answer for answer in asked.answers if answer not in found[i].answers]
        found[i] = replace(found[i], answers=(*found[i].answers, *more))
    return tuple(found)


def _union(a: Sequence[Any], b: Sequence[Any], key: Callable[[Any], Any] = lambda item: item) -> tuple[Any, ...]:
    """All of a, and what b has more of."""
    there = Counter(map(key, a))
    more = []
    for item in b:
        if there[key(item)] > 0:
            there[key(item)] -= 1
        else:
            more.append(item)
    return (*a, *more)
