"""What lies in each patch: the lesson that the image tower has before the decoder asks it anything.

A released PaliGemma starts from a tower that has seen billions of pictures. `tiny` has none, and a decoder that reads
meaningless image tokens learns nothing about places for thousands of steps. So every image token is first taught to
name the thing that owns its patch: shape, colour, and the four edges of its box. The edges are read out through the
decoder's own location rows, which puts image tokens and location tokens into one language. The heads are thrown away
afterwards.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from paligemma.config import PaliGemmaConfig
from paligemma.data.world import COLOURS, SHAPES, Rendering, Scene
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.tasks.coords import encode_coord

KINDS = (*SHAPES, "text", "nothing")
MIN_SHARE = 0.2  # of a patch that a thing must cover to own it


@dataclass(frozen=True)
class PatchTargets:
    kind: Tensor  # int64[I, P] into KINDS
    colour: Tensor  # int64[I, P] into COLOURS, -1 where there is nothing
    edges: Tensor  # int64[I, P, 4] bins of the box: top, left, bottom, right


def patch_targets(scene: Scene, drawn: Rendering, grid: int) -> tuple[NDArray[np.int64], ...]:
    """kind[P], colour[P] and edges[P, 4] of one picture; a patch belongs to whatever covers most of it."""
    share = np.zeros((len(scene.things) + 1, grid * grid), np.float32)
    share[-1] = MIN_SHARE
    for i, mask in enumerate(drawn.masks):
        picture = Image.fromarray(mask.astype(np.uint8) * 255)
        share[i] = np.asarray(picture.resize((grid, grid), Image.Resampling.BOX), np.float32).reshape(-1) / 255
    owner = share.argmax(axis=0)
    h, w = scene.size_hw
    names = list(COLOURS)
    kinds = [KINDS.index(thing.shape or "text") for thing in scene.things] + [KINDS.index("nothing")]
    colours = [names.index(thing.colour) for thing in scene.things] + [-1]
    edges = [[encode_coord(v) for v in (y1 / h, x1 / w, y2 / h, x2 / w)] for x1, y1, x2, y2 in drawn.boxes_xyxy_px] + [
        [0, 0, 0, 0]
    ]
    return np.asarray(kinds)[owner], np.asarray(colours)[owner], np.asarray(edges)[owner]


class PatchHeads(nn.Module):
    """Linear readers of image tokens, used while teaching only."""

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        width = config.text.width
        self.tokens = config.tokens
        self.kind = nn.Linear(width, len(KINDS))
        self.colour = nn.Linear(width, len(COLOURS))
        self.edges = nn.Linear(width, 4 * width)

    def loss(self, model: PaliGemmaModel, embeds_IPD: Tensor, targets: PatchTargets, sigma: float) -> dict[str, Tensor]:
        """Mean losses of kinds (all patches), colours and edges (owned patches)."""
        owned = targets.colour >= 0
        found = embeds_IPD[owned]
        rows = model.text.embedding.weight[self.tokens.loc_start : self.tokens.loc_start + self.tokens.n_loc]
        read = self.edges(found).unflatten(-1, (4, -1))
        read = F.rms_norm(read.float(), read.shape[-1:])
        logits = (read @ rows.float().T).flatten(0, 1)
        return {
            "kind": F.cross_entropy(self.kind(embeds_IPD).flatten(0, 1).float(), targets.kind.flatten()),
            "colour": F.cross_entropy(self.colour(found).float(), targets.colour[owned]),
            "edges": place_loss(logits, targets.edges[owned].flatten(), 0, sigma).mean(),
        }


def place_loss(logits: Tensor, bins: Tensor, loc_start: int, sigma: float) -> Tensor:
    """Cross-entropy against a normal curve of `sigma` bins around the true bin, minus that curve's entropy.

    A miss by two bins costs little and by two hundred much, which plain cross-entropy does not know. Without the
    entropy, 0 is perfect at every sigma.
    """
    place = torch.arange(1024, device=bins.device, dtype=torch.float32)
    target = torch.softmax(-((place - bins[:, None].float()) ** 2) / (2 * sigma**2), dim=-1)
    logp = F.log_softmax(logits.float(), dim=-1)[:, loc_start : loc_start + 1024]
    entropy: Tensor = torch.special.entr(target).sum(dim=-1)
    return -(target * logp).sum(dim=-1) - entropy
