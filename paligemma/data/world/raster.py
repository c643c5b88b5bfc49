"""Things and backgrounds as pixels: silhouettes, textures, patterns."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from paligemma.data.world.fonts import font, ink_box
from paligemma.data.world.scene import Background, Thing
from paligemma.data.world.shapes import parts
from paligemma.data.world.variants import variant_parts

Floats = NDArray[np.float32]

_SUPERSAMPLE = 3


@dataclass(frozen=True)
class Patch:
    """A thing inside its window of the picture.

    `ink` is uint8[h, w], how much of each pixel the thing covers; `area` is bool[h, w], the pixels that belong to it
    (for a text: the whole quadrilateral around its letters).
    """

    top: int
    left: int
    ink: NDArray[np.uint8]
    area: NDArray[np.bool_]

    @property
    def window(self) -> tuple[slice, slice]:
        h, w = self.ink.shape
        return slice(self.top, self.top + h), slice(self.left, self.left + w)


def patch(thing: Thing, size_hw: tuple[int, int]) -> Patch:
    """The silhouette of a thing, clipped to the picture."""
    return _text_patch(thing, size_hw) if thing.kind == "text" else _shape_patch(thing, size_hw)


def _turn(points: NDArray[np.float64], angle_deg: float) -> NDArray[np.float64]:
    c, s = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    turned: NDArray[np.float64] = points @ np.array([[c, s], [-s, c]])
    return turned


def _window(points: NDArray[np.float64], size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """top, left, bottom, right of the pixels around the points, inside the picture and never empty."""
    h, w = size_hw
    left, top = np.floor(points.min(axis=0)).astype(int)
    right, bottom = np.ceil(points.max(axis=0)).astype(int)
    top, left = min(max(int(top), 0), h - 1), min(max(int(left), 0), w - 1)
    return top, left, max(min(int(bottom), h), top + 1), max(min(int(right), w), left + 1)


def _fill(
    polygons: list[tuple[NDArray[np.float64], bool]], window: tuple[int, int, int, int], supersample: int
) -> NDArray[np.uint8]:
    top, left, bottom, right = window
    canvas = Image.new("L", ((right - left) * supersample, (bottom - top) * supersample), 0)
    draw = ImageDraw.Draw(canvas)
    for points, adds in polygons:
        # Pillow takes pixel centres as coordinates: half a pixel less than edges.
        xy = (points - (left, top)) * supersample - 0.5
        draw.polygon(xy.ravel().tolist(), fill=255 if adds else 0)
    return np.asarray(canvas.reduce(supersample) if supersample > 1 else canvas)


def _shape_patch(thing: Thing, size_hw: tuple[int, int]) -> Patch:
    outline = variant_parts if thing.variant else parts
    placed = [
        (_turn(points * thing.size_px, thing.angle_deg) + thing.centre_xy_px, adds)
        for points, adds in outline(thing.shape, thing.elongation)
    ]
    window = _window(placed[0][0], size_hw)  # the first part spans the others
    ink = _fill(placed, window, _SUPERSAMPLE)
    return Patch(window[0], window[1], ink, ink >= 128)


def text_half_extent(thing: Thing) -> tuple[float, float]:
    """Half width and half height of a text's ink before it is turned, in pixels."""
    left, top, right, bottom = ink_box(thing.font, int(thing.size_px), thing.text)
    return (right - left) / 2, (bottom - top) / 2


def _text_patch(thing: Thing, size_hw: tuple[int, int]) -> Patch:
    face = font(thing.font, int(thing.size_px))
    left, top, right, bottom = ink_box(thing.font, int(thing.size_px), thing.text)
    half_w, half_h = (right - left) / 2, (bottom - top) / 2
    corners = np.array([[-half_w, -half_h], [half_w, -half_h], [half_w, half_h], [-half_w, half_h]])
    quad = _turn(corners, thing.angle_deg) + thing.centre_xy_px
    window = _window(quad, size_hw)
    y0, x0, y1, x1 = window
    h, w = y1 - y0, x1 - x0
    # Drawn upright in the middle of a canvas big enough to be turned, then cut to the window.
    side_h, side_w = max(h, math.ceil(2 * half_h)) + 4, max(w, math.ceil(2 * half_w)) + 4
    canvas = Image.new("L", (side_w, side_h), 0)
    # Where the text's middle falls on the canvas: the same sub-pixel place as in the picture, less whole pixels.
    shift_x = round(thing.centre_xy_px[0] - side_w / 2)
    shift_y = round(thing.centre_xy_px[1] - side_h / 2)
    cx, cy = thing.centre_xy_px[0] - shift_x, thing.centre_xy_px[1] - shift_y
    ImageDraw.Draw(canvas).text((cx - half_w - left, cy - half_h - top), thing.text, fill=255, font=face, anchor="ls")
    if thing.angle_deg:
        canvas = canvas.rotate(-thing.angle_deg, resample=Image.Resampling.BICUBIC, center=(cx, cy))
    ink = np.asarray(canvas.crop((x0 - shift_x, y0 - shift_y, x1 - shift_x, y1 - shift_y)))
    return Patch(y0, x0, ink, _fill([(quad, True)], window, 1) >= 128)


def _ramp(h: int, w: int, angle_deg: float, top: float, left: float) -> Floats:
    """Signed distance of each pixel along a direction, in pixels; float32[h, w]."""
    c, s = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    ys = (np.arange(h, dtype=np.float32) + np.float32(top)) * np.float32(s)
    xs = (np.arange(w, dtype=np.float32) + np.float32(left)) * np.float32(c)
    ramp: Floats = ys[:, None] + xs[None, :]
    return ramp


def _wave(ramp: Floats, period: float) -> Floats:
    wave: Floats = np.sin(ramp * np.float32(2 * math.pi / period))
    return wave


def _unit(values: Floats) -> Floats:
    return np.clip(values, np.float32(0), np.float32(1))


def texture(thing: Thing, at: Patch) -> Floats:
    """How much of a texture's second shade each pixel of the patch takes, float32[h, w] in 0..1."""
    h, w = at.ink.shape
    cx, cy = thing.centre_xy_px
    along = _ramp(h, w, thing.texture_angle_deg, at.top - cy, at.left - cx)
    if thing.texture == "gradient":
        return _unit(along / np.float32(thing.size_px) + np.float32(0.5))
    if thing.texture == "outline":
        radius = max(1.5, 0.055 * thing.size_px)
        inner = Image.fromarray(np.pad(at.ink, 1)).filter(ImageFilter.BoxBlur(radius))
        return _unit(
            (np.asarray(inner, np.float32)[1:-1, 1:-1] - 224) / np.float32(26)
        )  # full well inside, none at the rim
    period = max(7.0, thing.size_px / 4.5)
    a = _wave(along, period)
    if thing.texture == "stripes":
        return _unit(a * 2 - 0.8)
    b = _wave(_ramp(h, w, thing.texture_angle_deg + 90, at.top - cy, at.left - cx), period)
    if thing.texture == "dots":
        return _unit((a + b) * 2 - 1.4)
    if thing.texture == "checker":
        return _unit(a * b * 3 - 0.2)
    raise KeyError(thing.texture)


def background(ground: Background, size_hw: tuple[int, int]) -> Floats:
    """float32[H, W, 3] in 0..255."""
    h, w = size_hw
    first, second = (np.asarray(rgb, np.float32) for rgb in ground.rgbs)
    if ground.kind == "flat":
        return np.broadcast_to(first, (h, w, 3)).copy()
    painted: Floats = first + _pattern(ground, h, w)[..., None] * (second - first)
    return painted


def _pattern(ground: Background, h: int, w: int) -> Floats:
    """Share of the second colour, float32[h, w] in 0..1."""
    if ground.kind == "gradient":
        ramp = _ramp(h, w, ground.angle_deg, -h / 2, -w / 2)
        low, high = float(ramp.min()), float(ramp.max())
        return _unit((ramp - low) / (high - low))
    if ground.kind == "stripes":
        return _unit(_wave(_ramp(h, w, ground.angle_deg, 0, 0), ground.period_px) * 3 + 0.5)
    if ground.kind == "waves":
        bent = 1.5 * ground.period_px * _wave(_ramp(h, w, ground.angle_deg + 90, 0, 0), 4 * ground.period_px)
        return _unit(_wave(_ramp(h, w, ground.angle_deg, 0, 0) + bent, ground.period_px) * 3 + 0.5)
    rng = np.random.default_rng(ground.seed)
    if ground.kind == "rings":
        y, x = rng.random() * h, rng.random() * w
        away = np.hypot(np.arange(h, dtype=np.float32)[:, None] - y, np.arange(w, dtype=np.float32) - x)
        return _unit(_wave(away.astype(np.float32), ground.period_px) * 3 + 0.5)
    if ground.kind == "bricks":
        return _bricks(ground, h, w)
    if ground.kind == "noise":
        grain = max(1, round(ground.period_px / 8))
        small = rng.integers(0, 256, size=(-(-h // grain), -(-w // grain)), dtype=np.uint8)
        canvas = Image.fromarray(small).resize((w, h), Image.Resampling.BILINEAR)
    elif ground.kind == "blobs":
        canvas = _blobs(ground, h, w, rng)
    else:
        raise KeyError(ground.kind)
    return _unit(np.asarray(canvas, np.float32) / np.float32(255))


def _bricks(ground: Background, h: int, w: int) -> Floats:
    """Courses of bricks, each half a brick off the last, with joints between them."""
    tall = max(6.0, ground.period_px * 0.7)
    joint = max(1.0, tall / 7)
    rows, in_row = np.divmod(np.arange(h, dtype=np.float32), np.float32(tall))
    along = np.arange(w, dtype=np.float32)[None] + np.float32(tall) * (rows[:, None] % 2)
    is_joint = (in_row[:, None] < joint) | (along % (2 * tall) < joint)
    bricks: Floats = np.where(is_joint, np.float32(1), np.float32(0))
    return bricks


def _blobs(ground: Background, h: int, w: int, rng: np.random.Generator) -> Image.Image:
    canvas = Image.new("L", (w, h), 0)
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(6, 20))):
        x, y, r = rng.random() * w, rng.random() * h, (0.5 + rng.random()) * ground.period_px
        box = (x - r, y - r * (0.5 + rng.random()), x + r, y + r * (0.5 + rng.random()))
        paint = draw.ellipse if rng.random() < 0.6 else draw.rectangle
        paint(box, fill=int(rng.integers(60, 256)))
    return canvas.filter(ImageFilter.BoxBlur(1))


def colours(thing: Thing, at: Patch) -> Floats:
    """Paint of a thing, float32[h, w, 3] or [3] where one shade fills it, in 0..255."""
    first = np.asarray(thing.rgb, np.float32)
    if thing.texture == "solid":
        return first
    painted: Floats = first + texture(thing, at)[..., None] * (np.asarray(thing.second_rgb, np.float32) - first)
    return painted
