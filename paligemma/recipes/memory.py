"""Which way of training fits into memory, and what to say when none did after all."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from paligemma.config import PaliGemmaConfig
from paligemma.errors import TrainingError
from paligemma.recipes.rows import Lengths
from paligemma.recipes.start import n_values
from paligemma.train.devices import available_memory
from paligemma.train.parallel import Strategy
from paligemma.train.plan import Setup, advice, choose_method, plan
from paligemma.train.ranks import Ranks

if TYPE_CHECKING:
    from paligemma.recipes.transfer import TransferRecipe

_BYTES = {"float32": 4, "bfloat16": 2}


def setup_of(
    recipe: "TransferRecipe", device: torch.device, lengths: Lengths | None = None, *, devices: int = 1
) -> Setup:
    """What decides how much memory a recipe needs; the longest rows measured, or the recipe's limit without."""
    limit = recipe.loader.max_text
    longest = lengths.longest if lengths is not None else limit or 128
    text = min(longest, limit) if limit is not None else longest
    dtype = recipe.base_dtype if recipe.base_dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    is_adapter = recipe.method in ("lora", "dora", "qlora")
    compute = "bfloat16" if recipe.fit.precision == "bfloat16" or (is_adapter and dtype == "bfloat16") else "float32"
    return Setup(
        method="full" if recipe.method == "auto" else recipe.method,
        lora=recipe.lora,
        optim=recipe.optim,
        part_size=recipe.loader.part_size or recipe.loader.batch_size,
        batch_size=recipe.loader.batch_size,
        text_length=text,
        target_length=min(text, lengths.longest_target if lengths is not None else 32),
        n_images=max(1, lengths.n_images) if lengths is not None else _pictures_of(recipe.form),
        weight_bytes=_BYTES[dtype],
        compute_bytes=_BYTES[compute],
        recompute=recipe.recompute,
        devices=devices,
        on_cuda=device.type == "cuda",
    )


def _pictures_of(form: str | None) -> int:
    """Pictures of a row where none was looked at: of a clip, its frames."""
    from paligemma.recipes.transfers.table import TRANSFERS  # its rows are opened by recipes, which are made with this

    return 1 if form is None else TRANSFERS[form].n_frames or TRANSFERS[form].n_images


def method_of(
    recipe: "TransferRecipe", config: PaliGemmaConfig, device: torch.device, lengths: Lengths, ranks: Ranks
) -> tuple[str, str]:
    """The way of training, and why; the same on every rank."""
    if recipe.method != "auto":
        return recipe.method, "as asked"
    setup = setup_of(recipe, device, lengths, devices=ranks.world_size)
    may_share = recipe.strategy != "ddp"
    method, why = ranks.from_first(choose_method(config, setup, share(device, ranks), may_share=may_share))
    return method, why


def strategy_of(
    recipe: "TransferRecipe", method: str, config: PaliGemmaConfig, device: torch.device, lengths: Lengths, ranks: Ranks
) -> Strategy:
    """How several processes share a run: with whole models as long as the plan for one fits its device."""
    if recipe.strategy != "auto" or ranks.world_size == 1 or method == "qlora":
        return "ddp" if recipe.strategy == "auto" else recipe.strategy
    known = dataclasses.replace(recipe, method=method)  # type: ignore[arg-type]
    setup = setup_of(known, device, lengths, devices=ranks.world_size)
    fits = plan(config, setup).total_bytes <= share(device, ranks)
    chosen: Strategy = ranks.from_first("ddp" if fits else "fsdp")
    return chosen


def fits_whole(config: PaliGemmaConfig, device: torch.device, ranks: Ranks) -> bool:
    """Whether one process can hold the whole model in order to ask it: bfloat16 on CUDA, float32 elsewhere."""
    return n_values(config) * (2 if device.type == "cuda" else 4) * 1.2 < share(device, ranks)


def share(device: torch.device, ranks: Ranks) -> float:
    """Memory that one process may take: all of its GPU, or its part of what the processes of a CPU share."""
    return available_bytes(device) / (1 if device.type == "cuda" else ranks.world_size)


def available_bytes(device: torch.device) -> float:
    """Memory that a run may take on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free)
    return available_memory()


@contextlib.contextmanager
def advising(
    recipe: "TransferRecipe", config: PaliGemmaConfig, device: torch.device, lengths: Lengths
) -> Iterator[None]:
    """Out of memory inside the block comes out as one line with what `paligemma plan` would have advised.

    Raises:
        TrainingError: in place of the allocator's own error.
    """
    available = available_bytes(device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = advice(config, setup_of(recipe, device, lengths), available)
        raise TrainingError(f"out of memory on {device}: {told}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up; on a CPU torch says so with a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
