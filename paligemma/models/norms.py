"""The two normalisations of the family; both keep their statistics in float32 whatever the input's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Gemma's RMSNorm: x / rms(x) * (1 + scale).

    The product with (1 + scale) happens in float32 and the cast comes last; Llama casts before it, and in bfloat16
    the order shows. `scale` is stored without the 1. Source: big_vision models/ppp/gemma.py.
    """

    def __init__(self, width: int, eps: float, *, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.empty(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1.0 + self.scale.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """SigLIP's LayerNorm with scale and bias; torch's kernel accumulates in float32 for low-precision inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
