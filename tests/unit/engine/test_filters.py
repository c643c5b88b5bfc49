"""Filters: what may be written, and what is said when nothing may."""

import numpy as np
import pytest
import torch

from paligemma.engine.filters import Filters, OneOf
from paligemma.errors import OptionError, ShapeError
from tests.toy_model import EOS, ToyModel

CONFIG = ToyModel(6).config


def open_ids(filters: Filters, rows, written, n=6):
    logits = filters(torch.zeros(len(rows), n), rows, written)
    return [torch.nonzero(row > -torch.inf)[:, 0].tolist() for row in logits]


def test_without_filters_logits_pass_untouched():
    logits = torch.zeros(1, 6)
    assert Filters(CONFIG, 1)(logits, [0], [[]]) is logits


def test_filler_rows_of_the_table_are_never_open():
    filters = Filters(ToyModel(6, filler=2).config, 1)
    assert open_ids(filters, [0], [[]], n=8) == [[0, 1, 2, 3, 4, 5]]


def test_forbidden_ids_masks_and_masks_per_row_agree():
    mask = torch.tensor([True, False, True, False, False, False])
    for forbidden in ([0, 2], torch.tensor([2, 0]), mask):
        assert open_ids(Filters(CONFIG, 2, forbidden), [0, 1], [[], []]) == [[1, 3, 4, 5]] * 2
    per_row = Filters(CONFIG, 2, torch.stack([mask, ~mask]))
    assert open_ids(per_row, [1, 0], [[], []]) == [[0, 2], [1, 3, 4, 5]]


def test_a_constraint_sees_what_its_row_wrote_and_joins_the_other_filters():
    seen = []

    def after(written):
        seen.append(written)
        return torch.arange(6) > len(written)

    filters = Filters(CONFIG, 3, [5], [None, after, after])
    assert open_ids(filters, [2, 0], [[7, 8], []]) == [[3, 4], [0, 1, 2, 3, 4]]
    assert seen == [(7, 8)]
    assert open_ids(Filters(CONFIG, 1, constraint=lambda written: None), [0], [[]]) == [[0, 1, 2, 3, 4, 5]]


def test_one_of_follows_the_given_suffixes_to_their_end():
    rule = OneOf([[3, 4, EOS], [3, EOS], [5, EOS]], 6)
    filters = Filters(CONFIG, 1, constraint=rule)
    steps = [[], [3], [3, 4], [5]]
    assert [open_ids(filters, [0], [written])[0] for written in steps] == [[3, 5], [EOS, 4], [EOS], [EOS]]


def test_a_constraint_that_allows_nothing_is_named_with_what_was_written():
    filters = Filters(CONFIG, 2, constraint=OneOf([[3, EOS]], 6))
    with pytest.raises(OptionError, match=r"row 1 allows no token after \(4,\).*end of sequence"):
        filters(torch.zeros(1, 6), [1], [[4]])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forbidden": [6]}, OptionError, "token 6 does not exist: expected ids from 0 to 5"),
        ({"forbidden": [-1]}, OptionError, "token -1 does not exist"),
        ({"forbidden": range(6)}, OptionError, "all 6 tokens are forbidden"),
        ({"forbidden": torch.zeros(5, dtype=torch.bool)}, ShapeError, r"shape \[5\]: expected \[6\]"),
        ({"forbidden": [2.5]}, OptionError, "float32: expected whole ids"),
        ({"forbidden": [True, False]}, ShapeError, r"shape \[2\]: expected \[6\]"),
        ({"constraint": [None]}, OptionError, "1 constraints for 2 rows"),
    ],
)
def test_filters_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Filters(CONFIG, 2, **options)


def test_a_constraint_that_returns_ids_is_told_what_was_expected():
    filters = Filters(CONFIG, 1, constraint=lambda written: torch.tensor([3, 4]))
    with pytest.raises(ShapeError, match=r"torch.int64\[2\]: expected bool\[6\]"):
        filters(torch.zeros(1, 6), [0], [[]])


def test_a_constraint_may_return_an_array():
    mask = np.arange(6) < 2
    as_array = Filters(CONFIG, 1, constraint=lambda written: mask)
    as_tensor = Filters(CONFIG, 1, constraint=lambda written: torch.from_numpy(mask))
    logits = torch.zeros(1, 6)
    assert as_array(logits, [0], [[]]).tolist() == as_tensor(logits, [0], [[]]).tolist() == [[0, 0, *[-torch.inf] * 4]]


def test_one_of_nothing_is_refused():
    with pytest.raises(OptionError, match="OneOf of nothing"):
        OneOf([[]], 6)
