"""The loop: it learns, accumulates, freezes, resumes to the bit, and stops where it must."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from paligemma.errors import DataError, OptionError, TrainingError
from paligemma.train.hooks import Validate
from paligemma.train.loop import FitOptions, StepReport, default_loss, fit
from paligemma.train.snapshots import Snapshots
from paligemma.train.state import TrainState
from tests.training_runs import loader_of, state_of, weights_of, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 10)


class Told:
    """A hook that keeps what it is told, and may do something after a step."""

    def __init__(self, at: int | None = None, act=lambda state: None) -> None:
        self.reports: list[StepReport] = []
        self.finished = 0
        self.at, self.act = at, act

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self.reports.append(report)
        if report.step == self.at:
            self.act(state)

    def finish(self, state: TrainState) -> None:
        self.finished += 1


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_tells_what_it_saw(rows):
    options, hook = FitOptions(steps=30), Told()
    state = state_of(options)
    result = fit(state, loader_of(rows, batch_size=5), options, hooks=[hook])
    assert (result.step, result.finished, hook.finished) == (30, True, 1)
    losses = [report.loss for report in hook.reports]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    first = hook.reports[0]
    assert (first.n_examples, first.n_images) == (5, 5)
    assert 0 < first.n_targets < first.n_tokens <= first.n_slots
    assert set(hook.reports[0].factors) == {0.0}  # the first update of a warm-up


@pytest.mark.parametrize("arrange", ["bucket", "pack"])
def test_parts_of_a_step_are_one_batch(rows, arrange):
    losses = {}
    for part_size in (None, 2):
        options, hook = FitOptions(steps=4), Told()
        state = state_of(options)
        fit(state, loader_of(rows, batch_size=6, part_size=part_size, arrange=arrange), options, hooks=[hook])
        losses[part_size] = [report.loss for report in hook.reports]
    assert losses[2] == pytest.approx(losses[None], rel=1e-5)


def test_a_frozen_tensor_never_moves(rows):
    options = FitOptions(steps=5)
    state = state_of(options, schedules=(("image", None), ("embedding", None)), weight_decay=0.1)
    before = weights_of(state)
    fit(state, loader_of(rows), options)
    after = weights_of(state)
    for name in before:
        is_frozen = name.startswith(("vision", "projector", "text.embedding"))
        assert torch.equal(before[name], after[name]) == is_frozen, name


def test_k_steps_and_k_more_are_2k_steps_to_the_bit(rows, tmp_path):
    options = FitOptions(steps=8, dropout=0.2, save_every=2)
    whole, hook = state_of(options), Told()
    fit(whole, loader_of(rows), options, hooks=[hook])
    snapshots = Snapshots(tmp_path)

    def stop(_state):
        os.kill(os.getpid(), signal.SIGTERM)

    first = state_of(options)
    result = fit(first, loader_of(rows), options, hooks=[Told(3, stop)], snapshots=snapshots)
    assert (result.step, result.finished) == (3, False)
    second, later = state_of(options, seed=9), Told()  # other weights at first: all of it must come from the snapshot
    second.restore(snapshots.latest())
    assert second.step == 3
    assert fit(second, loader_of(rows), options, hooks=[later], snapshots=snapshots).finished
    assert equal(weights_of(second), weights_of(whole))
    assert [r.loss for r in later.reports] == [r.loss for r in hook.reports[3:]]


def test_dropout_changes_training_and_only_training(rows):
    options = FitOptions(steps=3, dropout=0.5)
    with_it, without = state_of(options), state_of(options)
    fit(with_it, loader_of(rows), options)
    fit(without, loader_of(rows), FitOptions(steps=3))
    assert not equal(weights_of(with_it), weights_of(without))
    batch = loader_of(rows).step(0).parts[0]
    model = with_it.model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch.model_inputs()), model(**batch.model_inputs()))
        model.train()
        assert not torch.equal(model(**batch.model_inputs()), model(**batch.model_inputs()))


def test_recomputing_activations_changes_nothing(rows):
    options = FitOptions(steps=3, dropout=0.1)
    plain, recomputed = state_of(options), state_of(options)
    recomputed.model.vision.recompute = recomputed.model.text.recompute = True
    for state in (plain, recomputed):
        fit(state, loader_of(rows), options)
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(weights_of(recomputed)[name], value, atol=1e-6, rtol=1e-5)


def test_a_loss_that_is_no_number_stops_with_the_batch_saved(rows, tmp_path):
    options = FitOptions(steps=5)
    state = state_of(options)

    def poison(state: TrainState) -> None:
        with torch.no_grad():
            state.model.text.final_norm.scale[0] = torch.nan

    with pytest.raises(TrainingError, match=r"step 2: the loss is nan: expected a finite number.*failed-step-000002"):
        fit(state, loader_of(rows), options, hooks=[Told(2, poison)], failure_folder=tmp_path)
    folder = tmp_path / "failed-step-000002"
    told = json.loads((folder / "examples.json").read_text())
    assert len(told["examples"]) == 4
    assert all("train.jsonl line" in name for name in told["examples"])
    assert (folder / "part-0.safetensors").exists()


def test_an_exploding_loss_stops(rows):
    options = FitOptions(steps=5, max_loss=1.0)
    state = state_of(options)
    before = weights_of(state)
    with pytest.raises(TrainingError, match="expected at most 1"):
        fit(state, loader_of(rows), options)
    assert equal(weights_of(state), before)


def test_a_broken_row_stops_the_run_and_is_skipped_and_counted_when_allowed(tmp_path):
    path = write_rows(tmp_path, 6)
    (tmp_path / "train-2.png").write_bytes(b"")
    options = FitOptions(steps=3)
    with pytest.raises(DataError, match=r"train\.jsonl line 3"):
        fit(state_of(options), loader_of(path), options)
    hook = Told()
    fit(state_of(options), loader_of(path, skip_broken=True), options, hooks=[hook])
    broken = [text for report in hook.reports for text in report.broken]
    assert len(broken) == 2  # 12 examples are two epochs of six
    assert all("line 3" in text for text in broken)
    assert sum(report.n_examples for report in hook.reports) == 10


def test_a_snapshot_of_another_run_is_refused(rows, tmp_path):
    options = FitOptions(steps=2)
    snapshots = Snapshots(tmp_path)
    fit(state_of(options, identity={"base": "tiny"}), loader_of(rows), options, snapshots=snapshots)
    snapshot = snapshots.latest()
    with pytest.raises(TrainingError, match="base was 'tiny', is now 'other'"):
        state_of(options, identity={"base": "other"}).restore(snapshot)
    # A field that came later changes nothing while it is off, and is told where it is on.
    state_of(options, identity={"base": "tiny", "reweight": [], "sigma": 0.0}).restore(snapshot)
    with pytest.raises(TrainingError, match=r"sigma was None, is now 4\.0"):
        state_of(options, identity={"base": "tiny", "sigma": 4.0}).restore(snapshot)
    # One that an earlier version kept and that changes no number may be gone, and a name before a digest as well.
    old = state_of(options, identity={"base": "my models 0123456789abcdef", "workers": 3})
    fit(old, loader_of(rows), options, snapshots=Snapshots(tmp_path / "old"))
    now = state_of(options, identity={"base": "0123456789abcdef"})
    now.free = frozenset({"workers"})
    now.restore(Snapshots(tmp_path / "old").latest())
    frozen = state_of(options, identity={"base": "tiny"}, schedules=(("image", None),))
    with pytest.raises(TrainingError, match="was trained there and is not here"):
        frozen.restore(snapshot)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("dropout", 1.0), ("precision", "float8"), ("normalization", "per_sample")]
)
def test_options_that_make_no_sense_are_refused(field, value, rows):
    def run() -> None:
        options = FitOptions(**{"steps": 1, field: value})
        fit(state_of(options), loader_of(rows), options, loss=default_loss(options))

    with pytest.raises(OptionError, match=field):
        run()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here: torch.compile cannot build CPU kernels")
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_compiled_blocks_train_as_plain_ones_and_write_the_same_names(rows, tmp_path, recompute):
    plain, compiled = (state_of(FitOptions(steps=3)) for _ in range(2))
    compiled.model.vision.recompute = compiled.model.text.recompute = recompute
    told, told_compiled = Told(), Told()
    fit(plain, loader_of(rows), FitOptions(steps=3), hooks=[told])
    snapshots = Snapshots(tmp_path)
    fit(compiled, loader_of(rows), FitOptions(steps=3, compile=True), hooks=[told_compiled], snapshots=snapshots)
    assert [r.loss for r in told_compiled.reports] == pytest.approx([r.loss for r in told.reports], rel=1e-4)
    assert weights_of(compiled).keys() == weights_of(plain).keys() == snapshots.latest().whole("model").keys()


def test_a_snapshot_is_scored_by_its_own_weights_or_not_at_all(rows, tmp_path):
    options = FitOptions(steps=6, save_every=1, keep=9)
    validate = Validate(loader_of(rows), options, default_loss(options), every=2)
    snapshots = Snapshots(tmp_path, keep=9)
    fit(state_of(options), loader_of(rows), options, hooks=[validate], snapshots=snapshots, score=validate.score)
    scores = {step: snapshots.score(step) for step in snapshots.steps()}
    assert [step for step, score in scores.items() if score is not None] == [2, 4, 6]
    assert scores[6] == -validate.values["loss"]


def test_going_on_with_a_finished_run_leaves_its_snapshot_as_it_is(rows, tmp_path):
    options = FitOptions(steps=2)
    snapshots = Snapshots(tmp_path)
    state = state_of(options)
    fit(state, loader_of(rows), options, snapshots=snapshots, score=lambda _state: 0.5)
    before = (snapshots.path(2) / "values.json").stat().st_mtime_ns
    fit(state, loader_of(rows), options, snapshots=snapshots)
    assert (snapshots.path(2) / "values.json").stat().st_mtime_ns == before
    assert snapshots.best() == 2
