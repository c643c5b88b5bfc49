"""Photographs, rows and tars for the input pipeline: made once, read by every side."""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma.config import PaliGemmaConfig, ProcessingConfig
from paligemma.data.sources.jsonl import Jsonl
from paligemma.data.sources.tars import write_tars
from paligemma.presets import MODEL_PRESETS
from paligemma.processing.tokenizer import Tokenizer

QUALITY = 90
CROP = 0.1  # of a side at each end, at most
N_PREFIX, N_SUFFIX = 12, 18  # tokens, two more or less
WORDS = [
    "the",
    "red",
    "green",
    "blue",
    "small",
    "large",
    "square",
    "circle",
    "left",
    "right",
    "above",
    "below",
    "two",
    "is",
]
TINY = Path(__file__).resolve().parents[2] / "paligemma" / "assets" / "tiny"


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """Read once: it is not what is measured."""
    return Tokenizer.from_file(TINY)


def config_at(resolution: int) -> PaliGemmaConfig:
    """tiny's vocabulary at another resolution, pictures prepared as transformers does; no weights are needed."""
    tiny = MODEL_PRESETS["tiny"]
    vision = dataclasses.replace(tiny.vision, resolution=resolution, patch_size=14)
    return dataclasses.replace(tiny, vision=vision, processing=ProcessingConfig(resize="hf_bicubic"))


def write_pictures(folder: Path, size_wh: tuple[int, int], n: int, seed: int = 0) -> None:
    """n JPEG files of one size, no two alike, rows about them in train.jsonl, and the same again as a tar.

    The photographs are scikit-learn's two, cropped a little at random and brought to size.
    """
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng, tokenizer = np.random.default_rng([seed, *size_wh]), tiny_tokenizer()
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        photo = photos[i % len(photos)]
        x0, y0, x1, y1 = rng.uniform(0, CROP, 4) * (photo.size * 2)
        sized = photo.resize(size_wh, Image.Resampling.BICUBIC, box=(x0, y0, photo.width - x1, photo.height - y1))
        name = f"images/{i:06d}.jpg"
        sized.save(folder / name, quality=QUALITY)
        prefix, suffix = _words(tokenizer, N_PREFIX, rng), _words(tokenizer, N_SUFFIX, rng)
        rows.append({"image": name, "prefix": prefix, "suffix": suffix})
    write_rows(folder / "train.jsonl", rows)
    source = Jsonl(folder / "train.jsonl")
    write_tars((source[i] for i in range(n)), folder / "tars", per_shard=n)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _words(tokenizer: Tokenizer, n_tokens: int, rng: np.random.Generator) -> str:
    """Random words of about so many tokens, more or less by two."""
    wanted, words = n_tokens + int(rng.integers(-2, 3)), [str(rng.choice(WORDS))]
    while len(tokenizer.encode(" ".join(words))) < wanted:
        words.append(str(rng.choice(WORDS)))
    return " ".join(words)
