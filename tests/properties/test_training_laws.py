"""Laws of the loss: how a step is cut, padded, packed or chunked does not change loss or gradient, and only the suffix
is ever a target."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.processing.batch import Batch, Item, collate, pack
from paligemma.train.loss import chunked_loss, cross_entropy, loss_sums, target_counts
from tests.configs import N_TOKENS, logits_of, random_item, tiny_config, tiny_model

CONFIGS = {1: tiny_config(1), 2: tiny_config(2)}
generations = st.sampled_from([1, 2])
normalizations = st.sampled_from(["per_example", "per_token"])
shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "n_images": st.integers(0, 2),
        "n_prefix": st.integers(0, 6),
        "n_suffix": st.integers(0, 5),
    }
)
several = st.lists(shapes, min_size=2, max_size=5)
calm = settings(max_examples=15)


def items_of(generation, rows):
    items = [random_item(CONFIGS[generation], **row) for row in rows]
    return [dataclasses.replace(item, weight=1.0 + 0.5 * (i % 2)) for i, item in enumerate(items)]


def loss_and_gradients(generation, batches: list[Batch], normalization, **options):
    """As the loop does it: sums of all parts, divided once by what all of them count."""
    model = copy.deepcopy(tiny_model(CONFIGS[generation])).requires_grad_(True)
    count = max(1, sum(target_counts(batch, normalization) for batch in batches))
    loss = 0.0
    for batch in batches:
        part = loss_sums(model, batch, normalization=normalization, **options).total / count
        part.backward()
        loss += part.item()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def assert_same(a, b):
    (loss_a, grads_a), (loss_b, grads_b) = a, b
    assert loss_a == pytest.approx(loss_b, abs=1e-5)
    for name, expected in grads_b.items():
        found = grads_a[name]
        if expected is None or found is None:  # an image tower that no picture of this part went through
            assert not any(gradient.any() for gradient in (expected, found) if gradient is not None), name
            continue
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, atol=2e-5 * scale, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@calm
@given(generations, several, normalizations, st.data())
def test_parts_of_a_step_add_up_to_the_whole(generation, rows, normalization, data):
    items = items_of(generation, rows)
    cut = data.draw(st.integers(1, len(items) - 1))
    whole = loss_and_gradients(generation, [collate(items)], normalization)
    assert_same(loss_and_gradients(generation, [collate(items[:cut]), collate(items[cut:])], normalization), whole)


@calm
@given(generations, several, normalizations)
def test_packed_is_padded(generation, rows, normalization):
    items = items_of(generation, rows)
    longest = max(len(item.sequence) for item in items)
    padded = loss_and_gradients(generation, [collate(items, padding_side="left", multiple_of=8)], normalization)
    packed = pack(items, 2 * longest)
    assert_same(loss_and_gradients(generation, [packed], normalization), padded)


@calm
@given(generations, several, normalizations, st.integers(1, 9), st.sampled_from([0.0, 0.3]))
def test_chunked_is_whole(generation, rows, normalization, chunk, smoothing):
    batch = collate(items_of(generation, rows))
    whole, parts = (
        loss_and_gradients(
            generation, [batch], normalization, token_loss=cross_entropy(smoothing), chunk_tokens=chunk_tokens
        )
        for chunk_tokens in (10_000, chunk)
    )
    assert_same(parts, whole)


def test_the_chunked_loss_has_the_gradients_of_plain_autograd():
    rng = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(n, 12, generator=rng, dtype=torch.float64).float() for n in (11, 30))
    targets, weights = torch.randint(30, (11,), generator=rng), torch.rand(11, generator=rng)
    leaves = [(hidden.clone().requires_grad_(), table.clone().requires_grad_()) for _ in range(2)]
    (h, t), (h2, t2) = leaves
    total, tokens = chunked_loss(h, t, targets, weights, cross_entropy(0.1), softcap=2.0, chunk_tokens=4)
    (3 * total).backward()
    logits = torch.tanh(h2 @ t2.T / 2.0) * 2.0
    q = torch.full((11, 30), 0.1 / 29).scatter(1, targets[:, None], 0.9)
    plain = -(q * logits.log_softmax(-1)).sum(-1)
    (3 * (plain * weights).sum()).backward()
    torch.testing.assert_close(tokens, plain.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(h.grad, h2.grad, atol=1e-5, rtol=0)
    torch.testing.assert_close(t.grad, t2.grad, atol=1e-5, rtol=0)


@calm
@given(generations, several, st.integers(0, 10**6))
def test_only_the_suffix_is_a_target(generation, rows, seed):
    """The label of a position outside the suffix, and any padding token, may be anything."""
    batch = collate(items_of(generation, rows), multiple_of=16)
    rng = torch.Generator().manual_seed(seed)
    other = torch.randint(5, N_TOKENS, batch.tokens.shape, generator=rng)
    changed = dataclasses.replace(batch, tokens=torch.where(batch.mask_input, batch.tokens, other))
    (loss, grads), (loss_2, grads_2) = (
        loss_and_gradients(generation, [given_batch], "per_example") for given_batch in (batch, changed)
    )
    assert loss == loss_2
    assert all(torch.equal(grads[name], grads_2[name]) for name in grads if grads[name] is not None)
    sums = loss_sums(tiny_model(CONFIGS[generation]), batch)
    assert torch.equal(sums.targets, batch.tokens[batch.mask_loss])
    assert not (batch.mask_loss & ((batch.mask_ar == 0) | ~batch.mask_input)).any()


@calm
@given(generations, shapes, st.integers(0, 10**6))
def test_the_answer_cannot_be_seen(generation, row, seed):
    """Changing a later token of the suffix changes no earlier logit."""
    item = random_item(CONFIGS[generation], **{**row, "n_suffix": 5})
    tokens = item.sequence.tokens.copy()
    at = len(tokens) - 1 - seed % 5
    tokens[at] = 5 + (tokens[at] - 4) % (N_TOKENS - 5)
    other = Item(dataclasses.replace(item.sequence, tokens=tokens), pixels=item.pixels)
    assert tokens[at] != item.sequence.tokens[at]
    a, b = (logits_of(tiny_model(CONFIGS[generation]), collate([each])) for each in (item, other))
    assert torch.equal(a[:, :at], b[:, :at])
    assert not torch.equal(a[:, at:], b[:, at:])


def test_per_example_and_per_token_count_what_they_say():
    config = CONFIGS[1]
    short, long = (random_item(config, 3, n_suffix=n) for n in (1, 7))  # two and eight targets with eos
    batch = collate([short, long])
    assert target_counts(batch, "per_example") == 2
    assert target_counts(batch, "per_token") == 10
    model = tiny_model(config)
    sums = loss_sums(model, batch, normalization="per_example")
    by_hand = (sums.tokens[:2].mean() + sums.tokens[2:].mean()) / 2
    assert sums.total.item() / 2 == pytest.approx(by_hand.item(), rel=1e-5)
    per_token = loss_sums(model, batch, normalization="per_token")
    assert per_token.total.item() / 10 == pytest.approx(sums.tokens.mean().item(), rel=1e-5)


def test_an_example_without_targets_counts_and_adds_nothing():
    config = CONFIGS[2]
    asked, taught = random_item(config, 1), random_item(config, 2, n_suffix=3)
    model = tiny_model(config)
    both, alone = (loss_sums(model, collate(items)).total.item() for items in ([asked, taught], [taught]))
    assert both == pytest.approx(alone, rel=1e-5)
    assert target_counts(collate([asked, taught]), "per_example") == 2
