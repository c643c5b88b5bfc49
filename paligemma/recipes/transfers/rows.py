"""Rows of JSONL files, as published data sets have their columns, to examples.

{"image": "1.jpg", "question": "what is it?", "answers": ["cat", "a cat", …]}     open_rows("vqav2", "vqav2/")
  →  answer en what is it?   →   a cat   (another of the answers in the next pass)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma.config import Resize
from paligemma.data.builders.base import choice_no_replacement
from paligemma.data.example import Example, naming
from paligemma.data.sources.folder import picture_size
from paligemma.data.sources.jsonl import Jsonl, find_splits
from paligemma.data.subset import Subset, held_out, pictures_of_rows
from paligemma.errors import DataError, OptionError, nearest
from paligemma.processing.image import load_image
from paligemma.processing.resize import resize
from paligemma.recipes.rows import Rows, tell_problems
from paligemma.recipes.transfers.base import Row, Transfer, Turn
from paligemma.recipes.transfers.boxes import MASK, mask_of, norm_box_of, outlined
from paligemma.recipes.transfers.table import TRANSFERS
from paligemma.tasks.base import MaskEncoder

PICTURES = ("image", "images", "video", "n_frames", "stride", "fps", "start_s", "end_s")


@dataclass(frozen=True)
class Prepared:
    """A picture at the size that the model sees, made when somebody looks.

    Attributes:
        source: what `load_image` takes.
        row: holds the box whose red outline is drawn; None draws none.
    """

    source: Any
    resolution: int
    how: Resize
    row: Row | None = None
    where: str = "the row"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.uint8]:
        picture = load_image(self.source)
        sized = np.asarray(resize(picture, self.resolution, self.how), np.uint8)
        if self.row is None:
            return sized
        height, width = picture.shape[:2]
        return outlined(sized, norm_box_of(self.row, (height, width), self.where))


class TransferRows:
    """The examples of a JSONL file with a transfer's own columns.

    Args:
        jsonl: the rows.
        seed: of what differs from pass to pass.
        is_training: held-out rows take the first of several answers, and options as given.
        resolution: side of the pictures that the model sees; needed where pictures are prepared here.
        mask_encoder: for answers with masks.

    Raises:
        OptionError: pictures must be prepared and the resolution is not known.
    """

    def __init__(
        self,
        jsonl: Jsonl,
        transfer: Transfer,
        *,
        seed: int = 0,
        is_training: bool = True,
        resolution: int | None = None,
        mask_encoder: MaskEncoder | None = None,
    ) -> None:
        self.jsonl, self.transfer, self.seed, self.is_training = jsonl, transfer, seed, is_training
        self.resolution, self.mask_encoder = resolution, mask_encoder
        # The model has one way of resizing, the one for answers; what else training does happens here.
        self.how = transfer.resize if is_training else transfer.asked_resize
        self.prepares = transfer.red_box or (self.how != transfer.asked_resize)
        if self.prepares and resolution is None:
            raise OptionError(f"{transfer.name} prepares its pictures: expected resolution=, the side the model sees.")

    def __len__(self) -> int:
        return len(self.jsonl)

    def where(self, index: int) -> str:
        """How messages call a row."""
        return self.jsonl.where(index)

    def __getitem__(self, index: int, /) -> Example:
        return self.varied(index, 0)

    def varied(self, index: int, epoch: int) -> Example:
        """The example of a row in a pass.

        Raises:
            DataError: a column is missing or of the wrong kind, or a picture is not there; it names the row.
        """
        row, where = self.jsonl.row(index), self.where(index)
        turn = Turn(
            seed=self.seed, epoch=epoch, index=index, key=f"{self.transfer.name} {row.get('id', where)}",
            is_training=self.is_training, where=where, mask_encoder=self.mask_encoder,
        )  # fmt: skip
        with naming(where):
            prefix, suffix = self.transfer.form(row, turn)
        meta = {key: value for key, value in row.items() if key not in PICTURES}
        return Example(self._pictures(row, where), prefix, suffix, 1.0, where, meta)

    def _pictures(self, row: Row, where: str) -> tuple[Any, ...]:
        transfer = self.transfer
        if transfer.n_frames is not None:
            return _frames(self.jsonl, row, where, transfer.n_frames, transfer.stride)
        found = self.jsonl.images(row, where)
        if len(found) != transfer.n_images:
            raise DataError(f"{where}: {len(found)} pictures: expected {transfer.n_images} for {transfer.name}.")
        if transfer.answer == MASK:
            mask, size = mask_of(row, where), picture_size(found[0], where)
            if mask.size_hw != size:
                told = [f"{width}×{height}" for height, width in (mask.size_hw, size)]
                raise DataError(f"{where}: a mask of {told[0]}: expected the picture's {told[1]}.", kind="bad mask")
        if not self.prepares or self.resolution is None or self.how is None:
            return found
        boxed = row if transfer.red_box else None
        return tuple(Prepared(picture, self.resolution, self.how, boxed, where) for picture in found)


class OnePerPicture:
    """Every picture once: each pass shows another of its rows, until all were shown, in random order."""

    def __init__(self, rows: TransferRows, among: Sequence[int]) -> None:
        self.source, self.name = rows, rows.transfer.name
        chosen = np.asarray(among, np.int64)
        picture = pictures_of_rows(rows.jsonl)[chosen]
        order = np.argsort(picture, kind="stable")
        self.members = chosen[order]
        self.starts = np.flatnonzero(np.diff(picture[order], prepend=-1))

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, index: int) -> str:
        """How messages call a picture: by its first row."""
        return self.source.where(int(self.members[self.starts[index]]))

    def __getitem__(self, index: int, /) -> Example:
        return self.varied(index, 0)

    def varied(self, index: int, epoch: int) -> Example:
        """The row of a picture that a pass shows."""
        end = self.starts[index + 1] if index + 1 < len(self) else len(self.members)
        rows = self.members[self.starts[index] : end]
        place = choice_no_replacement(
            len(rows), seed=self.source.seed, key=f"{self.name} {self.where(index)}", epoch=epoch
        )
        return self.source.varied(int(rows[place]), epoch // len(rows))


def _frames(jsonl: Jsonl, row: Row, where: str, n_frames: int, stride: int | None) -> tuple[Any, ...]:
    """So many frames of a clip; one that is shorter starts over."""
    from paligemma.data.sources.video import tiled

    wanted: Mapping[str, Any] = row
    if row.get("video") is not None:
        own = {"stride": stride} if row.get("fps") is None else {}
        wanted = {**row, "n_frames": n_frames, **{key: value for key, value in own.items() if row.get(key) is None}}
    with naming(where):
        return tiled(jsonl.images(wanted, where), n_frames)


def transfer_of(name: str) -> Transfer:
    """A transfer by its name.

    Raises:
        OptionError: there is none; the message offers the nearest.
    """
    if name not in TRANSFERS:
        raise OptionError(
            f"there is no transfer {name!r}: expected one of {', '.join(TRANSFERS)}.{nearest(name, TRANSFERS)}"
        )
    return TRANSFERS[name]


def rows_of(name: str, source: Jsonl | str | Path, **options: Any) -> TransferRows:
    """The examples of one JSONL file; options are those of `TransferRows`."""
    return TransferRows(source if isinstance(source, Jsonl) else Jsonl(source), transfer_of(name), **options)


def asked_rows(
    name: str, data: str | Path, split: str | None = None, *, valid_share: float = 0.1, allow_outside: bool = False,
    **options: Any,
) -> tuple[Rows, str]:  # fmt: skip
    """Rows to ask a model, and where they come from.

    Args:
        split: None: test, valid, or what a run holds out of train; all of a lone train split that is never trained.
        options: those of `TransferRows`.

    Raises:
        OptionError: no such transfer or split. DataError: nothing there.
    """
    found = find_splits(data, allow_outside=allow_outside)
    if split is not None and split not in found:
        raise OptionError(f"{data} has no split '{split}': expected one of {', '.join(found)}.{nearest(split, found)}")
    chosen = split or next(name for name in ("test", "valid", "train") if name in found)
    rows = rows_of(name, found[chosen], is_training=False, **options)
    if split is not None or chosen != "train" or not rows.transfer.settings:
        return rows, f"the {chosen} split"
    _, held, told = held_out(found["train"], valid_share)
    return (Subset(rows, held.rows), f"{told}; all: split train") if len(held) else (rows, "the train split")


def open_rows(
    name: str,
    data: str | Path,
    *,
    seed: int = 0,
    mask_encoder: MaskEncoder | None = None,
    resolution: int | None = None,
    valid_share: float = 0.1,
    allow_outside: bool = False,
    skip_broken: bool = False,
    say: Callable[[str], Any] | None = None,
) -> tuple[Rows, Rows, str]:
    """What is learned, what is held out, and where that comes from.

    Args:
        data: a folder with train.jsonl, and valid.jsonl or test.jsonl where there are, or one file.
        valid_share: of the training rows held out, where there is no other split: every n-th.
        skip_broken: pass over ids used twice, which `say` takes.

    Raises:
        OptionError: no such transfer, or no train split. DataError: nothing there, or ids used twice.
    """
    found = find_splits(data, allow_outside=allow_outside)
    if "train" not in found:
        raise OptionError(f"{data}: no train split: expected train.jsonl beside {', '.join(found)}.")
    tell_problems(found, skip_broken=skip_broken, say=say)
    options: dict[str, Any] = {"seed": seed, "mask_encoder": mask_encoder, "resolution": resolution}
    train = rows_of(name, found["train"], **options)
    by_picture = train.transfer.passes_over == "pictures"
    for split in ("valid", "test"):
        if split in found:
            whole: Rows = OnePerPicture(train, range(len(train))) if by_picture else train
            return whole, rows_of(name, found[split], is_training=False, **options), f"the {split} split"
    learned, held, told = held_out(found["train"], valid_share)
    rows = learned.rows if len(held) else range(len(train))
    asked = rows_of(name, found["train"], is_training=False, **options)
    return OnePerPicture(train, rows) if by_picture else Subset(train, rows), Subset(asked, held.rows), told
