"""On a CUDA device: training gives the losses of the CPU, in every way of training, and goes on from a snapshot."""

from pathlib import Path

import pytest
import torch

from paligemma.models.lora import LoraOptions, add_lora
from paligemma.models.nf4 import pack_linears
from paligemma.train.loop import FitOptions, fit
from paligemma.train.optim import Optimizer
from paligemma.train.snapshots import Snapshots
from paligemma.train.state import TrainState
from tests.training_runs import Losses, loader_of, optim_options, state_of, write_rows

pytestmark = pytest.mark.gpu
DECODER = r"text\.blocks\.\d+\.(attn|mlp)\.\w+"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 10)


def begin(device: str, options: FitOptions, *, method: str = "full") -> TrainState:
    state = state_of(options)
    if method == "qlora":
        pack_linears(state.model, DECODER)
        state.model.requires_grad_(False)
    if method != "full":
        add_lora(state.model, LoraOptions(rank=4), seed=3)
    model = state.model.to(device)
    return TrainState(model, Optimizer(model.named_parameters(), optim_options(), total_steps=options.steps))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("settings", [{}, {"arrange": "pack"}, {"part_size": 2}], ids=["bucket", "pack", "parts"])
def test_losses_are_those_of_the_cpu(rows, method, settings):
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    options, told = FitOptions(steps=4), {}
    for device in ("cpu", "cuda"):
        told[device] = Losses()
        fit(begin(device, options, method=method), loader_of(rows, **settings), options, hooks=[told[device]])
    assert told["cuda"] == pytest.approx(told["cpu"], rel=2e-3)


@pytest.mark.parametrize("compile", [False, True])
def test_bfloat16_learns(rows, compile):
    options, told = FitOptions(steps=30, precision="bfloat16", compile=compile), Losses()
    fit(begin("cuda", options), loader_of(rows, batch_size=5), options, hooks=[told])
    assert sum(told[-3:]) < 0.5 * sum(told[:3])


def test_a_snapshot_goes_on_where_it_was(rows, tmp_path):
    options, whole, rest = FitOptions(steps=6), Losses(), Losses()
    fit(begin("cuda", options), loader_of(rows), options, hooks=[whole])
    fit(begin("cuda", options), loader_of(rows), FitOptions(steps=3), snapshots=Snapshots(tmp_path))
    state = begin("cuda", options)
    state.restore(Snapshots(tmp_path).latest())
    fit(state, loader_of(rows), options, hooks=[rest])
    assert rest == pytest.approx(whole[3:], rel=1e-3)


def test_nothing_is_left_on_the_device(rows):
    before = torch.cuda.memory_allocated()
    options = FitOptions(steps=2)
    fit(begin("cuda", options), loader_of(rows), options)
    assert torch.cuda.memory_allocated() - before < 1 << 20
