"""Several processes are one: the same losses and weights for any number of ranks, started by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paligemma.train.loop import FitOptions, fit
from tests.training_runs import loader_of, state_of, write_rows

ROOT = Path(__file__).parents[3]
BATCH = 6

CHILD = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from paligemma.train.loop import FitOptions, fit
from paligemma.train.ranks import Ranks
from tests.training_runs import loader_of, state_of

torch.set_num_threads(1)
path, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
ranks = Ranks.join()
losses = []

class Keep:
    def after_step(self, state, report):
        losses.append([report.loss, report.n_examples, report.n_targets])
    def finish(self, state):
        pass

options = FitOptions(steps=4, **settings.pop("fit"))
state = state_of(options)
loader = loader_of(path, batch_size=6, rank=ranks.rank, world_size=ranks.world_size, **settings)
fit(state, loader, options, hooks=[Keep()], ranks=ranks)
(out / f"losses-{ranks.rank}.json").write_text(json.dumps(losses))
save_file({k: v.contiguous() for k, v in state.model.state_dict().items()}, out / f"weights-{ranks.rank}.safetensors")
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 10)


def torchrun(n: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "normalization", "loader"),
    [(2, "per_example", {}), (2, "per_token", {"part_size": 2}), (4, "per_token", {"arrange": "pack"})],
)
def test_several_processes_see_the_losses_of_one_and_end_with_its_weights(rows, tmp_path, n, normalization, loader):
    class Keep:
        def __init__(self) -> None:
            self.told: list[list[float]] = []

        def after_step(self, state, report) -> None:
            self.told.append([report.loss, report.n_examples, report.n_targets])

        def finish(self, state) -> None:
            pass

    options, keep = FitOptions(steps=4, normalization=normalization), Keep()
    alone = state_of(options)
    fit(alone, loader_of(rows, batch_size=BATCH), options, hooks=[keep])
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    settings = json.dumps({"fit": {"normalization": normalization}, **loader})
    done = torchrun(n, str(script), str(rows), str(tmp_path), settings)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(n):
        told = json.loads((tmp_path / f"losses-{rank}.json").read_text())
        for ours, theirs in zip(keep.told, told, strict=True):
            assert theirs[0] == pytest.approx(ours[0], rel=1e-5)
            assert theirs[1:] == ours[1:]
        weights = load_file(tmp_path / f"weights-{rank}.safetensors")
        for name, value in alone.model.state_dict().items():
            if name.endswith("attn.k.bias"):  # its gradient is zero but for rounding, of which Adam makes whole steps
                continue
            torch.testing.assert_close(weights[name], value, atol=2e-4, rtol=1e-3, msg=name)
