"""Where the members of a tar lie, so that an example in the middle costs one seek.

One pass over the headers finds every member; the result is kept beside the shard as `<shard>.index`:

    line of magic · length of the head · head (JSON) · examples · members · keys · problems

An example's lines are read from there when it is asked for. Nothing is mapped into memory: pages that were looked at
would count as the reader's own, and a long run looks at all of them. An index belongs to one state of its shard: size
and time of change, or what the store gives for it (an etag).
"""

import json
import os
import re
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paligemma.errors import DataError

MAGIC = b"paligemma tar index 2\n"
BLOCK = tarfile.BLOCKSIZE
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # the convention of WebDataset: the key ends at the first dot
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}  # fmt: skip
_EXAMPLE, _MEMBER = 16, 24  # bytes of a line
PICTURES = frozenset(
    {"jpg", "jpeg", "jfif", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif"}
)


class State(NamedTuple):
    """What an index is valid for: bytes of the shard, and a mark that changes with its content."""

    size: int
    mark: str


class Member(NamedTuple):
    """A file of an example; kind is its name after the key: "jpg", "0.jpg", "json"."""

    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class Index:
    """The members of a shard, example by example.

    Attributes:
        kinds: what members' kinds are numbers of.
        examples: int64[n + 1, 2], the first member of each example, and where its key begins in `keys`.
        members: int64[m, 3], offset and size in bytes, and number of the kind. A member that reaches beyond the end of
            the shard is cut off.
        keys: UTF-8.
        problems: what is wrong with the shard.
    """

    kinds: tuple[str, ...]
    examples: NDArray[np.int64]
    members: NDArray[np.int64]
    keys: bytes
    problems: tuple[str, ...]


class KeptIndex:
    """An index in its file, open for reading; what it gives is read there every time.

    Raises:
        ValueError: none, or one of another state of the shard. OSError: not there.
    """

    def __init__(self, path: Path, state: State) -> None:
        self._file = path.open("rb", buffering=0)
        start = len(MAGIC) + 8
        begin = self._file.read(start)
        if not begin.startswith(MAGIC) or len(begin) < start:
            raise ValueError("not an index")
        (length,) = struct.unpack("<q", begin[len(MAGIC) :])
        size = os.fstat(self._file.fileno()).st_size
        head = json.loads(self._file.read(length)) if 0 <= length <= size else {}
        if not isinstance(head, dict) or [head.get("size"), head.get("mark")] != [*state]:
            raise ValueError("an index of another state of the shard")
        self.kinds: tuple[str, ...] = tuple(head["kinds"])
        self._starts = np.cumsum([start + length, *head["bytes"]]).tolist()
        if self._starts[-1] != size:
            raise ValueError("an index that is cut off")

    def __len__(self) -> int:
        return int((self._starts[1] - self._starts[0]) // _EXAMPLE - 1)

    def key(self, i: int) -> str:
        _, start, _, end = self._example(i)
        return self._read(2, start, end - start).decode("utf-8", "surrogateescape")

    def members(self, i: int) -> list[Member]:
        first, _, last, _ = self._example(i)
        data = self._read(1, first * _MEMBER, (last - first) * _MEMBER)
        return [Member(self.kinds[kind], offset, size) for offset, size, kind in struct.iter_unpack("<3q", data)]

    def problems(self) -> tuple[str, ...]:
        return tuple(json.loads(self._read(3, 0, self._starts[4] - self._starts[3])))

    def _example(self, i: int) -> tuple[int, int, int, int]:
        """First member, begin of the key; the same of the next example."""
        found: tuple[int, int, int, int] = struct.unpack("<4q", self._read(0, i * _EXAMPLE, 2 * _EXAMPLE))
        return found

    def _read(self, part: int, offset: int, n: int) -> bytes:
        # At a place of its own, not the file's: forked processes and threads share the file.
        return os.pread(self._file.fileno(), n, self._starts[part] + offset)


def scan(file: BinaryIO, size: int, name: str) -> Index:
    """Find the members of a tar by its headers; the data is skipped. What is no tar at all has none, and says why.

    Raises:
        DataError: compressed.
    """
    _refuse_packed(file, name)
    found: dict[str, list[tuple[int, int, int]]] = {}
    kinds: dict[str, int] = {}
    problems: list[str] = []
    ending: list[str] = []
    for member, offset, length, is_file in _headers(file, size, name, ending):
        split = _KEY.fullmatch(member)
        if not is_file:
            problems.append(f"{name}: {member} is a link or a special file: left out. Write plain files.")
        elif split is not None:
            kind = kinds.setdefault(split[2].lower(), len(kinds))
            there = found.setdefault(split[1], [])
            if any(kind == other for _, _, other in there):
                problems.append(f"{name}: {member} is there twice: the first is used. Give every example its own key.")
            else:
                there.append((offset, length, kind))
    if ending and len(found) > 1:  # files that the example before has and the last one lacks lay behind the break
        before, last = list(found.values())[-2:]
        names = list(kinds)
        has = {_alike(names[kind]) for _, _, kind in last}
        last += [(size, 1, kind) for _, _, kind in before if _alike(names[kind]) not in has]
    keys = [key.encode("utf-8", "surrogateescape") for key in found]
    return Index(
        tuple(kinds),
        np.cumsum([(0, 0), *zip(map(len, found.values()), map(len, keys), strict=True)], axis=0, dtype=np.int64),
        np.array([member for there in found.values() for member in there], np.int64).reshape(-1, 3),
        b"".join(keys),
        (*problems, *ending),
    )


def _alike(kind: str) -> str:
    """The kind of a file, of pictures whatever their format: "0.jpg" and "0.png" are the same."""
    start, dot, last = kind.rpartition(".")
    return f"{start}{dot}picture" if last in PICTURES else kind


def _headers(file: BinaryIO, size: int, name: str, ending: list[str]) -> Iterator[tuple[str, int, int, bool]]:
    """Name, offset of the data, size, and whether it is a plain file, of every member but folders.

    Args:
        ending: takes what is wrong with the end.
    """
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file belongs to the caller
    except (tarfile.TarError, ValueError, OSError) as error:
        ending.append(f"{name}: not a tar, or cut off ({error}): expected a tar of examples. Fetch the shard again.")
        return
    tar.firstmember = None  # type: ignore[attr-defined]  # it would come a second time
    offset = 0
    while offset < size:
        file.seek(offset)
        plain = None if tar.pax_headers else _plain(file.read(BLOCK))
        if plain is not None:  # nearly all; tarfile takes several times as long
            yield plain[0], offset + BLOCK, plain[1], True
            if offset + BLOCK + plain[1] > size:
                ending.append(cut(name, plain[0], size))
                return
            offset += BLOCK + plain[1] + -plain[1] % BLOCK
            continue
        file.seek(offset)
        tar.offset = offset  # type: ignore[attr-defined]
        try:
            member = tar.next()
        except (tarfile.TarError, ValueError, IndexError) as error:
            ending.append(f"{name}: damaged after {offset:,} of {size:,} bytes ({error}). Fetch the shard again.")
            return
        if member is None:
            break
        vars(tar)["members"] = []  # tarfile would keep every one
        if not member.isdir():
            yield member.name, member.offset_data, member.size, member.isreg() and not member.issparse()
        if member.isreg() and member.offset_data + member.size > size:
            ending.append(cut(name, member.name, size))
            return
        offset = tar.offset  # type: ignore[attr-defined]
    file.seek(min(offset, size))
    end = file.read(BLOCK)
    if len(end) < BLOCK:
        ending.append(f"{name}: ends after {size:,} bytes without a tar's end: it is cut off. Fetch the shard again.")
    elif any(end):
        ending.append(f"{name}: damaged after {offset:,} of {size:,} bytes: the rest is lost. Fetch the shard again.")


def _plain(block: bytes) -> tuple[str, int] | None:
    """Name and size of an ordinary file in an ordinary header; None leaves it to tarfile."""
    if len(block) < BLOCK or block[156] != 0x30 or block[257:262] != b"ustar" or block[345]:
        return None
    try:
        size, checksum = int(block[124:135], 8), int(block[148:154], 8)
    except ValueError:
        return None
    if size < 0 or sum(block) - sum(block[148:156]) + 8 * 0x20 != checksum:
        return None
    return block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape"), size


def cut(name: str, member: str, size: int) -> str:
    return f"{name}: {member} is cut off after {size:,} bytes: expected more. Fetch the shard again."


def _refuse_packed(file: BinaryIO, name: str) -> None:
    head = file.read(8)
    file.seek(0)
    for magic, (kind, tool) in _PACKED.items():
        if head.startswith(magic):
            raise DataError(
                f"{name} is compressed with {kind}: expected a plain tar, in which any example can be reached. "
                f"Unpack it: {tool} {name}"
            )


def to_bytes(index: Index, state: State) -> bytes:
    """The file of an index."""
    tables = [index.examples.astype("<i8", copy=False).tobytes(), index.members.astype("<i8", copy=False).tobytes()]
    parts = [*tables, index.keys, json.dumps(index.problems).encode()]
    head = {"size": state.size, "mark": state.mark, "kinds": index.kinds, "bytes": [len(part) for part in parts]}
    text = json.dumps(head).encode()
    return MAGIC + struct.pack("<q", len(text)) + text + b"".join(parts)


def read_index(path: Path, state: State) -> KeptIndex | None:
    """The index in a file; None where there is none for this state of the shard."""
    try:
        return KeptIndex(path, state)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=64)
def kept_index(path: Path, state: State, made_ns: int) -> KeptIndex:
    """As `read_index`, kept open; made_ns tells one file of that name from the next.

    Raises:
        DataError: the index is gone.
    """
    index = read_index(path, state)
    if index is None:
        raise DataError(f"{path}: the index of the tar is gone or changed while it was read. Open the source again.")
    return index


def write_file(path: Path, data: bytes) -> None:
    """All at once, so that nobody sees half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
