"""Processor: from a user's words and pictures to a batch, and what a user can get wrong."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma.config import PaliGemmaConfig, ProcessingConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.errors import ImageError, PromptError, ShapeError, TokenizerError
from paligemma.processing.image import load_image, to_pixels
from paligemma.processing.processor import Processor
from paligemma.processing.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "golden" / "data" / "text_preprocessing" / "tokenizer_extended.model"
CONFIG = PaliGemmaConfig(
    vision=VisionConfig(width=8, depth=1, mlp_dim=12, n_heads=2, resolution=28),
    text=TextConfig(
        width=12, depth=1, mlp_dim=20, n_heads=2, n_kv_heads=1, head_dim=6, vocab_size=1664, post_norms=False,
        query_pre_attn_scalar=6,
    ),
    tokens=TokenConfig(n_tokens=1664, loc_start=512, seg_start=1536, image=1664),
)  # fmt: skip
N = CONFIG.vision.n_image_tokens
TOKENIZER = Tokenizer.from_file(MODEL, CONFIG.tokens)
RED, BLUE = (np.full((9, 5, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))


def processor(**processing: Any) -> Processor:
    return Processor(dataclasses.replace(CONFIG, processing=ProcessingConfig(**processing)), TOKENIZER)


def text_of(batch: Any, example: int = 0) -> list[int]:
    kept = batch.mask_input[example] & ~batch.mask_image[example]
    return batch.tokens[example][kept].tolist()


def test_asking_ends_with_the_separator_and_teaching_with_eos():
    ids = TOKENIZER.encode("caption en")
    assert text_of(processor()(RED, "caption en")) == [2, *ids, 10]
    assert text_of(processor()(RED, "caption en", "x")) == [2, *ids, 10, *TOKENIZER.encode("x"), 1]
    assert text_of(processor()(RED, "caption en", "")) == [2, *ids, 10, 1]
    assert text_of(processor()(RED, "caption en", "x", suffix_open=True)) == [2, *ids, 10, *TOKENIZER.encode("x")]
    assert text_of(processor()(RED, "")) == [2, 10]


def test_prefix_separator_and_suffix_are_never_joined_to_one_piece():
    assert text_of(processor()(RED, "x\n", "\n"))[-4:] == [10, 10, 10, 1]
    assert text_of(processor(separator="joint")(RED, "x\n", "\n"))[-3:] == [11, 10, 1]


def test_examples_of_one_batch_may_differ_in_everything():
    batch = processor()([RED, [RED, BLUE], None, []], ["a", "b", "c", "d"], ["x", None, "", "y"])
    assert batch.n_images == (1, 2, 0, 0)
    assert batch.mask_image.sum(dim=1).tolist() == [N, 2 * N, 0, 0]
    assert [text_of(batch, i)[-1] for i in range(4)] == [1, 10, 1, 1]
    assert batch.pixels is not None
    assert torch.equal(batch.pixels[1], batch.pixels[0])
    assert batch.pixels[2].amax(dim=(1, 2)).tolist() == [-1, -1, 1]


def test_text_alone_needs_no_pictures():
    for batch in (processor()(None, "hello"), processor()([], "hello"), processor()(None, ["hello", "you"])):
        assert batch.pixels is None
        assert not batch.mask_image.any()


def test_a_list_of_one_prompt_is_a_batch_of_one():
    single, listed = processor()(RED, "a", "b"), processor()([RED], ["a"], ["b"])
    assert torch.equal(single.tokens, listed.tokens)
    assert torch.equal(single.pixels, listed.pixels)


def test_pictures_follow_the_rules_of_the_configuration(tmp_path: Path):
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = np.random.default_rng(0).integers(0, 256, (30, 50, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(path, exif=exif)
    for rules in (
        {"resize": "hf_bicubic", "alpha": "drop", "exif_orientation": True},
        {"resize": "bv_bilinear", "alpha": "white", "exif_orientation": False},
        {"resize": "float_bilinear_aa", "alpha": "white", "exif_orientation": True},
    ):
        picture = load_image(path, alpha=rules["alpha"], exif_orientation=rules["exif_orientation"])
        expected = to_pixels(picture, 28, rules["resize"])
        assert torch.equal(processor(**rules)(path, "x").pixels[0], expected)


def test_handles_take_the_place_of_pictures():
    handle = SimpleNamespace(image_embeds=torch.ones(2, N, 12))
    batch = processor()([handle, [handle, handle], None], ["a", "b", "c"])
    assert batch.n_images == (2, 4, 0)
    assert batch.pixels is None
    assert batch.image_embeds.shape == (6, N, 12)


def test_rows_can_be_packed_and_sized():
    batch = processor()([RED, None, None], ["caption en", "a", "b"], padding_side="right", pack=True, row_length=12)
    assert batch.n_rows == 2
    assert batch.length == 12
    assert batch.n_examples == 3
    assert processor()(RED, "a", row_length=20).length == 20
    assert processor()(RED, "a", multiple_of=16).length == 16


@pytest.mark.parametrize("piece", TOKENIZER.control_pieces)
def test_control_spellings_in_a_text_are_refused_by_name(piece: str):
    with pytest.raises(
        PromptError, match=rf"the prefix of the example contains the control token {piece}: expected plain"
    ):
        processor()(RED, f"caption {piece} en")
    with pytest.raises(
        PromptError, match=rf"the suffix of example 1 contains the control token {piece}.*allow_special=True"
    ):
        processor()([RED, RED], ["a", "b"], ["x", f"y{piece}"])


def test_allowed_control_spellings_mean_what_the_configuration_says():
    assert 1 not in text_of(processor()(RED, "a<eos>b", allow_special=True))
    parsed = text_of(processor(special_tokens="parse")(RED, "a<eos>b", allow_special=True))
    assert parsed == [2, *TOKENIZER.encode("a"), 1, *TOKENIZER.encode("b"), 10]
    with pytest.raises(PromptError, match="contains <image>: expected pictures in images="):
        processor(special_tokens="parse")(RED, "<image>a", allow_special=True)
    with pytest.raises(PromptError, match="contains the control token <eos>"):
        processor(special_tokens="parse")(RED, "a<eos>b")


def test_location_tokens_are_ordinary_words_of_a_prompt():
    assert text_of(processor()(RED, "caption <loc0001><seg002>"))[-3:] == [513, 1538, 10]


def test_any_language_code_and_any_text_works():
    for prefix in ("caption xx-YY", "caption zh", "🐕", "日本語", "\t", " " * 50, "\n\n\n"):
        assert TOKENIZER.decode(text_of(processor()(RED, prefix))) == prefix + "\n"


def test_over_long_texts_are_refused_or_cut():
    long = "a b " * 6000
    with pytest.raises(PromptError, match=r"the example has \d+ text tokens: expected at most 8192\. Shorten it"):
        processor()(RED, long)
    with pytest.raises(PromptError, match=r"example 1 has \d+ text tokens: expected at most 5"):
        processor()([RED, RED], ["a", "much too long for that"], max_length=5)
    cut = processor()(RED, "much too long for that", "x", max_length=5, truncate=True)
    assert cut.length == N + 5
    assert not cut.mask_loss.any()
    assert processor()(RED, long, max_length=50_000).length > 8192


def test_lists_must_match():
    with pytest.raises(PromptError, match="1 images for 2 prefixes: expected one for each"):
        processor()([RED], ["a", "b"])
    with pytest.raises(PromptError, match="3 suffix for 2 prefixes"):
        processor()([RED, RED], ["a", "b"], ["x"] * 3)
    with pytest.raises(PromptError, match="images is one value for 2 prefixes: expected a list of 2"):
        processor()(RED, ["a", "b"])
    with pytest.raises(PromptError, match="prefix is a int: expected text, or a list of texts"):
        processor()(RED, 3)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="the prefix of example 1 is a NoneType: expected text"):
        processor()([RED, RED], ["a", None])  # type: ignore[list-item]


def test_a_broken_picture_is_named(tmp_path: Path):
    (tmp_path / "broken.png").touch()
    with pytest.raises(ImageError, match=r"broken\.png is empty"):
        processor()([RED, tmp_path / "broken.png"], ["a", "b"])


def test_the_limit_on_pixels_is_the_processors():
    with pytest.raises(ImageError, match="expected at most 10"):
        Processor(CONFIG, TOKENIZER, max_pixels=10)(Image.fromarray(RED), "a")


def test_handles_of_another_model_or_mixed_with_pictures_are_refused():
    with pytest.raises(ShapeError, match=rf"have shape \[1, 9, 12\]: expected \[n, {N}, 12\]"):
        processor()(SimpleNamespace(image_embeds=torch.zeros(1, 9, 12)), "a")
    with pytest.raises(ShapeError, match="1 encoded and 1 plain pictures: expected one kind"):
        processor()([SimpleNamespace(image_embeds=torch.zeros(1, N, 12)), RED], "a")


def test_a_tokenizer_of_another_model_is_refused():
    other = dataclasses.replace(CONFIG, tokens=dataclasses.replace(CONFIG.tokens, seg_start=1000, n_tokens=1600))
    with pytest.raises(
        TokenizerError, match="it has n_tokens=1664, seg_start=1536, expected n_tokens=1600, seg_start=1000"
    ):
        Processor(other, TOKENIZER)
