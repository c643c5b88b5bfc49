"""Stages 0 to 2 of the embedded models: `tiny` at 112 pixels, `tiny-hi` at 224.

    stage 0   vision.py, words.py: a SigLIP and a Gemma 2 of their own, then `checkpoints.assemble` as for released ones
    stage 1   questions about the picture world at 112 pixels                       -> tiny
    stage 2   the same model at 224 pixels, more to read and to outline             -> tiny-hi

Stages 1 and 2 are `recipes.stages` with other numbers, run by `recipes.transfer`: what a released model is taught by.
"""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paligemma.checkpoints import write
from paligemma.checkpoints.assemble import assemble
from paligemma.checkpoints.rules import TABLE
from paligemma.data.loader import LoaderOptions
from paligemma.presets import TINY
from paligemma.recipes import stages, transfer
from paligemma.recipes.tiny.patches import place_rows
from paligemma.recipes.tiny.rows import MIXTURE, WorldOptions, WorldRows
from paligemma.recipes.transfer import TransferRecipe, TransferResult
from paligemma.train.coordinates import coordinate_loss
from paligemma.train.loop import FitOptions
from paligemma.train.optim import OptimOptions
from paligemma.train.schedule import Duration, Schedule

N_QUESTIONS = 5  # of a picture
# At 224 pixels a letter is two patches: reading can be taught, and finer edges.
HI_MIXTURE = {**MIXTURE, "ocr": 0.3, "detect_text": 0.05, "segment": 0.2, "count": 0.1, "left": 0.1}
# Texts stand in the pictures of all kinds alone.
HI_WORLD: dict[str, Any] = {"plain_share": 0.15, "many_share": 0.2, "everything_share": 0.4}


@dataclass(frozen=True, kw_only=True)
class TinyOptions:
    """One stage of a small model.

    Attributes:
        steps: updates; n_images: pictures of each, `N_QUESTIONS` asked of every one.
        lr: of the matrices (Muon) and the rest (Adam).
        simple_steps: first of them that ask only what one thing answers, on plain pictures.
        sigma: width in bins of 1/1024 of the curve by which places are learned; loc_step: bins between places.
        cooldown: share of the run, at its end, over which the learning rate falls to nothing.
        seed: 0 draws the pictures that stage 1 draws; stage 2 takes another.
    """

    steps: int
    n_images: int = 32
    lr: float = 1.5e-3
    simple_steps: int = 0
    sigma: float = 6.0
    loc_step: int = 8
    warmup_steps: int = 100
    cooldown: float = 0.35
    compile: bool = False
    workers: int = 1
    seed: int = 0


def stage0(work: Path, *, seed: int = 0) -> Path:
    """Both raw parts put together, tokenizer and mask codes beside: the folder that stage 1 starts from.

    Rows of location tokens start as waves of the coordinate, slow ones strongest, in place of noise: neighbours begin
    alike. A released model meets a billion examples and can find that out; from noise, `tiny` had not after an hour.
    """
    out = work / "stage0"
    if not (out / "config.json").exists():
        config, parts = assemble(work / "siglip", work / "gemma", preset="tiny", seed=seed)
        with parts:
            tensors = {name: parts.get_as(name, torch.float32) for name in parts}
        table, first = tensors[TABLE], config.tokens.loc_start
        norm = table[:first].norm(dim=1).mean()
        table[first : first + config.tokens.n_loc] = place_rows(config.tokens.n_loc, config.text.width) * norm
        write(out, config, tensors, beside=[work / "tokenizer.model", work / "mask_vae.npz"])
    return out


def small_recipe(
    stage: str, model: Path, out: Path, resolution: int, options: TinyOptions, device: str
) -> TransferRecipe:
    """A published stage with the numbers of a small model."""
    n_rows = options.n_images * N_QUESTIONS
    recipe = stages.recipe(
        stage, data="the picture world", model=str(model), out=str(out), config=TINY, resolution=resolution,
        examples=options.steps * n_rows, robust=None,
    )  # fmt: skip
    schedule = Schedule(
        kind="constant", warmup=Duration(steps=options.warmup_steps), cooldown=Duration(percent=options.cooldown)
    )
    return dataclasses.replace(
        recipe,
        lr=options.lr,
        device=device,
        eval_rows=200,
        samples=0,
        eval_every=max(1, options.steps // 4),
        loader=LoaderOptions(
            batch_size=n_rows, shuffle=False, arrange="pack", max_text=176, workers=options.workers, seed=options.seed
        ),
        optim=OptimOptions(kind="muon", lr=options.lr, betas=(0.9, 0.98), schedule=schedule),
        fit=FitOptions(
            steps=options.steps, precision=_precision(device), compile=options.compile, keep=1, seed=options.seed
        ),
    )


def teach(
    stage: str, model: Path, out: Path, resolution: int, options: TinyOptions, *, device: str = "cpu",
    minutes: float | None = None, say: Callable[[str], Any] = print,
) -> TransferResult:  # fmt: skip
    """Run a stage on the picture world, or go on with it.

    Args:
        minutes: stop after this long with the state saved; the same call goes on.
    """
    recipe = small_recipe(stage, model, out, resolution, options, device)
    world = WorldOptions(
        simple_rows=options.simple_steps * recipe.loader.batch_size, loc_step=options.loc_step, seed=options.seed
    )
    if resolution > TINY.vision.resolution:
        world = dataclasses.replace(world, mixture=tuple(HI_MIXTURE.items()), **HI_WORLD)
    train = WorldRows(model, TINY.tokens, world)
    held_out = WorldRows(model, TINY.tokens, dataclasses.replace(world, n_rows=400, simple_rows=0, split="held_out"))
    timer, before = None, signal.getsignal(signal.SIGTERM)
    if minutes is not None:
        # The loop saves on SIGTERM; outside of it nothing is lost by going on for the moment that it takes.
        signal.signal(signal.SIGTERM, lambda *_: None)
        timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        return transfer.run(
            recipe, rows=(train, held_out, "drawn apart"), say=say,
            token_loss=coordinate_loss(TINY.tokens, sigma=options.sigma, step=options.loc_step),
        )  # fmt: skip
    finally:
        if timer is not None:
            timer.cancel()
            signal.signal(signal.SIGTERM, before)


def _precision(device: str) -> Any:
    """bfloat16 where products of it are fast; a CPU without instructions for it computes them one by one."""
    if torch.device(device).type != "cpu":
        return "bfloat16"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
