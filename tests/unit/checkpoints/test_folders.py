"""Hugging Face folders: configuration of old and new releases, cross-checks, shards, heads, bad input."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from paligemma.checkpoints import identify, open_checkpoint, read, write
from paligemma.errors import CheckpointError, ConfigError
from tests.checkpoint_cases import equal_states, hf_folder, hf_tensors, old_config_json, random_state, tiny_config


@pytest.fixture(params=[1, 2], ids=["PaliGemma 1", "PaliGemma 2"])
def generation(request):
    return request.param


@pytest.fixture
def config(generation):
    return tiny_config(generation)


@pytest.fixture
def state(config):
    return random_state(config)


@pytest.fixture
def tensors(state, generation):
    return hf_tensors(state, generation)


@pytest.fixture
def folder(tmp_path, config, tensors):
    return hf_folder(tmp_path / "hf", config, tensors)


def edit(folder, **fields):
    """Change fields of config.json; "text.x" and "vision.x" reach the parts, None removes."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in fields.items():
        part, _, leaf = name.rpartition("__")
        where = values[f"{part}_config"] if part else values
        if value is Ellipsis:
            where.pop(leaf, None)
        else:
            where[leaf] = value
    path.write_text(json.dumps(values))
    return folder


def test_a_folder_of_the_first_releases_is_read_whole(folder, config, state):
    assert identify(folder) == "hf"
    found, tensors = read(folder, check=True)
    assert dataclasses.replace(found, name="") == config
    assert found.name == "somewhere/paligemma"
    assert equal_states(tensors, state)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.layout == "A"


def test_what_config_json_omits_comes_from_the_tensors(folder, config):
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "model_type"):
        edit(folder, **{f"text__{name}": ...})
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size", "image_size"):
        edit(folder, **{f"vision__{name}": ...})
    assert dataclasses.replace(read(folder)[0], name="") == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text__hidden_size", 21), ("text__num_hidden_layers", 2), ("text__intermediate_size", 45),
        ("text__vocab_size", 1217), ("vision__hidden_size", 13), ("vision__num_hidden_layers", 3),
        ("vision__intermediate_size", 4096), ("vision__patch_size", 16),
    ],
)  # fmt: skip
def test_a_size_that_disagrees_with_the_weights_is_refused_by_name(folder, field, value):
    edit(folder, **{field: value})
    with pytest.raises(ConfigError, match=rf"{field.split('__')[1]}={value} disagrees with the weights") as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_heads_that_do_not_fill_the_projection_are_refused(folder):
    edit(folder, text__num_attention_heads=3, text__head_dim=6)
    with pytest.raises(ConfigError, match=r"num_attention_heads=3 times head_dim=6 disagrees .* 24 rows"):
        read(folder)


def test_the_wrong_family_is_refused(folder, generation):
    edit(folder, text__model_type="gemma" if generation == 2 else "gemma2")
    with pytest.raises(ConfigError, match=f"expected '{'gemma2' if generation == 2 else 'gemma'}'"):
        read(folder)


def test_an_image_size_of_another_grid_is_refused(folder):
    edit(folder, vision__image_size=224)
    with pytest.raises(ConfigError, match=r"image_size=224 disagrees .* 9 rows: expected 42"):
        read(folder)


def test_an_image_size_with_unused_pixels_is_kept(folder):
    assert read(edit(folder, vision__image_size=50))[0].vision.resolution == 50


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma2"}, "model_type='gemma2': expected 'paligemma'"),
        ({"text__hidden_act": "silu"}, "hidden_act='silu': expected gelu_pytorch_tanh"),
        ({"vision__hidden_act": "gelu"}, "hidden_act='gelu': expected gelu_pytorch_tanh"),
        ({"text__attention_bias": True}, "attention_bias=true: expected false"),
        ({"text__rope_scaling": {"type": "linear", "factor": 2}}, "rotary positions of type 'linear'"),
        ({"text__rope_parameters": {"rope_type": "yarn"}}, "rotary positions of type 'yarn'"),
    ],
)
def test_arithmetic_that_no_paligemma_has_is_refused(folder, fields, message):
    with pytest.raises(ConfigError, match=message):
        read(edit(folder, **fields))


def test_gelu_in_a_gemma_file_means_its_tanh_form(folder, config):
    assert dataclasses.replace(read(edit(folder, text__hidden_act="gelu"))[0], name="") == config


def test_gemma_2_fields_are_taken_from_the_file_as_it_says():
    config = tiny_config(2)
    values = old_config_json(config)
    from paligemma.checkpoints.hugging_face_config import parse
    from paligemma.checkpoints.hugging_face_files import _facts_from

    def text(**fields):
        values["text_config"] = old_config_json(config)["text_config"] | fields
        return parse(values, _facts_from(config), "config.json", generation={}).text

    assert text(query_pre_attn_scalar=224).query_pre_attn_scalar == 224  # early gemma-2-9b files
    assert text(query_pre_attn_scalar=None).query_pre_attn_scalar == 256
    assert text(attn_logit_softcapping=None, final_logit_softcapping=None).final_logits_softcap is None
    assert text(attn_logit_softcapping=20.0).attn_logits_softcap == 20.0
    assert (text().attn_logits_softcap, text().final_logits_softcap) == (50.0, 30.0)
    assert text(sliding_window=None).sliding_window is None
    assert text(layer_types=["full_attention"] * 3).sliding_window is None
    assert text(layer_types=["sliding_attention", "full_attention", "sliding_attention"]).sliding_window == 8
    with pytest.raises(ConfigError, match="layer_types"):
        text(layer_types=["full_attention", "sliding_attention", "full_attention"])


def test_the_table_of_the_27b_decoder_fills_what_its_file_omits():
    from paligemma.checkpoints.hugging_face_config import parse
    from paligemma.checkpoints.hugging_face_files import _facts_from
    from paligemma.presets import MODEL_PRESETS

    preset = MODEL_PRESETS["paligemma2-28b-448"]
    config = parse({"model_type": "paligemma"}, _facts_from(preset), "config.json", generation={})
    assert dataclasses.replace(config.text, sliding_window=None) == preset.text
    assert config.text.sliding_window == 4096
    assert config.vision == preset.vision


def test_the_stop_token_is_eos_also_where_the_file_lists_the_end_of_a_turn(folder):
    edit(folder, eos_token_id=..., text__eos_token_id=[1, 107])
    assert read(folder)[0].tokens.eos == 1
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert read(folder)[0].tokens.eos == 3


def test_shards_and_their_index_must_agree(tmp_path, config, state):
    folder = write(tmp_path / "x", config, state, max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shards = sorted(set(values["weight_map"].values()))
    assert len(shards) > 2
    assert values["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    name = "language_model.model.norm.weight"  # shares its shard with others
    assert values["weight_map"][name] != shards[1]
    wrong = {**values, "weight_map": {**values["weight_map"], name: shards[1]}}
    index.write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match=f"places {name} in {shards[1]}, which does not hold it"):
        read(folder)
    index.write_text(json.dumps({**values, "weight_map": {n: s for n, s in values["weight_map"].items() if n != name}}))
    with pytest.raises(CheckpointError, match=r"which model\.safetensors\.index\.json does not name"):
        read(folder)
    index.write_text(json.dumps({**values, "weight_map": {**values["weight_map"], name: "../" + shards[0]}}))
    with pytest.raises(CheckpointError, match="outside its own folder"):
        read(folder)
    index.write_text(json.dumps(values))
    (folder / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=f"the shard {shards[1]} .* is missing"):
        read(folder)


def test_two_layouts_in_one_folder_are_refused(folder, tensors):
    twice = {**tensors, "model.language_model.norm.weight": tensors["language_model.model.norm.weight"].clone()}
    save_file(twice, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="are the same parameter in two layouts"):
        read(folder)


def test_a_single_file_beside_an_index_is_refused(tmp_path, config, state, folder):
    write(tmp_path / "sharded", config, state, max_shard_bytes=20_000)
    shutil.copy(tmp_path / "sharded" / "model.safetensors.index.json", folder)
    with pytest.raises(CheckpointError, match=r"holds both model\.safetensors and model\.safetensors\.index\.json"):
        read(folder)


def test_one_name_in_two_files_is_refused(tmp_path, config, tensors):
    folder = hf_folder(tmp_path / "x", config, tensors)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"language_model.model.norm.weight": torch.zeros(20)}, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match="stands in two files"):
        read(folder)


def test_a_tied_head_is_ignored_when_equal_and_warned_about_when_not(tmp_path, config, tensors):
    table = tensors["language_model.model.embed_tokens.weight"]
    folder = hf_folder(tmp_path / "x", config, {**tensors, "lm_head.weight": table.clone()})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.dropped["lm_head.weight"] == "equal to the embedding table it is tied to"
    hf_folder(folder, config, {**tensors, "language_model.lm_head.weight": table + 1})
    with pytest.warns(UserWarning, match="the table is used, the head dropped"):
        _, state = read(folder)
    assert torch.equal(state["text.embedding.weight"], table)
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="PaliGemma ties them"):
        read(folder)


def test_known_buffers_are_dropped_with_their_reason_and_others_refused(tmp_path, config, tensors):
    buffers = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(9)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
        "vision_tower.vision_model.head.probe": torch.ones(1, 1, 12),
    }
    folder = hf_folder(tmp_path / "x", config, tensors | buffers)
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.dropped) == set(buffers)
        assert all(checkpoint.dropped.values())
    hf_folder(folder, config, tensors | {"custom_text_proj.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"first custom_text_proj\.weight: expected none.*strict=False"):
        read(folder)
    with pytest.warns(UserWarning, match="custom_text_proj"):
        read(folder, strict=False)


def test_a_missing_tensor_is_named(tmp_path, config, tensors):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    folder = hf_folder(tmp_path / "x", config, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=r"language_model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        read(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path, config, tensors):
    name = "multi_modal_projector.linear.weight"
    folder = hf_folder(tmp_path / "x", config, tensors | {name: torch.zeros(12, 20)})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[12, 20\]: expected \[20, 12\]"):
        read(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_checked_read_names_the_tensor_that_is_not_finite(tmp_path, config, tensors, value):
    tensors["language_model.model.layers.2.mlp.gate_proj.weight"][3, 5] = value
    folder = hf_folder(tmp_path / "x", config, tensors)
    read(folder)  # unchecked reading does not look
    what = "1 NaN" if value != value else "1 Inf"
    with pytest.raises(CheckpointError, match=rf"gate_proj.* holds {what} among 880 values, first at \[3, 5\]"):
        read(folder, check=True)


def test_a_value_too_large_for_float16_is_found_by_the_check(tmp_path, config, tensors):
    tensors["language_model.model.norm.weight"][4] = 70_000.0
    folder = hf_folder(tmp_path / "x", config, tensors)
    read(folder, check=True, dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"norm\.weight .* holds 1 Inf"):
        read(folder, check=True, dtype="float16")


def test_truncation_anywhere_is_one_clear_line(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
            read(folder)
        assert "\n" not in str(caught.value)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="longer than it should be"):
        read(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "needs 8 bytes, but its header gives it 4"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "needs"),
        ({"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}, "has dtype Q4"),
        ({"dtype": "F32", "data_offsets": [0, 4]}, "is malformed"),
        ("nonsense", "is malformed"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, entry, message):
    raw = json.dumps({"x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 4)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_a_given_config_is_used_and_must_fit(folder, config, state):
    other = dataclasses.replace(config, beams="hf")
    assert read(folder, config=other)[0].beams == "hf"
    wrong = dataclasses.replace(config, text=dataclasses.replace(config.text, mlp_dim=45))
    with pytest.raises(CheckpointError, match=r"has shape \[44, 20\]: expected \[45, 20\]"):
        read(folder, config=wrong)


def test_a_lone_safetensors_file_is_read_with_the_config_beside_it(folder, state):
    assert identify(folder / "model.safetensors") == "hf"
    assert equal_states(read(folder / "model.safetensors")[1], state)


def preprocessor(folder, **fields):
    values = {"resample": 3, "size": {"height": 42, "width": 42}, "image_mean": [0.5] * 3, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(values | fields))
    return folder


def test_the_resize_is_the_one_the_preprocessor_file_names(folder):
    assert read(folder)[0].processing.resize == "hf_bicubic"
    assert read(preprocessor(folder, resample=2))[0].processing.resize == "bv_bilinear_aa"
    (folder / "preprocessor_config.json").rename(folder / "processor_config.json")
    values = {"image_processor": json.loads((folder / "processor_config.json").read_text())}
    (folder / "processor_config.json").write_text(json.dumps(values))
    assert read(folder)[0].processing.resize == "bv_bilinear_aa"


@pytest.mark.parametrize(
    "fields",
    [
        {"resample": 1}, {"size": {"height": 224, "width": 224}}, {"image_mean": [0.485, 0.456, 0.406]},
        {"rescale_factor": 1.0}, {"do_normalize": False},
    ],
)  # fmt: skip
def test_a_preprocessor_that_would_change_the_pixels_is_refused(folder, fields):
    with pytest.raises(ConfigError, match="preprocessor"):
        read(preprocessor(folder, **fields))


def test_an_edited_preprocessor_file_wins_over_our_own_note(tmp_path, config, state):
    config = dataclasses.replace(config, processing=dataclasses.replace(config.processing, resize="float_bilinear_aa"))
    folder = write(tmp_path / "x", config, state)
    assert read(folder)[0].processing.resize == "float_bilinear_aa"
    assert read(preprocessor(folder))[0].processing.resize == "hf_bicubic"


def test_an_ordinary_folder_needs_no_note_of_ours(tmp_path, config, state):
    folder = write(tmp_path / "x", config, state)
    assert "paligemma_config" not in json.loads((folder / "config.json").read_text())


def test_the_safetensors_package_agrees_with_our_writer_and_reader(tmp_path, config, state):
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    folder = write(tmp_path / "x", config, state, layout="C")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(open_checkpoint(folder).file_specs)
        table = file.get_tensor("model.language_model.embed_tokens.weight")
    assert torch.equal(table, state["text.embedding.weight"])
