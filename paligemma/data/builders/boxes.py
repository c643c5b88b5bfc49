"""Builders whose answers have boxes: `detect a ; b`, with or without noise boxes, and `segment a ; b`.

    detect cat ; dog     ->  <loc0123><loc0045><loc0567><loc0890> cat ; <loc…> dog
    segment cat          ->  <loc0123><loc0045><loc0567><loc0890> <seg000>x16 cat
    the cat on the left  ->  <loc0123><loc0045><loc0567><loc0890><seg000>x16                 referring=True

Things are listed in the chosen order whatever their labels; what is asked for but not there is not listed, and an empty
answer ends at once. Regions of many (`is_crowd`) are left out, but what they are called is never asked for as absent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from paligemma.data.builders.base import (
    Choice,
    Order,
    Turn,
    absent_labels,
    arranged,
    check_choice,
    check_count,
    check_reads,
    example_of,
    key_of,
    known_size,
    naming,
    pick,
    record_of,
    unique,
    without_crowds,
)
from paligemma.data.builders.noise import noise_boxes
from paligemma.data.example import Example
from paligemma.data.record import Instance, Mask, Record
from paligemma.errors import DataError, OptionError, TaskError, nearest
from paligemma.results import Detection, Segment
from paligemma.tasks.base import MaskDecoder, MaskEncoder, SizeHw
from paligemma.tasks.coords import bins_to_box, box_to_norm
from paligemma.tasks.detection import DetectTask
from paligemma.tasks.grammar import SEPARATOR, Entry, check_area, check_label, check_labels, parse_entries
from paligemma.tasks.masks import crop_mask, paste_mask, pixel_box
from paligemma.tasks.segmentation import SegmentTask

Ask = Literal["present", "all"]


@dataclass(frozen=True, kw_only=True)
class _Things:
    """What `detect` and `segment` have in common.

    Attributes:
        order: of the things in the answer. "random": PaliGemma 2 report, appendix C, and Pix2Seq's best; "raster":
            lines from the top; "source"; "area": largest first. The order of pre-training is not published.
        ask: "present": the labels of what is listed, in random order; "all": all class names of the data set, in its
            order.
        n_absent: with "present", so many class names of the data set that nothing in the picture goes by, mixed in;
            fewer where there are fewer. Ours.
        max_objects: most things in an answer; others are left out at random, and a label that loses all of its things
            is not asked for. None: any number.
        prefix: the whole prompt instead, such as "detect all classes" (PaliGemma 2 report, appendix C).
    """

    order: Order = "random"
    ask: Ask = "present"
    n_absent: int = 0
    max_objects: int | None = None
    prefix: str | None = None

    def __post_init__(self) -> None:
        check_choice("order", self.order, Order)
        check_choice("ask", self.ask, Ask)
        check_count("n_absent", self.n_absent)
        check_count("max_objects", self.max_objects, 1)
        if self.n_absent and (self.ask == "all" or self.prefix is not None):
            raise OptionError(
                f"n_absent={self.n_absent} with ask={self.ask!r} and prefix={self.prefix!r}: expected ask='present' "
                "and no prefix, where labels are drawn. Leave one of them out."
            )
        if self.prefix is not None and not self.prefix.strip():
            raise OptionError(f"prefix={self.prefix!r}: expected a prompt of a word or more, or None.")

    def _kept(self, usable: list[Instance], rng: np.random.Generator) -> list[Instance]:
        """At most `max_objects` of them, in `order`."""
        if self.max_objects is not None and len(usable) > self.max_objects:
            usable = [usable[i] for i in sorted(rng.choice(len(usable), self.max_objects, replace=False).tolist())]
        return [usable[i] for i in arranged([item.box_xyxy_px for item in usable], self.order, rng)]

    def _prompt(
        self, verb: str, record: Record, kept: list[Instance], labels: Sequence[str], rng: np.random.Generator
    ) -> str | None:
        """The prompt; None where there is nothing to ask for."""
        present = unique([item.label for item in kept])
        if self.prefix is not None:
            for label in present:
                check_label(label)
            return self.prefix
        if self.ask == "all":
            if not labels:
                raise DataError(
                    f"{record.where}: ask='all' names all classes of the data set: expected some, found none. Hand in "
                    "labels, or use ask='present'."
                )
            unknown = [label for label in present if label not in labels]
            if unknown:
                raise DataError(
                    f"{record.where}: the label {unknown[0]!r} is none of the data set's {len(labels)} classes: "
                    f"expected one of those that are asked for. Rename it.{nearest(unknown[0], labels)}"
                )
            # What is there and not listed (regions of many, slivers, what was too much) must not look absent.
            unsaid = ({item.label for item in record.instances} | set(record.hidden)) - set(present)
            names = [label for label in unique(labels) if label not in unsaid]
            return f"{verb} {check_labels(names)}" if names else None
        asked = present
        if self.n_absent:
            absent = absent_labels(record, labels)
            drawn = rng.choice(len(absent), min(self.n_absent, len(absent)), replace=False).tolist() if absent else []
            asked = present + [absent[i] for i in drawn]
        if not asked:
            return None
        return f"{verb} {check_labels([asked[i] for i in rng.permutation(len(asked))])}"

    def _reads(self, verb: str, prefix: str) -> bool:
        return prefix == self.prefix or (prefix.startswith(f"{verb} ") and bool(prefix.removeprefix(verb).strip()))


@dataclass(frozen=True, kw_only=True)
class DetectBuilder(_Things):
    """`detect {thing} ; {thing}` -> boxes with labels (Pix2Seq-like; PaliGemma report, 3.2.5), and noise boxes.

    Attributes:
        n_noise: noise boxes after the real ones (`noise.py` has the scheme). 0: none, as in pre-training.
        fill_to: noise boxes until there are so many things in all, as in PaliGemma 2, appendix C.
        noise_label: their class word. The report spells `<noise>`; labels of this grammar have no `<`, so it is a plain
            word, and a record with a thing of that name is refused.
        jittered: share of noise boxes that are moved copies of real ones; the others are anywhere. Ours: Pix2Seq's
            code draws the share.

    The places of noise boxes stand in `Example.unlearned`: the word is learned, the place is not.
    """

    n_noise: int = 0
    fill_to: int | None = None
    noise_label: str = "noise"
    jittered: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_noise", self.n_noise)
        check_count("fill_to", self.fill_to, 1)
        if self.n_noise and self.fill_to is not None:
            raise OptionError(f"n_noise={self.n_noise} and fill_to={self.fill_to}: expected one of them.")
        if not 0 <= self.jittered <= 1:
            raise OptionError(f"jittered={self.jittered!r}: expected a share in 0…1.")
        try:
            check_label(self.noise_label, "noise_label")
        except TaskError as error:
            raise OptionError(str(error)) from None

    @property
    def has_noise(self) -> bool:
        return self.n_noise > 0 or self.fill_to is not None

    @property
    def name(self) -> str:
        return "detect_noise" if self.has_noise else "detect"

    @property
    def needs(self) -> str:
        return "instances"

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None where there is nothing to ask for."""
        kept = self._kept(without_crowds(record), rng)
        with naming(record.where):
            prompt = self._prompt("detect", record, kept, labels, rng)
            if prompt is None:
                return None
            size_hw = known_size(record) if kept or self.has_noise else (1, 1)
            found = [Detection(item.label, item.box_xyxy_px, 1.0) for item in kept]
            suffix = DetectTask().suffix(found, size_hw)
            if not self.has_noise:
                return example_of(record, prompt, suffix)
            if any(item.label == self.noise_label for item in kept):
                raise DataError(
                    f"a thing is called {self.noise_label!r} as noise is: expected another word. Choose noise_label."
                )
        n = self.n_noise if self.fill_to is None else max(0, self.fill_to - len(kept))
        boxes = noise_boxes(n, [item.box_xyxy_px for item in kept], size_hw, rng, jittered=self.jittered)
        noise = DetectTask().suffix([Detection(self.noise_label, box, 1.0) for box in boxes], size_hw)
        whole = SEPARATOR.join(part for part in (suffix, noise) if part)
        start = len(whole) - len(noise)
        spans = tuple((start + entry.box_span[0], start + entry.box_span[1]) for entry in parse_entries(noise)[0])
        return example_of(record, prompt, whole, spans)

    def reads(self, prefix: str) -> bool:
        return self._reads("detect", prefix)

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """The boxes in their order, without noise: what is not learned, and, with noise on, what has its label."""
        check_reads(self, example)
        unlearned = {tuple(span) for span in example.unlearned}
        entries = [
            entry
            for entry in _entries(example)
            if entry.box_span not in unlearned and not (self.has_noise and entry.label == self.noise_label)
        ]
        label = "" if example.prefix == self.prefix else _asked_for(example.prefix, "detect")
        with naming(example.where):
            return record_of(example, size_hw, instances=_instances(entries, size_hw, None, label))


@dataclass(frozen=True, kw_only=True)
class SegmentBuilder(_Things):
    """`segment {thing} ; {thing}` -> boxes, masks and labels (PaliGemma report, 3.2.5).

    Attributes:
        mask_encoder: float32[n, 64, 64] in [0, 1] -> int[n, 16], such as `MaskVae.encode_array`; needed to build.
        without_mask: a thing without mask is an error ("raise") or left out ("skip").
        referring: the form of the RefCOCO transfer (big_vision, `refcoco_seg.py`): the prompt is the bare label of one
            thing, its expression, and the answer has neither spaces nor label. Things with the same label are all
            listed.
        choice: with referring, which of several labels: "cycle" over epochs, "random" or "first".
        spaced: without referring, one space between box and mask, as the mix models answer.
    """

    mask_encoder: MaskEncoder | None = None
    without_mask: Literal["raise", "skip"] = "raise"
    referring: bool = False
    choice: Choice = "cycle"
    spaced: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("without_mask", self.without_mask, Literal["raise", "skip"])
        check_choice("choice", self.choice, Choice)
        if self.referring and (self.ask == "all" or self.n_absent or self.prefix is not None):
            raise OptionError(
                "referring=True with ask, n_absent or prefix: expected the prompt to be the expression alone. Leave "
                "them out."
            )

    @property
    def name(self) -> str:
        return "referring" if self.referring else "segment"

    @property
    def needs(self) -> str:
        return "instances with masks"

    def build(
        self, record: Record, rng: np.random.Generator, labels: Sequence[str] = (), *, turn: Turn | None = None
    ) -> Example | None:
        """The example; None where there is nothing to ask for."""
        if self.mask_encoder is None:
            raise OptionError(
                f"'{self.name}' without mask_encoder: expected a function float32[n, 64, 64] -> int[n, 16] such as "
                "MaskVae.encode_array. Hand it in."
            )
        usable = self._with_masks(record)
        if self.referring:
            expressions = unique([item.label for item in usable])
            if not expressions:
                return None
            chosen = expressions[pick(len(expressions), self.choice, rng, turn, key_of(record, self.name))]
            usable = [item for item in usable if item.label == chosen]
        kept = self._kept(usable, rng)
        with naming(record.where):
            task = SegmentTask(referring=self.referring, spaced=self.spaced and not self.referring)
            prompt = task.prefix(chosen) if self.referring else self._prompt("segment", record, kept, labels, rng)
            if prompt is None:
                return None
            found = [
                Segment(item.label, item.box_xyxy_px, item.mask.pixels(), 1.0) for item in kept if item.mask is not None
            ]
            size_hw = known_size(record) if kept else (1, 1)
            return example_of(record, prompt, task.suffix(found, size_hw, mask_encoder=self.mask_encoder))

    def turns(self, record: Record) -> int:
        """How many turns ask for all of a record's expressions once."""
        if not self.referring or self.choice != "cycle":
            return 1
        return len(unique([item.label for item in self._usable(record)]))

    def _usable(self, record: Record) -> list[Instance]:
        """Single things with a mask; one thinner than a pixel is none, where such are left out."""
        found = [item for item in without_crowds(record) if item.mask is not None]
        with naming(record.where):
            return [item for item in found if _has_pixels(item)] if self.without_mask == "skip" else found

    def _with_masks(self, record: Record) -> list[Instance]:
        single, usable = without_crowds(record), self._usable(record)
        if self.without_mask == "raise" and len(usable) < len(single):
            lacking = ((i, x) for i, x in enumerate(record.instances) if x.mask is None and not x.is_crowd)
            i, first = next(lacking)
            raise DataError(
                f"{record.where}: {len(single) - len(usable)} of {len(single)} instances have no mask, the first is "
                f"instance {i} {first.label!r}: expected a mask for each. Leave them out with without_mask='skip'."
            )
        return usable

    def reads(self, prefix: str) -> bool:
        return bool(prefix.strip()) and SEPARATOR not in prefix if self.referring else self._reads("segment", prefix)

    def read(self, example: Example, size_hw: SizeHw, *, mask_decoder: MaskDecoder | None = None) -> Record:
        """Boxes and masks in their order; a label that the answer leaves out is the prompt's expression."""
        check_reads(self, example)
        label = example.prefix if self.referring else _asked_for(example.prefix, "segment")
        with naming(example.where):
            found = _instances(_entries(example), size_hw, mask_decoder, "" if example.prefix == self.prefix else label)
        return record_of(example, size_hw, instances=found)


def _has_pixels(item: Instance) -> bool:
    """Whether a mask has a pixel inside its box."""
    if item.mask is None:
        return False
    pixels = item.mask.pixels()
    return bool(crop_mask(pixels, box_to_norm(item.box_xyxy_px, (pixels.shape[0], pixels.shape[1]))).any())


def _asked_for(prefix: str, verb: str) -> str:
    """The one thing that a prompt asks for; "" where it asks for several."""
    names = [name.strip() for name in prefix.removeprefix(f"{verb} ").split(SEPARATOR.strip())]
    return names[0] if len(names) == 1 and prefix.startswith(f"{verb} ") else ""


def _entries(example: Example) -> list[Entry]:
    """The objects of an answer.

    Raises:
        DataError: the answer holds anything else.
    """
    entries, problems = parse_entries(example.suffix)
    valid, no_area = check_area(example.suffix, entries)
    if problems or no_area:
        raise DataError(
            f"{example.where}: {(*problems, *no_area)[0]}: expected boxes with labels, joined by ' ; '. Mend the "
            "suffix."
        )
    return valid


def _instances(
    entries: Sequence[Entry], size_hw: SizeHw, mask_decoder: MaskDecoder | None, label: str = ""
) -> tuple[Instance, ...]:
    """Boxes in pixels; masks where the answer has codes and a decoder was handed in.

    Args:
        label: of those that the answer leaves without one.

    Raises:
        DataError: neither the answer nor the prompt says what a box is.
    """
    if not label and any(not entry.label for entry in entries):
        raise DataError("a box without a label: expected boxes with labels, joined by ' ; '. Mend the suffix.")
    boxes = [bins_to_box(entry.bins, size_hw) for entry in entries]
    masks: dict[int, Mask] = {}
    coded = [i for i, entry in enumerate(entries) if entry.codes is not None]
    if coded and mask_decoder is not None:
        maps = mask_decoder(np.array([entries[i].codes for i in coded], np.int64))
        for i, map_64 in zip(coded, maps, strict=True):
            if pixel_box(boxes[i], size_hw, edges="round") is not None:  # "round" gives back boxes of whole pixels
                masks[i] = Mask.of(paste_mask(map_64, boxes[i], size_hw, edges="round"))
    return tuple(
        Instance(entry.label or label, box, masks.get(i))
        for i, (entry, box) in enumerate(zip(entries, boxes, strict=True))
    )
