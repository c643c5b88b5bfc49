"""The Gemma 1 and Gemma 2 decoders, top to bottom; the second adds post norms, grouped heads and soft caps.

Source: big_vision models/ppp/gemma.py; the sliding window of even layers from transformers' Gemma 2.
"""

# B batch · T queries · N query heads · K key/value heads · H head_dim · D width · V table rows

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.config import TextConfig
from paligemma.models.attention import Span, attention, prefix_lm_mask, usable_mask
from paligemma.models.kv_cache import KVCache
from paligemma.models.linear import Linear, linear
from paligemma.models.norms import RMSNorm
from paligemma.models.recompute import run_block
from paligemma.models.rope import rotary_angles, rotate
from paligemma.models.runs import Runs, runs_of


@dataclass(frozen=True)
class Context:
    """What every layer of one pass shares: rotary angles, masks, the cache, and the examples that attend alone."""

    cos: Tensor
    sin: Tensor
    full_mask: Tensor | None
    sliding_mask: Tensor | None
    cache: KVCache | None
    full_runs: Runs | None = None
    sliding_runs: Runs | None = None


class GemmaAttention(nn.Module):
    """Grouped-query attention with rotary positions and an optional soft cap; no biases."""

    def __init__(self, config: TextConfig, layer: int, device: torch.device | None, dtype: torch.dtype | None):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.query_scale
        self.softcap = config.attn_logits_softcap
        self.is_sliding = config.is_sliding(layer)
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q = Linear(config.width, q_dim, bias=False, device=device, dtype=dtype)
        self.k = Linear(config.width, kv_dim, bias=False, device=device, dtype=dtype)
        self.v = Linear(config.width, kv_dim, bias=False, device=device, dtype=dtype)
        self.out = Linear(q_dim, config.width, bias=False, device=device, dtype=dtype)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        q, k, v = (proj(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        if context.cache is not None:
            k, v = context.cache.write(self.layer, k, v)
        mask = context.sliding_mask if self.is_sliding else context.full_mask
        runs = context.sliding_runs if self.is_sliding else context.full_runs
        if runs is None:
            mixed_BNTH = attention(q, k, v, mask=mask, scale=self.scale, softcap=self.softcap)
        else:
            mixed_BNTH = runs.attend(q, k, v, self._within)
        out: Tensor = self.out(mixed_BNTH.transpose(1, 2).flatten(-2))
        return out

    def _within(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention(q, k, v, mask=mask, scale=self.scale, softcap=self.softcap)


class GemmaMlp(nn.Module):
    """down(gelu(gate(x)) * up(x)), GELU in its tanh form."""

    def __init__(self, config: TextConfig, device: torch.device | None, dtype: torch.dtype | None):
        super().__init__()
        self.gate = Linear(config.width, config.mlp_dim, bias=False, device=device, dtype=dtype)
        self.up = Linear(config.width, config.mlp_dim, bias=False, device=device, dtype=dtype)
        self.down = Linear(config.mlp_dim, config.width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))
        return out


class GemmaBlock(nn.Module):
    """Gemma 1: x += attn(norm(x)); x += mlp(norm(x)). Gemma 2 norms each branch once more before it is added.

    `dropout` acts in training mode only, where the reference has it: on what attention adds, after its norms, and on
    what the MLP computes, before its post norm.
    """

    def __init__(self, config: TextConfig, layer: int, device: torch.device | None, dtype: torch.dtype | None):
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.width, config.norm_eps, device=device, dtype=dtype)

        self.pre_attn_norm = norm()
        self.attn = GemmaAttention(config, layer, device, dtype)
        self.post_attn_norm = norm() if config.post_norms else None
        self.pre_mlp_norm = norm()
        self.mlp = GemmaMlp(config, device, dtype)
        self.post_mlp_norm = norm() if config.post_norms else None
        self.dropout = 0.0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        branch = self.attn(self.pre_attn_norm(x), context)
        branch = self.post_attn_norm(branch) if self.post_attn_norm is not None else branch
        x = x + F.dropout(branch, self.dropout, self.training)
        branch = F.dropout(self.mlp(self.pre_mlp_norm(x)), self.dropout, self.training)
        out: Tensor = x + (self.post_mlp_norm(branch) if self.post_mlp_norm is not None else branch)
        return out


class Embedding(nn.Embedding):
    """A table that is allocated and left alone: 257,152 rows of normal numbers would only be replaced.

    Nor does `nn.utils.skip_init` serve: it draws them on the meta device, for which torch imports its whole compiler,
    the longest second of a load.
    """

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class GemmaDecoder(nn.Module):
    """Embedding table (tied with the head), blocks, final norm."""

    def __init__(
        self, config: TextConfig, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        # Sparse gradients of looked-up rows add to those of the head, which is the same table; dense ones would be a
        # second gradient of its size.
        self.embedding = Embedding(config.vocab_size, config.width, sparse=True, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(GemmaBlock(config, i, device, dtype) for i in range(config.depth))
        self.final_norm = RMSNorm(config.width, config.norm_eps, device=device, dtype=dtype)
        self.recompute = False  # activations of a block again on the way back, instead of keeping them
        self.whole_rows = False  # attention over whole rows in any case, as compiled blocks want it: one shape for all

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D]: table rows times sqrt(D); the factor's rounding is `config.embed_scale`."""
        rows: Tensor = self.embedding(tokens_BT)
        named = {"table_dtype": rows.dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}
        scale = torch.full((), math.sqrt(self.config.width), dtype=named[self.config.embed_scale], device=rows.device)
        return rows * scale  # a tensor without dimensions does not change the dtype of the rows

    def forward(self, x_BTD: Tensor, query: Span, cache: KVCache | None = None) -> Tensor:
        """Run the blocks and the final norm over embedded tokens.

        Args:
            x_BTD: embeddings; text scaled by sqrt(D), image tokens not.
            query: the tokens of x; their keys are themselves or, with a cache, all that it holds and themselves.
            cache: takes the new keys and values and advances by T.

        Returns:
            Pre-logits [B, T, D].
        """
        key = query
        if cache is not None:
            key = _cached_span(query, cache)
        full = sliding = usable_mask(prefix_lm_mask(query, key))
        window = self.config.sliding_window
        # Positions count from 0 within a row: no two of S tokens lie S or more apart.
        if window is not None and key.valid.shape[1] > window:
            sliding = usable_mask(prefix_lm_mask(query, key, window))
        cos, sin = rotary_angles(query.position, self.config.head_dim, self.config.rope_theta)
        cos, sin = cos.to(x_BTD.dtype), sin.to(x_BTD.dtype)
        context = Context(cos, sin, full, sliding, cache, *self._runs(query, full, sliding, cache))
        for block in self.blocks:
            x_BTD = run_block(block, x_BTD, context, recompute=self.recompute)
        if cache is not None:
            cache.advance(x_BTD.shape[1])
        out: Tensor = self.final_norm(x_BTD)
        return out

    def _runs(
        self, query: Span, full: Tensor | None, sliding: Tensor | None, cache: KVCache | None
    ) -> tuple[Runs | None, Runs | None]:
        """Examples that attend on their own, under both masks: where scores are computed one by one and kept."""
        if (
            self.whole_rows
            or cache is not None
            or full is None
            or sliding is None
            or self.config.attn_logits_softcap is None
            or full.device.type != "cpu"
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return None, None
        runs = runs_of(query.segment, query.valid, full[:, 0])
        return runs, runs if sliding is full else runs_of(query.segment, query.valid, sliding[:, 0])

    def logits(self, pre_logits: Tensor, *, capped: bool = True) -> Tensor:
        """float32[..., V]: the product with the embedding table, unscaled, then the final soft cap if asked."""
        logits = linear(pre_logits, self.embedding.weight).float()
        cap = self.config.final_logits_softcap
        if cap is None or not capped:
            return logits
        return (logits / cap).tanh() * cap


def _cached_span(query: Span, cache: KVCache) -> Span:
    """The keys that a pass with a cache sees. What the cache held before belongs to one earlier block.

    Slots of this pass take their own blocks, counted above every older one; slots not yet written are not valid. A row
    with a cache holds one example, whose segment id is the largest of the row (0 marks padding).
    """
    n_new = query.valid.shape[1]
    before = cache.length
    valid, position = cache.reserve(query.valid, query.position)
    block = torch.full_like(position, -1)
    slots = torch.arange(n_new, device=position.device) + before
    block = block.index_copy(1, slots, query.block)
    return Span(
        block=block, valid=valid, segment=query.segment.amax(dim=1, keepdim=True).expand_as(position), position=position
    )
