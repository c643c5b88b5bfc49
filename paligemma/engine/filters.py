"""Which tokens may come next: forbidden ids, filler rows of the table, and constraints that follow the answer.

Filters act before a token is chosen; log-probabilities are always those of the unfiltered distribution, so that the
confidence of an answer does not depend on what it was not allowed to be.
"""

# B rows · V tokens

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from paligemma.config import PaliGemmaConfig
from paligemma.errors import OptionError, ShapeError

# Tokens written so far (the prompt is not among them) → bool[V], True where allowed; None allows all.
Constraint = Callable[[tuple[int, ...]], Tensor | None]
Forbidden = Tensor | Sequence[int]


class Filters:
    """All filters of one call, joined.

    Args:
        forbidden: bool[V] or bool[B, V], True on tokens never written; or their ids.
        constraint: one rule for every row, or one (or None) per row.

    Filler rows of the table, beyond `config.tokens.n_tokens`, are never written: no tokenizer can spell them.

    Raises:
        OptionError: an id that does not exist; all tokens forbidden; not as many constraints as rows.
        ShapeError: a mask of another size.
    """

    def __init__(
        self,
        config: PaliGemmaConfig,
        n_rows: int,
        forbidden: Forbidden | None = None,
        constraint: Constraint | Sequence[Constraint | None] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._n_tokens = config.text.vocab_size
        self._device = device
        self._constraints: list[Constraint | None] = (
            [constraint] * n_rows if constraint is None or callable(constraint) else list(constraint)
        )
        if len(self._constraints) != n_rows:
            raise OptionError(
                f"{len(self._constraints)} constraints for {n_rows} rows: expected one for each, or one for all."
            )
        allowed = torch.ones(self._n_tokens, dtype=torch.bool, device=device)
        allowed[config.tokens.n_tokens :] = False
        if forbidden is not None:
            allowed = allowed & ~self._as_mask(forbidden, n_rows)
        if not bool(allowed.any(dim=-1).all()):
            raise OptionError(f"all {self._n_tokens} tokens are forbidden: nothing is left to write. Allow some.")
        self._allowed = None if bool(allowed.all()) else allowed

    def __call__(self, logits_BV: Tensor, rows: Sequence[int], written: Sequence[Sequence[int]]) -> Tensor:
        """Logits, or log-probabilities, with what may not be written at -inf.

        Args:
            logits_BV: float[B, V].
            rows: the row of the batch that each of them belongs to.
            written: what each has written so far.

        Raises:
            OptionError: a constraint allows nothing.
        """
        allowed = self._allowed
        if allowed is not None and allowed.ndim == 2:
            allowed = allowed[torch.tensor(rows, device=self._device)]
        if any(self._constraints[row] is not None for row in rows):
            base = torch.ones_like(logits_BV, dtype=torch.bool) if allowed is None else allowed.expand_as(logits_BV)
            allowed = torch.stack([self._constrained(base[i], row, written[i]) for i, row in enumerate(rows)])
        return logits_BV if allowed is None else logits_BV.masked_fill(~allowed, -torch.inf)

    def _constrained(self, allowed_V: Tensor, row: int, written: Sequence[int]) -> Tensor:
        constraint = self._constraints[row]
        mask = None if constraint is None else constraint(tuple(written))
        if mask is None:
            return allowed_V
        mask = torch.as_tensor(mask)
        if mask.shape != allowed_V.shape or mask.dtype != torch.bool:
            raise ShapeError(
                f"a constraint returned {mask.dtype}{list(mask.shape)}: expected bool[{self._n_tokens}], True where "
                "allowed."
            )
        allowed_V = allowed_V & mask.to(allowed_V.device)
        if not bool(allowed_V.any()):
            raise OptionError(
                f"the constraint of row {row} allows no token after {tuple(written)}: expected at least one. Let it "
                "allow the end of sequence where an answer may end."
            )
        return allowed_V

    def _as_mask(self, forbidden: Forbidden, n_rows: int) -> Tensor:
        given = torch.as_tensor(forbidden)  # a mask may come as a list or an array just as well
        if given.dtype == torch.bool:
            if given.shape not in ((self._n_tokens,), (n_rows, self._n_tokens)):
                raise ShapeError(
                    f"forbidden has shape {list(given.shape)}: expected [{self._n_tokens}], or "
                    f"[{n_rows}, {self._n_tokens}] for one mask per row."
                )
            return given.to(self._device)
        if given.is_floating_point() and given.numel():
            raise OptionError(f"forbidden is {given.dtype}: expected whole ids, or a bool mask.")
        ids = given.to("cpu", torch.int64).flatten()
        outside = ids[(ids < 0) | (ids >= self._n_tokens)]
        if len(outside):
            raise OptionError(
                f"forbidden token {int(outside[0])} does not exist: expected ids from 0 to {self._n_tokens - 1}."
            )
        mask = torch.zeros(self._n_tokens, dtype=torch.bool)
        mask[ids] = True
        return mask.to(self._device)


class OneOf:
    """A constraint: the answer is one of these suffixes, token for token.

    Greedy decoding under it walks the likeliest branch at every fork; for the likeliest suffix as a whole use
    `score_suffixes`.

    Args:
        suffixes: token ids, each with its eos.
        n_tokens: rows of the table, `config.text.vocab_size`.
    """

    def __init__(self, suffixes: Iterable[Sequence[int]], n_tokens: int) -> None:
        self._n_tokens = n_tokens
        self._next: dict[tuple[int, ...], set[int]] = {}
        for suffix in suffixes:
            for i, token in enumerate(suffix):
                self._next.setdefault(tuple(suffix[:i]), set()).add(token)
        if not self._next:
            raise OptionError("OneOf of nothing: expected at least one suffix of at least one token.")

    def __call__(self, written: tuple[int, ...]) -> Tensor:
        mask = torch.zeros(self._n_tokens, dtype=torch.bool)
        mask[list(self._next.get(written, ()))] = True
        return mask
