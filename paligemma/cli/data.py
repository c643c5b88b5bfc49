"""`paligemma data`

paligemma data check digits/                                    what is wrong with it: counts, examples, exit status
paligemma data check animals-coco/ --model paligemma2-3b-pt-224 --max-text 128
paligemma data preview animals-coco/ --task detect --out preview.html
paligemma data preview vqav2/ --recipe transfer.vqav2                 rows as that training run shows them
paligemma data convert animals-coco/ animals-yolo/ --to yolo
paligemma data convert animals-coco/ animals/ --to jsonl --task detect
paligemma data generate shapes/ --to coco --n 500 --valid 50

Formats: jsonl, coco, yolo, voc, parquet, wds (tars), hf (a name on the hub or a saved data set); `--format` names one
where looking is not enough. `check` leaves with status 0 where nothing is wrong, and 2 where something is.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from paligemma.cli.args import add_reading_options
from paligemma.cli.run import PATIENCE_S, column, note, pair, writing
from paligemma.errors import DataError, OptionError, nearest

ACTIONS = {
    "check": "read every row and say what is wrong: counts, examples, exit status",
    "preview": "a page of pictures with exactly what the model will see",
    "convert": "any format to any other",
    "generate": "draw a synthetic world of shapes and words in any format",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    parsers = {name: actions.add_parser(name, help=text, description=text) for name, text in ACTIONS.items()}
    for name in ("check", "preview", "convert"):
        _add_source_options(parsers[name])
    check, preview, convert, generate = (parsers[name] for name in ACTIONS)
    check.add_argument(
        "--max-text", type=int, default=128, metavar="N", help="text tokens that are seen (default: 128)"
    )
    check.add_argument(
        "--no-decode", action="store_true", help="do not open pictures; look only whether they are there"
    )
    check.add_argument("--examples", type=int, default=3, metavar="N", help="shown of every finding (default: 3)")
    check.add_argument("--strict", action="store_true", help="warnings count as well: exit status 2")
    check.add_argument("--model", metavar="M", help="measure texts with the tokenizer of this model")
    preview.add_argument("--out", default="preview.html", metavar="FILE", help="of the page (default: preview.html)")
    preview.add_argument("--model", metavar="M", help="whose pixels and tokens (default: tiny)")
    preview.add_argument(
        "--resolution", type=int, metavar="R", help="side of the pictures, if another than the model's"
    )
    preview.add_argument("--max-text", type=int, metavar="N", help="text tokens that are seen (default: 128)")
    preview.add_argument("--n", type=int, default=12, metavar="N", help="rows, evenly chosen (default: 12)")
    preview.add_argument("--passes", type=int, default=1, metavar="N", help="show every row as N epochs see it")
    preview.add_argument(
        "--augment", action="append", default=[], metavar="NAME=VALUE", help="as training would: --augment flip=0.5"
    )
    preview.add_argument(
        "--recipe", metavar="R", help="as this training run shows them: a recipe of `paligemma train`, or its YAML file"
    )
    preview.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes", help="number of the recipe"
    )
    convert.add_argument("out", metavar="OUT", help="folder to write")
    convert.add_argument(
        "--model", metavar="M", help="whose mask codes are written or read; without one masks are left out"
    )
    convert.add_argument("--skip-broken", action="store_true", help="leave out rows that cannot be read")
    convert.add_argument("--overwrite", action="store_true", help="replace a split that is there")
    generate.add_argument("out", metavar="OUT", help="folder to write")
    generate.add_argument("--n", type=int, default=100, metavar="N", help="training pictures (default: 100)")
    generate.add_argument("--valid", type=int, default=0, metavar="N", help="held-out pictures (default: 0)")
    generate.add_argument(
        "--world", choices=("plain", "many", "full"), default="plain", help="few plain shapes, more, or all kinds"
    )
    generate.add_argument("--no-colours", action="store_true", help="labels are shapes alone")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the pictures")
    generate.add_argument("--overwrite", action="store_true", help="replace a split that is there")
    for sub in (convert, generate):
        sub.add_argument("--to", required=sub is convert, default="jsonl", metavar="F", help="format to write")
    generate.add_argument("--task", metavar="T", help="builder of prompts, where the format holds prompts")
    for sub in parsers.values():
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
        sub.add_argument("--debug", action="store_true", help="tracebacks for errors")


def _add_source_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("data", metavar="DATA", help="folder, file or pattern; or a mixture in YAML")
    sub.add_argument("--format", default="auto", metavar="F", help="of the data (default: auto)")
    sub.add_argument("--task", metavar="T", help="builder of prompts for annotations: detect, segment, caption, …")
    add_reading_options(sub)
    sub.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the format's reader: one_based=false"
    )
    sub.add_argument("--split", action="append", default=[], metavar="S", help="only this one; may be given again")
    sub.add_argument("--allow-outside", action="store_true", help="rows may name pictures outside of their folder")


def run(args: argparse.Namespace) -> int:
    return {"check": _check, "preview": _preview, "convert": _convert, "generate": _generate}[args.action](args)


def _check(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from paligemma.data.check import check
    from paligemma.data.findings import table_lines
    from paligemma.data.rows import no_codes

    masks = None if args.model is None else _masks(args.model)
    options: dict[str, Any] = {"mask_encoder": no_codes if masks is None else masks.encode_array}
    length = None
    if args.model is not None:
        length, text_length = _lengths_of(args.model)
        options |= {"text_length": text_length, "max_text": args.max_text}
    failed: dict[str, DataError] = {}
    splits = _splits(args, failed=failed, keep_all=True, **options)
    failed = {split: error for split, error in failed.items() if not args.split or split in args.split}
    total = sum(len(source) for source in splits.values())
    with tqdm(total=total, unit="row", delay=PATIENCE_S, disable=None, leave=False) as bar:
        findings = check(
            splits, length=length, max_text=args.max_text, decode=not args.no_decode, progress=bar.update, failed=failed
        )
    if args.json:
        print(json.dumps(findings.to_dict(args.examples), ensure_ascii=False))
    else:
        print("\n".join(table_lines(findings, args.examples)))
    return 2 if findings.n_errors or (args.strict and findings.found) else 0


def _lengths_of(model: str) -> tuple[Any, Any]:
    """Text tokens of an example, and of a text, with a model's tokenizer."""
    from paligemma.api.loading import find, find_tokenizer
    from paligemma.checkpoints import open_checkpoint
    from paligemma.processing.processor import Processor

    path = find(model)
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
    processor = Processor(config, find_tokenizer(path, None, config))

    def length(example: Any) -> int:
        # The last token is only a target, so the model sees one fewer than stand in the row.
        return len(processor.sequence(0, example.prefix, example.suffix, where=example.where)) - 1

    return length, lambda text: len(processor.tokenizer.encode(text))


def _preview(args: argparse.Namespace) -> int:
    from paligemma.draw.preview import preview_page
    from paligemma.errors import PaliGemmaError

    if args.n < 1 or args.passes < 1:
        raise OptionError(f"--n {args.n} --passes {args.passes}: expected 1 or more.")
    if args.changes and args.recipe is None:
        raise OptionError(f"--set {args.changes[0]} without --recipe: expected --recipe transfer, or another.")
    look = _as_they_lie if args.recipe is None else _as_a_run_shows_them
    shown, processor, vae, max_text = look(args)
    decoder = None if vae is None else vae.decode_array
    page = preview_page(shown, processor, max_text=max_text, mask_decoder=decoder, title=str(args.data))
    writing(f"--out {args.out}", lambda: Path(args.out).write_text(page, encoding="utf-8", errors="backslashreplace"))
    n_broken = sum(isinstance(one, PaliGemmaError) for one in shown)
    if args.json:
        print(json.dumps({"page": args.out, "rows": len(shown), "broken": n_broken}))
    else:
        print(f"{args.out}: {len(shown)} rows" + (f", {n_broken} of them broken" if n_broken else ""))
    return 2 if n_broken else 0


def _as_they_lie(args: argparse.Namespace) -> tuple[list[Any], Any, Any, int]:
    """Rows of every split for a preview, the processor, the mask auto-encoder, and how many text tokens are seen."""
    from paligemma.api.loading import find, find_mask_vae, find_tokenizer
    from paligemma.checkpoints import open_checkpoint
    from paligemma.data.augment import AugmentOptions
    from paligemma.data.mixture import fetch
    from paligemma.data.order import Draw
    from paligemma.draw.preview import see
    from paligemma.errors import PaliGemmaError
    from paligemma.processing.processor import Processor
    from paligemma.recipes.tree import changed

    path = find(args.model or "tiny")
    with open_checkpoint(path, resolution=args.resolution) as checkpoint:
        config = checkpoint.config
    processor, vae = Processor(config, find_tokenizer(path, None, config)), find_mask_vae(path, None)
    max_text = 128 if args.max_text is None else args.max_text
    augmentation = changed(AugmentOptions(), dict(pair(word, "--augment") for word in args.augment))
    options: dict[str, Any] = {
        "augmentation": augmentation,
        "load": processor.load_image,
        "text_length": lambda text: len(processor.tokenizer.encode(text)),
        "max_text": max_text,
    }
    if vae is not None:
        options |= {"mask_encoder": vae.encode_array, "mask_decoder": vae.decode_array}
    shown: list[Any] = []
    for source in _splits(args, **options).values():
        _require_one_pass(args, is_line=getattr(source, "is_ordered", False))
        n = min(args.n, len(source))
        for row in _spread(source, n):
            for epoch in range(args.passes):
                try:
                    shown.append(see(fetch(source, Draw(row, epoch)), processor, max_text=max_text + 1))
                except PaliGemmaError as error:
                    shown.append(error)
    return shown, processor, vae, max_text + 1


def _as_a_run_shows_them(args: argparse.Namespace) -> tuple[list[Any], Any, Any, int | None]:
    """As `_as_they_lie`, of what a recipe learns: its prompts, distortions, steps of places, weights, limit of text."""
    from paligemma.api.loading import find_mask_vae
    from paligemma.cli.train import SHORT, recipe_of
    from paligemma.data.order import Draw
    from paligemma.draw.preview import sight_of
    from paligemma.errors import PaliGemmaError
    from paligemma.recipes.start import open_base
    from paligemma.recipes.transfer import as_learned, loader_of, rows_of

    instead = {
        "--task-field": ("task_fields", args.task_field), "--column": ("data_options", args.column),
        "--option": ("data_options", args.option), "--augment": ("augmentation.NAME", args.augment),
        "--split": ("data", args.split), "--max-text": ("loader.max_text", args.max_text),
    }  # fmt: skip
    for option, (field, value) in instead.items():
        if value not in (None, []):
            raise OptionError(f"{option} with --recipe, which has numbers of its own: expected --set {field}=VALUE.")
    words = dict.fromkeys(SHORT) | {name: value for name, value in vars(args).items() if name in (*SHORT, "changes")}
    words |= {
        "out": None, "recipe": args.recipe, "format": None if args.format == "auto" else args.format,
        "resolution": None if args.resolution is None else str(args.resolution),
    }  # fmt: skip
    if args.allow_outside:
        words["changes"] = [*args.changes, "allow_outside=true"]
    recipe = recipe_of(argparse.Namespace(**words))
    base = open_base(recipe)
    train, _, _ = rows_of(recipe, base, note)
    loader = loader_of(recipe, as_learned(recipe, train), base.processor)
    is_line = getattr(train, "is_ordered", False)
    _require_one_pass(args, is_line=is_line)
    shown: list[Any] = []
    for row in _spread(train, min(args.n, len(train))):
        for epoch in range(args.passes):
            try:
                place = row if is_line else loader.line.place(Draw(row, epoch))
                shown.append(sight_of(*loader.example(place), base.processor))
            except PaliGemmaError as error:
                shown.append(error)
    return shown, base.processor, find_mask_vae(base.path, None), recipe.loader.max_text


def _spread(source: Any, n: int) -> list[int]:
    """Numbers of n rows, evenly chosen; the first ones of a stream, which has to be read up to each."""
    return [i if getattr(source, "is_sequential", False) else i * len(source) // n for i in range(n)]


def _require_one_pass(args: argparse.Namespace, *, is_line: bool) -> None:
    if is_line and args.passes > 1:
        raise OptionError(
            "--passes with a mixture, each of whose sources has passes of its own: expected 1. Raise --n."
        )


def _convert(args: argparse.Namespace) -> int:
    from paligemma.data.convert import WRITERS, all_labels, holds_records, refuse_itself, write_split

    refuse_itself(args.data, args.out)
    _require_format(args.to, WRITERS)
    masks = None if args.model is None else _masks(args.model)
    if masks is None and {"segment", "referring"} & set((args.task or "").replace(" ", "").split(",")):
        raise OptionError(
            f"--task {args.task} writes mask codes, which say something to one model alone: expected --model with the "
            "one that will read them."
        )
    splits = _splits(args, as_they_are=True, **({} if masks is None else {"mask_encoder": masks.encode_array}))
    keeps_records = WRITERS[args.to].holds == "records"
    build = None if keeps_records or args.task is None else _builder(args, masks)
    read = _reader(masks)
    labels = all_labels(splits, read) if keeps_records or any(map(holds_records, splits.values())) else None
    written, n_problems = {}, 0
    for split, source in splits.items():
        write = partial(
            write_split, source, args.out, to=args.to, split=split, labels=labels, build=build, read=read,
            overwrite=args.overwrite, skip_broken=args.skip_broken,
        )  # fmt: skip
        report = writing(args.out, write)
        for problem in report.problems:
            note(f"{split}: {problem}")
        n_problems += len(report.problems)
        written[split] = {"rows": report.n_rows, **{f"{what} left out": n for what, n in report.left_out.items()}}
    _tell(args, written)
    codes = any(written[split].get("masks left out") for split, source in splits.items() if not holds_records(source))
    if args.model is None and codes:
        note("masks were left out: --model says whose codes they are")
    return 2 if n_problems else 0


def _generate(args: argparse.Namespace) -> int:
    from paligemma.data.convert import WRITERS, write_split
    from paligemma.data.world.records import WorldRecords

    _require_format(args.to, WRITERS)
    if args.n < 1 or args.valid < 0:
        raise OptionError(f"--n {args.n} --valid {args.valid}: expected at least one training picture.")
    is_prompts = WRITERS[args.to].holds == "examples"
    if args.task is not None and not is_prompts:
        raise OptionError(f"--task {args.task} with --to {args.to}, which holds annotations: leave the task out.")
    args.task, args.task_field = args.task or "detect", []
    build = _builder(args, _masks("tiny")) if is_prompts else None
    written = {}
    for split, n in (("train", args.n), ("valid", args.valid)):
        if n:
            source = WorldRecords(
                n, world=args.world, split="train" if split == "train" else "held_out", seed=args.seed,
                colours=not args.no_colours,
            )  # fmt: skip
            write = partial(
                write_split, source, args.out, to=args.to, split=split, build=build, overwrite=args.overwrite,
                seed=args.seed,
            )  # fmt: skip
            report = writing(args.out, write)
            # What prompts do not say of a drawn world is no loss: it can be drawn again.
            left_out = {} if is_prompts else {f"{what} left out": n for what, n in report.left_out.items()}
            written[split] = {"rows": report.n_rows, **left_out}
    _tell(args, written)
    return 0


def _tell(args: argparse.Namespace, written: dict[str, dict[str, int]]) -> None:
    if args.json:
        print(json.dumps({"out": args.out, "format": args.to, "splits": written}))
        return
    for split, counts in written.items():
        print(f"{args.out}: {split}, " + ", ".join(f"{n:,} {what}" for what, n in counts.items() if n))


def _masks(model: str) -> Any:
    """The mask auto-encoder that lies beside a model's weights, or None."""
    from paligemma.api.loading import find, find_mask_vae

    return find_mask_vae(find(model), None)


def _builder(args: argparse.Namespace, masks: Any) -> Any:
    from paligemma.data.rows import builders_of

    fields = dict(pair(word, "--task-field") for word in args.task_field)
    return builders_of(args.task, fields, None if masks is None else masks.encode_array)


def _reader(masks: Any) -> Any:
    """How prompts are read back, masks with the codes of the model at hand."""
    from paligemma.data.builders import read_example

    decoder = None if masks is None else masks.decode_array
    return lambda example, size_hw: read_example(example, size_hw, mask_decoder=decoder)


def _splits(
    args: argparse.Namespace,
    *,
    as_they_are: bool = False,
    failed: dict[str, DataError] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The sources that are meant, by split; annotations as they are where no task makes prompts of them.

    Args:
        failed: takes splits that cannot be opened, in place of an error.
    """
    from paligemma.data.mixing import is_mixture
    from paligemma.data.rows import open_rows
    from paligemma.data.sources.open import open_data

    given: dict[str, Any] = {"format": args.format, "allow_outside": args.allow_outside}
    given |= dict(pair(word, "--option") for word in args.option)
    columns = [column(word) for word in args.column]
    if columns:
        given["columns"] = columns
    if (as_they_are or args.task is None) and not is_mixture(args.data) and not options.get("augmentation"):
        found = open_data(args.data, failed=failed, **given)
    else:
        fields = [pair(word, "--task-field") for word in args.task_field]
        found = open_rows(args.data, task=args.task, task_fields=fields, failed=failed, **given, **options)
    for split in args.split:
        if split not in found and split not in (failed or ()):
            raise OptionError(
                f"{args.data} has no split '{split}': expected one of {', '.join(found)}.{nearest(split, found)}"
            )
    return {split: source for split, source in found.items() if not args.split or split in args.split}


def _require_format(name: str, known: Any) -> None:
    if name not in known:
        raise OptionError(f"--to {name}: expected one of {', '.join(known)}.{nearest(name, known)}")
