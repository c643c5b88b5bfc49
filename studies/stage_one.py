#!/usr/bin/env python
"""What stage 1 needs: which mask (mask_form), and which parts that bring what they know and learn (frozen_parts).

    python studies/stage_one.py                    # 24 runs; goes on where it stopped; then docs/studies/*.{md,json,png}
    python studies/stage_one.py mask_form --seeds 5

The `study` preset, a million parameters at 84 pixels. Every arm starts from the same stage 0, a SigLIP and a Gemma that
were taught apart, and sees the same pictures of the plain world once; a seed gives their order. See helpers/small.py.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from helpers import pages
from helpers.pictures import ANSWERED, N_QUESTIONS, Sizes, commonest, exam_pool, stage1_pool
from helpers.small import FORMS, STAGE1_LR, Arm, exam_of, judge, n_parameters, opened, stage0, stage1
from helpers.study import Results

from paligemma.models.init import init_decoder, init_tower
from paligemma.models.paligemma import PaliGemmaModel

SOURCE = "the reports' ablations: arXiv 2407.07726, section 5"


def reset_tower(model: PaliGemmaModel, seed: int) -> None:
    init_tower(model.vision, torch.Generator(model.projector.weight.device).manual_seed(seed))


def reset_decoder(model: PaliGemmaModel, seed: int) -> None:
    init_decoder(model.text, torch.Generator(model.projector.weight.device).manual_seed(seed))


MASK_ARMS = {form: Arm(form=form) for form in FORMS}
PART_ARMS = {
    "all parts learn": Arm(),
    "image tower frozen": Arm(frozen=("vision",)),
    "decoder frozen": Arm(frozen=("text",)),
    "image tower reset": Arm(change=reset_tower),
    "decoder reset": Arm(change=reset_decoder),
}
# What the report saw after transfers of a stage 1 of 100 million examples.
MASK_REPORTED = {"causal on the text": "lower", "causal everywhere": "lower"}
PART_REPORTED = {
    "image tower frozen": "the same", "decoder frozen": "lower", "image tower reset": "lower", "decoder reset": "lower",
}  # fmt: skip

MASK_TEXT = """# Study: who may see whom in stage 1

PaliGemma lets image and prompt see each other whole and hides only the answer from what comes before it (prefix-LM).
Here stage 1 of a small model is run with that mask, with a prompt that is read from left to right as well, and with
image tokens in raster order on top of that; each model is judged with the mask that it learned with."""

PARTS_TEXT = """# Study: frozen and reset parts in stage 1

Everything learns in PaliGemma's stage 1. Here the image tower or the whole decoder, its table included, is kept as
stage 0 left it, or begins at random instead."""


def main(argv: Sequence[str] | None = None) -> int:
    studies = {
        "mask_form": (MASK_TEXT, MASK_ARMS, MASK_REPORTED),
        "frozen_parts": (PARTS_TEXT, PART_ARMS, PART_REPORTED),
    }
    args = pages.parse(__doc__, list(studies), argv)
    for name in args.names:
        text, arms, reported = studies[name]
        results = run(args, name, arms)
        write(args, name, text, results, list(arms), reported)
    return 0


def run(args: Any, name: str, arms: dict[str, Arm]) -> Results:
    """Every arm with every seed, those left out that are done."""
    sizes: Sizes = args.sizes
    base = stage0(args.work, sizes, args.torch_device)
    pool, held_out = stage1_pool(args.work, sizes), exam_pool(args.work, sizes)
    results = Results(args.out / f"{name}.json")
    results["_"] = {"commonest": commonest(pool, held_out), "steps": sizes.steps, "n_images": sizes.n_images,
                    "held_out": sizes.held_out, "parameters": n_parameters(opened(base, args.torch_device).model)}  # fmt: skip
    exam = exam_of(held_out, opened(base, args.torch_device))
    for seed in range(args.seeds):
        for arm, how in arms.items():
            key = f"{arm} {seed}"
            if key in results:
                continue
            pg = opened(base, args.torch_device)
            seconds = stage1(pg, pool, how, sizes, seed=seed)
            results[key] = {**judge(pg, exam, how.form), "seconds": round(seconds, 1)}
            print(f"{key}: {results[key]}", file=sys.stderr, flush=True)
    return results


def write(
    args: Any, name: str, text: str, results: Results, arms: Sequence[str], reported: dict[str, str]
) -> None:  # fmt: skip
    """The page of a study of arms."""
    runs = {arm: [results[f"{arm} {seed}"] for seed in range(args.seeds)] for arm in arms}
    about = results["_"]
    level = about["commonest"]
    scores = {arm: [run["score"] for run in found] for arm, found in runs.items()}
    rows = [
        [arm, pages.cell(scores[arm]), *(pages.cell([r["exact"][kind] for r in found], 2) for kind in ANSWERED),
         pages.cell([r["places"] for r in found], 0), pages.cell([r["loss"] for r in found])]
        for arm, found in runs.items()
    ]  # fmt: skip
    floor = sum(level[kind] for kind in ANSWERED) / len(ANSWERED)
    rows.append(["*the commonest answer*", f"{floor:.3f}", *(f"{level[kind]:.2f}" for kind in ANSWERED), "", ""])
    head = ["", "right", *ANSWERED, "places", "loss"]
    pages.draw_arms(args.out / f"{name}.png", scores, "share of held-out answers exactly right", floor)
    seconds = [run["seconds"] for found in runs.values() for run in found]
    pages.page(args.out, name, f"""{text}

{pages.table(head, rows)}
*right*: share of exact answers, mean of the five kinds beside it; *places*: mean miss of a box's side in 1/1024 of the
picture, less is better; *loss*: cross-entropy of an answer's tokens. Mean ± half a 95 % interval of {args.seeds} seeds.

![Right answers by arm]({name}.png)

{pages.compare(scores, arms[0], reported, "share of exact answers", SOURCE)}

The report judged after transfers and at thousands of times the size; this is stage 1 alone. A miss of the intervals at
{args.seeds} seeds does not show that two arms are equal, and no correction is made for several comparisons.

{about["parameters"]:,} parameters, 84 pixels; {about["steps"]} steps of {about["n_images"]} pictures with {N_QUESTIONS}
questions each, Muon at {STAGE1_LR:g}; {about["held_out"]} held-out questions. An answer is right where every token is
the likeliest after the true ones before it, which is when greedy decoding gives it. {sum(seconds) / len(seconds):.0f} s
a run.

Repeat it: `python studies/stage_one.py {name}`.""")


if __name__ == "__main__":
    sys.exit(main())
