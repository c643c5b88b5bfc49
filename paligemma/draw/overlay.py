"""Answers drawn onto the picture they were given for: boxes, masks, words, captions.

    overlay("street.jpg", model.detect("street.jpg", ["car"])).save("found.png")

Everything is measured in the picture's own size, so a thumbnail and a 20-megapixel photo look alike; small pictures are
enlarged first. Each label has one colour. Tags stay inside the picture and keep out of each other's way. Text that
belongs to the whole picture (a caption, a question and its answer) stands on a strip below it. Pillow only.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from paligemma.draw.paint import Mark, Rect, area, mask_picture, paint_box, paint_mask, paint_tags
from paligemma.draw.style import INK, PAPER, SOFT_INK, Rgb, Style, colours_for, font_for, printable, wrapped
from paligemma.errors import OptionError, ShapeError
from paligemma.processing.image import load_image
from paligemma.results import Answer, BoxXyxyPx, Caption, Detection, ReadText, Segment, Word


def overlay(
    image: Any,
    result: Any = None,
    *,
    prompt: str = "",
    colours: Mapping[str, Rgb] | None = None,
    style: Style | None = None,
) -> Image.Image:
    """Draw a result onto its picture.

    Args:
        image: anything that the models take as one picture.
        result: a list of `Detection`, `Segment` or `Word`; a `ReadText`, `Caption`, `Answer`; plain text; or None.
        prompt: what was asked; it stands on the strip before the answer.
        colours: label → RGB, to keep colours the same over several pictures; see `colours_for`.
        style: how it looks.

    Returns:
        A new RGB picture; as large as the original or enlarged, plus the strip where there is text.

    Raises:
        ShapeError: a mask has another size than the picture.
    """
    style = style or Style()
    pixels = load_image(image)
    scale = max(1.0, style.min_long_side_px / max(pixels.shape[:2]))
    picture = Image.fromarray(pixels)
    if scale > 1:
        size_wh = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size_wh, Image.Resampling.LANCZOS)

    items, text = _split(result)
    marks = _marks(items, pixels.shape[:2], picture.size, colours, style)
    font = font_for(style, picture.size)
    line = max(2, round(math.sqrt(picture.width * picture.height) / 230))
    for mark in marks:
        if mark.mask is not None:
            paint_mask(picture, mark.mask, mark.colour, line, style.mask_opacity)
    # Large boxes first, so that small ones lie on top of them.
    for mark in sorted(marks, key=lambda m: -area(m.box)):
        paint_box(picture, mark.box, mark.colour, line if mark.mask is None else max(1, line // 2))
    paint_tags(picture, marks, font)
    if items is not None and not items and not text:
        text = "nothing found"
    return _with_strip(picture, prompt, text, style)


def save(
    folder: str | Path,
    stem: str,
    image: Any,
    result: Any = None,
    *,
    prompt: str = "",
    colours: Mapping[str, Rgb] | None = None,
    style: Style | None = None,
) -> list[Path]:
    """Write `STEM.png`, and one `STEM.mask-NN-LABEL.png` per mask at the size of the original.

    Args:
        folder: made where it does not exist.
        stem: file name without ending.
        image, result, prompt, colours, style: as for `overlay`.

    Returns:
        The files written, the overlay first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {f"{stem}.png": overlay(image, result, prompt=prompt, colours=colours, style=style)}
    items, _ = _split(result)
    for i, item in enumerate(items or (), start=1):
        if isinstance(item, Segment):
            slug = re.sub(r"\W+", "-", item.label).strip("-")[:40]
            pictures[f"{stem}.mask-{i:02d}{'-' if slug else ''}{slug}.png"] = mask_picture(item.mask)
    for name, picture in pictures.items():
        picture.save(folder / name)
    return [folder / name for name in pictures]


def sheet(pictures: Sequence[Image.Image], *, columns: int = 3, cell_px: int = 480) -> Image.Image:
    """Several pictures on one page, each fitted into a square cell, rows as high as their highest picture."""
    gap = max(4, cell_px // 40)
    small = []
    for picture in pictures:
        copy = picture.convert("RGB")
        copy.thumbnail((cell_px, cell_px), Image.Resampling.LANCZOS)
        small.append(copy)
    rows = [small[i : i + columns] for i in range(0, len(small), columns)]
    width = max((len(row) for row in rows), default=0) * (cell_px + gap) + gap
    height = sum(max(p.height for p in row) + gap for row in rows) + gap
    page = Image.new("RGB", (max(width, 1), max(height, 1)), PAPER)
    top = gap
    for row in rows:
        for i, picture in enumerate(row):
            page.paste(picture, (gap + i * (cell_px + gap) + (cell_px - picture.width) // 2, top))
        top += max(p.height for p in row) + gap
    return page


def _split(result: Any) -> tuple[list[Detection | Segment | Word] | None, str]:
    """What is drawn on the picture (None: this result never marks places) and what is written below it."""
    match result:
        case None:
            return None, ""
        case str():
            return None, result
        case Caption():
            return None, result.text
        case Answer():
            offered = " · ".join(f"{c.text} {c.probability:.2f}" for c in result.choices)
            return None, offered or result.text
        case ReadText():
            return list(result.words) or None, "" if result.words else result.text
        case list() | tuple():
            for item in result:
                if not isinstance(item, Detection | Segment | Word):
                    raise OptionError(
                        f"cannot draw a {type(item).__name__}: expected Detection, Segment or Word in the list. "
                        "Hand one picture's result to overlay()."
                    )
            return list(result), ""
    raise OptionError(
        f"cannot draw a {type(result).__name__}: expected what caption, answer, detect, segment or read return, or str."
    )


def _marks(
    items: list[Detection | Segment | Word] | None,
    size_hw: tuple[int, ...],
    canvas_wh: tuple[int, int],
    colours: Mapping[str, Rgb] | None,
    style: Style,
) -> list[Mark]:
    items = items or []
    names = ["word" if isinstance(item, Word) else item.label for item in items]
    palette = {**colours_for(names), **(colours or {})}
    marks = []
    for item, name in zip(items, names, strict=True):
        text = printable(item.text if isinstance(item, Word) else item.label)
        tag = f"{text} {item.score:.2f}".strip() if style.scores else text
        mask = item.mask if isinstance(item, Segment) and item.mask.any() else None
        if mask is not None and mask.shape != tuple(size_hw):
            raise ShapeError(
                f"the mask of {text!r} is {mask.shape}, the picture is {tuple(size_hw)}: expected one size. "
                "Draw a result on the picture that it was made from."
            )
        box = _fit(item.box_xyxy_px, size_hw, canvas_wh)
        marks.append(Mark(tag, palette[name], box, mask))
    return marks


def _fit(box: BoxXyxyPx, size_hw: tuple[int, ...], canvas_wh: tuple[int, int]) -> Rect:
    """A box in pixels of the original → whole pixels of the canvas, inside it and at least one pixel large."""
    (height, width), (canvas_w, canvas_h) = size_hw, canvas_wh
    x0, y0, x1, y1 = np.nan_to_num(np.asarray(box, dtype=np.float64))
    left = round(np.clip(min(x0, x1) / width, 0, 1) * canvas_w)
    right = round(np.clip(max(x0, x1) / width, 0, 1) * canvas_w)
    top = round(np.clip(min(y0, y1) / height, 0, 1) * canvas_h)
    bottom = round(np.clip(max(y0, y1) / height, 0, 1) * canvas_h)
    left, top = min(left, canvas_w - 1), min(top, canvas_h - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _with_strip(picture: Image.Image, prompt: str, text: str, style: Style) -> Image.Image:
    """The picture with what was asked (soft) and what was answered (black) on a strip below it."""
    font = font_for(style, picture.size)
    pad = round(font.size * 0.8)
    rows = [
        (line, ink)
        for part, ink in ((prompt, SOFT_INK), (text, INK))
        for line in wrapped(part, font, picture.width - 2 * pad)
    ]
    if not rows:
        return picture
    step = round(font.size * 1.4)
    page = Image.new("RGB", (picture.width, picture.height + len(rows) * step + 2 * pad - step // 4), PAPER)
    page.paste(picture, (0, 0))
    draw = ImageDraw.Draw(page)
    for i, (line, ink) in enumerate(rows):
        draw.text((pad, picture.height + pad + i * step), line, font=font, fill=ink)
    return page
