"""`transfer`: from a folder of examples to a tuned, evaluated, loadable model.

    run(TransferRecipe(data="digits/", model="tiny", out="runs/digits"))

The defaults are the simple setting of the reports (PaliGemma, section 4 and appendix J: learning rate 1e-5, cosine with
5 % warm-up, no dropout, label smoothing or weight decay) but for two: batches of 8 in place of 256, for data sets of a
user's size, and the final soft cap of PaliGemma 2 as the checkpoint has it, where the reference takes it off
(`transfers.recipe("simple")` has both as reported). Adapters learn faster and take 2e-4.
"""

import dataclasses
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from paligemma.checkpoints.staging import replace_text
from paligemma.data.augment import Augmented, AugmentOptions
from paligemma.data.loader import Loader, LoaderOptions
from paligemma.data.robust import RobustOptions, robust
from paligemma.data.rows import builders_of
from paligemma.errors import OptionError, TrainingError
from paligemma.evals.folder import FolderReport
from paligemma.models.lora import LoraOptions
from paligemma.processing.processor import Processor
from paligemma.recipes.finish import answers_of, finish
from paligemma.recipes.memory import advising, fits_whole, method_of, strategy_of
from paligemma.recipes.rows import OnSteps, Rows, Weighted, measure, mixture_of, order_of, splits
from paligemma.recipes.samples import N_SAMPLES, Samples
from paligemma.recipes.start import (
    Base,
    Start,
    as_begun,
    base_model,
    data_options,
    open_base,
    rebuilt,
    settled,
    start,
)
from paligemma.recipes.tree import to_tree
from paligemma.train.coordinates import coordinate_loss
from paligemma.train.devices import peak_of
from paligemma.train.hooks import JsonLog, LeftOut, Progress, Validate, rows_left_out
from paligemma.train.lock import alone_in
from paligemma.train.loop import FitOptions, FitResult, Hook, Loss, fit
from paligemma.train.loss import TokenLoss
from paligemma.train.optim import OptimOptions
from paligemma.train.parallel import Strategy, is_sharded, require_strategy
from paligemma.train.ranks import Ranks
from paligemma.train.snapshots import Snapshots
from paligemma.train.trackers import Track, require_trackers, sink_of

Method = Literal["auto", "full", "frozen", "lora", "dora", "qlora"]
Say = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class TransferRecipe:
    """A transfer, every number of it.

    Attributes:
        data: what is learned: a folder or file of any format with a train split, valid and test where there are; or a
            YAML file that names several with their weights (`data/mixing.py`).
        format: of the data; "auto" looks. allow_outside: whether rows may name pictures outside of their folder.
        task: builder that makes prompts of annotations ("detect", "segment", "caption", …; `data/builders`), for data
            that hold boxes and captions and no prompts. task_fields: (name, value) pairs, fields of that builder.
        data_options: (name, value) pairs, options of the format's reader: columns, streaming, split, one_based, …
        form: name of a published transfer (`recipes/transfers`) whose own columns the rows hold, such as "vqav2".
        model: what to start from, as `paligemma.load` takes it.
        resolution: side of the pictures, if another than the checkpoint's: position embeddings are resampled.
        out: folder of the run; an interrupted one goes on there.
        method: "auto" takes the first of full, LoRA and QLoRA that fits the memory at hand, and says so; "frozen"
            trains the decoder, neither image tower nor projector.
        epochs: passes over the training examples; `examples` seen, or `steps`, in their place where given.
        lr: learning rate; None: 1e-5, for adapters 2e-4; of models below 100 million parameters 1e-3 and 3e-3.
        device: as `paligemma.load` takes it.
        base_dtype: of frozen weights below adapters; "auto" is bfloat16 on CUDA, float32 elsewhere. Trained weights are
            float32.
        choices: (name, value) pairs for `paligemma.load`, such as ("final_logits_softcap", None); written into the
            configuration of the result.
        loc_sigma: location tokens are learned from a bell curve of so many bins around the true one
            (`train/coordinates.py`), which takes far fewer examples; 0 is cross-entropy, as in the reports.
        loc_step: places are learned in every n-th location token. The embedded `tiny` says them in every 8th and has no
            use for the others; released models use all.
        task_weights: (task, factor) pairs; factors multiply the loss of the task's rows.
        reweight: (task, factor) pairs: of a mixture, sources of that task or name are drawn so much more often.
        valid_share: of the training rows held out, where the data has no valid split.
        eval_every: steps between validations; None: at the end.
        eval_rows: of the held-out rows, the first so many are asked and scored at the end; score_before: at the
            beginning as well.
        merge: whether an adapter's result is also written as whole weights.
        augmentation: random flips, crops, scales and colours of the training pictures, boxes and masks along; off
            unless asked for.
        robust: the distortions of pre-training (resize kernel, JPEG round trip) on every training picture; None: none.
        recompute: activation checkpointing.
        strategy: of several processes, which torchrun starts: "ddp" keeps the whole model in each, "fsdp" shares
            weights, gradients and moments out; "auto" is ddp where the plan fits one device.
        trackers: "tensorboard", "wandb": besides log.jsonl, which is always written.
        samples: held-out rows whose answers are drawn at every validation; 0 draws none. Not under fsdp.
        lora, optim, loader, fit: of the parts; `fit.steps` and `optim.lr` are set from the fields above.
    """

    data: str
    format: str = "auto"
    allow_outside: bool = False
    task: str | None = None
    task_fields: tuple[tuple[str, Any], ...] = ()
    data_options: tuple[tuple[str, Any], ...] = ()
    form: str | None = None
    model: str = "tiny"
    resolution: int | None = None
    out: str = "runs/transfer"
    method: Method = "auto"
    epochs: float = 10.0
    examples: int | None = None
    steps: int | None = None
    lr: float | None = None
    device: str = "auto"
    base_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    choices: tuple[tuple[str, Any], ...] = ()
    loc_sigma: float = 0.0
    loc_step: int = 1
    task_weights: tuple[tuple[str, float], ...] = ()
    reweight: tuple[tuple[str, float], ...] = ()
    valid_share: float = 0.1
    eval_every: int | None = None
    eval_rows: int = 1000
    score_before: bool = True
    merge: bool = True
    recompute: bool = False
    strategy: Strategy = "auto"
    trackers: tuple[str, ...] = ()
    samples: int = N_SAMPLES
    augmentation: AugmentOptions = field(default_factory=AugmentOptions)
    robust: RobustOptions | None = None
    lora: LoraOptions = field(default_factory=LoraOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    loader: LoaderOptions = field(default_factory=lambda: LoaderOptions(max_text=129))
    fit: FitOptions = field(default_factory=lambda: FitOptions(steps=1))

    def __post_init__(self) -> None:
        if self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise OptionError(f"epochs={self.epochs}, steps={self.steps}: expected more than nothing to learn from.")
        for name in ("examples", "resolution"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise OptionError(f"{name}={value}: expected 1 or more.")
        if self.lr is not None and self.lr <= 0:
            raise OptionError(
                f"lr={self.lr}: expected more than 0. To keep a part as it is: optim.schedules=[[image, none]]."
            )
        if wrong := [f"{name} has {factor}" for name, factor in self.reweight if factor <= 0]:
            raise OptionError(f"reweight: {wrong[0]}: expected a number above 0.")
        if not 0 <= self.valid_share < 1:
            raise OptionError(f"valid_share={self.valid_share}: expected at least 0 and less than 1.")
        if self.loc_step < 1:
            raise OptionError(f"loc_step={self.loc_step}: expected 1 or more.")
        if self.form is not None:
            own = {"task": self.task, "task_fields": self.task_fields, "data_options": self.data_options}
            own["reweight"] = self.reweight
            if unused := [name for name, value in own.items() if value]:
                raise OptionError(
                    f"{unused[0]}={own[unused[0]]!r}: transfer.{self.form} reads JSONL and makes prompts of its own: "
                    "expected none. Leave it out, or use the recipe 'transfer'."
                )
        if self.task:
            builders_of(self.task, dict(self.task_fields))  # a misspelt one is said before anything is read
        require_strategy(self.strategy)
        require_trackers(self.trackers)


@dataclass(frozen=True)
class TransferResult:
    """What a transfer left behind.

    Attributes:
        folder: of the run; model: of the tuned weights; adapter: of the adapter, where one was trained.
        report: scores of the tuned model on the held-out rows; before: of the model it started from.
        finished: False where a signal stopped it; the same call goes on.
    """

    folder: Path
    model: Path | None
    adapter: Path | None
    report: FolderReport | None
    before: FolderReport | None
    finished: bool
    last_loss: float | None = None


def run(
    recipe: TransferRecipe,
    *,
    rows: tuple[Rows, Rows, str] | None = None,
    resume: Literal["auto", "never"] = "auto",
    token_loss: TokenLoss | None = None,
    progress: bool = True,
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
) -> TransferResult:
    """Carry out a transfer, or go on with an interrupted one.

    Args:
        rows: what is learned, what is held out, and where that comes from, in place of `recipe.data`.
        resume: "auto" goes on from the newest sound snapshot in `recipe.out`; "never" refuses a folder that has one.
        token_loss: of single tokens, in place of cross-entropy (`train/coordinates.py` is one).
        progress: draw a bar on stderr.
        say: takes lines for people.

    Raises:
        OptionError, DataError, TrainingError: with what to do.
    """
    if token_loss is not None and recipe.loc_sigma:
        raise OptionError(f"loc_sigma={recipe.loc_sigma} and a token_loss of your own: expected one of them.")
    if token_loss is not None and recipe.fit.label_smoothing:
        raise OptionError(
            f"fit.label_smoothing={recipe.fit.label_smoothing} and a token_loss of your own, which would not smooth: "
            "expected one of them."
        )
    ranks = Ranks.join(recipe.device)
    with alone_in(Path(recipe.out), ranks):
        return _carry_out(recipe, ranks, rows, resume, token_loss, progress, say)


def _carry_out(
    recipe: TransferRecipe,
    ranks: Ranks,
    rows: tuple[Rows, Rows, str] | None,
    resume: Literal["auto", "never"],
    token_loss: TokenLoss | None,
    progress: bool,
    say: Say,
) -> TransferResult:
    folder = Path(recipe.out)
    base = open_base(recipe)
    if recipe.loc_sigma:
        token_loss = coordinate_loss(
            base.config.tokens, sigma=recipe.loc_sigma, step=recipe.loc_step,
            label_smoothing=recipe.fit.label_smoothing,
        )  # fmt: skip
    train, held_out, split = rows or rows_of(recipe, base, say if ranks.is_first else None)
    train = as_learned(recipe, train)
    lengths = measure(train, base.processor, recipe.loader.max_text, skip_broken=recipe.loader.skip_broken)
    was_auto, recipe = recipe.method == "auto", as_begun(recipe, folder)
    method, why = method_of(recipe, base.config, base.device, lengths, ranks)
    if was_auto and recipe.method != "auto":
        why = "as it was begun"
    strategy = strategy_of(recipe, method, base.config, base.device, lengths, ranks)
    if ranks.is_first:
        say(f"{len(train):,} examples to learn, {len(held_out):,} held out ({split}). Method: {method}; {why}.")
        if ranks.world_size > 1:
            say(f"{ranks.world_size} processes, {strategy}")
        if (mixture := mixture_of(train)) is not None:
            say(
                "of them " + ", ".join(f"{n:.1%} {name}" for name, n in zip(mixture.names, mixture.shares, strict=True))
            )
        elif recipe.reweight and rows is None:
            say(f"{recipe.data} is a single source: reweight, which shares out a mixture, changes nothing")
        cut = lengths.told(recipe.loader.max_text)
        cut is not None and say(cut)
    options = dataclasses.replace(settled(recipe, method, len(train), base.device, base.config), strategy=strategy)
    sharded = strategy == "fsdp" and ranks.world_size > 1
    snapshots = Snapshots(folder / "checkpoints", keep=options.fit.keep, ranks=ranks, sharded=sharded)
    snapshot = snapshots.latest(clean=True)
    if snapshot is not None and resume == "never":
        raise TrainingError(f"{folder}: holds a run already: expected a new folder. Resume it, or choose another.")
    before = None
    if recipe.score_before and ranks.is_first and len(held_out) and snapshot is None:
        if sharded and not fits_whole(base.config, base.device, ranks):
            say("the model does not fit one device whole: it is not scored before training")
        else:
            before = first_scores(options, base, held_out, folder, progress)
    with advising(options, base.config, base.device, lengths):
        begun = start(options, base, len(train), token_loss, order=order_of(train), ranks=ranks if sharded else None)
        if snapshot is not None:
            begun.state.restore(snapshot)
            if ranks.is_first:
                say(f"going on from step {begun.state.step}")
        result = _teach(options, begun, train, held_out, snapshots, ranks, progress, say)
    last_loss = None if result.last is None else result.last.loss
    if not result.finished or not ranks.is_first:
        return TransferResult(folder, None, None, None, before, result.finished, last_loss)
    pg = begun.pg
    if sharded:
        del begun, pg
        gc.collect()  # weights and moments of a device make room for the whole model
        if base.device.type == "cuda":
            torch.cuda.empty_cache()
        pg = rebuilt(options, base, len(train), snapshots.read(result.step))
    model, adapter, report = finish(
        options, pg, held_out, folder, before, n_train=len(train), progress=progress, say=say
    )
    return TransferResult(folder, model, adapter, report, before, True, last_loss)


def rows_of(recipe: TransferRecipe, base: Base, say: Say | None = None) -> tuple[Rows, Rows, str]:
    """What a recipe learns and what it holds out.

    Args:
        say: takes what is wrong with whole files, where the recipe passes over it.
    """
    options = data_options(recipe, base)
    skip = recipe.loader.skip_broken
    if recipe.form is None:
        return splits(recipe.data, recipe.valid_share, skip_broken=skip, say=say, **options)
    from paligemma.recipes.transfers import open_rows  # its recipes are made of this file's

    train, held_out, told = open_rows(
        recipe.form, recipe.data, seed=recipe.loader.seed, mask_encoder=options["mask_encoder"],
        resolution=base.config.vision.resolution, valid_share=recipe.valid_share, allow_outside=recipe.allow_outside,
        skip_broken=skip, say=say,
    )  # fmt: skip
    if recipe.augmentation.is_on:
        kept = {name: options[name] for name in ("load", "mask_encoder", "mask_decoder")}
        train = Augmented(train, recipe.augmentation, seed=recipe.loader.seed, **kept)
    return train, held_out, told


def as_learned(recipe: TransferRecipe, train: Rows) -> Rows:
    """Rows with the places and weights that a recipe learns them with."""
    if recipe.loc_step > 1:
        train = OnSteps(train, recipe.loc_step)
    return Weighted(train, recipe.task_weights) if recipe.task_weights else train


def loader_of(recipe: TransferRecipe, train: Rows, processor: Processor, ranks: Ranks | None = None) -> Loader:
    """Steps of what is learned, pictures distorted as the recipe says."""
    distort = None if recipe.robust is None else partial(robust, options=recipe.robust)
    rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
    return Loader(train, processor, recipe.loader, rank, world_size, distort)


def first_scores(options: TransferRecipe, base: Base, held_out: Rows, folder: Path, progress: bool) -> FolderReport:
    """Scores of the model that a run starts from, kept in its log."""
    report = answers_of(base_model(options, base, base.device), held_out, options, progress)
    JsonLog(folder / "log.jsonl").write(kind="before", step=0, scores=report.to_dict())
    return report


def _teach(
    options: TransferRecipe,
    begun: Start,
    train: Rows,
    held_out: Rows,
    snapshots: Snapshots,
    ranks: Ranks,
    progress: bool,
    say: Say,
) -> FitResult:
    """The loop with everything beside it."""
    state, pg, folder = begun.state, begun.pg, Path(options.out)
    loader = loader_of(options, train, pg.processor, ranks)
    hooks: list[Hook] = []
    log = None
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "config.yaml", yaml.safe_dump(to_tree(options), sort_keys=False))
        log = JsonLog(folder / "log.jsonl", resumed_at=state.step)
        hooks.append(log)
        if progress:
            peak = peak_of(begun.pg.device, options.fit.precision)
            hooks.append(Progress(options.fit.steps, first=state.step, peak_flops=peak))
    score = validate = None
    if len(held_out):
        validate = validation(options, begun.loss, held_out, begun, log, ranks)
        hooks.append(validate)
        score = validate.score
    before = rows_left_out(log.path) if log and state.step else []
    hooks.append(LeftOut(say, ranks, log=log, held_out=validate, before=before))
    if ranks.is_first:
        for name in options.trackers:
            hooks.append(Track(sink_of(name, folder, to_tree(options), first=state.step), validate))
    return fit(
        state, loader, options.fit, loss=begun.loss, hooks=hooks, snapshots=snapshots, score=score, ranks=ranks,
        failure_folder=folder,
    )  # fmt: skip


def validation(
    options: TransferRecipe, loss: Loss, held_out: Rows, begun: Start, log: JsonLog | None, ranks: Ranks
) -> Validate:
    """The loss on all held-out rows, as often as the recipe says."""
    whole = dataclasses.replace(options.loader, workers=0)
    loader = Loader(held_out, begun.pg.processor, whole, ranks.rank, ranks.world_size)
    also = []
    if ranks.is_first and options.samples and not is_sharded(begun.state.model):
        also.append(Samples(begun.pg, held_out, Path(options.out), options.samples))
    return Validate(loader, options.fit, loss, every=options.eval_every, log=log, also=also, ranks=ranks)
