"""Which arithmetic a machine is fast at."""

import contextlib
from contextlib import AbstractContextManager

import torch


def autocast(device: torch.device | str) -> AbstractContextManager[object]:
    """bfloat16 products where the device has them, else float32.

    A CPU without bfloat16 instructions computes them one by one: a step takes ten times as long as in float32.
    """
    kind = torch.device(device).type
    if kind == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return contextlib.nullcontext()
    return torch.autocast(kind, torch.bfloat16)
