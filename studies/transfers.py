#!/usr/bin/env python
"""What transfers of a small model need: stage 1 (shorter_stage1), examples (transfer_examples), luck (repeatability).

    python studies/transfers.py                     # 3 stages 1, seventy short transfers; goes on where it stopped
    python studies/transfers.py transfer_examples --seeds 5
    python studies/transfers.py --tune 3e-4 1e-3 3e-3    # learning rates, on training rows held out for that
    python studies/transfers.py --lr 3e-3                # another than the one that was chosen so

Two tasks that stage 1 never asks, each learned by all weights in the simple way (Adam, cosine, 5 % warm-up):

    largest   answer en what colour is the largest shape?   -> red
    colours   answer en how many red things?                -> 0, 1, 2, 3

`repeatability` reads what the other two left and runs the transfers that differ in the order of the examples alone.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from helpers import pages
from helpers.bench import LENGTHS, LR, TASKS, Bench
from helpers.pictures import PROMPTS, stage1_pool
from helpers.small import Arm, opened, print_of, stage1
from helpers.study import Results
from scipy import stats

REPORTED = 0.005  # deviations of most transfers in the report
SOURCE = "arXiv 2407.07726, section 5"
SEEDS = {"shorter_stage1": 3, "transfer_examples": 5, "repeatability": 5}


def main(argv: Sequence[str] | None = None) -> int:
    parser = pages.parser_of(__doc__, list(SEEDS))
    parser.add_argument("--lr", type=float, default=LR, help=f"of all transfers (default: {LR:g})")
    parser.add_argument("--tune", type=float, nargs="+", metavar="LR", help="try learning rates on training rows only")
    args = pages.parsed(parser, argv)
    bench = Bench(args, seeds=SEEDS)
    if args.tune:
        return bench.tune(args.tune)
    for name in args.names:
        {"shorter_stage1": write_shorter, "transfer_examples": write_examples, "repeatability": write_repeatability}[
            name
        ](bench)
    return 0


def run_shorter(bench: Bench) -> Results:
    """Stage 1 skipped, a tenth of it, and whole, then the same transfer."""
    results, n_seeds = bench.results("shorter_stage1"), bench.seeds("shorter_stage1")
    for seed in range(n_seeds):
        for length, share in LENGTHS.items():
            for task in TASKS:
                key = f"{length} {task} {seed}"
                if key not in results:
                    model = bench.taught(share, seed)
                    results[key] = bench.transfer(model, task, bench.one_size, drawn=seed, order=seed)
                    print(f"{key}: {results[key]}", file=sys.stderr, flush=True)
    return results


def write_shorter(bench: Bench) -> None:
    results, n_seeds = run_shorter(bench), bench.seeds("shorter_stage1")
    right = {
        task: {length: [results[f"{length} {task} {seed}"]["right"] for seed in range(n_seeds)] for length in LENGTHS}
        for task in TASKS
    }
    both = {
        length: [statistics.mean(right[task][length][seed] for task in TASKS) for seed in range(n_seeds)]
        for length in LENGTHS
    }
    rows = [
        [length, *(pages.cell(right[task][length]) for task in TASKS), pages.cell(both[length])] for length in LENGTHS
    ]
    floor = statistics.mean(bench.levels.values())
    rows.append(["*the commonest answer*", *(f"{bench.levels[task]:.3f}" for task in TASKS), f"{floor:.3f}"])
    out = bench.args.out
    pages.draw_arms(out / "shorter_stage1.png", both, "held-out answers right after the transfer", floor)
    reported = {"no stage 1": "lower", "10 times shorter": "slightly lower"}
    against = dict.fromkeys(reported, "whole stage 1")
    compared = [pages.compare(both, against, reported, "right answers, mean of both tasks", SOURCE)]
    compared += [pages.compare(right[task], against, {}, f"*{task}* alone", SOURCE) for task in TASKS]
    last = {"10 times shorter": "no stage 1"}
    compared.append(pages.compare(both, last, {}, "a short stage 1 and none, mean of both tasks", SOURCE))
    pages.page(
        out,
        "shorter_stage1",
        f"""# Study: stage 1 skipped, shortened, whole

Is it worth to teach image tower and decoder together before a task of one's own? Both come from stage 0; stage 1 is
left out, a tenth as long, or whole; then each model learns a task that stage 1 never asks
from {bench.one_size} examples:
{questions()}.

{pages.table(["", *TASKS, "both"], rows)}
Share of held-out answers right, mean ± half a 95 % interval of {n_seeds} seeds, which give the order of stage 1, the
examples of the transfer and their order.

![Right answers by length of stage 1](shorter_stage1.png)

{(2 * chr(10)).join(compared)}

An interval that holds 0 does not show that two are equal; several comparisons are not corrected for.

The report shortens from a billion examples to 100 million and sees little harm on most tasks, more the shorter it gets,
and most without stage 1. {bench.told()}

Repeat it: `{pages.repeat(bench.args, "transfers.py", "shorter_stage1")}`.""",
    )


def run_examples(bench: Bench) -> Results:
    """16 to 1,024 examples of each task, from the same stage 1."""
    results, n_seeds = bench.results("transfer_examples"), bench.seeds("transfer_examples")
    model = bench.taught(1.0, 0)
    for seed in range(n_seeds):
        for task in TASKS:
            for n in bench.numbers:
                key = f"{task} {n} {seed}"
                if key not in results:
                    results[key] = bench.transfer(model, task, n, drawn=seed, order=seed)
                    print(f"{key}: {results[key]}", file=sys.stderr, flush=True)
    return results


def write_examples(bench: Bench) -> None:
    results, n_seeds = run_examples(bench), bench.seeds("transfer_examples")
    right = {
        task: {n: [results[f"{task} {n} {seed}"]["right"] for seed in range(n_seeds)] for n in bench.numbers}
        for task in TASKS
    }
    rows = [[task, *(pages.cell(right[task][n]) for n in bench.numbers), f"{bench.levels[task]:.3f}"] for task in TASKS]
    out = bench.args.out
    curves = {task: dict(points) for task, points in right.items()}
    pages.draw_curves(
        out / "transfer_examples.png", curves, "examples", "held-out answers right", bench.levels
    )  # fmt: skip
    last = bench.numbers[-1]
    lines = []
    for task in TASKS:
        lower = [n for n in bench.numbers if pages.change(right[task][last], right[task][n])[0] == "lower"]
        enough = bench.numbers[bench.numbers.index(lower[-1]) + 1] if lower else bench.numbers[0]
        best = statistics.mean(right[task][last]) - bench.levels[task]
        if best <= 0:
            lines.append(f"- {task}: nothing is learned that the commonest answer does not have.")
            continue
        gains = {n: (statistics.mean(right[task][n]) - bench.levels[task]) / best for n in bench.numbers[:-1]}
        told = ", ".join(f"{n:,} bring {f'{gain:.0%}' if gain > 0 else 'nothing'}" for n, gain in gains.items())
        of_full = {n: statistics.mean(right[task][n]) / statistics.mean(right[task][last]) for n in bench.numbers[:-1]}
        near = [next((f"{n:,}" for n, share in of_full.items() if share >= least), f"{last:,}") for least in (0.8, 0.9)]
        line = f"- {task}: of what {last:,} examples bring over the commonest answer, {told}. "
        if enough < last:
            line += f"From {enough:,} on no difference to {last:,} is seen. "
        lines.append(line + f"Within 20 % of the score of {last:,} from {near[0]} on, within 10 % from {near[1]} on.")
    pages.page(
        out,
        "transfer_examples",
        f"""# Study: how many examples a transfer needs

One small model after stage 1 learns two tasks that it was never asked, from few examples and from many:
{questions()}.

{pages.table(["", *(f"{n:,}" for n in bench.numbers), "commonest answer"], rows)}
Share of held-out answers right, mean ± half a 95 % interval of {n_seeds} seeds, which give the examples and their
order; the stage 1 before is the same.

![Right answers by examples](transfer_examples.png)

{chr(10).join(lines)}

The report (section 6.3) sees most tasks within 10 % of their full score with 4,096 examples and within 20 % with 256,
best of several settings, after a billion examples of stage 1; these are one setting after
{bench.sizes.steps * bench.sizes.n_images:,} pictures, and {last:,} examples are not a full data set: the numbers cannot
be compared. {bench.told()}

Repeat it: `{pages.repeat(bench.args, "transfers.py", "transfer_examples")}`.""",
    )


def write_repeatability(bench: Bench) -> None:
    """Standard deviations by what is drawn anew; and nothing drawn anew gives the same bits."""
    drawn, whole = run_examples(bench), run_shorter(bench)
    n, n_seeds = bench.one_size, bench.seeds("repeatability")
    results, model = bench.results("repeatability"), bench.taught(1.0, 0)
    for seed in range(n_seeds):
        for task in TASKS:
            key = f"{task} {n} order {seed}"
            if key not in results:
                results[key] = bench.transfer(model, task, n, drawn=0, order=seed)
                print(f"{key}: {results[key]}", file=sys.stderr, flush=True)
    if "same bits" not in results:
        results["same bits"] = same_bits(bench, model)
    bits = results["same bits"]
    kinds = {
        "order of the examples": {t: [results[f"{t} {n} order {s}"]["right"] for s in range(n_seeds)] for t in TASKS},
        "examples and their order": {
            t: [drawn[f"{t} {n} {s}"]["right"] for s in range(bench.seeds("transfer_examples"))] for t in TASKS
        },
        "stage 1, examples, order": {
            t: [whole[f"whole stage 1 {t} {s}"]["right"] for s in range(bench.seeds("shorter_stage1"))] for t in TASKS
        },
    }
    rows = [
        [what, *(f"{statistics.mean(by[t]):.3f}, {spread(by[t])}" for t in TASKS), str(len(by[TASKS[0]]))]
        for what, by in kinds.items()
    ]
    by_number = [
        [task, *(spread([drawn[f"{task} {m} {s}"]["right"] for s in range(bench.seeds("transfer_examples"))])
                 for m in bench.numbers)]
        for task in TASKS
    ]  # fmt: skip
    out = bench.args.out
    flat = {
        f"{task}: {what}": numbers for task in TASKS for what, numbers in ((w, by[task]) for w, by in kinds.items())
    }
    pages.draw_arms(out / "repeatability.png", flat, f"held-out answers right after {n} examples")
    means = [statistics.mean(kinds["order of the examples"][task]) for task in TASKS]
    sampling = statistics.mean((mean * (1 - mean) / bench.sizes.transfer_held_out) ** 0.5 for mean in means)
    agreement = _agreement(kinds)
    verdict = {True: "the same weights, bit by bit", False: "other weights"}
    pages.page(
        out,
        "repeatability",
        f"""# Study: how far chance carries a result

What is drawn anew between runs, and the standard deviation of the share of right answers that comes of it, after
{n} examples:

{pages.table(["drawn anew", *(f"{task}: mean, deviation" for task in TASKS), "runs"], rows)}
By number of examples, examples and their order drawn anew:

{pages.table(["deviation", *(f"{m:,}" for m in bench.numbers)], by_number)}
![Right answers by what is drawn anew](repeatability.png)

Nothing drawn anew: two transfers with one seed give {verdict[bits["transfer"]]}; two short stages 1 give
{verdict[bits["stage 1"]]} ({bits["threads"]} threads, one machine).

In brackets: the 95 % interval of a deviation, from few runs a wide one. A held-out set of
{bench.sizes.transfer_held_out} other questions alone would move a share by about {sampling:.3f}; here it is fixed,
so that is no part of these deviations.

{agreement}

The report finds deviations below half a point (0.005) on most transfers, over five seeds and over three stages 1 of
100 million examples (section 6.1, figure 11), on sets much larger than these; from few examples it finds large ones.
{bench.told()}

Repeat it: `{pages.repeat(bench.args, "transfers.py", "repeatability")}`.""",
    )


def _agreement(kinds: dict[str, dict[str, list[float]]]) -> str:
    """Whether deviations are as small as the report's."""
    lines = []
    for what, by in kinds.items():
        found = [statistics.stdev(numbers) if len(numbers) > 1 else math.nan for numbers in by.values()]
        if all(value < REPORTED for value in found):
            said = "below"
        else:
            said = "above" if all(value >= REPORTED for value in found) else "partly below, partly above"
        lines.append(
            f"- {what}: {said} the report's half a point" + ("" if said == "below" else ", on far smaller sets")
        )
    return "\n".join(lines)


def same_bits(bench: Bench, model: Path) -> dict[str, Any]:
    """Whether a transfer, and a tenth of stage 1, give the same weights twice."""
    n = bench.one_size
    twice = [bench.transfer(model, TASKS[0], n, drawn=0, order=0)["weights"] for _ in range(2)]
    again = []
    for _ in range(2):
        pg = opened(bench.stage0(), bench.args.torch_device)
        steps = max(1, bench.sizes.steps // 10)
        stage1(pg, stage1_pool(bench.args.work, bench.sizes), Arm(), bench.sizes, seed=0, steps=steps)
        again.append(print_of(pg.model))
    return {"transfer": len(set(twice)) == 1, "stage 1": len(set(again)) == 1, "threads": torch.get_num_threads()}


def spread(values: Sequence[float]) -> str:
    """A standard deviation with its 95 % interval by chi-square."""
    if len(values) < 2:
        return "one run"
    deviation, free = statistics.stdev(values), len(values) - 1
    low, high = (deviation * (free / stats.chi2.ppf(q, free)) ** 0.5 for q in (0.975, 0.025))
    return f"{deviation:.3f} ({low:.3f} … {high:.3f})"


def questions() -> str:
    return "; ".join(f"*{task}*, `{prompt}`" for task, prompt in PROMPTS.items())


if __name__ == "__main__":
    sys.exit(main())
