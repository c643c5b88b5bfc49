"""Agreement of texts and of sets of facts."""

import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from paligemma.errors import ShapeError


def mean(values: Sequence[float]) -> float:
    """The mean; nan without any value."""
    return sum(values) / len(values) if values else float("nan")


def plain(text: str) -> str:
    """Case, compatibility forms and runs of white space ironed out; punctuation stays."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_match(predictions: Sequence[str], references: Sequence[str], *, literal: bool = False) -> float:
    """Share of predictions equal to their reference after `plain` (letter by letter if `literal`); nan without any."""
    _same_length(predictions, references)
    if not references:
        return float("nan")
    form = str if literal else plain
    return sum(form(p) == form(r) for p, r in zip(predictions, references, strict=True)) / len(references)


def word_accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """1 - word error rate over all texts together, at least 0; words are separated by white space, case counts.

    The word error rate is the number of words to insert, delete or replace, divided by the number of reference words;
    nan without reference words.
    """
    _same_length(predictions, references)
    n_words = sum(len(reference.split()) for reference in references)
    n_wrong = sum(edits(p.split(), r.split()) for p, r in zip(predictions, references, strict=True))
    return max(0.0, 1 - n_wrong / n_words) if n_words else float("nan")


def edits(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Levenshtein distance: fewest insertions, deletions and replacements that turn one into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@dataclass(frozen=True)
class SetScore:
    """Precision and recall of facts pooled over examples; nan where nothing was said, or nothing was to be said."""

    precision: float
    recall: float
    n_predicted: int
    n_references: int

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where both are."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def set_score(predictions: Sequence[Iterable[Hashable]], references: Sequence[Iterable[Hashable]]) -> SetScore:
    """How many of the facts said are true, and how many of the true ones were said."""
    _same_length(predictions, references)
    pairs = [(set(p), set(r)) for p, r in zip(predictions, references, strict=True)]
    n_right = sum(len(p & r) for p, r in pairs)
    n_said, n_true = sum(len(p) for p, _ in pairs), sum(len(r) for _, r in pairs)
    return SetScore(
        n_right / n_said if n_said else float("nan"), n_right / n_true if n_true else float("nan"), n_said, n_true
    )


def _same_length(predictions: Sequence[object], references: Sequence[object]) -> None:
    if len(predictions) != len(references):
        raise ShapeError(f"{len(predictions)} predictions, {len(references)} references: expected as many of both.")
