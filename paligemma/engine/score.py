"""How likely are given suffixes? Each prompt is read once, however many suffixes it is asked about."""

# B prompts · C candidates of one pass · T tokens of the longest · V tokens of the vocabulary

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paligemma.engine.prompts import read_prompts
from paligemma.engine.sampling import token_logprobs
from paligemma.errors import OptionError
from paligemma.models.kv_cache import KVCache
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import Batch

# What one pass may hold: float32 logits of each candidate's tokens, thrice while they are capped, and a copy of its
# prompt's keys and values. 32 answers of 100 tokens would take 10 GB of logits, 32 rows of 4,096 image tokens more.
PASS_BYTES = 1 << 31


@dataclass(frozen=True)
class Scored:
    """One suffix after one prompt.

    Attributes:
        tokens: its ids as given.
        logprobs: log-probability of each, given the prompt and the tokens before it.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        """Log-likelihood of the suffix, in nats; a sum, without length normalisation."""
        return float(sum(self.logprobs))


@torch.inference_mode()
def score_suffixes(
    model: PaliGemmaModel,
    batch: Batch,
    suffixes: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 32,
    cache_dtype: torch.dtype | None = None,
) -> list[list[Scored]]:
    """Log-likelihoods of suffixes, as `forward` over prompt and suffix would give them.

    Prompt tokens never see the suffix, so the cache of a prompt is shared by all of its candidates. The final soft cap
    acts as in `forward`; with `final_cap="everywhere"` a generated answer scores what `generate` said it did.

    Args:
        batch: prompts, one per row.
        suffixes: for each row, its candidates as token ids. Give each its eos, or a short candidate is scored as the
            beginning of every longer answer.
        batch_size: most candidates in memory at a time; fewer where they would take more than `PASS_BYTES`.
        cache_dtype: of keys and values; default the model's.

    Returns:
        For each row, one `Scored` per candidate, in order.

    Raises:
        OptionError: not one list of candidates per row.
        ShapeError: a packed batch.
    """
    if len(suffixes) != batch.n_rows:
        raise OptionError(f"{len(suffixes)} lists of suffixes for {batch.n_rows} prompts: expected one list for each.")
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size}: expected 1 or more.")
    candidates = [(row, tuple(suffix)) for row, some in enumerate(suffixes) for suffix in some]
    longest = max((len(suffix) for _, suffix in candidates), default=0)
    if longest == 0:
        return [[Scored((), ()) for _ in some] for some in suffixes]
    first_BV, cache = read_prompts(model, batch, longest, dtype=cache_dtype)
    cache_bytes = sum(held.nbytes for held in (*cache.keys, *cache.values)) // cache.batch
    logit_bytes = 3 * longest * first_BV.shape[-1] * first_BV.element_size()
    batch_size = max(1, min(batch_size, PASS_BYTES // (cache_bytes + logit_bytes)))
    scored: list[list[Scored]] = [[] for _ in suffixes]
    for start in range(0, len(candidates), batch_size):
        chunk = candidates[start : start + batch_size]
        logprobs = _score(model, first_BV, cache, chunk)
        for (row, suffix), values in zip(chunk, logprobs, strict=True):
            scored[row].append(Scored(suffix, tuple(values)))
    return scored


def _score(
    model: PaliGemmaModel, first_BV: Tensor, cache: KVCache, candidates: Sequence[tuple[int, tuple[int, ...]]]
) -> list[list[float]]:
    """Log-probabilities of each candidate's tokens: the first from the prompt's own logits, the rest teacher-forced."""
    device = first_BV.device
    rows = torch.tensor([row for row, _ in candidates], device=device)
    longest = max(1, max(len(suffix) for _, suffix in candidates))
    padded = [[*suffix, *[0] * (longest - len(suffix))] for _, suffix in candidates]
    tokens_CT = torch.tensor(padded, device=device)
    n_tokens_C1 = torch.tensor([[len(suffix)] for _, suffix in candidates], device=device)
    logprobs_CT = token_logprobs(first_BV[rows], tokens_CT[:, 0])[:, None]
    if longest > 1:
        # The last token predicts nothing that is asked for.
        mask_input = torch.arange(longest - 1, device=device) < n_tokens_C1 - 1
        capped = model.config.text.final_cap == "everywhere"
        logits_CTV = model.extend(tokens_CT[:, :-1], cache.select(rows), mask_input, capped=capped)
        logprobs_CT = torch.cat([logprobs_CT, token_logprobs(logits_CTV, tokens_CT[:, 1:])], dim=1)
    return [values[: len(suffix)] for values, (_, suffix) in zip(logprobs_CT.tolist(), candidates, strict=True)]
