"""`paligemma detect`

paligemma detect photo.jpg cat "red car"
paligemma detect photo.jpg "cat ; dog" --save out/
paligemma detect photos/ "shots/*.png" --label cat --label dog --json
paligemma detect                                   (a bundled picture)

A word that names no picture is a label; --label says so outright. Boxes are left, top, right, bottom in pixels.
"""

import argparse
from typing import TYPE_CHECKING, Any

from paligemma.cli.args import add_verb_options
from paligemma.cli.keep import Keeper
from paligemma.cli.pictures import EXAMPLE_LABELS, split_words
from paligemma.cli.run import Gallery, answer_pictures, note, table
from paligemma.errors import OptionError

if TYPE_CHECKING:
    from paligemma.api import PaliGemma


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="PICTURE|LABEL", help="pictures and labels, in any order")
    parser.add_argument("--label", action="append", default=[], metavar="TEXT", help="what to look for; repeat it")
    parser.add_argument("--min-score", type=float, default=0.0, metavar="S", help="leave out what is less sure, 0 to 1")
    parser.add_argument("--coco", metavar="FILE", help="write all answers as COCO results (JSON)")
    add_verb_options(parser)


def run(args: argparse.Namespace) -> int:
    return look_for(args, "detect")


def look_for(args: argparse.Namespace, verb: str) -> int:
    """`detect` and `segment`: the same words, another answer."""
    pictures, texts = split_words(args.words)
    labels = [label for text in [*texts, *args.label] for label in split_labels(text)]
    if not labels and pictures:
        raise OptionError(
            f"nothing to look for: expected a label beside the picture. paligemma {verb} {pictures[0]} cat "
            "(or --label cat where a label is also the name of a file)"
        )
    gallery = Gallery.of(args, pictures)
    if not labels:
        labels = list(EXAMPLE_LABELS)
        note(f"labels: none were given, so: {' ; '.join(labels)}")
    keeper = Keeper.of(args, verb)

    def ask(pg: "PaliGemma", images: list[Any]) -> list[Any]:
        return pg.batch(
            verb, images, [labels] * len(images), batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens, min_score=args.min_score,
        )  # fmt: skip

    return answer_pictures(args, gallery, ask, show, keeper)


def split_labels(text: str) -> list[str]:
    """ "cat ; dog" as two labels, the way the prompt itself writes them."""
    return [label for part in text.split(";") if (label := part.strip())]


def show(found: Any) -> str:
    if not found:
        return "nothing found"
    rows = [
        [item.label or "(no label)", f"{item.score:.2f}", *(f"{side:.0f}" for side in item.box_xyxy_px)]
        + ([f"{int(item.mask.sum())} px"] if hasattr(item, "mask") else [])
        for item in found
    ]
    head = ["label", "score", "left", "top", "right", "bottom"] + (["mask"] if hasattr(found[0], "mask") else [])
    return table([head, *rows], right=range(1, len(head)))
