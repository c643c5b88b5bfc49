"""What a verb asks and how its answer is read: a prompt, and a function from generated text to a typed result.

`VERBS` at the end is the whole list. The formats themselves belong to `paligemma.tasks`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma.config import MaskEdges
from paligemma.errors import OptionError
from paligemma.results import Answer, Choice, Generation
from paligemma.tasks import TASKS, MaskDecoder

# Longest answers in tokens, end of sequence included. The transfers cut captions at 32 (COCO) to 192 (DOCCI), answers
# at 32 to 48. Lists of objects: the models were trained on suffixes of up to 512 tokens.
MAX_NEW_TOKENS = {"caption": 128, "answer": 48, "question": 48, "detect": 512, "segment": 512, "read": 512}
VAE_URL = "https://storage.googleapis.com/big_vision/paligemma/vae-oid.npz"


@dataclass(frozen=True)
class Subject:
    """What is asked about: how large the pictures are, and what turns mask tokens into masks.

    Attributes:
        sizes_hw: height and width of each picture of the example.
        mask_decoder: int[n, 16] → float32[n, 64, 64]; None where there is none.
        mask_edges: how a mask's box becomes whole pixels.
    """

    sizes_hw: tuple[tuple[int, int], ...]
    mask_decoder: MaskDecoder | None = None
    mask_edges: MaskEdges = "round"

    @property
    def size_hw(self) -> tuple[int, int]:
        """The one size that boxes refer to.

        Raises:
            OptionError: pictures of unlike sizes, or none.
        """
        if len(set(self.sizes_hw)) != 1:
            sizes = ", ".join(f"{width}×{height}" for height, width in self.sizes_hw) or "no picture at all"
            raise OptionError(
                f"boxes need one picture, or several of one size: this example has {sizes}. Ask about one at a time."
            )
        return self.sizes_hw[0]


@dataclass(frozen=True)
class Request:
    """One prompt and the reading of its answer.

    Attributes:
        prefix: the prompt.
        read: generated text → result.
        choices: answers to weigh by likelihood; then nothing is generated.
        has_tokens: the prompt holds location tokens, written by us on purpose.
    """

    prefix: str
    read: Callable[[Generation], Any]
    choices: tuple[str, ...] = ()
    has_tokens: bool = False


def _caption(subject: Subject, lang: str = "en", *, box: Sequence[float] | None = None) -> Request:
    if box is None:
        return Request(TASKS["caption"].prefix(lang), _reader("caption", subject))
    if lang != "en":
        raise OptionError(
            f"lang={lang!r} with a box: a region's caption has no language in its prompt. Leave lang out."
        )
    task = "grounded_caption"
    return Request(TASKS[task].prefix(box, subject.size_hw), _reader(task, subject), has_tokens=True)


def _answer(subject: Subject, question: str, *, choices: Iterable[str] | None = None, lang: str = "en") -> Request:
    request = Request(TASKS["answer"].prefix(question, lang), _reader("answer", subject))
    if choices is None:
        return request
    offered = (choices,) if isinstance(choices, str) else tuple(choices)
    if not offered:
        raise OptionError("choices is empty: expected the possible answers, or None for a free answer.")
    twice = next((choice for choice in offered if offered.count(choice) > 1), None)
    if twice is not None:
        raise OptionError(f"choices holds {twice!r} more than once: expected answers that differ. Remove the copies.")
    return Request(request.prefix, request.read, choices=offered)


def _question(subject: Subject, answer: str, *, lang: str = "en") -> Request:
    return Request(TASKS["question"].prefix(answer, lang), _reader("question", subject))


def _detect(subject: Subject, labels: str | Iterable[str], *, min_score: float = 0.0) -> Request:
    return Request(TASKS["detect"].prefix(_labels(labels)), _reader("detect", subject, min_score))


def _segment(subject: Subject, labels: str | Iterable[str], *, min_score: float = 0.0) -> Request:
    if subject.mask_decoder is None:
        raise OptionError(
            "no mask decoder: segment needs the VQ-VAE that turns mask tokens into masks. Put the published file "
            f"beside the weights or give mask_vae=FILE (--mask-vae FILE): {VAE_URL}"
        )
    read = _reader("segment", subject, min_score, edges=subject.mask_edges)
    return Request(TASKS["segment"].prefix(_labels(labels)), read)


def _read(subject: Subject) -> Request:
    return Request(TASKS["read"].prefix(), _reader("read", subject))


VERBS: dict[str, Callable[..., Request]] = {
    "caption": _caption,
    "answer": _answer,
    "question": _question,
    "detect": _detect,
    "segment": _segment,
    "read": _read,
}
_WITH_BOXES = ("detect", "segment", "read")


def check_call(verb: str, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """That a verb takes these arguments.

    Raises:
        OptionError: one is unknown, missing or too many.
    """
    signature = inspect.signature(VERBS[verb])
    try:
        signature.bind(None, *args, **options)
    except TypeError as error:
        takes = ", ".join(list(signature.parameters)[1:]) or "no argument beside the picture"
        raise OptionError(f"batch({verb!r}): {error}; expected {takes}.") from None


def weigh(choices: Sequence[str], logprobs: NDArray[np.floating[Any]]) -> Answer:
    """Given answers by likelihood: best first, probabilities among themselves."""
    logprobs = np.asarray(logprobs, np.float64)
    shares = np.exp(logprobs - logprobs.max())
    shares /= shares.sum()
    order = np.argsort(-logprobs, kind="stable")
    offered = tuple(Choice(choices[i], float(logprobs[i]), float(shares[i])) for i in order)
    return Answer(offered[0].text, offered[0].logprob, offered, raw=offered[0].text)


def _labels(labels: str | Iterable[str]) -> list[str]:
    """A list of labels, or one string in which " ; " stands between them as in the prompt itself."""
    if isinstance(labels, str):
        return [part.strip() for part in labels.split(";") if part.strip()]
    return list(labels)


def _reader(task: str, subject: Subject, min_score: float = 0.0, **options: Any) -> Callable[[Generation], Any]:
    if not 0.0 <= min_score <= 1.0:
        raise OptionError(f"min_score={min_score}: expected a probability between 0 and 1.")
    # Pictures of unlike sizes may be captioned and asked about; words and boxes found in them have no one place.
    size_hw = subject.size_hw if task in _WITH_BOXES else None

    def read(generation: Generation) -> Any:
        result = TASKS[task].parse(
            generation.text,
            size_hw=size_hw,
            token_logprobs=list(zip(generation.pieces, generation.logprobs, strict=True)),
            mask_decoder=subject.mask_decoder,
            **options,
        )
        if task in _WITH_BOXES and generation.finish_reason == "length":
            result = _with_problem(
                result, f"cut after {len(generation.tokens)} tokens: raise max_new_tokens for the rest"
            )
        return result.filtered(min_score) if min_score > 0 else result

    return read


def _with_problem(result: Any, problem: str) -> Any:
    if isinstance(result, list):
        result.problems = (*result.problems, problem)  # type: ignore[attr-defined]
        return result
    return dataclasses.replace(result, problems=(*result.problems, problem))
