"""NaN and Inf in weights: found, counted, named."""

import torch
from torch import Tensor

from paligemma.errors import CheckpointError

_CHUNK = 1 << 20  # values looked at together, so that the check needs little memory of its own


def describe_nonfinite(tensor: Tensor) -> str | None:
    """ "3 NaN and 1 Inf among 1,234 values, first at [0, 5]"; None when every value is finite."""
    flat = tensor.reshape(-1)
    # Both ends tell, since NaN passes through, and they need no memory. Masks of some megabytes for every tensor, made
    # between objects that stay, would leave a heap full of holes.
    if flat.numel() and flat.dtype.itemsize > 1 and all(end.isfinite() for end in flat.aminmax()):
        return None
    n_nan = n_inf = 0
    first = -1
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if chunk.dtype.itemsize == 1:
            chunk = chunk.float()
        bad = ~chunk.isfinite()
        if not bad.any():
            continue
        if first < 0:
            first = start + int(bad.nonzero()[0])
        nan = int(chunk.isnan().sum())
        n_nan += nan
        n_inf += int(bad.sum()) - nan
    if first < 0:
        return None
    counts = " and ".join(f"{n:,} {what}" for n, what in ((n_nan, "NaN"), (n_inf, "Inf")) if n)
    place = [int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)]
    return f"{counts} among {flat.numel():,} values, first at {place}"


def require_finite(tensor: Tensor, name: str) -> None:
    """Raise a CheckpointError that names the tensor if it holds NaN or Inf."""
    found = describe_nonfinite(tensor)
    if found:
        raise CheckpointError(f"{name} holds {found}: expected finite weights. Download or convert it again.")
