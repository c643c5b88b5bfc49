"""What a model answers, as plain values: units and order stand in the names.

Every result is frozen and has `to_dict()`, which holds nothing but JSON types (masks as COCO run-length encodings).
`Detections` and `Segments` are lists that also carry the text they were read from (`raw`) and whatever could not be
read (`problems`): nothing the model said is dropped in silence.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BoxXyxyPx = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the original picture
BoolMask = NDArray[np.bool_]


class _Result:
    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.repr}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, _Result | _ResultList):
        return value.to_dict()
    if isinstance(value, np.ndarray):
        return mask_to_rle(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


@dataclass(frozen=True)
class Caption(_Result):
    text: str
    logprob: float  # sum over the tokens of the answer, end of sequence included
    raw: str = ""


@dataclass(frozen=True)
class Choice(_Result):
    text: str
    logprob: float
    probability: float  # among the choices offered; they sum to 1


@dataclass(frozen=True)
class Answer(_Result):
    text: str
    logprob: float
    choices: tuple[Choice, ...] = ()  # best first
    raw: str = ""


@dataclass(frozen=True)
class Detection(_Result):
    label: str
    box_xyxy_px: BoxXyxyPx
    score: float  # geometric mean of the probabilities of the label tokens, or of the box tokens without a label


@dataclass(frozen=True)
class Segment(_Result):
    label: str
    box_xyxy_px: BoxXyxyPx
    mask: BoolMask  # bool[H, W], size of the original picture
    score: float


@dataclass(frozen=True)
class Word(_Result):
    text: str
    box_xyxy_px: BoxXyxyPx
    score: float


@dataclass(frozen=True)
class ReadText(_Result):
    text: str
    words: tuple[Word, ...] = ()
    logprob: float = 0.0
    raw: str = ""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation(_Result):
    """One generated suffix.

    `pieces[i]` is the text that token i added, so that `"".join(pieces) == text`; control tokens add nothing.
    `logprobs[i]` is the log-probability of token i under the unfiltered, untempered distribution. `tokens` ends with
    the end-of-sequence id when `finish_reason` is "stop".
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str  # "stop": the model ended; "length": max_new_tokens were written
    pieces: tuple[str, ...] = ()

    @property
    def logprob(self) -> float:
        return float(sum(self.logprobs))


class _ResultList(list[Any]):
    """A list of results with the text they came from."""

    def __init__(
        self,
        items: Iterable[Any] = (),
        *,
        raw: str = "",
        problems: Iterable[str] = (),
        size_hw: tuple[int, int] | None = None,
        logprob: float = 0.0,
    ) -> None:
        super().__init__(items)
        self.raw = raw
        self.problems = tuple(problems)
        self.size_hw = size_hw
        self.logprob = logprob

    def to_dict(self) -> dict[str, Any]:
        return {
            self._key: [item.to_dict() for item in self],
            "raw": self.raw,
            "problems": list(self.problems),
            "size_hw": list(self.size_hw) if self.size_hw else None,
        }

    def filtered(self, min_score: float) -> Any:
        """The same list with the items of at least this score."""
        kept = [item for item in self if item.score >= min_score]
        return type(self)(kept, raw=self.raw, problems=self.problems, size_hw=self.size_hw, logprob=self.logprob)

    _key = "items"


class Detections(_ResultList):
    """A list of `Detection` with `.raw`, `.problems` and the picture's `.size_hw`."""

    _key = "detections"


class Segments(_ResultList):
    """A list of `Segment` with `.raw`, `.problems` and the picture's `.size_hw`."""

    _key = "segments"


def mask_to_rle(mask: BoolMask) -> dict[str, Any]:
    """A bool[H, W] mask as an uncompressed COCO run-length encoding: column-major counts, background first."""
    flat = np.asarray(mask, dtype=bool).T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    bounds = np.concatenate([[0], edges, [flat.size]])
    counts = np.diff(bounds).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": [int(c) for c in counts]}


def mask_from_rle(rle: dict[str, Any]) -> BoolMask:
    """Inverse of `mask_to_rle`."""
    height, width = rle["size"]
    values = np.arange(len(rle["counts"])) % 2 == 1
    flat = np.repeat(values, rle["counts"])
    return flat.reshape(width, height).T


def pack_counts(counts: Sequence[int]) -> str:
    """Run lengths as COCO's compressed text: differences to the run before last, five bits a character.

    Source: pycocotools `maskApi.c`, rleToString.
    """
    characters = []
    for i, count in enumerate(counts):
        x = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            low, x = x & 0x1F, x >> 5
            more = x != (-1 if low & 0x10 else 0)
            characters.append(chr(48 + (low | 0x20 if more else low)))
    return "".join(characters)


def unpack_counts(text: str) -> list[int]:
    """Inverse of `pack_counts`.

    Raises:
        ValueError: not such a text.
    """
    counts: list[int] = []
    x = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"{character!r} is no character of a run-length encoding")
        x |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                x -= 1 << shift
            counts.append(x + counts[-2] if len(counts) > 2 else x)
            x = shift = 0
    if shift:
        raise ValueError("a run-length encoding that ends in the middle of a number")
    return counts
