"""From a batch of prompts to a filled cache, and the form of what is written after them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paligemma.errors import OptionError, ShapeError
from paligemma.models.kv_cache import KVCache
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import Batch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Decoded:
    """What was written after one prompt.

    Attributes:
        tokens: ids; the last one is eos when `finish_reason` is "stop".
        logprobs: log-probability of each under the model's own distribution: before any token was forbidden and
            before temperature, top-k and top-p.
        finish_reason: "stop", the answer ended; "length", `max_new_tokens` were written.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    @property
    def logprob(self) -> float:
        """Log-likelihood of the whole, in nats; no length normalisation."""
        return float(sum(self.logprobs))


# A growing cache begins with room for so many new tokens: a limit of a million, which means "until the end", is no
# reason to take the memory of a million.
ROOM = 1024

NOTHING = Decoded((), (), "length")  # the answer within max_new_tokens=0


def check_max_new_tokens(max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise OptionError(f"max_new_tokens={max_new_tokens}: expected 0 or more; the end of sequence counts as one.")


def read_prompts(
    model: PaliGemmaModel, batch: Batch, n_new: int, *, static: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, KVCache]:
    """Prefill a fresh cache with every row of a batch, on the model's device.

    Args:
        n_new: most tokens that will follow; a static cache has room for all of them.
        static: a cache of one shape from first to last, for a compiled `decode_step`.
        dtype: of the cached keys and values; default the model's. bfloat16 is big_vision's default.

    Returns:
        float32[B, V], logits of the first new token of each row; and the cache.

    Raises:
        ShapeError: rows with several examples.
    """
    if batch.is_packed:
        raise ShapeError(
            f"{batch.n_examples} examples in {batch.n_rows} rows: decoding needs one example per row. Collate "
            "instead of pack."
        )
    # A norm's scale stays in the compute dtype even where matrices are quantised.
    like = model.text.final_norm.scale
    batch = batch.to(like.device)
    cache = KVCache.allocate(
        model.config.text,
        batch.n_rows,
        batch.length + (n_new if static else min(n_new, ROOM)),
        device=like.device,
        dtype=dtype or like.dtype,
        static=static,
    )
    return model.prefill(cache=cache, **batch.model_inputs()), cache  # type: ignore[arg-type]
