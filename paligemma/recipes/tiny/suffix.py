"""What the picture world answers, as text: places in steps, masks as codes."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from paligemma.data.world import Rendering, Scene
from paligemma.models.mask_vae import N_SEG, MaskVae
from paligemma.tasks.coords import box_to_norm
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
