"""Places on steps: what a model that knows only every n-th location token is taught."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma.data.example import Example
from paligemma.errors import OptionError
from paligemma.recipes.rows import OnSteps
from paligemma.recipes.transfer import TransferRecipe, run
from paligemma.tasks.coords import N_LOC
from paligemma.tasks.grammar import parse_entries


class Rows:
    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def __len__(self) -> int:
        return len(self.suffixes)

    def __getitem__(self, index: int) -> Example:
        return Example((), "detect cat", self.suffixes[index], unlearned=((0, 3),))


bins = st.integers(0, N_LOC - 2).flatmap(lambda low: st.tuples(st.just(low), st.integers(low + 1, N_LOC - 1)))


@given(bins, bins, st.integers(1, 64))
def test_boxes_move_to_steps_keep_their_area_and_half_a_step(rows, columns, step):
    (y1, y2), (x1, x2) = rows, columns
    text = "".join(f"<loc{bin_:04d}>" for bin_ in (y1, x1, y2, x2)) + " cat"
    moved = OnSteps(Rows(text), step)[0]
    ((entry,), problems) = parse_entries(moved.suffix)
    assert not problems
    assert entry.has_area
    assert len(moved.suffix) == len(text)  # so that stretches without loss stay where they are
    assert all(bin_ % step == 0 or bin_ == N_LOC - 1 for bin_ in entry.bins)
    if min(y2 - y1, x2 - x1) > 2 * step:
        assert all(abs(a - b) <= step for a, b in zip(entry.bins, (y1, x1, y2, x2), strict=True))


def test_everything_but_boxes_stays():
    text = "<loc0011><loc0022><loc0333><loc0444><seg001><seg002> a cat <loc0099> ; 0123"
    moved = OnSteps(Rows(text), 8)[0].suffix
    assert re.sub(r"(<loc\d{4}>){4}", "", moved, count=1) == re.sub(r"(<loc\d{4}>){4}", "", text, count=1)
    assert OnSteps(Rows(text), 1)[0].suffix == text


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(OptionError, match="loc_step=0"):
        TransferRecipe(data="x", loc_step=0)
    with pytest.raises(OptionError, match="and a token_loss of your own"):
        run(TransferRecipe(data="x", loc_sigma=3.0), token_loss=lambda logits, targets: targets)
