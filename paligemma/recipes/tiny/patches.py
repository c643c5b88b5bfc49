"""What lies in each patch: the lesson that the image tower has beside its captions.

A released PaliGemma starts from a tower that has seen billions of pictures. `tiny` has none, and a decoder that reads
meaningless image tokens learns nothing about places for thousands of steps. So the tower is also taught to name the
thing that owns each patch: shape, colour, mask codes, and the four edges of its box.

Two beginnings decide whether places are learned at all. Position embeddings start as waves of the grid, large enough to
be heard beside the pixels: from small random ones nothing about edges was learned in 400 steps. Location rows start as
waves of the coordinate, slow ones strongest: neighbours begin alike.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from paligemma.data.world import COLOURS, SHAPES, Rendering, Scene
from paligemma.models.siglip import SiglipTower
from paligemma.tasks.coords import box_to_norm, encode_coord, on_step

KINDS = (*SHAPES, "text", "nothing")
MIN_SHARE = 0.2  # of a patch that a thing must cover to own it


def patch_owners(scene: Scene, drawn: Rendering, grid: int) -> NDArray[np.int64]:
    """int[P]: the thing that covers most of each patch; `len(scene.things)` where none covers enough."""
    share = np.zeros((len(scene.things) + 1, grid * grid), np.float32)
    share[-1] = MIN_SHARE
    for i, mask in enumerate(drawn.masks):
        picture = Image.fromarray(mask.astype(np.uint8) * 255)
        share[i] = np.asarray(picture.resize((grid, grid), Image.Resampling.BOX), np.float32).reshape(-1) / 255
    owner: NDArray[np.int64] = share.argmax(axis=0)
    return owner


def patch_targets(
    scene: Scene, drawn: Rendering, owner: NDArray[np.int64], codes: NDArray[np.int64], loc_step: int = 1
) -> tuple[NDArray[np.int64], ...]:
    """kind[P], colour[P], edges[P, 4] and codes[P, 16] of one picture, from `codes` [n_things + 1, 16]."""
    names = list(COLOURS)
    kinds = [KINDS.index(thing.shape or "text") for thing in scene.things] + [KINDS.index("nothing")]
    colours = [names.index(thing.colour) for thing in scene.things] + [-1]
    edges = [
        [on_step(encode_coord(side), loc_step) for side in box_to_norm(box, scene.size_hw)]
        for box in drawn.boxes_xyxy_px
    ]
    edges.append([0, 0, 0, 0])
    return np.asarray(kinds)[owner], np.asarray(colours)[owner], np.asarray(edges)[owner], codes[owner]


def place_rows(n: int, width: int) -> Tensor:
    """float[n, width], rows of norm 1: waves of the coordinate, slow ones strongest."""
    half = width // 2
    fading = torch.exp(torch.linspace(math.log(0.25), math.log(10.0), half)).rsqrt().repeat(2)
    return waves(torch.linspace(0, 1, n), half, 0.25, 10.0) * fading / fading.square().sum().div(2).sqrt()


@torch.no_grad()
def position_waves(tower: SiglipTower) -> None:
    """Start position embeddings as waves of the grid."""
    grid, width = tower.config.grid, tower.config.width
    along = waves((torch.arange(grid) + 0.5) / grid, width // 4, 0.25, 4.0)
    both = torch.cat([along[:, None].expand(grid, grid, -1), along[None].expand(grid, grid, -1)], dim=-1)
    tower.position_embedding.copy_(0.5 * both.reshape(grid * grid, width))


def waves(x: Tensor, n: int, slowest: float, fastest: float) -> Tensor:
    """float[len(x), 2n]: sine and cosine of x at n frequencies, in cycles over 0 … 1."""
    frequency = torch.exp(torch.linspace(math.log(slowest), math.log(fastest), n))
    angle = 2 * math.pi * frequency * x[:, None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
