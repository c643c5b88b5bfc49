"""Studies whose arms are stages 1 that differ in one thing: run all of them with every seed, and write the page."""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from helpers import pages
from helpers.pictures import ANSWERED, N_QUESTIONS, Sizes, commonest, exam_pool, stage1_pool
from helpers.small import STAGE1_LR, Arm, Exam, exam_of, judge, n_parameters, opened, stage0, stage0_print, stage1
from helpers.study import Results
from paligemma.config import PaliGemmaConfig
from paligemma.presets import STUDY

SOURCE = "arXiv 2407.07726, section 5"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage 1 from its beginning.

    Attributes:
        arm: how it learns.
        config: of the model; init: of the rows of new tokens (`small.stage0`).
        shown: side of the pictures before the processor brings them to the model's resolution; None: that resolution.
        share: of the steps; more than 1 goes through the pictures again.
    """

    arm: Arm = field(default_factory=Arm)
    config: PaliGemmaConfig = STUDY
    init: str = "waves"
    shown: int | None = None
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Study:
    """A page.

    Attributes:
        text: title and question.
        cases: by name.
        against: name -> the case that it is compared with; where it is empty, all others with the first.
        reported: name -> what the report found of it beside that case: "higher", "lower" or "the same".
        measure: what is compared: "score", right answers; or "places", misses, of which less is better.
        remark: on what the report did otherwise.
        n_seeds: runs of every case.
    """

    text: str
    cases: Mapping[str, Case]
    reported: Mapping[str, str]
    against: Mapping[str, str] = field(default_factory=dict)
    measure: Literal["score", "places"] = "score"
    remark: str = ""
    n_seeds: int = 3


MEASURES = {
    "score": "share of held-out answers exactly right",
    "places": "mean miss of a box's side, 1/1024 of the picture",
}


def run(args: Any, name: str, study: Study) -> Results:
    """Every case with every seed, those left out that are done."""
    sizes: Sizes = args.sizes
    device: torch.device = args.torch_device
    about = {
        "steps": sizes.steps, "n_images": sizes.n_images, "held_out": sizes.held_out,
        "stage 0": stage0_print(args.work, sizes, device), "threads": torch.get_num_threads(),
    }  # fmt: skip
    results = pages.results_of(args, name, about)
    exams: dict[tuple[int, int], Exam] = {}
    for seed in range(args.seeds or study.n_seeds):
        for title, case in study.cases.items():
            key = f"{title} {seed}"
            if key in results:
                continue
            side = case.shown or case.config.vision.resolution
            pg = opened(stage0(args.work, sizes, device, config=case.config, init=case.init), device)
            steps = max(1, round(case.share * sizes.steps))
            seconds = stage1(pg, stage1_pool(args.work, sizes, side), case.arm, sizes, seed=seed, steps=steps)
            seen = (side, case.config.vision.resolution)
            exams.setdefault(seen, exam_of(exam_pool(args.work, sizes, side), pg))
            found = judge(pg, exams[seen], case.arm.form)
            results[key] = {**found, "parameters": n_parameters(pg.model), "seconds": round(seconds, 1)}
            print(f"{key}: {results[key]}", file=sys.stderr, flush=True)
    return results


def write(args: Any, name: str, study: Study, results: Results, script: str) -> None:
    """The page of a study."""
    n_seeds = args.seeds or study.n_seeds
    runs = {title: [results[f"{title} {seed}"] for seed in range(n_seeds)] for title in study.cases}
    sizes: Sizes = args.sizes
    level = commonest(stage1_pool(args.work, sizes), exam_pool(args.work, sizes))
    floor = sum(level[kind] for kind in ANSWERED) / len(ANSWERED)
    values = {title: [run[study.measure] for run in found] for title, found in runs.items()}
    rows = [row_of(title, found) for title, found in runs.items()]
    rows.append(["*the commonest answer*", f"{floor:.3f}", *(f"{level[kind]:.2f}" for kind in ANSWERED), "", ""])
    first, *others = study.cases
    is_score = study.measure == "score"
    pages.draw_arms(args.out / f"{name}.png", values, MEASURES[study.measure], floor if is_score else None)
    every = [run for found in runs.values() for run in found]
    counts = sorted({run["parameters"] for run in every})
    told = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    compared = pages.compare(
        values, study.against or dict.fromkeys(others, first), study.reported, MEASURES[study.measure], SOURCE,
        digits=3 if is_score else 1,
    )  # fmt: skip
    beside = {"loss": ("loss, less is better and luck weighs less in it", 3)}
    if is_score:
        beside["places"] = (f"{MEASURES['places']}, less is better", 1)
    also = "\n\n".join(
        pages.compare(
            {title: [run[name] for run in found] for title, found in runs.items()},
            study.against or dict.fromkeys(others, first), {}, what, SOURCE, digits=digits,
        )
        for name, (what, digits) in beside.items()
    )  # fmt: skip
    doubt = (
        ""
        if not _is_lame([run["score"] for run in runs[first]], floor)
        else f"*{first}* is not above the commonest answer: no arm shows anything here.\n\n"
    )
    lame = [kind for kind in ANSWERED if _is_lame([run["exact"][kind] for run in runs[first]], level[kind])]
    if lame and not doubt:
        doubt = f"Nothing is learned of *{', '.join(lame)}* by *{first}* that the commonest answer does not have.\n\n"
    beside_others = ", on one core beside other work" if args.threads == 1 else ""
    pages.page(
        args.out,
        name,
        f"""{study.text}

{pages.table(["", "right", *ANSWERED, "places", "loss"], rows)}
*right*: share of exact answers, mean of the five kinds beside it; *places*: mean miss of a box's side in 1/1024 of the
picture, less is better; *loss*: cross-entropy of an answer's tokens. Mean ± half a 95 % interval of {n_seeds} seeds.

![The runs of every arm]({name}.png)

{doubt}{compared}

{also}

{study.remark or REMARK}
An interval that holds 0 does not show that two arms are equal; several comparisons are not corrected for. A seed gives
the order of the pictures, and what an arm draws after stage 0; an arm's stage 0, the pictures and the held-out
questions are the same in all its runs, so that their luck is in no interval.

The `study` preset, {told} parameters, 84 pixels unless said; {sizes.steps} steps of {sizes.n_images} pictures of the
plain world with {N_QUESTIONS} questions each, Muon at {STAGE1_LR:g}; {sizes.held_out} held-out questions. An answer is
right where every token is the likeliest after the true ones before it, which is when greedy decoding gives it.
{statistics.median(run["seconds"] for run in every):.0f} s a run, the median{beside_others}.

Repeat it: `{pages.repeat(args, script, name)}`.""",
    )


def _is_lame(values: Sequence[float], level: float) -> bool:
    """Whether the interval of the mean holds the level, or lies below it."""
    mean, half = pages.interval(values)
    return mean - (0.0 if math.isnan(half) else half) <= level


REMARK = "The report judged after transfers and at thousands of times the size; this is stage 1 alone."


def row_of(title: str, found: Sequence[dict[str, Any]]) -> list[str]:
    return [
        title,
        pages.cell([run["score"] for run in found]),
        *(pages.cell([run["exact"][kind] for run in found], 2) for kind in ANSWERED),
        pages.cell([run["places"] for run in found], 0),
        pages.cell([run["loss"] for run in found]),
    ]


def main(studies: Mapping[str, Study], doc: str | None, script: str, argv: Sequence[str] | None) -> int:
    """The command of a script whose studies are all of this kind."""
    args = pages.parsed(pages.parser_of(doc, list(studies)), argv)
    for name in args.names:
        write(args, name, studies[name], run(args, name, studies[name]), script)
    return 0
