"""The plain loop: prefill once, then one token per row and step. The truth that faster loops are tested against."""

# B rows of the batch · V tokens

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from paligemma.engine.filters import Constraint, Filters, Forbidden
from paligemma.engine.prompts import Decoded, FinishReason, check_max_new_tokens, read_prompts
from paligemma.engine.sampling import GREEDY, Greedy, Policy, Streams, choose, token_logprobs
from paligemma.errors import OptionError
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import Batch


@dataclass(frozen=True)
class NewToken:
    """One token, just written.

    Attributes:
        row: of the batch.
        token: its id.
        logprob: under the model's own distribution.
        finish_reason: set on the last token of the row, else None.
    """

    row: int
    token: int
    logprob: float
    finish_reason: FinishReason | None


def generate(
    model: PaliGemmaModel,
    batch: Batch,
    *,
    max_new_tokens: int,
    sampling: Policy = GREEDY,
    eos: int = 1,
    forbidden: Forbidden | None = None,
    constraint: Constraint | Sequence[Constraint | None] | None = None,
    best_of: int = 1,
    seeds: Sequence[int] | None = None,
    static_cache: bool = False,
    cache_dtype: torch.dtype | None = None,
    on_token: Callable[[NewToken], None] | None = None,
) -> list[Decoded]:
    """Continue every prompt of a batch.

    A row's answer depends on the row alone: not on its batch mates, its place, or the side and length of its padding.

    Args:
        model: in the dtype and on the device to compute with.
        batch: prompts, one per row; a suffix in them is a forced start of the answer.
        max_new_tokens: longest answer, end of sequence included.
        sampling: `Greedy()` or `Sampling(...)`.
        eos: the id that ends an answer.
        forbidden: bool[V] or bool[B, V], or ids that are never written.
        constraint: tokens of a row so far → bool[V] of those allowed next, or None for all; one rule, or one per row.
        best_of: sample so many answers per prompt, after one prefill, and keep the likeliest.
        seeds: one per row, in place of `sampling.seed` for all.
        static_cache: a cache of one shape from first to last, for a compiled `decode_step`; the answers are the same.
        cache_dtype: of keys and values; default the model's. bfloat16 is what big_vision decodes with.
        on_token: called with each token as it is written; not with `best_of`.

    Returns:
        One `Decoded` per row, in order.

    Raises:
        OptionError: options that contradict one another, or filters that allow nothing.
        ShapeError: a packed batch, or a mask that does not fit the vocabulary.
    """
    if on_token is not None and best_of != 1:
        raise OptionError(f"on_token with best_of={best_of}: the best answer is known only at the end. Leave one out.")
    tokens: list[list[int]] = [[] for _ in range(batch.n_rows * best_of)]
    logprobs: list[list[float]] = [[] for _ in tokens]
    reasons: list[FinishReason] = ["length"] * len(tokens)
    for step in _steps(
        model, batch, max_new_tokens, sampling, eos, forbidden, constraint, best_of, seeds, static_cache, cache_dtype
    ):
        for new in step:
            tokens[new.row].append(new.token)
            logprobs[new.row].append(new.logprob)
            reasons[new.row] = new.finish_reason or "length"
            if on_token is not None:
                on_token(new)
    all_copies = [Decoded(tuple(t), tuple(p), r) for t, p, r in zip(tokens, logprobs, reasons, strict=True)]
    copies = (all_copies[i : i + best_of] for i in range(0, len(all_copies), best_of))
    return [max(some, key=lambda decoded: decoded.logprob) for some in copies]


def stream(
    model: PaliGemmaModel,
    batch: Batch,
    *,
    max_new_tokens: int,
    sampling: Policy = GREEDY,
    eos: int = 1,
    forbidden: Forbidden | None = None,
    constraint: Constraint | Sequence[Constraint | None] | None = None,
    seeds: Sequence[int] | None = None,
    static_cache: bool = False,
    cache_dtype: torch.dtype | None = None,
) -> Iterator[tuple[NewToken, ...]]:
    """`generate` as an iterator: each step yields the tokens of the rows that were still writing.

    Arguments as in `generate`. Whoever stops iterating stops the model.
    """
    check_max_new_tokens(max_new_tokens)  # now, not at the first token
    return _steps(
        model, batch, max_new_tokens, sampling, eos, forbidden, constraint, 1, seeds, static_cache, cache_dtype
    )


@torch.inference_mode()
def _steps(
    model: PaliGemmaModel,
    batch: Batch,
    max_new_tokens: int,
    sampling: Policy,
    eos: int,
    forbidden: Forbidden | None,
    constraint: Constraint | Sequence[Constraint | None] | None,
    best_of: int,
    seeds: Sequence[int] | None,
    static_cache: bool,
    cache_dtype: torch.dtype | None,
) -> Iterator[tuple[NewToken, ...]]:
    """The loop. Rows here are copies: row r of the batch, copy c, is r * best_of + c."""
    check_max_new_tokens(max_new_tokens)
    streams = _streams(sampling, batch.n_rows, best_of, seeds)
    if max_new_tokens == 0:
        return
    logits, cache = read_prompts(model, batch, max_new_tokens, static=static_cache, dtype=cache_dtype)
    device = logits.device
    filters = Filters(model.config, batch.n_rows, forbidden, constraint, device)
    if best_of > 1:
        copies = torch.arange(batch.n_rows, device=device).repeat_interleave(best_of)
        logits, cache = logits[copies], cache.select(copies)

    rows = list(range(len(logits)))  # the row in each slot of the cache
    written: list[list[int]] = [[] for _ in rows]
    live = list(rows)  # slots whose row is still writing
    for step in range(1, max_new_tokens + 1):
        writing = [rows[slot] for slot in live]
        if len(live) < len(rows):
            logits = logits[torch.tensor(live, device=device)]
        open_logits = filters(logits, [row // best_of for row in writing], [written[row] for row in writing])
        chosen = choose(sampling, open_logits, writing, streams)
        tokens, logprobs = chosen.tolist(), token_logprobs(logits, chosen).tolist()
        last: FinishReason | None = "length" if step == max_new_tokens else None
        for row, token in zip(writing, tokens, strict=True):
            written[row].append(token)
        yield tuple(
            NewToken(row, token, logprob, "stop" if token == eos else last)
            for row, token, logprob in zip(writing, tokens, logprobs, strict=True)
        )
        live = [slot for slot, token in zip(live, tokens, strict=True) if token != eos]
        if not live or last:
            return
        # Finished rows compute on without effect; once they are the majority, the others move together.
        if 2 * len(live) <= len(rows) and not cache.is_static:
            cache = cache.select(torch.tensor(live, device=device))
            rows = [rows[slot] for slot in live]
            live = list(range(len(rows)))
        logits = model.decode_step(torch.tensor([written[row][-1] for row in rows], device=device), cache)


def _streams(sampling: Policy, n_rows: int, best_of: int, seeds: Sequence[int] | None) -> Streams:
    is_greedy = isinstance(sampling, Greedy) or sampling.is_greedy
    if best_of < 1:
        raise OptionError(f"best_of={best_of}: expected 1 or more.")
    if best_of > 1 and is_greedy:
        raise OptionError(
            f"best_of={best_of} with greedy decoding: all answers are the same. Give sampling=Sampling(...)."
        )
    if seeds is None:
        seeds = [0 if isinstance(sampling, Greedy) else sampling.seed] * n_rows
    if len(seeds) != n_rows or any(seed < 0 for seed in seeds):
        raise OptionError(f"seeds={list(seeds)}: expected {n_rows} whole numbers of 0 or more, one per row.")
    return Streams(seeds, best_of)
