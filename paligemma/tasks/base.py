"""What every task is: a prompt, a suffix built from ground truth, and a reading of what a model wrote."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import exp
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paligemma.errors import OptionError, TaskError

SizeHw = tuple[int, int]
# (text that the token added, its log-probability); the texts join to what is parsed, control tokens add "".
TokenLogprobs = Sequence[tuple[str, float]]
MaskDecoder = Callable[[NDArray[np.int64]], NDArray[np.float32]]  # int[n, 16] -> float32[n, 64, 64], foreground > 0
MaskEncoder = Callable[[NDArray[np.float32]], NDArray[np.int64]]  # float32[n, 64, 64] in [0, 1] -> int[n, 16]


class Task(Protocol):
    """A task, both ways.

    prefix(…) -> str: the prompt; arguments differ per task.
    suffix(result, size_hw=None, …) -> str: what a model should answer, from a typed result in original pixels.
    parse(text, *, size_hw=None, token_logprobs=None, mask_decoder=None) -> result: never fails on any text; what cannot
        be read stands in `.raw` and `.problems`. Without `size_hw` boxes are fractions of the sides; without
        `token_logprobs` scores are 1 and log-probabilities 0.
    """

    @property
    def name(self) -> str: ...
    @property
    def prefix(self) -> Callable[..., str]: ...
    @property
    def suffix(self) -> Callable[..., str]: ...
    @property
    def parse(self) -> Callable[..., Any]: ...


class SpanScores:
    """Scores of stretches of a text from the log-probabilities of its tokens.

    A token belongs to a stretch that shares a character with it. A token that added nothing (the first bytes of a
    character that is spelled in bytes) belongs to the stretch that holds the character after it.

    Raises:
        OptionError: the tokens' texts do not join to `text`.
    """

    def __init__(self, text: str, token_logprobs: TokenLogprobs | None) -> None:
        self._logprobs = [float(logprob) for _, logprob in token_logprobs or ()]
        self._known = token_logprobs is not None
        lengths = [len(piece) for piece, _ in token_logprobs or ()]
        self._ends = list(accumulate(lengths))
        self._starts = [end - length for end, length in zip(self._ends, lengths, strict=True)]
        if token_logprobs is not None:
            joined = "".join(piece for piece, _ in token_logprobs)
            if joined != text:
                raise OptionError(
                    f"token_logprobs spell {joined[:80]!r}, the text is {text[:80]!r}: expected pieces that join to it."
                )

    @property
    def total(self) -> float:
        """Sum over all tokens, control tokens included; 0 where nothing is known."""
        return float(sum(self._logprobs))

    def geometric_mean(self, start: int, end: int) -> float:
        """Geometric mean of the probabilities of the tokens of text[start:end]; 1 where nothing is known."""
        if not self._known:
            return 1.0
        first = bisect_left(self._ends, start + 1)  # first token that reaches beyond `start`
        while first and self._starts[first - 1] == self._ends[first - 1] == start:
            first -= 1
        last = bisect_left(self._starts, end)  # first token that starts at `end` or later
        chosen = self._logprobs[first:last]
        return min(1.0, exp(sum(chosen) / len(chosen))) if chosen else 1.0


def plain_text(value: Any, what: str) -> str:
    """The text of a result or the text itself, without outer white space.

    Raises:
        TaskError: no text, or an empty one.
    """
    text = getattr(value, "text", value)
    if not isinstance(text, str) or not text.strip():
        raise TaskError(f"{what} is {text!r}: expected text of a word or more.")
    return text.strip()


def language(lang: str) -> str:
    """A language code as prompts name it; any word is one.

    Raises:
        TaskError: empty, or not one word.
    """
    if not isinstance(lang, str) or len(lang.split()) != 1 or lang != lang.strip():
        raise TaskError(f"lang={lang!r}: expected one language code such as 'en', 'de' or 'zh'.")
    return lang


def size_of(result: object, size_hw: SizeHw | None) -> SizeHw:
    """The picture's size: the one given, or the one that a list of results carries.

    Raises:
        TaskError: neither.
    """
    size = size_hw if size_hw is not None else getattr(result, "size_hw", None)
    if size is None:
        raise TaskError("no picture size: boxes are in pixels, so size_hw=(height, width) is needed. Hand it in.")
    height, width = size
    return height, width
