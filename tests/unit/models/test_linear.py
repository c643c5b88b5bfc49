"""Products on CPUs without narrow instructions: float32 inside, the same numbers outside."""

import pytest
import torch
import torch.nn.functional as F

from paligemma.models import linear as module
from paligemma.models.attention import attention
from paligemma.models.linear import MIN_ROWS, Linear, is_widened, linear

NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(params=NARROW, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request, monkeypatch):
    monkeypatch.setattr(module, "_has_instructions", lambda dtype: False)
    return request.param


def operands(dtype, rows=33, width=48, out=70):
    rng = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=rng).to(dtype) for shape in ((3, rows, width), (out, width), (out,)))


@torch.no_grad()
@pytest.mark.parametrize("rows_at_a_time", [70, 9])  # whole; in blocks of which the last is shorter
@pytest.mark.parametrize("biased", [True, False])
def test_a_widened_product_is_the_exact_one_rounded_once(dtype, monkeypatch, rows_at_a_time, biased):
    monkeypatch.setattr(module, "BLOCK_VALUES", 48 * rows_at_a_time)
    x, w, b = operands(dtype)
    exact = F.linear(x.double(), w.double(), b.double() if biased else None)
    found = linear(x, w, b if biased else None)
    assert found.dtype == dtype
    # Half a unit in the last place of the result, and what float32 sums lose.
    step = torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= step * exact.abs() + 1e-5).all()


@torch.no_grad()
def test_few_rows_and_wide_dtypes_go_to_torch(dtype):
    x, w, b = operands(dtype)
    few = x.flatten(0, 1)[: MIN_ROWS - 1]
    assert torch.equal(linear(few, w, b), F.linear(few, w, b))
    assert not is_widened(x.float())


def test_with_gradients_torch_multiplies(dtype):
    x, w, b = operands(dtype)
    layer = Linear(48, 70, dtype=dtype)
    layer.load_state_dict({"weight": w, "bias": b})
    assert not is_widened(x)
    out = layer(x)
    assert torch.equal(out, F.linear(x, layer.weight, layer.bias))
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_widened_attention_is_the_float32_one_rounded(dtype, softcap):
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 9, 8, generator=rng).to(dtype) for n in (4, 2, 2))
    mask = torch.rand(2, 1, 9, 9, generator=rng) < 0.7
    mask |= torch.eye(9, dtype=torch.bool)
    found = attention(q, k, v, mask=mask, scale=0.3, softcap=softcap)
    wide = attention(q.float(), k.float(), v.float(), mask=mask, scale=0.3, softcap=softcap)
    assert found.dtype == dtype
    assert torch.equal(found, wide.to(dtype))
