"""Both beam searches on toy language models, against enumeration of every answer and the rules in plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paligemma.engine.beam import BEAM_SEARCHES, beam_search, beam_search_bv, beam_search_hf, top_first
from paligemma.engine.filters import OneOf
from paligemma.engine.generate import generate
from paligemma.engine.prompts import Decoded
from paligemma.errors import OptionError
from tests.toy_model import EOS, ToyModel, all_answers, cut_answers, loglikelihood, prompts

ROWS = [[2, 3], [4], [3, 3, 2], [0, 4]]
INF = torch.inf
models = st.builds(ToyModel, st.just(5), seed=st.integers(0, 10_000), eos_bonus=st.sampled_from([-2.0, 0.0, 2.0]))
BV_HF = [beam_search_bv, beam_search_hf]


def extended(model, prompt, beams):
    """Every continuation of every beam by one token: (score, index of the beam, token), in order of beam and token."""
    return [
        (score + logprob, b, token)
        for b, (score, words) in enumerate(beams)
        for token, logprob in enumerate(model.logprobs((*prompt, *words)))
    ]


def bv_rules(model, prompt, n, limit):
    """spec: one best finished, n live; every live beam may end at every step; stop when the best live is behind."""
    live, best = [(0.0, ())], (-INF, ())
    for _ in range(limit):
        for score, words in live:
            ended = score + model.logprobs((*prompt, *words))[EOS]
            best = max(best, (ended, (*words, EOS)), key=lambda entry: entry[0])
        going = [entry for entry in extended(model, prompt, live) if entry[2] != EOS]
        going.sort(key=lambda entry: -entry[0])
        live = [(score, (*live[b][1], token)) for score, b, token in going[:n]]
        if live[0][0] < best[0]:
            break
    return best[1]


def hf_rules(model, prompt, n, limit, length_penalty, early_stopping):
    """spec: a pool of n finished; only ends among the first n of the 2n best candidates finish; scores by length."""
    live, pool = [(0.0, ())], []
    for step in range(1, limit + 1):
        ranked = sorted(extended(model, prompt, live), key=lambda entry: -entry[0])[: 2 * n]
        for score, b, token in ranked[:n]:
            if token == EOS or step == limit:
                pool.append((score / step**length_penalty, (*live[b][1], token)))
        pool = sorted(pool, key=lambda entry: -entry[0])[:n]
        live = [(score, (*live[b][1], token)) for score, b, token in ranked if token != EOS][:n]
        if len(pool) == n:
            hoped = limit if early_stopping == "never" and length_penalty > 0 else step
            if early_stopping is True or live[0][0] / hoped**length_penalty <= pool[-1][0]:
                break
    return pool[0][1]


@given(models, st.integers(1, 4), st.integers(1, 6))
def test_the_original_search_follows_its_rules(model, n, limit):
    got = beam_search_bv(model, prompts(ROWS), n_beams=n, max_new_tokens=limit)
    assert [row.tokens for row in got] == [bv_rules(model, row, n, limit) for row in ROWS]
    for prompt, row in zip(ROWS, got, strict=True):
        assert row.finish_reason == "stop"
        assert row.tokens.index(EOS) == len(row.tokens) - 1 < limit
        assert row.logprob == pytest.approx(loglikelihood(model, prompt, row.tokens), abs=1e-4)


@given(
    models, st.integers(2, 4), st.integers(1, 6), st.sampled_from([0.0, 0.6, 1.0, -0.5]),
    st.sampled_from([False, True, "never"]),
)  # fmt: skip
def test_the_transformers_search_follows_its_rules(model, n, limit, length_penalty, early_stopping):
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    got = beam_search_hf(model, prompts(ROWS), n_beams=n, max_new_tokens=limit, **options)
    assert [row.tokens for row in got] == [hf_rules(model, row, n, limit, *options.values()) for row in ROWS]
    for prompt, row in zip(ROWS, got, strict=True):
        assert row.finish_reason == ("stop" if row.tokens[-1] == EOS else "length")
        assert row.logprob == pytest.approx(loglikelihood(model, prompt, row.tokens), abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_with_room_for_all_beams_the_original_finds_the_likeliest_answer_of_all(seed):
    model, limit = ToyModel(4, seed=seed, eos_bonus=-1.0), 4
    got = beam_search_bv(model, prompts(ROWS[2:3]), n_beams=3**limit, max_new_tokens=limit)
    best = max(all_answers(4, limit), key=lambda answer: loglikelihood(model, ROWS[2], answer))
    assert got[0].tokens == best


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_with_room_for_all_beams_the_transformers_search_finds_the_best_score_of_all(seed, length_penalty):
    model, limit = ToyModel(4, seed=seed, eos_bonus=-1.0), 4
    options = {"length_penalty": length_penalty, "early_stopping": "never"}
    (got,) = beam_search_hf(model, prompts(ROWS[2:3]), n_beams=4**limit, max_new_tokens=limit, **options)
    everything = all_answers(4, limit) + cut_answers(4, limit)
    best = max(everything, key=lambda a: loglikelihood(model, ROWS[2], a) / len(a) ** length_penalty)
    assert got.tokens == best


@pytest.mark.parametrize("search", BV_HF)
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_does_not_depend_on_batch_mates_or_padding(search, side):
    model = ToyModel(6, seed=11, eos_bonus=1.0)
    together = search(model, prompts(ROWS, side), n_beams=3, max_new_tokens=8)
    alone = [search(model, prompts([row]), n_beams=3, max_new_tokens=8)[0] for row in ROWS]
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    assert len({len(row.tokens) for row in alone}) > 1  # they stop at unlike steps


@pytest.mark.parametrize("search", BV_HF)
def test_an_example_that_is_done_leaves_the_search(search):
    """A sure ending stops its example at once, whatever its mates do."""
    model = ToyModel(6, seed=11, eos_bonus=9.0)
    search(model, prompts(ROWS), n_beams=2, max_new_tokens=50)
    assert model.n_step_rows < 2 * len(ROWS) * 6


def test_of_equal_scores_the_first_wins():
    """All tokens equally likely: the earliest end is the best, then the lowest ids."""
    model = ToyModel(5, spread=0.0)
    (bv,) = beam_search_bv(model, prompts([[2]]), n_beams=2, max_new_tokens=3)
    assert bv.tokens == (EOS,)
    (hf,) = beam_search_hf(model, prompts([[2]]), n_beams=2, max_new_tokens=3, early_stopping=True)
    assert hf.tokens == (EOS,)
    (hf,) = beam_search_hf(model, prompts([[2]]), n_beams=2, max_new_tokens=3, forbidden=[EOS])
    assert hf.tokens == (0, 0, 0)


def test_one_beam_is_greedy_decoding_except_where_the_original_is_called_by_name():
    model = ToyModel(6, seed=4, eos_bonus=0.5)
    batch = prompts([[i, 2] for i in range(2, 6)] + ROWS)
    greedy = generate(model, batch, max_new_tokens=8)
    for kind in BEAM_SEARCHES:
        assert beam_search(model, batch, n_beams=1, max_new_tokens=8, kind=kind) == greedy
    surprise = beam_search_bv(model, batch, n_beams=1, max_new_tokens=8)
    assert surprise != greedy
    for one, other in zip(surprise, greedy, strict=True):  # the best place to stop along the greedy path
        assert other.tokens[: len(one.tokens) - 1] == one.tokens[:-1]


def test_the_kind_is_the_configurations_unless_named():
    model, batch = ToyModel(6, seed=4, eos_bonus=-1.0), prompts(ROWS)
    options = {"n_beams": 3, "max_new_tokens": 6}
    bv, hf = beam_search_bv(model, batch, **options), beam_search_hf(model, batch, **options)
    assert bv != hf
    assert beam_search(model, batch, **options) == bv
    assert beam_search(model, batch, kind="hf", **options) == hf


@pytest.mark.parametrize("search", BV_HF)
def test_filters_hold_in_every_beam(search):
    model = ToyModel(6, seed=2, filler=3)
    rule = OneOf([[3, 5, EOS], [4, 4, EOS], [5, EOS]], 9)
    got = search(model, prompts(ROWS), n_beams=3, max_new_tokens=6, constraint=[rule, None, rule, None])
    free = search(model, prompts(ROWS), n_beams=3, max_new_tokens=6)
    wanted = [(3, 5, EOS), (4, 4, EOS), (5, EOS)]
    for i in (0, 2):
        if search is beam_search_bv:  # three beams hold all three answers: the likeliest is found
            assert got[i].tokens == max(wanted, key=lambda answer: loglikelihood(model, ROWS[i], answer))
        assert got[i].tokens in wanted
        assert got[i].logprob == pytest.approx(loglikelihood(model, ROWS[i], got[i].tokens), abs=1e-4)
    assert [got[1], got[3]] == [free[1], free[3]]
    banned = search(model, prompts(ROWS), n_beams=3, max_new_tokens=4, forbidden=[0, 3])
    assert not {token for row in banned for token in row.tokens} & {0, 3, 6, 7, 8}


@pytest.mark.parametrize("search", BV_HF)
def test_an_end_that_is_forbidden_all_the_way_leaves_the_best_cut_answer(search):
    model = ToyModel(4, seed=6)
    (got,) = search(model, prompts([[2, 3]]), n_beams=3**3, max_new_tokens=3, forbidden=[EOS])
    best = max(cut_answers(4, 3), key=lambda answer: loglikelihood(model, [2, 3], answer))
    assert (got.tokens, got.finish_reason) == (best, "length")


@pytest.mark.parametrize("search", BV_HF)
def test_no_new_tokens_means_empty_answers(search):
    assert search(ToyModel(), prompts(ROWS), n_beams=2, max_new_tokens=0) == [Decoded((), (), "length")] * 4


@given(st.lists(st.integers(0, 4), min_size=1, max_size=10), st.integers(1, 10))
def test_of_equals_the_lowest_index_comes_first(values, k):
    k = min(k, len(values))
    got, index = top_first(torch.tensor([values], dtype=torch.float32), k)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert index[0].tolist() == expected
    assert got[0].tolist() == [values[i] for i in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_beams": 0}, "n_beams=0: expected 1 or more"),
        ({"kind": "hv"}, "beam='hv': expected one of bv, hf.*Did you mean"),
        ({"max_new_tokens": -2}, "max_new_tokens=-2"),
    ],
)
def test_impossible_searches_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        beam_search(ToyModel(), prompts(ROWS), **{"n_beams": 2, "max_new_tokens": 3, **options})


def test_an_unknown_early_stopping_is_refused():
    with pytest.raises(OptionError, match="early_stopping='always': expected True, False or 'never'"):
        beam_search_hf(ToyModel(), prompts(ROWS), n_beams=2, max_new_tokens=3, early_stopping="always")


def test_an_example_whose_beams_have_all_ended_leaves_the_search():
    """A constraint leaves one answer, so a pool of three never fills."""
    model = ToyModel(6, seed=11)
    (row,) = beam_search_hf(
        model, prompts([[2]]), n_beams=3, max_new_tokens=50, constraint=OneOf([[3, 4, EOS]], model.n_rows)
    )
    assert row.tokens == (3, 4, EOS)
    assert model.n_steps == 2
