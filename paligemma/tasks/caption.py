"""Captions: of a whole picture in any language, and of one region of it."""

from collections.abc import Sequence
from typing import Literal

from paligemma.errors import OptionError, nearest
from paligemma.results import Caption
from paligemma.tasks.base import MaskDecoder, SizeHw, SpanScores, TokenLogprobs, language, plain_text
from paligemma.tasks.coords import box_to_tokens

Style = Literal["caption", "cap", "describe"]
_STYLES = ("caption", "cap", "describe")


class _CaptionText:
    """Both kinds of captions are answered with plain text."""

    def suffix(self, result: Caption | str, size_hw: SizeHw | None = None) -> str:
        """The caption's text."""
        return plain_text(result, "caption")

    def parse(
        self,
        text: str,
        *,
        size_hw: SizeHw | None = None,
        token_logprobs: TokenLogprobs | None = None,
        mask_decoder: MaskDecoder | None = None,
    ) -> Caption:
        """Caption(text without outer white space, sum of log-probabilities, raw text)."""
        return Caption(text.strip(), SpanScores(text, token_logprobs).total, raw=text)


class CaptionTask(_CaptionText):
    """`caption en` -> a short sentence."""

    name = "caption"

    def prefix(self, lang: str = "en", *, style: Style = "caption") -> str:
        """`caption {lang}`: COCO-like; `cap`: like web alt-texts; `describe`: longer."""
        if style not in _STYLES:
            raise OptionError(f"style={style!r}: expected one of {', '.join(_STYLES)}.{nearest(str(style), _STYLES)}")
        return f"{style} {language(lang)}"


class GroundedCaptionTask(_CaptionText):
    """`caption <loc>x4` -> a sentence about that region."""

    name = "grounded_caption"

    def prefix(self, box_xyxy_px: Sequence[float], size_hw: tuple[int, int]) -> str:
        """`caption <locYMIN><locXMIN><locYMAX><locXMAX>` of a box in pixels of the original picture.

        The prompt holds location tokens on purpose; the processor lets those pass.
        """
        return f"caption {box_to_tokens(box_xyxy_px, size_hw)}"
