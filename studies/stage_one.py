#!/usr/bin/env python
"""What stage 1 needs: which mask (mask_form), and which parts that bring what they know and learn (frozen_parts).

    python studies/stage_one.py                    # 24 runs; goes on where it stopped; pages in docs/studies
    python studies/stage_one.py mask_form --seeds 5

The `study` preset, a million parameters at 84 pixels. Every arm starts from the same stage 0, a SigLIP and a Gemma that
were taught apart, and sees the same pictures of the plain world once; a seed gives their order. See helpers/small.py.
"""

import sys
from collections.abc import Sequence

import torch
from helpers.arms import Case, Study
from helpers.arms import main as arms_main
from helpers.small import FORMS, Arm

from paligemma.models.init import init_decoder, init_tower
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.recipes.tiny.patches import place_rows, position_waves


def reset_tower(model: PaliGemmaModel, seed: int) -> None:
    """As it was before stage 0: position embeddings begin as waves there as well."""
    init_tower(model.vision, torch.Generator(model.projector.weight.device).manual_seed(seed))
    position_waves(model.vision)


@torch.no_grad()
def reset_decoder(model: PaliGemmaModel, seed: int) -> None:
    """Rows of location tokens begin as waves of the coordinate, as they do without a reset."""
    init_decoder(model.text, torch.Generator(model.projector.weight.device).manual_seed(seed))
    table, tokens = model.text.embedding.weight, model.config.tokens
    rows = place_rows(tokens.n_loc, table.shape[1]).to(table) * table[: tokens.loc_start].norm(dim=1).mean()
    table[tokens.loc_start : tokens.loc_start + tokens.n_loc] = rows


STUDIES = {
    "mask_form": Study(
        text="""# Study: who may see whom in stage 1

PaliGemma lets image and prompt see each other whole and hides only the answer from what comes before it (prefix-LM).
Here stage 1 of a small model is run with that mask, with a prompt that is read from left to right as well, and with
image tokens in raster order on top of that; each model is judged with the mask that it learned with.""",
        cases={form: Case(arm=Arm(form=form)) for form in FORMS},
        reported={"causal on the text": "lower", "causal everywhere": "lower"},
    ),
    "frozen_parts": Study(
        text="""# Study: frozen and reset parts in stage 1

Everything learns in PaliGemma's stage 1. Here the image tower or the whole decoder, its table included, is kept as
stage 0 left it, or begins at random instead, as before stage 0.""",
        cases={
            "all parts learn": Case(),
            "image tower frozen": Case(arm=Arm(frozen=("vision",))),
            "decoder frozen": Case(arm=Arm(frozen=("text",))),
            "image tower reset": Case(arm=Arm(change=reset_tower)),
            "decoder reset": Case(arm=Arm(change=reset_decoder)),
        },
        reported={
            "image tower frozen": "the same", "decoder frozen": "lower", "image tower reset": "lower",
            "decoder reset": "lower",
        },
        remark="""The report judged after transfers and at thousands of times the size; this is stage 1 alone. There a
tower that learns, says the report, is better in what asks for places: compare the misses.""",
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return arms_main(STUDIES, __doc__, "stage_one.py", argv)


if __name__ == "__main__":
    sys.exit(main())
