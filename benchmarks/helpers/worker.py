"""One side, one dtype, one process: load, warm up, measure every cell once, answer in JSON."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers.machine import peak_rss_bytes
from helpers.sides import FIRST_TOKEN, SIDES, Side

N_DECODE = 32


def measure(side_name: str, folder: Path, dtype_name: str, batches: list[int], repeats: int) -> dict[str, Any]:
    """Seconds of every cell, a list of `repeats` each, and the logits that show that both sides did the same work."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    side: Side = SIDES[side_name]()
    _import_everything(side_name)
    start = time.perf_counter()
    side.load(folder, dtype)
    load_s = time.perf_counter() - start
    cells: dict[str, list[float]] = {}
    probe: list[float] = []
    with torch.inference_mode():
        first_answer_s = _first_answer(side, dtype)
        for batch in batches:
            pixels = _pixels(side, batch, dtype)
            for _ in range(repeats):
                seconds, image_embeds = _timed(lambda pixels=pixels: side.encode_image(pixels))
                cells.setdefault(f"encode/{batch}", []).append(seconds)
                seconds, (logits, cache) = _timed(lambda embeds=image_embeds: side.prefill(embeds, N_DECODE))
                cells.setdefault(f"prefill/{batch}", []).append(seconds)
                tokens = torch.full((batch,), FIRST_TOKEN)
                side.decode(tokens, cache)  # the first step grows caches and fetches the table; it counts for nobody
                seconds, logits = _timed(lambda t=tokens, c=cache: _decode(side, t, c))
                cells.setdefault(f"decode/{batch}", []).append(seconds)
                if not probe:
                    probe = logits[0, :64].float().tolist()
                del image_embeds, logits, cache
    return {
        "load_s": load_s,
        "first_answer_s": load_s + first_answer_s,
        "peak_bytes": peak_rss_bytes(),
        "seconds": cells,
        "probe": probe,
    }


def _import_everything(side_name: str) -> None:
    """Imports are not loading: what a first call would import comes before the clock starts."""
    if side_name == "transformers":
        import transformers.models.gemma2.modeling_gemma2
        import transformers.models.paligemma.modeling_paligemma
        import transformers.models.siglip.modeling_siglip  # noqa: F401
    else:
        import paligemma.api.loading  # noqa: F401


def _pixels(side: Side, batch: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(batch, 3, side.resolution, side.resolution, generator=generator) * 2 - 1).to(dtype)


def _first_answer(side: Side, dtype: torch.dtype) -> float:
    """A picture and one token, cold: also the warm-up, and the point where lazily mapped weights have been read."""

    def answer() -> torch.Tensor:
        logits, cache = side.prefill(side.encode_image(_pixels(side, 1, dtype)), 1)
        return side.decode(logits.argmax(-1), cache)

    return _timed(answer)[0]


def _decode(side: Side, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    for _ in range(N_DECODE):
        logits = side.decode(tokens, cache)
    return logits


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result
