"""Adapters that cannot be merged are refused by name; none of this needs peft."""

import json

import pytest
import torch
from safetensors.torch import save_file

from paligemma.checkpoints import merge, read_adapter, verify
from paligemma.errors import CheckpointError, PickleRefused
from tests.checkpoint_cases import random_state, tiny_config

Q = "base_model.model.language_model.model.layers.{i}.self_attn.q_proj"
V = "base_model.model.vision_tower.vision_model.encoder.layers.{j}.self_attn.q_proj"


def adapter_tensors(rank: int = 2) -> dict[str, torch.Tensor]:
    """LoRA on every q_proj of the tiny model, layout A."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    text, vision = [Q.format(i=i) for i in range(3)], [V.format(j=j) for j in range(2)]
    for names, n_out, n_in in ((text, 24, 20), (vision, 12, 12)):
        for name in names:
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(n_out, rank, generator=generator)
    return tensors


def adapter_folder(folder, tensors=None, **fields):
    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values | fields))
    save_file(adapter_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def config():
    return tiny_config(2)


def test_the_update_is_alpha_over_rank_times_b_a(tmp_path, config):
    state = random_state(config)
    tensors = adapter_tensors()
    merged = merge(state, read_adapter(adapter_folder(tmp_path / "a"), config))
    a, b = tensors[f"{Q.format(i=1)}.lora_A.weight"], tensors[f"{Q.format(i=1)}.lora_B.weight"]
    expected = state["text.blocks.1.attn.q.weight"] + 3.0 * b @ a
    assert torch.allclose(merged["text.blocks.1.attn.q.weight"], expected, atol=1e-6)
    assert torch.equal(merged["text.blocks.1.attn.k.weight"], state["text.blocks.1.attn.k.weight"])
    assert list(merged) == list(state)


def test_merging_in_bfloat16_rounds_once(tmp_path, config):
    state = random_state(config)
    rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
    adapter = read_adapter(adapter_folder(tmp_path / "a"), config)
    exact = merge({n: t.float() for n, t in rounded.items()}, adapter)
    for name, tensor in merge(rounded, adapter).stream():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].bfloat16())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3': expected 'LORA'"),
        ({"use_qalora": True}, "use_qalora=True cannot be merged"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"alora_invocation_tokens": [5]}, "only after certain tokens"),
        ({"trainable_token_indices": [7]}, "single rows"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights too"),
        ({"init_lora_weights": "OLoRA"}, "changed the base weights too"),
        ({"use_dora": True}, "has no magnitude vector"),
        ({"r": 3}, r"has A \[2, 20\] and B \[24, 2\]: expected \[3, 20\] and \[24, 3\]"),
        ({"target_modules": ["q_proj", "k_proj"]}, "k_proj is targeted, but has no tensors"),
        ({"layers_to_transform": [0]}, "has tensors, but is not targeted"),
        ({"rank_pattern": ["q_proj"]}, "a field has the wrong type"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path, config, fields, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(adapter_folder(tmp_path / "a", **fields), config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields", [{"eva_config": {"rho": 2}}, {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.1}]
)
def test_fields_of_training_alone_are_harmless(tmp_path, config, fields):
    assert len(read_adapter(adapter_folder(tmp_path / "a", **fields), config).deltas) == 5


def test_an_unknown_field_is_named_in_a_warning(tmp_path, config):
    with pytest.warns(UserWarning, match="unknown fields ignored: lora_of_tomorrow"):
        read_adapter(adapter_folder(tmp_path / "a", lora_of_tomorrow=1), config)


def test_half_a_pair_is_refused(tmp_path, config):
    tensors = adapter_tensors()
    del tensors[f"{Q.format(i=2)}.lora_B.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.q_proj has no lora_B: expected both"):
        read_adapter(adapter_folder(tmp_path / "a", tensors), config)


def test_the_adapter_of_another_model_is_refused(tmp_path, config):
    tensors = adapter_tensors() | {f"{Q.format(i=i)}.lora_A.weight": torch.zeros(2, 64) for i in range(3)}
    folder = adapter_folder(tmp_path / "a", tensors, base_model_name_or_path="google/another")
    with pytest.raises(CheckpointError, match=r"the model it was trained on \(google/another\)"):
        read_adapter(folder, config)


def test_tensors_without_a_place_are_refused_unless_not_strict(tmp_path, config):
    name = "base_model.model.custom_text_proj.lora_A.weight"
    folder = adapter_folder(tmp_path / "a", adapter_tensors() | {name: torch.zeros(2, 20)})
    with pytest.raises(CheckpointError, match=r"custom_text_proj\.lora_A\.weight has no place in this model"):
        read_adapter(folder, config)
    with pytest.warns(UserWarning, match="has no place"):
        adapter = read_adapter(folder, config, strict=False)
    assert list(adapter.dropped) == [name]
    assert len(adapter.deltas) == 5


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(tmp_path, config):
    folder = adapter_folder(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(PickleRefused, match=r"adapter_model\.bin .*adapter_model\.safetensors"):
        read_adapter(folder, config)


def test_verifying_an_adapter_names_what_is_not_finite(tmp_path):
    tensors = adapter_tensors()
    assert verify(adapter_folder(tmp_path / "a", tensors)).is_sound
    tensors[f"{Q.format(i=0)}.lora_A.weight"][1, 2] = float("nan")
    (problem,) = verify(adapter_folder(tmp_path / "a", tensors)).problems
    assert "layers.0.self_attn.q_proj.lora_A.weight holds 1 NaN among 40 values, first at [1, 2]" in problem
