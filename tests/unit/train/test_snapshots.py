"""Snapshots: whole or not at all, checked when read, the last and the best kept."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paligemma.errors import TrainingError
from paligemma.train import snapshots as module
from paligemma.train.snapshots import Snapshots

ROOT = Path(__file__).parents[3]


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((3, 2), value)}, "optimizer": {"w/step": torch.tensor(value)}}


def test_what_was_saved_comes_back_and_later_changes_do_not(tmp_path):
    kept, snapshots = tensors(1.0), Snapshots(tmp_path)
    snapshots.save(4, kept, {"metrics": {"loss": 0.5}})
    kept["model"]["w"].fill_(9.0)  # training goes on while the thread writes
    found = snapshots.latest()
    assert found.step == 4
    assert torch.equal(found.whole("model")["w"], torch.ones(3, 2))
    assert found.whole("optimizer")["w/step"].item() == 1.0
    assert found.values["metrics"] == {"loss": 0.5}


def test_the_last_few_and_the_best_stay(tmp_path):
    snapshots = Snapshots(tmp_path, keep=2)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.3), (4, None), (5, 0.2)):
        snapshots.save(step, tensors(step), {}, score=score, wait=True)
    assert snapshots.steps() == [2, 4, 5]
    assert snapshots.best() == 2


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "values.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_torn_snapshot_costs_only_itself(tmp_path, file, damage):
    snapshots = Snapshots(tmp_path)
    for step in (1, 2):
        snapshots.save(step, tensors(step), {}, wait=True)
    path = snapshots.path(2) / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content[:-1] + b"\x07")
    with pytest.warns(UserWarning, match="Going back to an older snapshot"):
        assert snapshots.latest().step == 1


def test_a_full_disk_costs_only_the_snapshot_being_written(tmp_path, monkeypatch):
    snapshots = Snapshots(tmp_path)
    snapshots.save(1, tensors(1), {}, wait=True)

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", full)
    snapshots.save(2, tensors(2), {})
    with pytest.warns(UserWarning, match="No space left.*older ones are untouched"):
        snapshots.finish()
    with pytest.raises(TrainingError, match="No space left"):
        snapshots.save(3, tensors(3), {}, wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert snapshots.latest().step == 1


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path):
    snapshots = Snapshots(tmp_path)
    for value in (1.0, 2.0):
        snapshots.save(7, tensors(value), {}, wait=True)
    assert snapshots.latest().whole("model")["w"][0, 0] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


WRITER = """
import json, sys, torch
from pathlib import Path
from paligemma.train.snapshots import Snapshots
snapshots = Snapshots(Path(sys.argv[1]), keep=2)
for step in range(1, 10_000):
    snapshots.save(step, {"model": {"w": torch.full((200_000,), float(step))}}, {}, wait=True)
    print(step, flush=True)
"""


@pytest.mark.parametrize("after", [1, 4])
def test_a_writer_that_is_killed_leaves_the_snapshot_it_last_told_of_or_a_newer_one(tmp_path, after):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    told = 0
    while told < after:
        told = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    told = max([told, *(int(line) for line in writer.stdout.read().split())])
    writer.wait()
    found = Snapshots(tmp_path).latest(clean=True)
    assert found.step >= told
    assert (found.whole("model")["w"] == found.step).all()
    assert all(not path.name.startswith(".step") for path in tmp_path.iterdir())


def test_no_snapshot_is_none(tmp_path):
    assert Snapshots(tmp_path / "nothing").latest() is None
    (tmp_path / "step-000003").mkdir()
    with pytest.raises(TrainingError, match=r"torn.*No other is left"):
        Snapshots(tmp_path).latest()
    assert json.dumps(Snapshots(tmp_path).best()) == "null"


def test_a_snapshot_that_was_being_replaced_comes_back(tmp_path):
    snapshots = Snapshots(tmp_path)
    snapshots.save(3, tensors(3), {}, wait=True)
    snapshots.path(3).rename(tmp_path / ".step-000003.old-ab12cd34")  # killed between the two renames
    assert snapshots.latest(clean=True).step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_look_leaves_what_a_writer_is_writing(tmp_path):
    snapshots = Snapshots(tmp_path)
    snapshots.save(3, tensors(3), {}, wait=True)
    (tmp_path / ".step-000004.partial-ab12cd34").mkdir()
    assert Snapshots(tmp_path).latest().step == 3
    assert (tmp_path / ".step-000004.partial-ab12cd34").is_dir()
    assert snapshots.latest(clean=True).step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_torn_snapshot_is_not_the_best(tmp_path):
    snapshots = Snapshots(tmp_path, keep=3)
    for step, score in ((1, -0.5), (2, -0.1), (3, None)):
        snapshots.save(step, tensors(step), {}, score=score, wait=True)
    for step in (2, 3):
        (snapshots.path(step) / "model.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="Going back"):
        assert snapshots.latest().step == 1
    assert (snapshots.best(), snapshots.best_score()) == (1, -0.5)
    snapshots.save(2, tensors(2), {}, score=-0.2, wait=True)
    assert (snapshots.best(), snapshots.best_score()) == (2, -0.2)


def test_a_score_that_comes_later_counts(tmp_path):
    snapshots = Snapshots(tmp_path, keep=1)
    for step, score in ((1, -0.5), (2, None), (3, -0.9)):
        snapshots.save(step, tensors(step), {}, score=score, wait=True)
    assert (snapshots.steps(), snapshots.best_score()) == ([1, 3], -0.5)
    snapshots.save(4, tensors(4), {}, wait=True)
    snapshots.rate(4, -0.1)
    assert (snapshots.best(), snapshots.best_score(), snapshots.score(4)) == (4, -0.1, -0.1)
    snapshots.save(5, tensors(5), {}, wait=True)
    assert snapshots.steps() == [4, 5]
    assert snapshots.latest().step == 5


def test_a_torn_later_snapshot_never_costs_the_one_just_written(tmp_path):
    snapshots = Snapshots(tmp_path, keep=1)
    for step in (1, 3):
        snapshots.keep = 2
        snapshots.save(step, tensors(step), {}, wait=True)
    (snapshots.path(3) / "model.safetensors").write_bytes(b"torn")
    snapshots.keep = 1
    with pytest.warns(UserWarning, match="Going back"):
        assert snapshots.latest().step == 1
    snapshots.save(2, tensors(2), {}, wait=True)
    with pytest.warns(UserWarning, match="Going back"):
        assert snapshots.latest().step == 2
