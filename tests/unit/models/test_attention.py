"""Laws of the mask rule and of the three ways to attend."""

import pytest
import torch

from paligemma.models import attention as A


def span(mask_ar: list[int], valid: list[int] | None = None, segment: list[int] | None = None) -> A.Span:
    ar = torch.tensor([mask_ar])
    ok = torch.ones_like(ar, dtype=torch.bool) if valid is None else torch.tensor([valid], dtype=torch.bool)
    seg = torch.ones_like(ar) if segment is None else torch.tensor([segment])
    return A.Span(ar.cumsum(1), ok, seg, torch.arange(ar.shape[1])[None])


def test_the_prefix_sees_itself_both_ways_and_never_the_suffix() -> None:
    tokens = span([0, 0, 0, 1, 1])
    expected = [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert A.prefix_lm_mask(tokens, tokens)[0].int().tolist() == expected


def test_padding_is_neither_seen_nor_sees() -> None:
    tokens = span([0, 0, 1], valid=[0, 1, 1])
    assert A.prefix_lm_mask(tokens, tokens)[0].int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_examples_of_one_row_do_not_see_each_other() -> None:
    tokens = span([0, 1, 0, 1], segment=[1, 1, 2, 2])
    assert A.prefix_lm_mask(tokens, tokens)[0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def test_a_window_hides_what_is_far_back_but_leaves_the_prefix_whole() -> None:
    tokens = span([0, 0, 0, 1, 1, 1])
    mask = A.prefix_lm_mask(tokens, tokens, sliding_window=2)[0].int().tolist()
    assert mask == [[1, 1, 1, 0, 0, 0]] * 3 + [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]


def test_a_mask_that_hides_nothing_is_no_mask() -> None:
    tokens = span([0, 0, 0])
    assert A.usable_mask(A.prefix_lm_mask(tokens, tokens)) is None


def test_a_query_that_may_see_nothing_gives_no_nan() -> None:
    tokens = span([0, 0, 1], valid=[0, 1, 1])
    mask = A.usable_mask(A.prefix_lm_mask(tokens, tokens))
    q = k = v = torch.randn(1, 2, 3, 8)
    for softcap in (None, 5.0):
        assert A.attention(q, k, v, mask=mask, scale=0.3, softcap=softcap).isfinite().all()


def by_the_book(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, cap: float | None
) -> torch.Tensor:
    """One head at a time, in float64."""
    out = torch.empty_like(q, dtype=torch.float64)
    per = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            scores = q[b, n].double() @ k[b, n // per].double().T * scale
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            scores = scores.masked_fill(~mask[b, 0], -torch.inf)
            out[b, n] = scores.softmax(-1) @ v[b, n // per].double()
    return out


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("n_queries", [1, 7])
def test_attention_is_the_formula_head_by_head(
    n_heads: int, n_kv_heads: int, n_queries: int, softcap: float | None
) -> None:
    rng = torch.Generator().manual_seed(n_heads + n_queries)
    q = torch.randn(2, n_heads, n_queries, 10, generator=rng) * 2
    k, v = (torch.randn(2, n_kv_heads, 7, 10, generator=rng) for _ in range(2))
    mask = torch.rand(2, 1, n_queries, 7, generator=rng) < 0.7
    mask[..., 0] = True
    got = A.attention(q, k, v, mask=mask, scale=0.4, softcap=softcap)
    assert torch.allclose(got.double(), by_the_book(q, k, v, mask, 0.4, softcap), atol=2e-6)


def test_blocks_of_queries_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(2, 4, 33, 8), torch.randn(2, 2, 33, 8), torch.randn(2, 2, 33, 8)
    mask = torch.rand(2, 1, 33, 33) < 0.6
    mask[..., 0] = True
    with torch.no_grad():
        whole = A.attention(q, k, v, mask=mask, scale=0.3, softcap=3.0)
        monkeypatch.setattr(A, "MAX_SCORES", 700)
        blocked = A.attention(q, k, v, mask=mask, scale=0.3, softcap=3.0)
    assert torch.allclose(whole, blocked, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("masked", [True, False])
def test_flex_attention_agrees_with_plain_attention(masked: bool) -> None:
    q, k, v = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    tokens = span([0] * 5 + [1] * 4)
    mask = A.usable_mask(A.prefix_lm_mask(tokens, tokens)) if masked else None
    flex = A.flex_attention(q, k, v, mask=mask, scale=0.5, softcap=2.0)
    assert torch.allclose(flex, A.attention(q, k, v, mask=mask, scale=0.5, softcap=2.0), atol=1e-5)
