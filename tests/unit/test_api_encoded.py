"""Image handles: joining, and which size boxes refer to."""

import pytest
import torch

from paligemma.api.arguments import pictures_of
from paligemma.api.encoded import EncodedImage
from paligemma.api.requests import Subject
from paligemma.errors import ImageError, OptionError, ShapeError


def handle(*sizes_hw: tuple[int, int], tokens: int = 4) -> EncodedImage:
    return EncodedImage(torch.randn(len(sizes_hw), tokens, 3), sizes_hw)


def test_boxes_refer_to_the_one_size_that_all_pictures_share():
    assert Subject(((6, 8),)).size_hw == (6, 8)
    assert Subject(((6, 8), (6, 8))).size_hw == (6, 8)
    with pytest.raises(OptionError, match="8×6, 6×8"):
        _ = Subject(((6, 8), (8, 6))).size_hw
    with pytest.raises(OptionError, match="no picture at all"):
        _ = Subject(()).size_hw


def test_handles_join_in_reading_order():
    one, two = handle((6, 8)), handle((5, 5), (4, 4))
    both = EncodedImage.joined([one, two])
    assert both.sizes_hw == ((6, 8), (5, 5), (4, 4))
    assert torch.equal(both.image_embeds, torch.cat([one.image_embeds, two.image_embeds]))


def test_handles_of_two_models_do_not_join():
    with pytest.raises(ShapeError, match="one and the same model"):
        EncodedImage.joined([handle((6, 8)), handle((6, 8), tokens=9)])
    with pytest.raises(ShapeError, match="Make handles with encode_image"):
        EncodedImage(torch.zeros(2, 4, 3), ((6, 8),))


def test_one_example_is_a_picture_a_flat_list_or_nothing():
    assert pictures_of("a.png") == ["a.png"]
    assert pictures_of(["a.png", b"b"]) == ["a.png", b"b"]
    assert pictures_of(None) == []
    with pytest.raises(ImageError, match="nested too deep"):
        pictures_of([["a.png"]])
