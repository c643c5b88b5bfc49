"""Masks, outlines and tags, painted in place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from paligemma.draw.style import INK, PAPER, Rgb, luminance, shortened
from paligemma.results import BoolMask

Rect = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are the first pixels outside
Soft = NDArray[np.floating[Any]]  # opacity per pixel, 0 to 1


@dataclass(frozen=True)
class Mark:
    """One thing to draw, in pixels of the enlarged picture."""

    tag: str
    colour: Rgb
    box: Rect
    mask: NDArray[np.bool_] | None = None


def mask_picture(mask: BoolMask) -> Image.Image:
    """A mask as a grey picture of its own size: 255 on the thing, 0 elsewhere."""
    return Image.fromarray(np.asarray(mask, dtype=np.uint8) * np.uint8(255))


def paint_mask(picture: Image.Image, mask: BoolMask, colour: Rgb, line: int, opacity: float) -> None:
    """A translucent fill with a crisp, smooth outline of `line` pixels in the same colour and a thin dark rim."""
    scale = picture.width / mask.shape[1]
    sharp = mask_picture(mask).resize(picture.size, Image.Resampling.BICUBIC)
    left, top, right, bottom = sharp.getbbox() or (0, 0, 0, 0)
    room = line + math.ceil(3 * scale)  # for the outline and the blur
    width, height = picture.size
    patch_box = (max(0, left - room), max(0, top - room), min(width, right + room), min(height, bottom + room))
    soft = _smooth(sharp.crop(patch_box), scale)

    inner = 1 - _grown(1 - soft, line // 2)
    outer = _grown(soft, line - line // 2)
    rim = _grown(outer, 1) - outer
    patch: Soft = np.asarray(picture.crop(patch_box), dtype=np.float32)
    for colour_now, alpha in ((colour, opacity * soft), (INK, 0.45 * rim), (colour, outer - inner)):
        patch = patch + (np.asarray(colour_now, dtype=np.float32) - patch) * np.clip(alpha, 0, 1)[..., None]
    picture.paste(Image.fromarray(np.round(patch).astype(np.uint8)), patch_box[:2])


def _smooth(sharp: Image.Image, scale: float) -> Soft:
    """A mask enlarged by `scale` without its staircase: an edge about one pixel wide. What is thin stays as it was."""
    blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(0.9 * scale)), dtype=np.float32) / 255
    soft: Soft = np.clip((blurred - 0.5) * (2 * scale) + 0.5, 0, 1)
    lost = np.asarray(sharp, dtype=np.float32) / 255 * (_grown(soft, math.ceil(2 * scale)) < 0.5)
    return np.maximum(soft, lost)


def _grown(soft: Soft, n_px: int) -> Soft:
    """Dilation by an octagon of radius `n_px`: a cross and a square in turn. Works on soft edges, too."""
    for step in range(n_px):
        wide = np.pad(soft, 1)
        across = np.maximum(np.maximum(wide[1:-1, :-2], wide[1:-1, 2:]), soft)
        tall = np.pad(across, 1) if step % 2 else wide
        soft = np.maximum(np.maximum(tall[:-2, 1:-1], tall[2:, 1:-1]), across)
    return soft


def paint_box(picture: Image.Image, box: Rect, colour: Rgb, line: int) -> None:
    """An outline that lies inside the box, between two thin dark lines that part it from any background."""
    draw = ImageDraw.Draw(picture, "RGBA")
    left, top, right, bottom = box
    rim = (*INK, 110)
    draw.rectangle((left - 1, top - 1, right, bottom), outline=rim, width=1)
    if right - left > 2 * line + 2 and bottom - top > 2 * line + 2:
        draw.rectangle((left + line, top + line, right - line - 1, bottom - line - 1), outline=rim, width=1)
    draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=line)


def paint_tags(picture: Image.Image, marks: Sequence[Mark], font: ImageFont.FreeTypeFont) -> None:
    pad = max(2, round(font.size * 0.28))
    ascent, descent = font.getmetrics()
    height = ascent + descent + pad
    draw = ImageDraw.Draw(picture)
    taken: list[Rect] = []
    # Small things choose first: a large one has more places left for its tag.
    for mark in sorted(marks, key=lambda m: area(m.box)):
        if not mark.tag:
            continue
        text = shortened(mark.tag, font, picture.width // 2)
        width = min(math.ceil(font.getlength(text)) + 2 * pad, picture.width)
        others = [other.box for other in marks if other is not mark]
        spot = spot_for_tag(mark.box, (width, min(height, picture.height)), picture.size, taken, others)
        taken.append(spot)
        draw.rectangle((spot[0], spot[1], spot[2] - 1, spot[3] - 1), fill=mark.colour)
        ink = INK if luminance(mark.colour) > 0.3 else PAPER
        draw.text((spot[0] + pad, spot[1] + pad // 2), text, font=font, fill=ink)


def spot_for_tag(
    box: Rect, tag_wh: tuple[int, int], canvas_wh: tuple[int, int], taken: Sequence[Rect], others: Sequence[Rect]
) -> Rect:
    """The best place for a tag: on its box, inside the picture, not on another tag, not on smaller things."""
    left, top, right, bottom = box
    width, height = tag_wh
    lines_up = (top - height, top, bottom - height, bottom)
    wishes = [
        (left, top - height), (left, top), (right - width, top - height), (left, bottom), (left, bottom - height),
        (right - width, top), (right - width, bottom - height), (right - width, bottom),
    ]  # fmt: skip
    wishes += [(x, y) for x in (right, left - width) for y in lines_up]
    wishes += [(left, y) for y in range(top + height, bottom - height, height)]
    wishes += [(left, y) for n in (2, 3) for y in (top - n * height, bottom + (n - 1) * height)]

    wished = np.array(wishes)
    corner = np.clip(wished, 0, np.array(canvas_wh) - tag_wh)
    spots = np.concatenate([corner, corner + tag_wh], axis=1)
    near = np.array([other for other in others if area(other) < 4 * area(box)]).reshape(-1, 4)
    near_area = np.prod(near[:, 2:] - near[:, :2], axis=1)
    cost = 20 * _shared(spots, np.array(taken).reshape(-1, 4)).sum(axis=1) / (width * height)
    cost += 0.5 * (_shared(spots, near) / np.minimum(near_area, width * height)).sum(axis=1)
    cost += 0.3 * np.abs(corner - wished).sum(axis=1) / height + 0.03 * np.arange(len(wishes))
    x0, y0, x1, y1 = spots[np.argmin(cost)].tolist()
    return x0, y0, x1, y1


def _shared(a: NDArray[np.int_], b: NDArray[np.int_]) -> NDArray[np.int_]:
    """Area that each of n boxes shares with each of m boxes, [n, m]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared: NDArray[np.int_] = np.prod(np.clip(high - low, 0, None), axis=2)
    return shared


def area(box: Rect) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
