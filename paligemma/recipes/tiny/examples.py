"""Training examples of the picture world, drawn without end and the same again from the same step."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from paligemma.config import PaliGemmaConfig
from paligemma.data.world import Question, Rendering, Scene, World, ask, render, sample_scene
from paligemma.data.world.questions import ask_everything
from paligemma.models.mask_vae import N_SEG, MaskVae
from paligemma.processing.image import to_pixels
from paligemma.processing.tokenizer import Tokenizer
from paligemma.recipes.tiny.patches import PatchTargets, asked_about, patch_owners, patch_targets
from paligemma.results import BoxXyxyPx
from paligemma.tasks.coords import box_to_norm, decode_coord, encode_coord, loc_tokens, on_step
from paligemma.tasks.grammar import format_entries
from paligemma.tasks.masks import crop_mask

SIMPLE = {"detect": 0.5, "segment": 0.1, "colour": 0.25, "there": 0.15}  # kind of question -> how often it is drawn
MIXTURE = {  # after the simple ones; what is hardest to learn (numbers, sides, masks) more often than it is asked
    "detect": 0.18, "segment": 0.22, "detect_text": 0.02, "caption": 0.12, "ocr": 0.06,
    "count": 0.14, "colour": 0.06, "there": 0.03, "present": 0.03, "left": 0.14,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """What a training step sees.

    The first `patch_steps` steps show `patch_images` pictures and ask nothing: they teach the image tower what lies in
    each patch. The next `simple_steps` ask, on plain pictures, only what one thing answers (`SIMPLE`): where it is, its
    colour, whether it is there. After them `plain_share` of a step's `n_images` pictures are plain, the rest full; each
    is asked `n_questions`. In both, `everything_share` of the questions list all that is in the picture (the held-out
    prompts do; in the simple lesson without masks), `by_shape_share` of these without colours.

    Places are said in every `loc_step`-th location token, 0.9 pixels of the 112 apart: finer ones cannot be told apart
    so soon, and each would be less likely than the end of the answer. Text beyond `max_text` tokens is cut.
    """

    patch_steps: int = 900
    patch_images: int = 48
    simple_steps: int = 2_000
    n_images: int = 32
    n_questions: int = 5
    plain_share: float = 0.6
    everything_share: float = 0.35
    by_shape_share: float = 0.35
    loc_step: int = 8
    max_text: int = 176
    seed: int = 0


@dataclass(frozen=True)
class Rows:
    """A group of questions of similar length: `image[i]` is the picture that row i asks about."""

    image: Tensor  # int64[B]
    asked: Tensor  # float32[B, P], 1 on patches of what the question is about
    tokens: Tensor  # int64[B, T], text only
    mask_ar: Tensor  # int64[B, T]
    mask_input: Tensor  # bool[B, T]
    mask_loss: Tensor  # bool[B, T]


@dataclass(frozen=True)
class Step:
    pixels: Tensor  # float32[I, 3, R, R]
    patches: PatchTargets
    groups: tuple[Rows, ...]


class WorldSteps(IterableDataset[Step]):
    """Steps from `first_step` on; step n depends only on the seed and n, whichever worker draws it."""

    def __init__(
        self, config: PaliGemmaConfig, tokenizer_path: str, vae_path: str, options: ExampleOptions, first_step: int = 0
    ) -> None:
        self.config, self.options, self.first_step = config, options, first_step
        self.tokenizer_path, self.vae_path = tokenizer_path, vae_path

    def __iter__(self) -> Iterator[Step]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        writer = SuffixWriter(
            Tokenizer.from_file(self.tokenizer_path, self.config.tokens),
            MaskVae.from_npz(self.vae_path).eval(),
            self.options.loc_step,
        )
        step = self.first_step + offset
        while True:
            yield draw_step(self.config, writer, self.options, step)
            step += stride


Asked = tuple[Scene, Rendering, NDArray[np.int64], Question]  # the third: codes of every thing's mask


class SuffixWriter:
    """Questions -> prefix and suffix ids."""

    def __init__(self, tokenizer: Tokenizer, vae: MaskVae, loc_step: int = 1) -> None:
        self.tokenizer, self.vae, self.loc_step = tokenizer, vae, loc_step

    @torch.no_grad()
    def codes(self, pictures: list[tuple[Scene, Rendering]]) -> list[NDArray[np.int64]]:
        """int64[n_things + 1, 16] of every picture; -1 for texts and, last, for no thing. Encoded in one batch."""
        crops = [_crop(drawn, i) for scene, drawn in pictures for i in scene.shapes]
        found = iter(self.vae.encode(torch.from_numpy(np.stack(crops))).numpy() if crops else [])
        codes = [np.full((len(scene.things) + 1, N_SEG), -1, np.int64) for scene, _ in pictures]
        for (scene, _), own in zip(pictures, codes, strict=True):
            for i in scene.shapes:
                own[i] = next(found)
        return codes

    def __call__(self, asked: list[Asked]) -> list[tuple[list[int], list[int]]]:
        tokens = self.tokenizer.tokens
        rows = []
        for scene, drawn, codes, question in asked:
            prefix = [tokens.bos, *self.tokenizer.encode(question.prefix), *self.tokenizer.encode("\n")]
            if isinstance(question.answer, str):
                suffix = self.tokenizer.encode(question.answer)
            else:
                entries = [
                    (
                        self._place(drawn.boxes_xyxy_px[i], scene.size_hw),
                        codes[i].tolist() if question.task == "segment" else None,
                        label,
                    )
                    for label, i in question.answer
                ]
                suffix = self.tokenizer.encode(format_entries(entries))
            rows.append((prefix, [*suffix, tokens.eos]))
        return rows

    def _place(self, box_xyxy_px: BoxXyxyPx, size_hw: tuple[int, int]) -> str:
        bins = [on_step(encode_coord(side), self.loc_step) for side in box_to_norm(box_xyxy_px, size_hw)]
        return loc_tokens([decode_coord(index) for index in bins])


def _crop(drawn: Rendering, i: int) -> NDArray[np.float32]:
    x1, y1, x2, y2 = drawn.boxes_xyxy_px[i]
    h, w = drawn.masks[i].shape
    crop: NDArray[np.float32] = crop_mask(drawn.masks[i], (y1 / h, x1 / w, y2 / h, x2 / w))
    return crop


def draw_step(config: PaliGemmaConfig, writer: SuffixWriter, options: ExampleOptions, step: int) -> Step:
    """Everything that one optimiser step sees."""
    rng = np.random.default_rng([options.seed, step])
    only_patches = step < options.patch_steps
    simple = options.patch_steps <= step < options.patch_steps + options.simple_steps
    pixels, patches, image, about = [], [], [], []
    asked: list[Asked] = []
    pictures = []
    for _ in range(options.patch_images if only_patches else options.n_images):
        world: World = "plain" if simple or rng.random() < options.plain_share else "full"
        scene = sample_scene(int(rng.integers(2**48)), world)
        pictures.append((scene, render(scene)))
    for i, ((scene, drawn), codes) in enumerate(zip(pictures, writer.codes(pictures), strict=True)):
        pixels.append(to_pixels(drawn.image, config.vision.resolution, config.processing.resize))
        owner = patch_owners(scene, drawn, config.vision.grid)
        patches.append(patch_targets(scene, drawn, owner, codes, options.loc_step))
        if only_patches:
            continue
        n_all = int(rng.binomial(options.n_questions, options.everything_share))
        questions = [_everything(scene, drawn, rng, options, simple=simple) for _ in range(n_all)]
        questions += ask(scene, drawn, rng, options.n_questions - n_all, SIMPLE if simple else MIXTURE)
        asked += [(scene, drawn, codes, question) for question in questions]
        image += [i] * len(questions)
        about += [asked_about(scene, question, owner) for question in questions]
    targets = PatchTargets(*(torch.from_numpy(np.stack(column)) for column in zip(*patches, strict=True)))
    rows = [_Row(*row) for row in zip(image, about, *zip(*writer(asked), strict=True), strict=True)] if asked else []
    rows.sort(key=lambda row: len(row.prefix) + len(row.suffix))
    # Rows of like length share a group, so that little is spent on padding; the longest few stand alone.
    bounds = [round(len(rows) * share) for share in (0, 0.5, 0.75, 0.92, 1)]
    groups = [rows[a:b] for a, b in itertools.pairwise(bounds) if b > a]
    return Step(
        torch.stack([torch.as_tensor(p) for p in pixels]), targets, tuple(_rows(g, options.max_text) for g in groups)
    )


def _everything(
    scene: Scene, drawn: Rendering, rng: np.random.Generator, options: ExampleOptions, *, simple: bool
) -> Question:
    by_shape, n_absent = bool(rng.random() < options.by_shape_share), int(rng.integers(0, 3))
    return ask_everything(scene, drawn, rng, "detect" if simple else None, by_shape=by_shape, n_absent=n_absent)


@dataclass(frozen=True)
class _Row:
    image: int
    about: NDArray[np.float32]
    prefix: list[int]
    suffix: list[int]


def _rows(rows: list[_Row], max_text: int) -> Rows:
    # Lengths in steps of 8: a compiled model meets few shapes.
    length = min(max_text, -(-max(len(row.prefix) + len(row.suffix) for row in rows) // 8) * 8)
    values: dict[str, NDArray[Any]] = {
        "tokens": np.zeros((len(rows), length), np.int64),
        "mask_ar": np.ones((len(rows), length), np.int64),
        "mask_input": np.zeros((len(rows), length), bool),
        "mask_loss": np.zeros((len(rows), length), bool),
    }
    for r, row in enumerate(rows):
        ids = (row.prefix + row.suffix)[:length]
        n = len(ids)
        values["tokens"][r, :n] = ids
        values["mask_ar"][r, : len(row.prefix)] = 0
        values["mask_input"][r, :n] = True
        values["mask_loss"][r, len(row.prefix) : n] = True
    return Rows(
        image=torch.tensor([row.image for row in rows]),
        asked=torch.from_numpy(np.stack([row.about for row in rows])),
        **{name: torch.from_numpy(value) for name, value in values.items()},
    )


def to_device(step: Step, device: torch.device) -> Step:
    def moved(part: Any) -> Any:
        return type(part)(**{f.name: getattr(part, f.name).to(device) for f in dataclasses.fields(part)})

    return Step(step.pixels.to(device), moved(step.patches), tuple(moved(group) for group in step.groups))
