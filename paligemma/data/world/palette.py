"""Colours of the picture world: each name is a box in RGB from which a shade is drawn."""

import numpy as np

Rgb = tuple[int, int, int]

# Name -> (lowest RGB, highest RGB). The boxes are far enough apart that no shade of one name can pass for another.
COLOURS: dict[str, tuple[Rgb, Rgb]] = {
    "red": ((200, 10, 15), (240, 45, 45)),
    "green": ((20, 135, 30), (65, 180, 70)),
    "blue": ((20, 55, 195), (60, 100, 245)),
    "yellow": ((235, 215, 15), (255, 240, 65)),
    "orange": ((240, 120, 5), (255, 145, 30)),
    "purple": ((110, 20, 145), (145, 55, 190)),
    "pink": ((245, 135, 180), (255, 170, 210)),
    "brown": ((100, 55, 22), (130, 75, 42)),
    "black": ((4, 4, 4), (30, 30, 30)),
    "white": ((238, 238, 238), (255, 255, 255)),
    "gray": ((112, 112, 112), (145, 145, 145)),
    "cyan": ((20, 205, 220), (70, 235, 245)),
}
_NEUTRAL = {"black", "white", "gray"}

# Towards which end a colour may be mixed and by how much: dark orange would be brown, light red pink.
_MIX: dict[str, tuple[Rgb, float]] = {
    "red": ((0, 0, 0), 0.4),
    "green": ((255, 255, 255), 0.5),
    "blue": ((255, 255, 255), 0.45),
    "yellow": ((0, 0, 0), 0.35),
    "orange": ((255, 255, 255), 0.5),
    "purple": ((255, 255, 255), 0.45),
    "pink": ((255, 255, 255), 0.6),
    "brown": ((255, 255, 255), 0.35),
    "black": ((255, 255, 255), 0.25),
    "white": ((0, 0, 0), 0.2),
    "gray": ((0, 0, 0), 0.3),
    "cyan": ((0, 0, 0), 0.4),
}

MIN_CONTRAST = 105.0  # Euclidean RGB distance between a thing and everything that may lie behind it
MIN_TEXT_CONTRAST = 60.0  # luma distance as well: letters of equal brightness cannot be read


def shade(name: str, rng: np.random.Generator) -> Rgb:
    """One RGB value that goes by this name."""
    low, high = COLOURS[name]
    if name in _NEUTRAL:  # one brightness for the three channels: a gray with a tint would be another colour
        value = int(rng.integers(low[0], high[0] + 1))
        return value, value, value
    r, g, b = (int(rng.integers(lo, hi + 1)) for lo, hi in zip(low, high, strict=True))
    return r, g, b


def distance(a: Rgb, b: Rgb) -> float:
    """Euclidean distance in RGB, 0..441."""
    return float(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5)


def blend(a: Rgb, b: Rgb, share_b: float) -> Rgb:
    """The colour `share_b` of the way from a to b."""
    r, g, bl = (round(x + (y - x) * share_b) for x, y in zip(a, b, strict=True))
    return r, g, bl


def second_shade(name: str, rgb: Rgb) -> Rgb:
    """A lighter or darker shade for a pattern, which leaves the colour its name."""
    toward, share = _MIX[name]
    return blend(rgb, toward, share)


def luma(rgb: Rgb) -> float:
    """Brightness as seen, 0..255 (ITU-R BT.601)."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
