"""Laws of processing: texts come back, pieces join, and a row means the same however it is padded or packed."""

import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paligemma.processing.batch import Batch, Item, collate, pack
from paligemma.processing.image import resize, to_pixels
from paligemma.processing.prompt import fit, lay_out
from paligemma.processing.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "golden" / "data" / "text_preprocessing" / "tokenizer_extended.model"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """One vocabulary in both file formats."""
    folder = tmp_path_factory.mktemp("json")
    model = Tokenizer.from_file(MODEL)
    model.save(folder, hugging_face=True)
    return model, Tokenizer.from_file(folder / "tokenizer.json")


WORDS = [
    "caption en",
    "<loc0012>",
    "<seg001>",
    "<eos>",
    "<image>",
    "<start_of_turn>",
    "<mask>",
    "\n",
    "\n\n",
    "  ",
    "   ",
    " ; ",
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(WORDS), st.text(max_size=8), st.text(string.printable, max_size=8)), max_size=8
).map("".join)
PLAIN_TEXTS = TEXTS.map(lambda text: text.replace("\u2581", "_"))  # ▁ stands for a space and comes back as one
IDS = st.lists(st.integers(0, 1700), max_size=30)


@given(text=PLAIN_TEXTS)
def test_decoding_undoes_encoding(both, text: str):
    for tokenizer in both:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXTS, special=st.sampled_from(["text", "parse"]))
def test_both_file_formats_encode_alike(both, text: str, special):
    model, fast = both
    assert model.encode(text, special=special) == fast.encode(text, special=special)


@given(ids=IDS)
def test_both_file_formats_decode_alike(both, ids: list[int]):
    model, fast = both
    assert model.pieces(ids) == fast.pieces(ids)
    assert model.pieces(ids, stop_at_eos=False) == fast.pieces(ids, stop_at_eos=False)


@given(ids=IDS, stop=st.booleans())
def test_pieces_join_to_the_decoded_text(both, ids: list[int], stop: bool):
    tokenizer = both[0]
    pieces = tokenizer.pieces(ids, stop_at_eos=stop)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, stop_at_eos=stop)


@given(ids=IDS)
def test_a_stream_joins_to_the_decoded_text_and_never_takes_back(both, ids: list[int]):
    tokenizer = both[0]
    stream, shown = tokenizer.stream(), ""
    for n, token in enumerate(ids, start=1):
        shown += stream.push(token)
        assert tokenizer.decode(ids[:n]).startswith(shown)
        assert tokenizer.decode(ids).startswith(shown)
    assert shown + stream.close() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(4, 1663), max_size=30))
def test_decoding_agrees_with_sentencepiece(both, ids: list[int]):
    assert both[0].decode(ids) == both[0]._vocabulary._model.DecodeIds(ids)


# -------------------------------------------------------------------------------------------------- rows and batches

PER_IMAGE = 3


@st.composite
def items(draw: st.DrawFn) -> Item:
    n_images = draw(st.integers(0, 2))
    ids = st.lists(st.integers(4, 1663), max_size=6)
    answered = draw(st.booleans())
    sequence = lay_out(
        PER_IMAGE * n_images, draw(ids), [10], draw(ids) if answered else [], bos=2, eos=1 if answered else None
    )
    return Item(sequence, torch.full((n_images, 3, 2, 2), draw(st.floats(-1, 1, width=32))) if n_images else None)


def examples_of(batch: Batch) -> list[tuple[int, list[list[int]], list[float]]]:
    """Every example with its place in the given list, its real slots and its images, whatever row it stands in."""
    found = []
    images = iter([] if batch.pixels is None else batch.pixels[:, 0, 0, 0].tolist())
    count = iter(zip(batch.order, batch.n_images, strict=True))
    for row in range(batch.n_rows):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            slots = batch.segment_ids[row] == segment
            names = ("tokens", "mask_image", "mask_ar", "mask_input", "mask_loss", "positions")
            place, n_images = next(count)
            columns = [getattr(batch, name)[row][slots].long().tolist() for name in names]
            found.append((place, columns, [next(images) for _ in range(n_images)]))
    return sorted(found, key=lambda entry: entry[0])


@given(given_items=st.lists(items(), min_size=1, max_size=6), room=st.integers(0, 30))
def test_packed_and_padded_batches_hold_the_same_examples(given_items: list[Item], room: int):
    length = max(len(item.sequence) for item in given_items) + room
    padded = examples_of(collate(given_items, padding_side="right"))
    assert len(padded) == len(given_items)
    assert examples_of(collate(given_items, padding_side="left", length=length)) == padded
    packed = pack(given_items, length)
    assert examples_of(packed) == padded
    assert packed.n_rows <= len(given_items)


@given(given_items=st.lists(items(), min_size=1, max_size=4))
def test_positions_count_every_example_from_zero(given_items: list[Item]):
    for batch in (collate(given_items, padding_side="left"), pack(given_items, 60)):
        for _, columns, _ in examples_of(batch):
            assert columns[-1] == list(range(len(columns[-1])))
        assert not batch.positions[~batch.mask_input].any()
        assert not batch.tokens[~batch.mask_input].any()
        assert not (batch.mask_image & ~batch.mask_input).any()


@given(item=items(), room=st.integers(0, 5))
def test_fitting_keeps_what_fits_and_pads_the_rest(item: Item, room: int):
    row = item.sequence
    longer = fit(row, len(row) + room)
    assert len(longer) == len(row) + room
    assert longer.tokens[longer.mask_input].tolist() == row.tokens.tolist()
    shorter = fit(row, max(row.n_image_tokens, len(row) - room))
    assert shorter.tokens.tolist() == row.tokens[: len(shorter)].tolist()


@given(item=items())
def test_targets_are_exactly_the_suffix_and_each_sees_only_what_came_before(item: Item):
    row = item.sequence
    np.testing.assert_array_equal(row.mask_loss, row.mask_ar == 1)
    np.testing.assert_array_equal(np.sort(row.mask_ar), row.mask_ar)  # one prefix block, then the suffix
    assert not (row.mask_image & row.mask_loss).any()


# ------------------------------------------------------------------------------------------------------------ pictures

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
HOW = st.sampled_from(["hf_bicubic", "bv_bilinear", "bv_bilinear_aa", "float_bilinear_aa"])


@given(size_hw=SIZES, how=HOW, seed=st.integers(0, 2**32 - 1), resolution=st.integers(1, 40))
def test_pixels_stay_in_range_and_keep_the_channels_apart(size_hw, how, seed: int, resolution: int):
    picture = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    pixels = to_pixels(picture, resolution, how)
    assert pixels.shape == (3, resolution, resolution)
    assert pixels.abs().max() <= 1 + 1e-6
    swapped = to_pixels(np.ascontiguousarray(picture[..., ::-1]), resolution, how)
    assert torch.equal(swapped, pixels.flip(0))


# From two pixels on: torch 2.13 repeats the first pixel when it stretches a picture one pixel wide.
WIDER = st.tuples(st.integers(2, 40), st.integers(2, 40))


@given(size_hw=WIDER, seed=st.integers(0, 2**32 - 1), out=WIDER)
def test_antialiased_bilinear_agrees_with_torch_within_rounding(size_hw, seed: int, out):
    picture = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    ours = torch.from_numpy(resize(picture, out, "float_bilinear_aa")).permute(2, 0, 1)
    source = torch.from_numpy(picture).permute(2, 0, 1)[None].double()
    theirs = torch.nn.functional.interpolate(source, out, mode="bilinear", antialias=True, align_corners=False)[0]
    torch.testing.assert_close(ours.double(), theirs, atol=2e-3, rtol=0)
