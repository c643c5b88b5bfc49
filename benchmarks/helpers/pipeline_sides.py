"""The sides of the input pipeline in one process, one thread: pictures on disk to collated batches, by turns."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.pipeline_data import config_at, tiny_tokenizer, write_rows
from paligemma.data.loader import Loader, LoaderOptions, keep_freed_memory
from paligemma.data.sources.jsonl import Jsonl
from paligemma.data.sources.tars import Tars
from paligemma.models.siglip import of_levels
from paligemma.processing.batch import Batch
from paligemma.processing.processor import Processor

Pass = Callable[[], Iterator[Any]]  # once over all pictures


def measure_sides(folder: Path, resolution: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of each side, a list of `rounds`, for one pass over the pictures of a folder; whether they agree.

    All sides run in every round, each time another one first. A pass before does not count.
    """
    keep_freed_memory()  # as in our readers; here for all sides alike
    rows = Jsonl(folder / "train.jsonl")
    peer = _peer(rows, folder, resolution, batch_size)
    sides: dict[str, Pass] = {
        "alone": lambda: _alone(folder, resolution),
        "files": lambda: _ours(rows, resolution, batch_size),
        "tars": lambda: _ours(Tars(folder / "tars"), resolution, batch_size),
        "draft": lambda: _ours(rows, resolution, batch_size, draft=True),
        "made": lambda: map(_made, _ours(rows, resolution, batch_size)),
        "peer": lambda: iter(peer),
    }
    agreement = _agreement(sides)
    for run in sides.values():
        _timed(run)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(_timed(sides[name]))
    return {"n": len(rows), "seconds": seconds, **agreement}


def _alone(folder: Path, resolution: int) -> Iterator[Image.Image]:
    """JPEG decoding and resizing with Pillow, and nothing else."""
    for path in sorted((folder / "images").iterdir()):
        with Image.open(path) as picture:
            yield picture.resize((resolution, resolution), Image.Resampling.BICUBIC)


def _ours(source: Any, resolution: int, batch_size: int, *, draft: bool = False) -> Iterator[Batch]:
    processor = Processor(config_at(resolution), tiny_tokenizer(), draft=draft)
    options = LoaderOptions(batch_size=batch_size, shuffle=False)
    loader = Loader(source, processor, options)
    for data in loader.steps(0, len(source) // batch_size):
        yield from data.parts


def _made(batch: Batch) -> Tensor:
    """The numbers that the tower makes of a batch's levels, here on the CPU."""
    assert batch.pixels is not None
    return of_levels(batch.pixels)


def _peer(rows: Jsonl, folder: Path, resolution: int, batch_size: int) -> "DataLoader[Any]":
    """`datasets` decodes, transformers' processor prepares, torch's DataLoader puts the two together."""
    import datasets
    import transformers
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    named = folder / "peer.jsonl"
    if not named.exists():  # the peer wants whole paths
        read = (rows.row(i) for i in range(len(rows)))
        write_rows(named, ({**row, "image": str(folder / row["image"])} for row in read))
    given = datasets.load_dataset("json", data_files=str(named), split="train", cache_dir=str(folder / "cache"))
    given = given.cast_column("image", datasets.Image())
    words = folder / "tokenizer"
    words.mkdir(exist_ok=True)
    tiny_tokenizer().save(words, hugging_face=True)
    (words / "tokenizer.model").unlink()  # so that tokenizer.json is what is read
    pictures = SiglipImageProcessorPil(size={"height": resolution, "width": resolution})
    pictures.image_seq_length = config_at(resolution).vision.n_image_tokens
    processor: Any = transformers.PaliGemmaProcessor(pictures, transformers.AutoTokenizer.from_pretrained(words))

    def collate(batch: list[Any]) -> Any:
        return processor(
            images=[[row["image"]] for row in batch], text=["<image>" + row["prefix"] for row in batch],
            suffix=[row["suffix"] for row in batch], padding="longest", padding_side="right", return_tensors="pt",
        )  # fmt: skip

    return DataLoader(given, batch_size=batch_size, collate_fn=collate, drop_last=True)


def _agreement(sides: dict[str, Pass]) -> dict[str, Any]:
    """How many pixels and tokens of files and tars are not the peer's, and how far draft decoding is from them."""
    pixels = tokens = n_pixels = 0
    apart = 0.0
    ours = zip(sides["files"](), sides["tars"](), sides["draft"](), sides["peer"](), strict=True)
    for files, tars, draft, peer in ours:
        lengths = peer["attention_mask"].sum(1)
        order = torch.argsort(lengths, stable=True)  # the loader puts rows of a part by length
        expected = peer["pixel_values"][order]
        for batch in (files, tars):
            pixels += _unlike(_made(batch), expected)
            found = torch.where(batch.mask_image, peer["input_ids"].max(), batch.tokens)  # the image token is the last
            width = min(found.shape[1], peer["input_ids"].shape[1])
            tokens += _unlike(found[:, :width], peer["input_ids"][order][:, :width])
        n_pixels += expected.numel()
        apart = max(apart, float((_made(draft) - expected).abs().max()))
    return {"n_pixels": n_pixels, "unlike_pixels": pixels, "unlike_tokens": tokens, "draft_apart": apart}


def _unlike(a: Tensor, b: Tensor) -> int:
    return int((a != b).sum())


def _timed(run: Pass) -> float:
    start = time.perf_counter()
    for _ in run():
        pass
    return time.perf_counter() - start
