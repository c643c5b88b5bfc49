"""8-bit Adam: learns as Adam does, in a quarter of the memory, and goes on from a snapshot to the bit."""

import pytest
import torch

from paligemma.errors import OptionError
from paligemma.train.loop import FitOptions, fit
from paligemma.train.optim import OptimOptions
from paligemma.train.snapshots import Snapshots
from tests.training_runs import Losses, loader_of, state_of, weights_of, write_rows

pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), 10)


def moments_bytes(state) -> int:
    return sum(t.nbytes for t in state.tensors()["optimizer"].values())


def test_it_learns_as_adam_does_in_less_memory(rows):
    options, told = FitOptions(steps=30), {}
    states = {kind: state_of(options, kind=kind) for kind in ("adam", "adam8bit")}
    for kind, state in states.items():
        told[kind] = Losses()
        fit(state, loader_of(rows, batch_size=5), options, hooks=[told[kind]])
    assert told["adam8bit"][-1] < 0.5 * told["adam8bit"][0]
    assert told["adam8bit"][-1] == pytest.approx(told["adam"][-1], rel=0.3)
    # Only tensors of 4,096 values and more are kept in 8 bits: here the table, most of this model.
    assert moments_bytes(states["adam8bit"]) < 0.45 * moments_bytes(states["adam"])


def test_k_steps_and_k_more_are_2k_steps_to_the_bit(rows, tmp_path):
    options = FitOptions(steps=6)
    whole = state_of(options, kind="adam8bit")
    fit(whole, loader_of(rows), options)
    first = state_of(options, kind="adam8bit")
    fit(first, loader_of(rows), FitOptions(steps=3), snapshots=Snapshots(tmp_path))
    second = state_of(options, seed=9, kind="adam8bit")
    second.restore(Snapshots(tmp_path).latest())
    fit(second, loader_of(rows), options)
    ours, expected = weights_of(second), weights_of(whole)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(OptionError, match=r"adam8bit.*Did you mean 'adam8bit'"):
        OptimOptions(kind="adam8bits")  # type: ignore[arg-type]
