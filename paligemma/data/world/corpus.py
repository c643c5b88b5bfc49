"""Text of the world without pictures: lines to train a tokenizer on, and stories that a decoder learns to read."""

import string
from collections.abc import Iterator

import numpy as np

from paligemma.data.world.caption import NUMBERS
from paligemma.data.world.palette import COLOURS
from paligemma.data.world.questions import Question, ask
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
        yield _told(question)
        yield any_text(rng)


# Kinds of questions whose answers stand in a list of what there is.
_READ = {"detect": 0.25, "count": 0.2, "colour": 0.2, "there": 0.1, "present": 0.1, "left": 0.15}


def stories(n: int, seed: int = 0, n_questions: int = 4) -> Iterator[str]:
    """Yield n lists of what is in a drawn training scene, from left to right, each with questions and answers.

        red cross ; text ; blue star \n answer en what colour is the star? \n blue \n …

    What a decoder learns of them is to look things up in what it was shown, before there are pictures to look at.
    """
    rng = np.random.default_rng((seed, 0x57))
    for number in range(n):
        world: World = "plain" if number % 2 else "full"
        scene = sample_scene(int(rng.integers(2**31)), world)
        drawn = render(scene)
        middles = [left + right for left, _, right, _ in drawn.boxes_xyxy_px]
        listed = " ; ".join(scene.things[i].name for i in np.argsort(middles, kind="stable"))
        yield "\n".join([listed, *map(_told, ask(scene, drawn, rng, n_questions, _READ))])


def _told(question: Question) -> str:
    """Prefix and answer; objects by their labels, as in the suffix without its location and segmentation tokens."""
    answer = question.answer
    return f"{question.prefix}\n{answer if isinstance(answer, str) else ' ; '.join(label for label, _ in answer)}"
