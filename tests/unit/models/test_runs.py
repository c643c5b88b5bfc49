"""Attention within examples gives the numbers and the gradients of attention over whole rows."""

import pytest
import torch

from paligemma.models.attention import Span, attention, prefix_lm_mask, usable_mask
from paligemma.models.runs import runs_of


def batch(rows, width, *, left=False):
    """A span whose rows hold examples of the given lengths, a third of each a bidirectional prefix."""
    segment = torch.zeros(len(rows), width, dtype=torch.int64)
    block, position = torch.zeros_like(segment), torch.zeros_like(segment)
    for r, lengths in enumerate(rows):
        at = width - sum(lengths) if left else 0
        for number, n in enumerate(lengths, 1):
            inside = torch.arange(n)
            segment[r, at : at + n], position[r, at : at + n] = number, inside
            block[r, at : at + n] = (inside - n // 3).clamp(min=0)
            at += n
    return Span(block=block, valid=segment > 0, segment=segment, position=position)


def values(span, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    B, T = span.segment.shape
    return [torch.randn(B, n, T, 8, generator=rng, dtype=dtype).requires_grad_() for n in (4, 2, 2)]


LAYOUTS = {
    "packed": ([[30, 20, 14], [40, 24], [9, 9, 9, 9]], 64, False),
    "padded": ([[10], [33], [64], [11]], 64, False),
    "padded left": ([[10], [33], [64], [11]], 64, True),
    "one token": ([[1, 1, 1], [40]], 41, False),
    "an empty row": ([[], [12, 9]], 30, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 7])
def test_outputs_and_gradients_are_those_of_whole_rows(layout, window):
    rows, width, left = LAYOUTS[layout]
    span = batch(rows, width, left=left)
    mask = usable_mask(prefix_lm_mask(span, span, window))
    runs = runs_of(span.segment, span.valid, mask[:, 0])
    assert runs is not None
    found, grads = [], []
    upstream = torch.randn(len(rows), 4, width, 8, dtype=torch.float64) * span.valid[:, None, :, None]
    for within in (True, False):
        q, k, v = values(span, torch.float64)

        def one(q, k, v, mask):
            return attention(q, k, v, mask=mask, scale=0.3, softcap=2.0)

        out = runs.attend(q, k, v, one) if within else one(q, k, v, mask)
        (out * upstream).sum().backward()
        found.append(out * span.valid[:, None, :, None])
        grads.append((q.grad, k.grad, v.grad))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)  # scores are float32
    for own, plain in zip(*grads, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)
    assert not found[0].isnan().any()


def test_every_real_token_stands_in_one_group():
    span = batch(*LAYOUTS["packed"][:2])
    runs = runs_of(span.segment, span.valid, prefix_lm_mask(span, span))
    slots = torch.cat([group.slots for group in runs.groups])
    real = span.valid.flatten().nonzero()[:, 0]
    assert torch.equal(slots[slots < span.valid.numel()].sort().values, real)
    assert torch.equal(slots[runs.places[real]], real)


def test_rows_that_are_full_are_left_whole():
    span = batch([[64], [60]], 64)
    assert runs_of(span.segment, span.valid, prefix_lm_mask(span, span)) is None
    empty = batch([[], []], 8)
    assert runs_of(empty.segment, empty.valid, prefix_lm_mask(empty, empty)) is None
