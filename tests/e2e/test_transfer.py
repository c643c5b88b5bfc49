"""`paligemma train transfer`: one command from a folder to a tuned model, through the real command line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import paligemma
from paligemma.checkpoints import read
from paligemma.cli.main import main

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 20, 30), "green": (40, 160, 50), "blue": (30, 70, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain pictures of one colour each, under names that tiny has never heard."""
    where = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    words = {"red": "zoo", "green": "yes", "blue": "no"}
    for split, n in (("train", 24), ("valid", 9)):
        rows = []
        for i in range(n):
            name = list(COLOURS)[i % 3]
            pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-15, 16, (30, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(where / f"{split}-{i}.png")
            rows.append({"image": f"{split}-{i}.png", "prefix": "answer en which word?", "suffix": words[name]})
        (where / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where


def train(folder: Path, out: Path, *more: str) -> int:
    return main(
        ["train", "transfer", "--data", str(folder), "--out", str(out), "--device", "cpu", "--json", *more]
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "frozen"])
def test_a_folder_becomes_a_model_that_answers_its_rows(folder, tmp_path, capsys, method):
    assert train(folder, tmp_path / "run", "--method", method, "--steps", "80") == 0
    out, err = capsys.readouterr()
    scores = json.loads(out)["scores"]
    assert scores["answer"]["exact match"] >= 0.9
    assert "24 examples to learn, 9 held out (the valid split)" in err
    run = tmp_path / "run"
    assert {"config.yaml", "log.jsonl", "README.md", "curves.png", "scores.json", "predictions.jsonl"} <= {
        path.name for path in run.iterdir()
    }
    card = (run / "README.md").read_text()
    assert "| answer: exact match |" in card
    Image.open(run / "curves.png").load()
    page = Image.open(run / "samples" / "step-000080.png").convert("RGB")
    assert min(page.size) > 400
    assert len(page.getcolors(1 << 24) or ()) > 50  # pictures, strips and words
    pg = paligemma.load(run / "model")
    assert pg.answer(folder / "valid-0.png", "which word?").text == "zoo"
    if method == "lora":
        tuned = paligemma.load("tiny", adapter=run / "adapter")
        for name, value in tuned.model.state_dict().items():
            torch.testing.assert_close(pg.model.state_dict()[name], value, atol=1e-3, rtol=1e-2, msg=name)
    # Scored again from its folder, it scores the same.
    assert main(["eval", str(folder), "--model", str(run / "model"), "--split", "valid", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["answer"] == scores["answer"]


def test_of_a_lone_split_the_rows_are_scored_that_a_run_holds_out(folder, tmp_path, capsys):
    for file in folder.glob("train*"):
        shutil.copy(file, tmp_path)
    run = tmp_path / "run"
    assert train(tmp_path, run, "--steps", "1", "--set", "samples=0") == 0
    asked = [json.loads(line)["where"] for line in (run / "predictions.jsonl").read_text().splitlines()]
    for words, n in (([], len(asked)), (["--split", "train"], 24)):
        out = tmp_path / "answers.jsonl"
        assert main(["eval", str(tmp_path), "--predictions", str(out), *words]) == 0
        found = [json.loads(line)["where"] for line in out.read_text().splitlines()]
        assert len(found) == n
        assert words or found == asked
    assert 1 <= len(asked) < 10
    assert "held out of train" in capsys.readouterr().err


@pytest.mark.slow
def test_the_result_loads_in_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert train(folder, tmp_path / "run", "--method", "full", "--steps", "2") == 0
    model, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.num_parameters() > 1e6


@pytest.mark.slow
def test_a_base_in_four_bits_is_tuned_and_merged(folder, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    run = tmp_path / "run"
    assert train(folder, run, "--method", "qlora", "--steps", "80") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["answer"]["exact match"] >= 0.9
    # Merged into the file's own weights, not into their four bits.
    config, merged = read(run / "model")
    _, base = read(Path(paligemma.__file__).parent / "assets" / "tiny")
    # The table may have gained filler rows.
    same = {name for name in base if torch.equal(base[name].float(), merged[name][: len(base[name])].float())}
    assert [name for name in set(base) - same if "text.blocks" not in name] == []
    assert any("mlp" in name for name in set(base) - same)
    assert config.text.depth > 0


@pytest.mark.slow
def test_choices_stand_in_the_result_and_weights_of_tasks_change_the_loss(folder, tmp_path):
    words = ["--method", "full", "--steps", "2", "--lr", "1e-3", "--set", "samples=0"]
    assert train(folder, tmp_path / "plain", *words) == 0
    assert train(folder, tmp_path / "heavy", *words, "--set", "task_weights=[[answer, 3.0]]") == 0
    first = {
        run: json.loads(next(line for line in (tmp_path / run / "log.jsonl").open() if '"kind": "step"' in line))
        for run in ("plain", "heavy")
    }
    assert first["heavy"]["loss"] == pytest.approx(3 * first["plain"]["loss"], rel=1e-5)
    assert not (tmp_path / "plain" / "samples").exists()
    choice = ["--set", "choices=[[final_logits_softcap, null]]"]
    assert train(folder, tmp_path / "chosen", *words, *choice) == 0
    before = paligemma.load("tiny").config.text.final_logits_softcap
    assert before is not None
    assert paligemma.load(tmp_path / "chosen" / "model").config.text.final_logits_softcap is None


@pytest.mark.slow
def test_a_run_goes_on_in_the_way_it_was_begun_whatever_memory_is_left(folder, tmp_path, capsys, monkeypatch):
    words = ["--lr", "1e-3", "--set", "samples=0"]
    assert train(folder, tmp_path / "run", "--method", "auto", "--steps", "2", *words) == 0
    assert "Method: full" in capsys.readouterr().err
    monkeypatch.setattr("paligemma.recipes.memory.available_bytes", lambda _device: 1.0)
    assert train(folder, tmp_path / "run", "--method", "auto", "--steps", "2", *words) == 0
    err = capsys.readouterr().err
    assert "Method: full; as it was begun" in err
    assert "going on from step 2" in err
    assert train(folder, tmp_path / "other", "--method", "auto", "--steps", "1", *words) == 0
    assert "Method: qlora" in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipe_that_was_saved_does_the_same_again(folder, tmp_path):
    assert train(folder, tmp_path / "a", "--method", "full", "--steps", "3", "--set", "fit.dropout=0.1") == 0
    assert main(["train", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")]) == 0
    (_, a), (_, b) = (read(tmp_path / name / "model") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


KILLS = 3
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def command_line(folder: Path, out: Path, *options: str) -> list[str]:
    words = ["train", "transfer", "--data", str(folder), "--out", str(out), "--device", "cpu", *options]
    return [sys.executable, "-m", "paligemma", *words]


def read_until(process: subprocess.Popen, wanted: bytes) -> None:
    """Block until the process has written this to stderr."""
    seen = b""
    while wanted not in seen:
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, f"ended before it wrote {wanted!r}: {seen[-500:]!r}"
        seen += chunk


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_an_undisturbed_one(folder, tmp_path):
    kill_often(folder, tmp_path, KILLS, seed=0)


@pytest.mark.soak
def test_a_run_that_is_killed_twenty_times_loses_nothing(folder, tmp_path):
    kill_often(folder, tmp_path, 20, seed=int(time.time()))


def kill_often(folder: Path, tmp_path: Path, n_kills: int, seed: int) -> None:
    """SIGKILL at random moments, while saving too: a snapshot is written at every step."""
    n_steps = 8 * n_kills
    options = ["--method", "full", "--steps", str(n_steps), "--set", "fit.save_every=1", "--set", "fit.dropout=0.1"]
    options += ["--set", "samples=0"]
    assert train(folder, tmp_path / "whole", *options) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    first, *_, last = (row["time"] for row in rows if row["kind"] == "step")
    # On average half of this, so that the run outlives the killings on a machine that grows four times as fast too.
    life = (last - first) / n_kills / 2
    command = command_line(folder, tmp_path / "killed", *options)
    chance, killed, log = random.Random(seed), 0, tmp_path / "killed" / "log.jsonl"
    while killed < n_kills:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=ENV)
        read_until(process, b"step")  # the bar of the loop: earlier there is nothing to lose
        try:
            process.wait(timeout=chance.uniform(0, life))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.stderr.close()
        if process.wait() != -signal.SIGKILL:
            break  # it got through before it could be killed
        killed += 1
    assert killed == n_kills
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (_, whole), (_, found) = (read(tmp_path / name / "model") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    rows = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"kind": "step"' in line]
    assert rows == list(range(1, n_steps + 1))


@pytest.mark.slow
def test_sigterm_saves_and_leaves(folder, tmp_path):
    command = command_line(folder, tmp_path / "run", "--method", "full", "--steps", "100000")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=ENV)
    read_until(process, b"2/100000")
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait() == 0
    assert b"the same command goes on" in rest
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "transfr", "--data", "x"], "Did you mean 'transfer'"),
        (["train", "transfer"], "expected --data with a folder or file"),
        (["train", "transfer", "--data", "nowhere"], "no such file or folder"),
        (["train", "transfer", "--data", "x", "--set", "optim.lrr=1"], "Did you mean 'optim.lr'"),
        (["train", "transfer", "--data", "x", "--set", "epochs"], "expected NAME=VALUE"),
        (["train", "missing.yaml"], "no such file"),
        (["eval", "nowhere"], "no suite and no folder"),
    ],
)
def test_mistakes_are_answered_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_recipe_can_be_looked_at(capsys):
    assert main(["train", "transfer", "--data", "x", "--show", "--set", "optim.clip_norm=none"]) == 0
    out = capsys.readouterr().out
    assert "clip_norm: null" in out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_that_share_the_weights_tune_the_model_that_one_does(folder, tmp_path, method):
    words = ["--method", method, "--steps", "6", "--lr", "1e-3", "--set", "loader.batch_size=6", "--device", "cpu"]
    assert train(folder, tmp_path / "one", *words) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "paligemma"]
    command += ["train", "transfer", "--data", str(folder), "--out", str(tmp_path / "two"), *words]
    command += ["--set", "strategy=fsdp"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, fsdp" in done.stderr
    assert (tmp_path / "two" / "checkpoints" / "step-000006" / "shards").is_dir()
    one, two = (json.loads((tmp_path / run / "scores.json").read_text()) for run in ("one", "two"))
    assert one == two
    rows = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("one", "two")
    ]
    kinds = [[row["kind"] for row in run] for run in rows]
    assert kinds[0] == kinds[1] == ["before", *["step"] * 6, "validation"]
    for ours, theirs in zip(*(run[1:] for run in rows), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    if method == "lora":
        assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").exists()
