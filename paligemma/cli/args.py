"""Options that verbs share, and the parser that answers mistakes with one teaching line.

Every default stands here once; what an option means is decided by `paligemma.load` and the verbs of `PaliGemma`, which
also judge its value: the command line only passes it on.
"""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from paligemma.errors import OptionError, nearest

DEFAULT_MODEL = "tiny"
BATCH_SIZE = 8


class Parser(argparse.ArgumentParser):
    """argparse that raises `OptionError` and lets options and pictures mix in any order."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message[0].lower()}{message[1:]}. See `{self.prog} --help`.")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse a whole command line; an unknown option is refused with the nearest known one."""
        known, left = (
            self.parse_known_intermixed_args(list(words)) if not self._has_commands() else self.parse_known_args(words)
        )
        if left:
            options = [option for action in self._actions for option in action.option_strings]
            hint = nearest(left[0].split("=")[0], options)
            self.error(f"unknown argument '{left[0]}': expected an option of this verb.{hint}".rstrip("."))
        return known

    def _has_commands(self) -> bool:
        return any(isinstance(action, argparse._SubParsersAction) for action in self._actions)


def with_dashes(words: Sequence[str]) -> list[str]:
    """`--max_new_tokens=8` as `--max-new-tokens=8`: dashes and underscores are both accepted."""
    out: list[str] = []
    for i, word in enumerate(words):
        if word == "--":
            return out + list(words[i:])
        name, equals, value = word.partition("=")
        out.append(name.replace("_", "-") + equals + value if re.fullmatch(r"--[A-Za-z][\w-]*", name) else word)
    return out


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """How rows of data become prompts, beside `--task`."""
    parser.add_argument(
        "--task-field", action="append", default=[], metavar="NAME=VALUE", help="field of the builder: order=raster"
    )
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=VALUE",
        help="of tables: which column holds what, or a template: --column 'prefix=answer en {question}'",
    )  # fmt: skip


def add_verb_options(parser: argparse.ArgumentParser) -> None:
    """What caption, ask, detect, segment and read have in common."""
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: by task)")
    parser.add_argument(
        "--save", metavar="DIR", help="write a picture of every answer into this folder, and every mask"
    )
    add_output_options(parser)
    add_picture_options(parser)
    add_model_options(parser)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object per picture on stdout")
    parser.add_argument("--debug", action="store_true", help="tracebacks for errors")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="M",
        help=f"embedded model, hub id, short name, folder or .npz file (default: {DEFAULT_MODEL})",
    )
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    group.add_argument("--dtype", default="auto", metavar="T", help="auto, float32, bfloat16, float16 (default: auto)")
    group.add_argument("--quantize", metavar="Q", help="nf4: the matrices of the decoder in 4 bits (extra: qlora)")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub repository")
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model or tokenizer.json not beside the weights")
    group.add_argument("--mask-vae", metavar="FILE", help="mask decoder .npz not beside the weights")
    group.add_argument("--adapter", metavar="DIR", help="LoRA adapter (PEFT folder) to merge while loading")
    group.add_argument("--check", action="store_true", help="look for NaN and Inf in the weights while loading")
    group.add_argument("--no-strict", action="store_true", help="accept tensors that no part of the model uses")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="choices",
        help="override a choice on which the references disagree, as in --set resize=bv_bilinear (see docs/python.md)",
    )  # fmt: skip


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=f"pictures at a time (default: {BATCH_SIZE})"
    )
    group.add_argument(
        "--together", action="store_true", help="all pictures are one example: one answer about all of them"
    )
    group.add_argument("--max-pixels", type=int, metavar="N", help="largest picture that is opened, in pixels")


def parse_choices(pairs: Sequence[str]) -> dict[str, Any]:
    """`["sliding_window=none", "resize=bv_bilinear"]` as keyword arguments of `paligemma.load`."""
    choices: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"--set {pair}: expected NAME=VALUE, for example --set resize=bv_bilinear.")
        choices[name.strip().replace("-", "_")] = _value(value.strip())
    return choices


def parse_box(text: str) -> tuple[float, float, float, float]:
    """ "10,20,110,220" as (left, top, right, bottom) in pixels."""
    try:
        left, top, right, bottom = (float(part) for part in text.replace(" ", ",").split(",") if part)
    except ValueError:
        raise OptionError(
            f"--box {text!r}: expected four numbers LEFT,TOP,RIGHT,BOTTOM in pixels, e.g. 10,20,110,220."
        ) from None
    return left, top, right, bottom


def _value(text: str) -> Any:
    if text.lower() in ("none", "off", "null"):
        return None
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except json.JSONDecodeError:
        return text
