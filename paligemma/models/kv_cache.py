"""Keys and values of the tokens seen so far: allocated by the caller, passed in, never hidden in a module."""

# B batch · T new tokens · C capacity · K key/value heads · H head_dim

from dataclasses import dataclass

import torch
from torch import Tensor

from paligemma.config import TextConfig
from paligemma.errors import ShapeError


@dataclass(eq=False)
class KVCache:
    """Keys (after rotary positions) and values of every layer, with what the mask rule must know of each slot.

    All rows share one write slot; rows of unlike length carry padding slots that `valid` hides, on either side.
    A growing cache hands attention only the slots in use and allocates more when they run out. A static cache always
    hands over all of its capacity and counts its length in a tensor, so that a compiled step keeps one shape.

    Attributes:
        keys, values: one [B, K, C, H] per layer, in the cache's dtype; bfloat16 repeats big_vision's default.
        valid: bool[B, C], True on slots that hold a real token.
        position: int64[B, C], place of the slot's token within its example.
        next_position: int64[B], place of the token that each row takes next.
        length: slots in use; an int (growing) or an int64 tensor of one element (static).
    """

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor
    position: Tensor
    next_position: Tensor
    length: int | Tensor

    @classmethod
    def allocate(
        cls,
        config: TextConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        static: bool = False,
    ) -> "KVCache":
        """An empty cache for `batch` rows of up to `capacity` tokens (a growing cache may exceed it)."""
        shape = (batch, config.n_kv_heads, capacity, config.head_dim)
        return cls(
            keys=[torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.depth)],
            values=[torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.depth)],
            valid=torch.zeros(batch, capacity, device=device, dtype=torch.bool),
            position=torch.zeros(batch, capacity, device=device, dtype=torch.int64),
            next_position=torch.zeros(batch, device=device, dtype=torch.int64),
            length=torch.zeros(1, device=device, dtype=torch.int64) if static else 0,
        )

    @property
    def is_static(self) -> bool:
        return isinstance(self.length, Tensor)

    @property
    def capacity(self) -> int:
        return self.valid.shape[1]

    @property
    def batch(self) -> int:
        return self.valid.shape[0]

    def reserve(self, valid_BT: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Open slots for T new tokens; returns `valid` and `position` of all slots that attention will see.

        Raises:
            ShapeError: a static cache has no room left.
        """
        n_new = valid_BT.shape[1]
        if isinstance(self.length, Tensor):
            if not torch.compiler.is_compiling() and int(self.length) + n_new > self.capacity:
                raise ShapeError(
                    f"static KV cache is full: {int(self.length)} + {n_new} tokens exceed its capacity of "
                    f"{self.capacity}. Allocate prompt length + max_new_tokens."
                )
            slots = self._slots(n_new)
            self.valid.index_copy_(1, slots, valid_BT)
            self.position.index_copy_(1, slots, position_BT)
        else:
            end = self.length + n_new
            if end > self.capacity:
                self._grow(max(end, 2 * self.capacity))
            self.valid[:, self.length : end] = valid_BT
            self.position[:, self.length : end] = position_BT
        self.next_position = torch.where(
            valid_BT.any(dim=1), position_BT.masked_fill(~valid_BT, -1).amax(dim=1) + 1, self.next_position
        )
        seen = self.capacity if isinstance(self.length, Tensor) else end
        return self.valid[:, :seen], self.position[:, :seen]

    def write(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values in the reserved slots; returns all that attention sees.

        What comes back has the compute dtype but the cache's precision: new tokens are rounded like old ones, as in
        big_vision, so that a token does not change when it becomes a memory.
        """
        keys, values = self.keys[layer], self.values[layer]
        n_new = k_BKTH.shape[2]
        if isinstance(self.length, Tensor):
            slots = self._slots(n_new)
            keys.index_copy_(2, slots, k_BKTH.to(keys.dtype))
            values.index_copy_(2, slots, v_BKTH.to(values.dtype))
            return keys.to(k_BKTH.dtype), values.to(v_BKTH.dtype)
        end = self.length + n_new
        keys[:, :, self.length : end] = k_BKTH
        values[:, :, self.length : end] = v_BKTH
        return keys[:, :, :end].to(k_BKTH.dtype), values[:, :, :end].to(v_BKTH.dtype)

    def advance(self, n_new: int) -> None:
        """Count the reserved slots as used, once every layer has written."""
        self.length += n_new

    def select(self, rows: Tensor) -> "KVCache":
        """A new cache whose row i is row `rows[i]` of this one: beams, repeated samples, suffixes of one prompt."""
        return KVCache(
            keys=[keys.index_select(0, rows) for keys in self.keys],
            values=[values.index_select(0, rows) for values in self.values],
            valid=self.valid.index_select(0, rows),
            position=self.position.index_select(0, rows),
            next_position=self.next_position.index_select(0, rows),
            length=self.length.clone() if isinstance(self.length, Tensor) else self.length,
        )

    def _slots(self, n_new: int) -> Tensor:
        return self.length + torch.arange(n_new, device=self.valid.device)

    def _grow(self, capacity: int) -> None:
        def widen(old: Tensor, dim: int) -> Tensor:
            shape = list(old.shape)
            shape[dim] = capacity - old.shape[dim]
            return torch.cat([old, old.new_zeros(shape)], dim=dim)

        self.keys = [widen(keys, 2) for keys in self.keys]
        self.values = [widen(values, 2) for values in self.values]
        self.valid, self.position = widen(self.valid, 1), widen(self.position, 1)
