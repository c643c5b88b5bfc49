"""Policies: what they keep, what they draw, what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paligemma.engine.sampling import (
    GREEDY,
    Sampling,
    Streams,
    choose,
    draw_tokens,
    filter_logits,
    keep_top_k,
    keep_top_p,
    token_logprobs,
)
from paligemma.errors import OptionError

INF = torch.inf
rows = st.lists(st.integers(-8, 8), min_size=1, max_size=12)  # whole numbers tie often


@given(rows, st.integers(1, 15))
def test_top_k_keeps_the_k_highest_and_their_ties(values, k):
    logits = torch.tensor([values], dtype=torch.float32)
    kept = (keep_top_k(logits, k) > -INF)[0].tolist()
    threshold = sorted(values, reverse=True)[min(k, len(values)) - 1]
    assert kept == [value >= threshold for value in values]


@given(rows, st.floats(0.0, 0.999))
def test_the_nucleus_reaches_p_and_would_not_without_its_least_likely_tokens(values, p):
    logits = torch.tensor([values], dtype=torch.float64)
    probs = logits.softmax(-1)[0]
    kept = (keep_top_p(logits, p) > -INF)[0]
    assert kept.any()
    assert probs[kept].sum() >= p - 1e-12
    least = probs[kept].min()
    assert probs[kept & (probs > least + 1e-12)].sum() < p or len(set(values)) == 1 or p == 0
    assert not (probs[~kept] > least - 1e-12).any()  # whatever ties with the last one stays


def test_the_example_of_the_docstring():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    assert (keep_top_p(logits, 0.6) > -INF).tolist() == [[True, True, True, False]]


def test_a_total_that_rounds_below_p_keeps_every_token():
    logits = torch.zeros(1, 257_152)
    logits[0, 0] = 3.0
    assert bool((keep_top_p(logits, 1 - 1e-9) > -INF).all())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5), Sampling(top_k=2), Sampling(top_p=0.6)])
def test_draws_at_evenly_spread_numbers_have_the_frequencies_of_the_distribution(sampling):
    logits = torch.tensor([2.0, -1.0, 0.5, 0.5, -INF, 1.0])
    n = 4000
    spread = [(i + 0.5) / n for i in range(n)]
    filtered = filter_logits(logits.expand(n, -1), sampling)
    frequency = torch.bincount(draw_tokens(filtered, spread), minlength=6) / n
    expected = filtered[0].softmax(-1)
    assert (frequency - expected).abs().max() <= 1.01 / n
    assert expected[4] == 0


@given(st.lists(st.booleans(), min_size=1, max_size=9).filter(any), st.floats(0, 1, exclude_max=True))
def test_a_forbidden_token_is_never_drawn(allowed, uniform):
    logits = torch.where(torch.tensor([allowed]), 0.0, -INF)
    for u in (uniform, 0.0, float(np.nextafter(1, 0))):
        assert allowed[int(draw_tokens(logits, [u]))]


def test_of_equally_likely_tokens_greedy_takes_the_lowest_id():
    logits = torch.zeros(2, 1000)
    logits[0, [17, 400, 999]] = 1.0
    streams = Streams([0, 0])
    assert choose(GREEDY, logits, [0, 1], streams).tolist() == [17, 0]
    assert choose(Sampling(temperature=0), logits, [0, 1], streams).tolist() == [17, 0]


def test_a_stream_belongs_to_its_seed_and_copy_alone():
    together = Streams([5, 9], n_copies=2)
    first = together.draw([0, 1, 2, 3])
    assert len(set(first)) == 4
    assert first[:2] == Streams([5], 2).draw([0, 1])
    assert first[2] == Streams([9]).draw([0])[0]
    assert together.draw([3]) != [first[3]]  # a row moves on only when it draws
    assert Streams([9]).draw([0, 0])[1] == together.draw([2])[0]


def test_log_probabilities_are_those_of_the_whole_distribution():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([4, 0, 49])
    expected = logits.log_softmax(-1)[range(3), tokens]
    torch.testing.assert_close(token_logprobs(logits, tokens), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: expected 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 1.5}, "top_p=1.5: expected a probability"),
        ({"seed": -3}, "seed=-3"),
    ],
)
def test_impossible_policies_are_refused_by_name(options, message):
    with pytest.raises(OptionError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 5e-324])
def test_however_cold_a_draw_is_the_likeliest_token(temperature):
    logits = torch.tensor([[1.0, 30.0, -INF, 29.0]])
    for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.5)):
        policy = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        assert choose(policy, logits, [0], Streams([3])).tolist() == [1]
