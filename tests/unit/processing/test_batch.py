"""Batch: rows of tensors, padded and packed, and what is refused."""

import dataclasses

import pytest
import torch

from paligemma.errors import OptionError, ShapeError
from paligemma.processing.batch import Batch, Item, collate, pack
from paligemma.processing.prompt import fit, lay_out

PER_IMAGE, SIDE, WIDTH = 4, 6, 5


def item(n_prefix: int, n_suffix: int = 0, n_images: int = 0, *, embeds: bool = False, value: float = 0.0) -> Item:
    """A row of 1 + n_prefix + 1 text tokens, plus suffix and eos; images filled with `value`."""
    suffix = range(200, 200 + n_suffix)
    sequence = lay_out(
        PER_IMAGE * n_images, range(100, 100 + n_prefix), [10], list(suffix), bos=2, eos=1 if n_suffix else None
    )
    pixels = torch.full((n_images, 3, SIDE, SIDE), value) if n_images and not embeds else None
    return Item(sequence, pixels, torch.full((n_images, PER_IMAGE, WIDTH), value) if n_images and embeds else None)


def test_rows_are_padded_on_the_side_that_was_asked_for():
    left, right = (collate([item(1), item(3, 1)], padding_side=side) for side in ("left", "right"))
    assert left.tokens[0].tolist() == [0, 0, 0, 0, 2, 100, 10]
    assert right.tokens[0].tolist() == [2, 100, 10, 0, 0, 0, 0]
    assert left.positions[0].tolist() == [0, 0, 0, 0, 0, 1, 2]
    assert right.positions[0].tolist() == [0, 1, 2, 0, 0, 0, 0]
    assert left.segment_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert left.mask_ar[0].tolist() == [1, 1, 1, 1, 0, 0, 0]
    for batch in (left, right):
        assert batch.tokens[1].tolist() == [2, 100, 101, 102, 10, 200, 1]
        assert torch.equal(batch.segment_ids > 0, batch.mask_input)


def test_tensors_have_the_documented_types():
    batch = collate([item(1, 1, 1)])
    kinds = {name: getattr(batch, name).dtype for name in ("tokens", "mask_ar", "segment_ids", "positions")}
    assert set(kinds.values()) == {torch.int64}
    assert {getattr(batch, name).dtype for name in ("mask_image", "mask_input", "mask_loss")} == {torch.bool}
    assert batch.pixels is not None
    assert batch.pixels.dtype == torch.float32


def test_images_stand_in_the_order_of_the_examples():
    batch = collate([item(1, n_images=2, value=1.0), item(1), item(1, n_images=1, value=2.0)])
    assert batch.n_images == (2, 0, 1)
    assert batch.pixels is not None
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 1, 2]
    assert batch.mask_image.sum(dim=1).tolist() == [2 * PER_IMAGE, 0, PER_IMAGE]


def test_packing_fills_the_first_row_with_room_and_tells_who_went_where():
    examples = [item(4, value=0.0), item(3, n_images=1, value=1.0), item(2), item(1, n_images=0)]  # 6, 9, 4, 3 slots
    batch = pack(examples, 10)
    assert batch.segment_ids.tolist() == [
        [1, 1, 1, 1, 1, 1, 2, 2, 2, 2],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert batch.order == (0, 2, 1, 3)
    assert batch.n_images == (0, 0, 1, 0)
    assert batch.is_packed
    assert batch.n_examples == 4
    assert batch.n_rows == 3


def test_packed_images_follow_their_examples_to_other_rows():
    examples = [
        item(1, n_images=1, value=1.0),
        item(5, n_images=1, value=2.0),
        item(1, n_images=1, value=3.0),
    ]  # 7, 11, 7
    batch = pack(examples, 14)
    assert batch.order == (0, 2, 1)
    assert batch.pixels is not None
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 3, 2]


def test_padding_inside_a_fitted_sequence_belongs_to_no_segment():
    batch = collate([Item(fit(lay_out(0, [5], [10], [20], bos=2, eos=1), 8))])
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0]]


def test_lengths_can_be_fixed_and_rounded_up():
    assert collate([item(1)], length=9).length == 9
    assert collate([item(1)], multiple_of=8).length == 8
    assert pack([item(1), item(7)], multiple_of=8).length == 16


def test_encoded_images_take_the_place_of_pixels():
    batch = collate([item(1, n_images=1, embeds=True), item(1)])
    assert batch.pixels is None
    assert batch.image_embeds is not None
    assert batch.image_embeds.shape == (1, PER_IMAGE, WIDTH)
    later = collate([item(1, n_images=1)]).with_image_embeds(torch.zeros(1, PER_IMAGE, WIDTH))
    assert later.pixels is None
    assert later.images is later.image_embeds


def test_the_model_gets_everything_but_the_targets():
    batch = collate([item(1, 1, 1)])
    given = batch.model_inputs()
    assert set(given) == {
        "tokens",
        "mask_image",
        "mask_ar",
        "mask_input",
        "segment_ids",
        "positions",
        "pixels",
        "image_embeds",
        "image_of",
    }
    assert given["tokens"] is batch.tokens


def test_moving_keeps_values_and_text_only_batches_move_too():
    for batch in (collate([item(1, 1, 1)]), collate([item(1)])):
        moved = batch.to("meta")
        assert moved.device.type == "meta"
        assert moved.n_images == batch.n_images
        assert torch.equal(batch.to("cpu").tokens, batch.tokens)


@pytest.mark.gpu
def test_pinned_batches_stay_equal():
    batch = collate([item(1, 1, 1)])
    pinned = batch.pin_memory()
    assert pinned.tokens.is_pinned()
    assert torch.equal(pinned.to("cuda", non_blocking=True).tokens.cpu(), batch.tokens)


def test_a_batch_is_described_in_one_line():
    assert repr(collate([item(1, n_images=2)])) == "Batch(1 examples in 1 rows of 11, 2 images)"


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ShapeError, match="a batch of no examples"):
        collate([])
    with pytest.raises(ShapeError, match=r"an example has 7 tokens, a row 6: expected every example to fit"):
        pack([item(1), item(5)], 6)
    with pytest.raises(ShapeError, match="1 examples have pixels and 1 have image_embeds"):
        collate([item(1, n_images=1), item(1, n_images=1, embeds=True)])
    with pytest.raises(ShapeError, match=r"images of unlike shapes \[\(3, 6, 6\), \(3, 8, 8\)\]"):
        collate([item(1, n_images=1), Item(item(1, n_images=1).sequence, torch.zeros(1, 3, 8, 8))])
    with pytest.raises(OptionError, match=r"padding_side='rigth': expected 'left' or 'right'\. Did you mean 'right'\?"):
        collate([item(1)], padding_side="rigth")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="multiple_of=0: expected 1 or more"):
        collate([item(1)], multiple_of=0)


def test_an_example_needs_slots_for_its_images_and_images_for_its_slots():
    text, pictured = item(1).sequence, item(1, n_images=1).sequence
    pixels = torch.zeros(1, 3, SIDE, SIDE)
    for arguments in ((text, pixels), (pictured,), (pictured, torch.zeros(0, 3, SIDE, SIDE))):
        with pytest.raises(ShapeError, match=r"images for \d image slots: expected slots for each"):
            Item(*arguments)
    with pytest.raises(ShapeError, match="4 image slots do not divide among 3 images"):
        Item(pictured, torch.zeros(3, 3, SIDE, SIDE))
    with pytest.raises(ShapeError, match="both pixels and image_embeds"):
        Item(pictured, pixels, torch.zeros(1, PER_IMAGE, WIDTH))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", torch.zeros(3, dtype=torch.int64), r"Batch\.tokens has shape \(3,\): expected \[rows, slots\]"),
        ("positions", torch.zeros(1, 2), r"Batch\.positions has shape \(1, 2\): expected \(1, 9\)"),
        (
            "pixels",
            torch.zeros(1, SIDE, SIDE, 3),
            r"Batch\.pixels has shape \(1, 6, 6, 3\): expected \[images, 3, R, R\]",
        ),
        ("pixels", torch.zeros(2, 3, SIDE, SIDE), r"counts 1 images, given are 2"),
        ("image_embeds", torch.zeros(1, PER_IMAGE, WIDTH), "both pixels and image_embeds"),
    ],
)
def test_a_batch_made_by_hand_is_checked(field: str, value: torch.Tensor, message: str):
    good: Batch = collate([item(1, 1, 1)])
    with pytest.raises(ShapeError, match=message):
        dataclasses.replace(good, **{field: value})
