"""Small runs on small models: digits of a few pixels to learn, written as JSONL, and a loop over them."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from paligemma.config import PaliGemmaConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.data.loader import Loader, LoaderOptions
from paligemma.data.sources.jsonl import Jsonl
from paligemma.models.init import init_weights
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.presets import TINY
from paligemma.processing.processor import Processor
from paligemma.processing.tokenizer import Tokenizer
from paligemma.train.loop import FitOptions, StepReport
from paligemma.train.optim import Optimizer, OptimOptions
from paligemma.train.schedule import Duration, Schedule
from paligemma.train.state import TrainState
from tests.embedded import TINY as FOLDER

WORDS = ("red", "green", "blue", "a red circle", "two blue stars and a green moon")

# The vocabulary of the embedded model on a body of a few thousand numbers.
SMALL = PaliGemmaConfig(
    vision=VisionConfig(width=12, depth=1, mlp_dim=20, n_heads=2, resolution=28),
    text=TextConfig(
        width=16, depth=2, mlp_dim=24, n_heads=2, n_kv_heads=1, head_dim=8, vocab_size=TINY.text.vocab_size,
        post_norms=True, query_pre_attn_scalar=8, attn_logits_softcap=50.0, final_logits_softcap=30.0,
    ),
    tokens=TokenConfig(
        n_tokens=TINY.tokens.n_tokens, loc_start=TINY.tokens.loc_start, seg_start=TINY.tokens.seg_start,
        image=TINY.tokens.image,
    ),
)  # fmt: skip


def write_rows(folder: Path, n: int, seed: int = 0, name: str = "train.jsonl") -> Path:
    """A JSONL file of n pictures, each one colour, and what stands in them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        file = f"{name.split('.')[0]}-{i}.png"
        Image.fromarray(np.full((20, 30, 3), rng.integers(0, 256, 3), np.uint8)).save(folder / file)
        rows.append({"image": file, "prefix": "caption en", "suffix": WORDS[int(rng.integers(len(WORDS)))]})
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def processor() -> Processor:
    return Processor(SMALL, Tokenizer.from_file(FOLDER / "tokenizer.model", SMALL.tokens))


def loader_of(path: Path, **options: Any) -> Loader:
    given = {"batch_size": 4, "seed": 5, **options}
    ranks = {key: given.pop(key) for key in ("rank", "world_size") if key in given}
    return Loader(Jsonl(path), processor(), LoaderOptions(**given), **ranks)


def state_of(options: FitOptions, *, seed: int = 0, identity: dict[str, Any] | None = None, **optim: Any) -> TrainState:
    model = PaliGemmaModel(SMALL)
    init_weights(model, torch.Generator().manual_seed(seed), zero_projector=False)
    optimizer = Optimizer(model.named_parameters(), optim_options(**optim), total_steps=options.steps)
    return TrainState(model, optimizer, identity=identity or {})


def optim_options(**changes: Any) -> OptimOptions:
    return OptimOptions(**{"lr": 1e-2, "schedule": Schedule(warmup=Duration(steps=2)), **changes})


def weights_of(state: TrainState) -> dict[str, torch.Tensor]:
    return copy.deepcopy(state.model.state_dict())


class Losses(list[float]):
    """A hook that keeps the loss of every step."""

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self.append(report.loss)

    def finish(self, state: TrainState) -> None:
        """Nothing is left to do."""
