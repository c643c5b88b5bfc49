"""Processor beside `transformers` (5.23): ids, masks, labels and pixels, value for value.

Both read one small vocabulary, ours as SentencePiece model, theirs as the `tokenizer.json` that ours is saved as, so
the conversion is tested along. With `separator="joint"` and `special_tokens="parse"` ours is theirs; with the defaults
it differs only where documented.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma.config import PaliGemmaConfig, ProcessingConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.processing.batch import Batch
from paligemma.processing.image import load_image, to_pixels
from paligemma.processing.processor import Processor
from paligemma.processing.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

MODEL = Path(__file__).parents[1] / "golden" / "data" / "text_preprocessing" / "tokenizer_extended.model"
SIDE, PATCH = 28, 14
N_IMAGE_TOKENS = (SIDE // PATCH) ** 2


def config(**processing: Any) -> PaliGemmaConfig:
    return PaliGemmaConfig(
        vision=VisionConfig(width=8, depth=1, mlp_dim=12, n_heads=2, resolution=SIDE, patch_size=PATCH),
        text=TextConfig(
            width=12, depth=1, mlp_dim=20, n_heads=2, n_kv_heads=1, head_dim=6, vocab_size=1664, post_norms=False,
            query_pre_attn_scalar=6,
        ),
        tokens=TokenConfig(n_tokens=1664, loc_start=512, seg_start=1536, image=1664),
        processing=ProcessingConfig(**processing),
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(MODEL)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("hf")
    tokenizer.save(folder, hugging_face=True)
    (folder / "tokenizer.model").unlink()  # so that tokenizer.json is what is read
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = N_IMAGE_TOKENS
    return transformers.PaliGemmaProcessor(images, transformers.AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def hf_like(tokenizer: Tokenizer) -> Processor:
    return Processor(config(separator="joint", special_tokens="parse", alpha="white"), tokenizer)


def picture(seed: int, height: int = 33, width: int = 41) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask_theirs(
    theirs: Any, images: list[list[Image.Image]], prefixes: list[str], suffixes: list[str] | None, side: str
) -> Any:
    # Without pictures spelled in the text; "<image>" in front without a space is how the original lays a prompt out.
    texts = ["<image>" * len(some) + prefix for some, prefix in zip(images, prefixes, strict=True)]
    return theirs(
        images=images, text=texts, suffix=suffixes, padding=True, padding_side=side, return_tensors="pt"
    )  # fmt: skip


def assert_same(ours: Batch, theirs: Any) -> None:
    tokens = ours.tokens.masked_fill(ours.mask_image, 1664)
    assert torch.equal(tokens, theirs["input_ids"])
    assert torch.equal(ours.mask_input.long(), theirs["attention_mask"])
    assert torch.equal((ours.mask_ar.bool() & ours.mask_input).long(), theirs["token_type_ids"])
    assert torch.equal(tokens.masked_fill(~ours.mask_loss, -100), theirs["labels"])
    assert torch.equal(ours.pixels, theirs["pixel_values"])


PREFIXES = [
    "caption en",
    "",
    "answer en how many apples?",
    "detect cat ; dog",
    "日本語で説明 🐕 café",
    "  two spaces, tab\tand\n\ntwo newlines inside",
    "ends with a newline\n",
    "\n",
    "segment <loc0001><loc1023><seg007> x",
    "a control <bos> token and <unk> and <pad>",
]
SUFFIXES = [
    "A brown dog.",
    "",
    "4",
    "<loc0010><loc0020><loc0300><loc0400> cat",
    "犬 🐕",
    " x ",
    "y\n",
    "\n",
    "<seg127>",
    "z",
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("suffixes", [None, SUFFIXES], ids=["asking", "teaching"])
def test_a_batch_of_unlike_prompts_is_the_same(theirs: Any, hf_like: Processor, side: Any, suffixes: list[str] | None):
    images = [[picture(i)] for i in range(len(PREFIXES))]
    ours = hf_like(images, PREFIXES, suffixes, padding_side=side, allow_special=True)
    assert_same(ours, ask_theirs(theirs, images, PREFIXES, suffixes, side))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_single_prompt_is_the_same(theirs: Any, hf_like: Processor, prefix: str):
    assert_same(
        hf_like(picture(0), prefix, allow_special=True), ask_theirs(theirs, [[picture(0)]], [prefix], None, "left")
    )


def test_several_pictures_of_an_example_are_the_same(theirs: Any, hf_like: Processor):
    images = [[picture(1), picture(2, 20, 60)], [picture(3)], [picture(4), picture(5), picture(6)]]
    prefixes = ["answer en are they alike?", "caption en", ""]
    assert_same(
        hf_like(images, prefixes, ["no", "x", "y"]), ask_theirs(theirs, images, prefixes, ["no", "x", "y"], "left")
    )


def test_with_our_defaults_only_a_prompt_that_ends_in_a_newline_differs(theirs: Any, tokenizer: Tokenizer):
    """Theirs joins the last newline with the separator to one piece, ours (and big_vision) keeps two."""
    ours, one, two = Processor(config(), tokenizer), tokenizer.encode("\n"), tokenizer.encode("\n\n")
    plain = [prefix for prefix in PREFIXES if not tokenizer.find_control(prefix)]
    for prefix in plain:
        a = ours(picture(0), prefix).tokens[0, N_IMAGE_TOKENS:].tolist()
        b = ask_theirs(theirs, [[picture(0)]], [prefix], None, "left")["input_ids"][0, N_IMAGE_TOKENS:].tolist()
        if prefix.endswith("\n"):
            assert a[-2:] == one * 2
            assert b == a[:-2] + two
        else:
            assert a == b


def test_with_our_defaults_a_control_spelling_stays_plain_characters(theirs: Any, tokenizer: Tokenizer):
    ours, eos = Processor(config(), tokenizer), tokenizer.tokens.eos
    prefix = "stop here <eos> and go on"
    assert eos not in ours(picture(0), prefix, allow_special=True).tokens
    assert eos in ask_theirs(theirs, [[picture(0)]], [prefix], None, "left")["input_ids"]


# ------------------------------------------------------------------------------------------------------------ pixels


def photographs() -> dict[str, Path]:
    """Real pictures that the test dependencies bring along: photographs as JPEG, drawings with transparency as PNG."""
    sklearn_images = Path(pytest.importorskip("sklearn.datasets").__file__).parent / "images"
    matplotlib_data = Path(pytest.importorskip("matplotlib").get_data_path())
    files = [*sorted(sklearn_images.glob("*.jpg")), *sorted((matplotlib_data / "sample_data").glob("*.jpg"))]
    files += [
        *sorted((matplotlib_data / "sample_data").glob("*.png"))[:2],
        matplotlib_data / "images" / "matplotlib.png",
    ]
    return {path.name: path for path in files}


@pytest.mark.parametrize("resolution", [112, 224, 448])
def test_real_photographs_give_their_pixels_to_the_last_bit(resolution: int):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    files = photographs()
    assert len(files) >= 4
    reference = SiglipImageProcessorPil(size={"height": resolution, "width": resolution})
    for name, path in files.items():
        with Image.open(path) as image:
            expected = reference(image, return_tensors="pt")["pixel_values"][0]
        ours = to_pixels(load_image(path, alpha="white"), resolution, "hf_bicubic")
        assert torch.equal(ours, expected), name


def test_dropped_alpha_differs_from_theirs_only_beneath_transparency():
    transparent = {}
    for name, path in photographs().items():
        with Image.open(path) as image:
            if image.has_transparency_data:
                transparent[name] = (
                    np.asarray(image.convert("RGBA"))[..., 3],
                    load_image(path),
                    load_image(path, alpha="white"),
                )
    assert transparent
    for alpha, dropped, white in transparent.values():
        opaque = alpha == 255
        np.testing.assert_array_equal(dropped[opaque], white[opaque])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_taken_sideways_is_turned_as_they_turn_files(orientation: int, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    picture(0).save(path, exif=exif)
    theirs = transformers.image_utils.load_image(str(path))
    np.testing.assert_array_equal(load_image(path), np.asarray(theirs.convert("RGB")))
    np.testing.assert_array_equal(load_image(path.read_bytes()), np.asarray(theirs.convert("RGB")))
