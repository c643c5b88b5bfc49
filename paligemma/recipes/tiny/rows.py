"""The picture world as a source of examples: row i is question i % n of picture i // n, the same whoever draws it.

Rows of one picture stand together, so that they share a step and the picture runs through the image tower once. There
is no end to them: the number of rows only says how many seeds are used.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from paligemma.config import TokenConfig
from paligemma.data.example import Example
from paligemma.data.world import Question, Rendering, Scene, Split, World, ask, ask_everything, render, sample_scene
from paligemma.models.mask_vae import MaskVae
from paligemma.processing.tokenizer import Tokenizer
from paligemma.recipes.tiny.suffix import mask_codes, written

SIMPLE = {"detect": 0.5, "segment": 0.1, "colour": 0.25, "there": 0.15}  # kind of question -> how often it is drawn
MIXTURE = {  # what is hardest to learn (numbers, sides, masks) more often than it is asked
    "detect": 0.18, "segment": 0.22, "detect_text": 0.02, "caption": 0.12, "ocr": 0.06,
    "count": 0.14, "colour": 0.06, "there": 0.03, "present": 0.03, "left": 0.14,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WorldOptions:
    """What the rows ask.

    Attributes:
        n_rows: rows of the source.
        n_questions: of every picture.
        simple_rows: the first rows ask, on plain pictures, only what one thing answers.
        plain_share: of the pictures after them that are plain; many_share: that are plain but for more things, whose
            lists are what is hardest to say right; the others are of all kinds.
        everything_share: of the questions that list all that is in the picture, as the held-out prompts do;
            by_shape_share of these without colours; some_share of these name only some of it, so that the model goes by
            the names and does not list the picture; detect_share of these ask for boxes, the others for masks.
        mixture: (kind, share) pairs of the others.
        loc_step: places are said in every n-th location token; finer ones cannot be told apart so soon, and each would
            be less likely than the end of the answer.
        split: "train" or "held_out".
    """

    n_rows: int = 2**31
    n_questions: int = 5
    simple_rows: int = 0
    plain_share: float = 0.25
    many_share: float = 0.35
    everything_share: float = 0.6
    by_shape_share: float = 0.35
    some_share: float = 0.7
    detect_share: float = 0.7
    mixture: tuple[tuple[str, float], ...] = tuple(MIXTURE.items())
    loc_step: int = 8
    split: Split = "train"
    seed: int = 0


class WorldRows:
    """The source; tokenizer and mask codes are read when the first row is drawn, in whatever process that is."""

    def __init__(self, folder: Path, tokens: TokenConfig, options: WorldOptions) -> None:
        self.folder, self.tokens, self.options = folder, tokens, options
        self._tools: tuple[Tokenizer, MaskVae] | None = None
        self._last: tuple[int, list[Example]] = (-1, [])

    def __len__(self) -> int:
        return self.options.n_rows

    def where(self, index: int) -> str:
        picture, question = divmod(index, self.options.n_questions)
        return f"question {question} of drawn picture {picture}"

    def __getitem__(self, index: int) -> Example:
        picture, question = divmod(index, self.options.n_questions)
        if self._last[0] != picture:
            self._last = picture, self._drawn(picture)
        return self._last[1][question]

    def _drawn(self, picture: int) -> list[Example]:
        if self._tools is None:
            vae = MaskVae.from_npz(self.folder / "mask_vae.npz").eval()
            self._tools = Tokenizer.from_file(self.folder / "tokenizer.model", self.tokens), vae
        tokenizer, vae = self._tools
        options = self.options
        rng = np.random.default_rng([options.seed, 79, picture, options.split == "train"])
        simple = picture * options.n_questions < options.simple_rows
        drawn_by = rng.random()
        world: World = "full" if drawn_by >= options.plain_share + options.many_share else "many"
        if simple or drawn_by < options.plain_share:
            world = "plain"
        scene = sample_scene(int(rng.integers(2**48)), world, options.split)
        drawn = render(scene)
        codes = mask_codes([(scene, drawn)], vae)[0]
        n_all = int(rng.binomial(options.n_questions, options.everything_share))
        questions = [self._everything(scene, drawn, rng, simple=simple) for _ in range(n_all)]
        questions += ask(scene, drawn, rng, options.n_questions - n_all, SIMPLE if simple else dict(options.mixture))
        rows = []
        for question in questions:
            suffix = written(question, scene, drawn, codes, options.loc_step)
            # By tokens alone, captions and masks would drown the one-word answers; by examples alone, the other way
            # round: a suffix of n tokens weighs as n^0.5 of them.
            weight = float(len(tokenizer.encode(suffix)) + 1) ** 0.5
            rows.append(Example((drawn.image,), question.prefix, suffix, weight, f"drawn picture {picture}"))
        return rows

    def _everything(self, scene: Scene, drawn: Rendering, rng: np.random.Generator, *, simple: bool) -> Question:
        by_shape, n_absent = bool(rng.random() < self.options.by_shape_share), int(rng.integers(0, 3))
        share = float(rng.uniform(0.2, 0.9)) if rng.random() < self.options.some_share else 1.0
        task: Literal["detect", "segment"] = "detect"
        if not simple and rng.random() >= self.options.detect_share:
            task = "segment"
        return ask_everything(scene, drawn, rng, task, by_shape=by_shape, n_absent=n_absent, share=share)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tools": None, "_last": (-1, [])}
