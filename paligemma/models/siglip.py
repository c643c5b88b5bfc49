"""The SigLIP image tower, top to bottom: patches, positions, pre-norm blocks, final norm; no pooling head.

Source: big_vision models/vit.py (variant So400m/14, pool_type none).
"""

# I images · R resolution · P patches · W tower width · N heads · H head_dim

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.config import VisionConfig
from paligemma.errors import ShapeError
from paligemma.models.attention import attention
from paligemma.models.linear import Linear, linear
from paligemma.models.norms import LayerNorm
from paligemma.models.recompute import run_block


class SiglipAttention(nn.Module):
    """Full self-attention among the patches of one image; every projection has a bias."""

    def __init__(self, config: VisionConfig, device: torch.device | None, dtype: torch.dtype | None):
        super().__init__()
        self.n_heads = config.n_heads
        self.q, self.k, self.v, self.out = (
            Linear(config.width, config.width, device=device, dtype=dtype) for _ in range(4)
        )

    def forward(self, x_IPW: Tensor) -> Tensor:
        q, k, v = (proj(x_IPW).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        mixed_INPH = attention(q, k, v, mask=None, scale=q.shape[-1] ** -0.5)
        out: Tensor = self.out(mixed_INPH.transpose(1, 2).flatten(-2))
        return out


class SiglipMlp(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, config: VisionConfig, device: torch.device | None, dtype: torch.dtype | None):
        super().__init__()
        self.up = Linear(config.width, config.mlp_dim, device=device, dtype=dtype)
        self.down = Linear(config.mlp_dim, config.width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out


class SiglipBlock(nn.Module):
    """x += attn(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: VisionConfig, device: torch.device | None, dtype: torch.dtype | None):
        super().__init__()
        self.attn_norm = LayerNorm(config.width, config.norm_eps, device=device, dtype=dtype)
        self.attn = SiglipAttention(config, device, dtype)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps, device=device, dtype=dtype)
        self.mlp = SiglipMlp(config, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


def of_levels(levels: Tensor) -> Tensor:
    """Levels uint8[...] 0 to 255 as float32[...] in [-1, 1], rounded as `processing.image.to_pixels` rounds them."""
    # Half of 255 as a tensor: CUDA would multiply by the reciprocal of a number, which rounds otherwise.
    return levels.float() / torch.full((), 127.5, device=levels.device) - 1


class SiglipTower(nn.Module):
    """Pixels in, one vector per patch out, in row-major patch order."""

    def __init__(
        self, config: VisionConfig, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.width, size, stride=size, device=device, dtype=dtype)
        self.position_embedding = nn.Parameter(
            torch.empty(config.n_image_tokens, config.width, device=device, dtype=dtype)
        )
        self.blocks = nn.ModuleList(SiglipBlock(config, device, dtype) for _ in range(config.depth))
        self.final_norm = LayerNorm(config.width, config.norm_eps, device=device, dtype=dtype)
        self.recompute = False  # activations of a block again on the way back, instead of keeping them

    def embed_patches(self, pixels_I3RR: Tensor) -> Tensor:
        """[I, P, W]: the patch convolution plus positions; pixels beyond the last whole patch are unused."""
        R = self.config.resolution
        if pixels_I3RR.shape[1:] != (3, R, R):
            raise ShapeError(
                f"pixels have shape {list(pixels_I3RR.shape)}: expected [n_images, 3, {R}, {R}] for this checkpoint. "
                "The Processor resizes pictures; for another resolution load the checkpoint made for it."
            )
        if pixels_I3RR.dtype == torch.uint8:
            pixels_I3RR = of_levels(pixels_I3RR)
        conv = self.patch_embedding
        p, g = self.config.patch_size, self.config.grid
        # One matrix product over unfolded patches: the same numbers as the convolution, faster in every dtype.
        patches = pixels_I3RR[:, :, : g * p, : g * p].reshape(-1, 3, g, p, g, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).to(conv.weight.dtype)
        return linear(patches, conv.weight.flatten(1), conv.bias) + self.position_embedding

    def forward(self, pixels_I3RR: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            pixels_I3RR: float[I, 3, R, R] in [-1, 1], or uint8 levels 0 to 255.

        Returns:
            [I, P, W] in the tower's dtype, after the final norm.

        Raises:
            ShapeError: the resolution is not the tower's.
        """
        x = self.embed_patches(pixels_I3RR)
        for block in self.blocks:
            x = run_block(block, x, recompute=self.recompute)
        out: Tensor = self.final_norm(x)
        return out
