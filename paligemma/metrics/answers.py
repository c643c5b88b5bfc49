"""Scores of short answers, one at a time, by the rules of the public benchmarks.

Every function takes one answer and what is true and gives 0..1; a score of a set is the mean. Nothing is lower-cased or
stripped unless a function says so: whoever compares without case lower-cases both sides first.

Sources: Antol et al. 2015 and the VQA v2 evaluation (`vqa_accuracy`, `normalised`), Biten et al. 2019 (`anls`), Masry
et al. 2022 (`relaxed_match`), each as big_vision evaluators/proj/paligemma/transfers applies it.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

from paligemma.metrics.text import edits

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_DIGITS = {"none": "0", **{word: str(n) for n, word in enumerate(NUMBER_WORDS)}}

# ------------------------------------------------------------------------------------------------- several true answers


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3): right for sure where three people say so (OK-VQA, A-OKVQA, VizWiz).

    Raises:
        ValueError: no true answer.
    """
    _require(answers)
    return min(1.0, answers.count(prediction) / 3)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: the best of the true ones.

    1 - edits / longer length where that quotient is below 0.5, else 0; an empty true answer matches an empty one only.

    Raises:
        ValueError: no true answer.
    """
    _require(answers)
    return max(_similarity(prediction, answer) for answer in answers)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA v2 (also TextVQA): the mean of `soft_accuracy` over all ways to leave one of the ten true answers out.

    Line breaks and tabs become spaces and both ends are stripped; where people disagree, both sides are `normalised`.
    Of a single true answer none can be left out: it is matched or not.

    Raises:
        ValueError: no true answer.
    """
    _require(answers)
    said, true = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(true) == 1:
        return float(said == true[0])
    if len(set(true)) > 1:
        said, true = normalised(said), [normalised(answer) for answer in true]
    others = (true[:left_out] + true[left_out + 1 :] for left_out in range(len(true)))
    return sum(soft_accuracy(said, rest) for rest in others) / len(true)


# ------------------------------------------------------------------------------------------------------ one true answer


def relaxed_match(prediction: str, answer: str, tolerance: float = 0.05) -> bool:
    """ChartQA: numbers within 5 % of the true one, `10%` being 0.1; anything else, and a true 0, letter by letter."""
    said, true = _number(prediction), _number(answer)
    if said is None or not true:
        return prediction == answer
    return abs(said - true) / abs(true) <= tolerance


def as_digits(text: str) -> str:
    """A number word, `none` or `zero` to `twenty` in any case, as digits (TallyQA); any other text as it is."""
    return _DIGITS.get(text.lower(), text)


def letter_of(text: str) -> str | None:
    """The lower-case letter in `The answer is C.`, at the beginning and in any case (ScienceQA); None without."""
    found = re.match(r"the answer is ([a-z])\.", text.lower())
    return found and found[1]


# ------------------------------------------------------------------------------------------------------------- VQA v2

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
# Words with one apostrophe, which people leave out. "she's" and "let's" are not among them.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Words with two: either may be missing, but not both.
_DOUBLE = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def normalised(text: str) -> str:
    """An answer as VQA v2 compares it: without punctuation, case and articles, numbers up to ten as digits.

    The order of the steps and their oddities are those of the official evaluation: a comma between digits anywhere
    makes every mark vanish instead of becoming a space, and `somebody'd` loses its apostrophe.
    """
    between_digits = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        vanishes = between_digits or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_SMALL.get(word, word) for word in cleaned.lower().split())
    return " ".join(_WHOLE.get(word, word) for word in words if word not in _ARTICLES)


def _keys() -> Iterator[tuple[str, str]]:
    for word in _CONTRACTIONS.split():
        yield word.replace("'", ""), word
    for word in _DOUBLE.split():
        for place in (match.start() for match in re.finditer("'", word)):
            yield word[:place] + word[place + 1 :], word
    yield from zip(("yall'd've", "y'alld've", "y'all'dve"), itertools.repeat("y'all'd've"))
    yield from zip(("ow's'at", "'ows'at", "'ow'sat"), itertools.repeat("'ow's'at"))
    yield "somebody'd", "somebodyd"


_WHOLE = dict(_keys())
_SMALL = {word: digits for word, digits in _DIGITS.items() if int(digits) <= 10}


# ------------------------------------------------------------------------------------------------------------- helpers


def _require(answers: Sequence[str]) -> None:
    if not answers:
        raise ValueError("no true answer: expected at least one. Leave such rows out.")


def _similarity(prediction: str, answer: str) -> float:
    if not answer:
        return float(not prediction)
    distance = edits(prediction, answer) / max(len(prediction), len(answer))
    return 1 - distance if distance < 0.5 else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
