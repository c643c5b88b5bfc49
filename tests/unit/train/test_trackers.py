"""Trackers: what the run told is what stands in their files, after an interruption too."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paligemma.errors import OptionError
from paligemma.train.hooks import Validate
from paligemma.train.loop import FitOptions, default_loss, fit
from paligemma.train.trackers import TensorBoard, Track, require_trackers
from tests.training_runs import loader_of, state_of, write_rows

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), 10)


class Losses(list):
    def after_step(self, state, report):
        self.append((report.step, report.loss))

    def finish(self, state):
        pass


def told_by_tensorboard(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
def test_tensorboard_holds_every_step_and_every_validation(rows, tmp_path):
    options, losses = FitOptions(steps=4), Losses()
    validate = Validate(loader_of(rows), options, default_loss(options), every=2)
    fit(state_of(options), loader_of(rows), options, hooks=[losses, validate, Track(TensorBoard(tmp_path), validate)])
    found = told_by_tensorboard(tmp_path, "train/loss")
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert [value for _, value in found] == pytest.approx([loss for _, loss in losses], rel=1e-6)
    assert [step for step, _ in told_by_tensorboard(tmp_path, "valid/loss")] == [2, 4]
    assert told_by_tensorboard(tmp_path, "valid/loss")[-1][1] == pytest.approx(validate.values["loss"], rel=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
def test_steps_that_a_resumed_run_does_again_stand_there_once(tmp_path):
    first = TensorBoard(tmp_path)
    for step in (1, 2, 3, 4):
        first.write(step, {"train/loss": float(step)})
    first.close()
    second = TensorBoard(tmp_path, first=2)
    for step in (3, 4, 5):
        second.write(step, {"train/loss": 10.0 * step})
    second.close()
    assert told_by_tensorboard(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the extra wandb is not installed")
def test_wandb_writes_a_run_offline_and_goes_on_in_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from paligemma.train.trackers import Wandb; "
        "sink = Wandb(Path(sys.argv[1]), {'lr': 1e-5}); sink.write(1, {'train/loss': 0.5}); sink.close()"
    )
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env, timeout=120, cwd=tmp_path)
    identity = (tmp_path / "wandb.id").read_text()
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))
    assert len(runs) == 2  # two parts of one run
    assert all(any(run.glob("*.wandb")) for run in runs)


def test_an_unknown_tracker_is_answered_with_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'tensorboard'"):
        require_trackers(("tensorbord",))
