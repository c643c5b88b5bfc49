"""Questions about a scene and their true answers.

Prefixes (`{thing}` is a shape, `circle`, or a colour and a shape, `red circle`):

    detect {thing} ; {thing}          segment {thing} ; {thing}          detect text
    caption en                        ocr
    answer en how many {things}?      answer en how many shapes?         -> 0, 1, 2, …
    answer en what colour is the {shape}?                                -> red        (one such shape only)
    answer en is there a {thing}?     answer en Is {thing} in the image? -> yes | no
    answer en what is left of the {thing}?                               -> red circle | text | nothing

What is left of a thing: of everything whose middle is further left, the nearest by middle, in the picture stretched to
a square; asked only where both the side and the nearest are clear. `ocr` gives the texts in raster order (lines from
the top, in a line from the left) joined by single spaces.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from paligemma.data.builders.base import raster_order as by_lines
from paligemma.data.world.caption import article, caption
from paligemma.data.world.palette import COLOURS
from paligemma.data.world.render import Rendering
from paligemma.data.world.scene import Scene
from paligemma.data.world.shapes import SHAPES, plural

Objects = tuple[tuple[str, int], ...]  # label, index of the thing; in the order of the answer


@dataclass(frozen=True)
class Question:
    """A prefix and its true answer.

    `kind` is one of KINDS; `answer` is the suffix for task "text", and for "detect" and "segment" the things to list:
    asked labels in asked order, each label's things by top edge, then left edge; an absent label has no entry.
    """

    kind: str
    task: Literal["detect", "segment", "text"]
    prefix: str
    answer: str | Objects

    @property
    def labels(self) -> list[str]:
        """The things that a `detect` or `segment` asks for, in asked order."""
        return self.prefix.removeprefix(f"{self.task} ").split(" ; ")


KINDS: dict[str, float] = {  # kind -> how often it is drawn
    "detect": 0.27,
    "segment": 0.25,
    "caption": 0.12,
    "ocr": 0.08,
    "detect_text": 0.03,
    "count": 0.08,
    "colour": 0.06,
    "there": 0.03,
    "present": 0.03,
    "left": 0.05,
}

ANSWER_KINDS: tuple[str, ...] = ("count", "colour", "there", "present", "left")


def ask(
    scene: Scene,
    rendering: Rendering,
    rng: np.random.Generator,
    n: int,
    kinds: Mapping[str, float] = KINDS,
    *,
    variants: bool = True,
) -> list[Question]:
    """Draw n questions about a scene.

    Args:
        scene, rendering: a scene and what `render` made of it.
        rng: the generator of the draw.
        n: how many questions.
        kinds: kind -> weight; a kind that does not apply to the scene (the colour of the star where there are two) is
            drawn again, and so are most questions for the text of a picture without one.
        variants: also other wordings (`what color is the …`, `How many …`); without, only the documented ones.
    """
    asker = _Asker(scene, rendering, rng, variants)
    names = list(kinds)
    weights = np.asarray([kinds[name] for name in names], float)
    weights /= weights.sum()
    questions: list[Question] = []
    for _ in range(50 * n):
        if len(questions) == n:
            break
        question = asker.ask(names[int(rng.choice(len(names), p=weights))])
        if question is not None:
            questions.append(question)
    return questions


def ask_one(
    kind: str, scene: Scene, rendering: Rendering, rng: np.random.Generator, *, variants: bool = True
) -> Question | None:
    """Draw one question of a kind, or None where the kind does not apply to the scene."""
    return _Asker(scene, rendering, rng, variants).ask(kind)


def ask_everything(
    scene: Scene,
    rendering: Rendering,
    rng: np.random.Generator,
    task: Literal["detect", "segment"] | None = None,
    *,
    by_shape: bool = False,
    n_absent: int = 1,
    share: float = 1.0,
) -> Question:
    """`detect` or `segment` of every colour and shape in the scene and of others that are absent, in random order.

    Args:
        by_shape: name shapes alone (`circle`), as somebody does who lists what there may be.
        n_absent: at most so many names of what is not there.
        share: of the names that are asked for, at least one; the rest of the scene is to be passed over.
    """
    task = task or ("detect" if rng.random() < 0.5 else "segment")
    names = sorted({scene.things[i].shape if by_shape else scene.things[i].name for i in scene.shapes})
    if share < 1 and len(names) > 1:
        names = [names[i] for i in rng.permutation(len(names))[: max(1, round(share * len(names)))]]
    known = {scene.things[i].shape for i in scene.shapes}
    asker = _Asker(scene, rendering, rng, False)
    if by_shape:
        names += [name for name in rng.permutation(list(SHAPES)).tolist() if name not in known][:n_absent]
    else:
        for _ in range(n_absent):
            name = asker.absent_name()
            names += [] if name in names else [name]
    names = [names[i] for i in rng.permutation(len(names))]
    return Question(task, task, f"{task} {' ; '.join(names)}", listed(scene, rendering, names))


def matches(scene: Scene, name: str) -> list[int]:
    """Indices of the things that go by a name: `circle`, `red circle`, `text`."""
    return [
        i
        for i, thing in enumerate(scene.things)
        if name in (thing.name, thing.shape) or (thing.kind == "text" and name == "text")
    ]


def listed(scene: Scene, rendering: Rendering, names: list[str]) -> Objects:
    """The answer to `detect` or `segment` of these names."""
    boxes = rendering.boxes_xyxy_px
    return tuple(
        (name, i) for name in names for i in sorted(matches(scene, name), key=lambda i: (boxes[i][1], boxes[i][0]))
    )


def raster_order(scene: Scene, rendering: Rendering) -> list[int]:
    """Indices of the texts, line by line from the top, in a line from the left, as the `ocr` builder reads them."""
    texts = scene.texts
    return [texts[i] for i in by_lines([rendering.boxes_xyxy_px[i] for i in texts])]


class _Asker:
    def __init__(self, scene: Scene, rendering: Rendering, rng: np.random.Generator, variants: bool) -> None:
        self.scene, self.rendering, self.rng, self.variants = scene, rendering, rng, variants
        self.ways: dict[str, Callable[[], Question | None]] = {
            "detect": lambda: self._locate("detect"),
            "segment": lambda: self._locate("segment"),
            "detect_text": lambda: Question("detect_text", "detect", "detect text", listed(scene, rendering, ["text"])),
            "caption": lambda: Question("caption", "text", "caption en", caption(scene, rendering)),
            "ocr": self._ocr,
            "count": self._count,
            "colour": self._colour,
            "there": lambda: self._presence("there"),
            "present": lambda: self._presence("present"),
            "left": self._left,
        }

    def ask(self, kind: str) -> Question | None:
        return self.ways[kind]()

    def _pick(self, items: list[str]) -> str:
        return items[int(self.rng.integers(len(items)))]

    def _vary(self, documented: str, *others: str) -> str:
        return self._pick(list(others)) if self.variants and others and self.rng.random() < 0.2 else documented

    def present_name(self) -> str | None:
        """`circle` or `red circle` of something in the scene."""
        if not self.scene.shapes:
            return None
        thing = self.scene.things[int(self.rng.choice(self.scene.shapes))]
        return thing.shape if self.rng.random() < 0.4 else thing.name

    def absent_name(self) -> str:
        """A name that nothing in the scene goes by; half the time half right."""
        shapes = [self.scene.things[i] for i in self.scene.shapes]
        while True:
            colour, shape = self._pick(list(COLOURS)), self._pick(list(SHAPES))
            if shapes and self.rng.random() < 0.5:
                near = shapes[int(self.rng.integers(len(shapes)))]
                colour, shape = (near.colour, shape) if self.rng.random() < 0.5 else (colour, near.shape)
            name = shape if self.rng.random() < 0.3 else f"{colour} {shape}"
            if not matches(self.scene, name):
                return name

    def _locate(self, task: Literal["detect", "segment"]) -> Question:
        n = int(self.rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
        nothing = self.rng.random() < 0.12
        names: list[str] = []
        taken: set[int] = set()
        for k in range(n):
            absent = nothing or (k > 0 and self.rng.random() < 0.25)
            name = self.absent_name() if absent else self.present_name() or self.absent_name()
            found = set(matches(self.scene, name))
            if name in names or found & taken:  # one thing under two labels would have two answers
                continue
            names.append(name)
            taken |= found
        order = self.rng.permutation(len(names))
        names = [names[i] for i in order]
        return Question(task, task, f"{task} {' ; '.join(names)}", listed(self.scene, self.rendering, names))

    def _skip_textless(self) -> bool:
        return not self.scene.texts and self.rng.random() < 0.7

    def _detect_text(self) -> Question | None:
        if self._skip_textless():
            return None
        return Question("detect_text", "detect", "detect text", listed(self.scene, self.rendering, ["text"]))

    def _ocr(self) -> Question | None:
        if self._skip_textless():
            return None
        texts = [self.scene.things[i].text for i in raster_order(self.scene, self.rendering)]
        return Question("ocr", "text", "ocr", " ".join(texts))

    def _count(self) -> Question:
        draw = self.rng.random()
        if draw < 0.2:
            name, n = "shape", len(self.scene.shapes)
        else:
            wanted = self.absent_name() if draw < 0.35 else self.present_name()
            name = wanted or self.absent_name()
            n = len(matches(self.scene, name))
        asked = self._vary(f"how many {_plural(name)}?", f"how many {name}?", f"How many {_plural(name)}?")
        return Question("count", "text", f"answer en {asked}", str(n))

    def _single(self, names: list[str]) -> str | None:
        single = [name for name in names if len(matches(self.scene, name)) == 1]
        return self._pick(single) if single else None

    def _colour(self) -> Question | None:
        shape = self._single(sorted({self.scene.things[i].shape for i in self.scene.shapes}))
        if shape is None:
            return None
        asked = self._vary(
            f"what colour is the {shape}?", f"what color is the {shape}?", f"What colour is the {shape}?"
        )
        return Question("colour", "text", f"answer en {asked}", self.scene.things[matches(self.scene, shape)[0]].colour)

    def _presence(self, kind: Literal["there", "present"]) -> Question | None:
        if not self.scene.shapes and self.rng.random() < 0.8:  # nearly all would be answered no
            return None
        present = self.present_name() if self.rng.random() < 0.5 else None
        name = present or self.absent_name()
        if kind == "there":
            asked = self._vary(f"is there {article(name)}?", f"Is there {article(name)}?", f"is there a {name}?")
        else:
            asked = self._vary(f"Is {name} in the image?", f"Is {article(name)} in the image?")
        return Question(kind, "text", f"answer en {asked}", "yes" if present else "no")

    def _left(self) -> Question | None:
        shapes = [self.scene.things[i] for i in self.scene.shapes]
        name = self._single(sorted({t.name for t in shapes} | {t.shape for t in shapes}))
        if name is None:
            return None
        found = left_of(self.scene, self.rendering, matches(self.scene, name)[0])
        if found is None:
            return None
        asked = self._vary(
            f"what is left of the {name}?", f"What is left of the {name}?", f"what is to the left of the {name}?"
        )
        answer = "nothing" if found < 0 else self.scene.things[found].name
        return Question("left", "text", f"answer en {asked}", answer)


def left_of(scene: Scene, rendering: Rendering, index: int) -> int | None:
    """Index of the nearest thing to the left, -1 where there is none, None where it is a matter of opinion."""
    h, w = scene.size_hw
    middles = [((b[0] + b[2]) / (2 * w), (b[1] + b[3]) / (2 * h)) for b in rendering.boxes_xyxy_px]
    x, y = middles[index]
    if any(abs(mx - x) < 0.06 for i, (mx, _) in enumerate(middles) if i != index):
        return None
    by_distance = sorted((float(np.hypot(mx - x, my - y)), i) for i, (mx, my) in enumerate(middles) if mx < x)
    if not by_distance:
        return -1
    if len(by_distance) > 1 and by_distance[1][0] < 1.25 * by_distance[0][0]:
        return None
    return by_distance[0][1]


def _plural(name: str) -> str:
    colour, _, shape = name.rpartition(" ")
    return f"{colour} {plural(shape)}" if colour else plural(shape)
