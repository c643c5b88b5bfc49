"""Decoding against big_vision's tokens and log-probabilities: greedy, filters, limits, beams, caches, sampling."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from paligemma.engine.beam import beam_search_bv
from paligemma.engine.generate import generate
from paligemma.engine.prompts import Decoded, read_prompts
from paligemma.engine.sampling import Sampling, filter_logits, keep_top_p
from paligemma.engine.score import score_suffixes
from tests.golden_model import (
    CASES,
    LOGITS_ATOL,
    LOGPROB_ATOL,
    VARIANTS,
    arrays,
    golden_batch,
    golden_model,
    outputs,
    until_eos,
)

LIMIT = 12
WHOLE = [("paligemma_v1", "default"), ("paligemma_v2", "caps_on")]  # the variants with every kind of output
BF16_LOGITS_ATOL = {"paligemma_v1": 0.05, "paligemma_v2": 0.3}


def prompts(folder, rows=None):
    return golden_batch(folder, arrays(folder, "generate_inputs"), rows=rows, with_input_mask=True)


def assert_rows_equal(got: list[Decoded], tokens, logprobs, atol: float) -> None:
    """Tokens up to the first eos exactly, their log-probabilities within the tolerance."""
    assert len(got) == len(tokens)
    for ours, row, row_logprobs in zip(got, tokens, logprobs, strict=True):
        expected = until_eos(row)
        assert ours.tokens == tuple(expected)
        assert ours.finish_reason == ("stop" if expected[-1] == 1 else "length")
        assert_allclose(ours.logprobs, row_logprobs[: len(expected)], atol=atol, rtol=0)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize(("folder", "variant"), CASES)
def test_greedy_tokens_and_logprobs_of_every_variant(folder, variant, static):
    """The final cap is off for the first token and on for later ones, as the reference has it ("later_steps")."""
    expected = outputs(folder, "generate", variant)
    got = generate(golden_model(folder, variant), prompts(folder), max_new_tokens=LIMIT, static_cache=static)
    assert_rows_equal(got, expected["greedy_tokens"], expected["greedy_logp"], LOGPROB_ATOL[folder])


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize(("folder", "variant"), [*WHOLE, ("paligemma_v2", "caps_off")])
def test_logits_of_every_step_on_the_reference_tokens(folder, variant, static):
    """Beyond eos too, where tokens mean nothing but the arithmetic goes on."""
    model, expected = golden_model(folder, variant), outputs(folder, "generate", variant)
    tokens = torch.from_numpy(expected["greedy_tokens"]).long()
    logits, cache = read_prompts(model, prompts(folder), LIMIT, static=static)
    steps = [logits]
    for t in range(LIMIT - 1):
        steps.append(model.decode_step(tokens[:, t], cache))
    got = torch.stack(steps, dim=1)
    assert_allclose(got.numpy(), expected["step_logits_f32"], atol=LOGITS_ATOL[folder], rtol=0)
    assert_array_equal(got.argmax(-1), tokens)


def test_the_final_cap_everywhere_keeps_greedy_tokens_and_changes_first_logprobs():
    expected = outputs("paligemma_v2", "generate", "caps_on")
    consistent = golden_model("paligemma_v2", "caps_on", final_cap="everywhere")
    got = generate(consistent, prompts("paligemma_v2"), max_new_tokens=LIMIT)
    assert [list(row.tokens) for row in got] == [until_eos(row) for row in expected["greedy_tokens"]]
    first = np.array([row.logprobs[0] for row in got])
    assert np.abs(first - expected["greedy_logp"][:, 0]).min() > 10 * LOGPROB_ATOL["paligemma_v2"]
    later = [row.logprobs[1:] for row in got]
    for ours, reference in zip(later, expected["greedy_logp"], strict=True):
        assert_allclose(ours, reference[1 : 1 + len(ours)], atol=LOGPROB_ATOL["paligemma_v2"], rtol=0)


@pytest.mark.parametrize(("folder", "variant"), CASES)
def test_a_bfloat16_cache_gives_the_reference_first_logits(folder, variant):
    """The prefill attention already uses the rounded keys and values."""
    expected = outputs(folder, "generate", variant)["bf16cache_first_step_logits"][:, 0]
    logits, _ = read_prompts(golden_model(folder, variant), prompts(folder), 1, dtype=torch.bfloat16)
    assert_allclose(logits.detach().numpy(), expected, atol=BF16_LOGITS_ATOL[folder], rtol=0)


@pytest.mark.parametrize(("folder", "variant"), WHOLE)
def test_a_bfloat16_cache_gives_the_reference_logits_at_every_step(folder, variant):
    model, expected = golden_model(folder, variant), outputs(folder, "generate", variant)
    tokens = torch.from_numpy(expected["greedy_tokens"]).long()
    logits, cache = read_prompts(model, prompts(folder), LIMIT, dtype=torch.bfloat16)
    assert cache.keys[0].dtype == torch.bfloat16
    steps = [logits]
    for t in range(LIMIT - 1):
        steps.append(model.decode_step(tokens[:, t], cache))
    got = torch.stack(steps, dim=1).numpy()
    reference = expected["bf16cache_step_logits_on_f32_tokens"]
    assert_allclose(got, reference, atol=BF16_LOGITS_ATOL[folder], rtol=0)
    # Rounding matters more than the tolerance, so the comparison sees it.
    assert np.abs(reference - expected["step_logits_f32"]).max() > 2 * BF16_LOGITS_ATOL[folder]


@pytest.mark.parametrize(("folder", "variant"), [("paligemma_v1", "default")])
def test_greedy_tokens_with_a_bfloat16_cache(folder, variant):
    """Only for the first generation: the README gives those of the second for information."""
    expected = outputs(folder, "generate", variant)
    got = generate(
        golden_model(folder, variant), prompts(folder), max_new_tokens=LIMIT, cache_dtype=torch.bfloat16
    )  # fmt: skip
    assert_rows_equal(
        got, expected["bf16cache_greedy_tokens"], expected["bf16cache_greedy_logp"], BF16_LOGITS_ATOL[folder]
    )


@pytest.mark.parametrize(("folder", "variant"), WHOLE)
def test_filler_examples_left_out_change_nothing_for_the_others(folder, variant):
    """The reference masks filler examples so that they do not delay the stop; here they are simply not in the batch."""
    expected = outputs(folder, "generate", variant)
    rows = np.flatnonzero(expected["example_mask"]).tolist()
    assert 0 < len(rows) < 4
    got = generate(golden_model(folder, variant), prompts(folder, rows), max_new_tokens=LIMIT)
    for ours, row in zip(got, rows, strict=True):
        tokens = until_eos(expected["example_mask_greedy_tokens"][row])
        assert ours.tokens == tuple(tokens)
        logprobs = expected["example_mask_greedy_logp"][row, : len(tokens)]
        assert_allclose(ours.logprobs, logprobs, atol=LOGPROB_ATOL[folder], rtol=0)


@pytest.mark.parametrize("form", ["ids", "mask", "mask per row"])
@pytest.mark.parametrize(("folder", "variant"), WHOLE)
def test_forbidden_ids_are_not_written_and_do_not_touch_the_logprobs(folder, variant, form):
    expected = outputs(folder, "generate", variant)
    ids = expected["forbidden_ids"]
    forbidden = ids.tolist()
    if form != "ids":
        forbidden = torch.zeros(1664, dtype=torch.bool)
        forbidden[torch.from_numpy(ids).long()] = True
    if form == "mask per row":
        forbidden = forbidden.expand(4, -1)
    got = generate(golden_model(folder, variant), prompts(folder), max_new_tokens=LIMIT, forbidden=forbidden)
    assert_rows_equal(got, expected["forbidden_greedy_tokens"], expected["forbidden_greedy_logp"], LOGPROB_ATOL[folder])
    assert not {token for row in got for token in row.tokens} & set(ids.tolist())


@pytest.mark.parametrize(("folder", "variant"), WHOLE)
def test_a_limit_of_three_tokens(folder, variant):
    expected = outputs(folder, "generate", variant)
    got = generate(golden_model(folder, variant), prompts(folder), max_new_tokens=3)
    assert_rows_equal(got, expected["len3_greedy_tokens"], expected["len3_greedy_logp"], LOGPROB_ATOL[folder])


@pytest.mark.parametrize(("folder", "file"), [("paligemma_v1", "two_images"), ("paligemma_v2", "two_images_caps_on")])
def test_greedy_tokens_after_two_images(folder, file):
    model, inputs = golden_model(folder, VARIANTS[folder][0]), arrays(folder, file)
    batch = golden_batch(folder, inputs, prefix="gen_", with_input_mask=True)
    first, _ = read_prompts(model, batch, 0)
    assert_allclose(first.numpy(), inputs["out_first_step_logits"][:, 0], atol=LOGITS_ATOL[folder], rtol=0)
    got = generate(model, batch, max_new_tokens=LIMIT)
    assert_rows_equal(got, inputs["out_greedy_tokens"], inputs["out_greedy_logp"], LOGPROB_ATOL[folder])


BEAMS = [(folder, variant, n, "") for folder, variant in CASES for n in (2, 4)]
BEAMS += [(folder, variant, n, "bf16cache_") for folder, variant in WHOLE for n in (2, 4)]


@pytest.mark.parametrize(("folder", "variant", "n_beams", "cache"), BEAMS)
def test_beams_give_the_reference_tokens_logprobs_and_scores(folder, variant, n_beams, cache):
    expected = {
        name.removeprefix(f"{cache}beam{n_beams}_"): value
        for name, value in outputs(folder, "generate", variant).items()
        if name.startswith(f"{cache}beam{n_beams}_")
    }
    got = beam_search_bv(
        golden_model(folder, variant), prompts(folder), n_beams=n_beams, max_new_tokens=LIMIT,
        cache_dtype=torch.bfloat16 if cache else None,
    )  # fmt: skip
    atol = BF16_LOGITS_ATOL[folder] if cache else LOGPROB_ATOL[folder]
    assert_rows_equal(got, expected["tokens"], expected["best_logp"], atol)
    # A sum of up to twelve log-probabilities, each within the tolerance.
    assert_allclose([row.logprob for row in got], expected["best_score"], atol=LIMIT * atol, rtol=1e-6)
    assert all(row.finish_reason == "stop" for row in got)


@pytest.mark.parametrize(("folder", "variant"), [("paligemma_v1", "default"), ("paligemma_v2", "attn_cap_only")])
def test_given_suffixes_score_what_decoding_and_beams_said(folder, variant):
    """Without a final cap, big_vision's two readings of it agree, and so must scores and both kinds of decoding."""
    expected = outputs(folder, "generate", variant)
    suffixes = [
        [until_eos(expected["greedy_tokens"][row]), until_eos(expected["beam4_tokens"][row])] for row in range(4)
    ]
    scored = score_suffixes(golden_model(folder, variant), prompts(folder), suffixes)
    for row, (greedy, beam) in enumerate(scored):
        reference = expected["greedy_logp"][row, : len(greedy.tokens)]
        assert_allclose(greedy.logprobs, reference, atol=LOGPROB_ATOL[folder], rtol=0)
        assert_allclose(beam.logprob, expected["beam4_best_score"][row], atol=LIMIT * LOGPROB_ATOL[folder], rtol=0)


@pytest.mark.parametrize("p", ["0.1", "0.5", "0.9", "0.99"])
@pytest.mark.parametrize("t", ["1.0", "0.7"])
def test_the_nucleus_keeps_what_the_reference_keeps(p, t):
    golden = arrays("paligemma_v1", "sampling")
    logits = torch.from_numpy(golden["logits"][:, 0])
    kept = filter_logits(logits, Sampling(temperature=float(t), top_p=float(p))) > -torch.inf
    assert_array_equal(kept, golden[f"nucleus_p{p}_t{t}_keeps"][:, 0])


def test_temperature_divides_the_logits():
    golden = arrays("paligemma_v1", "sampling")
    logits = torch.from_numpy(golden["logits"])
    assert_allclose(filter_logits(logits, Sampling(temperature=2.0)), golden["temperature_2.0_logits"], rtol=1e-6)
    assert keep_top_p(logits, 1.0) is logits


def test_the_score_of_a_sequence_and_the_best_of_three():
    golden = arrays("paligemma_v1", "sampling")
    rows = []
    for tokens, logprobs in zip(golden["score_tokens"], golden["score_logp"], strict=True):
        written = until_eos(tokens)
        rows.append(Decoded(tuple(written), tuple(logprobs[: len(written)].tolist()), "stop"))
    assert_allclose([row.logprob for row in rows], golden["score"], rtol=1e-6)
    for group, tokens in zip((rows[:3], rows[3:]), golden["best_of_3_tokens"], strict=True):
        assert max(group, key=lambda row: row.logprob).tokens == tuple(until_eos(tokens))
