"""From logits to one token per row: policies as frozen values, and the arithmetic they name.

A policy is handed to `generate`; the loop does not know which one it runs.
"""

# B rows · V tokens

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paligemma.errors import OptionError


@dataclass(frozen=True)
class Greedy:
    """The most likely token; of equally likely ones, the lowest id."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draw tokens: logits / temperature, then top-k, then top-p, then a draw from what is left.

    Attributes:
        temperature: below 1 sharper, above 1 flatter; 0 is greedy.
        top_k: keep the k most likely tokens and whatever ties with the last of them; 0 keeps all (transformers'
            default when it samples is 50).
        top_p: keep the most likely tokens until their probabilities reach p; the token that crosses p stays, and so
            does whatever ties with it (big_vision's nucleus; transformers breaks such ties by sorting order).
        seed: of every row's own stream of random numbers. A row's answer depends on its prompt and this number, never
            on its batch mates or its place among them, so equal prompts get equal answers; for several answers to one
            prompt give `generate` a list of `seeds`, one per row.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature={self.temperature}: expected 0 (greedy) or more; 1 is the model's own.")
        if self.top_k < 0:
            raise OptionError(f"top_k={self.top_k}: expected the number of tokens to keep, or 0 for all.")
        if not 0.0 <= self.top_p <= 1.0:
            raise OptionError(f"top_p={self.top_p}: expected a probability between 0 and 1; 1 keeps every token.")
        if self.seed < 0:
            raise OptionError(f"seed={self.seed}: expected a whole number of 0 or more.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


# Quotients by less overflow float32, and infinite logits have no distribution; nothing but ties survives this one.
MIN_TEMPERATURE = 1e-30

Policy = Greedy | Sampling
GREEDY = Greedy()


class Streams:
    """One stream of uniform numbers per row.

    Numbers are drawn on the CPU one at a time, so that the same seed means the same draws on every device, in every
    batch. Row r, copy c of `best_of` draws from the stream (seed of r, c): the first copy is what `best_of=1` draws.
    """

    def __init__(self, seeds: Sequence[int], n_copies: int = 1) -> None:
        self._streams = [np.random.default_rng((seed, copy)) for seed in seeds for copy in range(n_copies)]

    def draw(self, rows: Sequence[int]) -> list[float]:
        """The next number in [0, 1) of each of these rows."""
        return [float(self._streams[row].random()) for row in rows]


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Logits with all but the k highest of each row at -inf; ties with the k-th stay."""
    threshold_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < threshold_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Logits with all but the nucleus of each row at -inf.

    Worked example, p = 0.6, probabilities 0.5, 0.2, 0.2, 0.1: cumulative 0.5, 0.7, 0.9, 1.0; one value lies below p,
    so the second token crosses it and its logit is the threshold; the third has the same logit and stays as well.

    Source: big_vision trainers/proj/paligemma/predict_fns.py, sampler `nucleus`.
    """
    if p >= 1.0:
        return logits_BV
    sorted_BV = logits_BV.sort(dim=-1, descending=True).values
    cumulative_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1)
    # The last sum may round to just below p.
    crossing_B1 = (cumulative_BV < p).sum(dim=-1, keepdim=True).clamp_max(logits_BV.shape[-1] - 1)
    return logits_BV.masked_fill(logits_BV < sorted_BV.gather(-1, crossing_B1), -torch.inf)


def filter_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The logits that a draw is made from: tempered, then cut to top-k, then to top-p."""
    logits_BV = logits_BV / max(sampling.temperature, MIN_TEMPERATURE)
    if sampling.top_k:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    return keep_top_p(logits_BV, sampling.top_p)


def draw_tokens(logits_BV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """int64[B]: one token per row, by inverting the cumulative distribution at each row's uniform number.

    A token with logit -inf is never drawn.
    """
    # Sums over 257,152 tokens lose the tail in float32; MPS has nothing wider.
    wide = torch.float32 if logits_BV.device.type == "mps" else torch.float64
    cumulative_BV = logits_BV.to(wide).softmax(dim=-1).cumsum(dim=-1)
    total_B = cumulative_BV[:, -1]
    target_B = torch.tensor(uniforms, dtype=wide, device=logits_BV.device) * total_B
    # Rounding may lift the target to the total itself, which no cumulative value exceeds.
    target_B = target_B.minimum(total_B.nextafter(torch.zeros_like(total_B)))
    # The first cumulative value above the target: its token has added something, so its probability is not 0.
    return torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]


def choose(policy: Policy, logits_BV: Tensor, rows: Sequence[int], streams: Streams) -> Tensor:
    """int64[B]: the next token of each row.

    Args:
        logits_BV: float32, forbidden tokens at -inf.
        rows: which stream each row of logits draws from.
    """
    if isinstance(policy, Greedy) or policy.is_greedy:
        return logits_BV.argmax(dim=-1)  # documented to return the first of equal values
    return draw_tokens(filter_logits(logits_BV, policy), streams.draw(rows))


def token_logprobs(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """float32[B]: log-probability of one token per row under its whole distribution."""
    logits_BV = logits_BV.float()
    return logits_BV.gather(-1, tokens_B[..., None])[..., 0] - logits_BV.logsumexp(dim=-1)
