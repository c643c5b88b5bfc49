"""The tensors of a snapshot that many ranks write together, each what it keeps: torch.distributed.checkpoint.

Read back, every rank takes what it needs, on any number of ranks; one process alone gets whole tensors.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from paligemma.train.ranks import WAIT, Ranks

Tensors = Mapping[str, Mapping[str, Tensor]]  # stem ("model", "optimizer") -> names -> tensors
Specs = dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]


class ShardWriter:
    """Writes one snapshot after another, from a thread; all ranks call it in the same order."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        # A group of its own: its messages go on beside those of training.
        self._group: Any = dist.new_group(backend="gloo", timeout=WAIT) if ranks.world_size > 1 else None
        self._mesh: DeviceMesh = init_device_mesh("cpu", (ranks.world_size,))

    def copied(self, tensors: Tensors) -> dict[str, Tensor]:
        """This rank's pieces on the CPU, as they are now."""
        return {name: self._copy(tensor) for name, tensor in _flat(tensors).items()}

    def _copy(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.to("cpu", copy=True)
        local = tensor.to_local().to("cpu", copy=True)
        return DTensor.from_local(
            local, self._mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def write(self, folder: Path, copies: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Write into a folder; size and SHA-256 of every file, on every rank.

        Raises:
            OSError: a rank could not write; every rank raises.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of what is meant: whole tensors beside pieces
                save(copies, checkpoint_id=folder, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            told = {rank: str(wrapped[0]) for rank, wrapped in error.failures.items()}
            raise OSError("; ".join(f"rank {rank}: {text}" for rank, text in told.items())) from error
        return self.agree(self._sums, folder)

    def _sums(self, folder: Path) -> dict[str, dict[str, Any]]:
        mine = f"__{self.ranks.rank}_*.distcp"
        files = [*folder.glob(mine), *([folder / ".metadata"] if self.ranks.is_first else [])]
        return {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}

    def agree(self, act: Any, *arguments: Any) -> dict[str, Any]:
        """Do something on every rank and join what they return, or raise on all where one of them fails."""
        try:
            mine: Any = act(*arguments)
        except Exception as error:  # told to the others, who would wait for ever
            mine = f"rank {self.ranks.rank}: {error}"
        theirs: list[Any] = [mine]
        if self._group is not None:
            theirs = [None] * self.ranks.world_size
            dist.all_gather_object(theirs, mine, group=self._group)
        failures = [value for value in theirs if isinstance(value, str)]
        if failures:
            raise OSError("; ".join(failures))
        return {name: value for one in theirs for name, value in (one or {}).items()}


def specs(folder: Path) -> Specs:
    """Shapes and dtypes of what lies there."""
    found: Specs = {}
    for key, told in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        assert isinstance(told, TensorStorageMetadata), key
        stem, _, name = key.partition("/")
        found.setdefault(stem, {})[name] = (tuple(told.size), told.properties.dtype)
    return found


def read_into(folder: Path, targets: Tensors) -> None:
    """Fill tensors of any sharding; nothing is sent, each rank reads the bytes it needs."""
    flat: dict[str, Any] = dict(_flat(targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it works without a process group, which is meant
        load(flat, checkpoint_id=folder, no_dist=True)


def _flat(tensors: Tensors) -> dict[str, Tensor]:
    return {f"{stem}/{name}": tensor.detach() for stem, named in tensors.items() for name, tensor in named.items()}


class Whole(Mapping[str, Tensor]):
    """The tensors of one stem, each read whole when it is asked for."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem, self._specs = folder, stem, specs(folder).get(stem, {})

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._specs[name]
        target = torch.empty(shape, dtype=dtype)
        read_into(self._folder, {self._stem: {name: target}})
        return target

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
