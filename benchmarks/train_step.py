#!/usr/bin/env python
"""One training step, this package beside transformers (+ peft): tokens/s, MFU and memory, saved under results/.

    python benchmarks/train_step.py                                # 3B widths, 4 + 4 layers, full vocabulary, 224 px
    python benchmarks/train_step.py --method lora --rounds 1       # one cell
    python benchmarks/train_step.py --depth 1 --no-save            # for development
    python benchmarks/train_step.py --device cuda --depth 27 --precision bfloat16 --batch 8      # the true 3B shape

Random weights are written once to a temporary folder. Each side gets a process of its own per round, one after the
other, the order swapped from round to round: a step to warm up, then the measured ones. Medians over all rounds.

Tokens are real ones, image and text. MFU: FLOPs that the mathematics needs (paligemma/train/flops.py), over what the
largest square matrix product of this machine reached just before. Memory is what a step takes at its peak above the
model's weights, gradients and moments, the interpreter and its libraries; weights that are only mapped from their file
(bfloat16 below adapters) take none on a CPU.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
METHODS = ("full", "frozen", "lora", "qlora")
SIDES = ("paligemma", "transformers")
Runs = dict[str, dict[str, list[dict[str, Any]]]]  # "method precision" -> side -> one answer per round


def main() -> int:
    args = _arguments()
    if args.worker:
        return _worker(args)
    from helpers.machine import describe
    from helpers.shape import benchmark_config, write_weights

    machine, started = describe(args.threads), time.perf_counter()
    config = benchmark_config(args.preset, args.depth)
    runs: Runs = json.loads(args.state.read_text()) if args.state is not None and args.state.exists() else {}
    with tempfile.TemporaryDirectory(prefix="paligemma-benchmark-") as temporary:
        folder = Path(temporary) / "model"
        write_weights(folder, config)
        for number in range(args.rounds):
            for cell in (f"{method} {precision}" for precision in args.precision for method in args.method):
                sides = runs.setdefault(cell, {side: [] for side in SIDES})
                for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                    if len(sides[side]) > number:
                        continue
                    before = time.perf_counter()
                    sides[side].append(_spawn(args, side, cell, folder))
                    if args.state is not None:
                        args.state.write_text(json.dumps(runs))
                    _say(f"round {number + 1}/{args.rounds} {cell} {side}: {time.perf_counter() - before:.0f} s")
    rates = _rates(args.device)
    peaks = rates["flops"]
    rows = [_row(config, args, cell, sides, peaks) for cell, sides in runs.items()]
    text = f"{_head(args, machine, rates, time.perf_counter() - started)}\n\n{_table(rows)}\n"
    print(text)
    if not args.no_save:
        name = f"train_step-{args.preset}-depth{args.depth}" + (
            f"-cuda-batch{args.batch}" if args.device == "cuda" else ""
        )
        content = {"date": _today(), "settings": _settings(args), "machine": machine, "rates": rates, "rows": rows}
        content["runs"] = runs
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(text)
        _say(f"saved {RESULTS / name}.md and .json")
    return 0


def _row(config: Any, args: argparse.Namespace, cell: str, sides: dict[str, Any], peaks: dict[str, float]) -> Any:
    from paligemma.models.lora import LoraOptions
    from paligemma.train.plan import Setup, plan

    method, precision = cell.split()
    from helpers.train_sides import ALPHA, RANK

    setup = Setup(
        method=method, part_size=args.batch, batch_size=args.batch, text_length=args.text, target_length=args.targets,
        lora=LoraOptions(rank=RANK, alpha=ALPHA),
    )  # fmt: skip
    flops = plan(config, setup).work.total
    tokens = args.batch * (config.vision.n_image_tokens + args.text)
    row: dict[str, Any] = {"method": method, "precision": precision}
    for side in SIDES:
        answers = sides[side]
        seconds = statistics.median(s for answer in answers for s in answer["seconds"])
        row[side] = {
            "step_s": seconds,
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / peaks[precision],
            "extra_gib": statistics.median(_extra(answer) for answer in answers) / 2**30,
            "loss": answers[0]["losses"][0],
        }
    ours, peer = row["paligemma"], row["transformers"]
    row["speed"] = ours["tokens_per_s"] / peer["tokens_per_s"]
    row["memory"] = ours["extra_gib"] / peer["extra_gib"]
    return row


def _extra(answer: dict[str, Any]) -> float:
    return float(answer["peak_bytes"] - answer["base_bytes"] - answer["exact_bytes"])


def _table(rows: list[Any]) -> str:
    lines = [
        "| method | precision | tokens/s | peer | ratio | MFU | peer | memory above weights, gradients, moments (GiB) "
        "| peer | ratio | first loss | peer |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        a, b = row["paligemma"], row["transformers"]
        lines.append(
            f"| {row['method']} | {row['precision']} | {a['tokens_per_s']:.1f} | {b['tokens_per_s']:.1f} "
            f"| **{row['speed']:.2f}** | {a['mfu']:.0%} | {b['mfu']:.0%} | {a['extra_gib']:.2f} | {b['extra_gib']:.2f} "
            f"| **{row['memory']:.2f}** | {a['loss']:.4f} | {b['loss']:.4f} |"
        )
    return "\n".join(lines)


def _head(args: argparse.Namespace, machine: dict[str, Any], rates: dict[str, Any], wall: float) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    reached = ", ".join(f"{kind} {value / 1e9:.0f} GFLOP/s" for kind, value in rates["flops"].items())
    return (
        f"# {args.preset}, {args.depth} + {args.depth} layers: one training step on {rates['name']}\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {args.threads} threads, {machine['memory_gib']} GiB; "
        f"{machine['system']}. Matrix products: {reached}.\n"
        f"Python {machine['python']}, {versions}, commit {machine['commit']}. {_today()}.\n"
        f"Batch {args.batch}, {args.text} text tokens of which {args.targets} are learned; medians of "
        f"{args.rounds * args.steps} steps ({args.rounds} processes x {args.steps}).\n"
        "Precision bfloat16: autocast over float32 weights (full, frozen), a bfloat16 base (LoRA, QLoRA)."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paligemma2-3b-224")
    parser.add_argument("--depth", type=int, default=4, help="layers of both stacks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="processes per side and cell")
    parser.add_argument("--steps", type=int, default=2, help="measured in each process")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--state", type=Path, help="keep what was measured here, and go on after an interruption")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "preset",
        "device",
        "depth",
        "method",
        "precision",
        "batch",
        "text",
        "targets",
        "rounds",
        "steps",
        "threads",
    )
    return {name: getattr(args, name) for name in names}


def _worker(args: argparse.Namespace) -> int:
    import torch
    from helpers.steps import anonymous_bytes, mapped_bytes, measure_steps
    from helpers.train_sides import TRAIN_SIDES

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):  # what libraries take once belongs to the base
        x = torch.ones(64, 64, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()  # type: ignore[no-untyped-call]
    side = TRAIN_SIDES[args.worker]()
    base = anonymous_bytes() if args.device == "cpu" else torch.cuda.memory_allocated()
    side.load(args.weights, args.method[0], args.precision[0], args.batch, args.text, args.targets, args.device)
    held = {id(t): t for t in side.parameters()}.values()
    trained = sum(t.numel() for t in held if t.requires_grad)
    mapped = mapped_bytes(held) if args.device == "cpu" else 0
    weights = sum(t.nbytes for t in held) - mapped
    answer = measure_steps(side.step, torch.device(args.device), 1 if args.device == "cpu" else 3, args.steps)
    print(
        json.dumps({"base_bytes": base, "exact_bytes": weights + 12 * trained, "mapped_bytes": mapped, **answer}),
        flush=True,
    )
    return 0


def _spawn(args: argparse.Namespace, side: str, cell: str, folder: Path) -> dict[str, Any]:
    from helpers.machine import run_worker

    method, precision = cell.split()
    command = [
        sys.executable, __file__, "--worker", side, "--weights", str(folder), "--method", method,
        "--precision", precision, "--batch", str(args.batch), "--text", str(args.text),
        "--targets", str(args.targets), "--steps", str(args.steps), "--threads", str(args.threads),
        "--device", args.device,
    ]  # fmt: skip
    return run_worker(command, args.threads, f"{side}, {cell}")


def _rates(device: str) -> dict[str, Any]:
    from paligemma.train.devices import device_of

    found = device_of("cpu" if device == "cpu" else "this")
    return {"name": found.name, "flops": dict(found.flops), "bandwidth": found.bandwidth, "fresh": found.fresh}


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
