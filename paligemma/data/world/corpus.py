"""Lines of text to train a tokenizer on: every prefix and answer of the world, every word, letter and digit."""

import string
from collections.abc import Iterator

import numpy as np

from paligemma.data.world.caption import NUMBERS
from paligemma.data.world.palette import COLOURS
from paligemma.data.world.questions import ask
from paligemma.data.world.render import render
from paligemma.data.world.sample import sample_scene
from paligemma.data.world.scene import World
from paligemma.data.world.shapes import SHAPES, plural
from paligemma.data.world.words import WORDS, any_text


def corpus(n: int, seed: int = 0) -> Iterator[str]:
    """Yield the whole vocabulary once, then n lines of questions and answers about drawn training scenes.

    Objects appear by their label, as in the suffix without its location and segmentation tokens.
    """
    yield from string.ascii_letters
    yield from string.digits
    yield from COLOURS
    for shape in SHAPES:
        yield from (shape, plural(shape))
    yield from NUMBERS
    for word in WORDS:
        yield from (word, word.upper())
    rng = np.random.default_rng(seed)
    for line in range(n):
        world: World = "plain" if line % 2 else "full"
        scene = sample_scene(int(rng.integers(2**31)), world)
        (question,) = ask(scene, render(scene), rng, 1)
        answer = question.answer
        yield f"{question.prefix}\n{answer if isinstance(answer, str) else ' ; '.join(label for label, _ in answer)}"
        yield any_text(rng)
