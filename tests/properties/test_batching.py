"""Laws of batching and caching: how a row is laid out, padded, packed, cached or compiled does not change its answer.

Greedy tokens equal; float32 logits within 1e-5 of their scale. Both generations, the second with a window shorter than
its rows.
"""

import copy
import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.engine.beam import BEAM_SEARCHES
from paligemma.engine.generate import generate
from paligemma.engine.prompts import read_prompts
from paligemma.engine.score import score_suffixes
from paligemma.processing.batch import Item, collate, pack
from paligemma.processing.prompt import lay_out
from tests.configs import (
    BOS,
    EOS,
    N_TOKENS,
    SEPARATOR,
    changed,
    logits_of,
    random_item,
    tiny_config,
    tiny_model,
    unlike_items,
)

CONFIGS = {1: tiny_config(1), 2: tiny_config(2)}
LIMIT = 8
generations = st.sampled_from([1, 2])
shapes = st.fixed_dictionaries(
    {"seed": st.integers(0, 10**6), "n_images": st.integers(0, 2), "n_prefix": st.integers(0, 9)}
)
few = st.lists(shapes, min_size=1, max_size=4)
calm = settings(max_examples=20)


def items_of(generation, rows, n_suffix=0):
    return [
        random_item(CONFIGS[generation], **row, n_suffix=n_suffix + i if n_suffix else 0) for i, row in enumerate(rows)
    ]


def logits_per_example(model, batch):
    """Logits of the real tokens of each example, in the order that was collated or packed."""
    logits, found = logits_of(model, batch), []
    for row in range(batch.n_rows):
        n_segments = int(batch.segment_ids[row].max())
        found += [logits[row, batch.segment_ids[row] == segment] for segment in range(1, n_segments + 1)]
    return [found[batch.order.index(i)] for i in range(batch.n_examples)]


def assert_close(got, expected):
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def answers(model, batch, **options):
    return [row.tokens for row in generate(model, batch, max_new_tokens=LIMIT, **options)]


@calm
@given(generations, few, st.integers(0, 5), st.sampled_from(["left", "right"]), st.integers(0, 7))
def test_a_row_depends_neither_on_batch_mates_nor_on_padding(generation, rows, n_suffix, side, extra):
    model, items = tiny_model(CONFIGS[generation]), items_of(generation, rows, n_suffix)
    longest = max(len(item.sequence) for item in items)
    batch = collate(items, padding_side=side, length=longest + extra)
    for item, together in zip(items, logits_per_example(model, batch), strict=True):
        assert_close(together, logits_of(model, collate([item]))[0])


@calm
@given(generations, few, st.sampled_from(["left", "right"]), st.integers(0, 7))
def test_a_greedy_answer_depends_neither_on_batch_mates_nor_on_padding(generation, rows, side, extra):
    model, items = tiny_model(CONFIGS[generation]), items_of(generation, rows)
    longest = max(len(item.sequence) for item in items)
    together = answers(model, collate(items, padding_side=side, length=longest + extra))
    assert together == [answers(model, collate([item]))[0] for item in items]


@calm
@given(generations, few, st.integers(0, 4), st.integers(0, 20))
def test_packed_rows_are_padded_rows(generation, rows, n_suffix, room):
    model, items = tiny_model(CONFIGS[generation]), items_of(generation, rows, n_suffix)
    packed = pack(items, max(len(item.sequence) for item in items) + room)
    padded = collate(items)
    for one, other in zip(logits_per_example(model, packed), logits_per_example(model, padded), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("generation", [1, 2])
def test_packing_leaves_every_gradient_as_it_was(generation):
    """The summed loss of four examples, in four rows or in two."""
    items = unlike_items(CONFIGS[generation], n_suffix=3)
    grads = []
    for batch in (collate(items), pack(items, 40)):
        model = copy.deepcopy(tiny_model(CONFIGS[generation])).requires_grad_(True)
        logits = model(**batch.model_inputs(), keep=batch.mask_loss.roll(-1, dims=1))
        F.cross_entropy(logits, batch.tokens[batch.mask_loss], reduction="sum").backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters()})
    assert batch.n_rows < len(items)
    for name, grad in grads[0].items():
        scale = max(float(grad.abs().max()), 0.1)  # a key bias has a gradient of 0, up to rounding
        torch.testing.assert_close(grads[1][name], grad, atol=1e-4 * scale, rtol=0)


@calm
@given(generations, shapes, st.lists(st.integers(5, N_TOKENS - 1), min_size=1, max_size=6), st.data())
def test_what_comes_later_in_a_suffix_never_leaks_into_earlier_logits(generation, row, suffix, data):
    """Bitwise: a hidden key adds an exact zero."""
    config = CONFIGS[generation]
    model, item = tiny_model(config), random_item(config, **row)
    prompt = item.sequence.tokens[item.sequence.n_image_tokens :].tolist()

    def logits(words):
        sequence = lay_out(item.sequence.n_image_tokens, prompt, (), words, bos=None, eos=EOS)
        return logits_of(model, collate([Item(sequence, item.pixels)]))[0]

    at = data.draw(st.integers(0, len(suffix) - 1))
    other = [*suffix[:at], *(5 + (word - 4) % (N_TOKENS - 5) for word in suffix[at:])]
    same = item.sequence.n_image_tokens + len(prompt) + at
    one, two = logits(suffix), logits(other)
    assert torch.equal(one[:same], two[:same])
    assert not torch.equal(one[same], two[same])


@pytest.mark.parametrize("generation", [1, 2])
def test_prefix_and_pictures_see_each_other_both_ways(generation):
    """Were the prefix causal, its first logits could not know its last word, nor a picture the prompt."""
    config = CONFIGS[generation]
    model, item = tiny_model(config), random_item(config, 3, n_images=1, n_prefix=4)
    words = item.sequence.tokens[config.vision.n_image_tokens :].tolist()
    other = Item(lay_out(config.vision.n_image_tokens, [*words[:-2], 69, SEPARATOR], bos=None, eos=None), item.pixels)
    assert item.sequence.tokens[config.vision.n_image_tokens] == BOS
    one, two = (logits_of(model, collate([each]))[0] for each in (item, other))
    assert bool(((one - two).abs().amax(dim=-1) > 1e-3).all())


@calm
@given(generations, few, st.sampled_from(["left", "right"]), st.booleans())
def test_cached_steps_are_the_uncached_forward_pass(generation, rows, side, static):
    """Prefill, then one token at a time, against the whole row at once; without a cap so that all agree on it."""
    model, items = tiny_model(CONFIGS[generation]), items_of(generation, rows)
    suffixes = torch.randint(5, N_TOKENS, (len(items), 5), generator=torch.Generator().manual_seed(len(items)))
    with torch.no_grad():
        logits, cache = read_prompts(model, collate(items, padding_side=side), 5, static=static)
        steps = torch.stack([logits, *(model.decode_step(column, cache) for column in suffixes.T)], dim=1)
    for item, suffix, got in zip(items, suffixes.tolist(), steps, strict=True):
        words = item.sequence.tokens[item.sequence.n_image_tokens :].tolist()
        whole = lay_out(item.sequence.n_image_tokens, words, (), suffix, bos=None, eos=None)
        assert_close(got, logits_of(model, collate([Item(whole, item.pixels)]))[0, -6:])


@calm
@given(generations, few, st.sampled_from(["left", "right"]))
def test_a_static_cache_gives_the_tokens_of_a_growing_one(generation, rows, side):
    model, batch = tiny_model(CONFIGS[generation]), collate(items_of(generation, rows), padding_side=side)
    growing = generate(model, batch, max_new_tokens=LIMIT)
    static = generate(model, batch, max_new_tokens=LIMIT, static_cache=True)
    assert [row.tokens for row in static] == [row.tokens for row in growing]
    for one, other in zip(static, growing, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@calm
@given(generations, shapes, st.integers(1, LIMIT - 1))
def test_a_forced_start_is_continued_as_if_it_had_been_written(generation, row, n_forced):
    """A suffix inside the prompt stays causal: greedy decoding from any point of a greedy answer goes the same way."""
    config = CONFIGS[generation]
    model, item = tiny_model(config), random_item(config, **row)
    (whole,) = generate(model, collate([item]), max_new_tokens=LIMIT, forbidden=[EOS])
    words = item.sequence.tokens[item.sequence.n_image_tokens :].tolist()
    start = lay_out(item.sequence.n_image_tokens, words, (), whole.tokens[:n_forced], bos=None, eos=None)
    (rest,) = generate(
        model, collate([Item(start, item.pixels)]), max_new_tokens=LIMIT - n_forced, forbidden=[EOS]
    )  # fmt: skip
    assert rest.tokens == whole.tokens[n_forced:]


@calm
@given(generations, few, st.sampled_from(["everywhere", "later_steps"]))
def test_scores_are_the_logprobs_of_the_whole_row_wherever_the_cap_acts(generation, rows, final_cap):
    """Prompt and suffix in one pass, as the loss sees them; one prefill shared by all suffixes of a prompt."""
    model = tiny_model(changed(CONFIGS[generation], final_cap=final_cap))
    items = items_of(generation, rows)
    suffixes = [[[7, 8, EOS], [EOS], [9, 30, 31, 32, EOS]][: 1 + i % 3] for i in range(len(items))]
    scored = score_suffixes(model, collate(items), suffixes, batch_size=3)
    for item, some in zip(items, scored, strict=True):
        words = item.sequence.tokens[item.sequence.n_image_tokens :].tolist()
        for one in some:
            sequence = lay_out(item.sequence.n_image_tokens, words, (), one.tokens, bos=None, eos=None)
            logprobs = logits_of(model, collate([Item(sequence, item.pixels)]))[0].log_softmax(-1)
            n = len(one.tokens)
            expected = logprobs[-n - 1 : -1][range(n), list(one.tokens)]
            assert one.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@calm
@given(generations, few)
def test_what_was_generated_scores_what_generation_said(generation, rows):
    model, batch = tiny_model(CONFIGS[generation]), collate(items_of(generation, rows))
    decoded = generate(model, batch, max_new_tokens=LIMIT)
    for one, (other,) in zip(decoded, score_suffixes(model, batch, [[row.tokens] for row in decoded]), strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)


@pytest.mark.parametrize("kind", list(BEAM_SEARCHES))
@pytest.mark.parametrize("generation", [1, 2])
def test_beams_depend_neither_on_batch_mates_nor_on_padding(generation, kind):
    model, items = tiny_model(CONFIGS[generation]), unlike_items(CONFIGS[generation])
    search = BEAM_SEARCHES[kind]
    alone = [search(model, collate([item]), n_beams=3, max_new_tokens=LIMIT)[0].tokens for item in items]
    for side in ("left", "right"):
        together = search(model, collate(items, padding_side=side, length=30), n_beams=3, max_new_tokens=LIMIT)
        assert [row.tokens for row in together] == alone


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no C++ compiler here: torch.compile cannot build CPU kernels"
)


def shallow(generation):
    """As few layers as show every kind of one, each costs seconds: the second generation has two, one with a window."""
    config = changed(CONFIGS[generation], depth=generation)
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, depth=1))


@pytest.mark.slow
@needs_compiler
def test_a_compiled_step_writes_the_tokens_of_an_eager_one_and_is_compiled_once():
    """With a static cache every step has one shape."""
    eager = tiny_model(shallow(2))
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.decode_step = torch.compile(compiled.decode_step, fullgraph=True)
    batch = collate(unlike_items(eager.config))
    assert answers(compiled, batch, static_cache=True) == answers(eager, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@needs_compiler
def test_a_compiled_forward_pass_gives_the_logits_of_an_eager_one():
    model = tiny_model(shallow(1))
    batch = collate(unlike_items(model.config, n_suffix=3))
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(**batch.model_inputs())
    assert_close(got[batch.mask_input], logits_of(model, batch)[batch.mask_input])
