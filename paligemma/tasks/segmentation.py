"""Segmentation: `segment cat` <-> `<loc>x4 <seg>x16 cat ; …`, and referring expressions without the words.

The sixteen mask tokens are codes of a 64 x 64 mask of the box; what turns codes into masks and back is handed in
(`MaskVae.decode_array`, `MaskVae.encode_array`), and is called once per text, for all objects together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from paligemma.errors import TaskError
from paligemma.results import BoolMask, Segment, Segments
from paligemma.tasks.base import MaskDecoder, MaskEncoder, SizeHw, SpanScores, TokenLogprobs, size_of
from paligemma.tasks.coords import DIVISOR, bins_to_box, box_to_norm, box_to_tokens
from paligemma.tasks.grammar import (
    Entry,
    check_area,
    check_label,
    check_labels,
    format_entries,
    parse_entries,
    parse_referring,
)
from paligemma.tasks.masks import Edges, crop_mask, paste_mask, pixel_box


@dataclass(frozen=True, kw_only=True)
class SegmentTask:
    """Boxes, masks and labels.

    Attributes:
        referring: the form of the RefCOCO transfer: the prompt is the bare expression, the answer has no label.
        spaced: whether suffixes have a space between box and mask tokens. Parsing reads both.
    """

    referring: bool = False
    spaced: bool = True

    @property
    def name(self) -> str:
        return "segment"

    def prefix(self, things: str | Iterable[str]) -> str:
        """`segment {thing} ; {thing} ; …`; one string is one thing."""
        return check_labels(things) if self.referring else f"segment {check_labels(things)}"

    def suffix(
        self, result: Iterable[Segment], size_hw: SizeHw | None = None, *, mask_encoder: MaskEncoder | None = None
    ) -> str:
        """One entry per object in the order given.

        Args:
            size_hw: height and width of the original picture; the masks' own size otherwise.
            mask_encoder: float32[n, 64, 64] in [0, 1] -> int[n, 16]; needed as soon as there is an object.

        Raises:
            TaskError: a label that the grammar cannot carry, a box without area, a mask that is not of the picture's
                size or has no pixel inside its box, or no encoder.
        """
        found = list(result)
        if not found:
            return ""
        size = size_of(result, size_hw or getattr(result, "size_hw", None) or found[0].mask.shape)
        if mask_encoder is None:
            raise TaskError(
                "masks need mask_encoder: a function float32[n, 64, 64] -> int[n, 16], e.g. MaskVae.encode_array."
            )
        crops = np.stack([_crop(item, size) for item in found])
        codes = mask_encoder(crops).tolist()
        return format_entries(
            (
                (
                    box_to_tokens(item.box_xyxy_px, size),
                    code,
                    "" if self.referring else check_label(item.label, may_be_empty=True),
                )
                for item, code in zip(found, codes, strict=True)
            ),
            spaced=self.spaced,
        )

    def parse(
        self,
        text: str,
        *,
        size_hw: SizeHw | None = None,
        token_logprobs: TokenLogprobs | None = None,
        mask_decoder: MaskDecoder | None = None,
        divisor: int = DIVISOR,
        edges: Edges = "cut",
    ) -> Segments:
        """Boxes and masks at the size of the original picture, in the order of the text.

        An object whose mask cannot be read (not sixteen mask tokens, no decoder, no size) keeps its box, has an empty
        mask, and is named in `.problems`.

        Args:
            size_hw: height and width of the original picture; None: boxes are fractions, masks are bool[0, 0].
            divisor: 1023 inverts the encoding; 1024 as the references' demos do.
            edges: how boxes become whole pixels of masks; "cut" as in the reference's scores, "round" is nearer.
        """
        scores = SpanScores(text, token_logprobs)
        entries, problems = parse_entries(text)
        valid, no_area = check_area(text, entries)
        size = size_hw or (1, 1)
        boxes = [bins_to_box(entry.bins, size, divisor=divisor) for entry in valid]
        masks, no_mask = _masks(valid, boxes, size_hw, mask_decoder, edges)
        found = (
            Segment(entry.label, box, mask, scores.geometric_mean(*entry.score_span))
            for entry, box, mask in zip(valid, boxes, masks, strict=True)
            if mask is not None
        )
        return Segments(
            found, raw=text, problems=[*problems, *no_area, *no_mask], size_hw=size_hw, logprob=scores.total
        )


def _crop(item: Segment, size_hw: SizeHw) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if tuple(item.mask.shape) != tuple(size_hw):
        raise TaskError(
            f"the mask of {item.label!r} has shape {item.mask.shape}: expected {size_hw}, the picture's size."
        )
    box_to_tokens(item.box_xyxy_px, size_hw)  # refuses a box without area before it is cropped
    crop = crop_mask(item.mask, box_to_norm(item.box_xyxy_px, size_hw))
    if not crop.any():
        raise TaskError(
            f"the mask of {item.label!r} has no pixel inside its box {item.box_xyxy_px}: expected a mask of that box. "
            "Leave the object out, or mend its box."
        )
    return crop


def _masks(
    entries: Sequence[Entry],
    boxes: Sequence[tuple[float, float, float, float]],
    size_hw: SizeHw | None,
    mask_decoder: MaskDecoder | None,
    edges: Edges,
) -> tuple[list[BoolMask | None], list[str]]:
    """A mask per object, None where no whole pixel is in the box, and a sentence per missing mask."""
    masks: list[BoolMask | None] = [np.zeros(size_hw or (0, 0), bool) for _ in entries]
    problems = []
    coded = []
    for i, (entry, box) in enumerate(zip(entries, boxes, strict=True)):
        if size_hw is not None and pixel_box(box, size_hw, edges=edges) is None:
            masks[i] = None
            problems.append(f"a box that holds no whole pixel of {size_hw[1]}×{size_hw[0]}: {entry.label!r} at {box}")
        elif entry.codes is None:
            problems.append(f"a box without sixteen mask tokens, so its mask is empty: {entry.label!r}")
        elif size_hw is None or mask_decoder is None:
            missing = "no picture size" if size_hw is None else "no mask decoder"
            problems.append(f"{missing} was given, so the mask is empty: {entry.label!r}")
        else:
            coded.append((i, entry.codes))
    if coded and mask_decoder is not None and size_hw is not None:
        maps = mask_decoder(np.array([codes for _, codes in coded], np.int64))
        for (i, _), map_64 in zip(coded, maps, strict=True):
            masks[i] = paste_mask(map_64, boxes[i], size_hw, edges=edges)
    return masks, problems


def read_referring(text: str, size_hw: SizeHw, mask_decoder: MaskDecoder) -> Segment | None:
    """The reading that RefCOCO scores use: the first twenty tokens must be four location and sixteen mask tokens.

    Returns:
        The object, without label; None for an answer that counts as invalid: other tokens, a box without area, or one
        that holds no whole pixel.
    """
    entry = parse_referring(text)
    if entry is None or not entry.has_area or entry.codes is None:
        return None
    box = bins_to_box(entry.bins, size_hw)
    if pixel_box(box, size_hw) is None:
        return None
    map_64 = mask_decoder(np.array([entry.codes], np.int64))[0]
    return Segment("", box, paste_mask(map_64, box, size_hw), 1.0)
