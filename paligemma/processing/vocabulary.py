"""The two file formats of a vocabulary behind one small face: text in, ids out; id in, piece out.

`tokenizer.model` is SentencePiece's, `tokenizer.json` that of the `tokenizers` library. Neither class below knows what
a loc token or a control token is for: `tokenizer.py` decides that once, for both.
"""

import struct
from collections.abc import Sequence
from typing import Protocol

import sentencepiece
import tokenizers

from paligemma.errors import TokenizerError

# Pieces that read as control tokens although a SentencePiece file calls some of them user-defined.
TURN_PIECES = ("<mask>", "<start_of_turn>", "<end_of_turn>")
IMAGE_PIECE = "<image>"

_USER_DEFINED = 4  # sentencepiece_model.proto, ModelProto.SentencePiece.Type


class Vocabulary(Protocol):
    """What `Tokenizer` needs from a file."""

    file_name: str  # the name under which other programs look for this format
    data: bytes  # the file

    def size(self) -> int:
        """Number of ids, counted from 0 without gaps."""

    def piece(self, token: int) -> str | None:
        """The piece of an id as the file spells it, spaces as ▁; None for an id that has none."""

    def id(self, piece: str) -> int | None:
        """Inverse of `piece`."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control spellings are plain characters."""

    def control_pieces(self) -> list[str]:
        """Pieces that the file itself marks as control or special."""

    def unparsed_pieces(self) -> list[str]:
        """Pieces other than the four basic ones that `encode` leaves as characters although SentencePiece would not."""

    def extended(self, pieces: Sequence[str]) -> "Vocabulary":
        """The same vocabulary with user-defined pieces appended: matched anywhere in a text, longest first."""


class SentencePieceVocabulary:
    """A serialised SentencePiece model."""

    file_name = "tokenizer.model"

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name = data, name
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
            self._size: int = self._model.GetPieceSize()
        except (RuntimeError, IndexError) as error:
            raise TokenizerError(
                f"{name} is not a SentencePiece model ({_first_line(error)}): expected a whole tokenizer.model or "
                "tokenizer.json. Fetch it again, it may be cut short."
            ) from None

    def size(self) -> int:
        return self._size

    def piece(self, token: int) -> str | None:
        return self._model.IdToPiece(token) if 0 <= token < self._size else None

    def id(self, piece: str) -> int | None:
        token: int = self._model.PieceToId(piece)  # of an unknown piece: the id of <unk>
        return token if self._model.IdToPiece(token) == piece else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.EncodeAsIds(text)
        return ids

    def control_pieces(self) -> list[str]:
        is_marked = (self._model.IsControl, self._model.IsUnknown)
        return [self._model.IdToPiece(i) for i in range(self._size) if any(marked(i) for marked in is_marked)]

    def unparsed_pieces(self) -> list[str]:
        return []

    def extended(self, pieces: Sequence[str]) -> "SentencePieceVocabulary":
        # A repeated field of a protocol buffer may go on anywhere in the message, so the new pieces are simply
        # appended to the bytes: no protobuf package, and nothing of the model is rewritten.
        return SentencePieceVocabulary(self.data + b"".join(map(_serialised_piece, pieces)), self.name)


class JsonVocabulary:
    """A `tokenizer.json` of the `tokenizers` library."""

    file_name = "tokenizer.json"

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name = data, name
        try:
            self._model = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception for every kind of malformed file
            raise TokenizerError(
                f"{name} is not a tokenizer.json ({_first_line(error)}): expected the fast tokenizer of a PaliGemma "
                "folder. Fetch it again, it may be cut short."
            ) from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # "<eos>" inside a text is five characters, as in SentencePiece
        self._size: int = self._model.get_vocab_size(with_added_tokens=True)

    def size(self) -> int:
        return self._size

    def piece(self, token: int) -> str | None:
        piece: str | None = self._model.id_to_token(token) if token >= 0 else None
        return piece

    def id(self, piece: str) -> int | None:
        token: int | None = self._model.token_to_id(piece)
        return token

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def control_pieces(self) -> list[str]:
        return [added.content for added in self._model.get_added_tokens_decoder().values() if added.special]

    def unparsed_pieces(self) -> list[str]:
        # Files differ in whether they call <start_of_turn> and the like special; SentencePiece always parses them.
        return [piece for piece in self.control_pieces() if piece in TURN_PIECES]

    def extended(self, pieces: Sequence[str]) -> "JsonVocabulary":
        self._model.add_tokens([tokenizers.AddedToken(piece, normalized=False, special=False) for piece in pieces])
        return JsonVocabulary(self._model.to_str().encode(), self.name)


def read_vocabulary(data: bytes, name: str) -> Vocabulary:
    """Either format, told apart by content: JSON opens with a brace, a SentencePiece model never does.

    Raises:
        TokenizerError: neither format, or damaged.
    """
    if not data.strip():
        raise TokenizerError(f"{name} is empty: expected a tokenizer.model or tokenizer.json. Fetch it again.")
    return (JsonVocabulary if data.lstrip()[:1] == b"{" else SentencePieceVocabulary)(data, name)


def _serialised_piece(piece: str) -> bytes:
    """Field 1 of ModelProto: a SentencePiece message {1: piece, 2: score 0.0, 3: USER_DEFINED}."""
    text = piece.encode()
    body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + _varint(_USER_DEFINED)
    return b"\x0a" + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
