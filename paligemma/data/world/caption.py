"""Captions of scenes, and the facts read back from a caption.

    a red circle, two blue stars and the word "cat" on a white background

Things stand from left to right by their middle; equal shapes of one colour are told once, with their number, where
the first of them stands.
"""

import re
from collections import Counter

from paligemma.data.world.palette import COLOURS
from paligemma.data.world.render import Rendering
from paligemma.data.world.scene import Scene
from paligemma.data.world.shapes import SHAPES, plural

NUMBERS: tuple[str, ...] = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_GROUNDS = {"gradient": "shaded", "noise": "noisy", "stripes": "striped", "blobs": "spotted"}

Fact = tuple[str, str]  # colour, shape


def article(noun: str) -> str:
    """`a red circle`, `an orange star`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def ground_name(scene: Scene) -> str:
    """`white`, `striped white`."""
    kind = _GROUNDS.get(scene.background.kind)
    return f"{kind} {scene.background.colour}" if kind else scene.background.colour


def caption(scene: Scene, rendering: Rendering) -> str:
    """The caption of a scene."""
    boxes = rendering.boxes_xyxy_px
    order = sorted(range(len(scene.things)), key=lambda i: (boxes[i][0] + boxes[i][2], boxes[i][1]))
    counts = Counter(scene.things[i].name for i in scene.shapes)
    phrases: list[str] = []
    told: set[str] = set()
    for i in order:
        thing = scene.things[i]
        if thing.kind == "text":
            phrases.append(f'the {"number" if thing.text.isdigit() else "word"} "{thing.text}"')
        elif thing.name not in told:
            told.add(thing.name)
            n = counts[thing.name]
            phrases.append(article(thing.name) if n == 1 else f"{NUMBERS[n]} {thing.colour} {plural(thing.shape)}")
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return f"{listed} on {article(ground_name(scene))} background"


_FACT = re.compile(
    rf"\b(?:(a|an|{'|'.join(NUMBERS)}) )?({'|'.join(COLOURS)}) ({'|'.join(plural(s) + '|' + s for s in SHAPES)})\b"
)
_SINGULAR = {plural(shape): shape for shape in SHAPES}


def caption_facts(text: str) -> Counter[Fact]:
    """Colour-shape pairs that a caption states, each with how many of them; quoted words state nothing.

    >>> caption_facts('two blue stars and a red circle on a white background')
    Counter({('blue', 'star'): 2, ('red', 'circle'): 1})
    """
    facts: Counter[Fact] = Counter()
    for number, colour, shape in _FACT.findall(re.sub(r'"[^"]*"', '""', text)):
        facts[colour, _SINGULAR.get(shape, shape)] += NUMBERS.index(number) if number in NUMBERS else 1
    return facts


def scene_facts(scene: Scene) -> Counter[Fact]:
    """Colour-shape pairs that are in a scene."""
    return Counter((scene.things[i].colour, scene.things[i].shape) for i in scene.shapes)
