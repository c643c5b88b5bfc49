"""Names and paths -> a local folder, through `huggingface_hub` and its cache."""

import re
from pathlib import Path

from paligemma.checkpoints.identify import split_subkey
from paligemma.checkpoints.npz_io import pieces_of
from paligemma.errors import CheckpointError, HubError, OptionError, nearest
from paligemma.presets import EMBEDDED

_SHORT = re.compile(r"paligemma2?-\d+b-[\w.-]+")
# Weights that can be read without running code, configuration and tokenizer; never a pickle.
_WANTED = (
    "*.safetensors", "*.safetensors.index.json", "*.npz", "*.npz.part*", "config.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "tokenizer.json", "*.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "adapter_config.json", "SHA256SUMS",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".npz")

PUBLIC_NAMES = (
    *(f"paligemma-3b-{kind}-{side}" for kind in ("pt", "mix") for side in (224, 448)),
    "paligemma-3b-pt-896",
    *(f"paligemma2-{size}-pt-{side}" for size in ("3b", "10b", "28b") for side in (224, 448, 896)),
    *(f"paligemma2-{size}-mix-{side}" for size in ("3b", "10b", "28b") for side in (224, 448)),
    *(f"paligemma2-{size}-ft-docci-448" for size in ("3b", "10b")),
)


def resolve(
    name: str | Path, revision: str | None = None, *, cache_dir: str | Path | None = None, local_only: bool = False
) -> Path:
    """The local file or folder that a name means; hub repositories are downloaded once and pinned to one commit.

    A path that exists wins; then short names (`paligemma2-3b-mix-448`) mean `google/…`; then hub ids. All files come
    from the commit that `revision` points to at the first request, and the folder is named after it (`commit_of`).
    `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN` and the cache folder work as everywhere with `huggingface_hub`; when the
    hub cannot be reached, what the cache holds is used.

    Args:
        name: path, short name or hub id.
        revision: branch, tag or commit of a hub repository; default its main branch.
        local_only: never ask the network.

    Raises:
        HubError: the repository does not exist, is gated, cannot be reached, or holds pickles alone.
        CheckpointError: a path that does not exist.
        OptionError: a revision for a local path.
    """
    path, _ = split_subkey(Path(name).expanduser())
    if path.exists() or pieces_of(path):
        if revision is not None:
            raise OptionError(f"revision={revision!r} for the local path {name}: only hub ids have one. Leave it out.")
        return Path(name).expanduser()
    return _download(_repository(str(name)), revision, cache_dir, local_only)


def full_name(name: str) -> str:
    """A short name of a published model with its owner; any other name as it is."""
    return f"google/{name}" if _SHORT.fullmatch(name) else name


def _repository(name: str) -> str:
    if _SHORT.fullmatch(name):
        return full_name(name)
    file, _ = split_subkey(name)
    if name.startswith((".", "/", "~")) or file.suffix in _WEIGHTS or name.count("/") > 1 or "\\" in name:
        raise CheckpointError(f"{name}: no such file or folder: expected a checkpoint. Check the path.")
    if name.count("/") != 1:
        raise HubError(
            f"{name!r} is no local path and no model name: expected a folder, an .npz file, a hub id such as "
            f"google/paligemma2-3b-mix-448, or a short name.{nearest(name, (*PUBLIC_NAMES, *EMBEDDED))}"
        )
    return name


def _download(repo_id: str, revision: str | None, cache_dir: str | Path | None, local_only: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{repo_id}"
    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_only,
                allow_patterns=list(_WANTED),
                ignore_patterns=["*/*"],
            )
        )
    except errors.GatedRepoError:
        raise HubError(
            f"{repo_id} is gated: expected that you have accepted its licence. Visit {page}, accept it, then log in "
            "with `hf auth login` or set HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repo_id} has no revision {revision!r}: expected a branch, tag or commit of {page}.") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{repo_id} does not exist on the hub, or is private: expected a public name or a login that may see it."
            f"{nearest(repo_id, [f'google/{known}' for known in PUBLIC_NAMES])} See {page}."
        ) from None
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} cannot be a hub id ({str(error).splitlines()[0]})") from None
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{repo_id}{f' at {revision}' if revision else ''} is not complete in the local cache, and the hub was "
            f"not reached ({reason(error)}): expected a connection or a cached download. "
            "Connect, unset HF_HUB_OFFLINE, or name a local folder."
        ) from None
    except Exception as error:  # the HTTP library behind the client has failures of its own, which change with it
        raise HubError(f"{repo_id} could not be downloaded ({reason(error)}). Try again or name a folder.") from error
    if not any(path.name.endswith(_WEIGHTS) or ".npz.part" in path.name for path in folder.iterdir()):
        raise HubError(
            f"{repo_id} holds no safetensors and no .npz: expected weights that no code needs to "
            f"run for (pickles are never downloaded). See {page} for another revision."
        )
    return folder


def reason(error: BaseException) -> str:
    """What went wrong inside the client, short and on one line."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:120]}"


def commit_of(folder: str | Path) -> str | None:
    """The commit a cached hub folder is pinned to; None for any other folder."""
    found = _SNAPSHOT.search(str(Path(folder).absolute()))
    return found[2] if found else None


def hub_name(folder: Path) -> str:
    """ "google/paligemma2-3b-pt-224@<commit>" for a folder of the hub cache, else the empty string."""
    found = _SNAPSHOT.search(str(folder.absolute()))
    return f"{found[1].replace('--', '/')}@{found[2]}" if found else ""


_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})$")
