"""Boxes and masks that stand in the texts of an example: read, moved elsewhere, spelled again.

Only the tokens change; spaces, labels and separators stay as the row has them, so that any prompt comes through: mix
models' answers, the unspaced form of RefCOCO, regions to caption, words with boxes.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paligemma.data.example import Example
from paligemma.data.moves import Window, move_box, move_instance, visible_share
from paligemma.data.record import Instance, Mask
from paligemma.results import BoxXyxyPx
from paligemma.tasks.base import MaskDecoder, MaskEncoder, SizeHw
from paligemma.tasks.coords import bins_to_box, box_to_norm, box_to_tokens
from paligemma.tasks.grammar import Entry, check_area, parse_entries
from paligemma.tasks.masks import crop_mask, paste_mask

TOKENS = re.compile(r"<(?:loc[0-9]{4}|seg[0-9]{3})>")
_SEGS = re.compile(r"(?:<seg[0-9]{3}>){16}")


@dataclass(frozen=True)
class Written:
    """The objects of a prompt and of its answer, in their order."""

    asked: tuple[Entry, ...]
    answered: tuple[Entry, ...]

    @property
    def has_masks(self) -> bool:
        return any(entry.codes is not None for entry in self.answered)


@dataclass(frozen=True)
class Places:
    """Where these are in the picture; None for an object of the answer that is gone."""

    asked: tuple[BoxXyxyPx, ...]
    answered: tuple[Instance | None, ...]


def read_written(example: Example) -> Written | None:
    """Where the example's boxes stand; None where some tokens are no box, or nobody knows in which picture they lie."""
    asked, answered = parse_entries(example.prefix)[0], parse_entries(example.suffix)[0]
    n_tokens = len(TOKENS.findall(example.prefix)) + len(TOKENS.findall(example.suffix))
    if n_tokens != 4 * len(asked) + sum(4 if entry.codes is None else 20 for entry in answered):
        return None
    has_no_area = check_area(example.prefix, asked)[1] or check_area(example.suffix, answered)[1]
    # A stretch that counts in no loss is found again only where it is a box.
    boxes = {entry.box_span for entry in answered}
    if has_no_area or (n_tokens and len(example.images) > 1) or not boxes.issuperset(map(tuple, example.unlearned)):
        return None
    return Written(asked, answered)


def places_of(written: Written, size_hw: SizeHw, mask_decoder: MaskDecoder | None) -> Places:
    """The boxes in pixels, and the masks, where there are any, at the size of the picture."""
    boxes = [bins_to_box(entry.bins, size_hw) for entry in written.answered]
    masks: list[Mask | None] = [None] * len(boxes)
    coded = [(i, entry.codes) for i, entry in enumerate(written.answered) if entry.codes is not None]
    if coded and mask_decoder is not None:
        maps = mask_decoder(np.array([codes for _, codes in coded], np.int64))
        for (i, _), map_64 in zip(coded, maps, strict=True):
            masks[i] = Mask.of(paste_mask(map_64, boxes[i], size_hw, edges="round"))
    things = zip(written.answered, boxes, masks, strict=True)
    return Places(
        tuple(bins_to_box(entry.bins, size_hw) for entry in written.asked),
        tuple(Instance(entry.label, box, mask) for entry, box, mask in things),
    )


def move_places(
    places: Places, window: Window, size_hw: SizeHw, min_visible: float, counted: Sequence[bool], where: str
) -> Places | None:
    """All places in the window; None where the prompt's are not all there, or none of the answer's.

    Args:
        counted: the objects of the answer that are there to be learned; noise boxes are not.
    """
    if any(visible_share(box, window, size_hw, where) < max(min_visible, 1e-9) for box in places.asked):
        return None
    answered = tuple(
        None if item is None else move_instance(item, window, size_hw, min_visible, f"{where}: {item.label!r}")
        for item in places.answered
    )
    learned = [item for item, counts in zip(answered, counted, strict=True) if counts]
    if learned and not any(learned):
        return None
    return Places(tuple(move_box(box, window) for box in places.asked), answered)


def spell(
    example: Example, written: Written, places: Places, size_hw: SizeHw, mask_encoder: MaskEncoder | None
) -> Example:
    """The example with its objects at other places; those that are gone are taken out of the answer.

    Args:
        size_hw: of the picture in which the places are.
    """
    prefix = example.prefix
    for entry, box in zip(written.asked, places.asked, strict=True):  # tokens are as long as those they replace
        prefix = prefix[: entry.box_span[0]] + box_to_tokens(box, size_hw) + prefix[entry.box_span[1] :]
    codes = _codes(written, places, size_hw, mask_encoder)
    starts = [entry.box_span[0] for entry in written.answered]
    suffix = example.suffix[: starts[0]] if starts else example.suffix
    unlearned = []
    for i, (entry, item) in enumerate(zip(written.answered, places.answered, strict=True)):
        if item is None:
            continue
        # From its box to the next one, separator included.
        chunk = example.suffix[entry.box_span[1] : starts[i + 1] if i + 1 < len(starts) else None]
        if i in codes:
            chunk = _SEGS.sub(codes[i], chunk, count=1)
        if entry.box_span in map(tuple, example.unlearned):
            unlearned.append((len(suffix), len(suffix) + entry.box_span[1] - entry.box_span[0]))
        suffix += box_to_tokens(item.box_xyxy_px, size_hw) + chunk
    if places.answered and places.answered[-1] is None:
        suffix = re.sub(r"\s*;\s*$", "", suffix)
    return dataclasses.replace(example, prefix=prefix, suffix=suffix, unlearned=tuple(unlearned))


def _codes(written: Written, places: Places, size_hw: SizeHw, mask_encoder: MaskEncoder | None) -> dict[int, str]:
    """The mask tokens of the objects that are left, by their place in the answer."""
    crops = {
        i: crop_mask(item.mask.pixels(), box_to_norm(item.box_xyxy_px, size_hw))
        for i, item in enumerate(places.answered)
        if item is not None and item.mask is not None
    }
    if not crops or mask_encoder is None:
        return {}
    encoded = mask_encoder(np.stack(list(crops.values()))).tolist()
    return {i: "".join(f"<seg{code:03d}>" for code in row) for i, row in zip(crops, encoded, strict=True)}
