"""How an overlay looks: colours, sizes, and text that fits."""

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

from PIL import ImageFont

from paligemma.errors import OptionError

Rgb = tuple[int, int, int]

# Picked by hand, then moved apart: the first six stay at least 25 CIE Lab units from each other for people with normal
# sight, without red cones and without green cones (Machado et al. 2009); see test_draw.py.
PALETTE: tuple[Rgb, ...] = (
    (255, 148, 0),  # orange
    (15, 90, 255),  # blue
    (218, 15, 15),  # red
    (35, 212, 145),  # green
    (215, 95, 172),  # pink
    (255, 250, 105),  # yellow
    (114, 52, 176),  # violet
    (85, 200, 255),  # sky
    (150, 55, 30),  # brown
    (150, 212, 95),  # lime
    (218, 30, 106),  # crimson
    (225, 225, 225),  # light grey
)
INK: Rgb = (24, 24, 28)
SOFT_INK: Rgb = (112, 112, 120)
PAPER: Rgb = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Style:
    """How an overlay looks; lengths follow from the size of the picture."""

    min_long_side_px: int = 720  # smaller pictures are enlarged to this
    scores: bool = True  # "cat 0.93" rather than "cat"
    mask_opacity: float = 0.42
    text_scale: float = 1.0
    font: str | Path | None = None  # a .ttf or .otf file for scripts that DejaVu Sans lacks (CJK, Indic)

    def __post_init__(self) -> None:
        if not 0 <= self.mask_opacity <= 1:
            raise OptionError(f"Style.mask_opacity={self.mask_opacity}: expected a number from 0 to 1.")
        if self.text_scale <= 0 or self.min_long_side_px <= 0:
            raise OptionError(
                f"Style.text_scale={self.text_scale}, min_long_side_px={self.min_long_side_px}: expected both above 0."
            )


def colours_for(labels: Iterable[str]) -> dict[str, Rgb]:
    """One colour per distinct label, in order of first appearance; beyond the palette, darker rounds of it."""
    distinct = list(dict.fromkeys(labels))
    chosen = {}
    for i, label in enumerate(distinct):
        dim = 0.72 ** (i // len(PALETTE))
        r, g, b = PALETTE[i % len(PALETTE)]
        chosen[label] = (round(r * dim), round(g * dim), round(b * dim))
    return chosen


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider by itself is broken anywhere."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in printable(paragraph).split(" "):
            longer = f"{line} {word}".strip()
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width and len(word) > 1:
                n = max(1, _fitting(word, font, width))
                lines.append(word[:n])
                word = word[n:]
            line = word
        if line:
            lines.append(line)
    return lines


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or its beginning and an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    return text[: _fitting(text, font, width - font.getlength("…"))].rstrip() + "…"


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many characters of the text fit into `width` pixels."""
    return bisect_right(range(len(text) + 1), width, key=lambda n: font.getlength(text[:n])) - 1


def printable(text: str) -> str:
    """One line of characters that a font can be asked for; lone surrogates and control characters become U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def font_for(style: Style, size_wh: tuple[int, int]) -> ImageFont.FreeTypeFont:
    size = max(13, round(math.sqrt(size_wh[0] * size_wh[1]) * 0.027)) * style.text_scale
    return _load_font(str(style.font) if style.font else None, max(6, round(size)))


@lru_cache(maxsize=16)
def _load_font(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    if path is None:
        bundled = resources.files("paligemma") / "assets" / "label-font" / "DejaVuSans.ttf"
        with resources.as_file(bundled) as file:
            return ImageFont.truetype(str(file), size)
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise OptionError(
            f"Style.font={path!r} cannot be read as a font ({error}): expected a .ttf or .otf file."
        ) from None


def luminance(colour: Rgb) -> float:
    """Relative luminance of an sRGB colour, 0 black to 1 white (WCAG 2)."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
