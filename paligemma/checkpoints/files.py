"""What every tensor container has in common: names, shapes and dtypes first, data one tensor at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paligemma.errors import OptionError, nearest

CHUNK_BYTES = 8 << 20  # unit of reading, checking and hashing: small beside any memory limit, large beside a syscall

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor whose data have not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_values * self.dtype.itemsize


class Scratch:
    """One buffer for tensors that are only read to be copied; reusing it keeps the heap whole and its pages warm."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until the next call."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes > len(self._bytes):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # let go of the old one first
            self._bytes = torch.empty(n_bytes, dtype=torch.uint8)
        return self._bytes[:n_bytes].view(dtype).reshape(shape)


class TensorFile(Protocol):
    """A container of named tensors on disk."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    def read(self, name: str, index: tuple[int, ...] = (), scratch: Scratch | None = None) -> Tensor:
        """`name[index]` in the dtype of the file, leading axes only; in memory of its own, or in the scratch given."""

    def place(self, name: str) -> tuple[int, int]:
        """A sort key: reading tensors in this order walks through the file once."""

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""

    def close(self) -> None: ...


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from its name; None stays None (as the file has it)."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable and without a copy."""
    flat = tensor.detach().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
