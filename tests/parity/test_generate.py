"""Greedy and beam tokens against transformers' `generate` on tiny random models: left-padded batches, unlike images."""

import pytest
import torch

from paligemma.engine.beam import beam_search, beam_search_hf
from paligemma.engine.generate import generate
from paligemma.processing.batch import collate
from tests.configs import EOS, random_item, tiny_config, tiny_model, unlike_items
from tests.hf_peer import peer_inputs, peer_of

LIMIT = 14  # with prompts of 3 to 19 tokens: the window of 7 slides in prefill and in decoding


@pytest.fixture(params=[1, 2], ids=["PaliGemma-1", "PaliGemma-2"], scope="module")
def pair(request):
    model = tiny_model(tiny_config(request.param))
    return model, peer_of(model)


def batch_of(config):
    """Eight prompts, so that some answers end and some do not."""
    more = [random_item(config, 40 + i, n_images=1 + i % 2, n_prefix=2 + i) for i in range(4)]
    return collate([*unlike_items(config), *more], padding_side="left")


def peer_answers(peer, batch, config, **options):
    """transformers' new tokens per row, up to the first eos, and its own scores of beams."""
    with torch.no_grad():
        out = peer.generate(
            **peer_inputs(batch, config), max_new_tokens=LIMIT, do_sample=False, eos_token_id=EOS, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
    rows = out.sequences[:, batch.length :].tolist()
    answers = [tuple(row[: row.index(EOS) + 1]) if EOS in row else tuple(row) for row in rows]
    return answers, getattr(out, "sequences_scores", None), out.scores


def test_greedy_tokens_and_their_logits(pair):
    model, peer = pair
    batch = batch_of(model.config)
    answers, _, scores = peer_answers(peer, batch, model.config)
    got = generate(model, batch, max_new_tokens=LIMIT)
    assert [row.tokens for row in got] == answers
    assert {row.finish_reason for row in got} == {"stop", "length"}
    logprobs = torch.stack(scores, dim=1).float().log_softmax(-1)
    for i, row in enumerate(got):
        for t, (token, logprob) in enumerate(zip(row.tokens, row.logprobs, strict=True)):
            assert logprob == pytest.approx(float(logprobs[i, t, token]), abs=1e-4)


@pytest.mark.parametrize(
    ("n_beams", "length_penalty", "early_stopping"),
    [(2, 1.0, False), (3, 1.0, True), (5, 0.0, "never"), (3, 2.0, "never"), (5, -0.5, False)],
)
def test_beam_tokens_and_scores(pair, n_beams, length_penalty, early_stopping):
    model, peer = pair
    batch = batch_of(model.config)
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    answers, scores, _ = peer_answers(peer, batch, model.config, num_beams=n_beams, **options)
    got = beam_search_hf(model, batch, n_beams=n_beams, max_new_tokens=LIMIT, **options)
    # transformers fills a finished row with pad 0, which is also a word of these models: compare by length, too.
    for row, expected, score in zip(got, answers, scores.tolist(), strict=True):
        assert row.tokens == expected[: len(row.tokens)]
        assert not any(expected[len(row.tokens) :])
        assert row.logprob / len(row.tokens) ** length_penalty == pytest.approx(score, abs=1e-4)


def test_defaults_of_both_are_the_same_search(pair):
    model, peer = pair
    batch = batch_of(model.config)
    answers, _, _ = peer_answers(peer, batch, model.config, num_beams=4)
    got = beam_search(model, batch, n_beams=4, max_new_tokens=LIMIT, kind="hf")
    assert [row.tokens for row in got] == [answer[: len(row.tokens)] for row, answer in zip(got, answers, strict=True)]
