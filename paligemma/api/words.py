"""Tokens of the engine <-> texts that people read."""

from collections.abc import Iterator

from paligemma.engine.generate import NewToken
from paligemma.engine.prompts import Decoded
from paligemma.processing.processor import Processor
from paligemma.processing.tokenizer import Tokenizer
from paligemma.results import Generation


def spell(tokenizer: Tokenizer, decoded: Decoded) -> Generation:
    pieces = tuple(tokenizer.pieces(decoded.tokens))
    return Generation("".join(pieces), decoded.tokens, decoded.logprobs, decoded.finish_reason, pieces)


def spell_along(tokenizer: Tokenizer, steps: Iterator[tuple[NewToken, ...]]) -> Iterator[str]:
    """The text of one row as its tokens come; a character of several tokens comes with the last."""
    text = tokenizer.stream()
    for (new,) in steps:
        if piece := text.push(new.token):
            yield piece
    if rest := text.close():
        yield rest


def answer_ids(processor: Processor, text: str, *, allow_special: bool) -> list[int]:
    """Tokens of a whole answer, eos included."""
    row = processor.sequence(0, "", text, allow_special=allow_special, where=f"the answer {text!r}")
    return [int(token) for token in row.tokens[row.mask_loss]]
