"""The real `huggingface_hub` client against a small hub on loopback: pinned, offline, gated, missing."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from paligemma.checkpoints import commit_of, resolve, write
from paligemma.errors import CheckpointError, HubError, OptionError
from tests.checkpoint_cases import random_state, tiny_config

OLD, NEW = "a" * 40, "b" * 40
REPO, GATED, PICKLED = "google/paligemma2-3b-mix-448", "google/paligemma2-3b-pt-224", "someone/pickled"


@dataclass
class Hub:
    """Repositories by id, each with commits; what was asked for is kept."""

    files: dict[str, dict[str, dict[str, bytes]]]  # repo -> commit -> name -> content
    heads: dict[str, str]
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if is_api else parts[:2])
        if repo not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        rest = parts[4:] if is_api else parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.heads[repo] if revision == "main" else revision
        if commit not in self.files[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.files[repo][commit]
        if is_api and rest and rest[0] == "tree":
            return (
                200,
                {"Content-Type": "application/json"},
                json.dumps([self.entry(n, files[n]) for n in files]).encode(),
            )
        if is_api:
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        data = files.get("/".join(rest[2:]))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, data

    @staticmethod
    def entry(name: str, data: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return entry


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status, headers, body = self.server.hub.answer(self.path)  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (the base class calls it by this name)

    def log_message(self, *_: object) -> None:
        pass


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
    hub = Hub(files, {REPO: OLD, GATED: OLD, PICKLED: OLD}, {GATED})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub  # type: ignore[attr-defined]
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


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
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*", "no_proxy": "*",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)], env={**os.environ, **settings},
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False,
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

    hub.heads[REPO] = NEW  # someone pushes: a pinned revision stays, the branch moves
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
