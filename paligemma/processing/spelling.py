"""Tokens back to text, one at a time, so that streaming and decoding spell alike.

A character outside the vocabulary is written as its UTF-8 bytes, one token each; it can be shown only with its last
byte. Bytes that form no character become one U+FFFD each, as SentencePiece has it.
"""

import codecs
from collections.abc import Iterator

REPLACEMENT = "\ufffd"
UNKNOWN = " \u2047 "  # what SentencePiece prints for <unk>


class TextStream:
    """Grows a text from pieces: `push` gives what is certain by now, `close` the rest.

    >>> stream = TextStream()
    >>> [stream.push(b"\\xc3"), stream.push(b"\\xa9"), stream.push("t"), stream.close()]
    ['', 'é', 't', '']
    """

    def __init__(self) -> None:
        self._pending = b""

    def push(self, part: str | bytes) -> str:
        """Add the text of a piece, or the byte of a byte piece."""
        if isinstance(part, str):
            return self.close() + part
        self._pending += part
        text = ""
        while self._pending and (found := first_character(self._pending)):
            character, n_bytes = found
            text += character
            self._pending = self._pending[n_bytes:]
        return text

    def close(self) -> str:
        """What is left once no byte can follow: one U+FFFD for each byte of an unfinished character."""
        rest, self._pending = REPLACEMENT * len(self._pending), b""
        return rest


def spell(parts: list[str | bytes]) -> list[str]:
    """The text that each part adds; a character of several bytes stands at its last, a broken byte at its own."""
    spelled = ["" if isinstance(part, bytes) else part for part in parts]
    for start, run in _byte_runs(parts):
        offset = 0
        while offset < len(run):
            character, n_bytes = first_character(run[offset:]) or (REPLACEMENT, 1)
            offset += n_bytes
            spelled[start + offset - 1] = character
    return spelled


def first_character(data: bytes) -> tuple[str, int] | None:
    """The character at the head of some bytes and its length; U+FFFD of length 1 where there is none.

    None if `data` is the beginning of a character whose other bytes may still come.
    """
    for n_bytes in range(1, min(4, len(data)) + 1):
        try:
            text, used = codecs.utf_8_decode(data[:n_bytes], "strict", False)
        except UnicodeDecodeError:
            return REPLACEMENT, 1
        if used:
            return text, used
    return None


def _byte_runs(parts: list[str | bytes]) -> Iterator[tuple[int, bytes]]:
    start, run = 0, b""
    for i, part in enumerate([*parts, ""]):
        if isinstance(part, bytes):
            start = start if run else i
            run += part
        elif run:
            yield start, run
            run = b""
