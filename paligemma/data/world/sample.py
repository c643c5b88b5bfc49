"""Seed -> Scene: what may appear in the worlds and where.

`plain` is 1-3 separate solid shapes on a flat background, `many` up to 6 of them. `full` is 1-6 shapes and texts of
many kinds and sizes, textured, overlapping, on patterned backgrounds.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from paligemma.data.world import raster
from paligemma.data.world.fonts import FONTS, cap_height
from paligemma.data.world.palette import (
    COLOURS,
    MIN_CONTRAST,
    MIN_TEXT_CONTRAST,
    Rgb,
    blend,
    distance,
    luma,
    second_shade,
    shade,
)
from paligemma.data.world.scene import BACKGROUNDS, TEXTURES, Background, Scene, Split, Thing, World
from paligemma.data.world.shapes import ELONGATED, ELONGATION, MAX_TURN_DEG, SHAPES
from paligemma.data.world.words import any_text
from paligemma.errors import OptionError, nearest

LONG_SIDE_PX = (112, 320)
MAX_ASPECT = 1.5
MIN_VISIBLE = 0.4  # of a thing, behind those on top of it
MAX_TEXTS = 3
REPEAT_SHARE = (
    0.35  # of the shapes take the shape, the colour or both of an earlier one: or there would be little to count
)
CAP_HEIGHT_AT_112 = (10.5, 22.0)  # pixels after the stretch to 112 x 112; smaller letters cannot be read there

_WORLD_KEYS = {"plain": 1, "full": 2, "many": 3}
_SPLIT_KEYS = {"train": 1, "held_out": 2}
_TRIES = 12


@dataclass(frozen=True)
class _Rules:
    n_things: tuple[int, int]  # fewest and most that are tried
    sizes: tuple[float, float]  # of the short side
    text_share: float  # of the things
    text_only_share: float  # of the pictures
    textured_share: float
    patterned_share: float
    overlap: bool


_RULES: dict[str, _Rules] = {
    "plain": _Rules((1, 3), (0.20, 0.55), 0.0, 0.0, 0.0, 0.0, overlap=False),
    "many": _Rules((4, 6), (0.20, 0.45), 0.0, 0.0, 0.0, 0.0, overlap=False),
    "full": _Rules((1, 6), (0.14, 0.60), 0.2, 0.08, 0.6, 0.7, overlap=True),
}


def sample_scene(seed: int, world: World = "plain", split: Split = "train") -> Scene:
    """Draw a scene.

    The split and the world enter the seed sequence, so no training seed can ever give a held-out picture.

    Args:
        seed: any integer >= 0.
        world: "plain", "many" or "full".
        split: "train" or "held_out".

    Returns:
        A scene of at least one thing; the same arguments give the same scene.

    Raises:
        OptionError: no such world or split, or a negative seed.
    """
    for value, known, what in ((world, _WORLD_KEYS, "world"), (split, _SPLIT_KEYS, "split")):
        if value not in known:
            raise OptionError(f"{what} {value!r} does not exist: one of {', '.join(known)}.{nearest(value, known)}")
    if seed < 0:
        raise OptionError(f"seed {seed} is negative: seeds count from 0.")
    rng = np.random.default_rng(np.random.SeedSequence((_SPLIT_KEYS[split], _WORLD_KEYS[world], seed)))
    return _Painter(rng, _RULES[world]).scene()


class _Painter:
    """Places things one after the other, each where it hides no earlier one."""

    def __init__(self, rng: np.random.Generator, rules: _Rules) -> None:
        self.rng, self.rules = rng, rules
        long_side = int(rng.integers(LONG_SIDE_PX[0], LONG_SIDE_PX[1] + 1))
        aspect_power = rng.uniform(-1, 1)  # height / width = MAX_ASPECT ** this
        short_side = round(long_side / MAX_ASPECT ** abs(aspect_power))
        self.h: int = long_side if aspect_power > 0 else short_side
        self.w: int = short_side if aspect_power > 0 else long_side
        self.ground = self._background()
        self.things: list[Thing] = []
        self.boxes: list[tuple[float, float, float, float]] = []
        self.areas: list[int] = []
        self.owner: NDArray[np.int8] = np.full((self.h, self.w), -1, np.int8)

    def scene(self) -> Scene:
        wanted = int(self.rng.integers(self.rules.n_things[0], self.rules.n_things[1] + 1))
        text_only = self.rng.random() < self.rules.text_only_share
        if text_only:
            wanted = min(wanted, MAX_TEXTS)
        for _ in range(wanted):
            n_texts = sum(thing.kind == "text" for thing in self.things)
            writes = n_texts < MAX_TEXTS and (text_only or self.rng.random() < self.rules.text_share)
            for _ in range(_TRIES):
                if self._place(self._text() if writes else self._shape()):
                    break
        while not self.things:  # a text can be too long for every place: a shape always fits
            self._place(self._shape())
        return Scene(size_hw=(self.h, self.w), background=self.ground, things=tuple(self.things))

    def _choice(self, items: tuple[str, ...]) -> str:
        return items[int(self.rng.integers(len(items)))]

    def _background(self) -> Background:
        rng = self.rng
        kind = self._choice(BACKGROUNDS[1:]) if rng.random() < self.rules.patterned_share else "flat"
        colour = self._choice(("white", "black", "gray")) if rng.random() < 0.4 else self._choice(tuple(COLOURS))
        first = shade(colour, rng)
        toward: Rgb = (255, 255, 255) if sum(first) < 384 else (0, 0, 0)
        second = first if kind == "flat" else blend(first, toward, rng.uniform(0.15, 0.35))
        return Background(
            kind=kind,
            colour=colour,
            rgbs=(first, second),
            angle_deg=float(rng.uniform(0, 180)),
            period_px=float(rng.uniform(0.06, 0.2) * min(self.h, self.w)),
            seed=int(rng.integers(2**31)),
        )

    def _paint(self, *, legible: bool = False) -> tuple[str, Rgb]:
        """A colour that stands out from the background and all shades between its two ends."""
        first, second = self.ground.rgbs
        behind = [blend(first, second, share) for share in (0.0, 0.5, 1.0)]
        while True:
            colour = self._choice(tuple(COLOURS))
            rgb = shade(colour, self.rng)
            if colour == self.ground.colour or min(distance(rgb, other) for other in behind) < MIN_CONTRAST:
                continue
            if not legible or min(abs(luma(rgb) - luma(other)) for other in behind) >= MIN_TEXT_CONTRAST:
                return colour, rgb

    def _shape(self) -> Thing:
        rng = self.rng
        shape = self._choice(SHAPES)
        colour, rgb = self._paint()
        earlier = [thing for thing in self.things if thing.kind == "shape"]
        if earlier and rng.random() < REPEAT_SHARE:
            model = earlier[int(rng.integers(len(earlier)))]
            what = rng.random()
            if what < 0.75:
                shape = model.shape
            if what > 0.35:
                colour, rgb = model.colour, model.rgb
        low, high = self.rules.sizes
        long = shape in ELONGATED
        size = rng.uniform(low * (1.4 if long else 1.0), high * (1.15 if long else 1.0)) * min(self.h, self.w)
        turn = MAX_TURN_DEG[shape]
        angle = float(rng.uniform(-turn, turn)) if turn else 0.0
        if long and rng.random() < 0.5:
            angle += 90.0
        texture = self._choice(TEXTURES[1:]) if rng.random() < self.rules.textured_share else "solid"
        if size < 24:  # too few pixels for a pattern
            texture = "solid"
        return Thing(
            kind="shape",
            shape=shape,
            colour=colour,
            rgb=rgb,
            size_px=float(size),
            centre_xy_px=self._centre(0.42 * size),
            angle_deg=angle,
            elongation=float(rng.uniform(*ELONGATION)) if long else 1.0,
            texture=texture,
            second_rgb=second_shade(colour, rgb),
            texture_angle_deg=float(rng.uniform(0, 180)),
        )

    def _text(self) -> Thing:
        rng = self.rng
        text, face = any_text(rng), self._choice(tuple(FONTS))
        colour, rgb = self._paint(legible=True)
        low, high = CAP_HEIGHT_AT_112
        # A wide picture loses width in the stretch: letters keep their legible width only if they are taller.
        cap_px = low * (high / low) ** rng.random() * max(self.h, self.w) / 112
        thing = Thing(
            kind="text",
            text=text,
            font=face,
            colour=colour,
            rgb=rgb,
            size_px=float(round(cap_px / cap_height(face))),
            centre_xy_px=(self.w / 2, self.h / 2),
            angle_deg=float(rng.uniform(-6, 6)) if rng.random() < 0.4 else 0.0,
        )
        half_w, half_h = raster.text_half_extent(thing)
        sin = abs(np.sin(np.radians(thing.angle_deg)))
        reach_x, reach_y = half_w + half_h * sin + 2, half_h + half_w * sin + 2
        if 2 * reach_x > self.w or 2 * reach_y > self.h:
            return self._text()
        centre = (float(rng.uniform(reach_x, self.w - reach_x)), float(rng.uniform(reach_y, self.h - reach_y)))
        return replace(thing, centre_xy_px=centre)

    def _centre(self, reach: float) -> tuple[float, float]:
        reach = min(reach, self.w / 2 - 1, self.h / 2 - 1)
        return float(self.rng.uniform(reach, self.w - reach)), float(self.rng.uniform(reach, self.h - reach))

    def _place(self, thing: Thing) -> bool:
        """Put a thing on top, unless it would hide too much or leave the picture."""
        at = raster.patch(thing, (self.h, self.w))
        window = at.window
        top, left = at.top, at.left
        bottom, right = top + at.ink.shape[0], left + at.ink.shape[1]
        gap = 2
        if not self.rules.overlap and (top < gap or left < gap or bottom > self.h - gap or right > self.w - gap):
            return False
        area = int(at.area.sum())
        if area < 20:
            return False
        under = self.owner[window][at.area]
        hidden = np.bincount(under[under >= 0], minlength=len(self.things))
        apart = not self.rules.overlap or thing.kind == "text"
        # Two texts side by side must not read as one word.
        room = 0.3 * thing.size_px if thing.kind == "text" else gap
        if apart and any(_touch((left, top, right, bottom), box, room) for box in self.boxes):
            return False
        for index in np.flatnonzero(hidden):
            other = self.things[index]
            seen = int((self.owner == index).sum()) - int(hidden[index])
            if other.kind == "text" or other.colour == thing.colour or seen < MIN_VISIBLE * self.areas[index]:
                return False
            if distance(other.rgb, thing.rgb) < MIN_CONTRAST:
                return False
        self.owner[window][at.area] = len(self.things)
        self.things.append(thing)
        self.boxes.append((left, top, right, bottom))
        self.areas.append(area)
        return True


def _touch(a: tuple[float, float, float, float], b: tuple[float, float, float, float], gap: float) -> bool:
    return a[0] - gap < b[2] and b[0] - gap < a[2] and a[1] - gap < b[3] and b[1] - gap < a[3]
