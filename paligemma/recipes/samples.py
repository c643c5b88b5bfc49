"""Sample predictions: a page of held-out pictures with what the model answers now, drawn at every validation."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from paligemma.api import PaliGemma
from paligemma.data.example import Example
from paligemma.draw import overlay, sheet
from paligemma.errors import PaliGemmaError
from paligemma.evals.folder import MAX_NEW_TOKENS, kind_of
from paligemma.processing.image import load_image
from paligemma.recipes.rows import Rows
from paligemma.tasks import TASKS
from paligemma.train.state import TrainState

N_SAMPLES = 6
LONGEST_PX = 640  # of a picture on the page


class Samples:
    """Draws `samples/step-000120.png` from the same rows each time, spread over the held-out ones.

    Args:
        pg: the model that is being trained, by its user's face.
        rows: held out.
        folder: of the run.
    """

    def __init__(self, pg: PaliGemma, rows: Rows, folder: Path, n: int = N_SAMPLES) -> None:
        self.pg, self.folder = pg, folder / "samples"
        n = min(n, len(rows))
        self.examples = []
        for i in range(n):
            # A row that cannot be read is told of by the run, or left out where that is allowed: not a matter of pages.
            with contextlib.suppress(PaliGemmaError):
                example = rows[i * len(rows) // n]
                if example.images and load_image(example.images[0]) is not None:
                    self.examples.append(example)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Draw; there are no numbers in it."""
        if self.examples:
            drawn = page(self.pg, self.examples)
            with contextlib.suppress(OSError):  # a full disk costs the page, not the run
                self.folder.mkdir(parents=True, exist_ok=True)
                drawn.save(self.folder / f"step-{state.step:06d}.png")
        return {}


def page(pg: PaliGemma, examples: Sequence[Example]) -> Image.Image:
    """Pictures of some examples with the model's answers, and the expected ones where words differ."""
    pictures = []
    for example in examples:
        kind = kind_of(example.prefix)
        limit = MAX_NEW_TOKENS.get(kind, 64)
        image = _shown(example.images[0])
        handle = pg.encode_image(list(example.images))
        (answer,) = pg.generate(handle, example.prefix, max_new_tokens=limit, allow_special=True)
        result: object = answer.text.strip() or "(nothing)"
        if kind in ("detect", "segment"):
            decoder = None if pg.mask_vae is None else pg.mask_vae.decode_array
            size_hw = (image.height, image.width)
            pieces = list(zip(answer.pieces, answer.logprobs, strict=True))
            result = TASKS[kind].parse(answer.text, size_hw=size_hw, token_logprobs=pieces, mask_decoder=decoder)
        elif result != example.suffix.strip():
            result = f"{result}   (expected: {example.suffix.strip()})"
        pictures.append(overlay(image, result, prompt=example.prefix))
    return sheet(pictures)


def _shown(image: object) -> Image.Image:
    picture = Image.fromarray(load_image(image))
    picture.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.LANCZOS)
    return picture
