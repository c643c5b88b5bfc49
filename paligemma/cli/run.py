"""What the picture verbs share: load the model, go through the pictures, print, save, count the broken ones.

A broken picture is named on stderr and left out; the others are answered, and the exit status is 2.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paligemma.cli.args import DEFAULT_MODEL, parse_choices
from paligemma.cli.pictures import Picture, example_picture, find_pictures
from paligemma.errors import ImageError, OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paligemma.api import PaliGemma
    from paligemma.cli.keep import Keeper

PATIENCE_S = 2.0  # work that takes longer shows a bar


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def load_model(args: argparse.Namespace) -> "PaliGemma":
    """`paligemma.load` with the options of the command line."""
    name = args.model
    if name is None:
        name = DEFAULT_MODEL
        note(f"model: {name}, the embedded one, which knows coloured shapes and short words. --model takes another.")
    from paligemma.api import load

    options = {} if getattr(args, "max_pixels", None) is None else {"max_pixels": args.max_pixels}
    return load(
        name, device=args.device, dtype=args.dtype, quantize=args.quantize, revision=args.revision,
        tokenizer=args.tokenizer, mask_vae=args.mask_vae, adapter=args.adapter, check=args.check,
        strict=not args.no_strict, progress=sys.stderr.isatty(), **options, **parse_choices(args.choices),
    )  # fmt: skip


@dataclass
class Example:
    """What one answer is about: a picture, or all of them with `--together`."""

    pictures: list[Picture]
    images: "list[NDArray[np.uint8]]"

    @property
    def name(self) -> str:
        return " + ".join(picture.name for picture in self.pictures)

    @property
    def image(self) -> Any:
        """As `PaliGemma` takes it."""
        return self.images[0] if len(self.images) == 1 else self.images


@dataclass
class Gallery:
    """The pictures of a command line, opened a batch at a time.

    Attributes:
        pictures: what to open.
        is_example: no picture was named, so this is the bundled one.
        broken: names of those that could not be opened so far.
    """

    args: argparse.Namespace
    pictures: list[Picture]
    is_example: bool = False
    broken: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, args: argparse.Namespace, words: Sequence[str]) -> "Gallery":
        if args.batch_size < 1:
            raise OptionError(f"--batch-size {args.batch_size}: expected 1 or more.")
        if words:
            return cls(args, find_pictures(words))
        picture = example_picture()
        note(f"picture: none was named, so this is {picture.name}")
        return cls(args, [picture], is_example=True)

    @property
    def n_examples(self) -> int:
        return 1 if self.args.together else len(self.pictures)

    def batches(self, pg: "PaliGemma") -> Iterator[list[Example]]:
        """Up to `--batch-size` examples at a time; broken pictures are told and left out."""
        from tqdm import tqdm

        if self.args.together:
            yield [Example(self.pictures, [pg.processor.load_image(p.source) for p in self.pictures])]
            return
        step = self.args.batch_size
        with tqdm(total=len(self.pictures), unit="picture", delay=PATIENCE_S, disable=None, leave=False) as bar:
            for start in range(0, len(self.pictures), step):
                chunk = self.pictures[start : start + step]
                batch = [example for picture in chunk if (example := self._open(pg, picture))]
                if batch:
                    yield batch
                bar.update(len(chunk))

    @property
    def status(self) -> int:
        return 2 if self.broken else 0

    def _open(self, pg: "PaliGemma", picture: Picture) -> Example | None:
        try:
            return Example([picture], [pg.processor.load_image(picture.source)])
        except ImageError as error:
            if len(self.pictures) == 1:
                raise
            message = " ".join(str(error).split())
            note(message if picture.name in message else f"{picture.name}: {message}")
            self.broken.append(picture.name)
            return None


def answer_pictures(
    args: argparse.Namespace,
    gallery: Gallery,
    ask: "Callable[[PaliGemma, list[Any]], list[Any]]",
    show: Callable[[Any], str],
    keeper: "Keeper | None" = None,
) -> int:
    """Ask about every picture and print each answer as soon as it is there.

    Args:
        ask: (model, images) → one result per image.
        show: result → text for people.
        keeper: saves pictures of the answers, or a COCO file.

    Returns:
        The exit status: 2 when a picture was broken.
    """
    pg = load_model(args)
    for batch in gallery.batches(pg):
        results = ask(pg, [example.image for example in batch])
        for example, result in zip(batch, results, strict=True):
            print_result(args, example.name, result, show, alone=gallery.n_examples == 1)
            if keeper is not None:
                keeper(example, result)
    if keeper is not None:
        keeper.finish()
    return gallery.status


def print_result(args: argparse.Namespace, name: str, result: Any, show: Callable[[Any], str], *, alone: bool) -> None:
    """One result on stdout: a JSON object, or text that names its picture when there are several."""
    if args.json:
        print(json.dumps({"image": name, **result.to_dict()}, ensure_ascii=False), flush=True)
        return
    text = show(result)
    if alone:
        print(text, flush=True)
    elif "\n" in text:
        print(f"{name}\n" + "\n".join(f"  {line}" for line in text.splitlines()) + "\n", flush=True)
    else:
        print(f"{name}\t{text}", flush=True)
    for problem in getattr(result, "problems", ()):
        note(f"{name}: {problem}")


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as aligned columns two spaces apart; columns in `right` are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def stream_pictures(args: argparse.Namespace, gallery: Gallery, prompt: str, **options: Any) -> int:
    """Print each answer piece by piece as it is written; with `--json`, one object per piece and picture."""
    pg = load_model(args)
    for batch in gallery.batches(pg):
        for example in batch:
            if gallery.n_examples > 1 and not args.json:
                print(f"{example.name}\t", end="", flush=True)
            for piece in pg.stream(example.image, prompt, **options):
                if args.json:
                    print(json.dumps({"image": example.name, "piece": piece}, ensure_ascii=False), flush=True)
                else:
                    print(piece, end="", flush=True)
            if not args.json:
                print(flush=True)
    return gallery.status


def writing(place: str, write: Callable[[], Any]) -> Any:
    """What `write` gives.

    Raises:
        OptionError: the place cannot be written to, in one line.
    """
    try:
        return write()
    except OSError as error:
        told = f" ({error.filename})" if error.filename else ""
        raise OptionError(f"{place}: {error.strerror or error}{told}. Expected a place that can be written.") from None


def pair(word: str, option: str) -> tuple[str, Any]:
    """NAME=VALUE as a name and what YAML reads in the value.

    Raises:
        OptionError: no equals sign.
    """
    from paligemma.recipes.tree import parse_value

    name, equals, value = word.partition("=")
    if not equals:
        raise OptionError(f"{option} {word}: expected NAME=VALUE.")
    return name.strip(), parse_value(value.strip())


def column(word: str) -> tuple[str, str | None]:
    """NAME=VALUE of --column as it is written: templates in braces are no YAML.

    Raises:
        OptionError: no equals sign.
    """
    name, _ = pair(word, "--column")
    value = word.partition("=")[2].strip()
    return name, None if value.lower() == "none" else value
