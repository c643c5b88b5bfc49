"""A SentencePiece model as the `tokenizer.json` that transformers reads without protobuf.

Only BPE models with byte fallback and no normalisation, which is what Gemma has. Encoding is the same to the last id
with one known exception, shared with the files that transformers converts: where one piece can be merged from two pairs
of pieces, the two libraries may join overlapping candidates in another order. No released text is known to show it.
"""

import json
import struct
from collections.abc import Iterator
from typing import Any

from paligemma.errors import TokenizerError

# sentencepiece_model.proto: ModelProto {1: pieces, 2: trainer_spec}, SentencePiece {1: piece, 2: score, 3: type},
# TrainerSpec {3: model_type}.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BPE = 2
_SPACE = "\u2581"


def to_fast_json(model: bytes, image_piece: str | None, name: str) -> bytes:
    """The `tokenizer.json` of a serialised SentencePiece model.

    Args:
        image_piece: spelling of the image token, which gets the first id behind the vocabulary; None for none.
        name: of the file, for messages.

    Raises:
        TokenizerError: a model that is not BPE.
    """
    pieces: list[tuple[str, float, int]] = []
    for field, value in _fields(model):
        if field == 1:
            pieces.append(_piece(value))
        if field == 2 and dict(_fields(value)).get(3, 1) != _BPE:
            raise TokenizerError(
                f"{name} is no BPE model: expected Gemma's. Use the tokenizer that came with the checkpoint."
            )
    added = [
        _added(i, text, special=kind != _USER_DEFINED)
        for i, (text, _, kind) in enumerate(pieces)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    if image_piece is not None and image_piece not in {text for text, _, _ in pieces}:
        added.append(_added(len(pieces), image_piece, special=True))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    unspace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": space,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(text for text, _, kind in pieces if kind == _UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: i for i, (text, _, _) in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }
    return json.dumps(whole, ensure_ascii=False).encode()


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, best score first."""
    scores = {text: score for text, score, kind in pieces if kind == _NORMAL}
    found = [
        (-score, i, text[:i], text[i:])
        for text, score in scores.items()
        for i in range(1, len(text))
        if text[:i] in scores and text[i:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _added(token: int, text: str, *, special: bool) -> dict[str, Any]:
    # "normalized": matched after spaces have become ▁, which runs of spaces need.
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": token, "content": text, **flags, "normalized": _SPACE in text, "special": special}


def _piece(message: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return fields[1].decode(), score, fields.get(3, _NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Field number and value (int of a varint, bytes of the others) of each field of a protocol buffer message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        value: Any
        if key & 7 == 0:
            value, at = _varint(message, at)
        else:
            n_bytes = {1: 8, 5: 4}.get(key & 7)
            if n_bytes is None:
                n_bytes, at = _varint(message, at)
            value, at = message[at : at + n_bytes], at + n_bytes
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
