"""The end of a transfer: weights that load anywhere, scores on the held-out rows, every answer, the card."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paligemma.api import PaliGemma, load
from paligemma.api.loading import find, pick_device
from paligemma.checkpoints import merge, open_checkpoint, read_adapter, write
from paligemma.checkpoints.convert import padded_rows
from paligemma.checkpoints.lora_write import write_adapter
from paligemma.evals.folder import FolderReport, evaluate_folder
from paligemma.models.lora import merge_lora
from paligemma.recipes.card import write_card
from paligemma.recipes.memory import fits_whole
from paligemma.recipes.rows import Rows
from paligemma.recipes.start import config_of
from paligemma.recipes.tree import to_tree
from paligemma.train.hooks import read_log
from paligemma.train.ranks import Ranks

if TYPE_CHECKING:
    from paligemma.recipes.transfer import TransferRecipe

# What lies beside weights and belongs to the result: words, and the decoder of masks.
BESIDE = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "mask_vae.npz", "vae-oid.npz",
)  # fmt: skip


def finish(
    recipe: "TransferRecipe",
    pg: PaliGemma,
    held_out: Rows,
    folder: Path,
    before: FolderReport | None,
    *,
    n_train: int,
    progress: bool = True,
    say: Callable[[str], Any],
) -> tuple[Path | None, Path | None, FolderReport | None]:
    """Weights, scores, answers and card of a run.

    Returns:
        Folder of whole weights, folder of the adapter, scores; None for what there is not.
    """
    pg.model.eval()
    model, adapter, pg = write_weights(recipe, pg, folder)
    place = pick_device(recipe.device)
    if pg.device.type != place.type:  # a run that was shared out is put together on the CPU
        del pg
        choices = {} if model else {**dict(recipe.choices), "resolution": recipe.resolution}  # a whole one says so
        where = place if fits_whole(config_of(model or recipe.model), place, Ranks()) else "cpu"
        pg = load(model or recipe.model, device=where, adapter=None if model else adapter, **choices)
    report = answers_of(pg, held_out, recipe, progress) if len(held_out) else None
    if report is not None:
        published = transfer_scores(recipe, pg, report)
        write_scores(report, folder, published)
        say(report.table())
        if recipe.eval_rows < (n := len(held_out)):
            say(f"scored: the first {recipe.eval_rows:,} of {n:,} held-out rows; all of them: --set eval_rows={n}")
        if report.broken:
            say(f"{len(report.broken):,} held-out rows could not be read and are in no score: see log.jsonl")
        for metric, value in published.items():
            say(f"{f'transfer.{recipe.form}: {metric}':<28}{value:>9.3f}")
    if before is None:
        rows = read_log(folder / "log.jsonl", "before")
        before_scores = rows[-1]["scores"] if rows else None
    else:
        before_scores = before.to_dict()
    write_card(folder, to_tree(recipe), report, before_scores, n_train=n_train)
    if not (folder / "curves.png").exists():
        say("no curves.png: they need matplotlib, pip install 'paligemma[train]'")
    say(f"the tuned model: {model or adapter}")
    return model, adapter, report


def write_weights(recipe: "TransferRecipe", pg: PaliGemma, folder: Path) -> tuple[Path | None, Path | None, PaliGemma]:
    """Write what was trained; the third value is the model as it was written, which is what has to be scored."""
    source = find(recipe.model)
    beside = [file for name in BESIDE if (file := _folder_of(source) / name).is_file()]
    if recipe.method not in ("lora", "dora", "qlora"):
        return write(folder / "model", pg.config, pg.model.state_dict(), overwrite=True, beside=beside), None, pg
    adapter = write_adapter(folder / "adapter", pg.model, recipe.lora, base=recipe.model, overwrite=True)
    if not recipe.merge:
        return None, adapter, pg
    if recipe.base_dtype == "float32" and recipe.method != "qlora":
        merge_lora(pg.model)
        return write(folder / "model", pg.config, pg.model.state_dict(), overwrite=True, beside=beside), adapter, pg
    # The base in memory is narrower than the file: merge into the file's own weights, one tensor at a time.
    with open_checkpoint(source, resolution=recipe.resolution) as checkpoint:
        state = merge(checkpoint, read_adapter(adapter, checkpoint.config))
        rows = padded_rows(checkpoint.config)
        model = write(folder / "model", pg.config, state, overwrite=True, beside=beside, table_rows=rows)
    device = pg.device
    del pg  # room for the merged model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model, adapter, load(model, device=device)


def answers_of(pg: PaliGemma, rows: Rows, recipe: "TransferRecipe", progress: bool) -> FolderReport:
    """Scores of a model on some rows; its mode comes back as it was."""
    was_training = pg.model.training
    pg.model.eval()
    how: dict[str, Any] = {}
    if recipe.form is not None:  # decoded as published
        how = transfers().transfer_of(recipe.form).decoding
    with torch.compiler.set_stance("force_eager" if recipe.fit.compile else "default"):  # blocks of a cache, one by one
        report = evaluate_folder(
            pg, rows, **how, limit=min(recipe.eval_rows, len(rows)), progress=progress,
            skip_broken=recipe.loader.skip_broken,
        )  # fmt: skip
    pg.model.train(was_training)
    return report


def transfer_scores(recipe: "TransferRecipe", pg: PaliGemma, report: FolderReport) -> dict[str, float]:
    """Scores by the metrics of a published transfer, all true answers of a row counted; {} for any other recipe."""
    if recipe.form is None:
        return {}
    found: dict[str, float] = transfers().score_report(recipe.form, report, pg)
    return found


def transfers() -> Any:
    """The published transfers; loaded late, since their recipes are made of this room's."""
    from paligemma.recipes import transfers as found

    return found


def write_scores(report: FolderReport, folder: Path, published: dict[str, float] | None = None) -> None:
    """scores.json, and predictions.jsonl with every answer."""
    rows = [dataclasses.asdict(prediction) for prediction in report.predictions]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    scores = {**report.to_dict(), **({"published metrics": published} if published else {})}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
