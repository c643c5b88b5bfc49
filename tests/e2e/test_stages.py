"""Stages carried out: a mixture of every kind of source, other pixels than before, an interruption in between."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import paligemma
from paligemma.checkpoints import read
from paligemma.data.builders import BUILDERS
from paligemma.data.convert import write_split
from paligemma.data.world.records import WorldRecords
from paligemma.recipes.stages import recipe
from paligemma.recipes.transfer import TransferResult, run
from paligemma.recipes.tree import changed
from paligemma.train.hooks import JsonLog, read_log
from tests.tiny_folder import CONFIG, write_folder

FORMATS = {  # -> task
    "coco": "detect", "yolo": "detect", "voc": "detect", "parquet": None, "wds": None, "hf": None, "jsonl": None
}  # fmt: skip
SIDE = 2 * CONFIG.vision.resolution


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The picture world in seven formats, as one mixture."""
    folder = tmp_path_factory.mktemp("mixture")
    sources: dict[str, Any] = {}
    for seed, (kind, task) in enumerate(FORMATS.items()):
        build = None if task else BUILDERS["caption"]
        write_split(WorldRecords(6, seed=seed), folder / kind, to=kind, split="train", build=build)
        sources[kind] = {"data": kind, **({"task": task} if task else {})}
    (folder / "mixture.yaml").write_text(yaml.safe_dump({"sources": sources}, sort_keys=False))
    return folder / "mixture.yaml"


@pytest.fixture(scope="module")
def stage0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("stage0"))


def carried_out(stage: str, mixture: Path, model: Path, out: Path, **changes: Any) -> TransferResult:
    made = recipe(stage, data=str(mixture), model=str(model), out=str(out), resolution=SIDE)
    given = {"steps": 6, "device": "cpu", "loader.batch_size": 7, "eval_every": None, "samples": 0, "lr": 1e-2}
    return run(changed(made, {**given, **changes}), progress=False, say=lambda _text: None)


def test_a_stage_sees_more_pixels_and_resumes_in_the_middle_of_a_mixture(
    mixture: Path, stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = carried_out("stage2_448", mixture, stage0, tmp_path / "whole")
    assert whole.finished
    tell = JsonLog.after_step

    def then_stop(log: JsonLog, state: Any, report: Any) -> None:
        tell(log, state, report)
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(JsonLog, "after_step", then_stop)
        assert not carried_out("stage2_448", mixture, stage0, tmp_path / "run").finished
    result = carried_out("stage2_448", mixture, stage0, tmp_path / "run", **{"loader.workers": 2})
    assert result.finished
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl", "step")] == [1, 2, 3, 4, 5, 6]
    (config, found), (_, expected), (_, before) = (read(p) for p in (result.model, whole.model, stage0))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(expected["projector.weight"], before["projector.weight"])
    assert config.vision.resolution == SIDE
    (table,) = [name for name in found if "position" in name]
    n, side = CONFIG.vision.n_image_tokens, before[table].shape[-1]
    assert (before[table].shape[-2:], found[table].shape[-2:]) == ((n, side), (4 * n, side))
    pg = paligemma.load(result.model, device="cpu")
    assert pg.config.vision.resolution == SIDE
    assert isinstance(pg.caption(WorldRecords(1)[0].images[0]).text, str)
