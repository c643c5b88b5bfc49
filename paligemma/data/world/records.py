"""The picture world as records: drawn scenes with their boxes, masks, captions, words, questions, for any format."""

import numpy as np

from paligemma.data.record import Asked, Instance, Mask, Record, Text, Word
from paligemma.data.world.caption import caption
from paligemma.data.world.palette import COLOURS
from paligemma.data.world.questions import ANSWER_KINDS, ask_one
from paligemma.data.world.render import render
from paligemma.data.world.sample import sample_scene
from paligemma.data.world.scene import Split, World
from paligemma.data.world.shapes import SHAPES


class WorldRecords:
    """n drawn scenes as a source of records.

    Args:
        world: "plain", "many" or "full".
        split: "train" or "held_out"; no scene of one can turn up in the other.
        seed: scenes are those of the seeds seed · 1,000,000 onwards.
        colours: labels "red circle"; False: "circle".
    """

    def __init__(
        self,
        n: int,
        *,
        world: World = "plain",
        split: Split = "train",
        seed: int = 0,
        colours: bool = True,
    ) -> None:
        self.n, self.world, self.split, self.first = n, world, split, seed * 1_000_000
        self.colours = colours
        self.labels: tuple[str, ...] = tuple(f"{c} {s}" for c in COLOURS for s in SHAPES) if colours else tuple(SHAPES)

    def __len__(self) -> int:
        return self.n

    def where(self, index: int) -> str:
        """How messages call a record."""
        return f"drawn picture {index}"

    def __getitem__(self, index: int) -> Record:
        scene = sample_scene(self.first + index, self.world, self.split)
        drawn = render(scene)
        instances = tuple(
            Instance(
                scene.things[i].name if self.colours else scene.things[i].shape,
                drawn.boxes_xyxy_px[i],
                Mask.of(drawn.masks[i]),
            )
            for i in scene.shapes
        )
        rng = np.random.default_rng([self.first, index, 0xDA7A])
        asked = [ask_one(kind, scene, drawn, rng, variants=False) for kind in ANSWER_KINDS]
        questions = tuple(
            Asked(question.prefix.removeprefix("answer en "), (str(question.answer),)) for question in asked if question
        )
        return Record(
            (drawn.image,),
            scene.size_hw,
            instances,
            (Text(caption(scene, drawn)),),
            tuple(Word(scene.things[i].text, drawn.boxes_xyxy_px[i]) for i in scene.texts),
            questions,
            id=f"{self.world}-{self.first + index}",
            where=self.where(index),
        )
