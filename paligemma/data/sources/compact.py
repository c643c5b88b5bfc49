"""Rows of a file that has to be read whole, kept as bytes."""

import array
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np


class Compact(Sequence[Any]):
    """JSON values by number, each parsed again when it is asked for.

    Objects of Python take four times as much as their JSON, and a reading process that merely looks at one
    writes to its counter of references, which copies the page that it shares with the others. Bytes stay shared.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        written, ends = io.BytesIO(), array.array("q")
        for value in values:
            written.write(json.dumps(value, separators=(",", ":")).encode("ascii"))
            ends.append(written.tell())
        self._bytes, self._ends = written.getvalue(), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = int(self._ends[place - 1]) if place else 0
        return json.loads(self._bytes[start : int(self._ends[place])])
