"""The processes that share a step: what each needs of the others is a sum.

One process is the case of one rank: nothing is sent, and the arithmetic is the same.
"""

import atexit
import gc
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

WAIT = timedelta(hours=2)  # for the others; a lost worker is told by torchrun, long before
BUCKET_VALUES = 1 << 24  # gradients summed in one message: 64 MB of float32


@dataclass(frozen=True)
class Ranks:
    """This process among those of `torchrun`; `Ranks.join()` finds out."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls, device: str | torch.device = "cpu") -> "Ranks":
        """Join the group that `torchrun` started, or stand alone where it did not."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        kind = torch.device(device).type if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cuda":
            torch.cuda.set_device(local_rank)
        if not dist.is_initialized():
            store, rank, world_size = next(rendezvous("env://", timeout=WAIT))
            if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
                # A restart by torchrun finds the addresses of the dead in the same store: every life has keys of its
                # own. The agents of several machines do not count alike (docs/distributed.md).
                store = PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            # Numbers on the CPU, such as flags, travel by gloo beside the gradients of a GPU. The first rank scores the
            # model while the others wait.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                store=store, rank=rank, world_size=world_size, timeout=WAIT,
            )  # fmt: skip
            if kind != "cuda":  # NCCL leaves with all ranks or not at all, and the others may hang in a step
                atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size(), local_rank)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sums(self, values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
        """Each value summed over all ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """Whether the flag is up on any rank."""
        return self.sums([float(flag)], device)[0] > 0

    def all(self, value: Any) -> list[Any]:
        """The value of every rank, by rank; anything that pickles."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """What the first rank has, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over the ranks (plain data parallelism), some megabytes in one message.

        A parameter that no example of this rank touched takes part with zeros: all ranks must send the same. Gradients
        of sharded weights are left alone: they were summed on the way back.
        """
        if self.world_size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(grad.numel() for grad in bucket) >= BUCKET_VALUES:
                _add(bucket)
                bucket = []
        if bucket:
            _add(bucket)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # the threads of a group end with it, which must come before the interpreter's end


def _add(grads: list[Tensor]) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))
