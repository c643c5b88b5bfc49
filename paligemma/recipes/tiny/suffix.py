"""What the picture world answers, as text: places in steps, masks as codes."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from paligemma.data.world import Question, Rendering, Scene
from paligemma.models.mask_vae import N_SEG, MaskVae
from paligemma.results import BoxXyxyPx
from paligemma.tasks.coords import box_to_norm, decode_coord, encode_coord, loc_tokens, on_step
from paligemma.tasks.grammar import format_entries
from paligemma.tasks.masks import crop_mask


@torch.no_grad()
def mask_codes(pictures: Sequence[tuple[Scene, Rendering]], vae: MaskVae) -> list[NDArray[np.int64]]:
    """int64[n_things + 1, 16] of every picture; -1 for texts and, last, for no thing. Encoded in one batch."""
    crops = [_crop(drawn, i) for scene, drawn in pictures for i in scene.shapes]
    found = iter(vae.encode(torch.from_numpy(np.stack(crops))).numpy() if crops else [])
    codes = [np.full((len(scene.things) + 1, N_SEG), -1, np.int64) for scene, _ in pictures]
    for (scene, _), own in zip(pictures, codes, strict=True):
        for i in scene.shapes:
            own[i] = next(found)
    return codes


def _crop(drawn: Rendering, i: int) -> NDArray[np.float32]:
    h, w = drawn.masks[i].shape
    crop: NDArray[np.float32] = crop_mask(drawn.masks[i], box_to_norm(drawn.boxes_xyxy_px[i], (h, w)))
    return crop


def written(question: Question, scene: Scene, drawn: Rendering, codes: NDArray[np.int64], loc_step: int = 1) -> str:
    """The true answer of a question.

    Args:
        codes: of every thing's mask, from `mask_codes`.
        loc_step: places are said in every n-th bin and the last.
    """
    if isinstance(question.answer, str):
        return question.answer
    masks = question.task == "segment"
    return format_entries(
        (place_of(drawn.boxes_xyxy_px[i], scene.size_hw, loc_step), codes[i].tolist() if masks else None, label)
        for label, i in question.answer
    )


def place_of(box_xyxy_px: BoxXyxyPx, size_hw: tuple[int, int], loc_step: int) -> str:
    """The location tokens of a box, on steps."""
    bins = [on_step(encode_coord(side), loc_step) for side in box_to_norm(box_xyxy_px, size_hw)]
    return loc_tokens([decode_coord(index) for index in bins])
