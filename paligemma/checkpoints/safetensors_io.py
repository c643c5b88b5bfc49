"""Safetensors, read one tensor at a time and written one tensor at a time.

The format is an 8-byte length, a JSON header and the bytes. The `safetensors` package does not check a file's length
before it maps it, where a truncated one shows up as a bus error, and writes only what is in memory all at once;
converting a 28B model needs neither, so both directions are written out here. Tests hold them against that package.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from paligemma.checkpoints.files import CHUNK_BYTES, Scratch, Spec, byte_view
from paligemma.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_FLOATS: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_OTHERS: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "C64": torch.complex64,  # gemma_pytorch keeps a buffer of frequencies
}  # fmt: skip
TYPES = _FLOATS | _OTHERS
_CODES = {dtype: code for code, dtype in TYPES.items()}


def read_header(path: Path) -> tuple[dict[str, tuple[Spec, int]], dict[str, str], int]:
    """Names with spec and absolute byte offset, the metadata, and the size the file must have.

    Raises:
        CheckpointError: not safetensors, truncated, or a header that contradicts itself.
    """
    n_file = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        n_header = int.from_bytes(head, "little")
        if len(head) < 8 or n_header > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file: expected an 8-byte header length. Fetch it again.")
        raw = file.read(n_header)
    if len(raw) < n_header:
        raise CheckpointError(
            f"{path}: truncated inside its header ({n_file:,} bytes): expected at least {n_header + 8:,}. "
            "Download it again."
        )
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is not JSON ({error}). Download it again.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header is not an object. Download it again.")
    metadata = header.pop("__metadata__", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    entries: dict[str, tuple[Spec, int]] = {}
    end = 0
    for name, entry in header.items():
        spec, start, stop = _entry(path, name, entry)
        entries[name] = (spec, 8 + n_header + start)
        end = max(end, stop)
    if n_file != 8 + n_header + end:
        what = "truncated" if n_file < 8 + n_header + end else "longer than it should be"
        raise CheckpointError(
            f"{path}: {what}: {n_file:,} bytes, but its header announces {8 + n_header + end:,}. Download it again."
        )
    return entries, metadata, n_file


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} occurs twice")
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[Spec, int, int]:
    try:
        shape = tuple(int(n) for n in entry["shape"])
        start, stop = (int(n) for n in entry["data_offsets"])
        code = entry["dtype"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: the header entry of {name} is malformed. Download it again.") from None
    if code not in TYPES:
        raise CheckpointError(f"{path}: {name} has dtype {code}: expected one of {', '.join(TYPES)}.")
    spec = Spec(shape, TYPES[code])
    if min(shape, default=0) < 0 or start < 0 or stop - start != spec.n_bytes:
        raise CheckpointError(
            f"{path}: {name} {list(shape)} {code} needs {spec.n_bytes:,} bytes, but its header gives it "
            f"{stop - start:,}. Download it again."
        )
    return spec, start, stop


class SafetensorsFiles:
    """One safetensors file, or the shards of one model, as a `TensorFile`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._open: dict[int, IO[bytes]] = {}
        self._maps: dict[int, Any] = {}  # untyped storages; None where the system cannot map the file
        for number, path in enumerate(self.paths):
            entries, metadata, _ = read_header(path)
            self.metadata.update(metadata)
            for name, (spec, offset) in entries.items():
                if name in self.specs:
                    raise CheckpointError(
                        f"{name} stands in two files, {self.where(name)} and {path}: expected it once. "
                        "Remove the shards that do not belong to this checkpoint."
                    )
                self.specs[name] = spec
                self._places[name] = (number, offset)

    def where(self, name: str) -> str:
        return str(self.paths[self._places[name][0]])

    def place(self, name: str) -> tuple[int, int]:
        return self._places[name]

    def read(self, name: str, index: tuple[int, ...] = (), scratch: Scratch | None = None) -> Tensor:
        """A view of the mapped file where the system can map it, so that nothing is copied that need not be.

        The mapping is private: writing to the tensor never reaches the file, and takes memory only for pages written.
        """
        spec = self.specs[name]
        rest = spec.shape[len(index) :]
        skip = 0
        for axis, i in enumerate(index):
            skip += i * math.prod(spec.shape[axis + 1 :])
        mapped = self._mapped(name, skip * spec.dtype.itemsize, rest, spec.dtype)
        if mapped is not None:
            return mapped
        out = (scratch or Scratch()).take(rest, spec.dtype)
        self._read_into(name, skip * spec.dtype.itemsize, byte_view(out))
        return out

    def _mapped(self, name: str, skip: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        number, offset = self._places[name]
        start, n_bytes = offset + skip, math.prod(shape) * dtype.itemsize
        if n_bytes == 0 or start % dtype.itemsize:
            return None
        path = self.paths[number]
        # The header announced more when it was read; touching a page that is gone would end the process.
        if path.stat().st_size < start + n_bytes:
            raise CheckpointError(f"{path}: ended inside {name}: truncated while it was being read.")
        if number not in self._maps:
            try:
                self._maps[number] = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
            except RuntimeError:  # some network file systems cannot be mapped
                self._maps[number] = None
        storage = self._maps[number]
        if storage is None:
            return None
        # A storage of its own, not a view of the whole: saving or copying one tensor must not take the file along.
        return torch.empty(0, dtype=dtype).set_(storage[start : start + n_bytes]).view(shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, so that large tables can be compared without holding them."""
        spec = self.specs[name]
        out = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        self._read_into(name, start * math.prod(spec.shape[1:]) * spec.dtype.itemsize, byte_view(out))
        return out

    def _read_into(self, name: str, skip: int, buffer: memoryview) -> None:
        number, offset = self._places[name]
        file = self._open.get(number)
        if file is None:
            file = self._open[number] = self.paths[number].open("rb", buffering=0)
        file.seek(offset + skip)
        done = 0
        while done < len(buffer):
            n = file.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not n:
                raise CheckpointError(f"{self.paths[number]}: ended inside {name}: truncated while it was being read.")
            done += n

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._maps.clear()  # tensors handed out keep their part alive


class SafetensorsWriter:
    """Writes one file: the header first, from specs, then every tensor in that order."""

    def __init__(self, file: IO[bytes], specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._todo = list(specs.items())[::-1]
        self._sha256 = hashlib.sha256()
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for name, spec in specs.items():
            header[name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.n_bytes],
            }
            offset += spec.n_bytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # the reference implementation aligns the data to 8 bytes
        self._put(memoryview(len(raw).to_bytes(8, "little") + raw))

    def add(self, name: str, tensor: Tensor) -> None:
        expected, spec = self._todo.pop()
        assert name == expected, f"{name} written where {expected} belongs"
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), f"{name}: {tensor.shape} {tensor.dtype}"
        self._put(byte_view(tensor.contiguous()))

    def finish(self) -> str:
        """The sha256 of the whole file, in hexadecimal."""
        assert not self._todo, f"{self._todo[-1][0]} was never written"
        return self._sha256.hexdigest()

    def _put(self, data: memoryview) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            self._sha256.update(chunk)
            self._file.write(chunk)


def plan_shards(specs: Mapping[str, Spec], max_bytes: int) -> list[dict[str, Spec]]:
    """Cut tensors, in order, into groups of at most `max_bytes` (a larger tensor stands alone)."""
    shards: list[dict[str, Spec]] = [{}]
    n_bytes = 0
    for name, spec in specs.items():
        if shards[-1] and n_bytes + spec.n_bytes > max_bytes:
            shards.append({})
            n_bytes = 0
        shards[-1][name] = spec
        n_bytes += spec.n_bytes
    return shards


def shard_names(n_shards: int) -> list[str]:
    if n_shards == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)]
