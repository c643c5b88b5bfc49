"""What cannot become one model is refused in one line that says what to do, with the command where one converts it."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paligemma.checkpoints import assemble, save_assembly, write
from paligemma.errors import CheckpointError, ConfigError, OptionError, PickleRefused
from tests import raw_parts as raw
from tests.raw_parts import PIECES, SIDE, gemma, model, put_together, siglip


def test_parts_in_each_others_place_are_told_apart(tmp_path):
    config, state = model()
    vision = {"hf": siglip(tmp_path / "v", config, state),
              "npz": raw.npz_of(tmp_path / "v.npz", raw.img_arrays(state, config, scanned=False))}  # fmt: skip
    text = {"hf": gemma(tmp_path / "t", config, state),
            "npz": raw.npz_of(tmp_path / "t.npz", raw.flax_arrays(state, config, PIECES))}  # fmt: skip
    for kind in ("hf", "npz"):
        with pytest.raises(CheckpointError, match=r"holds a text decoder \(Gemma\) and no image tower.*Swap the two"):
            assemble(text[kind], text["hf"])
        with pytest.raises(CheckpointError, match=r"holds an image tower \(SigLIP\) and no text decoder.*Swap the two"):
            assemble(vision["hf"], vision[kind])


def test_pickles_are_refused_with_a_command_that_converts_them(tmp_path):
    config, state = model()
    vision = siglip(tmp_path / "v", config, state)
    tensors = raw.gemma_pytorch_tensors(state, 2, PIECES)
    (tmp_path / "t").mkdir()
    torch.save({"model_state_dict": tensors}, tmp_path / "t" / "gemma.ckpt")
    for path in (tmp_path / "t" / "gemma.ckpt", tmp_path / "t"):
        with pytest.raises(PickleRefused, match="It was not opened") as caught:
            assemble(vision, path)
        assert "\n" not in str(caught.value)
    run_command_in(caught.value)
    preset = dataclasses.replace(config.text, vocab_size=PIECES)
    _, got, _ = put_together(vision, tmp_path / "t" / "gemma.safetensors", text_preset=preset)
    assert torch.equal(got["text.blocks.0.attn.k.weight"], state["text.blocks.0.attn.k.weight"])


def test_a_lone_pickle_beside_a_config_json_and_under_a_path_with_spaces_is_converted_too(tmp_path):
    config, state = model()
    vision, folder = siglip(tmp_path / "v", config, state), tmp_path / "my models"
    folder.mkdir()
    torch.save({"model_state_dict": raw.gemma_pytorch_tensors(state, 2, PIECES)}, folder / "gemma.ckpt")
    (folder / "config.json").write_text(json.dumps(raw.gemma_json(config, PIECES)))
    with pytest.raises(PickleRefused) as caught:
        assemble(vision, folder)
    run_command_in(caught.value)
    _, got, _ = put_together(vision, folder / "gemma.safetensors")
    assert torch.equal(got["text.blocks.0.attn.k.weight"], state["text.blocks.0.attn.k.weight"])


def test_a_result_never_takes_the_place_of_its_parts(tmp_path):
    config, state = model()
    vision, text = siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state)
    file = text / "model.safetensors"
    for source, target in ((text, text), (file, text), (text, tmp_path / "v")):
        got_config, got = assemble(vision, source, resolution=SIDE)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with got, pytest.raises(CheckpointError, match="a part of it: expected another place"):
            save_assembly(target, got_config, got, overwrite=True)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "SHA256SUMS"])
def test_a_name_that_is_taken_is_said_before_anything_is_written(tmp_path, name, monkeypatch):
    config, state = model()
    vision, text = siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    got_config, got = assemble(vision, text, resolution=SIDE)
    done: list[int] = []
    with got, pytest.raises(CheckpointError, match=f"{name} exists already"):
        save_assembly(tmp_path / "out", got_config, got, progress=lambda n, _: done.append(n))
    assert not done


@pytest.mark.parametrize("seed", [-1, 2**32, True])
def test_a_seed_that_no_generator_takes_is_refused_at_once(tmp_path, seed):
    with pytest.raises(OptionError, match="expected a whole number from 0"):
        assemble(tmp_path, tmp_path, seed=seed)


def test_a_half_that_an_archive_was_not_asked_for_is_missed(tmp_path):
    config, state = model()
    whole = write(tmp_path / "whole.npz", config, state, "npz")
    text = gemma(tmp_path / "t", config, state)
    with pytest.raises(CheckpointError):
        assemble(f"{whole}:llm", text)
    with pytest.raises(CheckpointError):
        assemble(siglip(tmp_path / "v", config, state), f"{whole}:img")


def test_shards_of_gemma_pytorch_are_refused_with_a_command_of_their_own(tmp_path):
    config, state = model()
    vision = siglip(tmp_path / "v", config, state)
    tensors = raw.gemma_pytorch_tensors(state, 2, PIECES)
    folder = tmp_path / "t"
    folder.mkdir()
    for number in (0, 1):
        torch.save({n: tensors[n] for n in sorted(tensors)[number::2]}, folder / f"pytorch_model-{number}.bin")
    index = {"weight_map": dict.fromkeys(tensors, "x")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    with pytest.raises(PickleRefused) as caught:
        assemble(vision, folder)
    run_command_in(caught.value)
    _, got, _ = put_together(vision, f"{folder}.safetensors", text_preset=config.text)
    assert torch.equal(got["text.blocks.2.attn.v.weight"], state["text.blocks.2.attn.v.weight"])


def run_command_in(error: PickleRefused) -> None:
    words = shlex.split(str(error).split("convert it: " if "convert it: " in str(error) else "convert them: ")[1])
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_orbax_folders_are_refused_with_the_command_that_converts_them(tmp_path, name, depth):
    config, state = model()
    folder = tmp_path / "2b it" if depth else tmp_path / "flax"
    folder.mkdir()
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"an Orbax \(tensorstore\) checkpoint.*PyTreeCheckpointer") as caught:
        assemble(siglip(tmp_path / "v" / "v", config, state), folder)
    words = shlex.split(str(caught.value).split("installed: ")[1])
    assert words[-2:] == [str(folder), f"{folder}.npz"]
    compile(words[2], "command", "exec")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_the_original_trainer_is_refused_with_its_own_command(tmp_path):
    config, state = model()
    (tmp_path / "run" / "checkpoint.bv-000000010" / "params~img~head~bias").mkdir(parents=True)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoint.bv-000000010"):
        with pytest.raises(CheckpointError, match=r"tensorstore checkpoint of big_vision.*u\.tsload") as caught:
            assemble(path, gemma(tmp_path / "t", config, state))
        compile(shlex.split(str(caught.value).split("installed: ")[1])[2], "command", "exec")


def test_a_vocabulary_never_shrinks(tmp_path):
    config, state = model()
    vision, text = siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state)
    with pytest.raises(ConfigError, match=r"vocab_size=1199.*expected at least 1200. Vocabularies can only be ext"):
        assemble(vision, text, vocab_size=1199)
    whole = write(tmp_path / "whole", config, state, table_rows=1216)
    with pytest.raises(ConfigError, match="vocab_size=1199"):
        assemble(vision, whole, vocab_size=1199)
    assert put_together(vision, whole, vocab_size=1201)[0].tokens.image == 1201


def test_configuration_and_weights_that_disagree_are_refused(tmp_path):
    config, state = model()
    vision, text = siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state)
    with pytest.raises(ConfigError, match="hidden_size=24 disagrees with the weights, which have 20"):
        assemble(vision, gemma(tmp_path / "t2", config, state, hidden_size=24))
    wide = raw.siglip_json(config)
    wide["vision_config"]["intermediate_size"] = 4096
    with pytest.raises(ConfigError, match="intermediate_size=4096 disagrees with the weights, which have 28"):
        assemble(siglip(tmp_path / "v2", config, state, **wide), text)
    with pytest.raises(ConfigError, match=r"model_type='gemma3_text': expected one of gemma, gemma2"):
        assemble(vision, gemma(tmp_path / "t3", config, state, model_type="gemma3_text"))
    with pytest.raises(CheckpointError, match="has shape"):
        assemble(vision, text, text_preset="gemma-2-2b")
    with pytest.raises(ConfigError, match=r"preset='tiny': its vision\.width is 192, the vision part has 12"):
        put_together(vision, text, preset="tiny", vision_preset=config.vision, text_preset=config.text)
    other = dict(state)
    other["text.blocks.1.mlp.down.weight"] = torch.zeros(21, 44)
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.down_proj.weight has shape \[21, 44\]: expected \[20, 44\]"
    ):
        assemble(vision, gemma(tmp_path / "t4", config, other))


@pytest.mark.parametrize(
    "lost", ["model.layers.0.mlp.gate_proj.weight", "model.layers.2.self_attn.o_proj.weight", "model.norm.weight"]
)
def test_a_missing_tensor_is_named(tmp_path, lost):
    config, state = model()
    tensors = raw.gemma_tensors(state, 2, PIECES)
    del tensors[lost]
    text = raw.folder_of(tmp_path / "t", tensors, raw.gemma_json(config, PIECES))
    with pytest.raises(CheckpointError, match=f"{lost.removeprefix('model.')} is missing"):
        assemble(siglip(tmp_path / "v", config, state), text)


@pytest.mark.parametrize("lost", ["mlp/linear", "attn/q_einsum/w"])
def test_a_missing_array_is_named(tmp_path, lost):
    config, state = model()
    arrays = raw.flax_arrays(state, config, PIECES)
    del arrays[f"transformer/layer_1/{lost}"]
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        assemble(siglip(tmp_path / "v", config, state), raw.npz_of(tmp_path / "t.npz", arrays))


def test_tensors_that_nobody_knows_are_refused_unless_told_otherwise(tmp_path):
    config, state = model()
    tensors = raw.gemma_tensors(state, 2, PIECES) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(3)}
    text = raw.folder_of(tmp_path / "t", tensors, raw.gemma_json(config, PIECES))
    vision = siglip(tmp_path / "v", config, state)
    with pytest.raises(CheckpointError, match=r"1 tensors have no place.*q_norm"):
        assemble(vision, text)
    _, _, report = put_together(vision, text, strict=False)
    assert ("model.layers.0.self_attn.q_norm.weight",) in report.dropped.values()
    tensors = {n: (t.to(torch.int8) if "o_proj" in n else t) for n, t in raw.gemma_tensors(state, 2, PIECES).items()}
    with pytest.raises(CheckpointError, match=r"o_proj.weight holds torch.int8 without a scaler"):
        assemble(vision, raw.folder_of(tmp_path / "t", tensors, raw.gemma_json(config, PIECES)))


def test_unknown_words_are_answered_with_the_nearest(tmp_path):
    for choice, hint in (
        ({"init": "norml"}, "'normal'"), ({"projector": "zero"}, "'zeros'"), ({"preset": "tinyy"}, "'tiny'"),
        ({"dtype": "bfloat"}, "'bfloat16'"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=f"Did you mean {hint}"):
            assemble(tmp_path, tmp_path, **choice)
    with pytest.raises(OptionError, match="Did you mean 'gemma-2-2b'"):
        assemble(*model_paths(tmp_path), text_preset="gemma-2-2bb")
    with pytest.raises(OptionError, match="init_std=0"):
        assemble(tmp_path, tmp_path, init_std=0)


def model_paths(tmp_path: Path) -> tuple[Path, Path]:
    config, state = model()
    return siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state)


def test_a_value_beyond_float16_is_refused(tmp_path):
    config, state = model()
    state["text.blocks.0.mlp.up.weight"][0, 0] = 70_000
    got_config, got = assemble(
        siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state), resolution=SIDE, dtype="float16"
    )
    with got, pytest.raises(CheckpointError, match=r"up_proj.weight, rounded to float16.*1 Inf"):
        save_assembly(tmp_path / "out", got_config, got)
    assert not (tmp_path / "out").exists()
