"""Processor: pictures, prompts and answers in, one `Batch` out; for training and inference alike."""

from collections.abc import Sequence as List
from typing import Any

import torch
from torch import Tensor

from paligemma.config import PaliGemmaConfig
from paligemma.errors import PromptError, ShapeError, TokenizerError
from paligemma.processing.batch import Batch, Item, PaddingSide, collate
from paligemma.processing.batch import pack as pack_items
from paligemma.processing.image import MAX_PIXELS, load_image, open_rgb, to_pixels
from paligemma.processing.prompt import Sequence, fit, lay_out
from paligemma.processing.resize import Picture
from paligemma.processing.tokenizer import Tokenizer
from paligemma.processing.vocabulary import IMAGE_PIECE

SEPARATOR = "\n"
MAX_TEXT_TOKENS = 8192  # what Gemma was trained on; longer prompts run, but nobody has seen how well


class Processor:
    """Everything between a user's words and pictures and the tensors of a model.

    Which of the references it follows stands in `config.processing`: resize, alpha, exif_orientation, separator and
    special_tokens.

    >>> processor = Processor(config, tokenizer)
    >>> processor("cat.jpg", "caption en")                            # to ask
    >>> processor(["a.png", "b.png"], ["detect cat"] * 2, ["<loc0000>… cat", ""])   # to teach: suffixes end in eos
    """

    def __init__(
        self,
        config: PaliGemmaConfig,
        tokenizer: Tokenizer,
        *,
        max_pixels: int | None = MAX_PIXELS,
        draft: bool = False,
    ) -> None:
        """
        Args:
            max_pixels: largest picture that is decoded; None for any.
            draft: decode large JPEG files at a fraction of their size, see `load_image`: faster, but not the pixels
                that the references see.

        Raises:
            TokenizerError: the tokenizer has other ids than the model.
        """
        ours, theirs = config.tokens, tokenizer.tokens
        fields = ("n_tokens", "pad", "eos", "bos", "unk", "loc_start", "seg_start")
        unlike = [name for name in fields if getattr(ours, name) != getattr(theirs, name)]
        if unlike:
            has, wants = (", ".join(f"{name}={getattr(side, name)}" for name in unlike) for side in (theirs, ours))
            raise TokenizerError(
                f"{tokenizer.source} does not fit the model: it has {has}, expected {wants}. Use the tokenizer that "
                "came with the checkpoint."
            )
        self.config = config
        self.tokenizer = tokenizer
        self.max_pixels = max_pixels
        self.draft = draft

    def __call__(
        self,
        images: Any,
        prefix: str | List[str],
        suffix: str | List[str | None] | None = None,
        *,
        padding_side: PaddingSide = "left",
        suffix_open: bool = False,
        max_length: int | None = None,
        truncate: bool = False,
        allow_special: bool = False,
        pack: bool = False,
        row_length: int | None = None,
        multiple_of: int = 1,
    ) -> Batch:
        """Lay out one example or many.

        Args:
            images: with one prefix: a picture, a list of pictures, or None or [] for text alone. With a list of
                prefixes: a list with one such entry each, or None. A picture is anything that `load_image` takes, or
                a handle with `image_embeds` float[n, P, D], pictures that the image tower has already seen.
            prefix: the prompt or prompts, without image placeholders, bos and final newline.
            suffix: the answers to learn or to score, without eos; None, for all or for some, to ask for one.
            padding_side: "left" for decoding, "right" is usual in training; results do not depend on it.
            suffix_open: write no eos after the suffixes: they are the beginning of an answer to be continued.
            max_length: most text tokens of an example, bos to eos; image tokens do not count (big_vision's text_len,
                plus one in training). Default 8,192, the length that Gemma was trained on.
            truncate: cut longer examples at the right end, as big_vision does, instead of refusing them.
            allow_special: let control spellings such as "<eos>" stand in texts; what they mean there says
                `config.processing.special_tokens`.
            pack: put several examples into a row.
            row_length: slots of a row, image slots included; default the longest example.
            multiple_of: round the row length up.

        Returns:
            A batch on the CPU.

        Raises:
            PromptError: control spellings, too long, or lists of unlike length.
            ImageError: a picture that cannot be read.
            ShapeError: image handles of another model, or mixed with pictures, or examples longer than `row_length`.
        """
        if not isinstance(prefix, str | list | tuple):
            raise PromptError(f"prefix is a {type(prefix).__name__}: expected text, or a list of texts.")
        prefixes = [prefix] if isinstance(prefix, str) else list(prefix)
        suffixes = _per_prompt("suffix", suffix, prefixes, is_single=isinstance(prefix, str))
        pictures = _per_prompt("images", images, prefixes, is_single=isinstance(prefix, str))
        items = []
        seen: dict[int, Tensor] = {}  # a picture that many prompts are about is read once
        for i, (entry, asked, answered) in enumerate(zip(pictures, prefixes, suffixes, strict=True)):
            where = f"example {i}" if len(prefixes) > 1 else "the example"
            pixels, image_embeds = self._images(entry, seen)
            n_images = sum(len(given) for given in (pixels, image_embeds) if given is not None)
            sequence = self.sequence(
                n_images, asked, answered, suffix_open=suffix_open, allow_special=allow_special, where=where
            )
            sequence = self._within(sequence, max_length, truncate, where)
            items.append(Item(sequence, pixels=pixels, image_embeds=image_embeds))
        if pack:
            return pack_items(items, row_length, multiple_of=multiple_of)
        return collate(items, padding_side=padding_side, length=row_length, multiple_of=multiple_of)

    def sequence(
        self,
        n_images: int,
        prefix: str,
        suffix: str | None = None,
        *,
        suffix_open: bool = False,
        allow_special: bool = False,
        where: str = "the example",
    ) -> Sequence:
        """The row of one example without its pictures.

        Args:
            suffix: the answer; None to ask for one. An empty answer is eos alone.
            where: how messages call the example.

        Raises:
            PromptError: control spellings in a text.
        """
        tokens, joint = self.config.tokens, self.config.processing.separator == "joint"
        asked = self._encode(prefix + SEPARATOR if joint else prefix, "prefix", allow_special, where)
        answered = [] if suffix is None else self._encode(suffix, "suffix", allow_special, where)
        return lay_out(
            n_images * self.config.vision.n_image_tokens,
            asked,
            [] if joint else self.tokenizer.encode(SEPARATOR),
            answered,
            bos=tokens.bos,
            eos=None if suffix is None or suffix_open else tokens.eos,
        )

    def pixels(self, pictures: List[Any], *, out: Tensor | None = None) -> Tensor:
        """Pictures as float32[n, 3, R, R] in [-1, 1]; `out` of that shape is written into and returned.

        `out` may be uint8 where `has_whole_levels`: then it takes the levels, of which the tower makes the same pixels.
        """
        rules, side = self.config.processing, self.config.vision.resolution
        made = torch.empty(len(pictures), 3, side, side) if out is None else out
        for picture, place in zip(pictures, made, strict=True):
            loaded = open_rgb(
                picture, alpha=rules.alpha, exif_orientation=rules.exif_orientation, max_pixels=self.max_pixels,
                draft=side if self.draft else None,
            )  # fmt: skip
            to_pixels(loaded, side, rules.resize, out=place)
        return made

    @property
    def has_whole_levels(self) -> bool:
        """Whether resized pictures are whole levels 0 to 255, as in all released models."""
        return self.config.processing.resize != "float_bilinear_aa"

    def load_image(self, picture: Any) -> Picture:
        """One picture as uint8[H, W, 3], with the alpha and orientation rules of this model."""
        rules = self.config.processing
        return load_image(
            picture, alpha=rules.alpha, exif_orientation=rules.exif_orientation, max_pixels=self.max_pixels
        )

    def _images(self, entry: Any, seen: dict[int, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Pixels or embeds of one example."""
        pictures = [] if entry is None else list(entry) if isinstance(entry, list | tuple) else [entry]
        handles = [picture.image_embeds for picture in pictures if hasattr(picture, "image_embeds")]
        if not pictures:
            return None, None
        if not handles:
            for picture in pictures:
                if id(picture) not in seen:
                    seen[id(picture)] = self.pixels([picture])
            return torch.cat([seen[id(picture)] for picture in pictures]), None
        if len(handles) < len(pictures):
            raise ShapeError(
                f"an example has {len(handles)} encoded and {len(pictures) - len(handles)} plain pictures: expected "
                "one kind. Encode the others first."
            )
        image_embeds = torch.cat(handles)
        expected = (self.config.vision.n_image_tokens, self.config.text.width)
        if tuple(image_embeds.shape[1:]) != expected:
            raise ShapeError(
                f"encoded pictures have shape {list(image_embeds.shape)}: expected [n, {expected[0]}, {expected[1]}]. "
                "They come from another model, encode the pictures with this one."
            )
        return None, image_embeds

    def _encode(self, text: str, role: str, allow_special: bool, where: str) -> list[int]:
        if not isinstance(text, str):
            raise PromptError(f"the {role} of {where} is a {type(text).__name__}: expected text.")
        mode = self.config.processing.special_tokens
        found = self.tokenizer.find_control(text)
        if found and not allow_special:
            raise PromptError(
                f"the {role} of {where} contains the control token {found}: expected plain text. Remove it, or pass "
                "allow_special=True."
            )
        if found and mode == "parse" and IMAGE_PIECE in text:
            raise PromptError(
                f"the {role} of {where} contains {IMAGE_PIECE}: expected pictures in images=, which places "
                "them. Remove it."
            )
        return self.tokenizer.encode(text, special=mode)

    def _within(self, sequence: Sequence, max_length: int | None, truncate: bool, where: str) -> Sequence:
        limit = MAX_TEXT_TOKENS if max_length is None else max_length
        n_text = len(sequence) - sequence.n_image_tokens
        if n_text <= limit:
            return sequence
        if not truncate:
            raise PromptError(
                f"{where} has {n_text} text tokens: expected at most {limit}. Shorten it, pass a larger max_length=, "
                "or truncate=True to cut its end."
            )
        return fit(sequence, sequence.n_image_tokens + limit)


def _per_prompt(name: str, given: Any, prefixes: list[str], *, is_single: bool) -> list[Any]:
    """One entry per prompt."""
    if is_single:
        return [given]
    if given is None:
        return [None] * len(prefixes)
    if not isinstance(given, list | tuple):
        raise PromptError(f"{name} is one value for {len(prefixes)} prefixes: expected a list of {len(prefixes)}.")
    if len(given) != len(prefixes):
        raise PromptError(
            f"{len(given)} {name} for {len(prefixes)} prefixes: expected one for each, in the same order."
        )
    return list(given)
