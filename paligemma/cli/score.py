"""`paligemma score`

paligemma score photo.jpg --prompt "answer en what is this?" --suffix cat --suffix dog
paligemma score photos/ --prompt "caption en" --suffix "a cat on a sofa" --json

A score is the log-likelihood of the whole suffix, end of sequence included; a less negative one is more likely.
"""

import argparse
import json
import math

from paligemma.cli.args import add_model_options, add_output_options, add_picture_options
from paligemma.cli.run import Gallery, load_model, table
from paligemma.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files, folders, globs, or - for stdin")
    parser.add_argument("--prompt", metavar="TEXT", help="the prefix; may be empty")
    parser.add_argument("--suffix", action="append", default=[], metavar="TEXT", help="an answer to score; repeat it")
    parser.add_argument(
        "--allow-special", action="store_true", help="let control tokens such as <eos> stand in the prompt"
    )
    add_output_options(parser)
    add_picture_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.prompt is None:
        raise OptionError('no prompt: expected --prompt TEXT, for example --prompt "caption en".')
    if not args.suffix:
        raise OptionError("nothing to score: expected --suffix TEXT, once or more.")
    gallery = Gallery.of(args, args.pictures)
    pg = load_model(args)
    for batch in gallery.batches(pg):
        for example in batch:
            scores = [
                float(s) for s in pg.score(example.image, args.prompt, args.suffix, allow_special=args.allow_special)
            ]
            if args.json:
                found = [
                    {"suffix": suffix, "logprob": score} for suffix, score in zip(args.suffix, scores, strict=True)
                ]
                print(json.dumps({"image": example.name, "scores": found}, ensure_ascii=False), flush=True)
                continue
            if gallery.n_examples > 1:
                print(example.name)
            rows = [[s, f"{score:.4f}", f"{math.exp(score):.3g}"] for s, score in zip(args.suffix, scores, strict=True)]
            print(table([["suffix", "logprob", "prob"], *rows], right=(1, 2)), flush=True)
    return gallery.status
