"""Shards on disks and in buckets: what they are called, their state, and ranges of their bytes.

A path is opened anew for every read and an address goes through fsspec, which gives every process a store of its own:
nothing here has to survive a fork.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from paligemma.data.sources.parquet import by_number, by_split
from paligemma.data.sources.tar_index import Member, State
from paligemma.errors import DataError, MissingExtra, PaliGemmaError

# What a store tells of an object that changes with its content; the first that is there.
MARKS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")


def is_address(shard: str | Path) -> bool:
    return "://" in str(shard)


def far_folder(address: str) -> dict[str, list[str]] | None:
    """The tars of a folder in a store, by split as `by_split`; None for an address of anything else."""
    if "*" in address or address.endswith(".tar"):
        return None
    system, path = _system(address)
    with _told(address):
        if not system.isdir(path):
            return None
        folder = path.rstrip("/")
        names = [str(name) for name in system.glob(f"{folder}/**/*.tar")]
        found = by_split(name[name.index(folder) + len(folder) + 1 :] for name in names)
        return {split: [f"{address.rstrip('/')}/{name}" for name in inside] for split, inside in found.items()}


def far_files(address: str) -> list[str]:
    """An address itself, or those that a pattern finds in its store, in the order of their numbers."""
    if "*" not in address:
        return [address]
    system, path = _system(address)
    with _told(address):
        return [str(system.unstrip_protocol(name)) for name in sorted(system.glob(path), key=by_number)]


def _system(address: str) -> tuple[Any, str]:
    """The store of an address and the path in it; fsspec gives every process its own."""
    try:
        import fsspec.core
    except ImportError:
        raise MissingExtra("fsspec", "data", f"reading {address}") from None
    with _told(address):
        system, path = fsspec.core.url_to_fs(address)
    return system, str(path)


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """What a store raises, as one line: each has errors of its own."""
    try:
        yield
    except PaliGemmaError:
        raise
    except ImportError as error:
        raise DataError(f"{address}: {_line(error)}: expected the package of this store. Install it.") from None
    except Exception as error:
        raise DataError(
            f"{address} cannot be read ({_line(error)}): expected a tar there. Check the address and who may read it."
        ) from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def state_of(shard: str) -> State:
    if not is_address(shard):
        try:
            stat = os.stat(shard)
        except OSError as error:
            raise DataError(f"{shard}: {error.strerror}: expected a tar. Check the path.") from None
        return State(stat.st_size, str(stat.st_mtime_ns))
    system, path = _system(shard)
    with _told(shard):
        told = system.info(path)
        mark = next((told[key] for key in MARKS if told.get(key)), None) or system.ukey(path)
        return State(int(told["size"]), str(mark))


def open_shard(shard: str) -> BinaryIO:
    if not is_address(shard):
        return open(shard, "rb")
    system, path = _system(shard)
    with _told(shard):
        file: BinaryIO = system.open(path, "rb")
    return file


def read_members(shard: str, members: Sequence[Member]) -> list[bytes]:
    if is_address(shard):
        system, path = _system(shard)
        starts = [member.offset for member in members]
        ends = [member.offset + member.size for member in members]
        with _told(shard):
            found = list(system.cat_ranges([path] * len(members), starts, ends, on_error="raise"))
    else:
        found = []
        try:
            with open(shard, "rb") as file:
                for member in members:
                    file.seek(member.offset)
                    found.append(file.read(member.size))
        except OSError as error:
            raise DataError(
                f"{shard}: {error.strerror}: expected the tar that was opened. Open the source again."
            ) from None
    for member, data in zip(members, found, strict=True):
        if len(data) != member.size:
            raise DataError(f"{shard}: shorter than when it was opened: expected it unchanged. Open the source again.")
    return found


def fetch_index(shard: str) -> bytes | None:
    """The index that lies beside a shard in its store."""
    system, path = _system(shard)
    try:
        return bytes(system.cat_file(f"{path}.index"))
    except Exception:  # not there, in as many ways as there are stores
        return None


def send_index(shard: str, index: bytes) -> None:
    """Keep an index beside its shard, where the store lets us; stores make an object visible when it is whole."""
    system, path = _system(shard)
    with contextlib.suppress(Exception):
        system.pipe_file(f"{path}.index", index)


def name_of(shard: str) -> str:
    return shard.rstrip("/").rsplit("/", 1)[-1]
