"""Pictures of the studies on the `study` preset with what is asked of them, drawn once and kept in the work folder.

Pictures are kept at the resolution of the model: drawing takes longer than learning from them.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma.data.example import Example
from paligemma.data.world import COLOURS, Rendering, Scene, Split, ask, ask_one, render, sample_scene
from paligemma.presets import STUDY
from paligemma.recipes.tiny.suffix import written

LOC_STEP = 8  # places are said in every eighth bin, as to `tiny`
N_QUESTIONS = 5  # of a picture of stage 1
MIXTURE = {"detect": 0.25, "caption": 0.15, "count": 0.2, "colour": 0.15, "there": 0.1, "left": 0.15}
ANSWERED = ("colour", "there", "count", "left", "caption")  # kinds whose exact answers are counted
Asked = tuple[str, str, str]  # kind, prefix, suffix


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything; `quick` is for tests, which look at no score."""

    vision_steps: int = 400
    vision_images: int = 48
    word_steps: int = 300
    word_lines: int = 6000
    steps: int = 500
    n_images: int = 24
    held_out: int = 3000
    transfer_held_out: int = 400
    workers: int = 1

    @property
    def is_whole_stage0(self) -> bool:
        """Whether stage 0 is that of the pages."""
        names = ("vision_steps", "vision_images", "word_steps", "word_lines")
        return all(getattr(self, name) == getattr(Sizes, name) for name in names)


QUICK = Sizes(
    vision_steps=1, vision_images=3, word_steps=1, word_lines=30, steps=2, n_images=2, held_out=12,
    transfer_held_out=4, workers=0,
)  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """Drawn pictures with what is asked of each.

    Attributes:
        pixels: uint8[n, R, R, 3].
        rows: for each picture (kind, prefix, suffix).
    """

    pixels: np.ndarray
    rows: list[list[Asked]]


@dataclass(frozen=True)
class Rows:
    """Some pictures of a pool in some order, all their questions, as a source of examples."""

    pool: Pool
    order: np.ndarray
    n_questions: int
    views: dict[int, np.ndarray] = field(default_factory=dict)  # one array a picture: the loader knows it by identity

    def __len__(self) -> int:
        return len(self.order) * self.n_questions

    def __getitem__(self, index: int) -> Example:
        place, question = divmod(index, self.n_questions)
        picture = int(self.order[place])
        _, prefix, suffix = self.pool.rows[picture][question]
        image = self.views.setdefault(picture, self.pool.pixels[picture])
        # As for `tiny`: an answer weighs as the root of its length.
        weight = float(len(suffix.split()) + suffix.count("<") + 1) ** 0.5
        return Example((image,), prefix, suffix, weight, self.where(index))

    def where(self, index: int) -> str:
        return f"question {index % self.n_questions} of picture {index // self.n_questions}"


def draw_pool(
    path: Path, n: int, ask_of: Callable[[Scene, Rendering, np.random.Generator, int], list[Asked]], *,
    side: int = STUDY.vision.resolution, split: Split = "train", seed: int = 0,
) -> Pool:  # fmt: skip
    """n plain pictures with their questions, read from `path` where they were drawn before.

    Args:
        ask_of: scene, drawing, random numbers and place in the pool -> what is asked; [] takes another picture.
    """
    path = path.with_name(f"{path.stem}-{n}-{side}-{seed}.npz")
    if path.exists():
        with np.load(path) as found:
            return Pool(found["pixels"], [[tuple(row) for row in rows] for rows in json.loads(str(found["rows"]))])  # type: ignore[misc]
    pixels, rows = np.zeros((n, side, side, 3), np.uint8), []
    scene_seed = seed << 32
    while len(rows) < n:
        scene = sample_scene(scene_seed, "plain", split)
        drawn = render(scene)
        asked = ask_of(scene, drawn, np.random.default_rng([scene_seed, 91]), len(rows))
        scene_seed += 1
        if asked:
            image = Image.fromarray(drawn.image).resize((side, side), Image.Resampling.BILINEAR)
            pixels[len(rows)] = np.asarray(image)
            rows.append(asked)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, pixels=pixels, rows=np.array(json.dumps(rows)))
    os.replace(part, path)
    return Pool(pixels, rows)


def stage1_pool(work: Path, sizes: Sizes, side: int = STUDY.vision.resolution) -> Pool:
    """The pictures of stage 1, each seen once; an arm's seed gives their order."""

    def ask_of(scene: Scene, drawn: Rendering, rng: np.random.Generator, _place: int) -> list[Asked]:
        asked = ask(scene, drawn, rng, N_QUESTIONS, MIXTURE, variants=False)
        rows = [(q.kind, q.prefix, written(q, scene, drawn, np.zeros((0, 16), np.int64), LOC_STEP)) for q in asked]
        return rows if len(rows) == N_QUESTIONS else []

    return draw_pool(work / "stage1.npz", sizes.steps * sizes.n_images, ask_of, side=side)


def exam_pool(work: Path, sizes: Sizes, side: int = STUDY.vision.resolution) -> Pool:
    """The held-out questions of stage 1, one a picture, every kind as often."""
    kinds = (*ANSWERED, "detect")

    def ask_of(scene: Scene, drawn: Rendering, rng: np.random.Generator, place: int) -> list[Asked]:
        q = ask_one(kinds[place % len(kinds)], scene, drawn, rng, variants=False)
        return (
            [] if q is None else [(q.kind, q.prefix, written(q, scene, drawn, np.zeros((0, 16), np.int64), LOC_STEP))]
        )

    return draw_pool(work / "exam.npz", sizes.held_out, ask_of, side=side, split="held_out")


def commonest(train: Pool, held_out: Pool) -> dict[str, float]:
    """Kind -> share of held-out answers equal to the commonest one of training: what no picture is needed for."""
    shares = {}
    for kind in sorted({kind for asked in held_out.rows for kind, *_ in asked}):
        seen = [suffix for asked in train.rows for k, _, suffix in asked if k == kind]
        best = Counter(seen).most_common(1)[0][0] if seen else ""
        true = [suffix for asked in held_out.rows for k, _, suffix in asked if k == kind]
        shares[kind] = float(np.mean([suffix == best for suffix in true]))
    return shares


# Tasks that stage 1 does not ask: for transfers.

PROMPTS = {"largest": "answer en what colour is the largest shape?", "colours": "answer en how many {colour} things?"}


def _largest(scene: Scene, drawn: Rendering, rng: np.random.Generator, _place: int) -> list[Asked]:
    """The colour of the largest of several shapes, where one is a good third larger than the next.

    Its kind is no task for the `study` preset: at this size stage 1 leaves nothing that tells a star from a heart, and
    256 examples bring nothing over the commonest answer (Adam at 3e-4, 1e-3 or 3e-3).
    """
    areas = sorted(((float(drawn.masks[i].mean()), i) for i in scene.shapes), reverse=True)
    if len(areas) < 2 or areas[0][0] < 1.3 * areas[1][0]:
        return []
    return [("largest", PROMPTS["largest"], scene.things[areas[0][1]].colour)]


def _colours(scene: Scene, drawn: Rendering, rng: np.random.Generator, _place: int) -> list[Asked]:
    """How many things have a colour; three times in four one that is there."""
    present = [scene.things[i].colour for i in scene.shapes]
    known: Sequence[str] = present if rng.random() < 0.75 else [c for c in COLOURS if c not in present]
    colour = known[int(rng.integers(len(known)))]
    return [("colours", PROMPTS["colours"].format(colour=colour), str(present.count(colour)))]


TRANSFERS = {"largest": _largest, "colours": _colours}


def transfer_pools(work: Path, task: str, n: int, sizes: Sizes) -> tuple[Pool, Pool]:
    """What a transfer may learn from, n pictures, and what it is judged by."""
    ask_of, mark = TRANSFERS[task], zlib.crc32(PROMPTS[task].encode())  # pools of another question are others
    # Other seeds than stage 1's: no picture is met twice.
    train = draw_pool(work / f"{task}-{mark:08x}.npz", n, ask_of, seed=1)
    held_out = draw_pool(
        work / f"{task}-{mark:08x}-exam.npz", sizes.transfer_held_out, ask_of, seed=1, split="held_out"
    )
    return train, held_out
