"""big_vision archives in every variant that circulates read as the same model."""

import dataclasses
import io
import itertools
import zipfile

import numpy as np
import pytest
import torch

from paligemma.checkpoints import identify, open_checkpoint, read
from paligemma.errors import CheckpointError, ConfigError, PickleRefused
from paligemma.presets import MODEL_PRESETS
from tests.checkpoint_cases import as_npz_could_know, equal_states, npz_arrays, tiny_config

TABLE = "params/llm/embedder/input_embedding"


@pytest.fixture(params=[1, 2], ids=["PaliGemma 1", "PaliGemma 2"])
def generation(request):
    return request.param


@pytest.fixture
def arrays(generation):
    return npz_arrays(tiny_config(generation, rows=1200))


def saved(path, arrays, **options):
    (np.savez_compressed if options.get("compress") else np.savez)(path, **arrays)
    return path


@pytest.fixture
def plain(tmp_path, arrays):
    return read(saved(tmp_path / "plain.npz", arrays))


def test_every_size_is_inferred_from_shapes(generation, plain):
    assert dataclasses.replace(plain[0], name="") == as_npz_could_know(tiny_config(generation, rows=1200))


def test_deflated_arrays_read_the_same(tmp_path, arrays, plain):
    assert equal_states(read(saved(tmp_path / "z.npz", arrays, compress=True))[1], plain[1])


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_trees_under_another_prefix_read_the_same(tmp_path, arrays, plain, prefix):
    moved = {prefix + name.removeprefix("params/"): array for name, array in arrays.items()}
    if prefix:
        moved |= {"opt/state/step": np.zeros(1, np.float32), "extra/lr": np.ones(1, np.float32)}
    config, state = read(saved(tmp_path / "x.npz", moved))
    assert config == plain[0]
    assert equal_states(state, plain[1])


def test_an_unscanned_image_tower_reads_the_same(tmp_path, arrays, plain):
    moved = {}
    for name, array in arrays.items():
        if "/encoderblock/" not in name:
            moved[name] = array
            continue
        for j, layer in enumerate(array):
            moved[name.replace("/encoderblock/", f"/encoderblock_{j}/")] = layer
    config, state = read(saved(tmp_path / "x.npz", moved))
    assert config == plain[0]
    assert equal_states(state, plain[1])


def test_transposed_gating_is_recognised_by_its_shape(tmp_path, arrays, plain):
    name = "params/llm/layers/mlp/gating_einsum"
    swapped = arrays | {name: np.ascontiguousarray(arrays[name].swapaxes(2, 3))}
    config, state = read(saved(tmp_path / "x.npz", swapped))
    assert config == plain[0]
    assert equal_states(state, plain[1])


def test_fused_query_key_value_reads_as_three(tmp_path):
    text = dataclasses.replace(tiny_config(1, rows=1200).text, n_kv_heads=4)
    config = as_npz_could_know(dataclasses.replace(tiny_config(1, rows=1200), text=text))
    apart = npz_arrays(config)
    attn = "params/llm/layers/attn"
    fused = {n: a for n, a in apart.items() if "/q_einsum/" not in n and "/kv_einsum/" not in n}
    q, kv = apart[f"{attn}/q_einsum/w"], apart[f"{attn}/kv_einsum/w"]
    fused[f"{attn}/qkv_einsum/w"] = np.concatenate([q[:, None], kv], axis=1)
    one, other = read(saved(tmp_path / "a.npz", apart)), read(saved(tmp_path / "b.npz", fused))
    assert one[0] == other[0]
    assert equal_states(one[1], other[1])


def test_column_major_and_big_endian_arrays_read_the_same(tmp_path, arrays, plain):
    odd = {n: np.asfortranarray(a) if i % 2 else a.astype(">f4") for i, (n, a) in enumerate(arrays.items())}
    assert equal_states(read(saved(tmp_path / "x.npz", odd))[1], plain[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_dtypes_are_kept_or_cast(tmp_path, arrays, dtype):
    path = saved(tmp_path / "x.npz", {name: array.astype(dtype) for name, array in arrays.items()})
    wide = {np.float16: torch.float16, np.float64: torch.float64}[dtype]
    assert {tensor.dtype for tensor in read(path)[1].values()} == {wide}
    state = read(path, dtype="bfloat16")[1]
    name = "params/llm/final_norm/scale"
    assert torch.equal(state["text.final_norm.scale"], torch.from_numpy(arrays[name].astype(dtype)).bfloat16())


def test_pieces_of_a_split_file_are_read_in_numeric_order(tmp_path, arrays, plain):
    data = saved(tmp_path / "whole.npz", arrays).read_bytes()
    cut = [0, *sorted(np.random.default_rng(0).integers(0, len(data), 11)), len(data)]
    for number, (start, stop) in enumerate(itertools.pairwise(cut)):
        (tmp_path / f"big.b16.npz.part{number}").write_bytes(data[start:stop])
    for path in (tmp_path / "big.b16.npz", tmp_path / "big.b16.npz.part0"):
        assert identify(path) == "npz"
        assert equal_states(read(path)[1], plain[1])
    (tmp_path / "big.b16.npz.part7").unlink()
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read(tmp_path / "big.b16.npz")


def test_a_subkey_reads_part_of_the_tree(tmp_path, arrays, plain):
    path = saved(tmp_path / "x.npz", arrays)
    config, image = read(f"{path}:img")
    assert config == plain[0]
    assert {name.split(".")[0] for name in image} == {"vision", "projector"}
    text = read(f"{path}:params/llm")[1]
    assert equal_states(image | text, plain[1])
    assert equal_states(read(f"{path}:params")[1], plain[1])
    nested = saved(tmp_path / "ema.npz", {f"ema/{name}": array for name, array in arrays.items()})
    assert equal_states(read(f"{nested}:ema")[1], plain[1])
    with pytest.raises(CheckpointError, match=r"x\.npz:elsewhere: no PaliGemma parameters"):
        read(f"{path}:elsewhere")


def test_parts_of_the_raw_tower_are_dropped_with_their_reason(tmp_path, arrays):
    extra = {"params/img/MAPHead_0/probe": np.zeros((1, 1, 4), np.float32), "params/t": np.zeros(1, np.float32)}
    with open_checkpoint(saved(tmp_path / "x.npz", arrays | extra)) as checkpoint:
        assert checkpoint.dropped["params/img/MAPHead_0/probe"].startswith("pooling head")
        assert "temperature" in checkpoint.dropped["params/t"]


@pytest.mark.parametrize("rows", [256_000, 256_128])
def test_a_raw_gemma_table_gets_its_location_and_segment_tokens(tmp_path, rows):
    config = tiny_config(2, rows=rows)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, width=2, mlp_dim=3, depth=1))
    arrays = npz_arrays(config)
    with pytest.warns(UserWarning, match="extended to 257152 rows"):
        read_config, state = read(saved(tmp_path / "x.npz", arrays))
    table = state["text.embedding.weight"]
    assert (len(table), read_config.text.vocab_size, read_config.tokens.loc_start) == (257_152, 257_152, 256_000)
    assert np.array_equal(table[:256_000].numpy(), arrays[TABLE][:256_000])
    new = table[256_000:]
    assert abs(new.mean()) < 0.002
    assert new.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_vocabulary_is_never_shrunk(tmp_path, arrays):
    path = saved(tmp_path / "x.npz", arrays)
    with pytest.raises(ConfigError, match="would lose real tokens: expected at least 1200"):
        read(path, vocab_size=1199)


def test_positions_are_resampled_only_when_asked(tmp_path, arrays, plain):
    path = saved(tmp_path / "x.npz", arrays)
    assert plain[1]["vision.position_embedding"].shape[0] == 9
    config, state = read(path, resolution=70)
    assert (config.vision.resolution, len(state["vision.position_embedding"])) == (70, 25)
    corners = state["vision.position_embedding"].reshape(5, 5, -1)[::4, ::4]
    assert torch.allclose(corners, plain[1]["vision.position_embedding"].reshape(3, 3, -1)[::2, ::2])


@pytest.mark.parametrize("name", ["paligemma-3b-224", "paligemma2-3b-448", "paligemma2-10b-224", "paligemma2-28b-896"])
def test_published_sizes_are_recognised_from_headers_alone(name):
    """No data are written: `infer_config` sees the shapes that the published files have."""
    from paligemma.checkpoints import big_vision
    from paligemma.checkpoints.files import Spec
    from paligemma.checkpoints.rules import shape_of, sizes_of

    preset = MODEL_PRESETS[name]
    specs = {
        foreign: Spec(shape_of(rules[0].dims, sizes_of(preset)), torch.bfloat16)
        for foreign, rules in big_vision.foreign_layout(preset).items()
    }
    assert specs["llm/layers/attn/kv_einsum/w"].shape[1] == 2
    config = big_vision.infer_config(big_vision.Tree({n: n for n in specs}, specs), "x.npz")
    assert config == dataclasses.replace(
        preset, processing=dataclasses.replace(preset.processing, resize="bv_bilinear_aa")
    )
    assert config.text.query_pre_attn_scalar == (144 if "28b" in name else 256)


def test_a_missing_array_is_named(tmp_path, arrays):
    del arrays["params/llm/layers/mlp/linear"]
    with pytest.raises(CheckpointError, match="llm/layers/mlp/linear is missing"):
        read(saved(tmp_path / "x.npz", arrays))


def test_a_misshapen_array_is_named_with_both_shapes(tmp_path, arrays):
    arrays["params/img/head/bias"] = np.zeros(19, np.float32)
    with pytest.raises(CheckpointError, match=r"params/img/head/bias has shape \[19\]: expected \[20\]"):
        read(saved(tmp_path / "x.npz", arrays))


def test_an_unknown_array_is_refused_unless_not_strict(tmp_path, arrays, plain):
    path = saved(tmp_path / "x.npz", arrays | {"params/img/adapter/kernel": np.zeros((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=r"1 tensors have no place.*first params/img/adapter/kernel"):
        read(path)
    with pytest.warns(UserWarning, match="dropped 1 unknown"):
        assert equal_states(read(path, strict=False)[1], plain[1])


def test_integer_weights_are_refused(tmp_path, arrays):
    arrays["params/llm/layers/mlp/linear"] = arrays["params/llm/layers/mlp/linear"].astype(np.int8)
    with pytest.raises(CheckpointError, match=r"holds torch\.int8: expected floating point"):
        read(saved(tmp_path / "x.npz", arrays))


@pytest.mark.parametrize("compress", [False, True])
def test_truncation_anywhere_is_one_clear_line(tmp_path, arrays, compress):
    path = saved(tmp_path / "x.npz", arrays, compress=compress)
    data = path.read_bytes()
    for part in (0.01, 0.3, 0.9, 0.9999):
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(CheckpointError, match="truncated or damaged; download it again") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compress", [False, True])
def test_a_flipped_bit_inside_an_array_is_found_by_its_checksum(tmp_path, arrays, compress):
    path = saved(tmp_path / "x.npz", arrays, compress=compress)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("params/llm/layers/mlp/linear.npy")
    data = bytearray(path.read_bytes())
    data[member.header_offset + 200 + member.compress_size // 2] ^= 16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="params/llm/layers/mlp/linear is damaged"):
        read(path)


def test_an_array_of_objects_is_never_unpickled(tmp_path, arrays):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    path = saved(tmp_path / "x.npz", arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("params/llm/evil.npy", buffer.getvalue())
    with pytest.raises(PickleRefused, match="holds Python objects"):
        read(path)


def test_another_npz_is_told_from_a_checkpoint(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(CheckpointError, match="no PaliGemma parameters: expected arrays named params/img"):
        read(tmp_path / "x.npz")
