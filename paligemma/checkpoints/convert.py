"""From one checkpoint to another: formats, dtypes, resolutions, adapters; streamed, whole or not at all."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from paligemma.checkpoints.checkpoint import Checkpoint, open_checkpoint
from paligemma.checkpoints.hugging_face import Layout
from paligemma.checkpoints.lora import merge, read_adapter
from paligemma.checkpoints.write import MAX_SHARD_BYTES, Target, write
from paligemma.config import PaliGemmaConfig
from paligemma.processing.tokenizer import Tokenizer

# Files of a Hugging Face folder that belong to the model and hold no weights; our own writer makes the others.
SIDECARS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip
SENTENCEPIECE = ("tokenizer.model", "paligemma_tokenizer.model", "gemma_tokenizer.model")


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
        tokenizer: a SentencePiece model or a `tokenizer.json` to put into the folder.
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

        with TemporaryDirectory() as scratch:
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
                beside=_sidecars(checkpoint, tokenizer, Path(scratch)) if goal == "hf" else (),
                progress=advance,
            )


def padded_rows(config: PaliGemmaConfig) -> int:
    """Rows of a table with its filler: room for <image> behind the vocabulary, rounded up to 64 (257,216)."""
    if config.text.vocab_size > config.tokens.n_tokens:
        return config.text.vocab_size
    return -(-(config.tokens.n_tokens + 1) // 64) * 64


def _sidecars(checkpoint: Checkpoint, tokenizer: str | Path | None, scratch: Path) -> Iterable[Path]:
    """The files to put beside the weights; a SentencePiece model alone gets the `tokenizer.json` transformers wants."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    found = {name: folder / name for name in SIDECARS if (folder / name).is_file()}
    given = Path(tokenizer) if tokenizer is not None else _tokenizer_beside(folder)
    if given is not None and (tokenizer is not None or "tokenizer.json" not in found):
        pieces = Tokenizer.from_file(given, checkpoint.config.tokens)
        found.update({path.name: path for path in pieces.save(scratch, hugging_face=True)})
    return found.values()


def _tokenizer_beside(folder: Path) -> Path | None:
    return next((folder / name for name in SENTENCEPIECE if (folder / name).is_file()), None)
