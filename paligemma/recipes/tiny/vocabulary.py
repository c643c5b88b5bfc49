"""Stage 1: a SentencePiece tokenizer with Gemma's habits and the words of the picture world."""

import io
from pathlib import Path

import sentencepiece

from paligemma.data.world import corpus
from paligemma.presets import TINY_N_PIECES


def train_tokenizer(path: Path, *, lines: int = 20_000, seed: int = 0) -> None:
    """Train `TINY_N_PIECES` byte-pair pieces and write them to `path`.

    The flags are those of the Gemma tokenizer: identity normalisation, white space kept, no dummy prefix, digits
    split, byte fallback, and newlines as pieces of their own. The 1,024 location and 128 segmentation pieces are
    appended when the file is read, as for Gemma's own tokenizer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(lines, seed)),
        model_writer=model,
        vocab_size=TINY_N_PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["\n", "\n\n"],
        character_coverage=1.0,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
