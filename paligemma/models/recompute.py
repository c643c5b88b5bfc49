"""Activation checkpointing: memory for time, block by block."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, *rest: Any, recompute: bool) -> Tensor:
    """block(x, …); with `recompute` only its input is kept, and its forward pass runs once more on the way back.

    Dropout draws the same numbers both times.
    """
    if recompute and torch.is_grad_enabled():
        kept: Tensor = checkpoint(block, x, *rest, use_reentrant=False)
        return kept
    out: Tensor = block(x, *rest)
    return out
