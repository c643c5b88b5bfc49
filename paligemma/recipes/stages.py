"""Stages 1 and 2 and the mix, as recipes: every number with its source, or said to be ours.

    stage0       raw SigLIP and raw Gemma put together                          checkpoints/assemble.py
    stage1       multimodal: everything learns, the image tower slowly          224 px, 128 tokens, 1 billion examples
    stage2_448   more pixels, longer texts                                      448 px, 512 tokens, 50 million
    stage2_896                                                                  896 px, 512 tokens, 10 million
    transfer     one task                                                       recipes/transfer.py, recipes/transfers/
    mix          many tasks at once, to be asked without a transfer             224 or 448 px, 10 passes

A stage is a transfer with other numbers: `recipe("stage1", data="mixture.yaml", model="stage0/", out="runs/stage1")`
gives a `TransferRecipe`, and `transfer.run` carries it out: resumable, on any number of processes.

Sources: PG1 = PaliGemma report (arXiv 2407.07726) section 3.2 and appendix; PG2 = arXiv 2412.03555 section 3.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paligemma.config import PaliGemmaConfig
from paligemma.data.augment import AugmentOptions
from paligemma.data.loader import LoaderOptions
from paligemma.data.robust import RobustOptions, crop_options
from paligemma.errors import OptionError, nearest
from paligemma.recipes.start import config_of, published
from paligemma.recipes.transfer import TransferRecipe
from paligemma.train.optim import OptimOptions
from paligemma.train.schedule import Duration, Schedule

SCHEDULES = ("rsqrt", "cosine")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of pre-training.

    Attributes:
        resolution: side of the pictures.
        examples: seen in the stage; None: `epochs` passes over the data.
        seen_before: examples of the stages before it: the learning rate goes on where they left it.
        text_length: text tokens that the model sees of an example; short_text_length: at 224 pixels, where it differs.
        batch_size: examples per update.
        lr: learning rate by size; a size that is not listed takes that of "3b".
        schedule: "rsqrt", one curve over all stages, or "cosine", one that ends with the stage, after 5 % of warm-up.
        timescale: examples over which the reciprocal square root falls to 0.7.
        warmup: examples over which everything ramps up; image_ramp: over which the image tower does.
        warmup_before, image_ramp_before: of the first stage; its curves count from there, so `seen_before` is no less.
        attn_logits_softcap, final_logits_softcap: of generation 2; None is off. Generation 1 has neither.
        reweight: (task, factor) pairs: sources of a mixture that are drawn so much more often than in stage 1.
        robust: the distortions of pictures, their slight crop included; None for none.
    """

    resolution: int
    examples: int | None = None
    epochs: float = 1.0
    seen_before: int = 0
    text_length: int = 128
    short_text_length: int | None = None
    batch_size: int = 8192
    lr: dict[str, float] = dataclasses.field(default_factory=dict)
    schedule: str = "rsqrt"
    timescale: int = 10_000 * 8192
    warmup: int = 0
    image_ramp: int = 0
    warmup_before: int = 0
    image_ramp_before: int = 0
    attn_logits_softcap: float | None = 50.0
    final_logits_softcap: float | None = 30.0
    reweight: tuple[tuple[str, float], ...] = ()
    robust: RobustOptions | None = dataclasses.field(default_factory=RobustOptions)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            hint = nearest(self.schedule, SCHEDULES)
            raise OptionError(f"schedule={self.schedule!r}: expected one of {', '.join(SCHEDULES)}.{hint}")
        for name in ("warmup_before", "image_ramp_before"):
            ramp = getattr(self, name)
            if self.seen_before and ramp > self.seen_before:
                raise OptionError(
                    f"seen_before={self.seen_before} and {name}={ramp}: expected a ramp that is over by then. Give the "
                    f"{name.removesuffix('_before')} of the first stage, such as {name}={self.seen_before // 10}."
                )
        for name in ("resolution", "text_length", "batch_size", "timescale"):
            if (value := getattr(self, name)) < 1:
                raise OptionError(f"{name}={value}: expected 1 or more.")
        for name in ("attn_logits_softcap", "final_logits_softcap"):
            if (cap := getattr(self, name)) is not None and cap <= 0:
                raise OptionError(f"{name}={cap}: expected more than 0, or none for no cap.")


# PG1 section 3.2: 2e-5; PG2 section 3: half of that for 3B, a quarter for 10B and 28B.
PRETRAIN_LR = {"paligemma-3b": 2e-5, "3b": 1e-5, "10b": 5e-6, "28b": 5e-6}
# The batch, the time scale and the two ramps are not published: 8,192 examples, big_vision's default of 10,000
# updates (of so many examples), ten million examples for all and a hundred million for the image tower ("slow linear
# warm-up") are ours.
# Stage 2 draws reading, detection and segmentation far more often (PG1 section 3.2.3); the factor is ours.
UP_WEIGHTED = tuple((task, 3.0) for task in ("ocr", "ocr_boxes", "detect", "detect_noise", "segment", "referring"))
STAGES: dict[str, Stage] = {
    "stage1": Stage(
        resolution=224, examples=1_000_000_000, text_length=128, lr=PRETRAIN_LR, warmup=10_000_000,
        image_ramp=100_000_000,
    ),
    "stage2_448": Stage(
        reweight=UP_WEIGHTED,
        resolution=448, examples=50_000_000, seen_before=1_000_000_000, text_length=512, lr=PRETRAIN_LR,
        warmup_before=10_000_000, image_ramp_before=100_000_000,
    ),
    "stage2_896": Stage(
        reweight=UP_WEIGHTED,
        resolution=896, examples=10_000_000, seen_before=1_050_000_000, text_length=512, lr=PRETRAIN_LR,
        warmup_before=10_000_000, image_ramp_before=100_000_000,
    ),
    # PG1 section 4: 27 transfer sets drawn alike, 10 passes, the simple setting of all transfers. Both hold only for
    # sets of one size: a mixture without weights gives each set 10 passes, one with equal weights draws them alike.
    # Its soft caps are those of transfers: big_vision turns the final one off and keeps the other.
    "mix": Stage(
        resolution=448, epochs=10.0, text_length=512, short_text_length=256, batch_size=256, lr={"3b": 1e-5},
        schedule="cosine", final_logits_softcap=None, robust=None,
    ),
}  # fmt: skip


def recipe(
    name: str, *, data: str, model: str, out: str | None = None, config: PaliGemmaConfig | None = None, **changes: Any
) -> TransferRecipe:
    """A stage as something that `transfer.run` carries out.

    Args:
        name: of `STAGES`.
        data, model, out: as in `TransferRecipe`; out is runs/{name} where it is not given.
        config: of the model; decides the learning rate and whether there are soft caps. None: that of a model on disk
            or of a published name, else PaliGemma 2 3B.
        changes: fields of the stage that shall be otherwise.

    Raises:
        OptionError: no such stage or field.
    """
    if name == "stage0":
        raise OptionError(
            f"stage0 trains nothing, it puts raw parts together: expected one of {', '.join(STAGES)}. "
            "For stage0 use `paligemma checkpoint assemble --vision … --text … --out …`, or `checkpoints.assemble`."
        )
    if name not in STAGES:
        raise OptionError(f"there is no stage {name!r}: expected one of {', '.join(STAGES)}.{nearest(name, STAGES)}")
    known = [f.name for f in dataclasses.fields(Stage)]
    for change in changes:
        if change not in known:
            raise OptionError(f"a stage has no '{change}': expected one of {', '.join(known)}.{nearest(change, known)}")
    stage = dataclasses.replace(STAGES[name], **changes)
    if config is None and (Path(model).exists() or published(model) is not None):
        config = config_of(model)
    size, is_second = _size(config)
    lr = stage.lr.get(size, stage.lr.get("3b", 1e-5))
    text_length = stage.text_length
    if stage.resolution <= 224 and stage.short_text_length is not None and "text_length" not in changes:
        text_length = stage.short_text_length
    choices: tuple[tuple[str, Any], ...] = ()
    if is_second:
        choices = (
            ("attn_logits_softcap", stage.attn_logits_softcap),
            ("final_logits_softcap", stage.final_logits_softcap),
        )
    return TransferRecipe(
        data=data,
        model=model,
        out=out or f"runs/{name}",
        method="full",
        score_before=False,  # it has not been asked anything yet, and would not know where to stop
        resolution=stage.resolution,
        epochs=stage.epochs,
        examples=stage.examples,
        lr=lr,
        choices=choices,
        reweight=stage.reweight,
        robust=stage.robust,
        augmentation=AugmentOptions() if stage.robust is None else crop_options(stage.robust),
        loader=LoaderOptions(batch_size=stage.batch_size, max_text=text_length + 1),
        optim=OptimOptions(
            lr=lr, schedule=_schedule(stage, stage.warmup, stage.warmup_before), schedules=_image_schedule(stage)
        ),
    )


def _schedule(stage: Stage, ramp: int, before: int) -> Schedule:
    if stage.schedule != "rsqrt":
        return Schedule(kind="cosine", warmup=Duration(percent=0.05))
    # All in examples, so that another batch in a later stage changes nothing in the curve. The shift is the stages
    # before less their warm-up, from whose end the curve counts.
    shift = Duration(examples=stage.seen_before - before) if stage.seen_before else 0.0
    warmup = Duration(examples=ramp) if ramp else Duration()
    return Schedule(kind="rsqrt", timescale=Duration(examples=stage.timescale), shift=shift, warmup=warmup)


def _image_schedule(stage: Stage) -> tuple[tuple[str, Schedule | None], ...]:
    if not stage.image_ramp and not stage.image_ramp_before:
        return ()
    return (("vision", _schedule(stage, stage.image_ramp, stage.image_ramp_before)),)


def _size(config: PaliGemmaConfig | None) -> tuple[str, bool]:
    """The size, "paligemma-3b" for all of generation 1; whether it is the second generation."""
    if config is None:
        return "3b", True
    text = config.text
    if not text.post_norms:
        return "paligemma-3b", False
    return {3584: "10b", 4608: "28b"}.get(text.width, "3b"), True
