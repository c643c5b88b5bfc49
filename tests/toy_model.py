"""A language model small enough to enumerate: its next-token distribution is a random function of the whole history.

It speaks the interface that the engine uses (`prefill`, `decode_step`, `extend`) and remembers only what it wrote
into the `KVCache`, so that whatever mixes up rows of a cache changes its answers. Its logits are exact: equal histories
have bitwise equal logits in any batch.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paligemma.config import PaliGemmaConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.models.kv_cache import KVCache
from paligemma.processing.batch import Batch, Item, PaddingSide, collate
from paligemma.processing.prompt import lay_out

EOS = 1


class ToyModel(nn.Module):
    """Logits are normal numbers drawn from (seed, history); eos gets `eos_bonus` on top."""

    def __init__(
        self, n_tokens: int = 5, *, seed: int = 0, spread: float = 1.5, eos_bonus: float = 0.0, filler: int = 0
    ):
        super().__init__()
        self.seed, self.spread, self.eos_bonus, self.n_rows = seed, spread, eos_bonus, n_tokens + filler
        text = TextConfig(
            width=2, depth=1, mlp_dim=2, n_heads=1, n_kv_heads=1, head_dim=2, vocab_size=self.n_rows,
            post_norms=False, query_pre_attn_scalar=2,
        )  # fmt: skip
        vision = VisionConfig(width=2, depth=1, mlp_dim=2, n_heads=1, resolution=14)
        tokens = TokenConfig(
            n_tokens=n_tokens, loc_start=n_tokens, seg_start=n_tokens, image=n_tokens, n_loc=0, n_seg=0
        )
        self.config = PaliGemmaConfig(vision=vision, text=text, tokens=tokens)
        self.text = nn.Module()
        self.text.final_norm = nn.Module()
        self.text.final_norm.scale = nn.Parameter(torch.zeros(1))
        self.n_steps = 0  # decoding steps of any batch
        self.n_step_rows = 0  # rows that they computed
        self._logits: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def logits(self, history: Sequence[int]) -> NDArray[np.float32]:
        """float32[V] after a history of prompt and written tokens."""
        key = tuple(int(token) for token in history)
        if key not in self._logits:
            values = np.random.default_rng((self.seed, *key)).normal(0, self.spread, self.n_rows)
            values[EOS] += self.eos_bonus
            self._logits[key] = values.astype(np.float32)
        return self._logits[key]

    def logprobs(self, history: Sequence[int]) -> list[float]:
        return torch.from_numpy(self.logits(history)).log_softmax(-1).tolist()

    def prefill(self, tokens: Tensor, *, cache: KVCache, mask_input: Tensor, positions: Tensor, **_: Any) -> Tensor:
        return self._read(tokens, mask_input, positions, cache)[:, 0]

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        self.n_steps += 1
        self.n_step_rows += len(tokens)
        valid = torch.ones_like(tokens, dtype=torch.bool)
        return self._read(tokens[:, None], valid[:, None], cache.next_position[:, None], cache)[:, 0]

    def extend(self, tokens: Tensor, cache: KVCache, mask_input: Tensor, *, capped: bool = True) -> Tensor:
        positions = cache.next_position[:, None] + torch.arange(tokens.shape[1])
        return self._read(tokens, mask_input, positions, cache, every=True)

    def _read(self, tokens: Tensor, valid: Tensor, position: Tensor, cache: KVCache, *, every: bool = False) -> Tensor:
        B, T = tokens.shape
        before = int(cache.length)
        cache.reserve(valid, position)
        memory = tokens[:, None, :, None].expand(B, 1, T, 2).float()
        cache.write(0, memory, memory)
        cache.advance(T)
        out = []
        for row in range(B):
            ends = range(before + 1, before + T + 1) if every else [before + T]
            kept = [cache.keys[0][row, 0, :end, 0][cache.valid[row, :end]].long().tolist() for end in ends]
            out.append([self.logits(history) for history in kept])
        return torch.from_numpy(np.array(out))


def prompts(rows: Sequence[Sequence[int]], padding_side: PaddingSide = "right") -> Batch:
    """Text-only prompts of the given ids."""
    return collate([Item(lay_out(0, row, bos=None, eos=None)) for row in rows], padding_side=padding_side)


def all_answers(n_tokens: int, limit: int) -> list[tuple[int, ...]]:
    """Every answer of up to `limit` tokens that ends with its only eos."""
    words = [token for token in range(n_tokens) if token != EOS]
    return [(*body, EOS) for n in range(limit) for body in itertools.product(words, repeat=n)]


def cut_answers(n_tokens: int, limit: int) -> list[tuple[int, ...]]:
    """Every answer of exactly `limit` tokens without eos."""
    return list(itertools.product([token for token in range(n_tokens) if token != EOS], repeat=limit))


def loglikelihood(model: ToyModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    return sum(model.logprobs((*prompt, *answer[:i]))[token] for i, token in enumerate(answer))
