"""Linear layers whose weights stand in 4 bits: NF4, as QLoRA keeps a frozen base (arXiv 2305.14314).

    a value      4 bits: which of 16 levels, spaced like a normal distribution, times the scale of its block
    a block      64 values in reading order of the matrix; its scale takes 8 bits, less the mean of all scales
    256 blocks   one float32, in which the 8 bits of their scales count          4.13 bits per value in all

Products unpack the weight, use it and drop it, on the way back once more: what autograd keeps is the 4 bits. The
numbers are those of bitsandbytes, an extra, with double quantisation ("compress_statistics").
"""

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn

from paligemma.errors import MissingExtra, OptionError
from paligemma.models.linear import linear

BLOCK = 64
SCALES_PER_BLOCK = 256
BITS = 4 + 8 / BLOCK + 32 / (BLOCK * SCALES_PER_BLOCK)
PART_VALUES = 1 << 20  # packed at a time: on a CPU bitsandbytes takes a dozen bytes more for each


def bitsandbytes(purpose: str) -> Any:
    """The library, imported when something needs it.

    Raises:
        MissingExtra: it is not installed.
    """
    # On some CPUs it warns of a kernel that is not installed and that nothing here calls.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes as library
    except ImportError:
        raise MissingExtra("bitsandbytes", "qlora", purpose) from None
    return library


class Nf4Weight(nn.Module):
    """One packed matrix, where a linear layer has its `weight`; all of it are buffers, and none is trained.

    Names in a state dict, behind that of the weight (`text.blocks.0.attn.q.weight.packed`):

        packed       uint8[ceil(n / 2)]           two values a byte, the earlier one in the upper four bits
        scales       uint8[ceil(n / 64)]          of each block, by number in `scale_table`
        scale_units  float32[ceil(n / 16384)]     times this
        scale_mean   float32[]                    plus this
        scale_table  float32[256]

    It moves between devices like any module; a change of dtype leaves it as it is.
    """

    packed: Tensor
    scales: Tensor
    scale_units: Tensor
    scale_mean: Tensor
    scale_table: Tensor

    def __init__(self, weight_OD: Tensor) -> None:
        """
        Args:
            weight_OD: float32, bfloat16 or float16[O, D], on the device where it is to stay.

        Raises:
            MissingExtra: bitsandbytes is not installed.
        """
        super().__init__()
        pack = bitsandbytes("NF4").functional
        self.shape = torch.Size(weight_OD.shape)
        flat = weight_OD.detach().reshape(-1)
        # Blocks do not know each other, so parts of whole blocks give the very bytes of the whole.
        parts = [
            pack.quantize_4bit(part.contiguous(), blocksize=BLOCK, quant_type="nf4")
            for part in torch.split(flat, PART_VALUES)
        ]
        scales = torch.cat([state.absmax for _, state in parts])
        mean = scales.mean()
        coarse, state = pack.quantize_blockwise(scales - mean, blocksize=SCALES_PER_BLOCK)
        self.register_buffer("packed", torch.cat([packed.reshape(-1) for packed, _ in parts]))
        self.register_buffer("scales", coarse)
        self.register_buffer("scale_units", state.absmax)
        self.register_buffer("scale_mean", mean)
        self.register_buffer("scale_table", state.code)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, nf4"

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [O, D] as it is multiplied with."""
        n = self.shape.numel()
        # Laid out by blocks: release 0.50 takes those of rows that are no multiple of 64 from the wrong place on CPUs
        # with AVX-512.
        by_blocks = torch.Size((n // BLOCK, BLOCK) if n % BLOCK == 0 else (1, n))
        unpack = bitsandbytes("NF4").functional
        values: Tensor = unpack.dequantize_4bit(self.packed[:, None], self._state(by_blocks, dtype))
        return values.reshape(self.shape)

    def times(self, x: Tensor) -> Tensor:
        """x Wᵀ in the dtype of x, without a gradient."""
        if x.is_cuda and self.shape[1] % BLOCK == 0:  # few rows of x: a kernel that never writes the dense weight
            out: Tensor = bitsandbytes("NF4").matmul_4bit(
                x.contiguous(), self.packed[:, None], self._state(self.shape, x.dtype)
            )
            return out
        return linear(x, self.dense(x.dtype))

    def _state(self, shape: torch.Size, dtype: torch.dtype) -> Any:
        functional = bitsandbytes("NF4").functional
        inner = functional.QuantState(
            absmax=self.scale_units, blocksize=SCALES_PER_BLOCK, code=self.scale_table, dtype=torch.float32
        )
        return functional.QuantState(
            absmax=self.scales, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=self.scale_mean,
            state2=inner,
        )  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> "Nf4Weight":
        exact = {name: held for name, held in self._buffers.items() if held is not None and held.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, held in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != held.dtype:  # model.half(): scales are float32 to the kernels
                self._buffers[name] = held.to(moved.device)
        return self


class Nf4Linear(nn.Module):
    """A stand-in of `Linear` that keeps its weight packed; the bias stays as it was."""

    weight: Nf4Weight
    bias: nn.Parameter | None

    def __init__(self, weight: Nf4Weight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


def product(x_ND: Tensor, weight_OD: Tensor | Nf4Weight, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of either kind of weight, with the gradient to x; a packed weight has none."""
    if not isinstance(weight_OD, Nf4Weight):
        return linear(x_ND, weight_OD, bias_O)
    place = x_ND.device.type
    if torch.is_autocast_enabled(place):  # which does not look inside
        x_ND = x_ND.to(torch.get_autocast_dtype(place))
    out_NO: Tensor = _Product.apply(x_ND, weight_OD)  # type: ignore[no-untyped-call]
    return out_NO if bias_O is None else out_NO + bias_O.to(out_NO.dtype)


def dense(weight_OD: Tensor | Nf4Weight) -> Tensor:
    """float32[O, D] of either kind of weight; without a gradient where it is packed."""
    return weight_OD.dense() if isinstance(weight_OD, Nf4Weight) else weight_OD.float()


def pack_linears(model: nn.Module, pattern: str) -> list[str]:
    """Replace every `nn.Linear` whose whole path the pattern matches, one after the other.

    Returns:
        Their paths, in the model's order.

    Raises:
        OptionError: the pattern matches none.
        MissingExtra: bitsandbytes is not installed.
    """
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, path) is not None
    ]
    if not found:
        raise OptionError(
            f"the pattern {pattern!r} matches no linear layer: expected names such as text.blocks.0.attn.q."
        )
    for path in found:
        pack_linear(model, path, model.get_submodule(path).weight)
    return found


def pack_linear(model: nn.Module, path: str, weight_OD: Tensor | nn.Module) -> None:
    """Put a packed layer in the place of the one at a path, whose bias it takes over.

    Args:
        weight_OD: what is packed; the weight that stands there is not looked at and may be on the meta device.
    """
    assert isinstance(weight_OD, Tensor)
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, leaf, Nf4Linear(Nf4Weight(weight_OD), getattr(parent, leaf).bias))


class _Product(torch.autograd.Function):
    """x Wᵀ that keeps the packed weight for the way back, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Nf4Weight) -> Tensor:
        ctx.weight = weight
        return weight.times(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return linear(gradient, ctx.weight.dense(gradient.dtype).T), None
