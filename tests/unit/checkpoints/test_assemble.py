"""Stage 0: raw parts of every format give one model, the same to the last bit; what does not fit is refused."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paligemma.checkpoints import assemble, read, save_assembly, verify, write
from paligemma.checkpoints.checkpoint import extend_rows
from paligemma.checkpoints.hugging_face import rules_for
from paligemma.checkpoints.rules import POSITIONS, TABLE, depth_of, native_shapes
from paligemma.cli.main import main
from paligemma.errors import OptionError, TokenizerError
from paligemma.models.posemb import resample_position_embedding
from paligemma.presets import PRESETS, RAW_GEMMA_ROWS, TINY
from paligemma.processing.tokenizer import Tokenizer
from tests import raw_parts as raw
from tests.checkpoint_cases import equal_states, npz_arrays, random_state, tiny_config
from tests.raw_parts import PIECES, ROWS, SIDE, TEXT, VISION, gemma, model, put_together, siglip

WORDS = Path(__file__).parents[2] / "golden" / "data" / "text_preprocessing" / "tokenizer.model"  # 512 pieces
GENERATIONS = pytest.mark.parametrize("generation", [1, 2])


@GENERATIONS
@pytest.mark.parametrize("kind", VISION)
def test_the_tower_is_the_same_whatever_it_comes_in(tmp_path, generation, kind):
    config, state = model(generation)
    (tmp_path / "v").mkdir()
    vision = VISION[kind](tmp_path / "v", config, state)
    got_config, got, _ = put_together(vision, gemma(tmp_path / "t", config, state))
    assert got_config.vision == config.vision
    tower = {name: tensor for name, tensor in state.items() if name.startswith("vision.")}
    assert equal_states({name: got[name] for name in tower}, tower)


@GENERATIONS
@pytest.mark.parametrize("kind", TEXT)
def test_the_decoder_is_the_same_whatever_it_comes_in(tmp_path, generation, kind):
    config, state = model(generation)
    (tmp_path / "t").mkdir()
    text = TEXT[kind](tmp_path / "t", config, state)
    got_config, got, _ = put_together(siglip(tmp_path / "v", config, state), text)
    assert got_config.tokens == config.tokens
    is_npz = str(text).endswith(".npz")
    scalar = config.text.head_dim if is_npz else config.text.query_pre_attn_scalar  # no shape tells it
    assert got_config.text == dataclasses.replace(config.text, query_pre_attn_scalar=scalar, sliding_window=None)
    assert {name: tuple(tensor.shape) for name, tensor in got.items()} == native_shapes(got_config)
    decoder = {n: t for n, t in state.items() if n.startswith("text.")}
    table = decoder.pop(TABLE)
    assert torch.equal(got[TABLE][:PIECES], table[:PIECES])
    assert equal_states({name: got[name] for name in decoder}, decoder)
    assert not got["projector.weight"].any()
    assert not got["projector.bias"].any()


@GENERATIONS
def test_int8_weights_are_multiplied_by_the_factor_of_their_row(tmp_path, generation):
    config, state = model(generation)
    tensors = raw.quantised(raw.gemma_pytorch_tensors(state, generation, PIECES))
    text = raw.folder_of(tmp_path / "t", tensors, raw.gemma_json(config, PIECES))
    _, got, _ = put_together(siglip(tmp_path / "v", config, state), text)
    for name, tensor in state.items():
        if name.startswith("text."):
            mine, theirs = (got[name][:PIECES], tensor[:PIECES]) if name == TABLE else (got[name], tensor)
            step = theirs.abs().amax(-1, keepdim=True) / 127
            assert mine.dtype == torch.float32
            assert ((mine - theirs).abs() <= step / 2 + 1e-6).all(), name
    fused = tensors["model.layers.1.self_attn.qkv_proj.weight"][-1].float()
    factor = tensors["model.layers.1.self_attn.qkv_proj.weight_scaler"][-1]
    assert torch.equal(got["text.blocks.1.attn.v.weight"][-1], fused * factor)


def test_a_sharded_decoder_is_read_through_its_index(tmp_path):
    config, state = model()
    tensors = raw.gemma_tensors(state, 2, PIECES)
    text = raw.folder_of(tmp_path / "t", tensors, raw.gemma_json(config, PIECES))
    (text / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        shard = f"model-0000{number + 1}-of-00002.safetensors"
        raw.folder_of(tmp_path / "x", {name: tensors[name] for name in names}, None)
        (tmp_path / "x" / "model.safetensors").rename(text / shard)
        weight_map |= dict.fromkeys(names, shard)
    (text / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, got, _ = put_together(siglip(tmp_path / "v", config, state), text)
    assert torch.equal(got["text.blocks.2.mlp.down.weight"], state["text.blocks.2.mlp.down.weight"])


def test_what_is_left_out_is_listed_with_its_reason(tmp_path):
    config, state = model()
    tensors = raw.gemma_tensors(state, 2, PIECES)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    text = raw.folder_of(tmp_path / "t", tensors, raw.gemma_json(config, PIECES))
    vision = raw.npz_of(tmp_path / "v.npz", raw.img_arrays(state, config, scanned=False))
    _, _, report = put_together(vision, text)
    dropped = {why: set(names) for why, names in report.dropped.items()}
    assert dropped == {
        "pooling head of the raw SigLIP tower, not used by PaliGemma": {"params/img/MAPHead_0/probe"},
        "text tower of the raw SigLIP model": {"params/txt/Encoder_0/x"},
        "temperature of the SigLIP loss": {"params/t"},
        "bias of the SigLIP loss": {"params/b"},
        "equal to the embedding table it is tied to": {"lm_head.weight"},
    }
    _, _, report = put_together(siglip(tmp_path / "v", config, state), text)
    assert {name for names in report.dropped.values() for name in names} == {*raw.siglip_extras(), "lm_head.weight"}
    whole = write(tmp_path / "whole", config, state)
    _, _, report = put_together(whole, text)
    (names,) = [names for why, names in report.dropped.items() if why.startswith("decoder and projector of a whole")]
    assert len(names) == sum(not name.startswith("vision.") for name in state)


def test_a_paligemma_gives_its_decoder_with_its_vocabulary(tmp_path):
    config, state = model()
    whole = write(tmp_path / "whole", config, state, table_rows=1216)
    got_config, got, report = put_together(siglip(tmp_path / "v", config, state), whole)
    assert (got_config.tokens, got_config.text.vocab_size) == (config.tokens, 1216)
    assert torch.equal(got[TABLE][:ROWS], state[TABLE])
    assert "as they were" in report.table


# ------------------------------------------------------------------------------------------------------- new numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_noise_that_big_vision_draws_in_the_dtype_of_the_table(tmp_path, dtype):
    config, state = model(dtype=dtype)
    vision, text = siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state)
    got = {seed: put_together(vision, text, seed=seed)[1][TABLE] for seed in (0, 1)}
    assert got[0].dtype == dtype
    assert torch.equal(got[0], extend_rows(state[TABLE][:PIECES], ROWS, seed=0))
    assert not torch.equal(got[0][PIECES:], got[1][PIECES:])
    new = got[0][PIECES:].float()
    assert abs(new.mean()) < 6 * 0.02 / new.numel() ** 0.5
    assert abs(new.std() / 0.02 - 1) < 0.02


def test_new_rows_may_be_the_mean_or_zero_instead(tmp_path):
    config, state = model()
    vision, text = siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state)
    mean = put_together(vision, text, init="mean")[1][TABLE]
    assert torch.allclose(mean[PIECES:], state[TABLE][:PIECES].mean(0).expand(ROWS - PIECES, -1), atol=1e-6)
    assert not put_together(vision, text, init="zeros")[1][TABLE][PIECES:].any()
    wide = put_together(vision, text, init_std=0.5)[1][TABLE][PIECES:]
    assert abs(wide.std() / 0.5 - 1) < 0.02


@pytest.mark.parametrize("rows", [256_000, 256_128])
def test_a_full_table_is_extended_behind_its_256_000_pieces(tmp_path, rows):
    config, state = model(1)
    arrays = raw.flax_arrays(state, config, PIECES)
    table = np.random.default_rng(0).standard_normal((rows, 20), dtype=np.float32)
    arrays["transformer/embedder/input_embedding"] = table
    got, tensors, report = put_together(siglip(tmp_path / "v", config, state), raw.npz_of(tmp_path / "t.npz", arrays))
    assert (got.tokens.n_tokens, got.tokens.loc_start, got.tokens.seg_start) == (257_152, 256_000, 257_024)
    assert tensors[TABLE].shape == (257_152, 20)
    assert torch.equal(tensors[TABLE][:256_000], torch.from_numpy(table[:256_000]))
    assert abs(tensors[TABLE][256_000:].std() / 0.02 - 1) < 0.02
    assert "256,000 of the text part, 1,152 drawn with mean 0 and std 0.02 (seed 0)" in report.table


def test_positions_of_another_picture_side_are_resampled(tmp_path):
    config = tiny_config(2, rows=ROWS, resolution=384)
    state = random_state(config)
    arrays = raw.img_arrays(state, config, scanned=False)
    vision = raw.npz_of(tmp_path / "v.npz", arrays)
    text = gemma(tmp_path / "t", config, state)
    for resolution, grid in ((None, 16), (448, 32)):
        got_config, got, report = put_together(vision, text, resolution=resolution)
        assert got_config.vision.resolution == (resolution or 224)
        assert torch.equal(got[POSITIONS], resample_position_embedding(state[POSITIONS], grid))
        assert report.positions == f"{grid} x {grid}, resampled from 27 x 27"
    _, got, report = put_together(vision, text, resolution=384)
    assert torch.equal(got[POSITIONS], state[POSITIONS])


def test_the_projector_may_be_drawn(tmp_path):
    config, state = model()
    vision, text = siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state)
    drawn = put_together(vision, text, projector="normal")[1]
    assert abs(drawn["projector.weight"].std() * 12**0.5 - 1) < 0.2
    assert not drawn["projector.bias"].any()
    assert torch.equal(drawn["projector.weight"], put_together(vision, text, projector="normal")[1]["projector.weight"])


def test_choices_of_the_result_are_those_asked_for(tmp_path):
    config, state = model()
    vision, text = siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state)
    got = put_together(
        vision, text, softcaps=(None, 20.0), sliding_window=64, resize="bv_bilinear", vocab_size=1300,
        dtype="bfloat16",
    )  # fmt: skip
    assert (got[0].text.attn_logits_softcap, got[0].text.final_logits_softcap) == (None, 20.0)
    assert (got[0].text.sliding_window, got[0].processing.resize) == (64, "bv_bilinear")
    assert (got[0].tokens.n_tokens, got[0].tokens.loc_start, got[0].tokens.image) == (1300, PIECES, 1300)
    assert got[1][TABLE].shape[0] == 1300
    assert {tensor.dtype for tensor in got[1].values()} == {torch.bfloat16}


def test_a_preset_stands_in_for_config_files_and_gives_its_choices(tmp_path):
    state = random_state(TINY)
    n_pieces = TINY.tokens.loc_start
    vision = raw.folder_of(tmp_path / "v", raw.tower_tensors(state), None)
    text = raw.folder_of(tmp_path / "t", raw.gemma_tensors(state, 2, n_pieces), None)
    config, got = assemble(vision, text, preset="tiny")
    with got:
        assert config == TINY
        assert torch.equal(got["vision.blocks.5.attn.q.weight"], state["vision.blocks.5.attn.q.weight"])
    config, got = assemble(vision, text, vision_preset="tiny", text_preset=TINY.text, resolution=112)
    got.close()
    assert (config.vision, config.text) == (TINY.vision, TINY.text)
    for part, hint in ((vision, "--vision-preset"), (text, "--text-preset")):
        with pytest.raises(OptionError, match=f"no config.json tells the number of heads.*{hint}"):
            assemble(part, text, text_preset="tiny") if part is vision else assemble(vision, part, vision_preset="tiny")


def test_published_sizes_are_recognised_without_a_config_json(tmp_path):
    """Files with the names and shapes of the originals and no data in them: holes, which take no room on the disk."""
    sizes = {"gemma-2b": "paligemma-3b", "gemma-2-2b": "paligemma2-3b", "gemma-2-9b": "paligemma2-10b",
             "gemma-2-27b": "paligemma2-28b"}  # fmt: skip
    for text_name, name in sizes.items():
        config = PRESETS[f"{name}-224"]
        shapes = {rule.native.format(i=i): rule.foreign.format(i=i) for rule in rules_for(config.text.post_norms)
                  for i in range(depth_of(rule.native, config))}  # fmt: skip
        native = native_shapes(config) | {TABLE: (RAW_GEMMA_ROWS, config.text.width)}
        vision = {n.replace("vision_tower", "vision_model"): native[k] for k, n in shapes.items() if "vision" in k}
        text = {n.replace("language_", ""): native[k] for k, n in shapes.items() if k.startswith("text.")}
        got, state = assemble(hollow(tmp_path / "v.safetensors", vision), hollow(tmp_path / "t.safetensors", text))
        state.close()
        assert got == config, text_name


def hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape)
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    os.truncate(path, 8 + len(data) + end)
    return path


# ------------------------------------------------------------------------------------------- files and command line


def run(capsys, *words) -> tuple[int, str, str]:
    status = main(["checkpoint", "assemble", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


@GENERATIONS
def test_an_archive_has_exactly_the_names_shapes_and_dtypes_of_the_original(tmp_path, capsys, generation):
    config, state = model(generation)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, query_pre_attn_scalar=6))
    parts = "--vision", siglip(tmp_path / "v", config, state), "--text", gemma(tmp_path / "t", config, state)
    expected = npz_arrays(config)
    for dtype, kind in (("float32", "<f4"), ("bfloat16", "|V2"), ("float16", "<f2")):
        out = tmp_path / f"{dtype}.npz"
        status, _, _ = run(capsys, *parts, "--out", out, "--resolution", SIDE, "--dtype", dtype)
        assert status == 0
        with np.load(out) as archive:
            assert {n: (archive[n].shape, archive[n].dtype.str) for n in archive.files} == {
                n: (array.shape, kind) for n, array in expected.items()
            }
    assert equal_states(read(tmp_path / "bfloat16.npz")[1], read(tmp_path / "float32.npz", dtype="bfloat16")[1])


def test_the_command_writes_a_folder_that_loads_and_speaks(tmp_path, capsys):
    import paligemma

    config = dataclasses.replace(
        tiny_config(2, rows=1664), tokens=dataclasses.replace(
            TINY.tokens, n_tokens=1664, loc_start=512, seg_start=1536, image=1664
        ),
    )  # fmt: skip
    state = random_state(config)
    text = gemma(tmp_path / "t", config, state, 512)
    (text / "tokenizer.model").write_bytes(WORDS.read_bytes())
    words = ("--vision", siglip(tmp_path / "v", config, state), "--text", text, "--resolution", 56)
    status, out, err = run(capsys, *words, "--out", tmp_path / "out")
    assert (status, out.strip()) == (0, str(tmp_path / "out"))
    assert "resampled from 3 x 3" in err
    assert "1,152 drawn with mean 0 and std 0.02 (seed 0)" in err
    assert "text tower of the raw SigLIP model" in err
    assert verify(tmp_path / "out").is_sound
    tokenizer = Tokenizer.from_file(tmp_path / "out")
    assert tokenizer.encode("<loc0000><seg127>") == [512, 1663]
    answer = paligemma.load(tmp_path / "out").caption(np.zeros((56, 56, 3), np.uint8), max_new_tokens=3)
    assert isinstance(answer.text, str)
    status, _, err = run(capsys, *words, "--out", tmp_path / "out")
    assert (status, "--overwrite" in err) == (2, True)
    status, out, _ = run(capsys, *words, "--out", tmp_path / "out", "--overwrite", "--json", "--seed", 3)
    told = json.loads(out)
    assert told["out"] == str(tmp_path / "out")
    assert "(seed 3)" in told["table"]
    assert "logit_bias" in told["dropped"]["bias of the SigLIP loss"]
    assert "1,664 tokens" in told["tokenizer"]


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    config, state = model()
    vision, text = siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state)
    status, out, err = run(capsys, "--vision", text, "--text", vision, "--out", tmp_path / "out")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "Swap the two" in err
    status, _, err = run(capsys, "--vision", vision, "--text", text, "--out", tmp_path / "out", "--init", "meen")
    assert (status, "Did you mean 'mean'" in err) == (2, True)
    (text / "tokenizer.model").write_bytes(WORDS.read_bytes())
    status, _, err = run(capsys, "--vision", vision, "--text", text, "--out", tmp_path / "out")
    assert (status, "does not fit the model" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_may_be_named_and_one_that_fails_leaves_nothing(tmp_path):
    config = dataclasses.replace(
        tiny_config(1, rows=1664),
        tokens=dataclasses.replace(TINY.tokens, n_tokens=1664, loc_start=512, seg_start=1536, image=1664),
    )
    state = random_state(config)
    got_config, got = assemble(
        siglip(tmp_path / "v", config, state), gemma(tmp_path / "t", config, state, 512), resolution=SIDE
    )
    with got:
        assert "give --tokenizer" in save_assembly(tmp_path / "without", got_config, got).tokenizer
        report = save_assembly(tmp_path / "with", got_config, got, tokenizer=WORDS)
        assert report.tokenizer == f"{WORDS}, 1,664 tokens"
        with pytest.raises(TokenizerError):
            save_assembly(tmp_path / "none", got_config, got, tokenizer=tmp_path / "nowhere")
    assert {p.name for p in (tmp_path / "with").iterdir()} >= {
        "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors",
    }  # fmt: skip
    assert not (tmp_path / "none").exists()
    assert read(tmp_path / "with")[0].tokens == got_config.tokens


CHILD = """
import json, resource, sys
import torch
from paligemma.checkpoints import assemble, save_assembly

vision, text, target, budget = json.loads(sys.argv[1])
torch.set_num_threads(1)
config, state = assemble(vision, text, resolution=42)
state["vision.final_norm.bias"], state["text.final_norm.scale"]  # imports and buffers of the first use
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + budget
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
save_assembly(target, config, state)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: /proc and RLIMIT_DATA")
def test_assembling_holds_a_tensor_and_never_the_weights(tmp_path):
    config = dataclasses.replace(
        tiny_config(1, rows=ROWS),
        text=dataclasses.replace(tiny_config(1).text, vocab_size=ROWS, width=256, mlp_dim=8192, depth=8),
    )
    state = random_state(config)
    text = raw.npz_of(tmp_path / "t.npz", raw.flax_arrays(state, config, PIECES))
    weights, largest, allowance = sum(t.nbytes for t in state.values()), 8 << 20, 64 << 20
    assert weights > 2 * (largest + allowance)
    words = json.dumps(
        [str(siglip(tmp_path / "v", config, state)), str(text), str(tmp_path / "out"), largest + allowance]
    )
    done = subprocess.run(
        [sys.executable, "-c", CHILD, words], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-600:]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > weights
