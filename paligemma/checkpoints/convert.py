"""From one checkpoint to another: formats, dtypes, resolutions, adapters; streamed, whole or not at all."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from paligemma.checkpoints.checkpoint import Checkpoint, open_checkpoint
from paligemma.checkpoints.hugging_face import Layout
from paligemma.checkpoints.lora import merge, read_adapter
from paligemma.checkpoints.write import MAX_SHARD_BYTES, Target, write
from paligemma.config import PaliGemmaConfig
from paligemma.errors import CheckpointError, OptionError

# Files of a Hugging Face folder that belong to the model and hold no weights; our own writer makes the others.
SIDECARS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Target | None = None,
    adapter: str | Path | None = None,
    layout: Layout = "A",
    dtype: torch.dtype | str | None = None,
    resolution: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | Path | None = None,
    strict: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Convert a checkpoint, optionally merging a LoRA adapter on the way.

    A Hugging Face folder gets the 64-row filler that transformers expects behind the real vocabulary, and the
    tokenizer files that stand beside the source.

    Args:
        to: "hf" or "npz"; default by the name of the target.
        adapter: a PEFT folder to merge in.
        tokenizer: `tokenizer.model` or `tokenizer.json` to put into the folder.
        progress: called with (bytes done, bytes in all) after each tensor.

    Returns:
        `target`.
    """
    goal: Target = to or ("npz" if str(target).endswith(".npz") else "hf")
    with open_checkpoint(source, strict=strict, resolution=resolution) as checkpoint:
        state: Mapping[str, Tensor] = checkpoint
        if adapter is not None:
            state = merge(checkpoint, read_adapter(adapter, checkpoint.config, strict=strict))
        done = 0

        def advance(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            if progress is not None:
                progress(done, checkpoint.n_bytes)

        return write(
            target,
            checkpoint.config,
            state,
            goal,
            layout=layout,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            table_rows=padded_rows(checkpoint.config) if goal == "hf" else None,
            overwrite=overwrite,
            beside=_sidecars(checkpoint, tokenizer) if goal == "hf" else (),
            progress=advance,
        )


def padded_rows(config: PaliGemmaConfig) -> int:
    """Rows of a table with its filler: room for <image> behind the vocabulary, rounded up to 64 (257,216)."""
    if config.text.vocab_size > config.tokens.n_tokens:
        return config.text.vocab_size
    return -(-(config.tokens.n_tokens + 1) // 64) * 64


def _sidecars(checkpoint: Checkpoint, tokenizer: str | Path | None) -> Iterable[Path]:
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    found = {name: folder / name for name in SIDECARS if (folder / name).is_file()}
    if tokenizer is not None:
        given = Path(tokenizer)
        if given.name not in ("tokenizer.model", "tokenizer.json"):
            raise OptionError(f"{given}: expected a file called tokenizer.model or tokenizer.json. Rename a copy.")
        if not given.is_file():
            raise CheckpointError(f"{given}: no such file: expected a tokenizer. Check the path.")
        found[given.name] = given
    return found.values()
