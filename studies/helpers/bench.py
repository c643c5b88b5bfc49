"""Transfers of the studies: two tasks that stage 1 never asks, each learned in the simple way, and judged."""

import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers import pages
from helpers.pictures import PROMPTS, Pool, Rows, Sizes, commonest, stage1_pool, transfer_pools
from helpers.small import (
    Arm,
    Exam,
    exam_of,
    judge,
    learn,
    n_parameters,
    opened,
    print_of,
    save,
    stage0,
    stage0_print,
    stage1,
)
from helpers.study import Results, subset
from paligemma.config import PaliGemmaConfig
from paligemma.presets import STUDY

TASKS = tuple(PROMPTS)
N_EXAMPLES = (16, 64, 256, 1024)
LENGTHS = {"no stage 1": 0.0, "10 times shorter": 0.1, "whole stage 1": 1.0}  # share of the steps
BATCH, LR = 32, 3e-4
POOL = 4  # times the most examples: seeds draw others, of the most as well


def n_steps(n: int) -> int:
    """Steps of a transfer: more passes over few examples, as many as a schedule needs to come down."""
    return max(30, min(240, round(12 * n**0.5)))


class Bench:
    """Data, exams and models that all three studies use."""

    def __init__(self, args: Any, config: PaliGemmaConfig = STUDY, seeds: Mapping[str, int] | None = None) -> None:
        self.args, self.sizes, self.config, self._seeds = args, args.sizes, config, seeds or {}
        self.simple = Arm(kind="adam", lr=getattr(args, "lr", LR), cosine=True)
        self.numbers = tuple(4 * i for i in range(1, 3)) if args.quick else N_EXAMPLES
        self.one_size = self.numbers[-2]
        base = opened(self.stage0(), args.torch_device)
        self.n_parameters = n_parameters(base.model)
        self.pools: dict[str, tuple[Pool, Pool]] = {}
        self.exams: dict[str, Exam] = {}
        for task in TASKS:
            self.pools[task] = transfer_pools(args.work, task, POOL * self.numbers[-1], self.sizes)
            self.exams[task] = exam_of(self.pools[task][1], base)
        self.levels = {task: commonest(*self.pools[task])[task] for task in TASKS}

    def seeds(self, name: str) -> int:
        """How often a study runs everything."""
        return self.args.seeds or (2 if self.args.quick else self._seeds[name])

    def stage0(self) -> Path:
        return stage0(self.args.work, self.sizes, self.args.torch_device, config=self.config)

    def results(self, name: str) -> Results:
        about = {
            "steps": self.sizes.steps, "n_images": self.sizes.n_images, "held_out": self.sizes.transfer_held_out,
            "lr": self.simple.lr, "pool": POOL * self.numbers[-1], "threads": torch.get_num_threads(),
            "stage 0": stage0_print(self.args.work, self.sizes, self.args.torch_device), "asked": PROMPTS,
        }  # fmt: skip
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
        self, model: Path, task: str, n: int, *, drawn: int, order: int, arm: Arm | None = None, longer: float = 1.0,
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
        learn(pg, learned, arm or self.simple, steps=steps, batch_size=batch, seed=order, shuffle=True)
        found = judge(pg, self.exams[task])
        chosen_by = {} if kept is None else {"chosen_by": judge(pg, kept)["exact"][task]}
        return {"right": found["exact"][task], "loss": found["loss"], "weights": print_of(pg.model), **chosen_by,
                "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip

    def tune(self, rates: Sequence[float]) -> int:
        """Right answers on training rows held out for that, by learning rate, with stage 1 and without; seed 100."""
        for share, task, rate in product((1.0, 0.0), TASKS, rates):
            arm = Arm(kind="adam", lr=rate, cosine=True)
            model = self.taught(share, 0)
            found = self.transfer(model, task, self.one_size, drawn=100, order=100, arm=arm, held=True)
            print(f"stage 1 × {share:g}, {task}, lr {rate:g}: {found['chosen_by']:.3f} right", flush=True)
        return 0

    def told(self, rate: str | None = None, *, held: bool = False) -> str:
        """Sizes and numbers.

        Args:
            rate: words for the learning rate; None: the one rate of all.
            held: whether a quarter of the pool was kept to choose by, as in `transfer`.
        """
        rate = rate or f"at {self.simple.lr:g} (chosen on training rows held out for that, one rate for everything)"
        sizes: Sizes = self.sizes
        steps = ", ".join(f"{n_steps(n)} for {n:,}" for n in self.numbers)
        pool = POOL * self.numbers[-1] * (3 if held else 4) // 4
        return (
            f"The `study` preset, {self.n_parameters:,} parameters, 84 pixels; stage 1: {sizes.steps} steps of "
            f"{sizes.n_images} pictures, none of which a transfer sees again. Transfers: all weights, Adam {rate}, "
            f"cosine, 5 % warm-up, batches of {BATCH} at most, from a pool of {pool:,}; steps by "
            f"examples: {steps}. Judged by {sizes.transfer_held_out} held-out questions a task, exact answers. The "
            "commonest answer alone: " + ", ".join(f"{task} {level:.3f}" for task, level in self.levels.items()) + "."
        )
