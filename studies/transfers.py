#!/usr/bin/env python
"""What transfers of a small model need: stage 1 (shorter_stage1), examples (transfer_examples), luck (repeatability).

    python studies/transfers.py                     # 3 stages 1, a hundred short transfers; goes on where it stopped
    python studies/transfers.py transfer_examples --seeds 5
    python studies/transfers.py --tune 3e-4 1e-3 3e-3    # learning rates, on training rows held out for that

Two tasks that stage 1 never asks, each learned by all weights in the simple way (Adam, cosine, 5 % warm-up):

    largest   answer en which shape is the largest?        -> circle
    colours   answer en how many red things?               -> 0, 1, 2, 3

`repeatability` reads what the other two left and runs the transfers that differ in the order of the examples alone.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import pages
from helpers.pictures import PROMPTS, Pool, Rows, Sizes, commonest, stage1_pool, transfer_pools
from helpers.small import Arm, Exam, exam_of, judge, learn, n_parameters, opened, print_of, save, stage0, stage1
from helpers.study import Results, subset
from scipy import stats

from paligemma.config import PaliGemmaConfig
from paligemma.presets import STUDY

TASKS = tuple(PROMPTS)
N_EXAMPLES = (16, 64, 256, 1024)
LENGTHS = {"no stage 1": 0.0, "10 times shorter": 0.1, "whole stage 1": 1.0}  # share of the steps
BATCH, LR = 32, 1e-3
SIMPLE = Arm(kind="adam", lr=LR, cosine=True)
SOURCE = "arXiv 2407.07726, section 5"
SEEDS = {"shorter_stage1": 3, "transfer_examples": 5, "repeatability": 5}


def n_steps(n: int) -> int:
    """Steps of a transfer: more passes over few examples, as many as a schedule needs to come down."""
    return max(30, min(240, round(12 * n**0.5)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = pages.parser_of(__doc__, list(SEEDS))
    parser.add_argument("--tune", type=float, nargs="+", metavar="LR", help="try learning rates on training rows only")
    args = pages.parsed(parser, argv)
    bench = Bench(args)
    if args.tune:
        return bench.tune(args.tune)
    for name in args.names:
        {"shorter_stage1": write_shorter, "transfer_examples": write_examples, "repeatability": write_repeatability}[
            name
        ](bench)
    return 0


class Bench:
    """Data, exams and models that all three studies use."""

    def __init__(self, args: Any, config: PaliGemmaConfig = STUDY) -> None:
        self.args, self.sizes, self.config = args, args.sizes, config
        self.numbers = tuple(4 * i for i in range(1, 3)) if args.quick else N_EXAMPLES
        self.one_size = self.numbers[-2]
        base = opened(self.stage0(), args.torch_device)
        self.n_parameters = n_parameters(base.model)
        self.pools: dict[str, tuple[Pool, Pool]] = {}
        self.exams: dict[str, Exam] = {}
        for task in TASKS:
            self.pools[task] = transfer_pools(args.work, task, self.numbers[-1], self.sizes)
            self.exams[task] = exam_of(self.pools[task][1], base)
        self.levels = {task: commonest(*self.pools[task])[task] for task in TASKS}

    def seeds(self, name: str) -> int:
        return self.args.seeds or (2 if self.args.quick else SEEDS[name])

    def stage0(self) -> Path:
        return stage0(self.args.work, self.sizes, self.args.torch_device, config=self.config)

    def results(self, name: str) -> Results:
        about = {"steps": self.sizes.steps, "n_images": self.sizes.n_images, "held_out": self.sizes.transfer_held_out,
                 "lr": LR}  # fmt: skip
        return pages.results_of(self.args, name, about)

    def taught(self, share: float, seed: int) -> Path:
        """The model after a share of stage 1, kept in the work folder."""
        base = self.stage0()
        steps = round(share * self.sizes.steps) if share in (0, 1) else max(1, round(share * self.sizes.steps))
        folder: Path = self.args.work / f"stage1-{self.config.text.width}-{steps}-{seed}"
        if not steps:
            return base
        if not (folder / "config.json").exists():
            pg = opened(base, self.args.torch_device)
            seconds = stage1(pg, stage1_pool(self.args.work, self.sizes), Arm(), self.sizes, seed=seed, steps=steps)
            print(f"stage 1, {steps} steps, seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)
            save(folder, pg.config, pg.model.state_dict(), self.args.work)
        return folder

    def transfer(
        self, model: Path, task: str, n: int, *, drawn: int, order: int, arm: Arm = SIMPLE, longer: float = 1.0,
        held: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Learn from n examples and be judged.

        Args:
            drawn: seed of which examples; order: seed of their order.
            longer: times the steps.
            held: also judge by the last quarter of the training rows, which is not learned then: to choose numbers by.
        """
        pool, kept = self.pools[task][0], None
        rows = np.arange(len(pool.rows))
        pg = opened(model, self.args.torch_device)
        if held:
            last = rows[len(rows) * 3 // 4 :]
            kept = exam_of(Pool(pool.pixels[last], [pool.rows[i] for i in last]), pg)
            rows = rows[: len(rows) * 3 // 4]
        learned = Rows(pool, subset(rows, n, drawn), 1)
        steps = self.sizes.steps if self.args.quick else round(longer * n_steps(n))
        batch = min(BATCH, len(learned))
        started = time.perf_counter()
        learn(pg, learned, arm, steps=steps, batch_size=batch, seed=order, shuffle=True)
        found = judge(pg, self.exams[task])
        chosen_by = {} if kept is None else {"chosen_by": judge(pg, kept)["exact"][task]}
        return {"right": found["exact"][task], "loss": found["loss"], "weights": print_of(pg.model), **chosen_by,
                "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip

    def tune(self, rates: Sequence[float]) -> int:
        """Right answers on training rows held out for that, by learning rate; seed 100."""
        model = self.taught(1.0, 0)
        for task in TASKS:
            for rate in rates:
                arm = Arm(kind="adam", lr=rate, cosine=True)
                found = self.transfer(model, task, self.one_size, drawn=100, order=100, arm=arm, held=True)
                print(f"{task}, lr {rate:g}: {found['chosen_by']:.3f} right", flush=True)
        return 0

    def told(self, rate: str = f"at {LR:g}") -> str:
        """Sizes and numbers."""
        sizes: Sizes = self.sizes
        steps = ", ".join(f"{n_steps(n)} for {n:,}" for n in self.numbers)
        return (
            f"The `study` preset, {self.n_parameters:,} parameters, 84 pixels; stage 1: {sizes.steps} steps of "
            f"{sizes.n_images} pictures,\nnone of which a transfer sees again. Transfers: all weights, Adam {rate}, "
            f"cosine, 5 % warm-up, batches of {BATCH};\nsteps by examples: {steps}. Judged by "
            f"{sizes.transfer_held_out} held-out questions a task, exact answers. The commonest\nanswer alone: "
            + ", ".join(f"{task} {level:.3f}" for task, level in self.levels.items()) + "."
        )  # fmt: skip


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
    reported = {"no stage 1": "lower", "10 times shorter": "lower"}
    compared = pages.compare(
        both, dict.fromkeys(reported, "whole stage 1"), reported, "right answers, mean of both tasks", SOURCE
    )  # fmt: skip
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

{compared}

The report shortens from a billion examples to 100 million and sees little harm on most tasks, more the shorter it gets,
and most without stage 1. {bench.told()}

Repeat it: `python studies/transfers.py shorter_stage1`.""",
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
        told = ", ".join(f"{n:,} bring {gain:.0%}" for n, gain in gains.items())
        lines.append(
            f"- {task}: of what {last:,} examples bring over the commonest answer, {told}. From {enough:,} on no "
            f"difference to {last:,} is seen."
        )
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
best of several settings, after a billion examples of stage 1; these
are one setting and {bench.sizes.steps * bench.sizes.n_images:,} pictures. {bench.told()}

Repeat it: `python studies/transfers.py transfer_examples`.""",
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

The report finds deviations below half a point (0.005) on most transfers, over five seeds and over three stages 1 of
100 million examples (section 6.1, figure 11), on sets much larger than these; from few examples it finds large ones.
{bench.told()}

Repeat it: `python studies/transfers.py repeatability`.""",
    )


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
