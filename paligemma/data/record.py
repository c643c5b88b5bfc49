"""One picture and everything that people wrote about it, before any prompt is made of it.

A `Record` is what COCO, YOLO and VOC hold and what a builder (`data/builders`) turns into an `Example`: boxes in pixels
of the original picture, masks as they were stored, captions with their language, words, questions with their answers.

    record = Record(images=("a.jpg",), size_hw=(480, 640), instances=(Instance("cat", (10, 20, 110, 220)),))
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paligemma.errors import DataError, MissingExtra
from paligemma.results import BoolMask, BoxXyxyPx, mask_from_rle, mask_to_rle, unpack_counts

Polygon = tuple[float, ...]  # x1, y1, x2, y2, … in pixels
FAR = 1_000_000  # pixels; pycocotools takes memory by the length of an edge, and numbers beyond int stop the process
MOST = 1 << 30  # pixels of a mask: each takes a byte there


@dataclass(frozen=True)
class Mask:
    """A mask as its file stores it: polygons, or a run-length encoding; decoded only when somebody looks.

    Attributes:
        size_hw: of the picture.
        polygons: outlines whose union is the mask; empty for a run-length encoding.
        counts: COCO's run lengths, compressed text or plain numbers; None for polygons.
    """

    size_hw: tuple[int, int]
    polygons: tuple[Polygon, ...] = ()
    counts: str | tuple[int, ...] | None = None

    @classmethod
    def of(cls, mask: BoolMask) -> "Mask":
        """From pixels, bool[H, W]."""
        rle = mask_to_rle(mask)
        return cls((int(mask.shape[0]), int(mask.shape[1])), counts=tuple(rle["counts"]))

    def pixels(self) -> BoolMask:
        """bool[H, W]; polygons are filled by COCO's own rule.

        Raises:
            DataError: run lengths that do not add up to the picture, or a polygon of fewer than three corners or with
                one out of all sight.
            MissingExtra: polygons without pycocotools.
        """
        height, width = self.size_hw
        if self.counts is not None and height * width <= MOST:
            return mask_from_rle({"size": [height, width], "counts": self._runs(self.counts)})
        self.require_sound()
        if not self.polygons:
            return np.zeros(self.size_hw, bool)
        codec = coco_mask()
        outlines = [list(polygon) for polygon in self.polygons]
        return np.asarray(codec.decode(codec.merge(codec.frPyObjects(outlines, height, width))), bool)

    def require_sound(self) -> None:
        """Whether it is a mask of the picture; nothing is drawn.

        Raises:
            DataError: run lengths that do not add up to the picture, a polygon of fewer than three corners or with
                one out of all sight, or a picture that nobody could hold.
        """
        height, width = self.size_hw
        if height * width > MOST:
            message = f"a mask for a picture of {width}×{height}: expected at most {MOST:,} pixels. Is that its size?"
            raise DataError(message, kind="bad mask")
        if self.counts is not None:
            self._runs(self.counts)
        if any(len(polygon) < 6 or len(polygon) % 2 for polygon in self.polygons):
            message = "a polygon of fewer than three corners: expected x1, y1, x2, y2, x3, y3, … in pixels."
            raise DataError(message, kind="bad mask")
        if any(not abs(number) < FAR for polygon in self.polygons for number in polygon):
            message = f"a polygon with a corner {FAR:,} pixels away or farther: expected corners in the picture."
            raise DataError(message, kind="bad mask")

    def _runs(self, counts: str | tuple[int, ...]) -> list[int]:
        height, width = self.size_hw
        try:
            runs = unpack_counts(counts) if isinstance(counts, str) else list(counts)
        except ValueError as error:
            raise DataError(f"a mask that cannot be read ({error}): expected COCO's run lengths.") from None
        if sum(runs) != height * width or any(run < 0 for run in runs):
            raise DataError(
                f"a run-length encoding of {sum(runs):,} pixels for a picture of {width}×{height} = "
                f"{width * height:,}: expected one of the picture's size. Encode the mask again."
            )
        return runs


SHAPE = 0.03  # logarithm of how much two ratios of sides may differ: rounding of a small picture


def same_shape(size_hw: tuple[int, int], other_hw: tuple[int, int]) -> bool:
    """Whether boxes of one size fit the other: the same ratio of sides."""
    (h, w), (height, width) = size_hw, other_hw
    return abs(math.log(h / w * width / height)) <= SHAPE


def require_box(box_xyxy_px: BoxXyxyPx, size_hw: tuple[int, int] | None, name: str) -> None:
    """Whether a box has an area, some of it inside of the picture.

    Args:
        size_hw: of the picture, where it is known.
        name: of row and thing.

    Raises:
        DataError: turned over, or outside.
    """
    x1, y1, x2, y2 = box_xyxy_px
    has_area = x2 > x1 and y2 > y1
    if has_area and (size_hw is None or (x2 > 0 and y2 > 0 and x1 < size_hw[1] and y1 < size_hw[0])):
        return  # nearly all: nothing is put into words
    told = f"{name} at left {x1:g}, top {y1:g}, right {x2:g}, bottom {y2:g}"
    if not has_area:
        raise DataError(f"{told}: expected left < right and top < bottom. Mend the box.", kind="turned-over box")
    height, width = size_hw or (0, 0)
    message = f"{told}, outside of the picture of {width}×{height}: expected it inside. Mend the box."
    raise DataError(message, kind="box outside")


@dataclass(frozen=True)
class Instance:
    """One thing in a picture.

    Attributes:
        box_xyxy_px: left, top, right, bottom.
        mask: None where only the box is known.
        is_crowd: COCO's mark of a region of many; builders leave it out.
    """

    label: str
    box_xyxy_px: BoxXyxyPx
    mask: Mask | None = None
    is_crowd: bool = False


@dataclass(frozen=True)
class Text:
    """A caption of the picture, or of a region of it.

    Attributes:
        style: what prompts ask for it: "caption" (short), "cap" (as web alt-texts are), "describe" (long).
    """

    text: str
    lang: str = "en"
    box_xyxy_px: BoxXyxyPx | None = None
    style: str = "caption"


@dataclass(frozen=True)
class Word:
    """A piece of text in the picture; the box is None where only the text is known."""

    text: str
    box_xyxy_px: BoxXyxyPx | None = None


@dataclass(frozen=True)
class Asked:
    """A question and its true answers, one or several; lang is the question's."""

    question: str
    answers: tuple[str, ...]
    lang: str = "en"


@dataclass(frozen=True)
class Record:
    """What is known about a picture, several pictures, or a clip.

    Attributes:
        images: as in `Example`.
        size_hw: height and width of the first picture in pixels; None where the source does not know it.
        instances, texts, words, questions: in the order of the source.
        hidden: labels of things of which a crop left too little to list them: neither said to be there nor denied.
        id: as the source names it; "" where it does not.
        where: how messages call it: "train.json image 17 (a.jpg)".
        meta: what else the source holds.
    """

    images: tuple[Any, ...]
    size_hw: tuple[int, int] | None = None
    instances: tuple[Instance, ...] = ()
    texts: tuple[Text, ...] = ()
    words: tuple[Word, ...] = ()
    questions: tuple[Asked, ...] = ()
    hidden: tuple[str, ...] = ()
    id: str = ""
    where: str = "the record"
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def written(self) -> tuple[Text | Word, ...]:
        """What stands in words, about the picture or in it."""
        return (*self.texts, *self.words)

    @property
    def boxes(self) -> Iterator[tuple[str, BoxXyxyPx]]:
        """What has a box, with it: things by their label, texts and words by what they say."""
        yield from ((item.label, item.box_xyxy_px) for item in self.instances)
        yield from ((item.text, item.box_xyxy_px) for item in self.written if item.box_xyxy_px is not None)


def coco_mask() -> Any:
    """pycocotools' mask module.

    Raises:
        MissingExtra: not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise MissingExtra("pycocotools", "data", "reading polygons") from None
    return mask
