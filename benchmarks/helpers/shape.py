"""Random weights at the shape of a published model, written once as a Hugging Face folder that both sides read."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from paligemma.checkpoints import write
from paligemma.checkpoints.files import Spec
from paligemma.checkpoints.rules import native_shapes
from paligemma.checkpoints.state import State
from paligemma.config import PaliGemmaConfig
from paligemma.presets import HF_TABLE_ROWS, MODEL_PRESETS, with_table_rows

SLIDING_WINDOW = 4096  # as the released PaliGemma 2 folders have it
WEIGHT_STD = 0.02  # keeps activations of the order of 1 through all layers


def benchmark_config(preset: str, depth: int | None) -> PaliGemmaConfig:
    """The preset as its Hugging Face folder describes it; `depth` keeps only that many layers of both stacks."""
    config = with_table_rows(MODEL_PRESETS[preset], HF_TABLE_ROWS)
    text, vision = config.text, config.vision
    if text.post_norms:
        text = dataclasses.replace(text, sliding_window=SLIDING_WINDOW)
    if depth is not None:
        text = dataclasses.replace(text, depth=min(depth, text.depth))
        vision = dataclasses.replace(vision, depth=min(depth, vision.depth))
    return dataclasses.replace(config, text=text, vision=vision)


class RandomWeights(State):
    """Every native tensor of a configuration, drawn when it is asked for: bfloat16, seeded by its place."""

    def __init__(self, config: PaliGemmaConfig) -> None:
        self._shapes = native_shapes(config)
        self._seeds = {name: seed for seed, name in enumerate(self._shapes)}

    def spec(self, name: str) -> Spec:
        return Spec(self._shapes[name], torch.bfloat16)

    def get_as(self, name: str, dtype: torch.dtype | None) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype or torch.bfloat16)
        generator = torch.Generator().manual_seed(self._seeds[name])
        out = torch.empty(shape, dtype=dtype or torch.bfloat16)
        rows = max(1, (1 << 24) // max(1, out[0].numel()))
        for part in out.split(rows):
            part.copy_(torch.randn(part.shape, generator=generator).mul_(WEIGHT_STD))
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_weights(folder: Path, config: PaliGemmaConfig) -> None:
    """The folder that both sides load: bfloat16, as the released checkpoints are."""
    write(folder, config, RandomWeights(config), "hf")
