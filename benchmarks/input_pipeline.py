#!/usr/bin/env python
"""From pictures on disk to collated batches, one process, one thread: examples/s, memory, seeking; one saved table.

    python benchmarks/input_pipeline.py                      # 224, 448, 896 px from 640x427 and 1280x854 sources
    python benchmarks/input_pipeline.py --quick --no-save    # a look, not a result

Per resolution and size of source a process of its own runs these sides, all of them in every round, each round another
one first; ratios are medians over the rounds of what the sides took in the same round:

    alone   JPEG decoding and bicubic resizing with Pillow, and nothing else
    files   this package: JSONL rows, JPEG files, tokens, levels as bytes, batches of 16
    made    the same, and the numbers in [-1, 1] that the image tower makes of them on its device, here made as well
    tars    the same from a WebDataset tar
    draft   as files, decoding JPEG at a fraction of its size where that still covers the target: other pixels
    peer    `datasets` (json, Image feature), transformers' PaliGemmaProcessor, torch's DataLoader, from files

Exit status 1 where a pixel or a token of files or tars is not the peer's.
"""

import time

BEGUN = time.perf_counter()  # for the seconds that seeking takes with imports

import argparse  # noqa: E402
import datetime  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "input_pipeline.md"
SIDES = ("alone", "files", "tars", "made", "draft", "peer")
AIM = 1.15  # times decoding and resizing alone
POSITION = 10**9


def main() -> int:
    args = _arguments()
    sys.path[:0] = [str(HERE.parent)]
    if args.worker:
        return _worker(args)
    from helpers.machine import describe
    from helpers.pipeline_data import write_pictures
    from helpers.pipeline_memory import write_many

    machine, started = describe(threads=1), time.perf_counter()
    packages = ("paligemma", "torch", "pillow", "numpy", "datasets", "transformers")
    machine["versions"] = {name: version(name) for name in packages}
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="paligemma-benchmark-", dir=args.folder) as temporary:
        for size in args.sources:
            folder = Path(temporary) / size
            write_pictures(folder, _size_wh(size), args.pictures)
            for resolution in args.resolutions:
                answer = _spawn(args, "sides", folder, "--resolutions", resolution)
                cells.append({"source": size, "resolution": resolution, **answer})
                _say(f"{size} -> {resolution}: {time.perf_counter() - started:.0f} s so far")
        many = Path(temporary) / "many"
        many.mkdir()
        write_many(many, args.rows)
        memory = [[_spawn(args, "memory", many / f"{n}.jsonl") for n in args.rows] for _ in range(min(args.rounds, 3))]
        seeks = [_spawn(args, "seek", many / f"{args.rows[-1]}.jsonl") for _ in range(min(args.rounds, 3))]
    content = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "settings": {name: getattr(args, name) for name in ("pictures", "batch", "rounds", "steps", "rows")},
        "machine": machine,
        "rows": [row_of(cell) for cell in cells],
        "memory": {"growth_mb": growth_mb(memory, "worker_bytes"), "opened_mb": growth_mb(memory, "opened_bytes")},
        "seek": {key: statistics.median(seek[key] for seek in seeks) for key in seeks[0] if key != "where"},
        "runs": {"cells": cells, "memory": memory, "seek": seeks},
    }
    text = page(content, time.perf_counter() - started)
    print(text)
    if not args.no_save:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        _say(f"saved {args.out} and .json")
    return int(any(cell["unlike_pixels"] or cell["unlike_tokens"] for cell in cells))


def row_of(cell: dict[str, Any]) -> dict[str, Any]:
    """Examples/s of each side, medians, and ratios of times within a round, medians."""
    seconds = cell["seconds"]

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))

    return {
        "source": cell["source"],
        "resolution": cell["resolution"],
        "per_s": {side: cell["n"] / statistics.median(seconds[side]) for side in SIDES},
        "over_alone": {side: ratio(side, "alone") for side in SIDES if side != "alone"},
        "peer_over": {side: ratio("peer", side) for side in ("files", "tars", "made", "draft")},
        "unlike_pixels": cell["unlike_pixels"],
        "n_pixels": cell["n_pixels"],
        "unlike_tokens": cell["unlike_tokens"],
        "draft_apart": cell["draft_apart"],
    }


def growth_mb(runs: list[list[dict[str, Any]]], key: str) -> float:
    """What the largest file costs more than the smallest, in MB; the median over the runs."""
    return statistics.median(run[-1][key] - run[0][key] for run in runs) / 1e6


def page(content: dict[str, Any], wall_s: float) -> str:
    machine, settings, seek = content["machine"], content["settings"], content["seek"]
    small, large = settings["rows"][0], settings["rows"][-1]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        "# Input pipeline: pictures on disk to collated batches, one process, one thread\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['system']}; load average "
        f"before the run {machine['load_average_1min']}.\n"
        f"Python {machine['python']}, {versions}, commit {machine['commit']}. {content['date']}.\n"
        f"{settings['pictures']} JPEG files (quality 90) per size, batches of {settings['batch']}; medians of "
        f"{settings['rounds']} rounds, files in the page cache; whole run {wall_s / 60:.0f} min.\n\n"
        f"{_table(content['rows'])}\n\n"
        f"Aim: files / alone and tars / alone at most {AIM}. The peer reads the same files in every row.\n"
        "Batches hold levels 0 to 255 as bytes; the image tower makes numbers in [-1, 1] of them where it runs. What "
        "that takes on this CPU is in rows of its own.\n"
        f"{_agreement(content['rows'])}\n\n"
        f"Memory: a reading process holds {content['memory']['growth_mb']:+.2f} MB more for itself when its JSONL file "
        f"has {large:,} rows instead of {small:,} (after {settings['steps']} shuffled batches). The process that opens "
        f"the file holds {content['memory']['opened_mb']:+.2f} MB more, the places of rows; readers share them.\n\n"
        f"Seek: the example at position {seek['position']:,.0f} of a mixture in a new process: "
        f"{seek['seek_s'] * 1e3:.1f} "
        f"ms, with imports and opening {large:,} rows {seek['with_imports_s']:.2f} s; rows read on the way: "
        f"{seek['rows_read']:g}. The batch of 16 there: {seek['batch_s'] * 1e3:.1f} ms.\n"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    names = {
        "files": "JPEG files", "tars": "tars", "made": "JPEG files, and floats made on this CPU",
        "draft": "JPEG files, draft decoding (other pixels)",
    }  # fmt: skip
    lines = [
        "| source | pixels | from | examples/s | decode + resize alone | time / alone | peer | peer's time / ours |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for side, name in names.items():
        for row in rows:
            if side == "draft" and not row["draft_apart"]:
                continue  # no fraction covers the target: the same work as for files
            speed = row["per_s"]
            # The peer makes floats: like for like is what makes them too.
            beside = f"**{row['peer_over'][side]:.2f}**" if side == "made" else "–"
            lines.append(
                f"| {row['source'].replace('x', ' × ')} | {row['resolution']} | {name} | {speed[side]:.1f} "
                f"| {speed['alone']:.1f} | **{row['over_alone'][side]:.2f}** | {speed['peer']:.1f} | {beside} |"
            )
    return "\n".join(lines)


def _agreement(rows: list[dict[str, Any]]) -> str:
    unlike, tokens = (sum(row[key] for row in rows) for key in ("unlike_pixels", "unlike_tokens"))
    return (
        f"Beside the peer (Pillow bicubic, `hf_bicubic`), files and tars: {unlike} of "
        f"{2 * sum(row['n_pixels'] for row in rows):,} values of pixels and {tokens} tokens differ. Draft decoding: up "
        f"to {max(row['draft_apart'] for row in rows):.2f} of 2 apart."
    )


def version(name: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def _size_wh(size: str) -> tuple[int, int]:
    width, height = size.split("x")
    return int(width), int(height)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", nargs="+", type=int, default=[224, 448, 896])
    parser.add_argument("--sources", nargs="+", default=["640x427", "1280x854"], help="width x height of the files")
    parser.add_argument("--pictures", type=int, help="files of each size; default 128, quick 32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, help="default 10, quick 3")
    parser.add_argument("--rows", nargs="+", type=int, help="of the JSONL files; default 10,000 1,000,000")
    parser.add_argument("--steps", type=int, default=40, help="batches read before memory is looked at")
    parser.add_argument("--quick", action="store_true", help="fewer pictures, rounds and rows")
    parser.add_argument("--folder", type=Path, help="where the temporary files go; default the system's place")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--worker", choices=("sides", "memory", "seek"), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.pictures = args.pictures or (32 if args.quick else 128)
    args.rounds = args.rounds or (3 if args.quick else 10)
    args.rows = sorted(args.rows or ([10_000, 100_000] if args.quick else [10_000, 1_000_000]))
    if args.pictures % args.batch:
        parser.error(f"--pictures {args.pictures}: expected a multiple of --batch {args.batch}.")
    return args


def _worker(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)
    if args.worker == "sides":
        from helpers.pipeline_sides import measure_sides

        answer = measure_sides(args.data, args.resolutions[0], args.batch, args.rounds)
    elif args.worker == "memory":
        from helpers.pipeline_memory import measure_memory

        answer = measure_memory(args.data, args.steps)
    else:
        from helpers.pipeline_memory import measure_seek

        answer = measure_seek(args.data, POSITION, BEGUN)
    print(json.dumps(answer), flush=True)
    return 0


def _spawn(args: argparse.Namespace, what: str, data: Path, *more: Any) -> dict[str, Any]:
    from helpers.machine import run_worker

    options = ("--pictures", args.pictures, "--batch", args.batch, "--rounds", args.rounds, "--steps", args.steps)
    command = [sys.executable, __file__, "--worker", what, "--data", data, *options, *more]
    return run_worker([str(word) for word in command], 1, f"{what}, {data.name}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
