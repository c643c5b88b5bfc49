"""Pictures that the image tower has already seen.

Image tokens depend on the picture alone, so one pass of SigLIP serves every prompt about it. (The decoder's keys and
values do not: in a prefix-LM the image attends to the prompt, so those are never kept between prompts.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paligemma.errors import ShapeError

# A path, a PIL image, uint8[H, W, 3], the bytes of a file, or an EncodedImage; a list of those is one example of
# several pictures, None an example without any. Any: the reader of pictures also takes whatever has `__array__`.
Pictures = Any


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """The image tokens of one example: one picture, or several in reading order.

    Attributes:
        image_embeds: float[n, P, D] on the model's device, in its dtype; out of the projector, not scaled.
        sizes_hw: height and width in pixels of each of the n pictures, EXIF orientation applied.
        adapter: under which the pictures were seen, if it changes the image tower or the projector; else None.
    """

    image_embeds: Tensor
    sizes_hw: tuple[tuple[int, int], ...]
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.image_embeds.ndim != 3 or self.image_embeds.shape[0] != len(self.sizes_hw):
            raise ShapeError(
                f"image_embeds has shape {tuple(self.image_embeds.shape)} for {len(self.sizes_hw)} pictures: expected "
                "[n_pictures, n_image_tokens, width]. Make handles with encode_image()."
            )

    @property
    def n_images(self) -> int:
        return len(self.sizes_hw)

    @classmethod
    def joined(cls, parts: Sequence["EncodedImage"]) -> "EncodedImage":
        """Several handles as one multi-image example."""
        if len(parts) == 1:
            return parts[0]
        shapes = {tuple(part.image_embeds.shape[1:]) for part in parts}
        if len(shapes) != 1:
            raise ShapeError(
                f"image handles of unlike shapes {sorted(shapes)}: expected handles of one and the same model."
            )
        sizes_hw: tuple[tuple[int, int], ...] = sum((part.sizes_hw for part in parts), ())
        return cls(torch.cat([part.image_embeds for part in parts]), sizes_hw, parts[0].adapter)
