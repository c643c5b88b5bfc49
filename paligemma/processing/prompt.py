"""The one sequence layout, for training and inference alike.

    slot          image … image   bos  prefix …  separator   suffix …  eos   padding …
    tokens            0 … 0         2  tok(prefix)  tok("\\n")  tok(suffix)  1      0
    mask_image        1 … 1         0      0           0          0      0      0
    mask_ar           0 … 0         0      0           0          1      1      1     1 opens a new block
    mask_input        1 … 1         1      1           1          1      1      0     real tokens
    mask_loss         0 … 0         0      0           0          1      1      0     targets of the loss

Image and prefix are one block that attends both ways; every token of the suffix opens a block of its own and sees what
came before. Inference is the same row without suffix and eos; a suffix without eos is a forced start.

Source: big_vision configs/proj/paligemma/transfers/common.py.
"""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from paligemma.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Sequence:
    """One example as a row; see the picture at the top of this file.

    Attributes:
        tokens: int64[S], 0 at image slots and padding.
        mask_image: bool[S], slots that image tokens fill.
        mask_ar: int64[S], 1 opens a new block of attention.
        mask_input: bool[S], real tokens.
        mask_loss: bool[S], True where a token is a target; it is predicted at the slot before.
    """

    tokens: NDArray[np.int64]
    mask_image: NDArray[np.bool_]
    mask_ar: NDArray[np.int64]
    mask_input: NDArray[np.bool_]
    mask_loss: NDArray[np.bool_]

    def __post_init__(self) -> None:
        lengths = {f.name: len(getattr(self, f.name)) for f in fields(self)}
        if len(set(lengths.values())) != 1:
            raise ShapeError(
                f"the parts of a sequence have unlike lengths {lengths}: expected one length. Use lay_out()."
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_image_tokens(self) -> int:
        return int(self.mask_image.sum())


PADDING = {"tokens": 0, "mask_image": False, "mask_ar": 1, "mask_input": False, "mask_loss": False}


def lay_out(
    n_image_tokens: int,
    prefix_ids: Ids[int],
    separator_ids: Ids[int] = (),
    suffix_ids: Ids[int] = (),
    *,
    bos: int | None,
    eos: int | None,
) -> Sequence:
    """Put one example in order.

    Args:
        n_image_tokens: image tokens of all its images together; 0 for text alone.
        prefix_ids: the prompt, without bos.
        separator_ids: the newline; empty where it was tokenised together with the prompt.
        suffix_ids: the answer, without eos; empty to ask for one.
        bos: written before the prefix; None for a sequence without.
        eos: written after the suffix, in training and scoring; None in inference, after a forced start too.

    Returns:
        A sequence of n_image_tokens + text tokens, all of them real.
    """
    if n_image_tokens < 0:
        raise ShapeError(f"n_image_tokens={n_image_tokens}: expected 0 or more.")
    asked = [*([] if bos is None else [bos]), *prefix_ids, *separator_ids]
    answered = [*suffix_ids, *([] if eos is None else [eos])]
    n_prefix, n_total = n_image_tokens + len(asked), n_image_tokens + len(asked) + len(answered)
    slot = np.arange(n_total)
    return Sequence(
        tokens=np.array([0] * n_image_tokens + asked + answered, dtype=np.int64),
        mask_image=slot < n_image_tokens,
        mask_ar=(slot >= n_prefix).astype(np.int64),
        mask_input=np.ones(n_total, dtype=bool),
        mask_loss=slot >= n_prefix,
    )


def fit(sequence: Sequence, length: int, *, keep_last: bool = False) -> Sequence:
    """The sequence at a fixed length, cut or padded at its right end.

    A cut takes eos, suffix and in the end the separator, as big_vision's does; the image is never cut. In training ask
    for one token more than the model shall see: the last is only a target, the first only an input.

    Args:
        length: slots, image slots included.
        keep_last: write the last token over the last slot of a cut ("sticky" eos in big_vision).

    Raises:
        ShapeError: the image tokens alone are longer.
    """
    if length < sequence.n_image_tokens:
        raise ShapeError(
            f"length {length} does not hold the {sequence.n_image_tokens} image tokens: expected more. Raise the "
            "length or give fewer images."
        )
    n_kept = min(len(sequence), length)
    values = {}
    for name, padding in PADDING.items():
        whole = getattr(sequence, name)
        part = np.full(length, padding, dtype=whole.dtype)
        part[:n_kept] = whole[:n_kept]
        if keep_last and n_kept < len(sequence):
            part[-1] = whole[-1]
        values[name] = part
    return Sequence(**values)
