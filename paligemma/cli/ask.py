"""`paligemma ask`

paligemma ask photo.jpg "what is this?"
paligemma ask photos/ "is it day or night?" --choice day --choice night
paligemma ask photo.jpg --question frage.png    (a question that looks like a file)

A word that names no picture is the question; with choices, the answers are weighed by likelihood.
"""

import argparse
from typing import TYPE_CHECKING, Any

from paligemma.cli.args import add_verb_options
from paligemma.cli.keep import Keeper
from paligemma.cli.pictures import split_words
from paligemma.cli.run import Gallery, answer_pictures, table
from paligemma.errors import OptionError

if TYPE_CHECKING:
    from paligemma.api import PaliGemma
    from paligemma.results import Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="PICTURE|QUESTION", help="pictures, and one question")
    parser.add_argument("--question", metavar="TEXT", help="the question, whatever it looks like")
    parser.add_argument("--choice", action="append", default=[], metavar="TEXT", help="a possible answer; repeat it")
    parser.add_argument("--lang", default="en", metavar="CODE", help="language of the answer (default: en)")
    parser.add_argument("--allow-special", action="store_true", help="let control tokens stand in the question")
    add_verb_options(parser)


def run(args: argparse.Namespace) -> int:
    pictures, texts = (args.words, []) if args.question is not None else split_words(args.words)
    if args.question is not None:
        texts = [args.question]
    if len(texts) != 1:
        given = f"got {len(texts)}: {', '.join(map(repr, texts))}" if texts else "got none"
        raise OptionError(f'expected one question, {given}. paligemma ask photo.jpg "what is this?"')
    question = texts[0]
    keeper = Keeper.of(args, "ask", prompt=question)

    def ask(pg: "PaliGemma", images: list[Any]) -> list[Any]:
        return pg.batch(
            "answer", images, [question] * len(images), batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens, lang=args.lang, choices=args.choice or None,
            allow_special=args.allow_special,
        )  # fmt: skip

    return answer_pictures(args, Gallery.of(args, pictures), ask, show, keeper)


def show(answer: "Answer") -> str:
    if not answer.choices:
        return answer.text
    return table([[choice.text, f"{choice.probability:.3f}"] for choice in answer.choices], right=(1,))
