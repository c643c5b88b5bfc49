"""load(): every way to name a model, every choice, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paligemma
from paligemma.api.loading import CHOICES, with_choices
from paligemma.checkpoints import read, write
from paligemma.errors import CheckpointError, ConfigError, HubError, OptionError, PickleRefused, TokenizerError
from tests.tiny_folder import CONFIG, TOKENIZER, random_model, write_folder

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_loaded_model_holds_the_weights_of_the_file_bit_for_bit(folder: Path):
    model = paligemma.load(folder).model
    written = random_model().state_dict()
    loaded = model.state_dict()
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    assert not model.training
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16])
def test_weights_are_cast_to_the_dtype_asked_for_and_still_answer(folder: Path, dtype: Any):
    pg = paligemma.load(folder, dtype=dtype)
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert {parameter.dtype for parameter in pg.model.parameters()} == {wanted}
    assert pg.caption(PICTURE, max_new_tokens=4).raw


def test_auto_means_float32_on_a_cpu(folder: Path):
    pg = paligemma.load(folder, device="cpu")
    assert (pg.device.type, pg.dtype) == ("cpu", torch.float32)
    assert "42 px" in repr(pg)


def test_an_npz_answers_like_the_folder_it_was_made_from(folder: Path, tmp_path: Path):
    config, state = read(folder)
    archive = write(tmp_path / "model.npz", config, state, "npz")
    expected = paligemma.load(folder).generate(PICTURE, "caption en", max_new_tokens=16)[0]
    given = paligemma.load(archive, tokenizer=folder / "tokenizer.model", mask_vae=folder / "mask_vae.npz")
    assert given.generate(PICTURE, "caption en", max_new_tokens=16)[0].tokens == expected.tokens
    assert given.mask_vae is not None
    shutil.copy(folder / "tokenizer.model", tmp_path)
    assert paligemma.load(archive).mask_vae is None


def test_an_npz_of_big_vision_is_asked_as_big_vision_would():
    golden = Path(__file__).parents[1] / "golden" / "data"
    pg = paligemma.load(golden / "paligemma_v2" / "params.npz", tokenizer=TOKENIZER)
    assert (pg.config.processing.resize, pg.config.text.sliding_window) == ("bv_bilinear_aa", None)
    assert pg.caption(PICTURE, max_new_tokens=4).raw


def test_a_model_without_a_tokenizer_says_where_to_get_one(folder: Path, copy: Path, tmp_path: Path):
    (copy / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer beside the weights.*tokenizer=FILE"):
        paligemma.load(copy)
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        paligemma.load(copy, tokenizer=tmp_path / "missing.model")
    assert paligemma.load(copy, tokenizer=folder).processor.tokenizer.n_tokens == CONFIG.tokens.n_tokens


def test_a_model_without_a_mask_decoder_does_all_but_segment(copy: Path):
    (copy / "mask_vae.npz").rename(copy.parent / "mine.npz")
    pg = paligemma.load(copy)
    assert pg.detect(PICTURE, "cat", max_new_tokens=8) is not None
    with pytest.raises(OptionError, match=r"vae-oid\.npz"):
        pg.segment(PICTURE, "cat")
    assert paligemma.load(copy, mask_vae=copy.parent / "mine.npz").segment(PICTURE, "cat", max_new_tokens=8).raw


def test_every_choice_can_be_made_by_name(folder: Path):
    made = {
        "resize": "bv_bilinear", "alpha": "white", "exif_orientation": False, "separator": "joint",
        "special_tokens": "parse", "mask_edges": "cut", "attn_logits_softcap": None,
        "final_logits_softcap": 20.0, "sliding_window": 5, "final_cap": "later_steps", "embed_scale": "float32",
        "beams": "hf",
    }  # fmt: skip
    assert set(made) == set(CHOICES)
    config = paligemma.load(folder, **made).config
    assert {name: getattr(config.processing, name, getattr(config.text, name, None)) for name in made} | {
        "beams": config.beams
    } == made
    assert with_choices(CONFIG) == CONFIG


def test_a_choice_that_does_not_exist_is_refused_with_the_nearest_name(folder: Path):
    with pytest.raises(OptionError, match=r"resise is not a choice.*Did you mean 'resize'"):
        paligemma.load(folder, resise="bv_bilinear")
    with pytest.raises(OptionError, match="width is fixed by the weights"):
        paligemma.load(folder, width=64)
    with pytest.raises(ConfigError, match="expected one of hf_bicubic"):
        paligemma.load(folder, resize="bicubic")


def test_a_device_dtype_or_quantisation_that_does_not_exist_is_refused(folder: Path):
    with pytest.raises(OptionError, match=r"expected auto, float32, bfloat16, float16.*Did you mean 'bfloat16'"):
        paligemma.load(folder, dtype="bfloat")
    with pytest.raises(OptionError, match="'gpu' is not a device"):
        paligemma.load(folder, device="gpu")
    with pytest.raises(OptionError, match="quantize='int8'"):
        paligemma.load(folder, quantize="int8")
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match=r"no CUDA\. Take device='cpu'"):
            paligemma.load(folder, device="cuda:1")


def test_a_name_that_means_nothing_is_refused(tmp_path: Path):
    with pytest.raises(HubError, match="Did you mean 'tiny'"):
        paligemma.load("tinny")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        paligemma.load(tmp_path / "nowhere" / "model")


def test_the_embedded_model_has_no_revisions():
    with pytest.raises(OptionError, match="only hub ids"):
        paligemma.load("tiny", revision="main")


def test_an_adapter_is_merged_while_loading(folder: Path, tmp_path: Path):
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(40, 4, generator=generator)
    name = "base_model.model.language_model.model.layers.1.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": r".*language_model.*layers\.1\.self_attn\.q_proj",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    merged = paligemma.load(folder, adapter=tmp_path).model.state_dict()
    for key, value in random_model().state_dict().items():
        expected = value + 2 * b @ a if key == "text.blocks.1.attn.q.weight" else value
        torch.testing.assert_close(merged[key], expected, atol=1e-6, rtol=1e-6)


def test_nan_in_the_weights_is_found_when_asked_for(copy: Path):
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    paligemma.load(copy)
    with pytest.raises(CheckpointError, match=r"1 NaN among .* first at \[3, 5\]"):
        paligemma.load(copy, check=True)


def test_a_tensor_without_a_place_is_refused_unless_told_otherwise(copy: Path):
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "something.else": torch.zeros(2)}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"something\.else.*--no-strict"):
        paligemma.load(copy)
    with pytest.warns(UserWarning, match="something"):
        paligemma.load(copy, strict=False)


def test_a_tokenizer_of_another_vocabulary_is_refused(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 1664
    plain = Path(__file__).parents[1] / "golden" / "data" / "text_preprocessing" / "tokenizer.model"
    shutil.copy(plain, copy / "tokenizer.model")
    paligemma.load(copy)  # 512 pieces are extended by the loc and seg tokens, as big_vision does
    tensors = load_file(copy / "model.safetensors")
    table = next(name for name in tensors if "embed_tokens" in name)
    tensors[table] = torch.cat([tensors[table], torch.zeros(64, 32)])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    config["text_config"]["vocab_size"] = 1728
    for key in ("image_token_index", "image_token_id", "vocab_size", "_vocab_size"):
        if key in config:
            config[key] = 1728
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises((TokenizerError, ConfigError), match=r"1728|1664"):
        paligemma.load(copy)


def test_a_pickle_is_never_opened(tmp_path: Path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.bin")
    with pytest.raises(PickleRefused, match="It was not opened"):
        paligemma.load(tmp_path / "model.bin", tokenizer=tmp_path)


def test_a_picture_may_be_larger_than_the_limit_only_when_allowed(folder: Path):
    small = paligemma.load(folder, max_pixels=1000)
    with pytest.raises(paligemma.errors.ImageError, match="max_pixels"):
        small.caption(_png(50, 40))
    assert paligemma.load(folder, max_pixels=None).caption(_png(50, 40), max_new_tokens=2).raw is not None


def _png(width: int, height: int) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "png")
    return buffer.getvalue()
