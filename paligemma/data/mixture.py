"""Several sources as one endless line of examples, each as often as its weight says.

Positions are dealt in decks of `DECK` cards, of more where a share is too small for them. A deck holds each source by
its share, rounded so that the deck is full and nobody with a weight is left out; its order is shuffled by the seed and
the number of the deck. So which source stands at position p, and how often it stood before p, are computed from p
alone: the state of a mixture is one number, and seeking to the billionth example costs what the first one does.

    weights cats 3, dogs 1:   deck 0  c d c c | c c d c | …      deck 1  d c c c | …
    cats' rows: its own shuffled epochs, one after another, whatever the others do

What happens when a source has been seen once is a rule:

    "repeat"    it begins anew, in another order: the mixture has no end
    "drop"      it leaves, the others go on by their weights: everything is seen exactly once
    "stop"      the mixture ends with the first source that is used up
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from paligemma.data.example import Example
from paligemma.data.order import Draw, Line
from paligemma.errors import DataError, OptionError, nearest

Exhaustion = Literal["repeat", "drop", "stop"]
DECK = 2048
LARGEST_DECK = 2**16  # kept in memory while it is dealt
LEAST_SHARE = 1e-12  # of the largest, for what a temperature makes next to nothing: a weight is never switched off
_CARDS = 4  # of the smallest share: rounding changes it by an eighth at most


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of a mixture.

    Attributes:
        source: rows by number.
        weight: share of the positions, relative to the other parts; None: the number of its rows.
        limit: rows of it that are used at most, a fixed random choice of them; None: all.
        factor: of the share that comes of weight and temperature, before all shares are made to sum to 1.
    """

    source: Any
    weight: float | None = None
    limit: int | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Place:
    """What stands at a position: whose row, which, in which pass over that source."""

    part: str
    draw: Draw


@dataclass(frozen=True)
class _Phase:
    """A stretch of positions with the same parts in it: `decks` times `quota` cards of each."""

    first: int  # position
    decks: int | None  # None: without end
    quota: tuple[int, ...]  # per part
    before: tuple[int, ...]  # cards of each part dealt before this phase

    @property
    def size(self) -> int:
        return sum(self.quota)


class Mixture:
    """A weighted mixture; a source whose rows are positions, already in order.

        mixture = Mixture({"caption": Part(source=a, weight=3), "detect": Part(source=b, weight=1)}, seed=7)
        mixture.at(10**9)      Place(part="caption", draw=Draw(row=…, epoch=…))
        mixture[10**9]         the example there

    Args:
        parts: name -> part.
        temperature: weights are raised to 1 / temperature: 1 keeps them, larger values even them out.
        exhaustion: what happens when a part has been seen once.
        seed: of all orders.
        shuffle: False keeps the rows of every source in their order; a limit takes its first rows.

    Raises:
        OptionError: no part, a weight that is no share, an unknown rule. DataError: an empty source.
    """

    is_ordered = True  # the loader takes positions as they come

    def __init__(
        self,
        parts: Mapping[str, Part],
        *,
        temperature: float = 1.0,
        exhaustion: Exhaustion = "repeat",
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if exhaustion not in get_args(Exhaustion):
            hint = nearest(str(exhaustion), get_args(Exhaustion))
            raise OptionError(f"exhaustion={exhaustion!r}: expected one of {', '.join(get_args(Exhaustion))}.{hint}")
        if not (_is_number(temperature) and temperature >= 0.01):
            raise OptionError(f"temperature={temperature!r}: expected a number of 0.01 or more; 1 keeps the weights.")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise OptionError(f"seed={seed!r}: expected a whole number of 0 or more.")
        self.names, self.parts, self.seed = tuple(parts), dict(parts), seed
        self.exhaustion, self.temperature, self.shuffle = exhaustion, temperature, shuffle
        self.sizes = tuple(_size(name, part) for name, part in parts.items())
        self.shares = shares(
            [part.weight for part in parts.values()], self.sizes, temperature, names=self.names,
            factors=[part.factor for part in parts.values()],
        )  # fmt: skip
        self._lines = tuple(
            Line(n, (seed, i) if shuffle else None) for i, n in enumerate(self.sizes)
        )  # every part has orders of its own
        self._chosen = tuple(
            _choice(part, n, (seed, i, 1)) if shuffle else None
            for i, (part, n) in enumerate(zip(parts.values(), self.sizes, strict=True))
        )
        self._phases = phases(self.shares, self.sizes, exhaustion)
        self._starts = [phase.first for phase in self._phases]

    def __len__(self) -> int:
        """Positions until all has been seen once ("drop") or until the end ("stop"); "repeat": as many as rows."""
        last = self._phases[-1]
        if last.decks is None:
            return sum(n for n, share in zip(self.sizes, self.shares, strict=True) if share)
        return last.first + last.decks * last.size

    def at(self, position: int) -> Place:
        """What stands at a position; beyond the end of "drop" and "stop" the mixture begins anew."""
        lap = 0
        if self._phases[-1].decks is not None:
            lap, position = divmod(position, len(self))
        phase = self._phases[bisect_right(self._starts, position) - 1]
        deck, card = divmod(position - phase.first, phase.size)
        order, seen = _deck(phase.quota, (self.seed, lap, phase.first), deck)
        part = int(order[card])
        count = phase.before[part] + deck * phase.quota[part] + int(seen[card])
        if lap:
            count += lap * self._dealt(part)
        draw = self._lines[part].at(count)
        chosen = self._chosen[part]
        return Place(self.names[part], draw if chosen is None else Draw(chosen.at(draw.row).row, draw.epoch))

    @property
    def identity(self) -> str:
        """Everything that decides which row stands where: two mixtures of one identity are one line."""
        parts = ", ".join(
            f"{name} {quota} of {n:,}" + ("" if chosen is None else f" chosen among {chosen.n:,}")
            for name, quota, n, chosen in zip(self.names, quotas(self.shares), self.sizes, self._chosen, strict=True)
        )
        return f"{parts}; {self.exhaustion}; seed {self.seed}; {'shuffled' if self.shuffle else 'in order'}"

    def once(self) -> "Once":
        """Every row that is used, once, whatever the weights."""
        return Once(self)

    def __getitem__(self, position: int) -> Example:
        place = self.at(position)
        return fetch(self.parts[place.part].source, place.draw)

    def where(self, position: int) -> str:
        """How messages call a position's row."""
        place = self.at(position)
        source = self.parts[place.part].source
        told = source.where(place.draw.row) if hasattr(source, "where") else f"row {place.draw.row}"
        return f"{place.part}: {told}"

    def counts(self, position: int) -> dict[str, int]:
        """How many examples of each part stand before a position of the first lap."""
        phase = self._phases[bisect_right(self._starts, position) - 1]
        deck, card = divmod(position - phase.first, phase.size)
        order, _ = _deck(phase.quota, (self.seed, 0, phase.first), deck)
        begun = np.bincount(order[:card], minlength=len(self.names))
        return {name: phase.before[i] + deck * phase.quota[i] + int(begun[i]) for i, name in enumerate(self.names)}

    def _dealt(self, part: int) -> int:
        """Cards of a part in one lap."""
        last = self._phases[-1]
        return last.before[part] + (last.decks or 0) * last.quota[part]


class Once:
    """The rows that a mixture uses, each once; sources one after another."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        used = zip(mixture.sizes, mixture.shares, strict=True)
        self._ends = list(accumulate(n if share else 0 for n, share in used))

    def __len__(self) -> int:
        return self._ends[-1]

    def at(self, index: int) -> tuple[Any, int]:
        """The source of a row, and its number there."""
        part = bisect_right(self._ends, range(len(self))[index])
        row = index - (self._ends[part - 1] if part else 0)
        chosen = self.mixture._chosen[part]
        return self.mixture.parts[self.mixture.names[part]].source, row if chosen is None else chosen.at(row).row

    def where(self, index: int) -> str:
        """How messages call a row."""
        source, row = self.at(index)
        told: str = source.where(row)
        return told

    def __getitem__(self, index: int) -> Example:
        source, row = self.at(index)
        example: Example = source[row]
        return example


def fetch(source: Any, draw: Draw) -> Example:
    """A drawn row; sources whose rows differ from pass to pass are told the pass."""
    varied = getattr(source, "varied", None)
    example: Example = source[draw.row] if varied is None else varied(draw.row, draw.epoch)
    return example


def shares(
    weights: Sequence[float | None], sizes: Sequence[int], temperature: float, *, names: Sequence[str],
    factors: Sequence[float] | None = None,
) -> tuple[float, ...]:  # fmt: skip
    """Weights as shares that sum to 1; a weight left out is the number of rows.

    Args:
        factors: of the shares, after `temperature` has evened the weights out.

    Raises:
        OptionError: a weight that is negative or no number, or nothing above 0.
    """
    if not weights:
        raise OptionError("a mixture of nothing: expected at least one source.")
    given = [float(n) if weight is None else float(weight) for weight, n in zip(weights, sizes, strict=True)]
    for name, weight in zip(names, given, strict=True):
        if not (np.isfinite(weight) and weight >= 0):
            raise OptionError(f"the weight of {name} is {weight}: expected a number of 0 or more.")
    if not any(given):
        raise OptionError(f"all weights are 0 ({', '.join(names)}): expected at least one above 0.")
    largest = max(given)  # relative to it, no power is too large for a number
    evened = [
        factor * max((weight / largest) ** (1 / temperature), LEAST_SHARE) if weight else 0.0
        for weight, factor in zip(given, factors or [1.0] * len(given), strict=True)
    ]
    return tuple(weight / sum(evened) for weight in evened)


def quotas(given: Sequence[float], deck: int | None = None) -> tuple[int, ...]:
    """Cards of each source in a deck: its share rounded by largest remainder, at least 1 where the share is above 0.

    Args:
        deck: cards; None: `DECK`, doubled to `LARGEST_DECK` at most while the smallest share would be a card or two.
    """
    present = [share > 0 for share in given]
    if deck is None:
        deck, smallest = DECK, min(share for share in given if share > 0)
        while smallest * deck < _CARDS and deck < LARGEST_DECK:
            deck *= 2
    deck = max(deck, sum(present))
    exact = [share * deck for share in given]
    cards = [max(int(x), int(p)) for x, p in zip(exact, present, strict=True)]
    order = sorted((i for i, p in enumerate(present) if p), key=lambda i: cards[i] - exact[i])
    while sum(cards) < deck:
        for i in order[: deck - sum(cards)]:
            cards[i] += 1
    while sum(cards) > deck:  # many tiny shares were lifted to 1: the largest pay
        cards[max(range(len(cards)), key=lambda i: cards[i] - exact[i] if cards[i] > 1 else -deck)] -= 1
    return tuple(cards)


def phases(given: Sequence[float], sizes: Sequence[int], exhaustion: Exhaustion) -> tuple[_Phase, ...]:
    """The stretches of a mixture, between which parts leave."""
    quota = quotas(given)
    if exhaustion == "repeat":
        return (_Phase(0, None, quota, tuple(0 for _ in sizes)),)
    found: list[_Phase] = []
    left = [n if share else 0 for n, share in zip(sizes, given, strict=True)]
    dealt, first = [0] * len(sizes), 0

    def deal(decks: int, cards: Sequence[int]) -> None:
        nonlocal first
        if decks and sum(cards):
            found.append(_Phase(first, decks, tuple(cards), tuple(dealt)))
            first += decks * sum(cards)
            for i, card in enumerate(cards):
                dealt[i] += decks * card
                left[i] -= decks * card

    while any(left):
        here = [share if rest else 0.0 for share, rest in zip(given, left, strict=True)]
        quota = quotas([share / sum(here) for share in here])
        whole = min(rest // card for rest, card in zip(left, quota, strict=True) if card)
        deal(whole, quota)
        # The last deck before somebody leaves is as large as what is left allows, by the same shares.
        if any(left):
            scale = min(rest / card for rest, card in zip(left, quota, strict=True) if card)
            last = [min(rest, round(card * scale)) for rest, card in zip(left, quota, strict=True)]
            gone = min((i for i, card in enumerate(quota) if card), key=lambda i: left[i] / quota[i])
            last[gone] = left[gone]
            deal(1, last)
        if exhaustion == "stop" and any(not rest and share for rest, share in zip(left, given, strict=True)):
            break
    return tuple(found)


def _size(name: str, part: Part) -> int:
    n = len(part.source)
    if getattr(part.source, "is_sequential", False) or getattr(part.source, "is_ordered", False):
        kind = "a mixture" if getattr(part.source, "is_ordered", False) else "a stream"
        raise OptionError(f"{name} is {kind}: expected a source whose rows can be had by number. Download it first.")
    if part.limit is not None and (isinstance(part.limit, bool) or not isinstance(part.limit, int) or part.limit < 1):
        raise OptionError(f"the limit of {name} is {part.limit!r}: expected a whole number of at least 1, or None.")
    if part.weight is not None and not _is_number(part.weight):
        raise OptionError(f"the weight of {name} is {part.weight!r}: expected a number of 0 or more, below 1e12.")
    if not n:
        raise DataError(f"{name}: no rows: expected a source with at least one. Leave it out of the mixture.")
    return n if part.limit is None else min(n, part.limit)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _choice(part: Part, n: int, seed: tuple[int, ...]) -> Line | None:
    """Which rows a limit leaves: the first n places of a fixed shuffle; None where all are used."""
    return Line(len(part.source), seed) if n < len(part.source) else None


@lru_cache(maxsize=16)
def _deck(quota: tuple[int, ...], seed: tuple[int, ...], deck: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The part of each card of a deck, and how many of the same part lie before it."""
    cards = np.repeat(np.arange(len(quota)), quota)
    order: NDArray[np.int64] = np.random.default_rng([*seed, deck]).permutation(cards)
    seen = np.zeros(len(order), np.int64)
    for part in range(len(quota)):
        mine = order == part
        seen[mine] = np.arange(int(mine.sum()))
    return order, seen
