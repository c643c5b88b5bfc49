"""The plain loop on a toy language model that can be followed by hand."""

import pytest
import torch

from paligemma.engine.filters import OneOf
from paligemma.engine.generate import NewToken, generate, stream
from paligemma.engine.prompts import Decoded
from paligemma.engine.sampling import Sampling
from paligemma.errors import OptionError, ShapeError
from paligemma.processing.batch import Item, pack
from paligemma.processing.prompt import lay_out
from tests.toy_model import EOS, ToyModel, prompts

ROWS = [[2, 3, 4], [4], [3, 3], [2, 2, 2, 2], [4, 3]]
LIMIT = 9


@pytest.fixture
def model():
    return ToyModel(6, seed=3, eos_bonus=0.4)


def by_hand(model, prompt, limit=LIMIT, allowed=lambda written: range(6)):
    """Greedy decoding, spelled out: the highest logit, the lowest id among equals, until eos."""
    tokens, logprobs = [], []
    while len(tokens) < limit and EOS not in tokens:
        history = (*prompt, *tokens)
        token = max(allowed(tokens), key=lambda t: (model.logits(history)[t], -t))
        logprobs.append(model.logprobs(history)[token])
        tokens.append(token)
    return Decoded(tuple(tokens), tuple(logprobs), "stop" if tokens[-1] == EOS else "length")


def same(got, expected):
    assert [(row.tokens, row.finish_reason) for row in got] == [(row.tokens, row.finish_reason) for row in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("static", [False, True])
def test_greedy_is_the_loop_spelled_out(model, side, static):
    got = generate(model, prompts(ROWS, side), max_new_tokens=LIMIT, static_cache=static)
    same(got, [by_hand(model, row) for row in ROWS])
    assert {row.finish_reason for row in got} == {"stop", "length"}  # both ends occur


def test_rows_that_ended_leave_the_batch_and_the_last_token_is_never_fed(model):
    got = generate(model, prompts(ROWS), max_new_tokens=LIMIT)
    longest = max(len(row.tokens) for row in got)
    assert model.n_steps == longest - 1
    assert model.n_step_rows < len(ROWS) * (longest - 1)
    model.n_steps = 0
    generate(model, prompts(ROWS), max_new_tokens=1)
    assert model.n_steps == 0


def test_a_limit_counts_the_end_of_sequence(model):
    ended = next(row for row in ROWS if by_hand(model, row).finish_reason == "stop")
    whole = by_hand(model, ended)
    n = len(whole.tokens)
    assert generate(model, prompts([ended]), max_new_tokens=n)[0].finish_reason == "stop"
    (cut,) = generate(model, prompts([ended]), max_new_tokens=n - 1)
    assert (cut.tokens, cut.finish_reason) == (whole.tokens[:-1], "length")


def test_no_new_tokens_means_empty_answers(model):
    assert generate(model, prompts(ROWS), max_new_tokens=0) == [Decoded((), (), "length")] * len(ROWS)
    assert list(stream(model, prompts(ROWS), max_new_tokens=0)) == []


def test_another_end_of_sequence_may_be_named(model):
    (got,) = generate(model, prompts([[2, 3, 4]]), max_new_tokens=40, eos=5)
    assert got.finish_reason == "stop"
    assert got.tokens.index(5) == len(got.tokens) - 1


def test_constraints_and_forbidden_ids_steer_each_row_on_its_own(model):
    rule = OneOf([[3, 5, EOS], [4, EOS]], 6)
    got = generate(model, prompts(ROWS), max_new_tokens=LIMIT, constraint=[rule, None, rule, None, rule])
    for i, row in enumerate(ROWS):
        if i % 2:
            same([got[i]], [by_hand(model, row)])
        else:
            assert got[i].tokens in {(3, 5, EOS), (4, EOS)}
            # A forced token keeps its own, free probability.
            assert got[i].logprobs[-1] == pytest.approx(model.logprobs((*row, *got[i].tokens[:-1]))[EOS], abs=1e-5)
    got = generate(model, prompts(ROWS), max_new_tokens=LIMIT, forbidden=[EOS, 2])
    same(got, [by_hand(model, row, allowed=lambda written: (0, 3, 4, 5)) for row in ROWS])


def test_filler_rows_are_never_written():
    model = ToyModel(4, seed=1, filler=4)
    got = generate(model, prompts([[2], [3]]), max_new_tokens=30, forbidden=[EOS], sampling=Sampling(temperature=5.0))
    assert {token for row in got for token in row.tokens} == {0, 2, 3}


def test_a_sampled_row_depends_on_its_prompt_and_seed_alone(model):
    sampling = Sampling(temperature=1.3, seed=7)
    together = generate(model, prompts(ROWS), max_new_tokens=LIMIT, sampling=sampling)
    for place, row in enumerate(ROWS):
        assert generate(model, prompts([row]), max_new_tokens=LIMIT, sampling=sampling) == [together[place]]
    turned = generate(model, prompts(ROWS[::-1], "left"), max_new_tokens=LIMIT, sampling=sampling)
    assert turned[::-1] == together
    other = generate(model, prompts(ROWS), max_new_tokens=LIMIT, sampling=Sampling(temperature=1.3, seed=8))
    assert other != together


def test_seeds_per_row_make_unlike_answers_of_one_prompt(model):
    sampling = Sampling(temperature=1.5)
    batch = prompts([[2, 3]] * 6)
    got = generate(model, batch, max_new_tokens=LIMIT, sampling=sampling, seeds=[0, 1, 2, 3, 4, 0])
    assert got[0] == got[5]
    assert len({row.tokens for row in got}) > 2
    again = generate(model, prompts([[2, 3]]), max_new_tokens=LIMIT, sampling=Sampling(temperature=1.5, seed=3))
    assert again == [got[3]]


def test_sampling_follows_the_distribution_over_many_seeds():
    """Frequencies of the first token over 3,000 streams lie within five standard deviations of its probabilities."""
    model = ToyModel(5, seed=2)
    n = 3000
    got = generate(model, prompts([[2]] * n), max_new_tokens=1, sampling=Sampling(), seeds=range(n))
    probs = torch.from_numpy(model.logits([2])).softmax(-1)
    frequency = torch.bincount(torch.tensor([row.tokens[0] for row in got]), minlength=5) / n
    assert bool(((frequency - probs).abs() < 5 * (probs * (1 - probs) / n).sqrt()).all())


def test_best_of_n_is_the_likeliest_of_n_streams_after_one_prefill(model):
    sampling = Sampling(temperature=1.4, seed=5)
    bests = [generate(model, prompts(ROWS), max_new_tokens=LIMIT, sampling=sampling, best_of=n) for n in (1, 2, 5)]
    singles = generate(model, prompts(ROWS), max_new_tokens=LIMIT, sampling=sampling)
    assert bests[0] == singles  # the first copy draws what a single answer draws
    for fewer, more in zip(bests[0], bests[1], strict=True):
        assert more.logprob >= fewer.logprob
    for fewer, more in zip(bests[1], bests[2], strict=True):
        assert more.logprob >= fewer.logprob
    assert bests[2] != bests[0]
    for prompt, best in zip(ROWS, bests[2], strict=True):
        alone = generate(model, prompts([prompt]), max_new_tokens=LIMIT, sampling=sampling, best_of=5)
        assert alone == [best]


def test_tokens_are_told_as_they_are_written(model):
    told: list[NewToken] = []
    got = generate(model, prompts(ROWS), max_new_tokens=LIMIT, on_token=told.append)
    steps = list(stream(model, prompts(ROWS), max_new_tokens=LIMIT))
    assert [new for step in steps for new in step] == told
    for row, decoded in enumerate(got):
        mine = [new for new in told if new.row == row]
        assert tuple(new.token for new in mine) == decoded.tokens
        assert tuple(new.logprob for new in mine) == decoded.logprobs
        assert [new.finish_reason for new in mine] == [None] * (len(mine) - 1) + [decoded.finish_reason]
    assert [len(step) for step in steps] == [sum(len(row.tokens) > i for row in got) for i in range(len(steps))]


def test_whoever_stops_listening_stops_the_model(model):
    tokens = stream(model, prompts([[2, 3, 4]]), max_new_tokens=1000, forbidden=[EOS])
    for _ in range(3):
        next(tokens)
    tokens.close()
    assert model.n_steps == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1: expected 0 or more"),
        ({"best_of": 0, "sampling": Sampling()}, "best_of=0"),
        ({"best_of": 2}, "best_of=2 with greedy"),
        ({"best_of": 2, "sampling": Sampling(temperature=0)}, "best_of=2 with greedy"),
        ({"best_of": 2, "sampling": Sampling(), "on_token": print}, "on_token with best_of=2"),
        ({"seeds": [1]}, "seeds=\\[1\\]: expected 5"),
    ],
)
def test_contradictory_options_are_refused(model, options, message):
    with pytest.raises(OptionError, match=message):
        generate(model, prompts(ROWS), **{"max_new_tokens": 3, **options})


def test_packed_rows_are_refused(model):
    packed = pack([Item(lay_out(0, row, bos=None, eos=None)) for row in ROWS], 8)
    with pytest.raises(ShapeError, match="5 examples in 2 rows: decoding needs one example per row"):
        generate(model, packed, max_new_tokens=3)


def test_a_limit_that_means_until_the_end_takes_no_memory():
    model = ToyModel(6, seed=11, eos_bonus=2.0)
    free = generate(model, prompts(ROWS), max_new_tokens=10**15)
    assert {row.finish_reason for row in free} == {"stop"}
    assert free == generate(model, prompts(ROWS), max_new_tokens=max(len(row.tokens) for row in free))


def test_a_cache_that_runs_out_of_room_grows_without_a_trace(model, monkeypatch):
    expected = generate(model, prompts(ROWS), max_new_tokens=12, forbidden=[1])
    monkeypatch.setattr("paligemma.engine.prompts.ROOM", 1)
    assert generate(model, prompts(ROWS), max_new_tokens=12, forbidden=[1]) == expected


def test_a_stream_refuses_a_negative_limit_before_its_first_token(model):
    with pytest.raises(OptionError, match="max_new_tokens=-1"):
        stream(model, prompts(ROWS), max_new_tokens=-1)
