"""Splits of a data set that are opened one by one."""

from collections.abc import Iterator
from contextlib import contextmanager

from paligemma.errors import DataError


@contextmanager
def trying(split: str, failed: dict[str, DataError] | None) -> Iterator[None]:
    """Open a split; what is wrong with it is an error, or is kept in `failed`, so that others can be looked at."""
    try:
        yield
    except DataError as error:
        if failed is None:
            raise
        failed[split] = error
