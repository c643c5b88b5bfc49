"""Scores of a transfer's answers, by the metric that its row of the table is reported with, and exact match.

Kinds of questions are told apart where the rows say them: `answer_type` (VQA v2), `question_type` (RSVQA, whose own
metric needs it), `issimple` (TallyQA), `source` (ChartQA: human, augmented).
"""

import math
from collections.abc import Callable, Sequence

from paligemma.api import PaliGemma
from paligemma.errors import OptionError, ShapeError
from paligemma.evals.folder import FolderReport
from paligemma.metrics.answers import anls, as_digits, letter_of, relaxed_match, soft_accuracy, vqa_accuracy
from paligemma.metrics.caption import bleu, cider
from paligemma.metrics.segmentation import referring_scores
from paligemma.metrics.text import mean
from paligemma.recipes.transfers.base import Row, Transfer, Turn
from paligemma.recipes.transfers.boxes import mask_of, referred_box
from paligemma.recipes.transfers.captions import TRANSFERS as CAPTIONED
from paligemma.recipes.transfers.rows import transfer_of
from paligemma.recipes.transfers.video import TRANSFERS as FILMED
from paligemma.tasks.base import MaskDecoder
from paligemma.tasks.segmentation import read_referring

# Compared without case, as their evaluators do. Of POPE they lower-case the answer only; its truth is in lower case.
LOWER = ("chartqa", "docvqa", "infovqa", "ocrvqa", "pope", "science_qa", "stvqa")
STORED = ("simple", "forkme", "vertexai_l4", "notebook")


def score(
    name: str, predictions: Sequence[str], rows: Sequence[Row], *, mask_decoder: MaskDecoder | None = None
) -> dict[str, float]:
    """Scores of answers, 0..1 but CIDEr (0..10; reported numbers are a hundred times that).

    Args:
        predictions: one answer for each row.
        rows: with the transfer's columns, as held out: `Example.meta` has them too.
        mask_decoder: of refcoco_seg.

    Returns:
        metric -> value; {} where the reference only stores the answers.

    Raises:
        ShapeError: unlike numbers. OptionError: no such transfer, or masks without a decoder. DataError: a row without
        the columns.
    """
    transfer = transfer_of(name)
    if len(predictions) != len(rows):
        raise ShapeError(f"{len(predictions)} predictions, {len(rows)} rows: expected as many of both.")
    if name in STORED:
        return {}
    if name == "refcoco_seg":
        return _referring(predictions, rows, mask_decoder)
    asked = [_answers(transfer, row, f"row {i}") for i, row in enumerate(rows)]
    true = [answers for _, answers in asked]
    if name == "coco35l":
        return _by_language(predictions, true, [prefix.removeprefix("caption ") for prefix, _ in asked])
    if name in CAPTIONED or (name in FILMED and name.endswith("_cap")):
        values = cider(predictions, true)
        scores = {"CIDEr": sum(values) / len(values) if values else float("nan")}
        return scores | ({"BLEU-4": bleu(predictions, true)[3]} if "BLEU-4" in transfer.metrics else {})
    lower = name in LOWER
    said = [text.lower() if lower else text for text in predictions]
    known = [[text.lower() if lower else text for text in answers] for answers in true]
    own = _remote_sensing(name) if name in _WORDS else _OWN.get(name)
    scores = {} if own is None else own(said, known, rows)
    told = "exact match" if transfer.choose == "only" else "exact match with any"
    return scores | {told: mean([text in answers for text, answers in zip(said, known, strict=True)])}


def score_report(name: str, report: FolderReport, pg: PaliGemma) -> dict[str, float]:
    """`score` of the answers in a report, masks read by the model's own decoder."""
    decoder = None if pg.mask_vae is None else pg.mask_vae.decode_array
    return score(name, [one.answer for one in report.predictions], report.metas, mask_decoder=decoder)


def _answers(transfer: Transfer, row: Row, where: str) -> tuple[str, list[str]]:
    """Prompt and true answers of a row."""
    pictures = dict.fromkeys(transfer.pictures)  # not needed to compare words
    return transfer.answers({**pictures, **row}, Turn(is_training=False, where=where))


def _by_language(said: Sequence[str], true: Sequence[Sequence[str]], languages: Sequence[str]) -> dict[str, float]:
    """CIDEr of each language, how rare a word is counted inside it, and the mean of the languages.

    One row alone says nothing of how rare its words are: nan, and in no mean.
    """
    found = {}
    for lang in sorted(set(languages)):
        own = [i for i, other in enumerate(languages) if other == lang]
        found[f"CIDEr, {lang}"] = mean(cider([said[i] for i in own], [true[i] for i in own]) if len(own) > 1 else [])
    return {"CIDEr": mean([value for value in found.values() if not math.isnan(value)]), **found}


Scorer = Callable[[Sequence[str], Sequence[Sequence[str]], Sequence[Row]], dict[str, float]]


def _by(kinds: Sequence[str | None], values: Sequence[float], told: str) -> dict[str, float]:
    """The mean of each kind, in alphabetical order; rows without a kind are in none."""
    return {
        f"{told}, {kind}": mean([value for value, own in zip(values, kinds, strict=True) if own == kind])
        for kind in sorted({kind for kind in kinds if kind is not None})
    }


def _said_by(rows: Sequence[Row], name: str) -> list[str | None]:
    return [None if row.get(name) is None else str(row[name]) for row in rows]


def _each(measure: Callable[[str, Sequence[str]], float], told: str, kind: str = "") -> Scorer:
    def score_all(said: Sequence[str], known: Sequence[Sequence[str]], rows: Sequence[Row]) -> dict[str, float]:
        values = [float(measure(text, answers)) for text, answers in zip(said, known, strict=True)]
        return {told: mean(values)} | (_by(_said_by(rows, kind), values, told) if kind else {})

    return score_all


def _soft(said: Sequence[str], known: Sequence[Sequence[str]], rows: Sequence[Row]) -> dict[str, float]:
    """Of rows with a single `answer`, which nobody else can have given, exact match; as the reference has it."""
    values = [
        soft_accuracy(text, answers) if "answers" in row else float(text in answers)
        for text, answers, row in zip(said, known, rows, strict=True)
    ]
    return {"VQA accuracy": mean(values)}


# Kinds of questions that are not answered by a number. Reports leave the others out of a second mean.
_WORDS = {"rsvqa_lr": ("comp", "presence", "rural_urban"), "rsvqa_hr": ("comp", "presence")}


def _remote_sensing(name: str) -> Scorer:
    """Every kind of question counts alike."""

    def score_all(said: Sequence[str], known: Sequence[Sequence[str]], rows: Sequence[Row]) -> dict[str, float]:
        right = [float(text in answers) for text, answers in zip(said, known, strict=True)]
        apart = _by(_said_by(rows, "question_type"), right, "accuracy")
        words = [apart[told] for kind in _WORDS[name] if (told := f"accuracy, {kind}") in apart]
        means = {"mean of kinds, without numbers": words, "mean of kinds": list(apart.values())}
        return {told: mean(values) for told, values in means.items() if values} | apart

    return score_all


def _counts(said: Sequence[str], known: Sequence[Sequence[str]], rows: Sequence[Row]) -> dict[str, float]:
    right = [float(as_digits(text) == as_digits(answers[0])) for text, answers in zip(said, known, strict=True)]
    kinds = [_simple(row.get("issimple")) for row in rows]
    # Numbers in their order, not that of words, and each with its own accuracy: large ones are rare and hard.
    numbers = [as_digits(answers[0]) for answers in known]
    apart = {
        f"accuracy, answer {n}": mean([value for value, own in zip(right, numbers, strict=True) if own == str(n)])
        for n in range(16)
        if str(n) in numbers
    }
    return {"accuracy": mean(right)} | _by(kinds, right, "accuracy") | apart


def _simple(said: object) -> str | None:
    """TallyQA's two kinds, as its `issimple` tells them; -1: nobody said."""
    return "simple" if said in (1, "1") else "complex" if said in (0, "0") else None


def _charts(said: Sequence[str], known: Sequence[Sequence[str]], rows: Sequence[Row]) -> dict[str, float]:
    """Human and augmented questions count alike, where the rows tell them apart."""
    values = [float(relaxed_match(text, answers[0])) for text, answers in zip(said, known, strict=True)]
    kinds = _said_by(rows, "source")
    is_told = set(kinds) <= {"human", "augmented"}  # a source may be anything else, the name of a file too
    apart = _by(kinds, values, "relaxed accuracy") if is_told else {}
    return {"relaxed accuracy": mean(list(apart.values()) if len(apart) > 1 else values)} | apart


def _letters(said: Sequence[str], known: Sequence[Sequence[str]], _rows: Sequence[Row]) -> dict[str, float]:
    found = [letter_of(text) for text in said]
    right = [float(letter == letter_of(answers[0])) for letter, answers in zip(found, known, strict=True)]
    return {"accuracy": mean(right), "without a letter": mean([float(letter is None) for letter in found])}


def _yes_or_no(said: Sequence[str], known: Sequence[Sequence[str]], _rows: Sequence[Row]) -> dict[str, float]:
    right = [float(text in answers) for text, answers in zip(said, known, strict=True)]
    return {"accuracy": mean(right), "valid": mean([float(text in ("yes", "no")) for text in said])}


_OWN: dict[str, Scorer] = {
    **dict.fromkeys(("vqav2", "textvqa"), _each(vqa_accuracy, "VQAv2 accuracy", "answer_type")),
    **dict.fromkeys(("okvqa", "aokvqa_da", "vizwizvqa"), _soft),
    **dict.fromkeys(("docvqa", "infovqa", "stvqa"), _each(anls, "ANLS")),
    "chartqa": _charts, "tallyqa": _counts, "science_qa": _letters, "pope": _yes_or_no,
}  # fmt: skip


def _referring(predictions: Sequence[str], rows: Sequence[Row], mask_decoder: MaskDecoder | None) -> dict[str, float]:
    if mask_decoder is None:
        raise OptionError("refcoco_seg without mask_decoder: expected one such as MaskVae.decode_array. Hand it in.")
    masks = [mask_of(row, f"row {i}") for i, row in enumerate(rows)]
    pixels = [mask.pixels() for mask in masks]
    boxes = [referred_box(row, mask, f"row {i}") for i, (row, mask) in enumerate(zip(rows, pixels, strict=True))]
    found = [read_referring(text, mask.size_hw, mask_decoder) for text, mask in zip(predictions, masks, strict=True)]
    scores = referring_scores(found, pixels, boxes)
    accuracy = {f"box accuracy {threshold:g}": value for threshold, value in scores.box_accuracy.items()}
    return {"mIoU": scores.miou, **accuracy, "invalid": scores.n_invalid / max(1, scores.n_total)}
