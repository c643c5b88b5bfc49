"""One example of any task: pictures, what is asked, what is answered."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from paligemma.errors import DataError, PaliGemmaError


@dataclass(frozen=True)
class Example:
    """What a source hands out, before any pixel is read.

    Attributes:
        images: paths, PIL images, uint8[H, W, 3] arrays or bytes; several make one example of several pictures.
        prefix: the prompt.
        suffix: the answer to learn; "" is eos alone.
        weight: factor of the example's loss.
        where: how messages call it: "train.jsonl line 17".
        meta: what else the row holds; "references" are all right answers, where there are several.
        unlearned: (first, one past the last) characters of the suffix whose tokens count in no loss, such as the
            places of noise boxes.
        size_hw: of the first picture, as those say who gave its places; None where nothing does. With swapped sides the
            picture is refused: it was turned, and its places would be those of something else.
    """

    images: tuple[Any, ...]
    prefix: str
    suffix: str
    weight: float = 1.0
    where: str = "the example"
    meta: Mapping[str, Any] = field(default_factory=dict)
    unlearned: tuple[tuple[int, int], ...] = ()
    size_hw: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def references(self) -> tuple[str, ...]:
        """Every answer that would be right: the column `references`, a list of texts, or the suffix alone."""
        said = self.meta.get("references")
        if isinstance(said, list | tuple) and said and all(isinstance(one, str) for one in said):
            return tuple(one.strip() for one in said)
        return (self.suffix.strip(),)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Errors inside the block with the name of a row in front."""
    try:
        yield
    except PaliGemmaError as error:
        message, kind = str(error), getattr(error, "kind", "unreadable row")
        raise DataError(message if where in message else f"{where}: {message}", kind=kind) from None
