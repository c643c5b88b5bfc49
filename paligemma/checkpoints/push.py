"""A result folder -> a repository on the hub: looked through first, then sent in one commit.

    parcel = pack("runs/digits", "me/digits")       # what would go up; nothing is sent
    push("runs/digits", "me/digits", create=True)

Only what is known goes up: sound weights, their configuration and tokenizer, the card, the scores and the pictures that
the card shows. Logs, snapshots, predictions and pickles stay here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from paligemma.checkpoints.adapter_config import parse_adapter_config
from paligemma.checkpoints.checkpoint import open_checkpoint
from paligemma.checkpoints.hub import full_name, reason
from paligemma.checkpoints.identify import MASK_DECODERS, identify, refuse_pickle
from paligemma.checkpoints.npz_io import pieces_of
from paligemma.checkpoints.verify import Progress, verify
from paligemma.checkpoints.write import SUMS
from paligemma.errors import CheckpointError, HubError, OptionError

CARD = "README.md"
# Beside the weights, where they are.
_BESIDE = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.model",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "chat_template.jinja", "paligemma_tokenizer.model", "gemma_tokenizer.model", *MASK_DECODERS,
    SUMS,
)  # fmt: skip
# Part of the weights.
_OF_WEIGHTS = {"hf": "model.safetensors.index.json", "adapter": "adapter_config.json"}
# Beside the card.
_WITH_CARD = ("scores.json", "curves.png", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg")
# Weights of an earlier push that a reader would take for part of this one.
_STALE = re.compile(
    r"(model(-\d+-of-\d+)?|adapter_model)\.safetensors|model\.safetensors\.index\.json|adapter_config\.json"
    rf"|config\.json|{SUMS}|[^/]+\.npz(\.part[^/]*)?"
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LINK = re.compile(
    r"""(!\[[^\]]*\]\(\s*<?)(?P<md>[^)>\s]+)|(<img\b[^>]*?\bsrc\s*=\s*["'])(?P<html>[^"']+)""", re.IGNORECASE
)
_LOAD = re.compile(r"""(paligemma\.load\()(["'])(?P<name>[^"']*)\2(\s*,\s*adapter\s*=\s*(["'])[^"']*\5)?""")


@dataclass(frozen=True)
class Parcel:
    """What is sent.

    Attributes:
        repo: hub id.
        kind: "model" or "adapter".
        files: name in the repository -> file here, or its content where it is not sent as it stands.
    """

    repo: str
    kind: str
    files: Mapping[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Name in the repository -> bytes."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}


@dataclass(frozen=True)
class Pushed:
    """What the hub has taken.

    Attributes:
        url: of the repository; commit: the new one, or the old one where nothing had changed.
        files: sent or already there; removed: weights of an earlier push.
    """

    repo: str
    revision: str
    commit: str
    url: str
    files: tuple[str, ...]
    removed: tuple[str, ...]


def push(
    folder: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    create: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Send a result folder to the hub.

    Everything is checked before anything is sent, and becomes visible in one commit: after a failure the repository
    holds what it held. `HF_TOKEN`, `HF_ENDPOINT` and `hf auth login` work as everywhere.

    Args:
        folder: of a run (model/ or adapter/ with the card beside it), or one with weights and README.md.
        repo: hub id, "owner/name".
        revision: branch; default main.
        private: make a new repository private; an existing public one is refused.
        message: of the commit.
        create: make the repository, and the branch, where they do not exist.
        progress: told (bytes verified, bytes in all).

    Raises:
        CheckpointError: no weights, unsound weights, pickles, no card, or a card that shows pictures that are missing.
        HubError: a name that cannot be, nobody logged in, no such repository, or a hub that says no.
    """
    _require_name(repo)
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise OptionError(f"revision={revision!r}: a commit, which cannot be written to: expected a branch.")
    parcel = pack(folder, repo, progress=progress)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    token = get_token()
    if not token:
        raise HubError(
            "nobody is logged in to the hub: expected a token that may write. Run `hf auth login` or set HF_TOKEN."
        )
    api = HfApi(token=token)
    head = _Head.find(api, repo, revision, private=private, create=create)
    removed = sorted(name for name in head.names if _STALE.fullmatch(name) and name not in parcel.files)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(path_in_repo=name) for name in removed
    ]
    operations += [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=file if isinstance(file, bytes) else str(file))
        for name, file in parcel.files.items()
    ]
    try:
        done = api.create_commit(
            repo, operations, commit_message=message or f"{parcel.kind} and card", revision=revision,
            parent_commit=head.commit,
        )  # fmt: skip
    except Exception as error:  # the client and the HTTP library behind it have failures of their own
        raise HubError(f"{repo}: not sent ({reason(error)}). {head.after_failure()}") from error
    commit = str(done.oid)
    _require_arrival(api, repo, commit, parcel)
    return Pushed(
        repo, revision or "main", commit, f"{api.endpoint}/{repo}", tuple(sorted(parcel.files)), tuple(removed)
    )


def pack(folder: str | Path, repo: str, *, progress: Progress | None = None) -> Parcel:
    """What `push` would send, read from end to end and found sound; the network is not asked.

    Raises:
        CheckpointError: as for `push`.
    """
    given = Path(folder)
    if not given.is_dir():
        raise CheckpointError(f"{given}: no such folder: expected one with weights and {CARD}. Check the path.")
    home, desk = _places(given)
    kind = identify(home)
    if kind == "pickle":
        raise refuse_pickle(home)
    verdict = verify(home, progress=progress)
    if not verdict.is_sound:
        more = f" (and {len(verdict.problems) - 1} more)" if len(verdict.problems) > 1 else ""
        raise CheckpointError(f"not sent, the weights are unsound: {verdict.problems[0]}{more}. Export them again.")
    card = desk / CARD
    if not card.is_file():
        raise CheckpointError(
            f"{desk}: no {CARD}: expected a card that says what the model is. Every run writes one; see "
            "docs/publishing.md for what belongs into it."
        )
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise CheckpointError(f"{card}: empty: expected a card that says what the model is.")
    files: dict[str, Path | bytes] = {path.name: path for path in _weights(home, kind)}
    files |= {name: home / name for name in (*_BESIDE, _OF_WEIGHTS.get(kind, CARD)) if (home / name).is_file()}
    files |= {name: desk / name for name in _WITH_CARD if (desk / name).is_file()}
    files |= {name: desk / name for name in _shown(text, card)}
    files[CARD] = _addressed(text, card, home, repo, is_adapter=kind == "adapter").encode()
    return Parcel(repo, "adapter" if kind == "adapter" else "model", dict(sorted(files.items())))


def _places(folder: Path) -> tuple[Path, Path]:
    """Where the weights lie, and where the card."""
    inner = [folder / name for name in ("model", "adapter") if (folder / name).is_dir()]
    holds = any(
        path.name.endswith((".safetensors", ".npz")) or path.name == "adapter_config.json" for path in folder.iterdir()
    )
    if inner and not holds:
        return inner[0], folder
    in_run = folder.absolute().name in ("model", "adapter") and not (folder / CARD).is_file()
    return folder, folder.absolute().parent if in_run and (folder.absolute().parent / CARD).is_file() else folder


def _weights(home: Path, kind: str) -> list[Path]:
    """The files that hold tensors of this checkpoint, and no other that lies beside them."""
    if kind == "adapter":
        return [home / "adapter_model.safetensors"]
    with open_checkpoint(home) as checkpoint:
        held = {Path(checkpoint.source(name).split(": ")[0]) for name in checkpoint}
    return sorted(piece for path in held for piece in pieces_of(path) or [path])


def _shown(text: str, card: Path) -> list[str]:
    """Pictures beside the card that it shows; they keep their place beside it."""
    found = []
    for match in _LINK.finditer(text):
        link = match["md"] or match["html"]
        if re.match(r"[a-z][a-z0-9+.-]*:|//|#", link, re.IGNORECASE):
            continue
        name = PurePosixPath(unquote(link.split("#")[0].split("?")[0]))
        if name.is_absolute() or ".." in name.parts or name.suffix.lower() not in _PICTURES:
            raise CheckpointError(f"{card}: shows {link}: expected a picture in its own folder. Put it there.")
        if not (card.parent / name).is_file():
            raise CheckpointError(f"{card}: shows {link}, which is missing. Put it there or take the line out.")
        found.append(str(name))
    return found


def _addressed(text: str, card: Path, home: Path, repo: str, *, is_adapter: bool) -> str:
    """The card as it reads on the hub: `paligemma.load` names the repository, `base_model` a hub id or nothing."""
    head, body, bases = "", text, set[str]()
    if is_adapter:
        bases.add(parse_adapter_config(home).base)
    front = re.match(r"\A---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
    if front:
        base = _metadata(front[1], card).get("base_model")
        head, body = front[1], text[front.end() :]
        if isinstance(base, str):
            bases.add(base)
            line = f"base_model: {full_name(base)}\n" if _HUB_ID.fullmatch(full_name(base)) else ""
            head = re.sub(r"^base_model:.*\n", line, head, flags=re.MULTILINE)
        head = f"---\n{head}---\n"

    def address(match: re.Match[str]) -> str:
        name = match["name"]
        if is_adapter and name in bases:
            return f'{match[1]}"{full_name(name)}", adapter="{repo}"'
        # Another published model in another example stays as it is.
        return f'{match[1]}"{repo}"' if not is_adapter and _is_of(name, card.absolute().parent) else match[0]

    return head + _LOAD.sub(address, body)


def _is_of(name: str, folder: Path) -> bool:
    """Whether a name is a path, or how a run calls its own folder."""
    parts = PurePosixPath(name).parts
    is_path = name.startswith(("/", ".", "~")) or len(parts) > 2
    return is_path or parts[-2:] == (folder.name, "model") or parts[-1:] == (folder.name,)


def _metadata(front: str, card: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(front)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{card}: its front matter is not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{card}: its front matter is no mapping: expected lines such as `license: gemma`.")
    return values


def _require_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    wish = "expected owner/name, letters, digits, '-', '_' and '.', at most 96 of them. For example me/digits."
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"{repo!r} cannot be a repository ({' '.join(str(error).split())}): {wish}") from None
    if "/" not in repo:
        raise HubError(f"{repo!r} names no owner: {wish}")


@dataclass(frozen=True)
class _Head:
    """What a branch holds before anything is sent."""

    api: Any
    repo: str
    revision: str | None
    commit: str | None
    names: tuple[str, ...]

    @classmethod
    def find(cls, api: Any, repo: str, revision: str | None, *, private: bool, create: bool) -> "_Head":
        from huggingface_hub import errors

        try:
            info = cls._info(api, repo, None, private=private, create=create)
            if private and not info.private:
                raise HubError(f"{repo} is public: expected a private one (--private). Change it in its settings.")
            if revision is not None:
                try:
                    info = api.repo_info(repo, revision=revision)
                except errors.RevisionNotFoundError:
                    if not create:
                        raise HubError(
                            f"{repo} has no branch {revision!r}: expected one that exists. Make it with --create."
                        ) from None
                    api.create_branch(repo, branch=revision)
                    info = api.repo_info(repo, revision=revision)
        except HubError:
            raise
        except Exception as error:
            raise HubError(f"{repo}: not sent ({reason(error)}). {_advice(error)}") from error
        return cls(api, repo, revision, info.sha, tuple(sibling.rfilename for sibling in info.siblings or ()))

    @staticmethod
    def _info(api: Any, repo: str, revision: str | None, *, private: bool, create: bool) -> Any:
        from huggingface_hub import errors

        try:
            return api.repo_info(repo, revision=revision)
        except errors.GatedRepoError:
            raise HubError(f"{repo} is gated: expected that you may write to it. Ask its owner.") from None
        except errors.RepositoryNotFoundError:
            if not create:
                raise HubError(
                    f"{repo} does not exist on the hub, or you may not see it: expected one to write to. Make it with "
                    "--create."
                ) from None
        api.create_repo(repo, private=private)
        return api.repo_info(repo, revision=revision)

    def after_failure(self) -> str:
        """What stands there now, as far as the hub can be asked."""
        try:
            now = self.api.repo_info(self.repo, revision=self.revision).sha
        except Exception:
            return f"Look at {self.api.endpoint}/{self.repo}: the hub no longer answers whether it took it."
        if now == self.commit:
            return "The repository is as it was; try again."
        return f"{self.repo} has moved to {str(now)[:10]} meanwhile: somebody else pushed, or the answer was lost."


def _advice(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if getattr(response, "status_code", None) in (401, 403):
        return "Log in as somebody who may write there: `hf auth login` or HF_TOKEN."
    return "Nothing was sent; try again."


def _require_arrival(api: Any, repo: str, commit: str, parcel: Parcel) -> None:
    """A .gitignore in the repository makes the hub leave files out without a word."""
    try:
        there = {sibling.rfilename for sibling in api.repo_info(repo, revision=commit).siblings or ()}
    except Exception:  # the commit was taken: that it cannot be looked at just now changes nothing
        return
    missing = sorted(set(parcel.files) - there)
    if missing:
        raise HubError(
            f"{repo}: the hub left out {missing[0]}: expected all files at {commit[:10]}. A .gitignore in the "
            "repository may name it; take the line out and push again."
        )
