"""The coordinate-aware loss: plain where there are no places, a bell curve where there are."""

import pytest
import torch
import torch.nn.functional as F

from paligemma.errors import OptionError
from paligemma.train.coordinates import coordinate_loss
from paligemma.train.loss import chunked_loss
from tests.training_runs import SMALL

TOKENS = SMALL.tokens
PLACE = TOKENS.loc_start + 500


def logits_for(token: int, height: float = 12.0) -> torch.Tensor:
    logits = torch.zeros(1, TOKENS.n_tokens)
    logits[0, token] = height
    return logits


def test_near_is_better_than_far_and_right_is_best():
    loss, target = coordinate_loss(TOKENS, sigma=4), torch.tensor([PLACE])
    at = [loss(logits_for(PLACE + off), target).item() for off in (0, 2, 6, 20)]
    assert at == sorted(at)
    assert at[0] < at[1] - 0.1
    plain = [F.cross_entropy(logits_for(PLACE + off), target).item() for off in (2, 20)]
    assert plain[0] == pytest.approx(plain[1], rel=1e-5)  # which is what it is there to mend


def test_words_cost_what_they_always_cost():
    logits = torch.randn(5, TOKENS.n_tokens, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 5, PLACE, TOKENS.seg_start, 9])
    got, plain = coordinate_loss(TOKENS)(logits, targets), F.cross_entropy(logits, targets, reduction="none")
    words = [0, 1, 3, 4]
    torch.testing.assert_close(got[words], plain[words])
    assert got[2] != plain[2]


def test_a_place_is_the_cross_entropy_to_its_curve():
    logits = torch.randn(1, TOKENS.n_tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bins = torch.arange(1024, dtype=torch.float64)
    q = torch.exp(-((bins - 3) ** 2) / (2 * 2.5**2))  # near the edge: the curve is cut and still sums to 1
    target = torch.zeros(1, TOKENS.n_tokens, dtype=torch.float64)
    target[0, TOKENS.loc_start : TOKENS.loc_start + 1024] = q / q.sum()
    got = coordinate_loss(TOKENS, sigma=2.5)(logits, torch.tensor([TOKENS.loc_start + 3]))
    torch.testing.assert_close(got[0], F.cross_entropy(logits, target), atol=1e-5, rtol=1e-6)


def test_it_has_the_same_gradients_in_chunks():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(6, 16, generator=generator)
    table = torch.randn(TOKENS.n_tokens, 16, generator=generator)
    targets, weights = torch.tensor([4, PLACE, PLACE + 9, 7, PLACE - 200, 2]), torch.rand(6, generator=generator)
    found = []
    for chunk in (6, 1):
        h, t = hidden.clone().requires_grad_(True), table.clone().requires_grad_(True)
        total, _ = chunked_loss(h, t, targets, weights, coordinate_loss(TOKENS), chunk_tokens=chunk)
        total.backward()
        found.append((total.detach(), h.grad, t.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_width_below_zero_is_refused():
    with pytest.raises(OptionError, match="expected bins"):
        coordinate_loss(TOKENS, sigma=-1)
