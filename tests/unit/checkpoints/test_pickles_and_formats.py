"""Formats are judged by content; pickles are recognised, refused unopened, and converted by the command we name."""

import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from paligemma.checkpoints import identify, read, verify, write
from paligemma.errors import CheckpointError, PickleRefused
from tests.checkpoint_cases import equal_states, hf_folder, hf_tensors, random_state, tiny_config


class Bomb:
    """Fails the test when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "gemma.ckpt", "model.pt", "model.pth", "innocent.npz"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_refused_unopened_under_any_name(tmp_path, name, legacy):
    torch.save({"x": Bomb()}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    assert identify(tmp_path / name) == "pickle"
    for use in (read, verify):
        with pytest.raises(PickleRefused, match="It was not opened") as caught:
            use(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_folder_of_pickles_alone_is_refused(tmp_path):
    torch.save({"x": Bomb()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert identify(tmp_path) == "pickle"
    with pytest.raises(PickleRefused, match=r"from_pretrained\(sys\.argv\[1\]\)\.save_pretrained"):
        read(tmp_path)


def command_in(error: PickleRefused) -> list[str]:
    words = shlex.split(str(error).split("convert it: ")[1])
    assert words[0] == "python"
    return [sys.executable, *words[1:]]


def test_the_command_for_a_file_converts_it(tmp_path):
    config = tiny_config(2)
    state = random_state(config)
    folder = hf_folder(tmp_path / "x", config, hf_tensors(state, 2))
    (folder / "model.safetensors").unlink()
    tensors = hf_tensors(state, 2)
    tensors["lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]  # shares its memory
    torch.save(tensors, folder / "model.bin")
    with pytest.raises(PickleRefused) as caught:
        read(folder / "model.bin")
    subprocess.run(command_in(caught.value), check=True, capture_output=True)
    assert equal_states(read(folder)[1], state)


def test_the_command_for_a_folder_converts_it(tmp_path):
    pytest.importorskip("transformers")
    config = tiny_config(1)
    state = random_state(config)
    folder = write(tmp_path / "x", config, state)
    torch.save(hf_tensors(state, 1), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PickleRefused) as caught:
        read(folder)
    subprocess.run(command_in(caught.value), check=True, capture_output=True)
    assert equal_states(read(f"{folder}-safetensors")[1], state)


def test_weights_under_a_pickles_name_are_recognised(tmp_path):
    config = tiny_config(1)
    folder = write(tmp_path / "x", config, random_state(config))
    (folder / "model.safetensors").rename(folder / "weights.bin")
    assert identify(folder / "weights.bin") == "hf"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a checkpoint this package knows.*Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "not a checkpoint this package knows"),
        (b"GGUF\x03\0\0\0\0\0", "GGUF"),
        (b"\x89HDF\r\n\x1a\n\0\0", "HDF5"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, message):
    path = tmp_path / "model.safetensors.tmp"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        identify(path)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        identify(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no weights inside"):
        identify(tmp_path)
    (tmp_path / "checkpoint.bv-000001").mkdir()
    with pytest.raises(CheckpointError, match="tensorstore"):
        identify(tmp_path)


def test_a_folder_with_one_archive_is_that_archive(tmp_path):
    config = tiny_config(1, rows=1200)
    state = random_state(config)
    write(tmp_path / "a.npz", config, state, "npz")
    assert identify(tmp_path) == "npz"
    assert equal_states(read(tmp_path)[1], state)
    (tmp_path / "vae-oid.npz").write_bytes(b"PK\x03\x04")  # a mask decoder beside the weights is no second archive
    assert equal_states(read(tmp_path)[1], state)
    write(tmp_path / "b.npz", config, state, "npz")
    with pytest.raises(CheckpointError, match=r"holds 2 \.npz archives"):
        read(tmp_path)


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert identify(tmp_path) == "adapter"
    with pytest.raises(CheckpointError, match="a LoRA adapter, not a model"):
        read(tmp_path)


def test_looking_at_a_zip_reads_its_directory_alone(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"not even a pickle")
    assert identify(Path(path)) == "pickle"
