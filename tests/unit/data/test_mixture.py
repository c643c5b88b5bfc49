"""Mixtures: exact shares, nothing twice, nothing left out, the same from any place, for any number of ranks."""

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma.data.example import Example
from paligemma.data.loader import Loader, LoaderOptions
from paligemma.data.mixture import DECK, Mixture, Part, quotas
from paligemma.data.order import Line, permutation
from paligemma.errors import DataError, OptionError
from tests.training_runs import processor


class Numbers:
    """Rows that say who they are."""

    def __init__(self, n: int, name: str = "n") -> None:
        self.n, self.name = n, name

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Example:
        return Example((), self.name, str(index), where=f"{self.name} {index}")

    def varied(self, index: int, epoch: int) -> Example:
        return Example((), self.name, f"{index} in pass {epoch}", where=f"{self.name} {index}")


@given(st.integers(1, 400), st.integers(0, 2**32), st.integers(0, 5))
def test_a_computed_order_is_a_permutation(n, seed, epoch):
    assert sorted(permutation(n, seed, epoch)) == list(range(n))


def test_orders_of_passes_and_seeds_differ_and_look_shuffled():
    n = 1000
    first, second, other = permutation(n, 0, 0), permutation(n, 0, 1), permutation(n, 1, 0)
    assert (first != second).mean() > 0.95 < (first != other).mean()
    for order in (first, second, other):
        # Of a random order, neighbours correlate by about n^-0.5, and so does the place with the row.
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 * n**-0.5
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 5 * n**-0.5


@given(n=st.integers(1, 3000), seed=st.integers(0, 9), epoch=st.integers(0, 4), shuffled=st.booleans())
def test_a_row_is_found_again_at_its_place(n, seed, epoch, shuffled):
    line = Line(n, seed if shuffled else None)
    for p in {0, n // 3, n - 1}:
        assert line.place(line.at(epoch * n + p)) == epoch * n + p


def test_a_line_goes_on_from_pass_to_pass():
    line = Line(3, None)
    assert [line.at(p) for p in (0, 2, 3, 8)] == [(0, 0), (2, 0), (0, 1), (2, 2)]


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-3), st.integers(1, 300))
def test_a_deck_is_full_fair_and_leaves_nobody_out(weights, deck):
    shares = [w / sum(weights) for w in weights]
    cards = quotas(shares, deck)
    present = sum(share > 0 for share in shares)
    assert sum(cards) == max(deck, present)
    assert all((card > 0) == (share > 0) for card, share in zip(cards, shares, strict=True))
    if all(share * deck >= 1 or share == 0 for share in shares):
        assert all(abs(card - share * deck) < 1.0001 for card, share in zip(cards, shares, strict=True))


def test_weights_are_kept_deck_by_deck():
    mixture = Mixture({"a": Part(source=Numbers(10), weight=3), "b": Part(source=Numbers(7), weight=1)})
    for deck in (0, 5):
        seen = Counter(mixture.at(deck * DECK + i).part for i in range(DECK))
        assert seen == {"a": DECK * 3 // 4, "b": DECK // 4}


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.9), (2.0, 0.75), (1e9, 0.5)])
def test_temperature_evens_weights_out(temperature, expected):
    parts = {"a": Part(source=Numbers(900)), "b": Part(source=Numbers(100))}
    assert Mixture(parts, temperature=temperature).shares[0] == pytest.approx(expected)


def test_every_source_is_walked_in_passes_of_its_own():
    mixture = Mixture({"a": Part(source=Numbers(10), weight=1), "b": Part(source=Numbers(64), weight=1)}, seed=3)
    draws = [mixture.at(i).draw for i in range(400) if mixture.at(i).part == "a"]
    for epoch, rows in itertools.groupby(draws, key=lambda draw: draw.epoch):
        rows = [draw.row for draw in rows]
        assert len(set(rows)) == len(rows)
        assert len(rows) == 10 or epoch == draws[-1].epoch
    assert mixture[0].suffix.endswith("in pass 0")


sizes = st.lists(st.integers(1, 3000), min_size=1, max_size=5)


@given(sizes, st.data())
def test_drop_shows_every_row_exactly_once(sizes, data):
    weights = data.draw(st.lists(st.floats(0.01, 50), min_size=len(sizes), max_size=len(sizes)))
    parts = {f"s{i}": Part(source=Numbers(n), weight=w) for i, (n, w) in enumerate(zip(sizes, weights, strict=True))}
    mixture = Mixture(parts, exhaustion="drop", seed=data.draw(st.integers(0, 9)))
    assert len(mixture) == sum(sizes)
    seen = Counter((place.part, place.draw.row) for place in map(mixture.at, range(len(mixture))))
    assert len(seen) == sum(sizes)
    again = Counter((place.part, place.draw) for place in map(mixture.at, range(len(mixture), 2 * len(mixture))))
    assert len(again) == sum(sizes)
    assert {draw.epoch for _, draw in again} == {1}


def test_stop_ends_with_the_first_that_is_used_up():
    mixture = Mixture(
        {"a": Part(source=Numbers(5000), weight=3), "b": Part(source=Numbers(100), weight=1)}, exhaustion="stop"
    )
    seen = Counter(mixture.at(i).part for i in range(len(mixture)))
    assert seen == {"a": 300, "b": 100}


def test_a_limit_uses_the_same_few_rows_in_every_pass():
    mixture = Mixture({"a": Part(source=Numbers(1000), limit=5), "b": Part(source=Numbers(1000), weight=5)}, seed=1)
    rows = [mixture.at(i).draw.row for i in range(4 * DECK) if mixture.at(i).part == "a"]
    assert len(set(rows)) == 5 < len(rows)
    assert Counter(rows).most_common()[-1][1] >= len(rows) // 5


def test_counts_say_what_stood_before_a_place():
    mixture = Mixture(
        {"a": Part(source=Numbers(700), weight=2), "b": Part(source=Numbers(5000), weight=5)}, exhaustion="drop"
    )
    for position in (0, 1, 300, 2500, 5600):
        seen = Counter(mixture.at(i).part for i in range(position))
        assert mixture.counts(position) == {name: seen[name] for name in ("a", "b")}


def test_the_billionth_example_is_found_in_a_fresh_process_as_here():
    code = "from tests.unit.data.test_mixture import far; print(far().at(10**9))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(far().at(10**9))


def far() -> Mixture:
    return Mixture({"a": Part(source=Numbers(10**9), weight=3), "b": Part(source=Numbers(10**6), weight=1)}, seed=5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_a_mixture_without_repeating_or_skipping(ranks):
    def names(world_size: int, batch_size: int, n_steps: int) -> list[str]:
        mixture = Mixture(
            {"a": Part(source=Numbers(20, "a"), weight=1), "b": Part(source=Numbers(40, "b"), weight=2)},
            exhaustion="drop",
        )
        shared = []
        for step in range(n_steps):
            parts = [
                Loader(mixture, processor(), LoaderOptions(batch_size=batch_size), rank, world_size).step(step).names
                for rank in range(world_size)
            ]
            shared += [name for together in itertools.zip_longest(*parts) for name in together if name]
        return shared

    alone, together = names(1, 6, 10), names(ranks, 6, 10)
    assert together == alone
    assert len(set(alone)) == 60
    # Half-way another number of ranks and another batch size take over: the line goes on.
    assert names(1, 6, 5) + names(ranks, 15, 4)[30:] == alone


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({}, {}, "a mixture of nothing"),
        ({"a": Part(source=Numbers(3), weight=-1)}, {}, "the weight of a is -1"),
        ({"a": Part(source=Numbers(3), weight=0)}, {}, "all weights are 0"),
        ({"a": Part(source=Numbers(3), limit=0)}, {}, "the limit of a is 0"),
        ({"a": Part(source=Numbers(3))}, {"temperature": 0}, "temperature=0"),
        ({"a": Part(source=Numbers(3))}, {"exhaustion": "repeet"}, "Did you mean 'repeat'"),
    ],
)
def test_what_is_no_mixture_is_refused_in_a_line(parts, options, message):
    with pytest.raises(OptionError, match=message):
        Mixture(parts, **options)


def test_a_source_of_weight_0_is_switched_off():
    parts = {"on": Part(source=Numbers(10, "on"), weight=1), "off": Part(source=Numbers(1000, "off"), weight=0)}
    for exhaustion in ("repeat", "drop", "stop"):
        mixture = Mixture(parts, exhaustion=exhaustion)
        assert len(mixture) == 10
        assert {mixture[i].prefix for i in range(30)} == {"on"}
    once = mixture.once()
    assert sorted(int(once[i].suffix) for i in range(len(once))) == list(range(10))
    reversed_order = Mixture(dict(reversed(parts.items()))).once()
    assert {reversed_order[i].prefix for i in range(len(reversed_order))} == {"on"}


def test_no_temperature_is_too_cold_for_a_share():
    parts = {"many": Part(source=Numbers(2000)), "few": Part(source=Numbers(20))}
    cold = Mixture(parts, temperature=0.01)
    assert cold.shares[0] > 0.999
    assert cold.shares[1] > 0
    assert quotas(cold.shares)[1] >= 1


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="a: no rows"):
        Mixture({"a": Part(source=Numbers(0))})


@pytest.mark.parametrize("share", [1e-3, 3e-4, 1e-4])
def test_small_shares_are_kept(share):
    cards = quotas([1 - share, share])
    assert cards[1] / sum(cards) == pytest.approx(share, rel=0.13)
    assert sum(quotas([1 - 1e-9, 1e-9])) < 100_000  # cards are kept in memory
