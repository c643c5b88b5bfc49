"""Pictures that are the same, or nearly, whatever their files are called.

The same: equal pixels after decoding. Nearly: equal in whether each of 16 x 16 cells is brighter than its neighbour to
the right, up to a few cells (a "difference hash"), and of nearly the same colours: the same picture at another size or
compressed again. Found by buckets, not by comparing all pairs.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paligemma.processing.resize import Picture

SIDE = 16
MAX_BITS = 12  # of 256 that may differ
MAX_COLOUR = 8.0  # mean difference of an 8 x 8 thumbnail, in grey levels
_BANDS = 16

Seen = tuple[str, str]  # split, name of the row


@dataclass
class Twins:
    """Pictures seen so far, as fingerprints: 32 bytes and a thumbnail each."""

    names: list[Seen] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    hashes: list[NDArray[np.bool_]] = field(default_factory=list)
    thumbs: list[NDArray[np.uint8]] = field(default_factory=list)

    def add(self, split: str, name: str, picture: Picture) -> None:
        """Take in a picture uint8[H, W, 3]."""
        shape = np.array(picture.shape, np.int64).tobytes()
        self.names.append((split, name))
        self.digests.append(hashlib.blake2b(shape + np.ascontiguousarray(picture).tobytes(), digest_size=16).digest())
        image = Image.fromarray(picture)
        grey = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), np.int16)
        self.hashes.append((grey[:, 1:] > grey[:, :-1]).reshape(-1))
        self.thumbs.append(np.asarray(image.resize((8, 8), Image.Resampling.BOX)))

    def exact(self) -> Iterator[tuple[Seen, Seen]]:
        """Pairs of the first and every later picture of equal pixels, once for each split that it turns up in."""
        first: dict[bytes, dict[str, Seen]] = {}
        for digest, seen in zip(self.digests, self.names, strict=True):
            before = first.setdefault(digest, {})
            if seen[0] in before:
                yield before[seen[0]], seen
            elif before:
                yield next(iter(before.values())), seen
            before.setdefault(seen[0], seen)


def near_twins(twins: Twins) -> Iterator[tuple[Seen, Seen]]:
    """Pairs of similar, unequal pictures of different splits, each later picture once."""
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for i, bits in enumerate(twins.hashes):
        candidates: dict[int, None] = {}
        for band, part in enumerate(bits.reshape(_BANDS, -1)):
            bucket = buckets.setdefault((band, np.packbits(part).tobytes()), [])
            candidates.update(dict.fromkeys(bucket))
            if len(bucket) < 64:  # flat pictures share bands by the thousand
                bucket.append(i)
        for j in candidates:
            if twins.names[j][0] != twins.names[i][0] and twins.digests[j] != twins.digests[i] and _alike(twins, i, j):
                yield twins.names[j], twins.names[i]
                break


def _alike(twins: Twins, i: int, j: int) -> bool:
    if int((twins.hashes[i] != twins.hashes[j]).sum()) > MAX_BITS or not twins.hashes[i].any():
        return False
    apart = np.abs(twins.thumbs[i].astype(np.int16) - twins.thumbs[j]).mean()
    return bool(apart <= MAX_COLOUR)
