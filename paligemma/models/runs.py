"""Attention within examples: what several examples of a row, or rows of unlike length, save in training on a CPU.

A row that holds three examples of 70 tokens has 210² scores, of which only 3 · 70² are looked at; the others are
computed, capped, masked and kept for the way back. Here the tokens of every example are taken out of their rows and
examples of about one length attend together, so that only their own scores exist. The numbers are those of the mask.

    rows      [a a a b b .]   [c c c c . .]        ->   lengths 2: [b b]   3: [a a a]   4: [c c c c]
"""

# B rows · T tokens of a row · N query heads · K key/value heads · H head_dim · n examples of a group · L their length

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MULTIPLE = 8  # lengths are rounded up to it, so that groups are few
WORTH = 0.7  # share of the scores of whole rows above which nothing is gained


@dataclass(frozen=True)
class Group:
    """Examples that attend together.

    Attributes:
        slots: int64[n · L], places in the batch's B · T slots; past an example's end B · T, a row of zeros.
        mask: bool[n, 1, L, L], the batch's mask inside each example.
    """

    slots: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Runs:
    """The examples of a batch, by length.

    Attributes:
        groups: together they hold every real token once.
        places: int64[B · T], where each slot stands in the groups laid end to end; padding behind the last of them.
    """

    groups: tuple[Group, ...]
    places: Tensor

    def attend(
        self, q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, one: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """[B, N, T, H]: `one(q, k, v, mask)` over every group; 0 at padding.

        Args:
            one: attention of q [n, N, L, H] and k, v [n, K, L, H].
        """
        B, _, T, _ = q_BNTH.shape
        order = torch.cat([group.slots for group in self.groups])
        sizes = [len(group.slots) for group in self.groups]
        q, k, v = (
            torch.split(_moved(x.transpose(1, 2).flatten(0, 1), order, self.places), sizes)
            for x in (q_BNTH, k_BKTH, v_BKTH)
        )
        found = []
        for number, group in enumerate(self.groups):
            n, L = len(group.mask), group.mask.shape[-1]
            mine = [x[number].reshape(n, L, *x[number].shape[1:]).transpose(1, 2) for x in (q, k, v)]
            found.append(one(mine[0], mine[1], mine[2], group.mask).transpose(1, 2).flatten(0, 1))
        out = _moved(torch.cat(found), self.places, order)
        return out.reshape(B, T, *out.shape[1:]).transpose(1, 2)


def _moved(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    out: Tensor = _Moved.apply(x, order, back)  # type: ignore[no-untyped-call]
    return out


class _Moved(torch.autograd.Function):
    """x[order], with 0 where order points past the end; the gradient is the same the other way round.

    A plain lookup adds gradients up, one row after the other; here none have to be added, since every slot stands in
    the groups once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _with_zero(x)[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return _with_zero(grads[0])[back], None, None


def _with_zero(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def runs_of(segment_BT: Tensor, valid_BT: Tensor, mask_BTT: Tensor) -> Runs | None:
    """The examples of a batch; None where whole rows cost about as much.

    Args:
        segment_BT, valid_BT: of the tokens, which are their own keys.
        mask_BTT: who sees whom, the same for both.
    """
    B, T = segment_BT.shape
    named = torch.where(valid_BT, segment_BT, -1)
    starts = torch.ones_like(valid_BT)
    starts[:, 1:] = named[:, 1:] != named[:, :-1]
    first = starts.flatten().nonzero()[:, 0]
    length = torch.diff(first, append=first.new_tensor([B * T]))
    real = named.flatten()[first] >= 0
    first, length = first[real], length[real]
    rounded = (length + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    if not len(first) or int((rounded**2).sum()) > WORTH * B * T * T:
        return None
    groups, places, laid = [], torch.full((B * T,), -1, device=segment_BT.device), 0
    for L in sorted(set(rounded.tolist())):
        of_length = rounded == L
        start, n_real = first[of_length, None], length[of_length, None]
        inside = torch.arange(L, device=segment_BT.device)
        is_real = inside < n_real
        slots = torch.where(is_real, start + inside, start)
        row, column = start[:, 0] // T, slots % T
        mask = mask_BTT[row[:, None, None], column[:, :, None], column[:, None, :]] & is_real[:, None, :]
        mask |= ~is_real[:, :, None]  # what past the end sees is never looked at, and must be a number
        groups.append(Group(torch.where(is_real, slots, B * T).flatten(), mask[:, None]))
        places[slots[is_real]] = laid + is_real.flatten().nonzero()[:, 0]
        laid += slots.numel()
    return Runs(tuple(groups), torch.where(places < 0, laid, places))
