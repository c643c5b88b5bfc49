"""Builders whose answers are words: captions, regions, writing in the picture.

    caption en    cap de    describe en              ->  a cat on a sofa
    caption <loc0123><loc0045><loc0567><loc0890>     ->  a cat
    ocr                                              ->  OPEN 9 TO 5

Outer white space is cut off, as everywhere in prompts and answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from paligemma.data.builders.base import (
    Choice,
    Turn,
    answered_example,
    check_choice,
    check_count,
    check_reads,
    example_of,
    key_of,
    known_size,
    naming,
    pick,
    raster_order,
    record_of,
    unique,
    without_crowds,
)
from paligemma.data.builders.languages import check_language
from paligemma.data.example import Example
from paligemma.data.record import Record, Text, Word
from paligemma.errors import DataError, TaskError
from paligemma.results import BoxXyxyPx
from paligemma.tasks.base import MaskDecoder, SizeHw, plain_text
from paligemma.tasks.caption import CaptionTask, GroundedCaptionTask, Style
from paligemma.tasks.coords import bins_to_box, box_to_tokens
from paligemma.tasks.grammar import SEPARATOR, check_area, check_label, parse_entries


@dataclass(frozen=True, kw_only=True)
class CaptionBuilder:
    """`caption {lang}`, `cap {lang}`, `describe {lang}` -> one of the record's texts of that style.

    Attributes:
        style: "caption": COCO-like (PaliGemma report, 3.2.5); "cap": as web alt-texts are; "describe": longer (both
            from the model card). Texts of regions are left out.
        lang: only texts in this language; None: in any, and the prompt names it.
        choice: which of several texts. "cycle": another one each epoch, in random order, as big_vision's transfers do;
            "random"; "first".
        lower: write in small letters, as the reference's TextCaps transfer does.
    """

    style: Style = "caption"
    lang: str | None = None
    choice: Choice = "cycle"
    lower: bool = False

    def __post_init__(self) -> None:
        check_choice("style", self.style, Style)
        check_choice("choice", self.choice, Choice)
        check_language(self.lang)

    @property
    def name(self) -> str:
        return self.style

    @property
    def needs(self) -> str:
        return f"a text of style '{self.style}'" + (f" in '{self.lang}'" if self.lang else "")

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None without such a text."""
        texts = self._texts(record)
        if not texts:
            return None
        text = texts[pick(len(texts), self.choice, rng, turn, key_of(record, self.name))]
        with naming(record.where):
            prefix = CaptionTask().prefix(text.lang, style=self.style)
            same = [other.text.strip() for other in texts if other.lang == text.lang]
            suffix = plain_text(text.text, "caption")
        return answered_example(record, prefix, suffix, same, lower=self.lower)

    def turns(self, record: Record) -> int:
        """How many turns show all of a record's texts."""
        return len(self._texts(record)) if self.choice == "cycle" else 1

    def _texts(self, record: Record) -> list[Text]:
        return [
            text
            for text in record.texts
            if text.style == self.style and text.box_xyxy_px is None and self.lang in (None, text.lang)
        ]

    def reads(self, prefix: str) -> bool:
        words = prefix.split(" ")
        return len(words) == 2 and words[0] == self.style and bool(words[1]) and "<" not in words[1]

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The text, its language and style."""
        check_reads(self, example)
        lang = example.prefix.split(" ")[1]
        texts = tuple(Text(said, lang, style=self.style) for said in unique(example.references))
        return record_of(example, size_hw, texts=texts)


@dataclass(frozen=True, kw_only=True)
class GroundedCaptionBuilder:
    """`caption <locYMIN><locXMIN><locYMAX><locXMAX>` -> the text of that region (LocCa; PaliGemma report, 3.2.5).

    The prompt names neither language nor style; the example's meta does, as "text_lang" and, where it is no caption, as
    "text_style".

    Attributes:
        lang: only texts in this language; None: in any.
        from_instances: the labels of the record's single things are texts as well, in English.
        choice: which of several regions: "cycle", "random" or "first".
    """

    lang: str | None = None
    from_instances: bool = False
    choice: Choice = "cycle"

    name = "grounded_caption"

    def __post_init__(self) -> None:
        check_choice("choice", self.choice, Choice)
        check_language(self.lang)

    @property
    def needs(self) -> str:
        return "a text or an instance with a box" if self.from_instances else "a text with a box"

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None without a region."""
        regions = self._regions(record)
        if not regions:
            return None
        text, lang, box, style = regions[pick(len(regions), self.choice, rng, turn, key_of(record, self.name))]
        size_hw = known_size(record)
        with naming(record.where):
            prefix = GroundedCaptionTask().prefix(box, size_hw)
            said: dict[str, Any] = {"text_lang": lang}
            if style != "caption":
                said["text_style"] = style
            return example_of(record, prefix, plain_text(text, "caption"), **said)

    def turns(self, record: Record) -> int:
        """How many turns show all of a record's regions."""
        return len(self._regions(record)) if self.choice == "cycle" else 1

    def _regions(self, record: Record) -> list[tuple[str, str, BoxXyxyPx, str]]:
        regions = [(x.text, x.lang, x.box_xyxy_px, x.style) for x in record.texts if x.box_xyxy_px is not None]
        if self.from_instances:
            regions += [(thing.label, "en", thing.box_xyxy_px, "caption") for thing in without_crowds(record)]
        return [region for region in regions if self.lang in (None, region[1])]

    def reads(self, prefix: str) -> bool:
        if not prefix.startswith("caption <loc"):
            return False
        entries, problems = parse_entries(prefix.removeprefix("caption "))
        return len(entries) == 1 and not problems and not entries[0].label and entries[0].codes is None

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The text and its box."""
        check_reads(self, example)
        entries, _ = parse_entries(example.prefix.removeprefix("caption "))
        if flat := check_area(example.prefix, entries)[1]:
            raise DataError(f"{example.where}: {flat[0]}: expected a region with an area. Mend the prefix.")
        lang = str(example.meta.get("text_lang", self.lang or "en"))
        style = str(example.meta.get("text_style", "caption"))
        text = Text(example.suffix.strip(), lang, bins_to_box(entries[0].bins, size_hw), style)
        return record_of(example, size_hw, texts=(text,))


@dataclass(frozen=True, kw_only=True)
class OcrBuilder:
    """`ocr` -> all words in raster order, joined by single spaces; with boxes, `<loc>x4 word ; <loc>x4 word`.

    Words of nothing but white space, such as sources write for what nobody can read, are left out.

    Attributes:
        boxes: words with their boxes. The report of PaliGemma 2 (4.1) has that task without its literal layout; this
            one is ours, the grammar of detection.
        order: "raster": lines from the top, in a line from the left (PaliGemma report, 3.2.5); "source". Where a word
            has no box, the order is the source's.
        max_length: longest answer; None: any. Random words are left out until the rest fits, each equally likely, so
            that the beginning of a page is not favoured (PaliGemma report, 3.2.5). Pieces longer than that alone go
            first, and a record of nothing else is left out.
        length: what `max_length` counts: characters, or tokens with a tokenizer's function.
        unfit: with boxes, a word that holds `;`, `<`, `>` or a newline is an error ("raise") or left out ("skip").
        empty: ask also where there is no word, answered by ending at once; otherwise the builder does not apply, since
            most sources do not say whether anybody looked for words.
    """

    boxes: bool = False
    order: Literal["raster", "source"] = "raster"
    max_length: int | None = None
    length: Callable[[str], int] = len
    unfit: Literal["raise", "skip"] = "raise"
    empty: bool = False

    def __post_init__(self) -> None:
        check_choice("order", self.order, Literal["raster", "source"])
        check_choice("unfit", self.unfit, Literal["raise", "skip"])
        check_count("max_length", self.max_length, 1)

    @property
    def name(self) -> str:
        return "ocr_boxes" if self.boxes else "ocr"

    @property
    def needs(self) -> str:
        return "words with boxes" if self.boxes else "words"

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None without words, unless `empty`."""
        words = [word for word in record.words if word.text.strip()]
        with naming(record.where):
            if self.boxes and self.unfit == "skip":
                words = [word for word in words if _fits(word.text.strip())]
            if not words and not self.empty:
                return None
            placed = [word.box_xyxy_px for word in words if word.box_xyxy_px is not None]
            if self.order == "raster" and len(placed) == len(words):
                words = [words[i] for i in raster_order(placed)]
            if self.boxes:
                size_hw = known_size(record) if words else (1, 1)
                pieces, joint = [_boxed(word, size_hw) for word in words], SEPARATOR
            else:
                pieces, joint = [" ".join(word.text.split()) for word in words], " "
        fitting = self._fitting(pieces, joint, rng)
        if words and not fitting:
            return None  # an empty answer would say that there is nothing to read
        return example_of(record, "ocr", joint.join(fitting))

    def _fitting(self, pieces: list[str], joint: str, rng: np.random.Generator) -> list[str]:
        """What is left when pieces are dropped in random order until the rest is short enough."""
        if self.max_length is None or self.length(joint.join(pieces)) <= self.max_length:
            return pieces
        pieces = [piece for piece in pieces if self.length(piece) <= self.max_length]
        order = rng.permutation(len(pieces))
        low, high = 0, len(pieces)  # so many of the order are kept: the most that fit, found by halving
        while low < high:
            middle = (low + high + 1) // 2
            if self.length(joint.join(pieces[i] for i in sorted(order[:middle]))) <= self.max_length:
                low = middle
            else:
                high = middle - 1
        return [pieces[i] for i in sorted(order[:low])]

    def reads(self, prefix: str) -> bool:
        return prefix == "ocr"

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The words; without boxes, one for each piece between spaces."""
        check_reads(self, example)
        entries, problems = parse_entries(example.suffix)
        if not entries:
            return record_of(example, size_hw, words=tuple(Word(word) for word in example.suffix.split()))
        problems = (*problems, *check_area(example.suffix, entries)[1])
        if problems:
            raise DataError(f"{example.where}: {problems[0]}: expected words with boxes. Mend the suffix.")
        words = tuple(Word(entry.label, bins_to_box(entry.bins, size_hw)) for entry in entries)
        return record_of(example, size_hw, words=words)


def _fits(word: str) -> bool:
    try:
        return bool(check_label(word, "word"))
    except TaskError:
        return False


def _boxed(word: Word, size_hw: SizeHw) -> str:
    text = check_label(word.text.strip(), "word")
    if word.box_xyxy_px is None:
        raise DataError(f"the word {text!r} has no box: expected one for each word. Use boxes=False, or add it.")
    return f"{box_to_tokens(word.box_xyxy_px, size_hw)} {text}"
