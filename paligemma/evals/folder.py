"""`paligemma eval FOLDER`: a model on rows of pictures, prompts and true answers, each scored as its prompt asks.

caption …            CIDEr-D, ROUGE-L, BLEU-4; rows of one picture and prompt are references of one caption
answer … question …  exact match, word accuracy; against the nearest of a row's references, where it has several
detect …             AP, AP50
segment …            AP50 of the boxes, mask IoU
ocr                  word accuracy, exact match
anything else        exact match, similarity (1 - edit distance / longer length)
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from paligemma.config import PaliGemmaConfig
from paligemma.data.example import Example
from paligemma.data.sources.folder import require_upright
from paligemma.errors import DataError, OptionError, PaliGemmaError
from paligemma.metrics.caption import bleu, cider, rouge_l
from paligemma.metrics.detection import average_precision
from paligemma.metrics.segmentation import mean_mask_iou
from paligemma.metrics.text import edits, exact_match, mean, plain, word_accuracy
from paligemma.results import Generation
from paligemma.tasks import TASKS

# First word of a prompt -> task that reads its answer.
KINDS = {
    "caption": "caption",
    "answer": "answer",
    "question": "question",
    "detect": "detect",
    "segment": "segment",
    "ocr": "read",
}
RAW = "raw"
MAX_NEW_TOKENS = {"detect": 512, "segment": 512, "read": 512, "caption": 128}


class Model(Protocol):
    """What is asked of a model here; `paligemma.load` gives one."""

    mask_vae: Any

    @property
    def config(self) -> PaliGemmaConfig: ...

    def encode_image(self, image: Any) -> Any: ...

    @property
    def generate(self) -> Callable[..., list[Generation]]: ...


class Rows(Protocol):
    """Examples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True)
class Prediction:
    """One row and what the model answered."""

    where: str
    kind: str
    prefix: str
    suffix: str
    answer: str


@dataclass(frozen=True)
class FolderReport:
    """Scores by kind of prompt, 0..1 but CIDEr (0..10), higher better, and every answer behind them.

    Attributes:
        scores: kind -> metric -> value; nan where a metric has nothing to say.
        n_rows: kind -> rows.
        predictions: in the order of the rows.
        broken: what was wrong with rows that were left out.
        metas: what else the rows held, in the order of the predictions.
    """

    scores: dict[str, dict[str, float]]
    n_rows: dict[str, int]
    predictions: tuple[Prediction, ...] = field(repr=False)
    broken: tuple[str, ...] = ()
    metas: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    @property
    def headline(self) -> float:
        """One number: the mean over kinds of each one's first metric, CIDEr divided by ten."""
        first = [_unit(*next(iter(metrics.items()))) for metrics in self.scores.values() if metrics]
        known = [value for value in first if not math.isnan(value)]
        return sum(known) / len(known) if known else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON types; nan as None."""
        return {
            kind: {"rows": self.n_rows[kind], **{name: None if math.isnan(v) else v for name, v in metrics.items()}}
            for kind, metrics in self.scores.items()
        }

    def table(self) -> str:
        """The scores as plain text, a line per metric."""
        lines = [f"{'':<28}{'score':>9}{'rows':>8}"]
        for kind, metrics in self.scores.items():
            for i, (name, value) in enumerate(metrics.items()):
                shown = "-" if math.isnan(value) else f"{value:.3f}"
                lines.append(f"{f'{kind}: {name}':<28}{shown:>9}{self.n_rows[kind] if not i else '':>8}")
        return "\n".join(lines)


def _unit(name: str, value: float) -> float:
    return value / 10 if name == "CIDEr" else value


def kind_of(prefix: str) -> str:
    """Which task reads the answer to a prompt."""
    return KINDS.get(prefix.split(" ", 1)[0].strip().lower(), RAW)


def evaluate_folder(
    model: Model,
    rows: Rows,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    n_beams: int = 1,
    skip_broken: bool = False,
    progress: bool = True,
) -> FolderReport:
    """Ask every row's prompt and score the answers.

    Args:
        model: what `paligemma.load` returns.
        rows: with prompts and true suffixes.
        limit: only the first so many rows.
        batch_size: pictures in memory at a time; scores do not depend on it.
        max_new_tokens: longest answer; default by task.
        n_beams: of the search; 1 is greedy.
        skip_broken: leave out rows that cannot be read and tell of them, instead of stopping.
        progress: draw a bar on stderr.

    Raises:
        DataError: a row that cannot be read.
        OptionError: a limit or batch size below 1, or masks to compare without a mask decoder.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise OptionError(f"{name}={value}: expected at least 1.")
    n = len(rows) if limit is None else min(limit, len(rows))
    found: list[Prediction] = []
    groups: dict[str, _Group] = {}
    broken: list[str] = []
    metas: list[Mapping[str, Any]] = []
    with tqdm(total=n, desc="eval", unit=" rows", disable=not progress, delay=2) as bar:
        for start in range(0, n, batch_size):
            chunk = []
            for index in range(start, min(start + batch_size, n)):
                try:
                    example = rows[index]
                    chunk.append((example, _encoded(model, example)))
                except PaliGemmaError as error:
                    if not skip_broken:
                        raise
                    broken.append(str(error))
            for kind in dict.fromkeys(kind_of(example.prefix) for example, _ in chunk):
                if kind == "segment" and model.mask_vae is None:
                    raise OptionError("rows ask to segment, and the model has no mask decoder: give mask_vae=FILE.")
                mine = [(example, handle) for example, handle in chunk if kind_of(example.prefix) == kind]
                answers = model.generate(
                    [handle for _, handle in mine],
                    [example.prefix for example, _ in mine],
                    max_new_tokens=max_new_tokens or MAX_NEW_TOKENS.get(kind, 64),
                    batch_size=batch_size,
                    n_beams=n_beams,
                    allow_special=True,  # a prompt may hold location tokens
                )
                group = groups.setdefault(kind, _Group(kind))
                for (example, handle), answer in zip(mine, answers, strict=True):
                    group.add(example, handle, answer, model)
                    found.append(Prediction(example.where, kind, example.prefix, example.suffix, answer.text))
                    metas.append(example.meta)
            bar.update(min(start + batch_size, n) - start)
    return FolderReport(
        {kind: group.scores() for kind, group in groups.items()},
        {kind: group.n for kind, group in groups.items()},
        tuple(found),
        tuple(broken),
        tuple(metas),
    )


def _encoded(model: Model, example: Example) -> Any:
    if not example.images:
        return None
    if example.size_hw is not None and model.config.processing.exif_orientation:
        require_upright(example.images[0], example.size_hw, example.where)
    try:
        return model.encode_image(list(example.images))
    except PaliGemmaError as error:
        raise DataError(f"{example.where}: {error}") from None


class _Group:
    """Rows of one kind, as its metrics want them."""

    def __init__(self, kind: str) -> None:
        self.kind, self.n = kind, 0
        self.said: list[Any] = []
        self.true: list[Any] = []
        self._captions: dict[tuple[Any, ...], int] = {}

    def add(self, example: Example, handle: Any, answer: Generation, model: Model) -> None:
        self.n += 1
        if self.kind == "caption":
            key = (tuple(_named(image) for image in example.images), example.prefix)
            if key in self._captions:
                known = self.true[self._captions[key]]
                known += [text for text in example.references if len(example.references) == 1 or text not in known]
                return
            self._captions[key] = len(self.said)
            self.said.append(answer.text)
            self.true.append(list(example.references))
        elif self.kind in ("detect", "segment"):
            decoder = None if model.mask_vae is None else model.mask_vae.decode_array
            size_hw = handle.sizes_hw[0] if handle is not None else (1, 1)
            pieces = list(zip(answer.pieces, answer.logprobs, strict=True))
            task = TASKS[self.kind]
            self.said.append(task.parse(answer.text, size_hw=size_hw, token_logprobs=pieces, mask_decoder=decoder))
            self.true.append(task.parse(example.suffix, size_hw=size_hw, mask_decoder=decoder))
        else:
            self.said.append(answer.text.strip())
            self.true.append(_nearest(self.said[-1], example.references))

    def scores(self) -> dict[str, float]:
        return _SCORES.get(self.kind, _raw_scores)(self.said, self.true)


def _nearest(said: str, references: Sequence[str]) -> str:
    """The reference that an answer is scored against."""
    if len(references) == 1:
        return references[0]
    return min(references, key=lambda text: (plain(text) != plain(said), edits(text.split(), said.split())))


def _named(image: Any) -> str:
    """What tells one picture from another: its path, or its content."""
    if isinstance(image, str | os.PathLike):
        return str(image)
    data = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _caption_scores(said: Sequence[str], true: Sequence[Sequence[str]]) -> dict[str, float]:
    return {
        "CIDEr": mean(cider(said, true)),
        "ROUGE-L": mean(rouge_l(said, true)),
        "BLEU-4": bleu(said, true)[3],
        "exact match": mean(
            [float(plain(s) in [plain(t) for t in texts]) for s, texts in zip(said, true, strict=True)]
        ),
    }


def _detect_scores(said: Sequence[Any], true: Sequence[Any]) -> dict[str, float]:
    precision = average_precision(said, true)
    return {"AP50": precision.at(0.5), "AP": precision.mean}


def _segment_scores(said: Sequence[Any], true: Sequence[Any]) -> dict[str, float]:
    return {"mask IoU": mean_mask_iou(said, true).mean, "AP50": average_precision(said, true).at(0.5)}


def _text_scores(said: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    return {"exact match": exact_match(said, true), "word accuracy": word_accuracy(said, true)}


def _read_scores(said: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    said, true = ([TASKS["read"].parse(text).text for text in texts] for texts in (said, true))
    return {"word accuracy": word_accuracy(said, true), "exact match": exact_match(said, true, literal=True)}


def _raw_scores(said: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    near = [1 - edits(s, t) / max(len(s), len(t), 1) for s, t in zip(said, true, strict=True)]
    return {"exact match": exact_match(said, true, literal=True), "similarity": mean(near)}


_SCORES: dict[str, Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]] = {
    "caption": _caption_scores,
    "answer": _text_scores,
    "question": _text_scores,
    "detect": _detect_scores,
    "segment": _segment_scores,
    "read": _read_scores,
    RAW: _raw_scores,
}
