"""Rotary positions in the half-split convention: dimension i turns together with dimension i + head_dim / 2."""

import torch
from torch import Tensor


def rotary_angles(positions_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position / theta^(2i / head_dim).

    Args:
        positions_BT: int64[B, T], counted from 0 within each example. A constant offset changes nothing: only
            differences of positions enter attention.
        head_dim: size of one head, even.
        theta: base of the wavelengths, 10,000 in every model of the family.

    Returns:
        Two float32[B, 1, T, head_dim / 2], ready to broadcast over heads.
    """
    half = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32) / head_dim
    angles = positions_BT[:, None, :, None].float() / theta**half
    return angles.cos(), angles.sin()


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (i, i + H / 2) by its angle; angles are cast to the dtype of x, as transformers does."""
    x1, x2 = x_BNTH.chunk(2, dim=-1)
    cos, sin = cos.to(x_BNTH.dtype), sin.to(x_BNTH.dtype)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
