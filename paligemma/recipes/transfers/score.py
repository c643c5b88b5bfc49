"""Scores of a transfer's answers, by the metrics that this package has.

What stands in `Transfer.metrics` and not here yet (VQA accuracy, ANLS, relaxed accuracy, accuracies by kind of
question) is told by name in the table; exact match with any of the true answers is given beside it, and called that.
"""

from collections.abc import Sequence

from paligemma.errors import OptionError, ShapeError
from paligemma.metrics.caption import bleu, cider
from paligemma.metrics.segmentation import referring_scores
from paligemma.metrics.text import exact_match
from paligemma.recipes.transfers.base import Row, Transfer, Turn
from paligemma.recipes.transfers.boxes import mask_of, referred_box
from paligemma.recipes.transfers.captions import TRANSFERS as CAPTIONED
from paligemma.recipes.transfers.rows import transfer_of
from paligemma.recipes.transfers.video import TRANSFERS as FILMED
from paligemma.tasks.base import MaskDecoder
from paligemma.tasks.segmentation import read_referring

# Compared without case, as their evaluators do.
LOWER = ("chartqa", "docvqa", "ocrvqa", "pope", "science_qa")
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
    true = [_answers(transfer, row, f"row {i}") for i, row in enumerate(rows)]
    if name in CAPTIONED or (name in FILMED and name.endswith("_cap")):
        values = cider(predictions, true)
        scores = {"CIDEr": sum(values) / len(values) if values else float("nan")}
        return scores | ({"BLEU-4": bleu(predictions, true)[3]} if "BLEU-4" in transfer.metrics else {})
    said = [text.lower() if name in LOWER else text for text in predictions]
    known = [[text.lower() if name in LOWER else text for text in answers] for answers in true]
    nearest = [text if text in answers else answers[0] for text, answers in zip(said, known, strict=True)]
    told = "exact match" if transfer.choose == "only" else "exact match with any"
    return {told: exact_match(said, nearest, literal=True)}


def _answers(transfer: Transfer, row: Row, where: str) -> list[str]:
    pictures = dict.fromkeys(transfer.pictures)  # not needed to compare words
    return transfer.answers({**pictures, **row}, Turn(is_training=False, where=where))[1]


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
