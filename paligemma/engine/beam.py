"""Beam search, twice: big_vision's and transformers', which are different algorithms (docs/decisions/beams.md).

Both follow each example on its own: an example that is done leaves the search, so that its answer does not depend on
how long its batch mates go on.
"""

# E examples still searching · N live beams of each · T tokens written so far · V tokens of the vocabulary

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from paligemma.config import Beams
from paligemma.engine.filters import Constraint, Filters, Forbidden
from paligemma.engine.generate import generate
from paligemma.engine.prompts import NOTHING, Decoded, FinishReason, check_max_new_tokens, read_prompts
from paligemma.errors import OptionError, nearest
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import Batch

EarlyStopping = bool | Literal["never"]


def beam_search(
    model: PaliGemmaModel,
    batch: Batch,
    *,
    n_beams: int,
    max_new_tokens: int,
    kind: Beams | None = None,
    eos: int = 1,
    forbidden: Forbidden | None = None,
    constraint: Constraint | Sequence[Constraint | None] | None = None,
    cache_dtype: torch.dtype | None = None,
) -> list[Decoded]:
    """Beam search of the kind that `kind`, or the model's configuration, names; with one beam, greedy decoding.

    Raises:
        OptionError: fewer than one beam, or an unknown kind.
    """
    kind = kind or model.config.beams
    if kind not in BEAM_SEARCHES:
        raise OptionError(
            f"beam={kind!r}: expected one of {', '.join(BEAM_SEARCHES)}.{nearest(str(kind), BEAM_SEARCHES)}"
        )
    search = generate if n_beams == 1 else _with_beams(BEAM_SEARCHES[kind], n_beams)
    return search(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        eos=eos,
        forbidden=forbidden,
        constraint=constraint,
        cache_dtype=cache_dtype,
    )


def _with_beams(search: Callable[..., list[Decoded]], n_beams: int) -> Callable[..., list[Decoded]]:
    def run(model: PaliGemmaModel, batch: Batch, **options: object) -> list[Decoded]:
        return search(model, batch, n_beams=n_beams, **options)

    return run


@torch.inference_mode()
def beam_search_bv(
    model: PaliGemmaModel,
    batch: Batch,
    *,
    n_beams: int,
    max_new_tokens: int,
    eos: int = 1,
    forbidden: Forbidden | None = None,
    constraint: Constraint | Sequence[Constraint | None] | None = None,
    cache_dtype: torch.dtype | None = None,
) -> list[Decoded]:
    """The original's beam search: the sequence with the highest sum of log-probabilities that it meets.

    At every step each live beam is also closed with eos, and the likeliest sequence closed so far is remembered; the
    live beams go on without eos. An example is done when its best live beam is less likely than that sequence, for
    log-probabilities only fall. The answer therefore ends with eos, at the last allowed position at the latest. (Where
    filters forbid eos all the way, the best live beam is returned with finish_reason "length".)

    With one beam this is not greedy decoding: it picks the best place to stop along the greedy path.

    Source: big_vision trainers/proj/paligemma/predict_fns.py, `_beam_decode`.
    """
    search = _Search(model, batch, n_beams, max_new_tokens, forbidden, constraint, cache_dtype)
    if max_new_tokens == 0:
        return [NOTHING] * batch.n_rows
    best: list[tuple[float, Decoded]] = [(-torch.inf, NOTHING)] * batch.n_rows
    for step in range(1, max_new_tokens + 1):
        logprobs_ENV, open_ENV = search.next_logprobs()
        # Every live beam, ended here. Of equals the first wins, and the remembered one before all.
        ended_EN = search.scores + open_ENV[..., eos]
        score_E, beam_E = ended_EN.max(dim=1)
        for e, (score, beam) in enumerate(zip(score_E.tolist(), beam_E.tolist(), strict=True)):
            row = search.examples[e]
            if score > best[row][0]:
                logprob = float(logprobs_ENV[e, beam, eos])
                best[row] = (score, search.decoded(e, beam, eos, logprob, "stop"))
        # Every live beam, going on.
        open_ENV[..., eos] = -torch.inf
        value_ENK, token_ENK = top_first(open_ENV, min(n_beams + 1, open_ENV.shape[-1]))
        candidate_EC = (search.scores[..., None] + value_ENK).flatten(1)
        score_EN, index_EN = top_first(candidate_EC, min(n_beams, candidate_EC.shape[1]))
        parent_EN = index_EN // value_ENK.shape[-1]
        search.follow(parent_EN, token_ENK.flatten(1).gather(1, index_EN), score_EN, logprobs_ENV)
        going = [
            e
            for e, score in enumerate(score_EN[:, 0].tolist())
            if step < max_new_tokens and score >= best[search.examples[e]][0]
        ]
        for e in set(range(len(search.examples))) - set(going):
            if best[search.examples[e]][0] == -torch.inf:
                best[search.examples[e]] = (0.0, search.decoded(e, 0))
        if not going:
            break
        search.advance(going)
    return [decoded for _, decoded in best]


@torch.inference_mode()
def beam_search_hf(
    model: PaliGemmaModel,
    batch: Batch,
    *,
    n_beams: int,
    max_new_tokens: int,
    eos: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    forbidden: Forbidden | None = None,
    constraint: Constraint | Sequence[Constraint | None] | None = None,
    cache_dtype: torch.dtype | None = None,
) -> list[Decoded]:
    """The tokens of transformers' `generate(num_beams=n_beams, do_sample=False)`.

    Of the 2 * n_beams best continuations of a step, those that end and rank among the first n_beams join a pool of
    n_beams finished sequences; the others live on. A finished sequence scores sum / length**length_penalty, eos
    counted. At the length limit the best n_beams join the pool as they are, without eos.

    Args:
        length_penalty: above 0 favours long answers, below 0 short ones.
        early_stopping: True stops an example when its pool is full; False when its best live beam, scored at the
            present length, is no better than the worst of a full pool; "never" scores it at the length most favourable
            to it, so that nothing better is missed.

    Source: transformers 5.23, generation/utils.py, `_beam_search`.
    """
    if early_stopping not in (True, False, "never"):
        raise OptionError(f"early_stopping={early_stopping!r}: expected True, False or 'never'.")
    search = _Search(model, batch, n_beams, max_new_tokens, forbidden, constraint, cache_dtype)
    if max_new_tokens == 0:
        return [NOTHING] * batch.n_rows
    pools: list[list[tuple[float, Decoded]]] = [[] for _ in range(batch.n_rows)]  # best first
    for step in range(1, max_new_tokens + 1):
        logprobs_ENV, open_ENV = search.next_logprobs()
        total_EC = (search.scores[..., None] + open_ENV).flatten(1)
        score_EC, index_EC = top_first(total_EC, min(2 * n_beams, total_EC.shape[1]))
        parent_EC, token_EC = index_EC // open_ENV.shape[-1], index_EC % open_ENV.shape[-1]
        ends_EC = token_EC == eos
        may_finish = ends_EC[:, :n_beams].tolist()
        finish_score = (score_EC[:, :n_beams] / step**length_penalty).tolist()
        for e, row in enumerate(search.examples):
            for c, (is_end, score) in enumerate(zip(may_finish[e], finish_score[e], strict=True)):
                if score > -torch.inf and (is_end or step == max_new_tokens):
                    beam, token = int(parent_EC[e, c]), int(token_EC[e, c])
                    logprob = float(logprobs_ENV[e, beam, token])
                    decoded = search.decoded(e, beam, token, logprob, "stop" if is_end else "length")
                    pools[row].append((score, decoded))
            pools[row] = sorted(pools[row], key=lambda entry: -entry[0])[:n_beams]
        if step == max_new_tokens:
            break
        # At most one continuation of each beam is an end: n_beams of them are left in any vocabulary worth the name.
        live_EC = score_EC.masked_fill(ends_EC, -torch.inf)
        score_EN, pick_EN = top_first(live_EC, min(n_beams, live_EC.shape[1]))
        search.follow(parent_EC.gather(1, pick_EN), token_EC.gather(1, pick_EN), score_EN, logprobs_ENV)
        favourable = max_new_tokens if early_stopping == "never" and length_penalty > 0 else step
        hope = (score_EN[:, 0] / favourable**length_penalty).tolist()
        going = []
        for e, row in enumerate(search.examples):
            is_full = len(pools[row]) == n_beams
            # A constraint may end every beam before the pool is full: hope is -inf then, and nothing can follow.
            if (hope[e] > -torch.inf) if not is_full else (early_stopping is not True and hope[e] > pools[row][-1][0]):
                going.append(e)
        if not going:
            break
        search.advance(going)
    return [pool[0][1] for pool in pools]


BEAM_SEARCHES: dict[str, Callable[..., list[Decoded]]] = {"bv": beam_search_bv, "hf": beam_search_hf}


class _Search:
    """The live beams of all examples still searching, and the cache in step with them.

    Attributes:
        examples: the row of the batch of each.
        scores: float32[E, N], sums of log-probabilities, best first; -inf marks a beam that no token can continue.
        tokens: int64[E, N, T].
        logprobs: float32[E, N, T].
    """

    def __init__(
        self,
        model: PaliGemmaModel,
        batch: Batch,
        n_beams: int,
        max_new_tokens: int,
        forbidden: Forbidden | None,
        constraint: Constraint | Sequence[Constraint | None] | None,
        cache_dtype: torch.dtype | None,
    ) -> None:
        check_max_new_tokens(max_new_tokens)
        if n_beams < 1:
            raise OptionError(f"n_beams={n_beams}: expected 1 or more.")
        if max_new_tokens == 0:
            return
        self._model = model
        self._logits, self._cache = read_prompts(model, batch, max_new_tokens, dtype=cache_dtype)
        self._filters = Filters(model.config, batch.n_rows, forbidden, constraint, self._logits.device)
        self.examples = list(range(batch.n_rows))
        self.scores = self._logits.new_zeros(batch.n_rows, 1)
        self.tokens = torch.zeros(batch.n_rows, 1, 0, dtype=torch.int64, device=self._logits.device)
        self.logprobs = self._logits.new_zeros(batch.n_rows, 1, 0)
        self._parents = torch.zeros(batch.n_rows, 1, dtype=torch.int64, device=self._logits.device)

    def next_logprobs(self) -> tuple[Tensor, Tensor]:
        """float32[E, N, V] twice: log-probabilities of the next token, and a copy with -inf on what filters forbid."""
        E, N = self.scores.shape
        logprobs = self._logits.float().log_softmax(dim=-1)
        # A beam that nothing can continue has written nonsense, which no constraint should be asked about.
        alive = (self.scores > -torch.inf).flatten().nonzero()[:, 0]
        written = self.tokens.flatten(0, 1)[alive].tolist()
        opened = torch.full_like(logprobs, -torch.inf)
        opened[alive] = self._filters(logprobs[alive], [self.examples[i // N] for i in alive.tolist()], written)
        return logprobs.reshape(E, N, -1), opened.reshape(E, N, -1)

    def follow(self, parent_EN: Tensor, token_EN: Tensor, score_EN: Tensor, logprobs_ENV: Tensor) -> None:
        """Replace the live beams by continuations of them."""
        column = torch.arange(len(self.examples), device=parent_EN.device)[:, None]
        new_logprob_EN = logprobs_ENV[column, parent_EN, token_EN]
        self.tokens = torch.cat([self.tokens[column, parent_EN], token_EN[..., None]], dim=-1)
        self.logprobs = torch.cat([self.logprobs[column, parent_EN], new_logprob_EN[..., None]], dim=-1)
        self._parents = column * self.scores.shape[1] + parent_EN
        self.scores = score_EN

    def advance(self, going: list[int]) -> None:
        """Keep these examples, drop the others; feed every live beam's last token to the model."""
        if len(going) < len(self.examples):
            index = torch.tensor(going, device=self.scores.device)
            self.scores, self.tokens, self.logprobs = self.scores[index], self.tokens[index], self.logprobs[index]
            self._parents = self._parents[index]
            self.examples = [self.examples[e] for e in going]
        rows = self._parents.flatten()
        if rows.tolist() != list(range(self._cache.batch)):  # beams often go on in place; a copy is the whole cache
            self._cache = self._cache.select(rows)
        self._logits = self._model.decode_step(self.tokens[..., -1].flatten(), self._cache)

    def decoded(
        self, e: int, beam: int, token: int | None = None, logprob: float = 0.0, reason: FinishReason = "length"
    ) -> Decoded:
        """A live beam as an answer, with one more token if given."""
        tokens, logprobs = self.tokens[e, beam].tolist(), self.logprobs[e, beam].tolist()
        if token is not None:
            tokens.append(token)
            logprobs.append(logprob)
        return Decoded(tuple(tokens), tuple(logprobs), reason)


def top_first(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest along the last dim, descending; of equals the lowest index first (`torch.topk` promises none)."""
    top = values.topk(k, dim=-1).values
    reached = (values >= top[..., -1:]).sum(dim=-1)
    if bool((reached != k).any()):  # more values tie with the last one than there is room for
        ordered, index = values.sort(dim=-1, descending=True, stable=True)
        return ordered[..., :k], index[..., :k]
    # Exactly k values reach the threshold: taken in index order, a stable sort keeps equals in it.
    index = (values >= top[..., -1:]).nonzero()[:, -1].reshape(*values.shape[:-1], k)
    ordered, order = values.gather(-1, index).sort(dim=-1, descending=True, stable=True)
    return ordered, index.gather(-1, order)
