"""Several processes are one: the same losses and weights for any number of ranks, shared out or not, by torchrun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from paligemma.errors import OptionError
from paligemma.train.loop import FitOptions, fit
from paligemma.train.loss import loss_sums
from paligemma.train.parallel import blank, require_strategy, with_blank
from paligemma.train.snapshots import Snapshots
from tests.training_runs import SMALL, loader_of, state_of, weights_of, write_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
BATCH = 6
# The gradient of this bias is zero but for rounding, of which Adam makes whole steps.
ROUNDING = "attn.k.bias"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 10)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some rows have no picture, some cannot be read: ranks get unlike parts, and unlike numbers of them."""
    path = write_rows(tmp_path_factory.mktemp("mixed"), 12)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number in (0, 3, 4, 8, 9):
        lines[number] = {"images": [], "prefix": lines[number]["prefix"], "suffix": lines[number]["suffix"]}
    for number in (1, 5, 6):
        lines[number]["image"] = "nowhere.png"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def torchrun(n: int, path: Path, out: Path, *options: str, **settings: Any) -> subprocess.CompletedProcess:
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *options]
    command += ["-m", "tests.sharded_run", str(path), str(out), json.dumps(settings)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def alone(path: Path, out: Path, **settings: Any) -> subprocess.CompletedProcess:
    """The same run in one process that no torchrun started."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.sharded_run", str(path), str(out), json.dumps(settings)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(out: Path, rank: int = 0) -> list[list[float]]:
    return json.loads((out / f"losses-{rank}.json").read_text())


def assert_same_run(one: Path, many: Path, n: int) -> None:
    expected = load_file(one / "weights-0.safetensors")
    for rank in range(n):
        for ours, theirs in zip(losses(one), losses(many, rank), strict=True):
            assert theirs[0] == pytest.approx(ours[0], rel=1e-5)
            assert theirs[1:] == ours[1:]
        weights = load_file(many / f"weights-{rank}.safetensors")
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            if not name.endswith(ROUNDING):
                torch.testing.assert_close(weights[name], value, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (2, {}),
        (2, {"sharded": True}),
        (2, {"fit": {"normalization": "per_token"}, "loader": {"part_size": 2}}),
        (2, {"fit": {"normalization": "per_token"}, "loader": {"part_size": 2}, "sharded": True, "recompute": True}),
        (4, {"fit": {"normalization": "per_token"}, "loader": {"arrange": "pack"}}),
        (4, {"loader": {"arrange": "pack"}, "sharded": True, "optim": {"schedules": [["image", None]]}}),
        (2, {"lora": True, "sharded": True}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else json.dumps(value).replace('"', "") or "plain",
)
def test_several_processes_see_the_losses_of_one_and_end_with_its_weights(rows, tmp_path, n, settings):
    alone(rows, tmp_path / "one", **{key: value for key, value in settings.items() if key != "sharded"})
    torchrun(n, rows, tmp_path / "many", **settings)
    assert_same_run(tmp_path / "one", tmp_path / "many", n)


def test_adapters_beside_bfloat16_weights_can_be_shared_out(rows, tmp_path):
    settings = {"lora": True, "base": "bfloat16", "steps": 2}
    alone(rows, tmp_path / "one", **settings)
    torchrun(2, rows, tmp_path / "many", sharded=True, **settings)
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "many"), strict=True):
        assert theirs[0] == pytest.approx(ours[0], rel=2e-3)  # bfloat16 products of rows that stand together otherwise


def test_ranks_with_unlike_parts_neither_wait_for_each_other_nor_change_the_loss(mixed, tmp_path):
    settings = {"loader": {"part_size": 1, "skip_broken": True}, "steps": 3}
    alone(mixed, tmp_path / "one", **settings)
    torchrun(2, mixed, tmp_path / "many", sharded=True, **settings)
    assert_same_run(tmp_path / "one", tmp_path / "many", 2)


@pytest.mark.parametrize("n_before", [1, 2])
def test_a_sharded_snapshot_goes_on_with_any_number_of_ranks(rows, tmp_path, n_before):
    kept = tmp_path / "snapshots"
    torchrun(n_before, rows, tmp_path / "first", sharded=True, steps=2, snapshots=str(kept))
    torchrun(4, rows, tmp_path / "four", sharded=True, steps=5, snapshots=_copied(kept, "four"))
    torchrun(2, rows, tmp_path / "ddp", steps=5, snapshots=_copied(kept, "ddp"))
    alone(rows, tmp_path / "resumed", steps=5, snapshots=_copied(kept, "resumed"))
    alone(rows, tmp_path / "one", steps=5)
    whole = losses(tmp_path / "one")
    for name in ("four", "ddp", "resumed"):
        later = losses(tmp_path / name)
        assert len(later) == 3  # it went on, and did not begin anew
        assert [told[0] for told in later] == pytest.approx([told[0] for told in whole[2:]], rel=2e-4)


def test_a_plain_snapshot_goes_on_shared_out(rows, tmp_path):
    kept = tmp_path / "snapshots"
    alone(rows, tmp_path / "first", steps=2, snapshots=str(kept))
    torchrun(2, rows, tmp_path / "two", sharded=True, steps=5, snapshots=str(kept))
    alone(rows, tmp_path / "one", steps=5)
    assert [told[0] for told in losses(tmp_path / "two")] == pytest.approx(
        [told[0] for told in losses(tmp_path / "one")[2:]], rel=2e-4
    )


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_a_killed_rank_is_started_again_and_the_run_ends_with_the_same_weights(rows, tmp_path, sharded):
    settings = {"sharded": sharded, "steps": 6, "save_every": 2}
    torchrun(2, rows, tmp_path / "calm", **settings)
    done = torchrun(
        2, rows, tmp_path / "killed", "--max-restarts=1", **settings, die_at=5, snapshots=str(tmp_path / "snapshots")
    )
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr, done.stderr[-2000:]
    assert len(losses(tmp_path / "killed")) < 6  # the second life did not begin at the beginning
    calm, killed = (load_file(tmp_path / name / "weights-0.safetensors") for name in ("calm", "killed"))
    assert all(torch.equal(calm[name], killed[name]) for name in calm)


def test_a_torn_shard_costs_the_newest_snapshot_only(rows, tmp_path):
    kept = tmp_path / "snapshots"
    torchrun(2, rows, tmp_path / "first", sharded=True, steps=4, save_every=2, snapshots=str(kept))
    snapshots = Snapshots(kept)
    assert snapshots.steps() == [2, 4]
    shard = next((snapshots.path(4) / "shards").glob("__1_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="Going back to an older snapshot"):
        found = snapshots.latest()
    assert found.step == 2
    options = FitOptions(steps=4)
    state = state_of(options, seed=9)
    state.restore(found)
    whole = found.whole("model")
    for name, value in weights_of(state).items():
        assert torch.equal(value, whole[name])
    fit(state, loader_of(rows, batch_size=BATCH), options)
    assert state.step == 4


def test_blank_examples_change_neither_loss_nor_gradient(rows):
    options = FitOptions(steps=1)
    batch = loader_of(rows, batch_size=3).step(0).parts[0]
    text = loader_of(_without_pictures(rows), batch_size=3).step(0).parts[0]
    state = state_of(options)
    for part in (blank(SMALL, has_image=True), blank(SMALL, has_image=False)):
        assert loss_sums(state.model, part).total.item() == 0
    plain, filled = loss_sums(state.model, text), loss_sums(state.model, with_blank(text, SMALL))
    assert filled.total.item() == pytest.approx(plain.total.item(), rel=1e-6)
    parameters = [state.model.text.blocks[0].attn.q.weight, state.model.text.embedding.weight]
    for a, b in zip(
        torch.autograd.grad(plain.total, parameters), torch.autograd.grad(filled.total, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert batch.pixels is not None


def test_an_unknown_strategy_is_answered_with_the_nearest():
    with pytest.raises(OptionError, match=r"expected auto, ddp or fsdp.*'fsdp'"):
        require_strategy("fdsp")


def _copied(folder: Path, name: str) -> str:
    target = folder.with_name(f"snapshots-{name}")
    shutil.copytree(folder, target)
    return str(target)


def _without_pictures(path: Path) -> Path:
    target = path.with_name("text.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.pop("image")
    target.write_text("".join(json.dumps({"images": [], **row}) + "\n" for row in rows))
    return target
