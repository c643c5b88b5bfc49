"""Text ↔ ids: Gemma's SentencePiece vocabulary plus 1,024 <locNNNN> and 128 <segNNN> tokens.

A SentencePiece `tokenizer.model` and a `tokenizer.json` behave alike to the last id. No text is changed on the way in:
no dummy space, no case, no normalisation. loc and seg spellings are one token wherever they stand; control spellings
such as "<eos>" are plain characters unless asked for.

Sources: big_vision pp/ops_text.py, pp/tokenizer.py (JAX original); SentencePiece.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from paligemma.config import SpecialTokens, TokenConfig
from paligemma.errors import PromptError, TokenizerError
from paligemma.processing.fast_tokenizer import to_fast_json
from paligemma.processing.spelling import UNKNOWN, TextStream, spell
from paligemma.processing.vocabulary import IMAGE_PIECE, TURN_PIECES, Vocabulary, read_vocabulary

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # ▁, how pieces write a space
_BASIC = ("pad", "eos", "bos", "unk")
_HUGGING_FACE = {
    **{f"{name}_token": f"<{name}>" for name in _BASIC},
    "add_bos_token": True,  # as in the released files; PaliGemmaProcessor turns it off and writes bos itself
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "extra_special_tokens": {"image_token": IMAGE_PIECE},
    "processor_class": "PaliGemmaProcessor",
    "tokenizer_class": "GemmaTokenizer",
}


class Tokenizer:
    """One vocabulary with the ids that mean something.

    Attributes:
        tokens: the ids of control, loc and seg tokens.
        control_pieces: spellings that end, pad or switch a sequence; prompts that contain one are refused by default.
    """

    def __init__(self, vocabulary: Vocabulary, tokens: TokenConfig, *, source: str) -> None:
        self._vocabulary = vocabulary
        self.tokens = tokens
        self.source = source
        spelled = {IMAGE_PIECE, *vocabulary.control_pieces(), *(p for p in TURN_PIECES if vocabulary.id(p) is not None)}
        self.control_pieces: tuple[str, ...] = tuple(sorted(spelled, key=lambda piece: (self._id(piece), piece)))
        self._find_control = _any_of(self.control_pieces)
        # What `encode` has to cut out of a text itself, because the library reads it as characters.
        self._cut: dict[SpecialTokens, Mapping[str, int]] = {
            "text": {piece: self._id(piece) for piece in vocabulary.unparsed_pieces()},
            "parse": {piece: self._id(piece) for piece in self.control_pieces},
        }
        self._find_cut = {mode: _any_of(pieces) for mode, pieces in self._cut.items()}
        self._silent = {tokens.pad, tokens.eos, tokens.bos, tokens.image}

    # ------------------------------------------------------------------------------------------------------ files

    @classmethod
    def from_file(cls, path: str | Path, tokens: TokenConfig | None = None) -> "Tokenizer":
        """Read a `tokenizer.model` or `tokenizer.json`, or the one of them that a folder holds.

        A vocabulary without loc and seg tokens (plain Gemma: 256,000 pieces) gets them appended, as big_vision does.

        Args:
            path: file, or folder; in a folder `tokenizer.model` goes first, which is smaller and reads faster.
            tokens: the ids that the model expects. Without, they are read off the vocabulary.

        Raises:
            TokenizerError: no such file, damaged, or not the vocabulary that `tokens` describes.
        """
        path = Path(path)
        if path.is_dir():
            path = next(
                (path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()), path
            )
        if not path.is_file():
            raise TokenizerError(
                f"there is no tokenizer at {path}: expected a tokenizer.model or tokenizer.json. "
                "Put one beside the weights, or name it with tokenizer=."
            )
        return cls.from_bytes(path.read_bytes(), tokens, name=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, tokens: TokenConfig | None = None, *, name: str = "tokenizer") -> "Tokenizer":
        """Like `from_file`, from the content of a file; `name` stands in messages."""
        vocabulary = read_vocabulary(data, name)
        expected = tokens or TokenConfig()
        wanted = [f"<loc{i:04d}>" for i in range(expected.n_loc)] + [f"<seg{i:03d}>" for i in range(expected.n_seg)]
        missing = [piece for piece in wanted if vocabulary.id(piece) is None]
        if len(missing) == len(wanted):
            vocabulary = vocabulary.extended(wanted)
        elif missing:
            raise TokenizerError(
                f"{name} has {len(wanted) - len(missing)} of {len(wanted)} loc and seg tokens, {missing[0]} is not "
                "among them: expected all of them, or none. Use the tokenizer that came with the checkpoint."
            )
        found = _token_config(vocabulary, tokens, name)
        if tokens is not None and tokens != found:
            fields = [f.name for f in dataclasses.fields(tokens) if getattr(tokens, f.name) != getattr(found, f.name)]
            has, wants = (", ".join(f"{field}={getattr(side, field)}" for field in fields) for side in (found, tokens))
            raise TokenizerError(
                f"{name} does not fit the model: it has {has}, expected {wants}. Use the tokenizer that came with the "
                "checkpoint."
            )
        return cls(vocabulary, found, source=name)

    def save(self, folder: str | Path, *, hugging_face: bool = False) -> list[Path]:
        """Write the vocabulary under the name that other programs look for; returns the files.

        The bytes are those that were read, followed by the loc and seg tokens if those had to be appended.

        Args:
            hugging_face: also write what transformers wants beside weights: `tokenizer.json`, converted where a
                SentencePiece model was read, and `tokenizer_config.json`.
        """
        contents = {self._vocabulary.file_name: self._vocabulary.data}
        if hugging_face:
            contents["tokenizer_config.json"] = json.dumps(_HUGGING_FACE, indent=2).encode()
            if "tokenizer.json" not in contents:
                image = IMAGE_PIECE if self.tokens.image == self.n_tokens else None
                contents["tokenizer.json"] = to_fast_json(self._vocabulary.data, image, self.source)
        for name, content in contents.items():
            (Path(folder) / name).write_bytes(content)
        return [Path(folder) / name for name in contents]

    # --------------------------------------------------------------------------------------------- text to tokens

    @property
    def n_tokens(self) -> int:
        """Real tokens, loc and seg included; <image> and filler rows are not among them."""
        return self.tokens.n_tokens

    def encode(self, text: str, *, special: SpecialTokens = "text") -> list[int]:
        """Ids of a text, without bos and eos.

        Args:
            special: "text": "<eos>" is five characters (big_vision). "parse": it is the control token (transformers).

        Raises:
            PromptError: the text holds half a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text holds {text[error.start]!r} at position {error.start}, half a surrogate pair: expected "
                "whole Unicode characters. Decode the text anew, or remove it."
            ) from None
        finder, ids = self._find_cut[special], self._cut[special]
        if finder is None or not finder.search(text):
            return self._vocabulary.encode(text)
        out: list[int] = []
        for i, part in enumerate(finder.split(text)):  # odd parts are the pieces found
            if part:
                out += [ids[part]] if i % 2 else self._vocabulary.encode(part)
        return out

    def find_control(self, text: str) -> str | None:
        """The first control spelling in a text, such as "<eos>"."""
        found = self._find_control.search(text) if self._find_control else None
        return found[0] if found else None

    # --------------------------------------------------------------------------------------------- tokens to text

    def decode(self, ids: Iterable[int], *, stop_at_eos: bool = True) -> str:
        """Text of some ids, up to the first eos.

        pad, bos, eos and <image> add nothing, nor do filler rows beyond the vocabulary; loc and seg tokens and others
        print as they are spelled, <unk> as " ⁇ ", bytes that form no character as one U+FFFD each.
        `decode(encode(text))` is the text, except that ▁ (U+2581) comes back as a space.
        """
        return "".join(self.pieces(ids, stop_at_eos=stop_at_eos))

    def pieces(self, ids: Iterable[int], *, stop_at_eos: bool = True) -> list[str]:
        """The text that each id adds, so that joined they are `decode(ids)`.

        A character of several byte tokens stands at the last of them. Everything from the first eos on is empty.

        >>> tokenizer.pieces(tokenizer.encode("café") + [tokenizer.tokens.eos])   # é is two byte tokens
        ['c', 'a', 'f', '', 'é', '']
        """
        tokens = [int(token) for token in ids]
        end = tokens.index(self.tokens.eos) if stop_at_eos and self.tokens.eos in tokens else len(tokens)
        return spell([self.part(token) for token in tokens[:end]]) + [""] * (len(tokens) - end)

    def part(self, token: int) -> str | bytes:
        """What one token stands for: text, one byte of a character, or nothing.

        Raises:
            TokenizerError: a negative id.
        """
        if token < 0:
            raise TokenizerError(f"token id {token} is negative: expected 0 to {self.n_tokens - 1}.")
        if token in self._silent or token >= self.tokens.n_tokens:
            return ""
        if token == self.tokens.unk:
            return UNKNOWN
        piece = self._vocabulary.piece(token) or ""
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace(_SPACE, " ")

    def piece(self, token: int) -> str:
        """The piece of an id as the vocabulary spells it, control tokens included; for people."""
        if token == self.tokens.image:
            return IMAGE_PIECE
        return self._vocabulary.piece(token) or f"<id {token}>"

    def stream(self) -> "TokenStream":
        """A decoder that takes one id at a time, for showing an answer while it is written."""
        return TokenStream(self)

    def _id(self, piece: str) -> int:
        if piece == IMAGE_PIECE:
            return self.tokens.image
        token = self._vocabulary.id(piece)
        return self.tokens.unk if token is None else token


class TokenStream:
    """Ids in, text out as soon as it is certain; joined with `close()`, the text is `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = TextStream()
        self._ended = False

    def push(self, token: int) -> str:
        """Add one id; text that may still change, such as half a character, is held back."""
        self._ended = self._ended or token == self._tokenizer.tokens.eos
        return self._text.push("" if self._ended else self._tokenizer.part(token))

    def close(self) -> str:
        """The text held back, once no id follows."""
        return self._text.close()


def _token_config(vocabulary: Vocabulary, tokens: TokenConfig | None, name: str) -> TokenConfig:
    """The ids that a complete vocabulary gives; the control tokens are the same in every model and checked."""
    expected = tokens or TokenConfig()
    for field in _BASIC:
        token, piece = getattr(expected, field), f"<{field}>"
        if vocabulary.piece(token) != piece:
            raise TokenizerError(
                f"{name} has {vocabulary.piece(token)!r} as id {token}, expected {piece!r}: this is not a Gemma "
                "vocabulary. Use the tokenizer that came with the checkpoint."
            )
    starts = {}
    for kind, count, form in (("loc", expected.n_loc, "<loc{:04d}>"), ("seg", expected.n_seg, "<seg{:03d}>")):
        ids = [vocabulary.id(form.format(i)) for i in range(count)]
        if not ids:  # a table too small for such tokens
            continue
        if ids[0] is None or ids != list(range(ids[0], ids[0] + count)):
            raise TokenizerError(
                f"the <{kind}…> tokens of {name} do not follow one another from {ids[0]}: expected {count} consecutive "
                "ids. Use the tokenizer that came with the checkpoint."
            )
        starts[f"{kind}_start"] = ids[0]
    image, n_tokens = vocabulary.id(IMAGE_PIECE), vocabulary.size()
    if image is not None and image == n_tokens - 1:
        n_tokens = image  # <image> is no real token; transformers puts it behind all others
    if image is None:
        image = n_tokens if tokens is None else tokens.image
    return dataclasses.replace(expected, n_tokens=n_tokens, image=image, **starts)


def _any_of(pieces: Iterable[str]) -> "re.Pattern[str] | None":
    ordered = sorted(pieces, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None
