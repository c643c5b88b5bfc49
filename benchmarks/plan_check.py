#!/usr/bin/env python
"""`paligemma plan` held against measured steps: memory and time of every cell that benchmarks/train_step.py saved.

python benchmarks/plan_check.py                                 # all saved tables, printed and saved
python benchmarks/plan_check.py results/train_step-….json       # one
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MEMORY_WITHIN, TIME_WITHIN = 0.15, 0.30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: every train_step-*.json under results/")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    text = "# The plan of a step against its measurement\n"
    bad = 0
    for file in args.files or sorted(RESULTS.glob("train_step-*.json")):
        table, misses = _checked(json.loads(file.read_text()))
        text += f"\n{file.stem}: {table}"
        bad += misses
    text += "\nThe shares of the pace were fitted to these steps; on another machine they are to be measured again.\n"
    text += f"\nAims: memory within {MEMORY_WITHIN:.0%}, time within {TIME_WITHIN:.0%}; {bad} cells outside.\n"
    print(text)
    if not args.no_save:
        (RESULTS / "plan_check.md").write_text(text)
    return 0


def _checked(saved: dict[str, Any]) -> tuple[str, int]:
    from helpers.shape import benchmark_config
    from helpers.train_sides import ADAPTERS, ALPHA, RANK

    from paligemma.models.lora import LoraOptions
    from paligemma.train.devices import ASSUMED_GPU, MEASURED_CPU, Device
    from paligemma.train.pace import pace
    from paligemma.train.plan import Setup, plan

    settings, rates = saved["settings"], saved["rates"]
    config = benchmark_config(settings["preset"], settings["depth"])
    on_cuda = settings.get("device", "cpu") == "cuda"
    device = Device(
        name="measured", kind="cuda" if on_cuda else "cpu", memory_bytes=0, flops=rates["flops"],
        bandwidth=rates["bandwidth"], link=1, fresh=rates["fresh"], shares=ASSUMED_GPU if on_cuda else MEASURED_CPU,
        source="the run",
    )  # fmt: skip
    lines = [
        f"{saved['machine']['cpu']}, {settings['threads']} threads\n",
        "| method | precision | memory, planned (GiB) | measured | off by | step, planned (s) | measured | off by |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    misses = 0
    for cell, sides in saved["runs"].items():
        method, precision = cell.split()
        narrow = precision == "bfloat16"
        setup = Setup(
            method=method, part_size=settings["batch"], batch_size=settings["batch"], text_length=settings["text"],
            target_length=settings["targets"], lora=LoraOptions(rank=RANK, alpha=ALPHA),
            weight_bytes=2 if narrow and method in ADAPTERS else 4, compute_bytes=2 if narrow else 4,
            on_cuda=on_cuda,
        )  # fmt: skip
        planned = plan(config, setup)
        step = pace(config, setup, planned, device).step_s
        answers = sides["paligemma"]
        took = statistics.median(s for answer in answers for s in answer["seconds"])
        held = statistics.median(answer["peak_bytes"] + answer["mapped_bytes"] for answer in answers)
        memory_off, time_off = planned.total_bytes / held - 1, step / took - 1
        misses += (abs(memory_off) > MEMORY_WITHIN) + (abs(time_off) > TIME_WITHIN)
        lines.append(
            f"| {method} | {precision} | {planned.total_bytes / 2**30:.2f} | {held / 2**30:.2f} | {memory_off:+.0%} "
            f"| {step:.2f} | {took:.2f} | {time_off:+.0%} |"
        )
    return "\n".join(lines) + "\n", misses


if __name__ == "__main__":
    sys.exit(main())
