"""`paligemma eval`

paligemma eval tiny
paligemma eval tiny --limit 100 --json
paligemma eval tiny --model my-folder/ --out scores.json
paligemma eval tiny --unseen --model tiny --beside runs/tiny/tiny --beside runs/old
paligemma eval digits/ --model runs/digits/model --split test --predictions answers.jsonl
paligemma eval pope.jsonl --transfer pope --model runs/vqav2/model
paligemma eval animals-coco/ --task detect --model runs/animals/model

The suite `tiny`: two fixed held-out sets of 1,000 pictures of coloured shapes and words, plain and full; with --unseen
the full ones also in outlines, on backgrounds and in fonts that no training picture shows. A folder or
file of any format: every row's prompt is asked, and its answer scored by the kind of the prompt; annotations become
prompts by --task. With --transfer, prompts, decoding and metrics are those of a published transfer.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paligemma.cli.args import DEFAULT_MODEL, add_model_options, add_output_options, add_reading_options
from paligemma.cli.run import column, load_model, note, pair
from paligemma.errors import OptionError, nearest

SUITES = ("tiny",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", metavar="SUITE|FOLDER", help="tiny, or a folder or file of examples")
    parser.add_argument(
        "--split",
        metavar="S",
        help="of a folder: train, valid, test (default: test, valid, or what a run holds out)",
    )
    parser.add_argument(
        "--task", metavar="T", help="of annotations: the builder of prompts: detect, segment, caption, …"
    )
    parser.add_argument(
        "--transfer", metavar="NAME", help="of a folder: rows with the columns of a published transfer: vqav2, pope, …"
    )
    add_reading_options(parser)
    parser.add_argument("--format", default="auto", metavar="F", help="of the data (default: auto)")
    parser.add_argument("--allow-outside", action="store_true", help="rows may name pictures outside of their folder")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the format's reader: one_based=false"
    )
    parser.add_argument("--predictions", metavar="FILE", help="of a folder: save every answer as JSONL")
    parser.add_argument("--skip-broken", action="store_true", help="of a folder: leave out rows that cannot be read")
    parser.add_argument(
        "--unseen", action="store_true", help="of the suite: also shapes, backgrounds, fonts never shown"
    )
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="M",
        help="of the suite: another model, scored after the first, without its --adapter",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures of each set")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time (default: 32)")
    parser.add_argument("--out", metavar="FILE", help="save the scores as JSON too")
    add_output_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    is_folder = args.suite not in SUITES
    if is_folder and not Path(args.suite).exists():
        raise OptionError(
            f"there is no suite and no folder '{args.suite}': expected {' or '.join(SUITES)}, or a folder of examples."
            f"{nearest(args.suite, SUITES)}"
        )
    if args.out and not Path(args.out).parent.is_dir():
        raise OptionError(f"--out {args.out}: the folder {Path(args.out).parent} does not exist. Make it first.")
    if args.transfer:
        _as_published(args, is_folder)
    if is_folder and (args.unseen or args.beside):
        raise OptionError("--unseen and --beside belong to the suite tiny: expected neither with a folder.")
    reports = [_of_folder(args)] if is_folder else _of_suite(args)
    found = []
    for origin, model, report in reports:
        found.append({"suite": args.suite, **model, **report.to_dict()})
        if args.beside:
            found[-1]["from"] = origin
        if not args.json:
            print(*([origin] if args.beside else []), report.table(), sep="\n", flush=True)
    scores = found if args.beside else found[0]
    if args.json:
        print(json.dumps(scores, ensure_ascii=False))
    if args.out:
        Path(args.out).write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        note(f"saved {args.out}")
    return 2 if is_folder and report.broken else 0


def _as_published(args: argparse.Namespace, is_folder: bool) -> None:
    """Before a model is loaded: the transfer exists, nothing else is asked for, and pictures are resized as it does."""
    from paligemma.recipes.transfers import transfer_of

    transfer = transfer_of(args.transfer)
    own = args.task or args.task_field or args.column or args.option or args.format not in ("auto", "jsonl")
    if not is_folder or own:
        raise OptionError(
            "--transfer has prompts and columns of its own: expected JSONL, without --task, --task-field, --column, "
            "--option and --format."
        )
    if transfer.asked_resize is not None and not any(word.startswith("resize=") for word in args.choices):
        args.choices = [*args.choices, f"resize={transfer.asked_resize}"]


Report = tuple[str, dict[str, str], Any]  # where the model came from, what it is, its scores


def _named(pg: Any) -> dict[str, str]:
    return {"model": pg.config.name, "dtype": str(pg.dtype)}


def _of_folder(args: argparse.Namespace) -> Report:
    """The model and its report on a folder of examples."""
    from paligemma.evals.folder import evaluate_folder

    pg = load_model(args)
    encoder = None if pg.mask_vae is None else pg.mask_vae.encode_array
    options = {"task": args.task, "format": args.format, "allow_outside": args.allow_outside, "mask_encoder": encoder}
    options |= dict(pair(word, "--option") for word in args.option)
    options["task_fields"] = [pair(word, "--task-field") for word in args.task_field]
    if args.column:
        options["columns"] = [column(word) for word in args.column]
    how = {"limit": args.limit, "batch_size": args.batch_size, "skip_broken": args.skip_broken}
    if args.transfer:
        report = _as_transferred(args, pg, encoder, how)
    else:
        report = evaluate_folder(pg, split_of(args.suite, args.split, skip_broken=args.skip_broken, **options), **how)
    if args.predictions:
        lines = (json.dumps(dataclasses.asdict(one), ensure_ascii=False) for one in report.predictions)
        Path(args.predictions).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        note(f"saved {args.predictions}")
    for text in report.broken:
        note(f"left out: {text}")
    return args.model or DEFAULT_MODEL, _named(pg), report


def _as_transferred(args: argparse.Namespace, pg: Any, encoder: Any, how: dict[str, Any]) -> Any:
    """The report of rows as a published transfer asks and scores them, its metrics under its name."""
    from paligemma.evals.folder import evaluate_folder
    from paligemma.recipes.transfers import asked_rows, score_report, transfer_of

    reading = {"allow_outside": args.allow_outside, "mask_encoder": encoder, "resolution": pg.config.vision.resolution}
    rows, told = asked_rows(args.transfer, args.suite, args.split, **reading)
    note(f"{len(rows):,} rows: {told}; pictures by {pg.config.processing.resize}")
    report = evaluate_folder(pg, rows, **transfer_of(args.transfer).decoding, **how)
    published, name = score_report(args.transfer, report, pg), f"transfer.{args.transfer}"
    if not published:
        note(f"{name} has no metric of its own: its reference stores the answers (--predictions FILE)")
        return report
    scores, n_rows = {**report.scores, name: published}, {**report.n_rows, name: len(report.predictions)}
    return dataclasses.replace(report, scores=scores, n_rows=n_rows)


def _of_suite(args: argparse.Namespace) -> Iterator[Report]:
    """Models and their reports on the picture world, one after the other; an adapter and the like are the first's."""
    from paligemma.api.loading import find
    from paligemma.evals.tiny import evaluate

    for name in args.beside:
        find(name)  # a name that leads nowhere is said before minutes are spent on the others
    own = dict.fromkeys(("adapter", "tokenizer", "mask_vae", "revision"))
    for n, name in enumerate((args.model, *args.beside)):
        pg = load_model(argparse.Namespace(**{**vars(args), **(own if n else {}), "model": name}))
        report = evaluate(pg, limit=args.limit, unseen=args.unseen, batch_size=args.batch_size)
        named = _named(pg)
        del pg  # room for the next
        yield name or DEFAULT_MODEL, named, report


def split_of(folder: str, split: str | None, *, skip_broken: bool = False, **options: Any) -> Any:
    """The rows of a folder that are meant: test, valid, or of a lone train split what a training run holds out.

    Args:
        skip_broken: pass over what is wrong with whole files.
        options: those of `open_rows`.

    Raises:
        OptionError: the folder has no such split. DataError: something is wrong with a file of it, so that a score
        would be one of other rows.
    """
    from paligemma.data.rows import open_rows
    from paligemma.recipes.rows import tell_problems
    from paligemma.recipes.transfer import TransferRecipe

    share = TransferRecipe(data=folder).valid_share if split is None else 0.0
    found = open_rows(folder, valid_share=share, **options)
    if split is not None and split not in found:
        raise OptionError(
            f"{folder} has no split '{split}': expected one of {', '.join(found)}.{nearest(split, found)}"
        )
    name = split or next(name for name in ("test", "valid", "held", "train") if name in found)
    told = "held out of train, as a training run does; all: --split train" if name == "held" else f"the {name} split"
    tell_problems({name: found[name]}, skip_broken=skip_broken, say=note, how="--skip-broken")
    note(f"{len(found[name]):,} rows: {told}")
    return found[name]
