"""Which words of a command line are pictures, and where those pictures lie.

A word is a picture when it is `-`, a path that exists, a glob that matches, or looks like a file (a picture's suffix,
or a folder in front). Everything else is text: a label or a question. `--label` and `--question` say text outright.
"""

import glob
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from paligemma.errors import ImageError, OptionError

SUFFIXES = frozenset(
    {
        ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm",
        ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
    }
)  # fmt: skip
EXAMPLE_LABELS = ("red circle", "blue square", "green triangle", "purple star")


@dataclass(frozen=True)
class Picture:
    """One picture to open: a path, or bytes that came through stdin."""

    name: str
    source: Path | bytes

    @property
    def stem(self) -> str:
        """A file name's beginning, for what is saved about this picture."""
        return self.source.stem if isinstance(self.source, Path) else self.name


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are pictures, and the words that are text."""
    pictures = [word for word in words if is_picture(word)]
    return pictures, [word for word in words if not is_picture(word)]


def is_picture(word: str) -> bool:
    if word == "-":
        return True
    path = Path(word)
    return (
        _exists(path) or path.suffix.lower() in SUFFIXES or _is_path(word) or (_has_magic(word) and bool(_glob(word)))
    )


def find_pictures(words: Iterable[str]) -> list[Picture]:
    """Files, folders, globs and `-` as a list of pictures, in the order given; folders and globs sorted by name.

    Raises:
        OptionError: a path that does not exist, a folder or glob without pictures, `-` twice or from a terminal.
    """
    found: list[Picture] = []
    for word in words:
        path = Path(word)
        if word == "-":
            if any(picture.name == "stdin" for picture in found):
                raise OptionError("'-' was given twice: stdin holds one picture. Give the others as files.")
            found.append(Picture("stdin", _read_stdin()))
        elif path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES and entry.is_file())
            if not inside:
                raise OptionError(
                    f"folder '{word}' holds no pictures: expected files such as *.png or *.jpg directly inside. "
                    f"For sub-folders too, give the glob '{word.rstrip('/')}/**/*'."
                )
            found.extend(Picture(str(entry), entry) for entry in inside)
        elif _exists(path):
            found.append(Picture(word, path))
        elif _has_magic(word):
            matches = _glob(word)
            inside = [match for match in matches if match.suffix.lower() in SUFFIXES] or matches
            if not inside:
                raise OptionError(
                    f"no file matches '{word}': expected a path, a folder, a glob or '-'. Check the spelling."
                )
            found.extend(Picture(str(match), match) for match in inside)
        elif "://" in word:
            raise OptionError(f"'{word}' is a web address: expected a file. Download it first: curl -LO {word}")
        else:
            raise OptionError(
                f"no such picture: '{word}'. Expected a path, a folder, a glob or '-'. Check the spelling."
            )
    return found


def example_picture() -> Picture:
    """The picture inside the package, for a first try without one's own."""
    path = Path(str(files("paligemma") / "assets" / "example" / "shapes.png"))
    if not path.is_file():
        raise ImageError(f"the bundled picture is missing: expected {path}. Name a picture of your own.")
    return Picture("the bundled shapes.png", path)


def _read_stdin() -> bytes:
    if sys.stdin.isatty():
        raise OptionError(
            "'-' reads a picture from stdin, which is a terminal: expected a pipe. paligemma … - < photo.jpg"
        )
    return sys.stdin.buffer.read()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a question can be too long for a file name
        return False


def _is_path(word: str) -> bool:
    return "://" in word or (("/" in word or "\\" in word) and not any(space in word for space in " \t\n"))


def _has_magic(word: str) -> bool:
    return glob.has_magic(word)


def _glob(word: str) -> list[Path]:
    return sorted(path for path in map(Path, glob.glob(word, recursive=True)) if path.is_file())
