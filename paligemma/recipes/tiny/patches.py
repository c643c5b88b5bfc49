"""What lies in each patch: the lesson that the image tower has before the decoder asks it anything.

A released PaliGemma starts from a tower that has seen billions of pictures. `tiny` has none, and a decoder that reads
meaningless image tokens learns nothing about places for thousands of steps. So every image token is first taught to
name the thing that owns its patch: shape, colour, mask codes, and the four edges of its box, as plain numbers and
through the decoder's own location rows, which puts image tokens and location tokens into one language. The heads are
thrown away afterwards.

Two beginnings decide whether places are learned at all. Position embeddings start as waves of the grid, large enough to
be heard beside the pixels: from small random ones nothing about edges was learned in 400 steps. Location rows start as
waves of the coordinate, slow ones strongest: neighbours begin alike.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from paligemma.config import PaliGemmaConfig
from paligemma.data.world import COLOURS, SHAPES, Question, Rendering, Scene
from paligemma.models.mask_vae import N_SEG
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.models.siglip import SiglipTower
from paligemma.tasks.coords import N_LOC, box_to_norm, encode_coord, on_step

KINDS = (*SHAPES, "text", "nothing")
MIN_SHARE = 0.2  # of a patch that a thing must cover to own it


@dataclass(frozen=True)
class PatchTargets:
    kind: Tensor  # int64[I, P] into KINDS
    colour: Tensor  # int64[I, P] into COLOURS, -1 where there is nothing
    edges: Tensor  # int64[I, P, 4] bins of the box: top, left, bottom, right
    codes: Tensor  # int64[I, P, 16] codes of the mask, -1 where there is no shape


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


def asked_about(scene: Scene, question: Question, owner: NDArray[np.int64]) -> NDArray[np.float32]:
    """float[P]: 1 on patches of things that a question is about."""
    if not isinstance(question.answer, str):
        about = [i for _, i in question.answer]
    else:
        coloured = {
            f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" in question.prefix
        }
        about = [
            i
            for i, thing in enumerate(scene.things)
            if (thing.name in coloured if coloured else thing.shape and thing.shape in question.prefix)
        ]
    return np.isin(owner, about).astype(np.float32)


class PatchHeads(nn.Module):
    """Linear readers of image tokens, used while teaching only.

    Half-way through the decoder, image tokens have seen the prompt: `asked` tells whether they noticed that it is about
    them, which is what a suffix token has to look for.
    """

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        width = config.text.width
        self.tokens = config.tokens
        self.kind = nn.Linear(width, len(KINDS))
        self.colour = nn.Linear(width, len(COLOURS))
        self.edges = nn.Linear(width, 4 * width)
        self.sides = nn.Linear(width, 4)
        self.asked = nn.Linear(width, 1)
        self.codes = nn.Linear(width, N_SEG * self.tokens.n_seg)

    def loss(
        self, model: PaliGemmaModel, embeds_IPD: Tensor, targets: PatchTargets, sigma: float, loc_step: int = 1
    ) -> dict[str, Tensor]:
        """Mean losses of kinds (all patches), colours and edges (owned patches), and mask codes (those of shapes)."""
        owned = targets.colour >= 0
        found = embeds_IPD[owned]
        is_shape = targets.codes[..., 0] >= 0
        codes = self.codes(embeds_IPD[is_shape]).unflatten(-1, (N_SEG, -1)).flatten(0, 1)
        rows = model.text.embedding.weight[self.tokens.loc_start : self.tokens.loc_start + self.tokens.n_loc]
        edges = targets.edges[owned]
        logits = (self.edges(found).unflatten(-1, (4, -1)) @ rows.T).flatten(0, 1)
        return {
            "kind": F.cross_entropy(self.kind(embeds_IPD).flatten(0, 1).float(), targets.kind.flatten()),
            "colour": F.cross_entropy(self.colour(found).float(), targets.colour[owned]),
            "edges": place_loss(logits, edges.flatten(), 0, sigma, loc_step).mean(),
            "sides": 5 * (self.sides(found).float() - edges / (self.tokens.n_loc - 1)).abs().mean(),
            "codes": F.cross_entropy(codes.float(), targets.codes[is_shape].flatten()),
        }

    def notice(self, hidden_BSD: Tensor, asked_BP: Tensor) -> Tensor:
        """Cross-entropy of noticing, over the image tokens at the head of each row."""
        image = hidden_BSD[:, : asked_BP.shape[1]]
        image = F.rms_norm(image.float(), image.shape[-1:])
        return F.binary_cross_entropy_with_logits(self.asked(image)[..., 0].float(), asked_BP)


@torch.no_grad()
def begin_with_waves(model: PaliGemmaModel) -> None:
    """Start position embeddings and location rows as waves of the coordinate."""
    tokens = model.config.tokens
    position_waves(model.vision)
    model.text.embedding.weight[tokens.loc_start : tokens.loc_start + tokens.n_loc] = place_rows(
        tokens.n_loc, model.config.text.width
    )


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


def place_loss(logits: Tensor, bins: Tensor, loc_start: int, sigma: float, step: int = 1) -> Tensor:
    """Cross-entropy against a normal curve of `sigma` bins around the true bin, minus that curve's entropy.

    A miss by two bins costs little and by two hundred much, which plain cross-entropy does not know. Without the
    entropy, 0 is perfect at every sigma. The curve has its values on every `step`-th bin and the last.
    """
    place = torch.arange(N_LOC, device=bins.device)
    off_step = (place % step != 0) & (place != N_LOC - 1)
    closeness = -((place - bins[:, None]).float() ** 2) / (2 * sigma**2)
    target = torch.softmax(closeness.masked_fill(off_step, -torch.inf), dim=-1)
    logp = F.log_softmax(logits.float(), dim=-1)[:, loc_start : loc_start + N_LOC]
    entropy: Tensor = torch.special.entr(target).sum(dim=-1)
    return -(target * logp).sum(dim=-1) - entropy
