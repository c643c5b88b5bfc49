"""Scene -> picture, visible masks and their boxes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paligemma.data.world import raster
from paligemma.data.world.scene import Scene

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Rendering:
    """A drawn scene.

    `image` is uint8[H, W, 3]; `masks` holds bool[H, W] per thing, the part of it that can be seen: no two share a
    pixel; `boxes_xyxy_px` are tight around the masks, in pixel edges (a mask of one pixel at the origin: 0, 0, 1, 1).
    """

    image: NDArray[np.uint8]
    masks: tuple[NDArray[np.bool_], ...]
    boxes_xyxy_px: tuple[Box, ...]


def render(scene: Scene) -> Rendering:
    """Draw a scene; the same scene gives the same pixels."""
    canvas = raster.background(scene.background, scene.size_hw)
    owner = np.full(scene.size_hw, -1, np.int8)
    for index, thing in enumerate(scene.things):
        at = raster.patch(thing, scene.size_hw)
        behind = canvas[at.window]
        behind += (raster.colours(thing, at) - behind) * (at.ink.astype(np.float32) * np.float32(1 / 255))[..., None]
        owner[at.window][at.area] = index
    masks = tuple(owner == index for index in range(len(scene.things)))
    image = (canvas + 0.5).astype(np.uint8)
    return Rendering(image, masks, tuple(_tight_box(mask) for mask in masks))


def _tight_box(mask: NDArray[np.bool_]) -> Box:
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)
