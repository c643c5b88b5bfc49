"""The sequence layout, drawn out."""

import dataclasses

import numpy as np
import pytest

from paligemma.errors import ShapeError
from paligemma.processing.prompt import fit, lay_out


def drawn(row: object) -> dict[str, list[int]]:
    return {f.name: getattr(row, f.name).astype(int).tolist() for f in dataclasses.fields(row)}  # type: ignore[arg-type]


def test_a_training_row_is_image_prefix_separator_suffix_eos():
    row = lay_out(3, [7, 8], [10], [20, 21], bos=2, eos=1)
    assert drawn(row) == {
        "tokens": [0, 0, 0, 2, 7, 8, 10, 20, 21, 1],
        "mask_image": [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        "mask_ar": [0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
        "mask_input": [1] * 10,
        "mask_loss": [0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    }


def test_an_inference_row_is_the_training_row_without_its_suffix():
    taught, asked = (drawn(lay_out(3, [7, 8], [10], s, bos=2, eos=e)) for s, e in (([20], 1), ([], None)))
    assert asked == {name: values[:7] for name, values in taught.items()}
    assert not any(asked["mask_ar"])


def test_an_empty_answer_is_eos_alone_and_a_forced_start_has_none():
    assert drawn(lay_out(0, [7], [10], [], bos=2, eos=1))["tokens"] == [2, 7, 10, 1]
    assert drawn(lay_out(0, [7], [10], [20], bos=2, eos=None))["tokens"] == [2, 7, 10, 20]


def test_padding_opens_a_block_of_its_own_and_is_no_input_and_no_target():
    assert drawn(fit(lay_out(1, [7], [10], [20], bos=2, eos=1), 9)) == {
        "tokens": [0, 2, 7, 10, 20, 1, 0, 0, 0],
        "mask_image": [1, 0, 0, 0, 0, 0, 0, 0, 0],
        "mask_ar": [0, 0, 0, 0, 1, 1, 1, 1, 1],
        "mask_input": [1, 1, 1, 1, 1, 1, 0, 0, 0],
        "mask_loss": [0, 0, 0, 0, 1, 1, 0, 0, 0],
    }


def test_a_cut_takes_the_end_and_can_keep_the_last_token():
    row = lay_out(1, [7], [10], [20, 21, 22], bos=2, eos=1)
    assert fit(row, 6).tokens.tolist() == [0, 2, 7, 10, 20, 21]
    assert fit(row, 6, keep_last=True).tokens.tolist() == [0, 2, 7, 10, 20, 1]


def test_a_row_that_fits_is_equal_to_itself():
    row = lay_out(1, [7], [10], [20], bos=2, eos=1)
    assert drawn(fit(row, len(row))) == drawn(row)


def test_the_image_is_never_cut():
    with pytest.raises(ShapeError, match="length 3 does not hold the 4 image tokens"):
        fit(lay_out(4, [7], bos=2, eos=None), 3)


def test_parts_of_unlike_length_are_refused():
    row = lay_out(0, [7], bos=2, eos=None)
    with pytest.raises(ShapeError, match="unlike lengths"):
        dataclasses.replace(row, mask_ar=np.zeros(5, np.int64))
    with pytest.raises(ShapeError, match="n_image_tokens=-1: expected 0 or more"):
        lay_out(-1, [7], bos=2, eos=None)
