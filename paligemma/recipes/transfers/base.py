"""What a published transfer is: how a row of its data set becomes prompt and answer, and every number of its training.

The numbers are those of big_vision's configs/proj/paligemma/transfers (the settings that were used, `sweep_best`, not
the defaults of its files, which often differ) and of appendix J of the PaliGemma report.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from paligemma.config import Resize
from paligemma.data.builders.base import choice_no_replacement, lowered
from paligemma.errors import DataError, OptionError, nearest
from paligemma.tasks.base import MaskEncoder

T = TypeVar("T")
Row = Mapping[str, Any]  # as it stands in the file
Columns = tuple[str, ...]  # names that mean the same; a row holds one of them
Choose = Literal["cycle", "random", "only"]

ANSWER: Columns = ("answer",)
ANSWERS: Columns = ("answers", "answer")
CAPTIONS: Columns = ("captions", "caption")
BOX: Columns = ("box_xyxy_px", "bbox", "box_yxyx_norm")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a transfer is trained at one resolution; the defaults are those of nearly all.

    Attributes:
        epochs: passes over the rows; `steps` in their place where given.
        lr, weight_decay: at factor 1 of the schedule; decay is *not* multiplied by lr.
        dropout: in the decoder.
        freeze_image: image tower and projector do not learn.
    """

    epochs: float
    lr: float
    weight_decay: float = 0.0
    batch_size: int = 256
    dropout: float = 0.0
    label_smoothing: float = 0.0
    freeze_image: bool = False
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Which time it is that a row is seen, for what differs from pass to pass.

    Attributes:
        seed: of the run; epoch: passes before this one; index: of the row in its file.
        key: of the row: what it calls itself, or where it stands.
        is_training: False takes the first of several answers and leaves options in their order.
        where: how messages call the row.
        mask_encoder: 64 x 64 maps -> codes, for answers with masks.
    """

    seed: int = 0
    epoch: int = 0
    index: int = 0
    key: str = ""
    is_training: bool = True
    where: str = "the row"
    mask_encoder: MaskEncoder | None = None

    def cycle(self, items: Sequence[T]) -> T:
        """All of them in random order before any is seen again (`choice_no_replacement`)."""
        if not self.is_training:
            return items[0]
        return items[choice_no_replacement(len(items), seed=self.seed, key=self.key, epoch=self.epoch)]

    def random(self, items: Sequence[T]) -> T:
        """Any of them."""
        return items[int(self.rng().integers(len(items)))] if self.is_training else items[0]

    def rng(self) -> np.random.Generator:
        """The random numbers of this row in this pass."""
        return np.random.default_rng([self.seed, self.epoch, self.index])


Build = Callable[[Row, Turn], tuple[str, list[str]]]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One row of the table of transfers.

    Attributes:
        prompt: the prefix; names in braces are columns.
        answer: the column of the suffix, text or a list of texts.
        choose: which of several: "cycle" over epochs, "random", or "only" where there is one.
        lower: answers are lower-cased, A to Z alone, as the reference's operation does.
        build: makes the prefix and all true suffixes of a row where that takes more than the fields above.
        also: more columns that a row must hold; with `build`, all but the answer's.
        passes_over: what an epoch counts: "rows"; or "pictures", of whose rows every pass shows one, each in turn.
        text_length: text tokens that the model sees, bos to eos; the longest answer that is decoded.
        settings: by resolution of the checkpoint; none for what is only scored.
        resize: of pictures in training; resize_eval: when asked, if another. None: as the checkpoint has it.
        n_images: pictures of a row. n_frames, stride: of a clip: how many frames, and frames of the source from one to
            the next; None for pictures.
        red_box: the outline of the row's box is drawn into the picture, after it was resized.
        beams: of decoding; 1 is greedy.
        metrics: as they are reported, and as `score` measures them. sets: what is scored.
        final_split: what the reported numbers are trained on, where that is not the train split.
        dflt: what the reference's file says by default, where that is not what was used.
        kind, warmup, clip_norm: of the optimiser. trains: component that learns, all else is frozen; None: all.
        save_every: steps between snapshots.
        model: base checkpoint without its resolution.
        source: where the numbers come from, if not big_vision's file of that name.
    """

    name: str
    prompt: str
    answer: Columns
    choose: Choose = "cycle"
    lower: bool = False
    build: Build | None = None
    also: tuple[Columns, ...] = ()
    passes_over: Literal["rows", "pictures"] = "rows"
    text_length: int = 32
    settings: Mapping[int, Setting] = field(default_factory=dict)
    resize: Resize | None = "bv_bilinear"
    resize_eval: Resize | None = None
    n_images: int = 1
    n_frames: int | None = None
    stride: int | None = None
    red_box: bool = False
    beams: int = 1
    metrics: tuple[str, ...]
    sets: tuple[str, ...] = ()
    final_split: str = ""
    dflt: str = ""
    kind: Literal["adam", "sgd"] = "adam"
    warmup: float = 0.05
    clip_norm: float | None = 1.0
    trains: str | None = None
    save_every: int = 1000
    model: str = "paligemma-3b-pt"
    source: str = ""

    @property
    def asked_resize(self) -> Resize | None:
        """How pictures are resized when the model is asked."""
        return self.resize_eval or self.resize

    @property
    def columns(self) -> tuple[Columns, ...]:
        """What a row must hold besides its pictures."""
        asked = () if self.build else tuple((name,) for name in fields_of(self.prompt))
        return (*asked, *self.also, self.answer)

    @property
    def pictures(self) -> Columns:
        """Columns that may name the pictures."""
        return ("image", "images") if self.n_frames is None else ("video", "images")

    def check(self, row: Row, where: str) -> None:
        """Whether a row holds every column.

        Raises:
            DataError: one is not there; the message offers the nearest that is.
        """
        for names in (self.pictures, *self.columns):
            column(row, names, where, self.name)

    @property
    def decoding(self) -> dict[str, Any]:
        """Options of `evaluate_folder`: beams, longest answer in tokens."""
        return {"n_beams": self.beams, "max_new_tokens": self.text_length}

    def form(self, row: Row, turn: Turn) -> tuple[str, str]:
        """Prompt and answer of a row.

        Raises:
            DataError: a column is missing, empty or of the wrong kind; it names the row.
        """
        prefix, found = self.answers(row, turn)
        return prefix, turn.random(found) if self.choose == "random" else turn.cycle(found)

    def answers(self, row: Row, turn: Turn) -> tuple[str, list[str]]:
        """Prompt and every true answer of a row.

        Raises:
            DataError: as `form`.
        """
        self.check(row, turn.where)
        if self.build is not None:
            prefix, found = self.build(row, turn)
        else:
            prefix, found = self.filled(row, turn.where), texts(row, self.answer, turn.where)
        if self.choose == "only" and len(found) > 1:
            name = column(row, self.answer, turn.where)
            raise DataError(
                f"{turn.where}: '{name}' is a list of {len(found)}: expected one text for {self.name}. Keep one."
            )
        return prefix, [lowered(answer) for answer in found] if self.lower else found

    def filled(self, row: Row, where: str) -> str:
        """The prompt with a row's columns in it."""
        return self.prompt.format_map({name: text(row, (name,), where) for name in fields_of(self.prompt)})

    def setting(self, resolution: int) -> Setting:
        """The numbers of a resolution; those of the nearest where the table has none for it.

        Raises:
            OptionError: only scored, never trained.
        """
        return self.settings[self.nearest_resolution(resolution)]

    def nearest_resolution(self, resolution: int) -> int:
        """The resolution of the table that is nearest by ratio, of two the smaller.

        Raises:
            OptionError: no resolution, or only scored, never trained.
        """
        if not self.settings:
            raise OptionError(f"{self.name} is only scored: expected a transfer that is trained. See `TRANSFERS`.")
        if resolution < 1:
            raise OptionError(f"resolution={resolution}: expected a side in pixels, one of {_listed(self.settings)}.")
        return min(sorted(self.settings), key=lambda side: max(side / resolution, resolution / side))


def fields_of(prompt: str) -> list[str]:
    """The names in braces."""
    return [name for _, name, _, _ in string.Formatter().parse(prompt) if name]


def same(setting: Setting, *resolutions: int) -> dict[int, Setting]:
    """One setting for several resolutions; 224 and 448, as most have it, where none is named."""
    return dict.fromkeys(resolutions or (224, 448), setting)


def column(row: Row, names: Columns, where: str, transfer: str = "") -> str:
    """Which of the names a row has.

    Raises:
        DataError: none; the message offers the nearest column.
    """
    for name in names:
        if name in row:
            return name
    wanted = " or ".join(f"'{name}'" for name in names)
    hint = next((hint for name in names if (hint := nearest(name, map(str, row)))), "")
    raise DataError(
        f"{where}: no column {wanted}: expected it{f' for {transfer}' if transfer else ''}; there are "
        f"{', '.join(map(str, row)) or 'none'}.{hint}",
        kind="wrong column",
    )


def text(row: Row, names: Columns, where: str) -> str:
    """A column as text; numbers are spelled.

    Raises:
        DataError: not there, or neither text nor number.
    """
    name = column(row, names, where)
    return _text(row[name], name, where)


def texts(row: Row, names: Columns, where: str) -> list[str]:
    """A column of texts: a list of them, one alone, or a list of {"answer": text} as in VQAv2's own files.

    Raises:
        DataError: not there, empty, or something else.
    """
    name = column(row, names, where)
    given = row[name] if isinstance(row[name], list | tuple) else [row[name]]
    if not given:
        raise DataError(f"{where}: '{name}' is an empty list: expected one text or more. Leave the row out.")
    return [_text(item["answer"] if isinstance(item, Mapping) and "answer" in item else item, name, where)
            for item in given]  # fmt: skip


def whole(row: Row, names: Columns, where: str) -> int | None:
    """A column as a whole number; None where it is something else."""
    value = row[column(row, names, where)]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{name}' holds a {type(value).__name__}: expected text.", kind="wrong column")
    return value


def _listed(settings: Mapping[int, Setting]) -> str:
    return ", ".join(str(side) for side in settings)
