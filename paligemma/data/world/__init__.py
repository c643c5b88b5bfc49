"""A procedural world of pictures: coloured shapes and short texts, drawn from a seed, with their true answers.

scene = sample_scene(seed, "full")
drawn = render(scene)                      # picture, visible masks, boxes
for question in ask(scene, drawn, rng, 4): # prefix and answer
    …
"""

from paligemma.data.world.caption import caption, caption_facts, scene_facts
from paligemma.data.world.corpus import corpus, stories
from paligemma.data.world.exam import HELD_OUT, Exam, exam
from paligemma.data.world.fonts import FONTS
from paligemma.data.world.palette import COLOURS
from paligemma.data.world.questions import ANSWER_KINDS, KINDS, Question, ask, ask_everything, ask_one
from paligemma.data.world.render import Rendering, render
from paligemma.data.world.sample import sample_scene
from paligemma.data.world.scene import BACKGROUNDS, TEXTURES, Background, Scene, Split, Thing, World
from paligemma.data.world.shapes import SHAPES
from paligemma.data.world.unseen import UNSEEN, Unseen, restyled
from paligemma.data.world.words import WORDS

__all__ = [
    "ANSWER_KINDS",
    "BACKGROUNDS",
    "COLOURS",
    "FONTS",
    "HELD_OUT",
    "KINDS",
    "SHAPES",
    "TEXTURES",
    "UNSEEN",
    "WORDS",
    "Background",
    "Exam",
    "Question",
    "Rendering",
    "Scene",
    "Split",
    "Thing",
    "Unseen",
    "World",
    "ask",
    "ask_everything",
    "ask_one",
    "caption",
    "caption_facts",
    "corpus",
    "exam",
    "render",
    "restyled",
    "sample_scene",
    "scene_facts",
    "stories",
]
