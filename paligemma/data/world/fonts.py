"""The bundled fonts: letters A-Z, a-z and digits, of seven kinds (`paligemma/assets/fonts/README.md`).

Training pictures are written in `FONTS`; in `UNSEEN_FONTS` only the pictures of `unseen.py`.
"""

from functools import lru_cache
from importlib import resources
from pathlib import Path

from PIL import ImageFont

FONTS: dict[str, str] = {
    "sans": "sans.ttf",
    "sans_wide": "sans_wide.ttf",
    "sans_narrow": "sans_narrow.ttf",
    "serif": "serif.ttf",
    "mono": "mono.ttf",
    "slab": "slab.otf",
    "hand": "hand.otf",
}
UNSEEN_FONTS: dict[str, str] = {"unseen_italic": "unseen_italic.ttf", "unseen_black": "unseen_black.ttf"}
_FILES = {**FONTS, **UNSEEN_FONTS}


@lru_cache(maxsize=1024)
def font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """A bundled font at an em size in pixels, laid out without system libraries so that every machine draws alike."""
    path = Path(str(resources.files("paligemma") / "assets" / "fonts" / _FILES[name]))
    return ImageFont.truetype(str(path), size_px, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=len(_FILES))
def cap_height(name: str) -> float:
    """Height of a capital letter as a fraction of the em size."""
    _, top, _, bottom = font(name, 200).getbbox("H", anchor="ls")
    return (bottom - top) / 200


def ink_box(name: str, size_px: int, text: str) -> tuple[int, int, int, int]:
    """left, top, right, bottom of the pixels a text blackens, with its baseline starting at the origin.

    `getbbox` would not do: it also spans the white room before and after the letters.
    """
    mask, (left, top) = font(name, size_px).getmask2(text, mode="L", anchor="ls")
    box = mask.getbbox()
    return left + box[0], top + box[1], left + box[2], top + box[3]
