"""Where a picture that a row names lies: inside its folder, or nowhere."""

import os
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import Any

from paligemma.errors import DataError, nearest

MAX_NAMES = 20_000  # of a folder, kept to offer the nearest; the rest of a larger one is not looked at
_N_COMPARED = 500  # names that are compared letter by letter: those that begin alike, in a larger folder


def picture_path(
    folder: str | Path, name: Any, where: str, *, allow_outside: bool = False, also: Sequence[str] = ("images",)
) -> Path:
    """The file that a row's name stands for.

    Args:
        folder: of the pictures.
        name: as the row has it, relative to the folder.
        where: how messages call the row.
        allow_outside: let names be absolute, hold "..", or lead out of the folder through symbolic links.
        also: folders inside `folder` to look in after it.

    Raises:
        DataError: no name, a name that leads out of the folder, or no such file; the nearest one there is offered.
    """
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: the picture is {name!r}: expected the name of a file.", kind="wrong column")
    if not allow_outside and leads_out(name):
        raise _outside(Path(folder), name, where)
    for base in (str(folder), *(os.path.join(folder, sub) for sub in also)):
        path = os.path.join(base, name)  # text, not Path: this runs once a row
        if os.path.isfile(path):  # False, where Path.is_file raises: names that are too long or hold a zero
            if not allow_outside and not is_inside(str(folder), path):
                raise _outside(Path(folder), name, where, " through a symbolic link")
            return Path(path)
    folder, given = Path(folder), Path(name)
    hint = _nearest_file(folder, given, also)
    if not hint and "\\" in name:
        hint = " Write folders with '/'."
    raise DataError(
        f"{where}: the picture {name} is not in {folder}: expected a file. Check name and folder.{hint}",
        kind="missing picture",
    )


def leads_out(name: str) -> bool:
    """Whether a name is absolute, here or on Windows, or goes up."""
    if name[:1] not in "/\\" and ".." not in name and ":" not in name:
        return False  # nearly all, without looking closer
    given = Path(name)
    return given.is_absolute() or ".." in given.parts or bool(PureWindowsPath(name).drive)


def is_hidden(path: Path) -> bool:
    """Whether a path inside a folder leads through what a system keeps beside files: .git, ._a.jpg, __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def is_inside(folder: str | Path, path: str | Path) -> bool:
    """Whether a path stays in a folder once symbolic links are followed."""
    real = os.path.realpath(path)
    root = _real(str(folder))
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def _outside(folder: Path, name: str, where: str, how: str = "") -> DataError:
    return DataError(
        f"{where}: the picture {name} lies outside {folder}{how}: expected a path inside. Move it, or allow it with "
        "allow_outside=True (--allow-outside).",
        kind="path outside",
    )


def _nearest_file(folder: Path, given: Path, also: Sequence[str]) -> str:
    inner = given.parent
    for base in (folder, *(folder / sub for sub in also)):
        names = _names(str(base / inner))
        begin = max(0, bisect_left(names, given.name) - _N_COMPARED // 2)
        if hint := nearest(given.name, names[begin : begin + _N_COMPARED]):
            return hint if inner == Path(".") else hint.replace("'", f"'{inner.as_posix()}/", 1)
    return ""


@lru_cache(maxsize=16)
def _names(folder: str) -> tuple[str, ...]:
    """Names of the files of a folder, sorted; looked up once."""
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(entry.name for entry in islice(entries, MAX_NAMES) if not entry.is_dir()))
    except (OSError, ValueError):
        return ()


@lru_cache(maxsize=64)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
