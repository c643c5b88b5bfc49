"""What tells rows apart: ids that should differ, and pictures that several rows are about."""

import hashlib
import zlib
from array import array
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

ENDS = 4096  # bytes at the beginning and the end of a picture's file that are looked at


def repeated_ids(ids: Callable[[], Iterable[tuple[int, str]]], where: Callable[[int], str]) -> tuple[str, ...]:
    """A line for every row with an id that an earlier one has; 16 bytes a row are kept meanwhile.

    Args:
        ids: gives (row, id) pairs, of rows that have one; walked through again where hashes of two are equal.
        where: how messages call a row.
    """
    marks, rows = array("q"), array("q")
    for row, identity in ids():
        marks.append(hash(identity))
        rows.append(row)
    hashes = np.array(marks, np.int64)
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(np.diff(hashes[order]) == 0) + 1
    alike = {rows[order[place]] for at in again for place in (at - 1, at)}
    first: dict[str, int] = {}
    told = []
    for row, identity in ids() if alike else ():
        if row in alike and first.setdefault(identity, row) != row:
            told.append(f"{where(row)}: id {identity} is also that of {where(first[identity])}")
    return tuple(told)


def content_of(image: Any) -> Hashable:
    """Equal for the same picture: the path of a file, a digest of bytes or pixels."""
    if isinstance(image, str | Path):
        return str(image)
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).digest()
    pixels = np.asarray(image)
    return pixels.shape, hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()


def picture_key(picture: Any) -> Hashable:
    """Equal for equal pictures, given as bytes of a file or by name; of files the size and both ends decide.

    Two pictures that differ only in the middle would be held to be one, which holds both of them out or neither.
    """
    if isinstance(picture, bytes):
        return len(picture), zlib.crc32(picture[:ENDS]), zlib.crc32(picture[-ENDS:])
    return str(picture)
