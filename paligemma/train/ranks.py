"""The processes that share a step: what each needs of the others is a sum.

One process is the case of one rank: nothing is sent, and the arithmetic is the same.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))

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

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over the ranks (plain data parallelism), some megabytes in one message.

        A parameter that no example of this rank touched takes part with zeros: all ranks must send the same.
        """
        if self.world_size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(grad.numel() for grad in bucket) >= BUCKET_VALUES:
                _add(bucket)
                bucket = []
        if bucket:
            _add(bucket)


def _add(grads: list[Tensor]) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))
