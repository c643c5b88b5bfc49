"""`paligemma caption`

paligemma caption photo.jpg
paligemma caption photos/ --lang de --json
paligemma caption photo.jpg --box 10,20,110,220
"""

import argparse
from typing import TYPE_CHECKING, Any

from paligemma.cli.args import add_verb_options, parse_box
from paligemma.cli.keep import Keeper
from paligemma.cli.run import Gallery, answer_pictures

if TYPE_CHECKING:
    from paligemma.api import PaliGemma


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files, folders, globs, or - for stdin")
    parser.add_argument("--lang", default="en", metavar="CODE", help="language of the caption (default: en)")
    parser.add_argument("--box", metavar="L,T,R,B", help="caption this region, in pixels")
    add_verb_options(parser)


def run(args: argparse.Namespace) -> int:
    box = None if args.box is None else parse_box(args.box)
    keeper = Keeper.of(args, "caption")

    def ask(pg: "PaliGemma", images: list[Any]) -> list[Any]:
        languages = [args.lang] * len(images)
        return pg.batch(
            "caption", images, languages, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, box=box
        )

    return answer_pictures(args, Gallery.of(args, args.pictures), ask, lambda caption: caption.text, keeper)
