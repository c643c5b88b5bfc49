"""Weights in 4 bits: the numbers of bitsandbytes, the memory that is promised, training that moves adapters alone."""

import copy
import sys

import numpy as np
import pytest
import torch

import paligemma
from paligemma.errors import MissingExtra, OptionError
from paligemma.models import nf4
from paligemma.models.lora import LoraOptions, add_lora
from paligemma.models.nf4 import BITS, Nf4Linear, Nf4Weight, pack_linears
from paligemma.train.loop import FitOptions, fit
from paligemma.train.loss import loss_sums
from paligemma.train.optim import Optimizer
from paligemma.train.state import TrainState
from tests.training_runs import Losses, loader_of, optim_options, state_of, write_rows

bnb = pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
DECODER = r"text\.blocks\.\d+\.(attn|mlp)\.\w+"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), 10)


def packed_state(seed: int = 0, **options):
    """A small run over a packed base, and a copy of the model whose weights are the unpacked ones."""
    state = state_of(FitOptions(steps=6), seed=seed)
    pack_linears(state.model, DECODER)
    state.model.requires_grad_(False)
    plain = copy.deepcopy(state_of(FitOptions(steps=6), seed=seed).model).requires_grad_(False)
    for path, module in state.model.named_modules():
        if isinstance(module, Nf4Linear):
            plain.get_submodule(path).weight.data.copy_(module.weight.dense())
    for model in (state.model, plain):
        add_lora(model, LoraOptions(rank=4, **options), seed=3)
    return state.model, plain


@pytest.mark.parametrize("shape", [(64, 64), (24, 40), (129, 192), (16, 50)])
def test_values_are_those_of_bitsandbytes_and_take_the_bits_that_are_promised(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = Nf4Weight(weight)
    theirs, state = bnb.functional.quantize_4bit(
        weight.flatten()[None], blocksize=64, quant_type="nf4", compress_statistics=True
    )
    expected = bnb.functional.dequantize_4bit(theirs, state).reshape(shape)
    # Scales of scales are those of parts of a million values, which is the whole here.
    torch.testing.assert_close(packed.dense(), expected, atol=1e-6, rtol=1e-5)
    error = (packed.dense() - weight).abs().max() / weight.abs().max()
    assert error < 0.16  # half of the widest gap between two of the 16 levels, and a little for the 8-bit scales
    n_bytes = sum(t.nbytes for name, t in packed.named_buffers() if name != "scale_table")
    assert n_bytes <= weight.numel() * BITS / 8 + 64


def test_only_the_matrices_of_the_decoder_are_packed():
    pg = paligemma.load("tiny", device="cpu", quantize="nf4")
    packed = {path for path, module in pg.model.named_modules() if isinstance(module, Nf4Linear)}
    depth = pg.config.text.depth
    assert packed == {
        f"text.blocks.{i}.{name}"
        for i in range(depth)
        for name in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert pg.caption(_picture()).text


def _picture():
    pixels = np.full((60, 60, 3), 255, np.uint8)
    pixels[15:45, 15:45] = (220, 20, 30)
    return pixels


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_learn_as_over_the_unpacked_weights(rows, use_dora):
    packed, plain = packed_state(use_dora=use_dora)
    batch = loader_of(rows).step(0).parts[0]
    gradients = []
    for model in (packed, plain):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        total = loss_sums(model, batch).total
        found = torch.autograd.grad(total, list(named.values()))
        gradients.append((total.item(), dict(zip(named, found, strict=True))))
    (loss, ours), (expected, theirs) = gradients
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-4, msg=name)


def test_a_run_moves_the_adapters_and_leaves_the_packed_weights_alone(rows):
    options = FitOptions(steps=6)
    model, _ = packed_state()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = Optimizer(model.named_parameters(), optim_options(), total_steps=6)
    losses = Losses()
    fit(TrainState(model, optimizer), loader_of(rows), options, hooks=[losses])
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved
    assert all(".adapters." in name for name in moved), sorted(moved)[:3]
    assert losses[-1] < losses[0]


def test_a_change_of_dtype_leaves_scales_as_the_kernels_need_them():
    packed = Nf4Weight(torch.randn(64, 64))
    expected = packed.dense()
    assert torch.equal(packed.to(torch.bfloat16).dense(), expected)


def test_mistakes_are_told(monkeypatch):
    with pytest.raises(OptionError, match="matches no linear layer"):
        pack_linears(state_of(FitOptions(steps=1)).model, "text.nothing")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match="qlora"):
        nf4.bitsandbytes("NF4")
