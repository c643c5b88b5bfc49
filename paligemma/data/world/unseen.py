"""The same pictures in what training never showed: other fonts, other outlines, other backgrounds.

A held-out picture has new positions and new company; its letters, outlines and patterns are those of training. Here one
of the three is exchanged and everything else kept, so that the scores of both can be compared picture by picture.
"""

from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from paligemma.data.world.fonts import UNSEEN_FONTS
from paligemma.data.world.palette import MIN_CONTRAST, MIN_TEXT_CONTRAST, Rgb, blend, distance, luma
from paligemma.data.world.raster import text_half_extent
from paligemma.data.world.render import render
from paligemma.data.world.scene import UNSEEN_BACKGROUNDS, Scene, Thing

Unseen = Literal["fonts", "shapes", "backgrounds"]
UNSEEN: tuple[Unseen, ...] = get_args(Unseen)


def restyled(scene: Scene, what: Unseen, seed: int) -> Scene:
    """A scene with one thing exchanged; names, colours, places and order stay.

    Args:
        what: "fonts" writes the texts in another face, in the room that they had: a wider face is smaller; "shapes"
            takes every shape's other outline, unless it would hide something; "backgrounds" lays another pattern, as
            strong as what stands on it allows.
        seed: of the draw among the fonts and backgrounds.
    """
    rng = np.random.default_rng((seed, 0x0DD))
    if what == "shapes":
        return _in_other_outlines(scene)
    if what == "fonts":
        return replace(scene, things=tuple(_rewritten(t, rng) if t.kind == "text" else t for t in scene.things))
    kind = UNSEEN_BACKGROUNDS[int(rng.integers(len(UNSEEN_BACKGROUNDS)))]
    first = scene.background.rgbs[0]
    return replace(scene, background=replace(scene.background, kind=kind, rgbs=(first, _second(scene))))


def _in_other_outlines(scene: Scene) -> Scene:
    """One shape after the other, as long as at least half of what was to be seen of every thing still is."""
    before = [int(mask.sum()) for mask in render(scene).masks]
    for i in scene.shapes:
        things = list(scene.things)
        things[i] = replace(things[i], variant=True)
        changed = replace(scene, things=tuple(things))
        if all(2 * int(mask.sum()) >= seen for mask, seen in zip(render(changed).masks, before, strict=True)):
            scene = changed
    return scene


def _rewritten(thing: Thing, rng: np.random.Generator) -> Thing:
    """In another face, as large as fits into the room that the text had: neighbours stay apart."""
    faces = tuple(UNSEEN_FONTS)
    width, height = text_half_extent(thing)
    written = replace(thing, font=faces[int(rng.integers(len(faces)))])
    while written.size_px > 1:
        wide, tall = text_half_extent(written)
        if wide <= width and tall <= height:
            break
        written = replace(written, size_px=written.size_px - 1)
    return written


def _second(scene: Scene) -> Rgb:
    """The pattern's other colour: the farthest at which everything still stands out from all shades between."""
    first = scene.background.rgbs[0]
    toward: Rgb = (255, 255, 255) if sum(first) < 384 else (0, 0, 0)
    for share in (0.35, 0.25, 0.15):
        second = blend(first, toward, share)
        behind = [blend(first, second, part) for part in (0.5, 1.0)]
        if all(_stands_out(thing, behind) for thing in scene.things):
            return second
    return scene.background.rgbs[1] if scene.background.rgbs[1] != first else blend(first, toward, 0.08)


def _stands_out(thing: Thing, behind: list[Rgb]) -> bool:
    if min(distance(thing.rgb, other) for other in behind) < MIN_CONTRAST:
        return False
    return thing.kind == "shape" or min(abs(luma(thing.rgb) - luma(other)) for other in behind) >= MIN_TEXT_CONTRAST
