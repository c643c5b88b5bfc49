"""`paligemma checkpoint push` with the real client, to a small hub on loopback, and back again."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma.checkpoints import write
from paligemma.checkpoints.push import pack
from paligemma.cli.main import main
from paligemma.errors import CheckpointError, PickleRefused
from tests.checkpoint_cases import random_state, tiny_config
from tests.loopback_hub import TOKEN, Hub, serving, settings
from tests.tiny_folder import TOKENIZER

ROOT = Path(__file__).parents[3]
REPO = "me/digits"
CARD = """---
library_name: paligemma
base_model: paligemma2-3b-pt-224
license: gemma
---
# digits

```python
pg = paligemma.load("runs/digits/model")
other = paligemma.load("paligemma2-3b-mix-448")
```

![Loss](curves.png)
<img src="samples/step-000120.png" width="300">
![elsewhere](https://example.org/badge.png)
"""


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """What a run leaves behind: a model in shards, a card with pictures, and much that must stay at home."""
    folder = tmp_path / "runs" / "digits"
    config = tiny_config(2)
    write(folder / "model", config, random_state(config, seed=0), max_shard_bytes=60_000, beside=[TOKENIZER])
    (folder / "model" / TOKENIZER.name).rename(folder / "model" / "tokenizer.model")
    (folder / "README.md").write_text(CARD)
    (folder / "samples").mkdir()
    for name in ("curves.png", "samples/step-000120.png", "samples/step-000040.png"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (9, 9, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "scores.json").write_text('{"answer": {"exact match": 0.5}}')
    for name in ("log.jsonl", "predictions.jsonl", "config.yaml", "model/secret.txt", "model/optimizer.safetensors"):
        (folder / name).write_text("stays here")
    (folder / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "checkpoints").mkdir()
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub({}, {})) as hub:
        yield hub


@dataclass
class Said:
    status: int
    out: str
    err: str


TALK = """
import contextlib, io, json, sys
from paligemma.cli.main import main
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def talk(hub: Hub, home: Path, *commands: list[str], token: str | None = TOKEN) -> list[Said]:
    """Command lines, one after the other, in a process whose client knows only this hub."""
    run = subprocess.run(
        [sys.executable, "-c", TALK, json.dumps([["checkpoint", *words] for words in commands])],
        env=settings(hub, home / "home", token=token), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [Said(*json.loads(line)) for line in run.stdout.splitlines()]


def push(folder: Path, *options: str, repo: str = REPO) -> list[str]:
    return ["push", str(folder), repo, *options]


READ = """
import sys, torch
from paligemma.checkpoints import read, resolve
folder = resolve(sys.argv[1])
config, state = read(folder)
torch.save(state, sys.argv[2])
print(folder)
"""


def test_what_was_pushed_comes_back_byte_for_byte(hub, run_folder, tmp_path):
    (said,) = talk(hub, tmp_path, push(run_folder, "--create", "--private", "--message", "first try"))
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith(f"{hub.url}/{REPO} at {hub.heads[REPO]['main'][:10]}")
    assert hub.committed == ["first try"]
    assert REPO in hub.private
    held = {name: data for name, data in hub.head(REPO).items() if name != ".gitattributes"}
    shards = {path.name for path in (run_folder / "model").glob("model-*-of-*.safetensors")}
    assert len(shards) > 1
    assert set(held) == shards | {
        "README.md", "SHA256SUMS", "config.json", "curves.png", "generation_config.json", "preprocessor_config.json",
        "model.safetensors.index.json", "samples/step-000120.png", "scores.json", "tokenizer.model",
    }  # fmt: skip
    for name in set(held) - {"README.md"}:
        home = run_folder / "model" / name
        assert held[name] == (home if home.exists() else run_folder / name).read_bytes(), name

    # Downloaded with the package's own loader, the weights are those of the run, to the bit.
    run = subprocess.run(
        [sys.executable, "-c", READ, REPO, str(tmp_path / "back.pt")], env=settings(hub, tmp_path / "other"), cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    back, sent = torch.load(tmp_path / "back.pt", weights_only=True), random_state(tiny_config(2), seed=0)
    assert back.keys() == sent.keys()
    assert all(torch.equal(back[name], sent[name]) for name in sent)
    for name in shards | {"tokenizer.model", "config.json"}:
        assert (Path(run.stdout.strip()) / name).read_bytes() == held[name]


def test_the_card_on_the_hub_names_the_repository_and_its_base(run_folder):
    card = pack(run_folder, REPO).files["README.md"].decode()
    assert "base_model: google/paligemma2-3b-pt-224\n" in card
    assert f'pg = paligemma.load("{REPO}")' in card
    assert 'paligemma.load("paligemma2-3b-mix-448")' in card
    assert "![Loss](curves.png)" in card
    (run_folder / "README.md").write_text(CARD.replace("paligemma2-3b-pt-224", "/home/me/secret/base"))
    card = pack(run_folder, REPO).files["README.md"].decode()
    assert "secret" not in card
    assert card.startswith("---\nlibrary_name: paligemma\nlicense: gemma\n---\n")


def test_a_second_push_leaves_no_weights_of_the_first(hub, run_folder, tmp_path):
    whole = tmp_path / "whole"
    config = tiny_config(2)
    write(whole, config, random_state(config, seed=1))
    (whole / "README.md").write_text("# whole")
    first, second, third = talk(
        hub,
        tmp_path,
        push(run_folder, "--create"),
        push(whole, "--json"),
        push(whole, "--revision", "tries", "--create"),
    )
    assert (first.status, second.status, third.status) == (0, 0, 0)
    told = json.loads(second.out)
    assert "model.safetensors.index.json" in told["removed"]
    assert "model-00001" in second.err
    names = set(hub.head(REPO))
    assert [name for name in names if name.endswith((".safetensors", ".index.json"))] == ["model.safetensors"]
    assert {"scores.json", "curves.png"} <= names  # what is not weights is left alone
    assert set(hub.heads[REPO]) == {"main", "tries"}
    assert hub.heads[REPO]["main"] == told["commit"] != hub.heads[REPO]["tries"]


def test_an_adapter_is_sent_with_the_card_of_its_run(hub, run_folder, tmp_path):
    from paligemma.checkpoints.lora_write import write_adapter
    from paligemma.models.lora import LoraOptions, add_lora
    from tests.tiny_folder import random_model

    model, options = random_model(), LoraOptions(rank=2)
    add_lora(model, options, seed=0)
    write_adapter(run_folder / "adapter", model, options, base="paligemma2-3b-pt-224")
    card = CARD.replace("runs/digits/model", "paligemma2-3b-pt-224")
    (run_folder / "README.md").write_text(card)
    (said,) = talk(hub, tmp_path, push(run_folder / "adapter", "--create"))
    assert said.status == 0, said.err
    held = hub.head(REPO)
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "curves.png"} <= set(held)
    assert not {"config.json", "tokenizer.model"} & set(held)
    line = f'paligemma.load("google/paligemma2-3b-pt-224", adapter="{REPO}")'
    assert line in held["README.md"].decode()
    assert pack(run_folder, REPO).kind == "model"  # the run itself is its whole model
    shutil.rmtree(run_folder / "model")
    assert pack(run_folder, REPO).kind == "adapter"


def test_an_archive_in_pieces_is_sent_in_pieces(tmp_path):
    config = tiny_config(2)
    write(tmp_path / "m.npz", config, random_state(config, seed=0), "npz")
    data = (tmp_path / "m.npz").read_bytes()
    (tmp_path / "m.npz").unlink()
    for i in range(2):
        (tmp_path / f"m.npz.part{i}").write_bytes(data[i * len(data) // 2 : (i + 1) * len(data) // 2])
    (tmp_path / "README.md").write_text("# pieces")
    assert set(pack(tmp_path, REPO).files) == {"README.md", "m.npz.part0", "m.npz.part1"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: next((f / "model").glob("model-00002*")).unlink(), "model-00002"),
        (lambda f: flip(next((f / "model").glob("model-00001*")), -3), "the weights are unsound.*sha256"),
        (lambda f: flip(next((f / "model").glob("model-00001*")), 3), "model-00001"),
        (lambda f: (f / "README.md").unlink(), "no README.md: expected a card"),
        (lambda f: (f / "README.md").write_text(" \n"), "README.md: empty"),
        (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "front matter is not YAML"),
        (lambda f: (f / "curves.png").unlink(), "shows curves.png, which is missing"),
        (lambda f: (f / "README.md").write_text("![x](../../etc/x.png)"), "expected a picture in its own folder"),
        (lambda f: (f / "README.md").write_text("![x](predictions.jsonl)"), "expected a picture in its own folder"),
        (lambda f: shutil.rmtree(f / "model"), "no weights inside"),
    ],
)  # fmt: skip
def test_what_is_unsound_or_untold_is_refused_before_anything_is_sent(run_folder, spoil, message):
    spoil(run_folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        pack(run_folder, REPO)
    assert "\n" not in str(caught.value)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "README.md").write_text("# x")
    with pytest.raises(PickleRefused, match="It was not opened"):
        pack(tmp_path, REPO)


@pytest.mark.parametrize(
    "repo", ["digits", "a/b/c", "me/has space", "me/..", "me/x-", "me/x.git", "me/" + "x" * 120, ""]
)
def test_a_name_that_cannot_be_is_refused_in_one_line(run_folder, capsys, repo):
    assert main(["checkpoint", "push", str(run_folder), repo]) == 2
    err = capsys.readouterr().err
    assert "expected owner/name" in err
    assert err.count("\n") == 1


def test_a_dry_run_lists_what_would_be_sent(run_folder, capsys):
    assert main(["checkpoint", "push", str(run_folder), REPO, "--dry-run", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files["tokenizer.model"] == TOKENIZER.stat().st_size
    assert "log.jsonl" not in files


def test_whoever_may_not_write_is_told_what_to_do(hub, run_folder, tmp_path):
    (nobody,) = talk(hub, tmp_path, push(run_folder, "--create"), token=None)
    assert "nobody is logged in" in nobody.err
    assert "hf auth login" in nobody.err
    assert hub.asked == []
    (stranger,) = talk(hub, tmp_path, push(run_folder, "--create"), token="hf_somebody_else")
    assert stranger.status == 2
    assert "Log in as somebody who may write there" in stranger.err
    assert hub.files == {}
    missing, foreign, commit = talk(
        hub, tmp_path, push(run_folder, "--private"), push(run_folder, "--create", repo="google/digits"),
        push(run_folder, "--revision", "a" * 40),
    )  # fmt: skip
    assert f"{REPO} does not exist on the hub" in missing.err
    assert "--create" in missing.err
    assert "Log in as somebody who may write there" in foreign.err
    assert "a commit, which cannot be written to" in commit.err
    hub.create({"organization": "me", "name": "digits"})
    public, branch = talk(hub, tmp_path, push(run_folder, "--private"), push(run_folder, "--revision", "no-such"))
    assert f"{REPO} is public: expected a private one" in public.err
    assert f"{REPO} has no branch 'no-such'" in branch.err
    for said in (nobody, stranger, missing, foreign, commit, public, branch):
        assert said.status == 2
        assert said.err.count("\n") == 1, said.err
    assert list(hub.head(REPO)) == [".gitattributes"]
    assert hub.large == {}


@pytest.mark.parametrize(
    ("part", "faults", "message"),
    [
        ("/commit/", [500], "500"),
        ("/commit/", ["cut"], "not sent"),
        ("/lfs/objects/batch", [403], "403"),
        ("/preupload/", [403], "403"),
        ("digits.git", [422], "422"),
    ],
)
def test_a_failure_in_the_middle_leaves_the_repository_as_it_was(hub, run_folder, tmp_path, part, faults, message):
    hub.create({"organization": "me", "name": "digits"})
    hub.faults = {part: list(faults)}
    failed, again = talk(hub, tmp_path, push(run_folder), push(run_folder))
    assert failed.status == 2
    assert message in failed.err
    assert "The repository is as it was; try again." in failed.err
    assert failed.err.count("\n") == 1
    assert again.status == 0, again.err
    assert "model.safetensors.index.json" in hub.head(REPO)
    assert len(hub.committed) == 1


def test_an_upload_that_stumbles_once_goes_through(hub, run_folder, tmp_path):
    hub.create({"organization": "me", "name": "digits"})
    hub.faults = {"/lfs/": [503, "cut"]}
    (said,) = talk(hub, tmp_path, push(run_folder))
    assert said.status == 0, said.err
    assert len(hub.committed) == 1


def test_a_push_between_ours_is_not_overwritten(hub, run_folder, tmp_path):
    hub.create({"organization": "me", "name": "digits"})
    take = hub.commit

    def somebody_first(repo: str, revision: str, body: bytes):
        hub.files[repo]["c" * 40] = {"theirs.txt": b"theirs"}
        hub.heads[repo]["main"] = "c" * 40
        return take(repo, revision, body)

    hub.commit = somebody_first  # type: ignore[method-assign]
    (said,) = talk(hub, tmp_path, push(run_folder))
    assert said.status == 2
    assert f"{REPO} has moved to cccccccccc meanwhile" in said.err
    assert hub.head(REPO) == {"theirs.txt": b"theirs"}


def test_what_the_hub_leaves_out_is_noticed(hub, run_folder, tmp_path):
    hub.create({"organization": "me", "name": "digits"})
    hub.ignored = {"tokenizer.model"}
    (said,) = talk(hub, tmp_path, push(run_folder))
    assert said.status == 2
    assert "the hub left out tokenizer.model" in said.err
