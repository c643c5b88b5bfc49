"""Laws of the formats: what is written is read back bit for bit, whatever the sizes, dtypes, layouts and shards."""

import dataclasses
import json
import math
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.checkpoints import convert, open_checkpoint, read, write
from paligemma.checkpoints.hugging_face import in_layout, layout_of, normalise, rules_for
from paligemma.checkpoints.npz_io import NpzFile
from paligemma.checkpoints.rules import NATIVE, native_shapes, rearrange, sizes_of
from paligemma.config import PaliGemmaConfig, ProcessingConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.errors import PaliGemmaError
from paligemma.models.paligemma import PaliGemmaModel
from tests.checkpoint_cases import equal_states, random_state, tiny_config

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["A", "B", "C", "D"])


@st.composite
def configs(draw: st.DrawFn) -> PaliGemmaConfig:
    """Small models of either family, with every choice that a configuration can make."""
    small = st.integers(1, 3)
    post_norms = draw(st.booleans())
    n_kv_heads, group, head_dim = draw(small), draw(small), draw(st.sampled_from([2, 4, 6]))
    width = draw(st.integers(3, 9))
    cap = st.sampled_from([None, 30.0, 50.0]) if post_norms else st.none()
    n_tokens = draw(st.integers(1160, 1190))
    text = TextConfig(
        width=width, depth=draw(small), mlp_dim=width + draw(st.integers(1, 5)), n_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads, head_dim=head_dim, vocab_size=n_tokens + draw(st.sampled_from([0, 1, 64])),
        post_norms=post_norms, query_pre_attn_scalar=draw(st.sampled_from([7.0, 12.0])) if post_norms else head_dim,
        attn_logits_softcap=draw(cap), final_logits_softcap=draw(cap),
        sliding_window=draw(st.sampled_from([None, 5, 4096])) if post_norms else None,
        rope_theta=draw(st.sampled_from([10_000.0, 500.0])), norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        final_cap=draw(st.sampled_from(["everywhere", "later_steps"])),
        embed_scale=draw(st.sampled_from(["table_dtype", "float32", "bfloat16"])),
    )  # fmt: skip
    n_heads = draw(small)
    return PaliGemmaConfig(
        vision=VisionConfig(
            width=n_heads * draw(small), depth=draw(small), mlp_dim=draw(st.integers(2, 7)), n_heads=n_heads,
            patch_size=2, resolution=2 * draw(st.integers(1, 4)),
        ),
        text=text,
        tokens=TokenConfig(n_tokens=n_tokens, loc_start=n_tokens - 1152, seg_start=n_tokens - 128, image=n_tokens),
        processing=ProcessingConfig(
            resize=draw(st.sampled_from(["hf_bicubic", "bv_bilinear", "bv_bilinear_aa", "float_bilinear_aa"])),
            alpha=draw(st.sampled_from(["drop", "white"])),
            separator=draw(st.sampled_from(["apart", "joint"])),
        ),
        beams=draw(st.sampled_from(["bv", "hf"])),
        name=draw(st.sampled_from(["", "google/paligemma2-3b-pt-224@0123"])),
    )  # fmt: skip


def random_bits(config: PaliGemmaConfig, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Any finite bit pattern, negative zeros and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(whole)
    state = {}
    for name, shape in native_shapes(config).items():
        bits = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=torch.int64).to(whole)
        values = bits.view(dtype)
        state[name] = torch.where(values.isfinite(), values, torch.zeros((), dtype=dtype))
    return state


@settings(max_examples=25)
@given(configs(), DTYPES, LAYOUTS, st.integers(1_000, 200_000), st.integers(0, 99))
def test_a_folder_holds_exactly_what_was_written(config, dtype, layout, shard_bytes, seed):
    state = random_bits(config, dtype, seed)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "x", config, state, layout=layout, max_shard_bytes=shard_bytes)
        config_back, back = read(Path(folder) / "x", check=True)
        with open_checkpoint(Path(folder) / "x") as checkpoint:
            assert checkpoint.layout == layout
    assert config_back == config
    assert equal_states(state, back)


@settings(max_examples=25)
@given(configs(), DTYPES, st.integers(0, 99))
def test_an_archive_holds_exactly_what_was_written_but_filler_rows(config, dtype, seed):
    state = random_bits(config, dtype, seed)
    rows = config.tokens.n_tokens
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "x.npz", config, state, "npz")
        config_back, back = read(Path(folder) / "x.npz", check=True)
    state["text.embedding.weight"] = state["text.embedding.weight"][:rows]
    assert config_back == dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=rows))
    assert equal_states(state, back)


@settings(max_examples=15)
@given(configs(), DTYPES, LAYOUTS, st.integers(0, 99))
def test_converting_there_and_back_is_bitwise(config, dtype, layout, seed):
    """folder -> archive -> folder -> archive: the archives are the same file, the folders agree on all real rows."""
    state = random_bits(config, dtype, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "a", config, state, layout=layout)
        convert(folder / "a", folder / "b.npz")
        convert(folder / "b.npz", folder / "c", layout=layout)
        convert(folder / "c", folder / "d.npz")
        with NpzFile(folder / "b.npz") as first, NpzFile(folder / "d.npz") as second:
            assert list(first.specs) == list(second.specs)
            for array in first.specs:
                if not array.startswith("extra/"):
                    assert first.read(array).view(torch.uint8).tolist() == second.read(array).view(torch.uint8).tolist()
        _, back = read(folder / "c")
    rows = config.tokens.n_tokens
    for tensors in (state, back):
        tensors["text.embedding.weight"] = tensors["text.embedding.weight"][:rows]
    assert equal_states(state, back)


@settings(max_examples=30)
@given(configs())
def test_native_names_and_shapes_are_those_of_the_model(config):
    model = PaliGemmaModel(config, device="meta")
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == native_shapes(config)


@given(st.booleans(), LAYOUTS)
def test_every_name_goes_into_each_layout_and_back(post_norms, layout):
    names = [rule.foreign.format(i=3) for rule in rules_for(post_norms)]
    written = [in_layout(name, layout) for name in names]
    assert len(set(written)) == len(names)
    assert [normalise(name) for name in written] == names
    assert layout_of(written) == layout


@given(configs(), st.sampled_from(sorted(NATIVE)), st.randoms())
def test_rearranging_back_is_the_identity(config, native, random):
    sizes = sizes_of(config)
    letters = NATIVE[native].replace("(", "").replace(")", "").split()
    shuffled = letters.copy()
    random.shuffle(shuffled)
    dims = " ".join(shuffled)
    shape = [sizes[letter] for letter in shuffled]
    tensor = torch.randn(shape)
    there = rearrange(tensor, dims, NATIVE[native], sizes)
    assert torch.equal(rearrange(there, NATIVE[native], dims, sizes), tensor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    config = tiny_config(2)
    return write(tmp_path_factory.mktemp("folder") / "x", config, random_state(config))


JUNK = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})


def outcome(folder: Path) -> str:
    """The message of a refusal, or the empty string once the model has been read whole."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config, state = read(folder)
    except PaliGemmaError as error:
        return str(error)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == native_shapes(config)
    assert all(
        x > 0 and math.isfinite(x) for x in (config.text.rope_theta, config.text.norm_eps, config.vision.norm_eps)
    )
    return ""


@settings(max_examples=150)
@given(st.data())
def test_whatever_stands_in_config_json_the_answer_is_a_model_or_one_clear_line(folder, data):
    name = data.draw(st.sampled_from(["config.json", "preprocessor_config.json", "generation_config.json"]))
    path = folder / name
    before = path.read_text()
    values = json.loads(before)
    part = values.get(data.draw(st.sampled_from(["text_config", "vision_config", ""])), values)
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JUNK)
    path.write_text(json.dumps(values))
    try:
        message = outcome(folder)
    finally:
        path.write_text(before)
    assert "\n" not in message
    assert not message or len(message) > 40


@settings(max_examples=150)
@given(st.data())
def test_whatever_bytes_of_a_header_are_flipped_the_answer_is_a_model_or_one_clear_line(folder, data):
    path = folder / "model.safetensors"
    before = path.read_bytes()
    n_header = int.from_bytes(before[:8], "little")
    damaged = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, n_header + 7))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        message = outcome(folder)
    finally:
        path.write_bytes(before)
    assert not message or len(message) > 40
