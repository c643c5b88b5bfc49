"""A native state dict whose tensors may still be on disk."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from paligemma.checkpoints.files import Spec, as_dtype
from paligemma.checkpoints.finite import require_finite

Progress = Callable[[int], None]  # called with the number of bytes just read


class State(Mapping[str, Tensor]):
    """Native names -> tensors, with shapes and dtypes known before anything is read."""

    @abstractmethod
    def spec(self, name: str) -> Spec:
        """Shape and dtype of a tensor without reading it."""

    @abstractmethod
    def get_as(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """One tensor in another dtype (None: its own)."""

    def __getitem__(self, name: str) -> Tensor:
        return self.get_as(name, None)

    def source(self, name: str) -> str:
        """Where a tensor comes from, for messages."""
        return name

    def reading_order(self) -> list[str]:
        """The names in the order in which reading is cheapest."""
        return list(self)

    def stream(
        self, dtype: torch.dtype | str | None = None, *, check: bool = False, progress: Progress | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every (native name, tensor) once, in the order that walks through the files once.

        Args:
            dtype: None keeps what the file has.
            check: refuse a tensor with NaN or Inf, also one that overflowed in `dtype`.
            progress: called after each tensor with the bytes it takes in the file.
        """
        wanted = as_dtype(dtype)
        for name in self.reading_order():
            tensor = self.get_as(name, wanted)
            if check:
                require_finite(tensor, f"{self.source(name)} ({name})")
            yield name, tensor
            if progress is not None:
                progress(self.spec(name).n_bytes)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors in their own dtypes."""
        return sum(self.spec(name).n_bytes for name in self)


class Held(State):
    """A plain dict of tensors seen as a `State`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def spec(self, name: str) -> Spec:
        tensor = self._tensors[name]
        return Spec(tuple(tensor.shape), tensor.dtype)

    def get_as(self, name: str, dtype: torch.dtype | None) -> Tensor:
        return self._tensors[name].detach().to(device="cpu", dtype=dtype).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def as_state(tensors: Mapping[str, Tensor]) -> State:
    return tensors if isinstance(tensors, State) else Held(tensors)
