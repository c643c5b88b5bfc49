"""Training steps to be measured: synthetic batches, and the peak of a process while it runs them."""

import gc
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from helpers.machine import peak_rss_bytes
from paligemma.config import PaliGemmaConfig
from paligemma.data.loader import StepData
from paligemma.processing.batch import Batch

FIRST_TOKEN, LAST_TOKEN = 10, 200_000  # plain words in every published vocabulary; the same ids on both sides


def make_batch(config: PaliGemmaConfig, rows: int, n_text: int, n_targets: int, seed: int = 0) -> Batch:
    """Rows of one picture, `n_text` text tokens, the last `n_targets` of them learned; no padding."""
    generator = torch.Generator().manual_seed(seed)
    P, R = config.vision.n_image_tokens, config.vision.resolution
    length = P + n_text
    slot = torch.arange(length).expand(rows, length)
    last = min(LAST_TOKEN, config.tokens.n_tokens)
    tokens = torch.randint(min(FIRST_TOKEN, last - 1), last, (rows, length), generator=generator)
    mask_image, suffix = slot < P, slot >= length - n_targets
    return Batch(
        tokens=tokens.masked_fill(mask_image, 0),
        mask_image=mask_image,
        mask_ar=suffix.long(),
        mask_input=torch.ones_like(suffix),
        mask_loss=suffix,
        segment_ids=torch.ones_like(tokens),
        positions=slot.contiguous(),
        pixels=torch.rand(rows, 3, R, R, generator=generator) * 2 - 1,
        n_images=(1,) * rows,
        order=tuple(range(rows)),
    )


def make_step(config: PaliGemmaConfig, rows: int, n_text: int, n_targets: int, n_parts: int = 1) -> StepData:
    parts = tuple(make_batch(config, rows, n_text, n_targets, seed) for seed in range(n_parts))
    return StepData(parts, tuple(f"example {i}" for i in range(rows * n_parts)))


def measure_steps(step: Callable[[], float], device: torch.device, n_warm: int, n_steps: int) -> dict[str, Any]:
    """Seconds of every step after the warm ones, what memory was held before and at most during them, and the losses.

    On a CPU memory is what the process has for itself (mapped files excluded), on CUDA what torch has allocated.
    """
    losses = [step() for _ in range(n_warm)]
    gc.collect()
    held = reset_peak(device)
    seconds = []
    for _ in range(n_steps):
        wait(device)
        started = time.perf_counter()
        losses.append(step())
        wait(device)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "held_bytes": held, "peak_bytes": peak_bytes(device), "losses": losses}


def reset_peak(device: torch.device) -> int:
    """Forget the peak so far; returns the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark of the peak goes down to what is resident now
    return anonymous_bytes()


def peak_bytes(device: torch.device) -> int:
    """The most that was held since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss_bytes() - _status("RssFile") - _status("RssShmem")


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    return _status("RssAnon")


def mapped_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors that lie in mapped files, which `anonymous_bytes` and `peak_bytes` leave out."""
    files = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, name = line.split(maxsplit=5)
        if name.endswith(".safetensors"):
            first, last = (int(end, 16) for end in place.split("-"))
            files.append((first, last))
    return sum(t.nbytes for t in tensors if any(first <= t.data_ptr() < last for first, last in files))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
