"""Matrix products in the dtype of the weights, and in float32 where the processor has no instructions for that dtype.

Most CPUs multiply float32 and nothing narrower; torch then computes a bfloat16 product one number at a time, at a fifth
of the speed of float32. Weights stay bfloat16 in memory (that is what a user asks for); a block of rows at a time is
widened, multiplied, and the result rounded back. A native bfloat16 kernel also sums in float32 and rounds once, so the
numbers are the same kind.
"""

# N rows of the input · D input width · O output width

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ROWS = 16  # below, reading the weights takes longest and the widened copy would only be read once more
BLOCK_VALUES = 1 << 22  # weights widened at a time: 16 MB of float32, which stay in a shared cache


class Linear(nn.Linear):
    """`nn.Linear` through `linear`; parameters, names and initialisation are the same."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in the dtype of x, any number of leading dims.

    Source of the choice: `is_widened`; every other case is torch's own product.
    """
    if x_ND.numel() < MIN_ROWS * x_ND.shape[-1] or not is_widened(x_ND) or x_ND.dtype != weight_OD.dtype:
        return F.linear(x_ND, weight_OD, bias_O)
    wide = x_ND.float()
    rows = max(1, BLOCK_VALUES // weight_OD.shape[1])
    if rows >= len(weight_OD):
        return F.linear(wide, weight_OD.float(), None if bias_O is None else bias_O.float()).to(x_ND.dtype)
    out = torch.empty(*x_ND.shape[:-1], len(weight_OD), dtype=x_ND.dtype)
    for start in range(0, len(weight_OD), rows):
        part = slice(start, start + rows)
        bias = None if bias_O is None else bias_O[part].float()
        out[..., part] = F.linear(wide, weight_OD[part].float(), bias)
    return out


def is_widened(x: Tensor) -> bool:
    """Whether products of this tensor are computed in float32: a narrow dtype, a CPU without it, and no gradient.

    With gradients the widened weights would have to be kept until the backward pass, all of them at once.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float16)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not _has_instructions(x.dtype)
    )


@lru_cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether torch's CPU kernels multiply this dtype faster than one number at a time."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
