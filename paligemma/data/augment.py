"""Augmentation for transfers: seeded flips, crops, zooms and colours, with boxes, masks, words and regions moved along.

    options = AugmentOptions(flip=0.5, crop=0.5, colour=0.2)
    augment(record, rng, options)                    annotations, before a builder makes a prompt of them
    augment_example(example, rng, options)           prompts: the boxes that stand in the text are moved
    Augmented(source, options, seed=0)               a source of prompts whose rows differ from epoch to epoch

Off by default: nothing changes, nothing is decoded, the same object comes back. What would make a text wrong is left
out: no flip where a text says left or right or where there is writing, no turn of hues where a text names a colour
(`guards.py`), no crop where it is unknown what it would cut off. What a crop takes from a caption, or from the answer
to a question, nobody knows: keep crops large where those are learned.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from paligemma.data.example import Example, naming
from paligemma.data.guards import names_colour, names_side
from paligemma.data.moves import Window, look, move_record, whole
from paligemma.data.record import Record
from paligemma.data.written import TOKENS, Places, move_places, places_of, read_written, spell
from paligemma.errors import DataError, OptionError
from paligemma.processing.image import load_image
from paligemma.processing.resize import Picture
from paligemma.tasks.base import MaskDecoder, MaskEncoder

Load = Callable[[Any], Picture]
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """What may happen to a picture. All numbers are ours: the reports' transfers augment nothing.

    Attributes:
        flip: probability of mirroring left to right.
        flip_text: mirror pictures with words in them as well; their letters then read backwards.
        crop: probability of a crop.
        crop_area: least and greatest share of the picture that a crop keeps.
        crop_aspect: least and greatest factor by which a crop is wider, relative to the picture.
        scale: least and greatest zoom: 2 shows half of each side, 0.5 puts the picture on a canvas of its mean colour,
            twice as wide and high. Always drawn, as often in as out.
        colour: brightness, contrast and saturation each change by a factor of 1 - colour to 1 + colour.
        hue: hues turn by up to this share of the colour circle, either way.
        min_visible: least share of a thing or region that must be left, else it is dropped: of its mask where it has
            one, of its box otherwise.
        min_visible_words: the same of words, which are read whole or not at all.
        tries: crops drawn until one leaves something of each kind; after that the picture stays whole.
    """

    flip: float = 0.0
    flip_text: bool = False
    crop: float = 0.0
    crop_area: tuple[float, float] = (0.5, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    scale: tuple[float, float] = (1.0, 1.0)
    colour: float = 0.0
    hue: float = 0.0
    min_visible: float = 0.25
    min_visible_words: float = 0.9
    tries: int = 10

    def __post_init__(self) -> None:
        for name, limit in (
            ("flip", 1), ("crop", 1), ("colour", 0.9), ("hue", 0.5), ("min_visible", 1), ("min_visible_words", 1),
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= limit:
                raise OptionError(f"augmentation {name}={getattr(self, name)}: expected 0 to {limit}.")
        # A canvas of a zoom below 1/4 would have more than 16 times the picture's pixels.
        for name, low, high in (("crop_area", 0.01, 1), ("crop_aspect", 0.1, 10), ("scale", 0.25, 4)):
            pair = tuple(getattr(self, name))
            if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
                raise OptionError(
                    f"augmentation {name}={pair}: expected (least, greatest), both from {low} to {high}, in this order."
                )
        if self.tries < 1:
            raise OptionError(f"augmentation tries={self.tries}: expected at least 1.")

    @property
    def is_on(self) -> bool:
        """Whether anything can happen at all."""
        return bool(self.flip or self.crop or self.colour or self.hue or tuple(self.scale) != (1, 1))


@dataclass(frozen=True)
class _Plan:
    """What was drawn for a picture. A guard may still forbid a part of it, which changes no other draw."""

    flip: bool
    crop: bool
    zoom: float
    factors: tuple[float, float, float]
    turn: float

    @property
    def moves(self) -> bool:
        return self.flip or self.cuts

    @property
    def cuts(self) -> bool:
        return self.crop or self.zoom != 1

    @property
    def paints(self) -> bool:
        return self.factors != (1, 1, 1) or self.turn != 0


def _draw(rng: np.random.Generator, options: AugmentOptions) -> _Plan:
    low, high = np.log(options.scale)
    coins = rng.random(2)
    zoom = float(np.exp(rng.uniform(low, high))) if low < high else float(options.scale[0])
    brightness, contrast, saturation = (float(x) for x in rng.uniform(1 - options.colour, 1 + options.colour, 3))
    turn = float(rng.uniform(-options.hue, options.hue))
    return _Plan(
        bool(coins[0] < options.flip),
        bool(coins[1] < options.crop),
        zoom,
        (brightness, contrast, saturation) if options.colour else (1, 1, 1),
        turn if options.hue else 0.0,
    )


def augment(record: Record, rng: np.random.Generator, options: AugmentOptions, *, load: Load = load_image) -> Record:
    """The record with its pictures changed, and all that has a place in them moved along.

    Several pictures are changed alike; they are cropped and zoomed only where they have one size, as frames do.

    Args:
        load: an entry of `record.images` -> uint8[H, W, 3].

    Returns:
        A record whose pictures are uint8[H, W, 3]; the same object where nothing was drawn.

    Raises:
        DataError: annotations that do not fit the picture. ImageError: a picture that cannot be read.
    """
    if not options.is_on or not record.images:
        return record
    texts = [item.label for item in record.instances] + [text.text for text in record.texts]
    texts += [text for asked in record.questions for text in (asked.question, *asked.answers)]
    plan = _allowed(
        _draw(rng, options),
        texts,
        may_flip=options.flip_text or not record.words,
        may_cut=all(word.box_xyxy_px is not None for word in record.words),
    )
    if not (plan.moves or plan.paints):
        return record
    pictures = [load(image) for image in record.images]
    size_hw = _size(pictures[0])
    has_places = bool(record.instances or record.words or any(text.box_xyxy_px for text in record.texts))
    if has_places and record.size_hw is not None and tuple(record.size_hw) != size_hw:
        raise DataError(
            f"{record.where}: the picture is {size_hw[1]}×{size_hw[0]}, its annotations are for "
            f"{record.size_hw[1]}×{record.size_hw[0]}: expected the same. Mend the size, or scale the boxes."
        )
    moved, window = record, whole(size_hw)
    if plan.moves:

        def place(window: Window) -> Record | None:
            return move_record(
                record, window, size_hw, min_visible=options.min_visible, min_visible_words=options.min_visible_words
            )

        found, window = _placed(place, plan, pictures, rng, options)
        moved = record if found is None else found
    return dataclasses.replace(moved, images=_changed(pictures, window, plan), size_hw=window.size_hw)


def augment_example(
    example: Example,
    rng: np.random.Generator,
    options: AugmentOptions,
    *,
    load: Load = load_image,
    mask_encoder: MaskEncoder | None = None,
    mask_decoder: MaskDecoder | None = None,
) -> Example:
    """The example with its pictures changed, and the boxes and masks of its texts moved along.

    Only colours change where the places in the text cannot be moved: location tokens that make no box, masks without
    both `mask_encoder` and `mask_decoder`, boxes in one of several pictures, a plain transcription ("ocr"). An object
    that a crop cuts off is taken out of the answer, never out of the prompt.

    Returns:
        An example whose pictures are uint8[H, W, 3]; the same object where nothing was drawn.
    """
    if not options.is_on or not example.images:
        return example
    written = read_written(example)
    if written is not None and written.has_masks and (mask_encoder is None or mask_decoder is None):
        written = None
    is_reading = example.prefix.split(" ")[0] == "ocr"
    plan = _allowed(
        _draw(rng, options),
        [TOKENS.sub(" ", example.prefix), TOKENS.sub(" ", example.suffix)],
        may_flip=written is not None and (options.flip_text or not is_reading),
        may_cut=written is not None and (bool(written.answered) or not is_reading),
    )
    if not (plan.moves or plan.paints):
        return example
    pictures = [load(image) for image in example.images]
    size_hw = _size(pictures[0])
    moved, window = example, whole(size_hw)
    if plan.moves and written is not None:
        least = options.min_visible_words if is_reading else options.min_visible
        counted = [entry.box_span not in example.unlearned for entry in written.answered]
        places = places_of(written, size_hw, mask_decoder)

        def place(window: Window) -> Places | None:
            return move_places(places, window, size_hw, least, counted, example.where)

        found, window = _placed(place, plan, pictures, rng, options)
        if found is not None:
            moved = spell(example, written, found, window.size_hw, mask_encoder)
    return dataclasses.replace(moved, images=_changed(pictures, window, plan), size_hw=None)


class Augmented:
    """A source of examples through `augment_example`; a row is the same in any worker, at any time.

    Args:
        source: a source of examples.
        seed: of all choices, with the epoch and the row's number.
    """

    def __init__(
        self,
        source: Any,
        options: AugmentOptions,
        *,
        seed: int = 0,
        load: Load = load_image,
        mask_encoder: MaskEncoder | None = None,
        mask_decoder: MaskDecoder | None = None,
    ) -> None:
        self.source, self.options, self.seed, self.load = source, options, seed, load
        self.mask_encoder, self.mask_decoder = mask_encoder, mask_decoder
        self.is_sequential = bool(getattr(source, "is_sequential", False))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self.varied(index, 0)

    def where(self, index: int) -> str:
        """How messages call a row."""
        name: str = self.source.where(index)
        return name

    def varied(self, index: int, epoch: int) -> Example:
        """The row as it is shown in an epoch."""
        if index < 0:
            index += len(self.source)
        varied = getattr(self.source, "varied", None)
        example: Example = self.source[index] if varied is None else varied(index, epoch)
        rng = np.random.default_rng([self.seed, epoch, index, 1])  # the 1: other draws than the source's own
        with naming(example.where):
            return augment_example(
                example, rng, self.options, load=self.load, mask_encoder=self.mask_encoder,
                mask_decoder=self.mask_decoder,
            )  # fmt: skip


def _allowed(plan: _Plan, texts: Sequence[str], *, may_flip: bool, may_cut: bool) -> _Plan:
    """The plan without what would make a text wrong."""
    return dataclasses.replace(
        plan,
        flip=plan.flip and may_flip and not names_side(texts),
        crop=plan.crop and may_cut,
        zoom=plan.zoom if may_cut else 1.0,
        turn=plan.turn if plan.turn and not names_colour(texts) else 0.0,
    )


def _placed(
    place: Callable[[Window], Found | None],
    plan: _Plan,
    pictures: Sequence[Picture],
    rng: np.random.Generator,
    options: AugmentOptions,
) -> tuple[Found | None, Window]:
    """What `place` makes of the first window that suits it, and that window; otherwise of the whole picture."""
    size_hw = _size(pictures[0])
    if plan.cuts and all(_size(picture) == size_hw for picture in pictures):
        for _ in range(options.tries):
            window = _window(size_hw, plan, rng, options)
            found = place(window)
            if found is not None:
                return found, window
    window = whole(size_hw, plan.flip)
    found = place(window)
    return found, whole(size_hw) if found is None else window


def _window(size_hw: tuple[int, int], plan: _Plan, rng: np.random.Generator, options: AugmentOptions) -> Window:
    """A crop of the picture, zoomed, at a place drawn evenly."""
    height, width = size_hw
    area, aspect = 1.0, 1.0
    if plan.crop:
        area = float(rng.uniform(*options.crop_area))
        aspect = float(np.exp(rng.uniform(*np.log(options.crop_aspect))))
        aspect = min(max(aspect, area), 1 / area)  # beyond these it would be wider or higher than the picture
    new_width = max(1, round(width * (area * aspect) ** 0.5 / plan.zoom))
    new_height = max(1, round(height * (area / aspect) ** 0.5 / plan.zoom))
    x, y = (
        int(rng.integers(min(old - new, 0), max(old - new, 0) + 1))
        for old, new in ((width, new_width), (height, new_height))
    )
    return Window(x, y, new_width, new_height, plan.flip)


def _changed(pictures: Sequence[Picture], window: Window, plan: _Plan) -> tuple[Picture, ...]:
    """All pictures through the window (of another size: only mirrored, if at all) and in other colours."""
    first = _size(pictures[0])
    seen = [
        look(picture, window if _size(picture) == first else whole(_size(picture), window.flipped))
        for picture in pictures
    ]
    return tuple(recolour(picture, plan.factors, plan.turn) if plan.paints else picture for picture in seen)


_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])  # NTSC, 1953


def recolour(picture: Picture, factors: tuple[float, float, float] = (1, 1, 1), turn: float = 0.0) -> Picture:
    """Brightness, contrast around the picture's mean luma, saturation, then hue: one affine map, rounded once.

    Args:
        picture: uint8[H, W, 3].
        factors: of brightness, contrast and saturation.
        turn: of hues, as a share of the circle; the luma stays.
    """
    brightness, contrast, saturation = factors
    mean = float(picture.reshape(-1, 3).mean(0) @ _LUMA)
    fading = saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1))
    angle = 2 * np.pi * turn
    circle = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    matrix = np.linalg.inv(_YIQ) @ circle @ _YIQ @ fading * (contrast * brightness)
    shift = (1 - contrast) * brightness * mean
    rows = tuple(float(x) for row in matrix for x in (*row, shift))
    return np.array(Image.fromarray(picture).convert("RGB", rows))


def _size(picture: Picture) -> tuple[int, int]:
    return picture.shape[0], picture.shape[1]
