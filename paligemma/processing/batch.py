"""Batch: examples as rows of tensors, one example per row (`collate`) or several (`pack`).

Segment ids keep the examples of a row apart and positions count from 0 within each, so that a row means the same
however it is padded or packed.
"""

# B rows · S slots of a row · I images of the batch · P tokens of an image · R pixels of a side · D width

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from paligemma.errors import OptionError, ShapeError, nearest
from paligemma.processing.prompt import PADDING, Sequence

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Item:
    """One example on its way into a batch.

    Attributes:
        sequence: its row, from `lay_out`.
        pixels: float32[n, 3, R, R] of its n images in [-1, 1], or their uint8 levels, or None; or
        image_embeds: float[n, P, D], the same images after `PaliGemmaModel.embed_image`.
        weight: factor of the example's loss, for tasks that shall count more or less.
    """

    sequence: Sequence
    pixels: Tensor | None = None
    image_embeds: Tensor | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.pixels is not None and self.image_embeds is not None:
            raise ShapeError("an example has both pixels and image_embeds: expected one of them. Drop the pixels.")
        n_slots = self.sequence.n_image_tokens
        if self.n_images == 0 if n_slots else self.n_images:
            raise ShapeError(
                f"an example has {self.n_images} images for {n_slots} image slots: expected slots for each."
            )
        if self.n_images and n_slots % self.n_images:
            raise ShapeError(
                f"{n_slots} image slots do not divide among {self.n_images} images: expected as many for each."
            )

    @property
    def images(self) -> Tensor | None:
        return self.pixels if self.image_embeds is None else self.image_embeds

    @property
    def n_images(self) -> int:
        return 0 if self.images is None else len(self.images)


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows of examples, ready for the model; for asking and for teaching alike.

    Attributes:
        tokens: int64[B, S], 0 at image slots and padding.
        mask_image: bool[B, S], slots that image tokens fill.
        mask_ar: int64[B, S], 1 opens a new block of attention.
        mask_input: bool[B, S], real tokens.
        mask_loss: bool[B, S], True where token s is a target; the logits at s - 1 predict it.
        segment_ids: int64[B, S], the example within the row counted from 1; 0 is padding.
        positions: int64[B, S], counted from 0 within the segment, image slots included; 0 at padding.
        pixels: float32[I, 3, R, R] in [-1, 1], the images of all examples one after another, or with `image_of` each
            picture once; None without images or with `image_embeds`. Batches of a `Loader` hold uint8 levels 0 to 255
            where resizing gives whole ones: a quarter of the bytes to the device, where the tower makes pixels of them.
            Do not cast those: `paligemma.models.siglip.of_levels` makes the float32 of them.
        image_embeds: float[I, P, D] in place of pixels.
        image_of: int64[n], which of the I pictures each of the n images of all examples is, where several examples are
            about one picture: it runs through the tower once. None: each its own.
        n_images: images of each example, examples in reading order of the rows.
        order: for each example in that order, its place in the list that was collated; differs from 0, 1, 2, … only
            where packing moved examples.
        weights: float32[n_examples], factors of their losses in the same order; None where all are 1.
    """

    tokens: Tensor
    mask_image: Tensor
    mask_ar: Tensor
    mask_input: Tensor
    mask_loss: Tensor
    segment_ids: Tensor
    positions: Tensor
    pixels: Tensor | None = None
    image_embeds: Tensor | None = None
    image_of: Tensor | None = None
    n_images: tuple[int, ...]
    order: tuple[int, ...]
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2:
            raise ShapeError(f"Batch.tokens has shape {tuple(self.tokens.shape)}: expected [rows, slots].")
        for name in ROW_FIELDS:
            shape = getattr(self, name).shape
            if shape != self.tokens.shape:
                raise ShapeError(
                    f"Batch.{name} has shape {tuple(shape)}: expected {tuple(self.tokens.shape)} as tokens."
                )
        if self.pixels is not None and self.image_embeds is not None:
            raise ShapeError("Batch has both pixels and image_embeds: expected one of them. Set the other to None.")
        if self.pixels is not None and (self.pixels.ndim != 4 or self.pixels.shape[1] != 3):
            raise ShapeError(f"Batch.pixels has shape {tuple(self.pixels.shape)}: expected [images, 3, R, R].")
        if self.image_embeds is not None and self.image_embeds.ndim != 3:
            raise ShapeError(
                f"Batch.image_embeds has shape {tuple(self.image_embeds.shape)}: expected [images, tokens, width]."
            )
        n_given = 0 if self.images is None else len(self.images)
        if self.weights is not None and self.weights.shape != (len(self.n_images),):
            raise ShapeError(
                f"Batch.weights has shape {tuple(self.weights.shape)}: expected one for each of {len(self.n_images)} "
                "examples."
            )
        if self.image_of is not None:
            n_given = len(self.image_of)
        if sum(self.n_images) != n_given or len(self.order) != len(self.n_images):
            raise ShapeError(
                f"Batch.n_images={self.n_images} counts {sum(self.n_images)} images, given are {n_given}, "
                f"and order has {len(self.order)} examples: expected them to agree."
            )

    @property
    def images(self) -> Tensor | None:
        return self.pixels if self.image_embeds is None else self.image_embeds

    @property
    def n_examples(self) -> int:
        return len(self.n_images)

    @property
    def n_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Slots of a row, S."""
        return self.tokens.shape[1]

    @property
    def is_packed(self) -> bool:
        """Whether some row holds several examples."""
        return self.n_examples > self.n_rows

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def __repr__(self) -> str:
        return f"Batch({self.n_examples} examples in {self.n_rows} rows of {self.length}, {sum(self.n_images)} images)"

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on another device; dtypes stay."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, so that copies to a GPU need not wait."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of `PaliGemmaModel.forward` and `prefill`, tokens included: all but `mask_loss`."""
        names = [name for name in ROW_FIELDS if name != "mask_loss"]
        return {name: getattr(self, name) for name in (*names, *IMAGE_FIELDS)}

    def with_image_embeds(self, image_embeds: Tensor) -> "Batch":
        """The same batch with its images already through the tower, in the order of `pixels`."""
        return dataclasses.replace(self, pixels=None, image_embeds=image_embeds)

    def _mapped(self, change: Any) -> "Batch":
        tensors = {name: getattr(self, name) for name in (*ROW_FIELDS, *IMAGE_FIELDS, "weights")}
        return dataclasses.replace(
            self, **{name: change(value) for name, value in tensors.items() if value is not None}
        )


ROW_FIELDS = ("tokens", "mask_image", "mask_ar", "mask_input", "mask_loss", "segment_ids", "positions")
IMAGE_FIELDS = ("pixels", "image_embeds", "image_of")


def collate(
    items: Iterable[Item], *, padding_side: PaddingSide = "right", length: int | None = None, multiple_of: int = 1
) -> Batch:
    """One example per row, in the order given.

    Args:
        padding_side: where the shorter rows are filled. Answers do not depend on it.
        length: slots of a row; default the longest example.
        multiple_of: round the length up, so that a compiled model meets few shapes.

    Raises:
        ShapeError: an example longer than `length`, or images of unlike shapes.
        OptionError: an unknown padding side.
    """
    if padding_side not in get_args(PaddingSide):
        hint = nearest(str(padding_side), get_args(PaddingSide))
        raise OptionError(f"padding_side={padding_side!r}: expected 'left' or 'right'.{hint}")
    items = list(items)
    rows = [[(i, item)] for i, item in enumerate(items)]
    return _assemble(rows, _row_length(items, length, multiple_of), padding_side)


def pack(items: Iterable[Item], length: int | None = None, *, multiple_of: int = 1) -> Batch:
    """Several examples per row, each in the first row that has room (first fit, in the order given).

    Examples of a row neither see nor shift one another. `Batch.order` tells which is where.

    Args:
        length: slots of a row; default the longest example.

    Raises:
        ShapeError: an example longer than `length`, or images of unlike shapes.
    """
    items = list(items)
    length = _row_length(items, length, multiple_of)
    rows: list[list[tuple[int, Item]]] = []
    room: list[int] = []
    for i, item in enumerate(items):
        need = len(item.sequence)
        row = next((r for r, free in enumerate(room) if free >= need), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(length)
        rows[row].append((i, item))
        room[row] -= need
    return _assemble(rows, length, "right")


def _row_length(items: List[Item], length: int | None, multiple_of: int) -> int:
    if not items:
        raise ShapeError("a batch of no examples: expected at least one.")
    if multiple_of < 1:
        raise OptionError(f"multiple_of={multiple_of}: expected 1 or more.")
    longest = max(len(item.sequence) for item in items)
    if length is not None and longest > length:
        raise ShapeError(
            f"an example has {longest} tokens, a row {length}: expected every example to fit. Raise the length, or cut "
            "the example with fit()."
        )
    length = longest if length is None else length
    return -(-length // multiple_of) * multiple_of


def _assemble(rows: list[list[tuple[int, Item]]], length: int, padding_side: PaddingSide) -> Batch:
    shape = (len(rows), length)
    arrays: dict[str, Any] = {
        name: np.full(shape, padding, dtype=bool if isinstance(padding, bool) else np.int64)
        for name, padding in PADDING.items()
    }
    arrays["segment_ids"], arrays["positions"] = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for r, row in enumerate(rows):
        start = length - sum(len(item.sequence) for _, item in row) if padding_side == "left" else 0
        for segment, (_, item) in enumerate(row, start=1):
            slots = slice(start, start + len(item.sequence))
            for name in PADDING:
                arrays[name][r, slots] = getattr(item.sequence, name)
            # Padding that fit() put inside a sequence belongs to no segment.
            real = item.sequence.mask_input
            arrays["segment_ids"][r, slots] = np.where(real, segment, 0)
            arrays["positions"][r, slots] = np.where(real, np.cumsum(real) - 1, 0)
            start = slots.stop
    placed = [entry for row in rows for entry in row]
    pixels, image_embeds, image_of = _images([item for _, item in placed])
    return Batch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        pixels=pixels,
        image_embeds=image_embeds,
        image_of=image_of,
        n_images=tuple(item.n_images for _, item in placed),
        order=tuple(i for i, _ in placed),
        weights=_weights([item.weight for _, item in placed]),
    )


def _weights(weights: list[float]) -> Tensor | None:
    return None if all(weight == 1 for weight in weights) else torch.tensor(weights, dtype=torch.float32)


def _images(items: list[Item]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pixels or image_embeds of all examples in the order of the rows, and which is whose where they share pictures.

    Examples share what they were given as one tensor.
    """
    pixels = [item.pixels for item in items if item.pixels is not None]
    embeds = [item.image_embeds for item in items if item.image_embeds is not None]
    if pixels and embeds:
        raise ShapeError(
            f"{len(pixels)} examples have pixels and {len(embeds)} have image_embeds: expected one kind in a batch. "
            "Encode the other images first."
        )
    given = pixels or embeds
    shapes = sorted({tuple(tensor.shape[1:]) for tensor in given})
    if len(shapes) > 1:
        raise ShapeError(f"images of unlike shapes {shapes} in one batch: expected one shape, that of the model.")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in given})
    if len(dtypes) > 1:
        raise ShapeError(
            f"images of {' and '.join(dtypes)} in one batch: expected one dtype. Of uint8, which are levels, of_levels "
            "makes pixels."
        )
    first: dict[int, int] = {}  # tensor -> place of its first picture
    unique: list[Tensor] = []
    image_of: list[int] = []
    n = 0
    for tensor in given:
        if id(tensor) not in first:
            first[id(tensor)] = n
            unique.append(tensor)
            n += len(tensor)
        image_of += range(first[id(tensor)], first[id(tensor)] + len(tensor))
    joined = _joined(unique) if unique else None
    shared = torch.tensor(image_of) if len(unique) < len(given) else None
    return (None, joined, shared) if embeds else (joined, None, shared)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Tensors one after another; views that lie so in one block are that stretch of it, without a copy."""
    block = tensors[0]._base
    if block is not None and block.is_contiguous() and all(tensor._base is block for tensor in tensors):
        size = block.stride(0)
        starts = [tensor.storage_offset() // size for tensor in tensors]
        ends = [start + len(tensor) for start, tensor in zip(starts, tensors, strict=True)]
        fits = all(tensor.stride() == block.stride() for tensor in tensors)
        if fits and block.storage_offset() == 0 and starts[1:] == ends[:-1]:
            return block[starts[0] : ends[-1]]
    return torch.cat(tensors)
