"""`paligemma eval`

paligemma eval tiny
paligemma eval tiny --limit 100 --json
paligemma eval tiny --model my-folder/ --out scores.json

The suite `tiny`: two fixed held-out sets of 1,000 pictures of coloured shapes and words, plain and full.
"""

import argparse
import json
from pathlib import Path

from paligemma.cli.args import add_model_options, add_output_options
from paligemma.cli.run import load_model, note
from paligemma.errors import OptionError, nearest

SUITES = ("tiny",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", metavar="SUITE", help="tiny")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures of each set")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time (default: 32)")
    parser.add_argument("--out", metavar="FILE", help="save the scores as JSON too")
    add_output_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.suite not in SUITES:
        raise OptionError(
            f"there is no suite '{args.suite}': expected {' or '.join(SUITES)}.{nearest(args.suite, SUITES)}"
        )
    if args.out and not Path(args.out).parent.is_dir():
        raise OptionError(f"--out {args.out}: the folder {Path(args.out).parent} does not exist. Make it first.")
    from paligemma.evals.tiny import evaluate

    pg = load_model(args)
    report = evaluate(pg, limit=args.limit, batch_size=args.batch_size)
    scores = {"suite": args.suite, "model": pg.config.name, "dtype": str(pg.dtype), **report.to_dict()}
    print(json.dumps(scores, ensure_ascii=False) if args.json else report.table())
    if args.out:
        Path(args.out).write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        note(f"saved {args.out}")
    return 0
