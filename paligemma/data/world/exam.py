"""The held-out pictures and what is asked about each: the same for every model and every run."""

from dataclasses import dataclass

import numpy as np

from paligemma.data.world.questions import ANSWER_KINDS, Question, ask_everything, ask_one
from paligemma.data.world.render import Rendering, render
from paligemma.data.world.sample import sample_scene
from paligemma.data.world.scene import Scene, World
from paligemma.data.world.unseen import Unseen, restyled

HELD_OUT: dict[World, range] = {"plain": range(1000), "full": range(1000)}  # seeds of the split "held_out"

_DRAWS = 8  # of a question that may not apply to the thing first drawn


@dataclass(frozen=True, eq=False)
class Exam:
    """One held-out picture with its questions.

    `questions` are one `detect` and one `segment` of every (colour, shape) pair in the picture and one that is absent,
    one of each answer kind that applies, the caption, and `ocr` where there is text.
    """

    world: World
    seed: int
    scene: Scene
    drawn: Rendering
    questions: tuple[Question, ...]


def exam(world: World, seed: int, unseen: Unseen | None = None) -> Exam:
    """The exam of one held-out seed; `HELD_OUT[world]` lists those of the published scores.

    Args:
        unseen: draw the same scene in fonts, outlines or on backgrounds that no training picture shows.
    """
    scene = sample_scene(seed, world, "held_out")
    if unseen is not None:
        scene = restyled(scene, unseen, seed)
    drawn = render(scene)
    # The questions have a generator of their own: they stay the same when the world draws differently.
    rng = np.random.default_rng((seed, 0xE8A3))
    questions = [ask_everything(scene, drawn, rng, task) for task in ("detect", "segment")]
    kinds = (*ANSWER_KINDS, "caption", *(("ocr",) if scene.texts else ()))
    for kind in kinds:
        draws = (ask_one(kind, scene, drawn, rng, variants=False) for _ in range(_DRAWS))
        questions += [question for question in draws if question is not None][:1]
    return Exam(world, seed, scene, drawn, tuple(questions))
