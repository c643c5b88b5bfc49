"""Who may attend to whom, and the arithmetic of attending.

The mask follows one rule (big_vision models/proj/paligemma/paligemma.py `make_attn_mask`): with c the running sum of
`mask_ar`, token i sees token j iff c[j] <= c[i] and both are real. Worked example, one image token, a prefix of two
and a suffix of two:

    token      img  bos  \\n   a   eos
    mask_ar     0    0    0    1    1
    c           0    0    0    1    2
    a sees      x    x    x    x    .        img sees img, bos, \\n and nothing later

Segment ids keep several examples of one row apart; a sliding window (Gemma 2 in transformers) hides what lies too far
back, except among tokens of one block.
"""

# B batch · T queries · S keys · N query heads · K key/value heads · G = N / K · H head_dim

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.models.linear import is_widened

# Scores of one block of queries stay below this many elements when no gradient is needed (256 MB in float32).
MAX_SCORES = 1 << 26


@dataclass(frozen=True)
class Span:
    """What the mask rule needs to know of a run of tokens.

    Attributes:
        block: int64[B, L], running sum of mask_ar.
        valid: bool[B, L], True on real tokens.
        segment: int64[B, L], the example a token belongs to.
        position: int64[B, L], place within its example.
    """

    block: Tensor
    valid: Tensor
    segment: Tensor
    position: Tensor


def prefix_lm_mask(query: Span, key: Span, sliding_window: int | None = None) -> Tensor:
    """bool[B, T, S], True where the query may attend to the key.

    Args:
        sliding_window: keys at least this many positions back are hidden from a query of a later block. Tokens of one
            block keep seeing each other, so the bidirectional prefix stays whole (transformers 5.23 semantics).
    """
    mask = key.block[:, None, :] <= query.block[:, :, None]
    mask = mask & (key.segment[:, None, :] == query.segment[:, :, None])
    mask = mask & query.valid[:, :, None] & key.valid[:, None, :]
    if sliding_window is not None:
        near = query.position[:, :, None] - key.position[:, None, :] < sliding_window
        mask = mask & (near | (key.block[:, None, :] == query.block[:, :, None]))
    return mask


def usable_mask(mask_BTS: Tensor) -> Tensor | None:
    """The mask as kernels want it: bool[B, 1, T, S], or None when nothing is hidden.

    A padding query may attend to nothing, which kernels answer with NaN; it is let see everything instead. Its output
    is never read: as a key it stays hidden.
    """
    if not torch.compiler.is_compiling() and mask_BTS.device.type == "cpu" and bool(mask_BTS.all()):
        return None
    return (mask_BTS | ~mask_BTS.any(dim=-1, keepdim=True))[:, None]


def attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """Grouped-query attention; query head n uses key/value head n // (N / K).

    Args:
        q_BNTH, k_BKSH, v_BKSH: one floating dtype, rotary positions already applied.
        mask: bool[B, 1, T, S] from `usable_mask`, or None when every query sees every key.
        scale: factor of the scores.
        softcap: c * tanh(score / c) before the mask (Gemma 2: 50); None is off.

    Returns:
        [B, N, T, H] in the dtype of v. Without a cap torch's fused kernel does the work; with one, FlexAttention on
        CUDA and plain attention with a float32 softmax elsewhere, in blocks of queries when the scores grow large.
    """
    if q_BNTH.shape[2] > 1 and is_widened(q_BNTH):
        wide = attention(q_BNTH.float(), k_BKSH.float(), v_BKSH.float(), mask=mask, scale=scale, softcap=softcap)
        return wide.to(v_BKSH.dtype)
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1], k_BKSH.shape[2]
    if softcap is not None and q_BNTH.is_cuda and T > 1:
        return flex_attention(q_BNTH, k_BKSH, v_BKSH, mask=mask, scale=scale, softcap=softcap)
    groups = N // K
    # The G query heads that share a key/value head become more queries of it: no key or value is ever repeated.
    q = q_BNTH.reshape(B, K, groups * T, H)
    if mask is not None and groups > 1 and T > 1:
        mask = mask[:, :, None].expand(B, 1, groups, T, S).reshape(B, 1, groups * T, S)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k_BKSH, v_BKSH, attn_mask=mask, scale=scale)
    elif B * N * T * S <= MAX_SCORES or torch.is_grad_enabled():
        out = _capped(q, k_BKSH, v_BKSH, mask, scale, softcap)
    else:
        rows = max(1, MAX_SCORES // (B * K * S))
        out = torch.cat(
            [
                _capped(part, k_BKSH, v_BKSH, part_mask, scale, softcap)
                for part, part_mask in zip(torch.split(q, rows, 2), _split_mask(mask, rows), strict=False)
            ],
            dim=2,
        )
    return out.reshape(B, N, T, H)


def _split_mask(mask: Tensor | None, rows: int) -> Iterable[Tensor | None]:
    # A mask of one row speaks for every query of a single decode step.
    return repeat(mask) if mask is None or mask.shape[2] == 1 else torch.split(mask, rows, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    scores = ((q * (scale / softcap)) @ k.transpose(-1, -2)).float()
    # In place where no gradient is needed: writing to fresh memory takes as long as the arithmetic.
    scores = scores.tanh() * softcap if scores.requires_grad else scores.tanh_().mul_(softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def flex_attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """The same numbers through torch's FlexAttention, which fuses the cap; compiled on CUDA only."""

    def cap(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    flex, create_block_mask = _flex(q_BNTH.is_cuda)
    block_mask = None
    if mask is not None:
        B, T, S = q_BNTH.shape[0], q_BNTH.shape[2], k_BKSH.shape[2]

        def allowed(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return mask[b, 0, t, s]

        block_mask = create_block_mask(allowed, B, None, T, S, device=q_BNTH.device)
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    out: Tensor = flex(q_BNTH, k_BKSH, v_BKSH, score_mod=cap, block_mask=block_mask, scale=scale, enable_gqa=grouped)
    return out


@lru_cache
def _flex(compiled: bool) -> tuple[Any, Any]:
    from torch.nn.attention import flex_attention as flex

    if not compiled:
        return flex.flex_attention, flex.create_block_mask
    return torch.compile(flex.flex_attention, dynamic=True), torch.compile(flex.create_block_mask, dynamic=True)
