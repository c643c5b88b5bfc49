"""Folders and adapters against transformers 5.23 and peft: each side reads what the other writes."""

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors import safe_open

from paligemma.checkpoints import convert, merge, open_checkpoint, read, read_adapter, write
from paligemma.errors import CheckpointError
from tests.checkpoint_cases import as_npz_could_know, equal_states, npz_arrays, random_state, tiny_config

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def hf_model(generation: int, **text: object):
    """A random PaliGemma of transformers; no two sizes are equal."""
    torch.manual_seed(generation)
    config = transformers.PaliGemmaConfig(
        text_config={
            "model_type": "gemma2" if generation == 2 else "gemma", "hidden_size": 40, "intermediate_size": 72,
            "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 16,
            "vocab_size": 1216, **text,
            **({"query_pre_attn_scalar": 12, "sliding_window": 8} if generation == 2 else {}),
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 44, "num_attention_heads": 3,
            "num_hidden_layers": 2, "patch_size": 14, "image_size": 56, "vision_use_head": False,
        },
        projection_dim=40, image_token_index=1200,
    )  # fmt: skip
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():  # norms start at zero, which would hide two that are mixed up
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def load_theirs(folder):
    model, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[kind], (kind, report[kind])
    return model


def named(folder) -> dict[str, torch.Tensor]:
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return out


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("shards", ["10GB", "60KB"])
def test_what_transformers_writes_is_read_here(tmp_path, generation, shards):
    theirs = hf_model(generation)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "60KB")
    config, state = read(tmp_path, check=True)
    t = config.text
    assert (t.width, t.depth, t.mlp_dim, t.n_heads, t.n_kv_heads, t.head_dim) == (40, 3, 72, 4, 2, 16)
    assert (config.vision.resolution, config.tokens.image, t.post_norms) == (56, 1200, generation == 2)
    assert t.query_pre_attn_scalar == (12 if generation == 2 else 16)
    assert t.sliding_window == (8 if generation == 2 else None)
    assert (t.attn_logits_softcap, t.final_logits_softcap) == ((50.0, 30.0) if generation == 2 else (None, None))
    their_state = theirs.state_dict()
    layer = "model.language_model.layers.2"
    pairs = {
        "text.blocks.2.attn.k.weight": f"{layer}.self_attn.k_proj.weight",
        "text.blocks.2.mlp.gate.weight": f"{layer}.mlp.gate_proj.weight",
        "text.blocks.2.pre_attn_norm.scale": f"{layer}.input_layernorm.weight",
        "text.blocks.2.pre_mlp_norm.scale": f"{layer}.pre_feedforward_layernorm.weight"
        if generation == 2
        else f"{layer}.post_attention_layernorm.weight",
        "vision.blocks.1.mlp.up.bias": "model.vision_tower.encoder.layers.1.mlp.fc1.bias",
    }
    for ours, their_name in pairs.items():
        assert torch.equal(state[ours], their_state[their_name]), ours


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("layout", ["A", "B", "C", "D"])
def test_what_is_written_here_loads_in_transformers_without_a_stray_key(tmp_path, generation, layout):
    theirs = hf_model(generation)
    theirs.save_pretrained(tmp_path / "theirs")
    config, state = read(tmp_path / "theirs")
    write(tmp_path / "ours", config, state, layout=layout, max_shard_bytes=100_000)
    back = load_theirs(tmp_path / "ours")
    assert equal_states(theirs.state_dict(), back.state_dict())
    assert back.config.text_config.to_dict().keys() >= {"head_dim", "rope_parameters"}
    for field in ("head_dim", "rms_norm_eps", "rope_parameters", "vocab_size", "hidden_size"):
        assert getattr(back.config.text_config, field) == getattr(theirs.config.text_config, field), field
    if generation == 2:
        for field in ("query_pre_attn_scalar", "sliding_window", "layer_types", "attn_logit_softcapping"):
            assert getattr(back.config.text_config, field) == getattr(theirs.config.text_config, field), field
    # and once more around: transformers keeps the layout, and nothing changes
    back.save_pretrained(tmp_path / "again")
    config_again, state_again = read(tmp_path / "again")
    assert equal_states(state, state_again)
    assert dataclasses.replace(config_again, name="") == dataclasses.replace(config, name="")


def test_our_own_choices_survive_a_save_by_transformers(tmp_path):
    config = tiny_config(2)
    config = dataclasses.replace(
        config,
        beams="hf",
        text=dataclasses.replace(config.text, final_cap="later_steps", final_logits_softcap=None),
        processing=dataclasses.replace(config.processing, resize="float_bilinear_aa", separator="joint"),
    )
    write(tmp_path / "ours", config, random_state(config))
    load_theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "preprocessor_config.json").write_bytes(
        (tmp_path / "ours" / "preprocessor_config.json").read_bytes()
    )
    assert read(tmp_path / "theirs")[0] == config


@pytest.mark.parametrize("generation", [1, 2])
def test_rope_base_and_windows_of_all_kinds_mean_the_same_on_both_sides(tmp_path, generation):
    theirs = hf_model(generation, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, rms_norm_eps=1e-5)
    if generation == 2:
        theirs.config.text_config.layer_types = ["full_attention"] * 3
    theirs.save_pretrained(tmp_path / "theirs")
    config, state = read(tmp_path / "theirs")
    assert (config.text.rope_theta, config.text.norm_eps, config.text.sliding_window) == (5000.0, 1e-5, None)
    write(tmp_path / "ours", config, state)
    back = load_theirs(tmp_path / "ours").config.text_config
    assert back.rope_parameters["rope_theta"] == 5000.0
    if generation == 2:
        assert set(back.layer_types) == {"full_attention"}


@pytest.mark.parametrize("generation", [1, 2])
def test_a_converted_archive_loads_in_transformers(tmp_path, generation):
    import numpy as np

    config = as_npz_could_know(tiny_config(generation, rows=1200))
    np.savez(tmp_path / "bv.npz", **npz_arrays(config))
    convert(tmp_path / "bv.npz", tmp_path / "hf")
    back = load_theirs(tmp_path / "hf")
    table = back.get_input_embeddings().weight
    assert table.shape[0] == 1216  # room for <image>, rounded up to 64
    assert back.config.image_token_index == 1200
    assert torch.allclose(table[1200:], table[:1200].mean(0), atol=1e-6)


def test_the_preprocessor_file_is_read_by_transformers(tmp_path):
    config = tiny_config(2)
    write(tmp_path, config, random_state(config))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.size["height"], processor.size["width"]) == (42, 42)
    assert processor.resample == 3
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]
    assert processor.image_seq_length == 9


ADAPTERS = {
    "suffixes": {"target_modules": ["q_proj", "o_proj"]},
    "regex": {"target_modules": r".*language_model.*\.(gate_proj|down_proj)"},
    "all linear": {"target_modules": "all-linear", "lora_alpha": 3},
    "rank-stabilised": {"target_modules": ["v_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["k_proj", "up_proj"],
        "rank_pattern": {r"layers\.1\.mlp\.up_proj": 2, "k_proj": 3},
        "alpha_pattern": {"k_proj": 7},
    },
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "exclusions": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*vision_tower.*"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "lora biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "saved modules": {"target_modules": ["k_proj"], "modules_to_save": ["multi_modal_projector", "post_layernorm"]},
    "saved table": {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "convolution": {"target_modules": ["patch_embedding", "v_proj"]},
    "DoRA": {"target_modules": ["o_proj", "fc1"], "use_dora": True},
}


def train_adapter(theirs, folder, settings) -> torch.nn.Module:
    """An adapter with random numbers everywhere a training run would have put some; returns the peft model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(theirs, peft.LoraConfig(**{"r": 4, "lora_alpha": 9, **settings}))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad:
                parameter.normal_(std=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_merging_equals_merge_and_unload(tmp_path, generation, kind):
    hf_model(generation).save_pretrained(tmp_path / "base")
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted = train_adapter(theirs, tmp_path / "adapter", ADAPTERS[kind])
    config, state = read(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = dict(merge(state, read_adapter(tmp_path / "adapter", config)))
    # peft merges from what is on disk, as we do
    base = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    reloaded.save_pretrained(tmp_path / "merged")
    _, expected = read(tmp_path / "merged")
    changed = [name for name in state if not torch.equal(state[name], expected[name])]
    assert changed, "the adapter changes nothing: this test would prove nothing"
    for name in state:
        assert torch.allclose(merged[name], expected[name], rtol=1e-5, atol=1e-6), (kind, name)
    del adapted


def test_lora_on_the_tied_table_gives_the_logits_of_the_adapted_model(tmp_path):
    """Against the model before merging: merge_and_unload of peft 0.21 adds the update to a tied table twice."""
    hf_model(2).save_pretrained(tmp_path / "base")
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "base")
    settings = {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True}
    adapted = train_adapter(theirs, tmp_path / "adapter", settings).eval()
    convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    merged = load_theirs(tmp_path / "merged").eval()
    ids = torch.tensor([[2, 7, 30, 500, 108]])
    with torch.no_grad():
        expected, got = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
    assert torch.allclose(expected, got, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["lm_head", "v_proj"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_an_adapter_that_unties_table_and_head_is_refused(tmp_path, settings):
    hf_model(1).save_pretrained(tmp_path / "base")
    train_adapter(hf_model(1), tmp_path / "adapter", settings)
    config, _ = read(tmp_path / "base")
    with pytest.raises(CheckpointError, match="PaliGemma ties the two"):
        read_adapter(tmp_path / "adapter", config)


@pytest.mark.parametrize("layout", ["A", "B", "C", "D"])
def test_an_adapter_named_in_any_layout_gives_the_same_weights(tmp_path, layout):
    from safetensors.torch import load_file, save_file

    from paligemma.checkpoints.hugging_face import in_layout, normalise

    hf_model(2).save_pretrained(tmp_path / "base")
    train_adapter(hf_model(2), tmp_path / "adapter", {"target_modules": ["q_proj", "gate_proj"]})
    config, state = read(tmp_path / "base")
    expected = dict(merge(state, read_adapter(tmp_path / "adapter", config)))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    renamed = {
        "base_model.model." + in_layout(normalise(name.removeprefix("base_model.model.")), layout): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "adapter" / "adapter_model.safetensors")
    merged = dict(merge(state, read_adapter(tmp_path / "adapter", config)))
    assert equal_states(expected, merged)


def test_merging_into_a_folder_keeps_bfloat16_and_streams(tmp_path):
    hf_model(2).bfloat16().save_pretrained(tmp_path / "base")
    base = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    train_adapter(base, tmp_path / "adapter", {"target_modules": "all-linear"})
    convert(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    merged = load_theirs(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    with open_checkpoint(tmp_path / "base") as checkpoint:
        in_float32 = dict(merge(checkpoint, read_adapter(tmp_path / "adapter", checkpoint.config)))
    _, written = read(tmp_path / "out")
    assert equal_states(in_float32, written)


def test_an_adapter_that_lost_a_layer_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_model(1).save_pretrained(tmp_path / "base")
    train_adapter(hf_model(1), tmp_path / "adapter", {"target_modules": ["q_proj"]})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "language_model.layers.1." not in n}, file)
    config, _ = read(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj is targeted, but has no tensors"):
        read_adapter(tmp_path / "adapter", config)
    with pytest.warns(UserWarning, match="is targeted, but has no tensors"):
        assert read_adapter(tmp_path / "adapter", config, strict=False).deltas


def test_config_json_of_a_fresh_save_is_understood_field_by_field(tmp_path):
    """Old spelling and new spelling of the same model give the same configuration."""
    hf_model(2).save_pretrained(tmp_path)
    new = read(tmp_path)[0]
    values = json.loads((tmp_path / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    values["image_token_id"] = values.pop("image_token_index")
    values["_vocab_size"] = values.pop("vocab_size")
    text = values["text_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    text["hidden_act"] = "gelu"
    for name in ("layer_types", "use_bidirectional_attention", "hidden_activation", "max_position_embeddings"):
        del text[name]
    del values["vision_config"]["image_size"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read(tmp_path)[0] == new
