"""The reference parameters, bit for bit there and back, and as the reference loads them at another resolution."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from paligemma.checkpoints import identify, open_checkpoint, read, write
from paligemma.checkpoints.rules import native_shapes

DATA = Path(__file__).parent / "data"
FOLDERS = ["paligemma_v1", "paligemma_v2"]


def by_hand(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """What the specification of the format says a native tensor is, spelled out with numpy."""
    parts = name.split(".")
    layer = int(parts[2]) if "blocks" in parts else 0
    tail = ".".join(parts[3:] if "blocks" in parts else parts[1:])
    if parts[0] == "projector":
        return arrays["params/img/head/kernel"].T if tail == "weight" else arrays["params/img/head/bias"]
    if parts[0] == "vision":
        if tail == "position_embedding":
            return arrays["params/img/pos_embedding"][0]
        if tail == "patch_embedding.weight":
            return np.einsum("hwco->ochw", arrays["params/img/embedding/kernel"])
        if tail == "patch_embedding.bias":
            return arrays["params/img/embedding/bias"]
        block = "params/img/Transformer/"
        leaf = "scale" if tail.endswith("weight") else "bias"
        if tail.startswith("final_norm"):
            return arrays[f"{block}encoder_norm/{leaf}"]
        block += "encoderblock/"
        if "_norm" in tail:
            return arrays[f"{block}LayerNorm_{int('mlp' in tail)}/{leaf}"][layer]
        leaf = leaf.replace("scale", "kernel")
        if tail.startswith("mlp"):
            array = arrays[f"{block}MlpBlock_0/Dense_{int('down' in tail)}/{leaf}"][layer]
            return array.T
        word = {"q": "query", "k": "key", "v": "value", "out": "out"}[tail.split(".")[1]]
        array = arrays[f"{block}MultiHeadDotProductAttention_0/{word}/{leaf}"][layer]
        if leaf == "bias":
            return array.reshape(-1)
        flat = array.reshape(-1, array.shape[-1]) if word == "out" else array.reshape(array.shape[0], -1)
        return flat.T
    if tail == "embedding.weight":
        return arrays["params/llm/embedder/input_embedding"]
    if tail == "final_norm.scale":
        return arrays["params/llm/final_norm/scale"]
    block = "params/llm/layers/"
    norms = {"pre_attn_norm.scale": "pre_attention_norm", "post_attn_norm.scale": "post_attention_norm",
             "pre_mlp_norm.scale": "pre_ffw_norm", "post_mlp_norm.scale": "post_ffw_norm"}  # fmt: skip
    if tail in norms:
        return arrays[f"{block}{norms[tail]}/scale"][layer]
    if tail == "attn.q.weight":
        heads = arrays[f"{block}attn/q_einsum/w"][layer]
        return np.concatenate([head.T for head in heads])
    if tail in ("attn.k.weight", "attn.v.weight"):
        heads = arrays[f"{block}attn/kv_einsum/w"][layer, int("v" in tail)]
        return np.concatenate([head.T for head in heads])
    if tail == "attn.out.weight":
        heads = arrays[f"{block}attn/attn_vec_einsum/w"][layer]
        return np.concatenate([head.T for head in heads], axis=1)
    if tail in ("mlp.gate.weight", "mlp.up.weight"):
        return arrays[f"{block}mlp/gating_einsum"][layer, int("up" in tail)].T
    return arrays[f"{block}mlp/linear"][layer].T


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_reference_parameter_arrives_where_the_format_says(folder):
    path = DATA / folder / "params.npz"
    arrays = dict(np.load(path))
    config, state = read(path, check=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == native_shapes(config)
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), by_hand(arrays, name), err_msg=name)


@pytest.mark.parametrize("folder", FOLDERS)
def test_shapes_alone_tell_the_configuration(folder):
    config = open_checkpoint(DATA / folder / "params.npz").config
    facts = json.loads((DATA / folder / "config.json").read_text())
    img, llm = facts["img"], facts["llm"]
    v, t = config.vision, config.text
    assert (v.width, v.depth, v.mlp_dim, v.n_heads, v.resolution, v.patch_size) == (
        img["width"], img["depth"], img["mlp_dim"], img["num_heads"], img["image_size"], img["patch_size"][0],
    )  # fmt: skip
    assert (t.width, t.depth, t.mlp_dim, t.n_heads, t.n_kv_heads, t.head_dim, t.vocab_size, t.post_norms) == (
        llm["width"], llm["depth"], llm["mlp_dim"], llm["num_heads"], llm["num_kv_heads"], llm["head_dim"],
        llm["vocab_size"], llm["post_norms"],
    )  # fmt: skip
    assert (t.attn_logits_softcap or 0.0, t.final_logits_softcap or 0.0) == (
        llm["attn_logits_softcap"], llm["final_logits_softcap"],
    )  # fmt: skip
    assert t.query_pre_attn_scalar == llm["head_dim"]  # "rsqrt_head_dim"
    assert t.sliding_window is None
    assert config.processing.resize == "bv_bilinear_aa"
    assert (config.tokens.loc_start, config.tokens.n_tokens) == (facts["base_vocab"], llm["vocab_size"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_void_arrays_are_bfloat16_rounded_to_nearest_even(folder):
    _, exact = read(DATA / folder / "params.npz")
    _, rounded = read(DATA / folder / "params_bf16.npz")
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].bfloat16()), name


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("file", ["params.npz", "params_bf16.npz"])
def test_reference_archives_are_written_back_bit_for_bit(tmp_path, folder, file):
    config, state = read(DATA / folder / file)
    write(tmp_path / "back.npz", config, state, "npz")
    assert identify(tmp_path / "back.npz") == "npz"
    before, after = np.load(DATA / folder / file), np.load(tmp_path / "back.npz")
    assert sorted(before.files) == sorted(after.files)
    for name in before.files:
        assert before[name].dtype == after[name].dtype
        assert before[name].shape == after[name].shape
        assert before[name].tobytes() == after[name].tobytes(), name


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("layout", ["A", "B", "C", "D"])
def test_archive_to_folder_and_back_loses_nothing(tmp_path, folder, layout):
    path = DATA / folder / "params_bf16.npz"
    config, state = read(path)
    write(tmp_path / "hf", config, state, "hf", layout=layout, max_shard_bytes=200_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    config_there, there = read(tmp_path / "hf")
    assert config_there == config
    write(tmp_path / "back.npz", config_there, there, "npz")
    before, after = np.load(path), np.load(tmp_path / "back.npz")
    assert {n: before[n].tobytes() for n in before.files} == {n: after[n].tobytes() for n in after.files}


def test_another_resolution_and_vocabulary_as_the_reference_loads_them():
    golden = np.load(DATA / "posemb_vocab" / "load_at_new_resolution.npz")
    path = DATA / "paligemma_v1" / "params.npz"
    config, state = read(path, resolution=84, vocab_size=1728, seed=123)
    assert (config.vision.resolution, config.text.vocab_size) == (84, 1728)
    assert (config.tokens.n_tokens, config.tokens.loc_start) == (1728, 512)  # new tokens stand behind loc and seg
    np.testing.assert_allclose(state["vision.position_embedding"].numpy(), golden["pos_embedding"][0], atol=1e-6)
    table = state["text.embedding.weight"].numpy()
    np.testing.assert_array_equal(table[:1664], np.load(path)["params/llm/embedder/input_embedding"])
    np.testing.assert_array_equal(table[1664:], golden["new_embedding_rows"])
