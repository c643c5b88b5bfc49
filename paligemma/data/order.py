"""Shuffled orders that are computed, not stored: row number p of epoch e, for any p and e, in no time and no memory.

A Feistel network is a permutation of all numbers of 2k bits whatever its round function is; walking on until a number
falls below n makes it one of 0 … n - 1 ("cycle walking", Black & Rogaway 2002). So a billion rows need no table,
seeking costs nothing, and every process computes the same order from the seed alone.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

N_ROUNDS = 6
_Ints = NDArray[np.int64]


class Draw(NamedTuple):
    """A row of a source and the pass over it, counted from 0, in which it is drawn."""

    row: int
    epoch: int


@dataclass(frozen=True)
class Line:
    """All rows of a source one after another, epoch after epoch, without end; every epoch in an order of its own.

    Attributes:
        n: rows of the source.
        seed: of the orders; None keeps that of the source.
    """

    n: int
    seed: int | tuple[int, ...] | None = 0

    def at(self, place: int) -> Draw:
        """What stands at a place, counted from 0."""
        epoch, p = divmod(place, self.n)
        return Draw(p if self.seed is None else permuted(p, self.n, self.seed, epoch), epoch)

    def place(self, draw: Draw) -> int:
        """Where a row stands in an epoch: `at` the other way round."""
        row, epoch = draw
        return epoch * self.n + (row if self.seed is None else unpermuted(row, self.n, self.seed, epoch))


def permuted(p: int, n: int, seed: int | tuple[int, ...], epoch: int = 0) -> int:
    """The row at place p of a shuffled 0 … n - 1."""
    half, keys = _network(n, seed, epoch)
    mask = (1 << half) - 1
    while True:
        left, right = p >> half, p & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        p = (left << half) | right
        if p < n:
            return p


def unpermuted(row: int, n: int, seed: int | tuple[int, ...], epoch: int = 0) -> int:
    """The place of a row in a shuffled 0 … n - 1: `permuted` backwards."""
    half, keys = _network(n, seed, epoch)
    mask = (1 << half) - 1
    while True:
        left, right = row >> half, row & mask
        for key in reversed(keys):
            left, right = right ^ (_mix(left + key) & mask), left
        row = (left << half) | right
        if row < n:
            return row


def permutation(n: int, seed: int | tuple[int, ...], epoch: int = 0) -> _Ints:
    """int64[n]: all of them at once."""
    return np.fromiter((permuted(p, n, seed, epoch) for p in range(n)), np.int64, n)


@lru_cache(maxsize=256)
def _network(n: int, seed: int | tuple[int, ...], epoch: int) -> tuple[int, tuple[int, ...]]:
    """Bits of a half, and a key per round."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    entropy = [*(seed if isinstance(seed, tuple) else (seed,)), epoch, n]
    keys = np.random.SeedSequence(entropy).generate_state(N_ROUNDS, np.uint64)
    return half, tuple(int(key) for key in keys)


def _mix(x: int) -> int:
    """Spread 64 bits over 64 bits (the finaliser of SplitMix64, Steele, Lea & Flood 2014)."""
    x &= 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
