"""Captions of pictures: prompt `caption en`, answer one of the row's captions."""

from collections.abc import Mapping
from zlib import crc32

from paligemma.errors import DataError
from paligemma.recipes.transfers.base import (
    BOX,
    CAPTIONS,
    Columns,
    Row,
    Setting,
    Transfer,
    Turn,
    column,
    same,
    text,
    texts,
)

CAPTION = "caption en"
SUMMARIES: Columns = ("summaries", "summary", *CAPTIONS)


def in_a_language(row: Row, turn: Turn) -> tuple[str, list[str]]:
    """Row: {"captions": {"de": […], "en": […], …}}, or {"language": "de", "captions": […]}, several to a picture.

    Of several languages each is as likely as the others; which one a held-out row is about follows from its captions.
    """
    name = column(row, CAPTIONS, turn.where)
    given = row[name]
    if not isinstance(given, Mapping):
        lang = text(row, ("language",), turn.where)
        return f"caption {lang}", texts(row, CAPTIONS, turn.where)
    if not given:
        raise DataError(f"{turn.where}: '{name}' holds no language: expected one or more, as in {{'en': […]}}.")
    languages = sorted(given)
    place = int(turn.rng().integers(len(languages))) if turn.is_training else crc32(repr(given).encode())
    lang = languages[place % len(languages)]
    return f"caption {lang}", texts(given, (lang,), turn.where)


_COCO = same(Setting(epochs=5, lr=1e-5, weight_decay=1e-6))

TRANSFERS = {
    "cococap": Transfer(
        name="cococap", prompt=CAPTION, answer=CAPTIONS, settings=_COCO, beams=2, metrics=("CIDEr",),
        sets=("COCO Karpathy val", "COCO Karpathy test", "NoCaps"),
        final_split="Karpathy train + restval", dflt="lr 1e-4, wd 0",
    ),
    # 5 × 566,435 examples, which are 25 passes over 113,287 pictures; each of the 35 languages as often as the others.
    "coco35l": Transfer(
        name="coco35l", prompt="caption {language}", answer=CAPTIONS, build=in_a_language, passes_over="pictures",
        settings=same(Setting(epochs=25, lr=1e-5, weight_decay=1e-6)),
        metrics=("CIDEr per language, all split into words as English is",),
        sets=("COCO-35L dev, 35 languages", "XM3600, 36 languages"), dflt="lr 1e-4, wd 0, 566,435 examples",
    ),
    "textcaps": Transfer(
        name="textcaps", prompt=CAPTION, answer=CAPTIONS, lower=True, settings=_COCO, beams=3, metrics=("CIDEr",),
        sets=("val",), final_split="train instead of train[:98%]", dflt="wd 0",
    ),
    # The caption is the first sentence, of figures without parts: as the data set has it, nothing is cut here.
    "scicap": Transfer(
        name="scicap", prompt=CAPTION, answer=CAPTIONS, text_length=96,
        settings=same(Setting(epochs=80, lr=3e-5, dropout=0.1, label_smoothing=0.1)), metrics=("CIDEr", "BLEU-4"),
        final_split="train + val",
    ),
    "screen2words": Transfer(
        name="screen2words", prompt=CAPTION, answer=SUMMARIES, text_length=24,
        settings=same(Setting(epochs=10, lr=1e-5, dropout=0.3, label_smoothing=0.2)), metrics=("CIDEr",),
        sets=("dev", "test"), final_split="train + dev",
    ),
    "widgetcap": Transfer(
        name="widgetcap", prompt=CAPTION, answer=CAPTIONS, also=(BOX,), red_box=True, resize="bv_bilinear_aa",
        settings=same(
            Setting(epochs=4, lr=3e-6, weight_decay=3e-7, batch_size=64, dropout=0.1, label_smoothing=0.1)
        ),
        metrics=("CIDEr",), sets=("dev", "test"), final_split="train + dev",
    ),
}  # fmt: skip
