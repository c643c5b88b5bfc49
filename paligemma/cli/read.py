"""`paligemma read`

paligemma read page.png
paligemma read scans/ --json
"""

import argparse
from typing import TYPE_CHECKING, Any

from paligemma.cli.args import add_verb_options
from paligemma.cli.keep import Keeper
from paligemma.cli.run import Gallery, answer_pictures, table

if TYPE_CHECKING:
    from paligemma.api import PaliGemma
    from paligemma.results import ReadText


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files, folders, globs, or - for stdin")
    parser.add_argument("--coco", metavar="FILE", help="write words with boxes as COCO results (JSON)")
    add_verb_options(parser)


def run(args: argparse.Namespace) -> int:
    def ask(pg: "PaliGemma", images: list[Any]) -> list[Any]:
        return pg.batch("read", images, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)

    return answer_pictures(args, Gallery.of(args, args.pictures), ask, show, Keeper.of(args, "read"))


def show(read: "ReadText") -> str:
    if not read.words:
        return read.text
    rows = [[word.text, f"{word.score:.2f}", *(f"{side:.0f}" for side in word.box_xyxy_px)] for word in read.words]
    return table([["word", "score", "left", "top", "right", "bottom"], *rows], right=range(1, 6))
