"""What a reader holds of a large data set, and how long the way to a far example takes."""

import gc
import multiprocessing
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from helpers.pipeline_data import config_at, tiny_tokenizer, write_rows

N_FILES = 16  # the rows' pictures are few and small: what is measured is what rows cost
SIDE = 56
PREFETCH = 2  # what the loader's workers read ahead


def write_many(folder: Path, sizes: Iterable[int]) -> None:
    """A JSONL file of each number of rows, all about the same few pictures."""
    for i in range(N_FILES):
        Image.new("RGB", (64, 48), (i * 15, 99, 255 - i * 15)).save(folder / f"{i}.jpg")
    for n in sizes:
        rows = (
            {"image": f"{i % N_FILES}.jpg", "prefix": f"answer en is this row {i}?", "suffix": f"yes, row {i} of {n}"}
            for i in range(n)
        )
        write_rows(folder / f"{n}.jsonl", rows)


def measure_memory(file: Path, steps: int) -> dict[str, Any]:
    """What a reading process holds for itself after `steps` batches of 16 from all over the file, and what this one
    does that opened it, in bytes."""
    from paligemma.data.loader import Loader, LoaderOptions
    from paligemma.data.sources.jsonl import Jsonl
    from paligemma.processing.processor import Processor

    processor = Processor(config_at(SIDE), tiny_tokenizer())
    before = private_bytes("self")
    rows = Jsonl(file)
    opened = private_bytes("self") - before
    loader = Loader(rows, processor, LoaderOptions(batch_size=16, workers=1))
    reading = loader.steps(0, steps + PREFETCH)
    for _ in range(steps):
        next(reading)
    (worker,) = multiprocessing.active_children()
    held = private_bytes(str(worker.pid))
    for _ in reading:
        pass
    return {"rows": len(rows), "worker_bytes": held, "opened_bytes": opened}


def measure_seek(file: Path, position: int, begun: float) -> dict[str, Any]:
    """Seconds to the example at a position of a mixture, in a process that has done nothing before `begun`."""
    from paligemma.data.loader import Loader, LoaderOptions
    from paligemma.data.mixture import Mixture, Part
    from paligemma.data.sources.jsonl import Jsonl
    from paligemma.processing.processor import Processor

    rows = _Counted(Jsonl(file))
    mixture = Mixture({"much": Part(source=rows, weight=3), "little": Part(source=rows, weight=1, limit=100)}, seed=1)
    start = time.perf_counter()
    example = mixture[position]
    there = time.perf_counter()
    n_read = rows.n_read
    processor = Processor(config_at(SIDE), tiny_tokenizer())
    again = time.perf_counter()
    Loader(mixture, processor, LoaderOptions(batch_size=16)).step(position // 16)
    return {
        "position": position, "where": example.where, "rows_read": n_read, "seek_s": there - start,
        "with_imports_s": there - begun, "batch_s": time.perf_counter() - again,
    }  # fmt: skip


class _Counted:
    """A source that counts the rows that were read of it."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.n_read = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.n_read += 1
        return self.rows[index]


def private_bytes(process: str) -> int:
    """Memory that a process shares with no other."""
    if process == "self":
        gc.collect()
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
