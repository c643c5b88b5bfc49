"""Some rows of a source, and which rows to hold out."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma.data.mixture import fetch
from paligemma.data.order import Draw


class Subset:
    """Some rows of a source of examples or records; 8 bytes a row, shared by forked workers."""

    def __init__(self, source: Any, rows: Iterable[int]) -> None:
        self.source, self.rows = source, array("q", rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Any:
        return self.varied(index, 0)

    def varied(self, index: int, epoch: int) -> Any:
        """The row as the source has it in an epoch."""
        return fetch(self.source, Draw(self.rows[index], epoch))

    def where(self, index: int) -> str:
        """How messages call a row."""
        told: str = self.source.where(self.rows[index])
        return told

    def __getattr__(self, name: str) -> Any:
        # What marks a source of records, and names its classes.
        if name == "labels" and "source" in self.__dict__:
            return self.source.labels
        raise AttributeError(name)


def held_out(source: Any, share: float) -> tuple[Subset, Subset, str]:
    """Rows to learn and rows to hold out, spread evenly; rows of one picture stay together.

    Args:
        share: of the pictures that are held out.

    Returns:
        What is learned, what is held out (nothing for a mixture or a stream), and where that comes from.
    """
    is_line = getattr(source, "is_ordered", False) or getattr(source, "is_sequential", False)
    picture = pictures_of_rows(source) if not is_line and share else np.zeros(0, np.int64)
    n = int(picture.max(initial=-1)) + 1
    if n and not round(n * share):  # many rows about a handful of pictures
        picture, n = np.arange(len(source)), len(source)
    n_held = round(n * share)
    if not n_held:
        return Subset(source, ()), Subset(source, ()), "nothing"
    every = n / n_held
    is_held = np.isin(picture, [int(every * i + every / 2) for i in range(n_held)])
    what = "row" if n == len(source) else "picture"
    rest, held = (Subset(source, np.flatnonzero(rows).tolist()) for rows in (~is_held, is_held))
    return rest, held, f"every {every:.0f}th {what} of train"


def problems_of(source: Any) -> Iterator[str]:
    """What is wrong with the files behind a source, through whatever wraps it."""
    yield from getattr(source, "problems", ())
    for name, inner in _inside(source):
        yield from (f"{name}{problem}" for problem in problems_of(inner))


def unread_of(source: Any) -> Counter[str]:
    """What the files behind a source hold and its rows have no place for, through whatever wraps it."""
    found = Counter(getattr(source, "left_out", ()))
    for _, inner in _inside(source):
        found.update(unread_of(inner))
    return found


def _inside(source: Any) -> Iterator[tuple[str, Any]]:
    """The sources that a source is made of, with what messages put before what they say of each."""
    for name in ("records", "source"):
        inner = getattr(source, "__dict__", {}).get(name)
        if inner is not None and not isinstance(inner, tuple | list):
            yield "", inner
    yield from (("", inner) for inner in getattr(source, "sources", ()))
    yield from ((f"{name}: ", part.source) for name, part in getattr(source, "parts", {}).items())


def pictures_of_rows(source: Any) -> NDArray[np.int64]:
    """Which picture each row is about, numbered in the order of the first; one for each row where nobody says."""
    n = len(source)
    keys = getattr(source, "picture_keys", lambda: None)()
    if keys is None and hasattr(source, "pictures_of"):
        keys = map(source.pictures_of, range(n))
    if keys is None:
        return np.arange(n)
    # Hashes in place of names: eight bytes a row. Two pictures of one hash would be held out together, no more.
    marks = np.fromiter((hash(key or ("row", row)) for row, key in enumerate(keys)), np.int64, n)
    _, first, which = np.unique(marks, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    numbered: NDArray[np.int64] = number[which]
    return numbered
