"""Position embeddings for another resolution."""

import math

import torch.nn.functional as F
from torch import Tensor

from paligemma.errors import ShapeError


def resample_position_embedding(table_PW: Tensor, grid: int) -> Tensor:
    """Stretch a learned g x g position table to grid x grid.

    Linear interpolation with aligned corners: new index i samples the old grid at i * (g - 1) / (grid - 1). This is
    what big_vision does between stages (models/vit.py `resample_posemb`); transformers' `interpolate_pos_encoding`
    is bicubic with other corners and gives other numbers.

    Args:
        table_PW: float[g * g, W], row-major over the patch grid.
        grid: patches per side wanted.

    Returns:
        [grid * grid, W] in the table's dtype, interpolated in float64: float32 source coordinates are off by 1e-5.

    Raises:
        ShapeError: the table is not square.
    """
    rows, width = table_PW.shape
    old = math.isqrt(rows)
    if old * old != rows:
        raise ShapeError(f"position table has {rows} rows: expected a square number (256, 1024, 4096).")
    if old == grid:
        return table_PW
    square = table_PW.double().reshape(1, old, old, width).permute(0, 3, 1, 2)
    new = F.interpolate(square, size=(grid, grid), mode="bilinear", align_corners=True)
    return new.permute(0, 2, 3, 1).reshape(grid * grid, width).to(table_PW.dtype)
