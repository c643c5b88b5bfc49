"""Some rows of a source, and which rows to hold out."""

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

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
    pictures = [] if is_line else _pictures(source)
    if pictures and not round(len(pictures) * share):  # many rows about a handful of pictures
        pictures = [[row] for row in range(len(source))]
    n_held = round(len(pictures) * share)
    if not n_held:
        return Subset(source, ()), Subset(source, ()), "nothing"
    every = len(pictures) / n_held
    chosen = {int(every * i + every / 2) for i in range(n_held)}
    held = sorted(row for i in chosen for row in pictures[i])
    taken = set(held)
    rest = (row for row in range(len(source)) if row not in taken)
    what = "row" if len(pictures) == len(source) else "picture"
    return Subset(source, rest), Subset(source, held), f"every {every:.0f}th {what} of train"


def problems_of(source: Any) -> Iterator[str]:
    """What is wrong with the files behind a source, through whatever wraps it."""
    yield from getattr(source, "problems", ())
    for inner in (source.__dict__.get("records"), source.__dict__.get("source")) if hasattr(source, "__dict__") else ():
        if inner is not None and not isinstance(inner, tuple | list):
            yield from problems_of(inner)
    for inner in getattr(source, "sources", ()):
        yield from problems_of(inner)
    for name, part in getattr(source, "parts", {}).items():
        yield from (f"{name}: {problem}" for problem in problems_of(part.source))


def _pictures(source: Any) -> list[list[int]]:
    """Rows by picture, in the order of the first; a source that does not say which is whose has one row for each."""
    keys = getattr(source, "picture_keys", lambda: None)()
    if keys is None and hasattr(source, "pictures_of"):
        keys = map(source.pictures_of, range(len(source)))
    if keys is None:
        return [[row] for row in range(len(source))]
    groups: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key or row, []).append(row)
    return list(groups.values())
