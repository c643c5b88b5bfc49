"""Writing: whole or not at all, never over something else, never silently rounded to infinity."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from paligemma.checkpoints import convert, open_checkpoint, read, write
from paligemma.errors import CheckpointError, ConfigError, OptionError, TokenizerError
from paligemma.processing.tokenizer import Tokenizer
from tests.checkpoint_cases import as_npz_could_know, equal_states, npz_arrays, random_state, tiny_config
from tests.tiny_folder import CONFIG, TOKENIZER, random_model


@pytest.fixture
def config():
    return tiny_config(2)


@pytest.fixture
def state(config):
    return random_state(config)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


# Converts argv[1] to argv[2] with every file limited to argv[3] bytes: writing more fails like a full disk does.
FULL_DISK = """
import resource, sys
from paligemma.checkpoints import convert
from paligemma.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    convert(sys.argv[1], sys.argv[2])
except CheckpointError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("target", ["new/deep/folder", "new/deep/file.npz"])
@pytest.mark.parametrize("limit", [10, 60_000])
def test_a_full_disk_leaves_nothing_under_any_name(tmp_path, config, state, target, limit):
    source = write(tmp_path / "source", config, state)
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(source), str(tmp_path / target), str(limit)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert "nothing was left behind" in run.stdout
    assert run.stdout.count("\n") == 1
    assert names(tmp_path) == {"source"}


def test_a_full_disk_keeps_the_checkpoint_that_was_to_be_replaced(tmp_path, config, state):
    source = write(tmp_path / "source", config, state, max_shard_bytes=30_000)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    script = FULL_DISK.replace("convert(sys.argv[1], sys.argv[2])", "convert(sys.argv[1], sys.argv[2], overwrite=True)")
    run = subprocess.run(
        [sys.executable, "-c", script, str(source), str(source), "60000"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_too_little_space_is_refused_before_any_work(tmp_path, config, monkeypatch, state):
    from paligemma.checkpoints import staging

    free = staging.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: free)
    with pytest.raises(CheckpointError, match=r"0\.00 GB are free"):
        write(tmp_path / "x", config, state)
    assert names(tmp_path) == set()


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, config, state):
    source = write(tmp_path / "source", config, state)
    with open_checkpoint(source) as checkpoint:
        path = source / "model.safetensors"
        path.write_bytes(path.read_bytes()[:20_000])
        for target, kind in (("out", "hf"), ("out.npz", "npz")):
            with pytest.raises(CheckpointError, match="truncated while it was being read"):
                write(tmp_path / target, config, checkpoint, kind)
    assert names(tmp_path) == {"source"}


def test_an_existing_checkpoint_is_replaced_only_when_told(tmp_path, config, state):
    folder = write(tmp_path / "x", config, state, max_shard_bytes=20_000)
    other = random_state(config, seed=1)
    with pytest.raises(CheckpointError, match="holds weights already"):
        write(folder, config, other)
    write(folder, config, other, overwrite=True)
    assert {name for name in names(folder) if name.endswith("safetensors")} == {"model.safetensors"}
    assert not (folder / "model.safetensors.index.json").exists()
    assert equal_states(read(folder)[1], other)
    file = write(tmp_path / "x.npz", config, state, "npz")
    with pytest.raises(CheckpointError, match="exists already"):
        write(file, config, other, "npz")
    write(file, config, other, "npz", overwrite=True)


def test_what_would_win_over_new_files_goes_and_what_is_somebodys_stays(tmp_path, config, state):
    folder = write(tmp_path / "out", config, state)
    for name in ("processor_config.json", "notes.txt", "embeddings.safetensors", "tokenizer.model"):
        (folder / name).write_bytes(b"old")
    write(folder, config, state, overwrite=True)
    assert not (folder / "processor_config.json").exists()
    kept = ("notes.txt", "embeddings.safetensors", "tokenizer.model")
    assert all((folder / name).read_bytes() == b"old" for name in kept)
    (tmp_path / "tokenizer.json").write_text("{}")
    write(folder, config, state, overwrite=True, beside=[tmp_path / "tokenizer.json"])
    assert not (folder / "tokenizer.model").exists(), "it would be read in place of the new one"


def test_a_checkpoint_can_be_converted_in_place(tmp_path, config, state):
    folder = write(tmp_path / "x", config, state, layout="A")
    convert(folder, folder, layout="C", dtype="bfloat16", max_shard_bytes=20_000, overwrite=True)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.layout == "C"
        assert equal_states(dict(checkpoint), {name: tensor.bfloat16() for name, tensor in state.items()})


def test_shards_stay_below_their_limit_and_hold_every_tensor_once(tmp_path, config, state):
    folder = write(tmp_path / "x", config, state, max_shard_bytes=30_000)
    largest = max(tensor.nbytes for tensor in state.values())
    for path in folder.glob("*.safetensors"):
        assert path.stat().st_size <= max(30_000, largest) + 10_000  # and its header
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(weight_map) == len(state)


def test_rounding_to_infinity_is_refused_by_name(tmp_path, config, state):
    state["text.blocks.1.mlp.down.weight"][2, 3] = 1e6
    with pytest.raises(CheckpointError, match=r"text\.blocks\.1\.mlp\.down\.weight, rounded to float16 .* holds 1 Inf"):
        write(tmp_path / "x", config, state, dtype="float16")
    assert names(tmp_path) == set()
    write(tmp_path / "x", config, state, dtype="bfloat16")


def test_a_state_that_does_not_fit_its_configuration_is_refused(tmp_path, config, state):
    lacking = {n: t for n, t in state.items() if n != "projector.bias"}
    with pytest.raises(CheckpointError, match=r"has no projector\.bias"):
        write(tmp_path / "x", config, lacking)
    with pytest.raises(CheckpointError, match=r"projector\.bias has shape \[3\]: expected \[20\]"):
        write(tmp_path / "x", config, state | {"projector.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="holds extra, which is no parameter"):
        write(tmp_path / "x", config, state | {"extra": torch.zeros(3)})


def test_options_that_do_not_exist_are_refused_with_a_hint(tmp_path, config, state):
    with pytest.raises(OptionError, match=r"format='nzp': expected one of hf, npz. Did you mean 'npz'?"):
        write(tmp_path / "x", config, state, "nzp")
    with pytest.raises(OptionError, match="layout='E': expected one of A, B, C, D"):
        write(tmp_path / "x", config, state, layout="E")
    with pytest.raises(OptionError, match="dtype='bf16'"):
        write(tmp_path / "x", config, state, dtype="bf16")
    with pytest.raises(OptionError, match=r"is one file ending in .npz"):
        write(tmp_path / "x", config, state, "npz")
    with pytest.raises(OptionError, match="is a folder"):
        write(tmp_path / "x.npz", config, state, "hf")


def test_filler_rows_are_the_mean_and_only_they_can_be_cut(tmp_path, config, state):
    folder = write(tmp_path / "x", config, state, table_rows=1280)
    config_there, there = read(folder)
    table = there["text.embedding.weight"]
    assert (len(table), config_there.tokens.n_tokens) == (1280, 1200)
    assert torch.allclose(table[1216:], state["text.embedding.weight"].mean(0).expand(64, -1), atol=1e-6)
    with pytest.raises(ConfigError, match="would lose real tokens"):
        write(tmp_path / "y", config, state, table_rows=1199)


def test_two_conversions_of_the_same_weights_are_the_same_bytes(tmp_path, config, state):
    folder = write(tmp_path / "x", config, state)
    for name in ("a.npz", "b.npz"):
        convert(folder, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    for name in ("a", "b"):
        convert(tmp_path / "a.npz", tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_archive_carries_a_note_only_for_what_shapes_cannot_tell(tmp_path):
    config = as_npz_could_know(tiny_config(2, rows=1200))
    state = random_state(config)
    assert set(np.load(write(tmp_path / "a.npz", config, state, "npz")).files) == set(npz_arrays(config))
    other = tiny_config(2, rows=1200)
    extra = set(np.load(write(tmp_path / "b.npz", other, state, "npz")).files) - set(npz_arrays(config))
    assert extra == {"extra/paligemma_config"}
    assert read(tmp_path / "b.npz")[0] == other


def test_tokenizer_files_travel_with_a_folder(tmp_path, config, state):
    source = write(tmp_path / "a", config, state)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02")
    out = convert(source, tmp_path / "b")
    assert (out / "tokenizer.json").read_text() == "{}"
    assert {"config.json", "preprocessor_config.json"} <= names(out)
    assert "pytorch_model.bin" not in names(out)


@pytest.mark.parametrize("found_by", ["option", "name"])
def test_an_archive_and_its_sentencepiece_model_become_a_folder_with_a_tokenizer_that_transformers_reads(
    tmp_path, found_by
):
    write(tmp_path / "a.npz", CONFIG, dict(random_model().state_dict()), "npz")
    given = shutil.copy(TOKENIZER, tmp_path / ("pieces.model" if found_by == "option" else "gemma_tokenizer.model"))
    out = convert(tmp_path / "a.npz", tmp_path / "b", tokenizer=given if found_by == "option" else None)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    text = "detect caf\u00e9 <loc0012><seg003>\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == Tokenizer.from_file(out).encode(text)


def test_a_tokenizer_of_another_vocabulary_is_not_put_into_a_folder(tmp_path, config, state):
    source = write(tmp_path / "a", config, state)
    with pytest.raises(TokenizerError, match="does not fit the model"):
        convert(source, tmp_path / "b", tokenizer=TOKENIZER)
    assert not (tmp_path / "b").exists()


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path, config, state):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be created"):
        write(tmp_path / "file" / "x", config, state)
    assert os.listdir(tmp_path) == ["file"]


def test_a_choice_that_transformers_cannot_express_is_said_aloud(tmp_path):
    import dataclasses

    config = tiny_config(1)
    capped = dataclasses.replace(config, text=dataclasses.replace(config.text, final_logits_softcap=30.0))
    with pytest.warns(UserWarning, match=r"cannot express text\.final_logits_softcap=30\.0"):
        write(tmp_path / "x", capped, random_state(capped))
    assert read(tmp_path / "x")[0] == capped
