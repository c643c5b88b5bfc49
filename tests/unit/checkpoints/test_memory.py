"""The memory law: weights in their final dtype + the largest native tensor in float32 + a little, for both formats.

Held exactly, not sampled: a child process may not map one byte of private memory more than that (RLIMIT_DATA), so an
allocation beyond it fails however short it lives. Safetensors files are mapped, not read; the limit counts that mapping
too, which takes no memory until it is written to, so it is added. The allowance here is 64 MB; the promise is 300 MB.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paligemma.checkpoints import open_checkpoint
from paligemma.config import PaliGemmaConfig, TextConfig, TokenConfig, VisionConfig
from tests.checkpoint_cases import npz_arrays

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: /proc and RLIMIT_DATA")

MB = 1 << 20
ALLOWANCE = 64 * MB
CONFIG = PaliGemmaConfig(  # 340 MB in float32, of which one stacked array takes 192 MB; 8 MB the largest native tensor
    vision=VisionConfig(width=12, depth=2, mlp_dim=28, n_heads=3, resolution=42),
    text=TextConfig(
        width=256, depth=12, mlp_dim=8192, n_heads=4, n_kv_heads=2, head_dim=32, vocab_size=1200, post_norms=True,
        query_pre_attn_scalar=32, attn_logits_softcap=50.0, final_logits_softcap=30.0,
    ),
    tokens=TokenConfig(n_tokens=1200, loc_start=48, seg_start=1072, image=1200),
)  # fmt: skip
STACK = "params/llm/layers/mlp/gating_einsum"

CHILD = """
import json, resource, sys
import numpy as np
import torch
from paligemma import checkpoints
from paligemma.models.paligemma import PaliGemmaModel

task, source, target, budget = json.loads(sys.argv[1])
torch.set_num_threads(1)
with checkpoints.open_checkpoint(source) as warm:  # imports and buffers of the first use
    warm["projector.bias"]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + budget
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if task == "read":
    config, state = checkpoints.read(source, dtype="bfloat16", check=True)
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
elif task == "as it is":
    checkpoints.read(source, check=True)
elif task == "convert":
    checkpoints.convert(source, target)
    assert checkpoints.verify(target).is_sound
elif task == "whole stack":
    np.load(source)["params/llm/layers/mlp/gating_einsum"]
"""


def run(task: str, source: Path, target: Path, budget: int) -> subprocess.CompletedProcess:
    words = json.dumps([task, str(source), str(target), budget])
    return subprocess.run(
        [sys.executable, "-c", CHILD, words], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    arrays = npz_arrays(CONFIG)
    for array in arrays.values():  # zeros below the first rows: they take as much memory and deflate fast
        if array.nbytes > MB:
            array.reshape(-1)[1000:] = 0
    return arrays


@pytest.fixture(scope="module")
def sources(tmp_path_factory, arrays) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("large")
    np.savez(folder / "stored.npz", **arrays)
    np.savez_compressed(folder / "deflated.npz", **arrays)
    from paligemma.checkpoints import convert

    convert(folder / "stored.npz", folder / "hf", max_shard_bytes=100 * MB)
    return {"stored npz": folder / "stored.npz", "deflated npz": folder / "deflated.npz", "folder": folder / "hf"}


@pytest.fixture(scope="module")
def sizes(sources) -> tuple[int, int]:
    """Bytes of all weights in bfloat16, and of the largest native tensor in float32."""
    with open_checkpoint(sources["stored npz"]) as checkpoint:
        counts = [checkpoint.spec(name).n_values for name in checkpoint]
    return 2 * sum(counts), 4 * max(counts)


FORMATS = ["stored npz", "deflated npz", "folder"]


def mapped_bytes(folder: Path) -> int:
    """What a safetensors folder maps while it is open; nothing for an archive."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0


@pytest.mark.parametrize("kind", FORMATS)
def test_reading_takes_the_final_weights_and_one_tensor(sources, sizes, tmp_path, kind):
    weights, largest = sizes
    done = run("read", sources[kind], tmp_path, weights + largest + ALLOWANCE + mapped_bytes(sources[kind]))
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.parametrize(("kind", "target"), [("deflated npz", "x"), ("folder", "x.npz")])
def test_converting_and_verifying_take_a_tensor_and_never_the_weights(sources, sizes, tmp_path, kind, target):
    mapped = mapped_bytes(sources["folder"])  # the source or, to be verified, the target
    done = run("convert", sources[kind], tmp_path / target, sizes[1] + ALLOWANCE + mapped)
    assert done.returncode == 0, done.stderr[-600:]


def test_reading_a_folder_in_its_own_dtype_takes_no_memory_at_all(sources, tmp_path):
    done = run("as it is", sources["folder"], tmp_path, ALLOWANCE + mapped_bytes(sources["folder"]))
    assert done.returncode == 0, done.stderr[-600:]


def test_the_limit_bites_when_a_stack_is_held(arrays, sources, sizes, tmp_path):
    """The same limit stops a reader that takes a stacked array as a whole, so the tests above can fail."""
    assert arrays[STACK].nbytes > sizes[1] + ALLOWANCE
    done = run("whole stack", sources["stored npz"], tmp_path, sizes[1] + ALLOWANCE)
    assert done.returncode != 0
    assert "MemoryError" in done.stderr
