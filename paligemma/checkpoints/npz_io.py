"""Numpy archives, read slab by slab and written slab by slab.

The original checkpoints stack the layers of a tower into one array of many gigabytes, often deflated. A reader here
keeps one cursor per array and hands out one layer at a time, so that neither the stack nor the archive is ever held.
bfloat16 has no numpy dtype: such arrays are stored as 2-byte void (`|V2`) whose bits are bfloat16.
"""

import bisect
import io
import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from paligemma.checkpoints.files import CHUNK_BYTES, Scratch, Spec, byte_view
from paligemma.errors import CheckpointError, PickleRefused

_DTYPES: dict[str, torch.dtype] = {
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "V2": torch.bfloat16, "b1": torch.bool,
    "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8,
}  # fmt: skip
_DESCR: dict[torch.dtype, str] = {
    torch.float16: "<f2", torch.float32: "<f4", torch.float64: "<f8", torch.bfloat16: "|V2", torch.uint8: "|u1",
}  # fmt: skip
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError)


class _Entry:
    """One array of the archive: where it lies, what it is, and how far it has been read."""

    def __init__(self, member: zipfile.ZipInfo, spec: Spec, *, is_fortran: bool, is_big_endian: bool) -> None:
        self.member, self.spec = member, spec
        self.is_fortran, self.is_big_endian = is_fortran, is_big_endian
        self.stream: IO[bytes] | None = None
        self.position = 0  # bytes of data behind us

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream, self.position = None, 0


class NpzFile:
    """An `.npz` as a `TensorFile`; the pieces of a split one are read as if they were whole.

    Raises:
        CheckpointError: damaged or truncated, or an array of a kind that cannot hold weights.
        PickleRefused: an array of Python objects, which only a pickle could read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        parts = pieces_of(path)
        try:
            file: IO[bytes] = _Concatenated(parts) if parts else path.open("rb")  # type: ignore[assignment]
            self._file = file
            self._zip = zipfile.ZipFile(file)
            members = [m for m in self._zip.infolist() if not m.is_dir()]
            if any(member.header_offset < 0 for member in members):
                raise zipfile.BadZipFile("bytes are missing before its directory")
            self._entries = {m.filename.removesuffix(".npy"): self._header(m) for m in members}
        except _DAMAGED as error:
            self._close_file()
            raise CheckpointError(
                f"{path}: not a whole .npz archive ({error}): expected a directory at its end and all arrays before. "
                "The file is truncated or damaged; download it again."
            ) from None
        except BaseException:
            self._close_file()
            raise
        if len(self._entries) != len(members):
            raise CheckpointError(f"{path}: two arrays have the same name. Write the file again.")
        self.specs = {name: entry.spec for name, entry in self._entries.items()}
        self._whole: tuple[str, Tensor] | None = None

    def _header(self, member: zipfile.ZipInfo) -> _Entry:
        with self._zip.open(member) as stream:
            shape, fortran, dtype = _npy_header(stream, f"{self.path}: {member.filename}")
        kind = f"{dtype.kind}{dtype.itemsize}"
        if kind not in _DTYPES:
            raise CheckpointError(f"{self.path}: {member.filename} has dtype {dtype}: expected one of {list(_DTYPES)}.")
        spec = Spec(shape, _DTYPES[kind])
        return _Entry(member, spec, is_fortran=fortran and len(shape) > 1, is_big_endian=dtype.byteorder == ">")

    def where(self, name: str) -> str:
        return str(self.path)

    def place(self, name: str) -> tuple[int, int]:
        return 0, self._entries[name].member.header_offset

    def read(self, name: str, index: tuple[int, ...] = (), scratch: Scratch | None = None) -> Tensor:
        entry = self._entries[name]
        if entry.is_fortran:
            return self._read_fortran(name, entry)[index].clone()
        rest = entry.spec.shape[len(index) :]
        slab = math.prod(rest) * entry.spec.dtype.itemsize
        number = 0
        for i, size in zip(index, entry.spec.shape, strict=False):
            number = number * size + i
        out = (scratch or Scratch()).take(rest, entry.spec.dtype)
        self._fill(name, entry, number * slab, byte_view(out))
        return _swap_bytes(out) if entry.is_big_endian else out

    def _read_fortran(self, name: str, entry: _Entry) -> Tensor:
        # Column-major arrays have no contiguous layers: the whole array is read and kept until another is asked for.
        if self._whole is None or self._whole[0] != name:
            out = torch.empty(entry.spec.shape[::-1], dtype=entry.spec.dtype)
            self._fill(name, entry, 0, byte_view(out))
            out = _swap_bytes(out) if entry.is_big_endian else out
            self._whole = (name, out.permute(*range(out.ndim - 1, -1, -1)))
        return self._whole[1]

    def _fill(self, name: str, entry: _Entry, start: int, buffer: memoryview) -> None:
        """Read bytes from `start` on, moving the array's cursor forward (or starting over when it lies behind)."""
        try:
            if entry.stream is None or entry.position > start:
                entry.close()
                entry.stream = self._zip.open(entry.member)
                _npy_header(entry.stream, name)
            while entry.position < start:
                self._advance(name, entry, min(CHUNK_BYTES, start - entry.position))
            done = 0
            while done < len(buffer):
                chunk = self._advance(name, entry, min(CHUNK_BYTES, len(buffer) - done))
                buffer[done : done + len(chunk)] = chunk
                done += len(chunk)
            if entry.position == entry.spec.n_bytes:
                # Reading past the end makes zipfile compare the checksum.
                if entry.stream.read(1):
                    raise CheckpointError(f"{self.path}: {name} holds more data than its shape says.")
                entry.close()
        except _DAMAGED as error:
            raise CheckpointError(
                f"{self.path}: {name} is damaged or truncated ({error}): its data do not match their checksum. "
                "Download the file again."
            ) from None

    def _advance(self, name: str, entry: _Entry, n: int) -> bytes:
        assert entry.stream is not None
        chunk = entry.stream.read(n)
        if not chunk:
            raise CheckpointError(
                f"{self.path}: {name} ends after {entry.position:,} of {entry.spec.n_bytes:,} bytes: truncated. "
                "Download the file again."
            )
        entry.position += len(chunk)
        return chunk

    def close(self) -> None:
        for entry in self._entries.values():
            entry.close()
        self._whole = None
        self._zip.close()
        self._close_file()

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()


def _npy_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    except ValueError as error:
        raise CheckpointError(f"{where}: not a numpy array ({error}). Download the file again.") from None
    if dtype.hasobject:
        raise PickleRefused(
            f"{where} holds Python objects, which only a pickle can read: expected plain numbers. It was not opened; "
            "save the arrays with numpy.savez as float32."
        )
    return shape, fortran, dtype


def _swap_bytes(tensor: Tensor) -> Tensor:
    size = tensor.dtype.itemsize
    return tensor.view(torch.uint8).reshape(*tensor.shape, size).flip(-1).contiguous().view(tensor.dtype)[..., 0]


class _Concatenated(io.RawIOBase):
    """Several files read as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._ends: list[int] = []
        for path in paths:
            self._ends.append(path.stat().st_size + (self._ends[-1] if self._ends else 0))
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._ends[-1])[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        number = bisect.bisect_right(self._ends, self._at)
        if number == len(self._ends):
            return 0
        file = self._files[number]
        file.seek(self._at - (self._ends[number - 1] if number else 0))
        n = file.readinto(buffer)
        self._at += n
        return n

    def read(self, size: int | None = -1) -> bytes:
        # zipfile takes a short read for the end of the archive: cross the seams between files here.
        wanted = self._ends[-1] - self._at if size is None or size < 0 else size
        parts: list[bytes] = []
        while wanted > 0 and (part := super().read(wanted)):
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def pieces_of(path: Path) -> list[Path]:
    """The pieces of an archive that was split for download (`x.npz.part0`, …), in order; empty if it is whole.

    `path` may be one of the pieces or the name without the suffix.
    """
    base = re.sub(r"\.part[^.]*$", "", path.name)
    if path.name == base and path.exists():
        return []
    found = [p for p in path.parent.glob(f"{base}.part*") if p.is_file()] if path.parent.is_dir() else []
    return sorted(found, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)])


class NpzWriter:
    """Writes arrays one after another, each slab by slab; uncompressed, as the published files are."""

    def __init__(self, file: IO[bytes], *, compress: bool = False) -> None:
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)

    def array(self, name: str, spec: Spec) -> "_ArrayWriter":
        # A fixed date keeps two conversions of the same weights bitwise equal.
        member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
        member.compress_type = self._zip.compression
        return _ArrayWriter(self._zip.open(member, "w", force_zip64=True), spec)

    def finish(self) -> None:
        self._zip.close()


class _ArrayWriter:
    def __init__(self, stream: IO[bytes], spec: Spec) -> None:
        self._stream, self._spec, self._todo = stream, spec, spec.n_bytes
        header = {"descr": _DESCR[spec.dtype], "fortran_order": False, "shape": spec.shape}
        np.lib.format.write_array_header_1_0(stream, header)

    def add(self, tensor: Tensor) -> None:
        assert tensor.dtype == self._spec.dtype, f"{tensor.dtype} written into {self._spec.dtype}"
        data = byte_view(tensor.contiguous())
        self._todo -= len(data)
        for start in range(0, len(data), CHUNK_BYTES):
            self._stream.write(data[start : start + CHUNK_BYTES])

    def __enter__(self) -> "_ArrayWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        assert kind is not None or self._todo == 0, f"{self._todo} bytes are missing"
        self._stream.close()
