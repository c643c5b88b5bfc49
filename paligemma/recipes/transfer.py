"""`transfer`: from a folder of examples to a tuned, evaluated, loadable model.

    run(TransferRecipe(data="digits/", model="tiny", out="runs/digits"))

The defaults are the simple setting of the reports (PaliGemma, section 4 and appendix J: learning rate 1e-5, cosine with
5 % warm-up, no dropout, label smoothing or weight decay); adapters learn faster and take 2e-4.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from paligemma.api import PaliGemma, load
from paligemma.api.loading import find
from paligemma.checkpoints import write
from paligemma.checkpoints.lora_write import write_adapter
from paligemma.data.jsonl import Jsonl, find_splits
from paligemma.data.loader import Loader, LoaderOptions
from paligemma.errors import OptionError, TrainingError
from paligemma.evals.folder import FolderReport, evaluate_folder
from paligemma.models.lora import LoraOptions, add_lora, merge_lora
from paligemma.recipes.card import write_card
from paligemma.recipes.tree import to_tree
from paligemma.train.hooks import JsonLog, Progress, Validate, read_log
from paligemma.train.loop import FitOptions, FitResult, Hook, default_loss, fit, prepare
from paligemma.train.optim import Optimizer, OptimOptions
from paligemma.train.plan import Setup, choose_method
from paligemma.train.ranks import Ranks
from paligemma.train.snapshots import Snapshots
from paligemma.train.state import TrainState

Method = Literal["auto", "full", "frozen", "lora", "dora"]
ADAPTER_LR = 2e-4  # where the recipe leaves lr to the method
FULL_LR = 1e-5
RESULT_FILES = ("tokenizer.model", "tokenizer.json", "mask_vae.npz", "vae-oid.npz")


@dataclass(frozen=True, kw_only=True)
class TransferRecipe:
    """A transfer, every number of it.

    Attributes:
        data: folder or JSONL file with a train split; valid and test where there are.
        model: what to start from, as `paligemma.load` takes it.
        out: folder of the run; an interrupted one goes on there.
        method: "auto" takes the first of full and LoRA that fits the memory at hand, and says so.
        epochs: passes over the training examples; `steps` in their place where given.
        lr: learning rate; None: 1e-5, for adapters 2e-4.
        device: as `paligemma.load` takes it.
        valid_share: of the training rows held out, where the data has no valid split.
        eval_every: steps between validations; None: at the end.
        eval_rows: most rows whose answers are scored at the end.
        merge: whether an adapter's result is also written as whole weights.
        lora, optim, loader, fit: of the parts; `fit.steps` and `optim.lr` are set from the fields above.
    """

    data: str
    model: str = "tiny"
    out: str = "runs/transfer"
    method: Method = "auto"
    epochs: float = 10.0
    steps: int | None = None
    lr: float | None = None
    device: str = "auto"
    valid_share: float = 0.1
    eval_every: int | None = None
    eval_rows: int = 1000
    merge: bool = True
    recompute: bool = False
    lora: LoraOptions = field(default_factory=LoraOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    loader: LoaderOptions = field(default_factory=lambda: LoaderOptions(max_text=129))
    fit: FitOptions = field(default_factory=lambda: FitOptions(steps=1))

    def __post_init__(self) -> None:
        if self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise OptionError(f"epochs={self.epochs}, steps={self.steps}: expected more than nothing to learn from.")
        if not 0 <= self.valid_share < 1:
            raise OptionError(f"valid_share={self.valid_share}: expected at least 0 and less than 1.")


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


class Subset:
    """Some rows of a source."""

    def __init__(self, source: Jsonl, rows: Sequence[int]) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Any:
        return self.source[self.rows[index]]


def run(
    recipe: TransferRecipe,
    *,
    resume: Literal["auto", "never"] = "auto",
    progress: bool = True,
    say: Any = lambda text: print(text, file=sys.stderr, flush=True),
) -> TransferResult:
    """Carry out a transfer, or go on with an interrupted one.

    Args:
        resume: "auto" goes on from the newest sound snapshot in `recipe.out`; "never" refuses a folder that has one.
        progress: draw a bar on stderr.
        say: takes lines for people.

    Raises:
        OptionError, DataError, TrainingError: with what to do.
    """
    ranks = Ranks.join(recipe.device)
    folder = Path(recipe.out)
    train, held_out, split = splits(recipe)
    pg = load(recipe.model, device=recipe.device, dtype="float32")
    method, why = method_of(recipe, pg)
    if ranks.is_first:
        say(f"{len(train):,} examples to learn, {len(held_out):,} held out ({split}). Method: {method}; {why}.")
    options = settled(recipe, method, len(train))
    state = start(pg, options, method, len(train), base=fingerprint(recipe.model))
    snapshots = Snapshots(folder / "checkpoints", keep=options.fit.keep)
    snapshot = snapshots.latest()
    if snapshot is not None:
        if resume == "never":
            raise TrainingError(f"{folder}: holds a run already: expected a new folder. Resume it, or choose another.")
        state.restore(snapshot)
        if ranks.is_first:
            say(f"going on from step {state.step}")
    loader = Loader(train, pg.processor, options.loader, ranks.rank, ranks.world_size)
    loss = default_loss(options.fit)
    hooks: list[Hook] = []
    log = None
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(to_tree(options), sort_keys=False))
        log = JsonLog(folder / "log.jsonl", resumed_at=state.step)
        hooks.append(log)
        if progress:
            hooks.append(Progress(options.fit.steps, first=state.step))
    score = None
    if len(held_out):
        whole = dataclasses.replace(options.loader, workers=0, skip_broken=False)
        validate = Validate(
            Loader(held_out, pg.processor, whole, ranks.rank, ranks.world_size), options.fit, loss,
            every=options.eval_every, log=log, ranks=ranks,
        )  # fmt: skip
        hooks.append(validate)
        score = validate.score
    before = None
    if ranks.is_first and len(held_out) and state.step == 0:
        before = _scores(pg, held_out, options, progress)
        log is not None and log.write(kind="before", step=0, scores=before.to_dict())
    result = fit(
        state, loader, options.fit, loss=loss, hooks=hooks, snapshots=snapshots, score=score, ranks=ranks,
        failure_folder=folder,
    )  # fmt: skip
    last_loss = None if result.last is None else result.last.loss
    if not result.finished or not ranks.is_first:
        return TransferResult(folder, None, None, None, before, result.finished, last_loss)
    return _export(recipe, options, method, pg, held_out, folder, before, result, progress, say)


def splits(recipe: TransferRecipe) -> tuple[Any, Any, str]:
    """What is learned, what is held out, and where that comes from.

    Without a valid or test split, every n-th row of the training file is held out, whatever its order.
    """
    found = find_splits(recipe.data)
    if "train" not in found:
        raise OptionError(f"{recipe.data}: no train split: expected train.jsonl beside {', '.join(found)}.jsonl.")
    train = found["train"]
    for split in ("valid", "test"):
        if split in found:
            return train, found[split], f"the {split} split"
    n_held = round(len(train) * recipe.valid_share)
    if not n_held:
        return train, Subset(train, ()), "nothing"
    every = len(train) / n_held
    held = {int(every * i + every / 2) for i in range(n_held)}
    rest = [i for i in range(len(train)) if i not in held]
    return Subset(train, rest), Subset(train, sorted(held)), f"every {every:.0f}th row of train"


def method_of(recipe: TransferRecipe, pg: PaliGemma) -> tuple[str, str]:
    """The way of training, and why."""
    if recipe.method != "auto":
        return recipe.method, "as asked"
    setup = Setup(
        lora=recipe.lora,
        optim=recipe.optim,
        part_size=recipe.loader.part_size or recipe.loader.batch_size,
        batch_size=recipe.loader.batch_size,
        text_length=recipe.loader.max_text or 128,
        target_length=32,
        recompute=recipe.recompute,
    )
    method, why = choose_method(pg.config, setup, available_bytes(pg.device))
    return ("lora" if method == "qlora" else method), why


def available_bytes(device: torch.device) -> float:
    """Memory that a run may take on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free)
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
        return float(int(fields["MemAvailable"].split()[0]) * 1024)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def settled(recipe: TransferRecipe, method: str, n_examples: int) -> TransferRecipe:
    """The recipe with everything that was left open decided: what is saved beside the weights."""
    steps = recipe.steps or max(1, round(recipe.epochs * n_examples / recipe.loader.batch_size))
    is_adapter = method in ("lora", "dora")
    lr = recipe.lr or (ADAPTER_LR if is_adapter else FULL_LR)
    schedules = recipe.optim.schedules
    if method == "frozen":
        schedules = (*schedules, ("image", None))
    return dataclasses.replace(
        recipe,
        method=method,  # type: ignore[arg-type]
        steps=steps,
        lr=lr,
        lora=dataclasses.replace(recipe.lora, use_dora=recipe.lora.use_dora or method == "dora"),
        optim=dataclasses.replace(recipe.optim, lr=lr, schedules=schedules),
        fit=dataclasses.replace(recipe.fit, steps=steps),
    )


def start(pg: PaliGemma, recipe: TransferRecipe, method: str, n_examples: int, *, base: str) -> TrainState:
    """A run at its first step."""
    model = pg.model
    if method in ("lora", "dora"):
        add_lora(model, recipe.lora, seed=recipe.fit.seed)
    else:
        model.requires_grad_(True)
    model.vision.recompute = model.text.recompute = recipe.recompute
    prepare(model, recipe.fit)
    optimizer = Optimizer(
        model.named_parameters(), recipe.optim, total_steps=recipe.fit.steps,
        batch_size=recipe.loader.batch_size, n_examples=n_examples,
    )  # fmt: skip
    tree = to_tree(recipe)
    # What changes no number of the run may change between its parts.
    for name in ("out", "device", "eval_every", "eval_rows", "merge", "data", "model"):
        tree.pop(name)
    for branch, names in (("loader", ("workers",)), ("fit", ("save_every", "save_minutes", "keep", "max_loss"))):
        for name in names:
            tree[branch].pop(name)
    identity = {"base weights": base, "examples": n_examples, **_flat(tree)}
    return TrainState(model, optimizer, identity=identity)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def fingerprint(model: str) -> str:
    """The weights a run starts from, by content: sizes and names of their files, and the first bytes of each."""
    path = find(model)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 20))
            opened.seek(-min(1 << 20, file.stat().st_size), os.SEEK_END)
            digest.update(opened.read())
    return f"{path.name} {digest.hexdigest()[:16]}"


def _scores(pg: PaliGemma, held_out: Any, recipe: TransferRecipe, progress: bool) -> FolderReport:
    was_training = pg.model.training
    pg.model.eval()
    report = evaluate_folder(
        pg,
        held_out,
        limit=min(recipe.eval_rows, len(held_out)),
        progress=progress,
        skip_broken=recipe.loader.skip_broken,
    )
    pg.model.train(was_training)
    return report


def _export(
    recipe: TransferRecipe,
    options: TransferRecipe,
    method: str,
    pg: PaliGemma,
    held_out: Any,
    folder: Path,
    before: FolderReport | None,
    result: FitResult,
    progress: bool,
    say: Any,
) -> TransferResult:
    """Weights, scores, pictures and card."""
    pg.model.eval()
    adapter_folder = model_folder = None
    if method in ("lora", "dora"):
        adapter_folder = write_adapter(folder / "adapter", pg.model, options.lora, base=recipe.model, overwrite=True)
        merge_lora(pg.model)
    if adapter_folder is None or options.merge:
        source = find(recipe.model)
        base = source if source.is_dir() else source.parent
        beside = [base / name for name in RESULT_FILES if (base / name).is_file()]
        model_folder = write(folder / "model", pg.config, pg.model.state_dict(), overwrite=True, beside=beside)
    report = _scores(pg, held_out, options, progress) if len(held_out) else None
    if report is not None:
        rows = [dataclasses.asdict(prediction) for prediction in report.predictions]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        (folder / "scores.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        say(report.table())
    if before is None:
        before_rows = read_log(folder / "log.jsonl", "before")
        before_scores = before_rows[-1]["scores"] if before_rows else None
    else:
        before_scores = before.to_dict()
    write_card(folder, to_tree(options), report, before_scores)
    say(f"the tuned model: {model_folder or adapter_folder}")
    last = None if result.last is None else result.last.loss
    return TransferResult(folder, model_folder, adapter_folder, report, before, True, last)
