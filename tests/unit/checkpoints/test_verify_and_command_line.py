"""`verify` finds every kind of damage; `paligemma checkpoint` does what its help says."""

import json
import os

import numpy as np
import pytest
import torch

from paligemma.checkpoints import open_checkpoint, read, verify, write
from paligemma.cli.main import main
from tests.checkpoint_cases import equal_states, hf_folder, hf_tensors, random_state, tiny_config


@pytest.fixture
def config():
    return tiny_config(2)


@pytest.fixture
def state(config):
    return random_state(config)


@pytest.fixture
def folder(tmp_path, config, state):
    return write(tmp_path / "model", config, state, max_shard_bytes=30_000)


def run(capsys, *words) -> tuple[int, str, str]:
    status = main(["checkpoint", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_sound_checkpoint_is_sound_and_says_what_was_checked(folder, state):
    verdict = verify(folder)
    assert verdict.is_sound
    assert (verdict.n_tensors, verdict.n_values) == (len(state), sum(t.numel() for t in state.values()))
    n_files = len(list(folder.glob("*.safetensors")))
    assert f"sha256 of {n_files} of {n_files} files" in verdict.checked


def test_every_tensor_that_is_not_finite_is_named(tmp_path, config, state):
    tensors = hf_tensors(state, 2)
    tensors["language_model.model.layers.0.mlp.up_proj.weight"][0, 1] = float("nan")
    tensors["multi_modal_projector.linear.bias"][:2] = float("inf")
    problems = verify(hf_folder(tmp_path / "x", config, tensors)).problems
    assert len(problems) == 2
    assert any("multi_modal_projector.linear.bias (projector.bias) holds 2 Inf among 20" in p for p in problems)
    assert any("layers.0.mlp.up_proj.weight" in p and "1 NaN among 880 values, first at [0, 1]" in p for p in problems)


def test_a_changed_byte_is_found_by_the_hash_of_its_file(folder):
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    (problem,) = verify(folder).problems
    assert problem.startswith(f"{path}: its sha256 is not ")


def test_the_hub_cache_names_files_by_the_hash_they_must_have(tmp_path, folder):
    import hashlib

    for path in folder.glob("*.safetensors"):
        blob = tmp_path / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(blob)
    (folder / "SHA256SUMS").unlink()
    assert verify(folder).is_sound
    data = bytearray(blob.read_bytes())
    data[-2] ^= 4
    blob.write_bytes(data)
    assert len(verify(folder).problems) == 1


def test_damaged_arrays_are_all_listed(tmp_path, config, state):
    import zipfile

    path = write(tmp_path / "x.npz", config, state, "npz")
    data = bytearray(path.read_bytes())
    names = ("params/llm/embedder/input_embedding", "params/llm/layers/mlp/linear")
    with zipfile.ZipFile(path) as archive:
        for name in names:
            member = archive.getinfo(f"{name}.npy")
            data[member.header_offset + 150 + member.file_size // 2] ^= 1
    path.write_bytes(data)
    problems = verify(path).problems
    assert all(any(f"{name} is damaged" in problem for problem in problems) for name in names)


def test_an_index_that_promises_more_than_the_shards_hold_is_reported(folder):
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["metadata"]["total_size"] += 4
    index.write_text(json.dumps(values))
    (problem,) = verify(folder).problems
    assert "but the shards hold only" in problem


def test_info_prints_a_table_and_json(capsys, folder, config):
    status, out, err = run(capsys, "info", folder)
    assert (status, err) == (0, "")
    for text in (
        "Hugging Face, layout A", "42 px, 9 image tokens", "float32", "attention 50.0, final 30.0", "hf_bicubic",
        "1,216 rows, 1,200 of them tokens", "8 on even layers",
    ):  # fmt: skip
        assert text in out
    status, out, _ = run(capsys, "info", folder, "--json")
    facts = json.loads(out)
    with open_checkpoint(folder) as checkpoint:
        n_values = sum(checkpoint.spec(name).n_values for name in checkpoint)
    assert facts["parameters"]["all"] == n_values
    assert sum(n for part, n in facts["parameters"].items() if part != "all") == n_values
    assert facts["tokenizer"] == "none beside the weights"


def test_convert_goes_both_ways_and_chooses_the_format_by_name(capsys, tmp_path, folder, config, state):
    archive = tmp_path / "x.npz"
    assert run(capsys, "convert", folder, archive, "--dtype", "bfloat16")[:2] == (0, f"{archive}\n")
    assert np.load(archive)["params/img/head/bias"].dtype == np.dtype("V2")
    back = tmp_path / "back"
    assert run(capsys, "convert", archive, back, "--layout", "C", "--max-shard-gb", "0.00003")[0] == 0
    with open_checkpoint(back) as checkpoint:
        assert checkpoint.layout == "C"
    rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
    rounded["text.embedding.weight"] = rounded["text.embedding.weight"][:1200]
    _, there = read(back)
    there["text.embedding.weight"] = there["text.embedding.weight"][:1200]
    assert equal_states(there, rounded)


def test_convert_resamples_positions_when_told(capsys, tmp_path, folder):
    assert run(capsys, "convert", folder, tmp_path / "large", "--resolution", "70")[0] == 0
    config, state = read(tmp_path / "large")
    assert (config.vision.resolution, len(state["vision.position_embedding"])) == (70, 25)


def test_merge_writes_the_merged_model(capsys, tmp_path, folder, config, state):
    from paligemma.checkpoints import merge, read_adapter
    from tests.unit.checkpoints.test_adapters import adapter_folder

    adapter = adapter_folder(tmp_path / "adapter")
    assert run(capsys, "merge", folder, adapter, tmp_path / "out")[0] == 0
    assert equal_states(read(tmp_path / "out")[1], dict(merge(state, read_adapter(adapter, config))))
    status, out, _ = run(capsys, "info", adapter)
    assert status == 0
    assert "PEFT adapter, LoRA" in out


def test_verify_answers_with_its_status(capsys, tmp_path, folder, config, state):
    status, out, err = run(capsys, "verify", folder)
    assert (status, err) == (0, "")
    assert out.startswith(f"sound: {len(state)} tensors")
    state["projector.bias"][3] = float("nan")
    broken = write(tmp_path / "broken", config, state)
    status, out, err = run(capsys, "verify", broken)
    assert status == 2
    assert "projector.bias) holds 1 NaN" in err
    assert out.startswith("1 problems")
    status, out, _ = run(capsys, "verify", broken, "--json")
    assert status == 2
    assert json.loads(out)["sound"] is False


def test_user_mistakes_are_one_line_and_status_2(capsys, tmp_path, folder):
    torch.save({}, tmp_path / "x.bin")
    for words, message in (
        (["info", tmp_path / "nothing"], "no such file or folder"),
        (["info", tmp_path / "x.bin"], "It was not opened"),
        (["convert", folder, folder], "holds weights already"),
        (["convert", folder, tmp_path / "y", "--dtype", "int4"], "dtype='int4': expected one of float32"),
        (["verify", tmp_path / "x.bin"], "a pickle"),
    ):
        status, out, err = run(capsys, *words)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert not os.path.exists(tmp_path / "y")
