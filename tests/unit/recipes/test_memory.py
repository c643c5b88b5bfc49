"""What fits into memory decides the way of training, and is told when memory ran out after all."""

import dataclasses

import pytest
import torch

from paligemma.errors import TrainingError
from paligemma.presets import MODEL_PRESETS
from paligemma.recipes import memory
from paligemma.recipes.memory import advising, fits_whole, method_of, strategy_of
from paligemma.recipes.rows import Lengths
from paligemma.recipes.transfer import TransferRecipe
from paligemma.train.ranks import Ranks

CPU, CONFIG = torch.device("cpu"), MODEL_PRESETS["paligemma2-3b-224"]
LENGTHS = Lengths(n=10, longest=64, longest_target=16, n_images=1, n_cut=0, n_silenced=0)
RECIPE, GIB = TransferRecipe(data="x"), 2.0**30


class Group(Ranks):
    """Ranks of a run, seen from the first, whose answers are the same."""

    def from_first(self, value):
        return value


def with_memory(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _device: gib * GIB)


@pytest.mark.parametrize(("gib", "method"), [(400, "full"), (60, "lora"), (14, "qlora")])
def test_the_first_way_that_fits_is_taken_and_says_why(monkeypatch, gib, method):
    with_memory(monkeypatch, gib)
    chosen, why = method_of(RECIPE, CONFIG, CPU, LENGTHS, Ranks())
    assert chosen == method
    assert f"{gib}.0 GiB" in why
    asked = dataclasses.replace(RECIPE, method="dora")
    assert method_of(asked, CONFIG, CPU, LENGTHS, Ranks()) == ("dora", "as asked")


def test_weights_are_shared_out_where_one_device_cannot_hold_them(monkeypatch):
    group = Group(0, 4)
    with_memory(monkeypatch, 4 * 400)  # processes of one CPU share its memory
    assert strategy_of(RECIPE, "full", CONFIG, CPU, LENGTHS, group) == "ddp"
    with_memory(monkeypatch, 4 * 40)
    assert method_of(RECIPE, CONFIG, CPU, LENGTHS, group)[0] == "full"
    assert strategy_of(RECIPE, "full", CONFIG, CPU, LENGTHS, group) == "fsdp"
    assert strategy_of(RECIPE, "qlora", CONFIG, CPU, LENGTHS, group) == "ddp"
    asked = dataclasses.replace(RECIPE, strategy="ddp")
    assert strategy_of(asked, "full", CONFIG, CPU, LENGTHS, group) == "ddp"
    assert strategy_of(RECIPE, "full", CONFIG, CPU, LENGTHS, Ranks()) == "ddp"
    assert fits_whole(CONFIG, CPU, group)
    with_memory(monkeypatch, 4 * 10)
    assert not fits_whole(CONFIG, CPU, group)


def test_out_of_memory_says_what_would_have_fitted(monkeypatch):
    with_memory(monkeypatch, 40)
    full = dataclasses.replace(RECIPE, method="full")
    with (
        pytest.raises(
            TrainingError, match=r"out of memory on cpu: the plan for full .* What fits, best first: method=lora"
        ),
        advising(full, CONFIG, CPU, LENGTHS),
    ):
        torch.empty(1 << 62, dtype=torch.uint8)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="something else"), advising(RECIPE, CONFIG, CPU, LENGTHS):
        raise RuntimeError("something else")
