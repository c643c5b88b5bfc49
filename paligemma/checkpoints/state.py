"""A native state dict whose tensors may still be on disk."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from paligemma.checkpoints.files import Spec


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
