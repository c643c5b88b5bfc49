#!/usr/bin/env python
"""Inference on a CPU, this package beside transformers: one table, saved under benchmarks/results/.

    python benchmarks/cpu_inference.py                       # true PaliGemma 2 3B 224 shape; needs 14 GiB of memory
    python benchmarks/cpu_inference.py --depth 2 --quick     # two layers per stack, for development

Random bfloat16 weights are written once to a temporary folder. Then, per dtype and round, each side gets a process of
its own, one after the other, the order swapped from round to round; it loads the folder, answers once to warm up, and
measures every cell. Medians over all rounds.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DTYPES = ("float32", "bfloat16")


def main() -> int:
    args = _arguments()
    if args.worker:
        return _worker(args)
    import torch
    from helpers.machine import describe
    from helpers.report import Runs, disagreement, markdown, rows_of
    from helpers.shape import benchmark_config, write_weights

    from paligemma.checkpoints.rules import native_shapes

    config = benchmark_config(args.preset, args.depth)
    n_parameters = sum(torch.Size(shape).numel() for shape in native_shapes(config).values())
    _require_room(args, n_parameters)
    machine = describe(args.threads)
    started = time.perf_counter()
    runs: Runs = {dtype: {"paligemma": [], "transformers": []} for dtype in args.dtype}
    if args.state is not None and args.state.exists():
        runs = json.loads(args.state.read_text())
    with tempfile.TemporaryDirectory(prefix="paligemma-benchmark-", dir=args.folder) as temporary:
        folder = Path(temporary) / "model"
        _say(f"writing {n_parameters / 1e9:.2f} G random weights to {folder}")
        write_weights(folder, config)
        for dtype in args.dtype:
            for number in range(args.rounds):
                order = ("paligemma", "transformers") if number % 2 == 0 else ("transformers", "paligemma")
                for side in order:
                    if len(runs[dtype][side]) > number:
                        continue
                    before = time.perf_counter()
                    runs[dtype][side].append(_spawn(args, side, folder, dtype))
                    if args.state is not None:
                        args.state.write_text(json.dumps(runs))
                    _say(f"{dtype} round {number + 1}/{args.rounds} {side}: {time.perf_counter() - before:.0f} s")
    rows = rows_of(runs)
    apart = disagreement(runs)
    title = f"{args.preset}, {'all layers' if args.depth is None else f'{args.depth} layers per stack'}"
    head = _head(title, machine, args, n_parameters, apart, time.perf_counter() - started)
    text = f"{head}\n\n{markdown(rows)}\n"
    print(text)
    if not args.no_save:
        _save(args, text, machine, rows, runs)
    return 0 if apart.get("float32", 0.0) < 1e-3 else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paligemma2-3b-224")
    parser.add_argument("--depth", type=int, help="keep so many layers of both stacks (development)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5, help="processes per side and dtype")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of every cell per process")
    parser.add_argument("--quick", action="store_true", help="one round of three repeats")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where the temporary weights go; default the system's place")
    parser.add_argument(
        "--state", type=Path, help="keep what was measured here, and go on from it after an interruption"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.repeats = 1, 3
    return args


def _worker(args: argparse.Namespace) -> int:
    import torch
    from helpers.worker import measure

    torch.set_num_threads(args.threads)
    answer = measure(args.worker, args.weights, args.dtype[0], args.batch, args.repeats)
    print(json.dumps(answer), file=sys.stdout, flush=True)
    return 0


def _spawn(args: argparse.Namespace, side: str, folder: Path, dtype: str) -> dict[str, Any]:
    from helpers.machine import run_worker

    command = [
        sys.executable, __file__, "--worker", side, "--weights", str(folder), "--dtype", dtype,
        "--batch", *map(str, args.batch), "--repeats", str(args.repeats), "--threads", str(args.threads),
    ]  # fmt: skip
    return run_worker(command, args.threads, f"{side} in {dtype}")


def _require_room(args: argparse.Namespace, n_parameters: int) -> None:
    from helpers.machine import available_bytes

    place = args.folder or Path(tempfile.gettempdir())
    disk = 2 * n_parameters + (1 << 30)
    if shutil.disk_usage(place).free < disk:
        sys.exit(f"{place}: {disk / 2**30:.0f} GiB of disk are needed. Name another place with --folder.")
    memory = n_parameters * (4 if "float32" in args.dtype else 2) + (2 << 30)
    have = available_bytes()
    if have is not None and have < memory:
        sys.exit(
            f"{have / 2**30:.1f} GiB of memory are available, {memory / 2**30:.0f} are needed. "
            "Try --dtype bfloat16, or --depth."
        )


def _head(
    title: str,
    machine: dict[str, Any],
    args: argparse.Namespace,
    n_parameters: int,
    apart: dict[str, float],
    wall: float,
) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    medians = f"medians of {args.rounds * args.repeats} ({args.rounds} processes x {args.repeats})"
    agreement = ", ".join(f"{dtype} {value:.1e}" for dtype, value in apart.items())
    return (
        f"# {title}: CPU inference\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {args.threads} threads, {machine['memory_gib']} GiB; "
        f"{machine['system']}; load average before the run {machine['load_average_1min']}.\n"
        f"Python {machine['python']}, {versions}, commit {machine['commit']}. {_today()}.\n"
        f"{n_parameters:,} random weights; {medians}; whole run {wall / 60:.0f} min. "
        f"Logits of the two sides differ, over their scale, by {agreement}."
    )


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _save(args: argparse.Namespace, text: str, machine: dict[str, Any], rows: list[Any], runs: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    name = f"cpu_inference-{args.preset}" + ("" if args.depth is None else f"-depth{args.depth}")
    settings = {
        key: getattr(args, key) for key in ("preset", "depth", "dtype", "batch", "rounds", "repeats", "threads")
    }
    content = {
        "date": _today(),
        "settings": settings,
        "machine": machine,
        "rows": [dataclasses.asdict(row) for row in rows],
        "runs": runs,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    _say(f"saved {RESULTS / name}.md and .json")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
