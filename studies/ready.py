#!/usr/bin/env python
"""Studies that are ready and wait for a machine with a GPU; each is a page like those of stage_one.py.

    python studies/ready.py NAME --device cuda --steps 4000 --seeds 5 --work runs/studies-gpu --out docs/studies

    prefix_loss      loss on the prompt as well, or on the answer alone
    projector        linear against a hidden layer, all learning and all else frozen
    no_tower         raw patches in place of the image tower, at three lengths of stage 1
    new_tokens       how rows of new tokens begin: noise, the mean of all others, zeros, waves of the coordinate
    resolution       84 pixels, 168, and 168 that were 84 before: more detail, or more tokens?
    simple_setting   what tuning every number of a transfer brings over the simple setting
    lr_by_width      the best learning rate of a transfer, by width of the decoder

What the package has no part for (a hidden layer, no tower) is put into the model here.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from helpers import pages
from helpers.arms import Case, Study
from helpers.arms import run as run_arms
from helpers.arms import write as write_arms
from helpers.bench import TASKS, Bench
from helpers.small import Arm
from torch import Tensor, nn

from paligemma.config import PaliGemmaConfig
from paligemma.models.init import init_tower
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.presets import STUDY
from paligemma.processing.batch import Batch
from paligemma.recipes.tiny.patches import position_waves

HIGH = dataclasses.replace(STUDY, vision=dataclasses.replace(STUDY.vision, resolution=168))
SHARES = {"a quarter": 0.25, "whole": 1.0, "four times": 4.0}
WIDTHS = (64, 96, 144, 192)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def with_prefix(batch: Batch) -> Batch:
    """Every text token is a target but bos, which nothing stands before."""
    text = batch.mask_input & ~batch.mask_image & (batch.tokens != STUDY.tokens.bos)
    return dataclasses.replace(batch, mask_loss=text)


class Hidden(nn.Module):
    """A projector with one hidden layer as wide as the decoder; its last matrix begins at zero, as the linear one."""

    def __init__(self, width_in: int, width_out: int, device: torch.device) -> None:
        super().__init__()
        self.up = nn.Linear(width_in, width_out, device=device)
        self.down = nn.Linear(width_out, width_out, device=device)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    @property
    def weight(self) -> Tensor:
        """For those who ask where the projector lies."""
        return self.down.weight

    def forward(self, x_IPW: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x_IPW), approximate="tanh"))
        return out


def hidden_projector(model: PaliGemmaModel, seed: int) -> None:
    torch.manual_seed(seed)
    config = model.config
    model.projector = Hidden(config.vision.width, config.text.width, model.projector.weight.device)  # type: ignore[assignment]


def raw_patches(model: PaliGemmaModel, seed: int) -> None:
    """No block is left of the tower: a linear map of each patch, its place, and a norm, from nothing."""
    model.vision.blocks = nn.ModuleList()
    init_tower(model.vision, torch.Generator(model.projector.weight.device).manual_seed(seed))
    position_waves(model.vision)


STUDIES = {
    "prefix_loss": Study(
        text="""# Study: loss on the prompt as well

PaliGemma learns from the tokens of the answer alone. Under its mask a prompt sees itself whole, and to predict its
tokens would be to copy them; so the prompt is learned under a mask that reads text from left to right, and beside it
stands that mask with the loss on the answer alone.""",
        cases={
            "prefix-LM, answer": Case(),
            "causal on the text, answer": Case(arm=Arm(form="causal on the text")),
            "causal on the text, prompt and answer": Case(arm=Arm(form="causal on the text", of_batch=with_prefix)),
        },
        reported={"causal on the text, answer": "lower", "causal on the text, prompt and answer": "lower"},
        against={
            "causal on the text, answer": "prefix-LM, answer",
            "causal on the text, prompt and answer": "causal on the text, answer",
        },
    ),
    "projector": Study(
        text="""# Study: a linear projector or a hidden layer

Between image tower and decoder stands one matrix. Here a hidden layer with GELU takes its place, with everything
learning and with everything else frozen.""",
        cases={
            "linear": Case(),
            "hidden layer": Case(arm=Arm(change=hidden_projector)),
            "linear, all else frozen": Case(arm=Arm(frozen=("vision", "text"))),
            "hidden layer, all else frozen": Case(arm=Arm(change=hidden_projector, frozen=("vision", "text"))),
        },
        reported={
            "hidden layer": "the same", "linear, all else frozen": "lower", "hidden layer, all else frozen": "lower"
        },
        against={
            "hidden layer": "linear", "linear, all else frozen": "linear",
            "hidden layer, all else frozen": "linear, all else frozen",
        },
    ),
    "no_tower": Study(
        text="""# Study: no image encoder

The decoder reads patches through one linear map, as in Fuyu, in place of a tower that stage 0 has taught.""",
        cases={
            f"{name}, {length}": Case(arm=arm, share=share)
            for length, share in reversed(SHARES.items())
            for name, arm in (("tower", Arm()), ("raw patches", Arm(change=raw_patches)))
        },
        reported={f"raw patches, {length}": "lower" for length in SHARES},
        against={f"raw patches, {length}": f"tower, {length}" for length in SHARES},
        remark="The report tunes the rate of the model without a tower anew, and sees it rise with the length.",
    ),
    "new_tokens": Study(
        text="""# Study: how the rows of new tokens begin

1,024 location rows and 128 mask rows are new in the decoder's table. They begin as noise of std 0.02, as the mean of
all other rows, as zeros, or (location rows) as waves of the coordinate; compared by the places that are said.""",
        cases={
            f"{init}, {length}": Case(init=init, share=share)
            for length, share in (("whole", 1.0), ("a quarter", 0.25))
            for init in ("normal", "mean", "zeros", "waves")
        },
        reported={"mean, whole": "higher", "mean, a quarter": "lower"},
        against={
            f"{init}, {length}": f"normal, {length}"
            for length in ("whole", "a quarter")
            for init in ("mean", "zeros", "waves")
        },
        measure="places",
        remark="""The report adds noise to the mean; it finds the mean better at first and the noise at the end. The
noise here is one draw, the same in all runs.""",
    ),
    "resolution": Study(
        text="""# Study: more detail, or more tokens?

Twice the side gives four times the image tokens and four times the detail. Pictures that were shrunk to the lower
resolution before give the tokens without the detail.""",
        cases={
            "168 pixels": Case(config=HIGH),
            "168 pixels, shown at 84": Case(config=HIGH, shown=84),
            "84 pixels": Case(),
        },
        reported={"168 pixels, shown at 84": "lower", "84 pixels": "lower"},
        remark="In the report about half of the gain of 448 over 224 comes with the tokens, half with the detail.",
    ),
}  # fmt: skip


def simple_setting(args: Any) -> None:
    """Every transfer with every setting; the best by rows held out of training, judged by others."""
    bench = Bench(args)
    results = bench.results("simple_setting")
    model, n_seeds = bench.taught(1.0, 0), args.seeds or (2 if args.quick else 3)
    grid = list(product((0.3, 1.0, 3.0), (1.0, 3.0), (0.0, 0.1), (0.0, 0.1)))
    grid = [grid[0], (1.0, 1.0, 0.0, 0.0)] if args.quick else grid
    for seed, task, setting in product(range(n_seeds), TASKS, grid):
        key = f"{task} {setting} {seed}"
        if key not in results:
            factor, longer, smoothing, dropout = setting
            rate = factor * bench.simple.lr
            arm = Arm(kind="adam", lr=rate, cosine=True, label_smoothing=smoothing, dropout=dropout)
            results[key] = bench.transfer(
                model, task, bench.one_size, drawn=seed, order=seed, arm=arm, longer=longer, held=True
            )  # fmt: skip
            print(f"{key}: {results[key]}", file=sys.stderr, flush=True)
    rows, values, lines = [], {}, []
    for task in TASKS:
        by = {s: [results[f"{task} {s} {seed}"] for seed in range(n_seeds)] for s in grid}
        best = max(grid, key=lambda s: statistics.mean(run["chosen_by"] for run in by[s]))
        simple, tuned = ([run["right"] for run in by[s]] for s in ((1.0, 1.0, 0.0, 0.0), best))
        values |= {f"{task}, simple": simple, f"{task}, tuned": tuned}
        regret = 1 - statistics.mean(simple) / statistics.mean(tuned) if any(tuned) else 0.0
        told = f"lr × {best[0]:g}, steps × {best[1]:g}, smoothing {best[2]:g}, dropout {best[3]:g}"
        rows.append([task, pages.cell(simple), pages.cell(tuned), f"{regret:.1%}", told])
        lines.append(f"- {task}: tuned against simple, {pages.change(simple, tuned)[1]}")
    pages.draw_arms(args.out / "simple_setting.png", values, "held-out answers right")
    pages.page(
        args.out,
        "simple_setting",
        f"""# Study: what tuning brings over the simple setting

Every transfer is learned from {bench.one_size} examples with {len(grid)} settings: learning rate, steps, label
smoothing and dropout. The best is chosen by training rows that were held out for that, and judged by others.

{pages.table(["", "simple", "tuned", "relative regret", "tuned setting"], rows)}
Share of held-out answers right, mean ± half a 95 % interval of {n_seeds} seeds.

![Simple and tuned](simple_setting.png)

The same seeds paired, mean difference ± half its 95 % interval by Student's t:

{chr(10).join(lines)}

The best setting is chosen by the mean of the same seeds that it is then judged with, on other questions; stage 1 is one
for all. The report (section 6.2, table 2): a relative regret below 2.5 % on 37 tasks, more on tasks that want many
passes. {bench.told(f"at {bench.simple.lr:g} times what the settings say", held=True)}

Repeat it: `{pages.repeat(args, "ready.py", "simple_setting")}`.""",
    )


def of_width(width: int) -> PaliGemmaConfig:
    """The preset with a decoder of another width."""
    text = dataclasses.replace(STUDY.text, width=width, mlp_dim=3 * width)
    return dataclasses.replace(STUDY, text=text)


def lr_by_width(args: Any) -> None:
    """Transfers of models of several widths with several learning rates."""
    widths, rates = (WIDTHS[:1], RATES[:2]) if args.quick else (WIDTHS, RATES)
    n_seeds = args.seeds or (2 if args.quick else 3)
    curves: dict[str, dict[float, list[float]]] = {}
    best: list[list[str]] = []
    for width in widths:
        bench = Bench(args, of_width(width))
        results, model = bench.results("lr_by_width"), bench.taught(1.0, 0)
        for seed, task, rate in product(range(n_seeds), TASKS, rates):
            key = f"{width} {task} {rate:g} {seed}"
            if key not in results:
                arm = Arm(kind="adam", lr=rate, cosine=True)
                results[key] = bench.transfer(
                    model, task, bench.one_size, drawn=seed, order=seed, arm=arm, held=True
                )  # fmt: skip
                print(f"{key}: {results[key]}", file=sys.stderr, flush=True)
        both = partial(_both, results, width, n_seeds)
        curves[f"width {width}"] = {rate: both(rate, "right") for rate in rates}
        winner = [max(rates, key=lambda rate: both(rate, "chosen_by")[seed]) for seed in range(n_seeds)]
        cells = [pages.cell(curves[f"width {width}"][rate]) for rate in rates]
        best.append([f"{width}", f"{bench.n_parameters:,}", *cells, ", ".join(f"{rate:g}" for rate in winner)])
    pages.draw_curves(args.out / "lr_by_width.png", curves, "learning rate", "held-out answers right, both tasks")
    head = ["width", "parameters", *(f"{rate:g}" for rate in rates), "best by seed"]
    pages.page(
        args.out,
        "lr_by_width",
        f"""# Study: the best learning rate by width of the decoder

Decoders of {len(widths)} widths, each taught its text and its stage 1, learn two tasks from {bench.one_size} examples
with {len(rates)} learning rates.

{pages.table(head, best)}
Share of held-out answers right, mean of both tasks, ± half a 95 % interval of {n_seeds} seeds; the best by training
rows that were held out for that. A width has one text lesson and one stage 1, whose luck is in no interval.

![Right answers by learning rate](lr_by_width.png)

The second report (arXiv 2412.03555, section 4.1.2): the larger the decoder, the lower the best rate of a transfer.
{bench.told("with these rates", held=True)}

Repeat it: `{pages.repeat(args, "ready.py", "lr_by_width")}`.""",
    )


def _both(results: Any, width: int, n_seeds: int, rate: float, what: str) -> list[float]:
    """Mean of the tasks, by seed."""
    runs = [[results[f"{width} {task} {rate:g} {seed}"][what] for task in TASKS] for seed in range(n_seeds)]
    return [statistics.mean(values) for values in runs]


OTHERS = {"simple_setting": simple_setting, "lr_by_width": lr_by_width}


def main(argv: Sequence[str] | None = None) -> int:
    args = pages.parsed(pages.parser_of(__doc__, [*STUDIES, *OTHERS]), argv)
    for name in args.names:
        if name in OTHERS:
            OTHERS[name](args)
        else:
            write_arms(args, name, STUDIES[name], run_arms(args, name, STUDIES[name]), "ready.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
