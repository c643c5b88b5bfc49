"""The real `huggingface_hub` client against a small hub on loopback: pinned, offline, gated, missing."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paligemma.checkpoints import commit_of, resolve, write
from paligemma.errors import CheckpointError, HubError, OptionError
from tests.checkpoint_cases import random_state, tiny_config
from tests.loopback_hub import Hub, serving, settings

OLD, NEW = "a" * 40, "b" * 40
REPO, GATED, PICKLED = "google/paligemma2-3b-mix-448", "google/paligemma2-3b-pt-224", "someone/pickled"


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """A model at two commits, with a pickle and a subfolder beside it that nobody should fetch."""
    commits = {}
    for seed, commit in enumerate((OLD, NEW)):
        folder = tmp_path_factory.mktemp("model")
        config = tiny_config(2)
        write(folder, config, random_state(config, seed=seed), max_shard_bytes=60_000)
        commits[commit] = {path.name: path.read_bytes() for path in folder.iterdir()}
        commits[commit] |= {"pytorch_model.bin": b"\x80\x04", "original/model.safetensors": b"x", "README.md": b"x"}
    return commits


@pytest.fixture
def hub(contents) -> Iterator[Hub]:
    files = {REPO: contents, GATED: contents, PICKLED: {OLD: {"pytorch_model.bin": b"\x80\x04", "config.json": b"{}"}}}
    heads = {repo: {"main": OLD} for repo in files}
    with serving(Hub(files, heads, gated={GATED})) as hub:
        yield hub


ASK = """
import json, sys
from paligemma.checkpoints import commit_of, read, resolve
from paligemma.errors import PaliGemmaError
for words in json.loads(sys.argv[1]):
    try:
        folder = resolve(*words)
        config, state = read(folder)
        print(folder, commit_of(folder), config.name, float(state["projector.bias"][0]))
    except PaliGemmaError as error:
        print(type(error).__name__, error)
"""


def ask(hub: Hub, cache: Path, *questions: list[str], offline: bool = False) -> list[str]:
    """`resolve(*question)` for each in one new process, where the client reads its settings afresh."""
    run = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        env=settings(hub, cache, offline=offline), cwd=Path(__file__).parents[3],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answers = run.stdout.splitlines()
    assert len(answers) == len(questions), run.stdout
    return answers


def test_a_short_name_is_fetched_once_pinned_and_then_works_offline(hub, tmp_path):
    (first,) = ask(hub, tmp_path, ["paligemma2-3b-mix-448"])
    folder, commit, name, value = first.split()
    assert commit == OLD == Path(folder).name
    assert name == f"{REPO}@{OLD}"
    fetched = {path.name for path in Path(folder).iterdir()}
    assert {"config.json", "model.safetensors.index.json", "preprocessor_config.json"} <= fetched
    assert not {"pytorch_model.bin", "original", "README.md"} & fetched
    assert not [path for path in hub.asked if "pytorch_model.bin" in path]

    n_asked = len(hub.asked)
    offline, missing = ask(hub, tmp_path, [REPO], [PICKLED], offline=True)
    assert offline == first
    assert missing.startswith(f"HubError {PICKLED} is not complete in the local cache")
    assert "HF_HUB_OFFLINE" in missing
    assert len(hub.asked) == n_asked

    hub.heads[REPO]["main"] = NEW  # someone pushes: a pinned revision stays, the branch moves
    pinned, moved = ask(hub, tmp_path, [REPO, OLD], [REPO])
    assert pinned == first
    assert moved.split()[1] == NEW
    assert moved.split()[3] != value


def test_a_repository_that_cannot_be_had_is_answered_with_what_to_do(hub, tmp_path):
    gated, misspelt, revision, pickled = ask(
        hub, tmp_path, ["paligemma2-3b-pt-224"], ["paligemma2-3b-mix-484"], [REPO, "float17"], [PICKLED]
    )
    assert gated.startswith(f"HubError {GATED} is gated: expected that you have accepted its licence")
    assert f"Visit https://huggingface.co/{GATED}, accept it" in gated
    assert misspelt.startswith("HubError google/paligemma2-3b-mix-484 does not exist")
    assert "Did you mean 'google/paligemma2-3b-mix-448'?" in misspelt
    assert revision.startswith(f"HubError {REPO} has no revision 'float17'")
    assert pickled.startswith(f"HubError {PICKLED} holds no safetensors and no .npz")
    assert not [path for path in hub.asked if "pytorch_model.bin" in path]


def test_paths_come_before_names(tmp_path, monkeypatch):
    (tmp_path / "google" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("google/model") == Path("google/model")
    assert commit_of(tmp_path) is None
    with pytest.raises(OptionError, match="revision='main' for the local path"):
        resolve("google/model", "main")


@pytest.mark.parametrize("name", ["./here", "/no/such/folder", "~/nothing", "weights.npz", "weights.npz:img", "a/b/c"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve(name)


def test_a_word_that_is_no_name_gets_a_hint():
    with pytest.raises(HubError, match=r"is no local path and no model name.*Did you mean 'paligemma2-3b-pt-448'\?"):
        resolve("paligema2-3b-pt-448")
