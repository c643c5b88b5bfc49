"""Noise boxes for detection: places where nothing is, so that a model learns to say so.

A detector that lists things ends its list too early, because annotations do. Noise boxes after the real ones, with a
class of their own and no loss on their places, let it go on at no cost: at inference the list is never ended, and the
probability of the class word is the confidence. Sources: Pix2Seq (arXiv 2109.10852), PaliGemma 2 report, appendix C.

The scheme is that of Pix2Seq's published code (`data/data_utils.py`), in fractions of the sides:

    jittered  a real box, cut to the picture, each edge moved by t · its side, t ~ truncated normal, σ 0.05, |t| <= 0.1
    random    a middle uniform in the picture, each side |t|, t ~ truncated normal, σ 0.5, |t| <= 1; cut to the picture

Ours: the share of jittered boxes is fixed (there it is uniformly random), and none are shifted copies.
"""

import numpy as np
from numpy.typing import NDArray

from paligemma.results import BoxXyxyPx
from paligemma.tasks.base import SizeHw

JITTER_STD = 0.05  # of the box's side; twice that is the most
RANDOM_STD = 0.5  # of the picture's side; twice that is the most


def noise_boxes(
    n: int,
    boxes_xyxy_px: list[BoxXyxyPx],
    size_hw: SizeHw,
    rng: np.random.Generator,
    *,
    jittered: float = 0.5,
) -> list[BoxXyxyPx]:
    """n boxes inside of the picture, in random order.

    Args:
        boxes_xyxy_px: the real ones, each with a part inside of the picture; without any, all noise is random.
        jittered: share of moved copies of real boxes, rounded down.
    """
    height, width = size_hw
    sides = np.array([width, height, width, height], float)
    n_moved = int(n * jittered) if boxes_xyxy_px else 0
    moved = np.zeros((0, 4))
    if n_moved:
        real = np.clip(np.asarray(boxes_xyxy_px, float) / sides, 0, 1)
        real = real[rng.integers(len(real), size=n_moved)]
        spans = np.tile(real[:, 2:] - real[:, :2], 2)
        moved = real + spans * _truncated_normal(rng, (n_moved, 4), JITTER_STD)
    middles = rng.random((n - n_moved, 2))
    halves = np.maximum(np.abs(_truncated_normal(rng, (n - n_moved, 2), RANDOM_STD)), 1e-3) / 2  # a bin at least
    anywhere = np.concatenate([middles - halves, middles + halves], axis=1)
    boxes = np.clip(np.concatenate([moved, anywhere]), 0, 1) * sides
    return [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in boxes[rng.permutation(n)]]


def _truncated_normal(rng: np.random.Generator, shape: tuple[int, int], std: float) -> NDArray[np.float64]:
    """Normal draws of which those beyond two standard deviations are drawn again."""
    values = rng.standard_normal(shape)
    while (beyond := np.abs(values) > 2).any():
        values[beyond] = rng.standard_normal(int(beyond.sum()))
    return values * std
