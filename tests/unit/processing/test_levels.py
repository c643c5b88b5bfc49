"""Levels as bytes, and the numbers that the tower makes of them: those of the processor, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma.models.siglip import of_levels
from paligemma.processing.image import to_pixels

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)


def test_every_level_is_the_number_of_both_references():
    levels = torch.arange(256, dtype=torch.uint8)
    x = np.arange(256, dtype=np.float32)
    assert np.array_equal(of_levels(levels).numpy(), (x / np.float32(255) - np.float32(0.5)) / np.float32(0.5))
    assert np.array_equal(of_levels(levels).numpy(), x / np.float32(255) * np.float32(2) - np.float32(1))


@pytest.mark.parametrize("how", ["hf_bicubic", "bv_bilinear", "bv_bilinear_aa"])
@pytest.mark.parametrize("side", [16, 70])
def test_levels_are_the_pixels(how, side):
    for picture in (PICTURE, Image.fromarray(PICTURE)):
        levels = to_pixels(picture, side, how, out=torch.empty(3, side, side, dtype=torch.uint8))
        assert levels.float().std() > 5
        assert torch.equal(of_levels(levels), to_pixels(picture, side, how))


def test_a_resize_without_whole_levels_has_no_bytes():
    with pytest.raises(TypeError):
        to_pixels(PICTURE, 16, "float_bilinear_aa", out=torch.empty(3, 16, 16, dtype=torch.uint8))
