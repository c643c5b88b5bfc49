"""Likelihoods of given suffixes on a toy language model whose every probability is known."""

import math

import pytest

from paligemma.engine.generate import generate
from paligemma.engine.score import Scored, score_suffixes
from paligemma.errors import OptionError
from tests.toy_model import EOS, ToyModel, all_answers, cut_answers, loglikelihood, prompts

ROWS = [[2, 3, 3], [3], [0, 2]]
SUFFIXES = [[[2, 3, EOS], [EOS]], [[3, EOS]], [[0, 0, 2, 3, EOS], [2], []]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_every_token_has_its_probability_given_all_before_it(side, batch_size):
    model = ToyModel(4, seed=1)
    got = score_suffixes(model, prompts(ROWS, side), SUFFIXES, batch_size=batch_size)
    assert [[list(one.tokens) for one in some] for some in got] == SUFFIXES
    for prompt, some in zip(ROWS, got, strict=True):
        for one in some:
            expected = [model.logprobs((*prompt, *one.tokens[:i]))[t] for i, t in enumerate(one.tokens)]
            assert one.logprobs == pytest.approx(expected, abs=1e-5)
            assert one.logprob == pytest.approx(loglikelihood(model, prompt, one.tokens), abs=1e-5)


def test_a_generated_answer_scores_what_generation_said():
    model = ToyModel(6, seed=3, eos_bonus=0.4)
    decoded = generate(model, prompts(ROWS), max_new_tokens=7)
    scored = score_suffixes(model, prompts(ROWS), [[row.tokens] for row in decoded])
    for one, (other,) in zip(decoded, scored, strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-5)


def test_the_probabilities_of_all_answers_sum_to_one():
    """Whatever is written either ends within the limit or is cut there."""
    model, limit = ToyModel(3, seed=9), 4
    everything = all_answers(3, limit) + cut_answers(3, limit)
    (scored,) = score_suffixes(model, prompts([[2, 0]]), [everything])
    assert sum(math.exp(one.logprob) for one in scored) == pytest.approx(1, abs=1e-5)


def test_without_suffixes_the_model_is_not_asked():
    assert score_suffixes(ToyModel(), prompts(ROWS), [[], [], []]) == [[], [], []]
    assert score_suffixes(ToyModel(), prompts(ROWS), [[[]], [], []]) == [[Scored((), ())], [], []]


def test_suffixes_must_come_one_list_per_prompt():
    with pytest.raises(OptionError, match="1 lists of suffixes for 3 prompts"):
        score_suffixes(ToyModel(), prompts(ROWS), [[[2]]])
    with pytest.raises(OptionError, match="batch_size=0"):
        score_suffixes(ToyModel(), prompts(ROWS), SUFFIXES, batch_size=0)


def test_candidates_that_would_not_fit_in_memory_together_take_turns(monkeypatch):
    model = ToyModel(4, seed=1)
    widths = []
    extend = model.extend
    monkeypatch.setattr(model, "extend", lambda tokens, *a, **k: widths.append(len(tokens)) or extend(tokens, *a, **k))
    together = score_suffixes(model, prompts(ROWS), SUFFIXES)
    monkeypatch.setattr("paligemma.engine.score.PASS_BYTES", 1)
    in_turn = score_suffixes(model, prompts(ROWS), SUFFIXES)
    assert in_turn == together
    assert widths[0] == 6
    assert set(widths[1:]) == {1}
