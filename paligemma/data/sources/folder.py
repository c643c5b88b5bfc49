"""What folders of pictures have in common: names of splits, sizes of pictures, whole files or none.

A writer puts pictures into a `staged` folder, one that gets its name when all of it is there, or beside others with
`Names` that nobody else has; tables are written by `replaced`.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from paligemma.data.record import Record, same_shape
from paligemma.data.sources.columns import encoded, kind_of
from paligemma.data.sources.jsonl import SPLITS
from paligemma.errors import DataError, ImageError, OptionError, nearest
from paligemma.processing.picture_file import is_turned, open_picture, orientation, read_file

SUFFIXES = frozenset(
    f".{kind}" for kind in ("avif", "bmp", "gif", "jpeg", "jpg", "jp2", "mpo", "png", "ppm", "tif", "tiff", "webp")
)
SEVERAL = "records of no picture or of several"  # left out by formats with one picture to a row
_HEAD_BYTES = 64 * 1024
_PNG_TURNS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
_PNG = b"\x89PNG\r\n\x1a\n"


def split_name(split: str) -> str:
    """train, valid or test, from any of the words for it.

    Raises:
        OptionError: none of those.
    """
    for name, words in SPLITS.items():
        if split in words:
            return name
    known = [word for words in SPLITS.values() for word in words]
    raise OptionError(f"split={split!r}: expected train, valid or test.{nearest(str(split), known)}")


def picture_size(image: Any, where: str = "the picture") -> tuple[int, int]:
    """Height and width as `load_image` gives them, EXIF turns undone; of files only the head is read.

    Raises:
        DataError: not a picture.
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, np.ndarray):
        return int(image.shape[0]), int(image.shape[1])
    try:
        if isinstance(image, bytes | bytearray | memoryview):
            return _size(bytes(image), "the picture", is_whole=True)
        path = Path(image)
        head = _head(path)
        if len(head) == _HEAD_BYTES and not (head.startswith(_PNG) and _png_turn_may_follow(path)):
            try:
                return _size(head, str(path), is_whole=False)
            except ImageError:
                pass  # the head is longer than what was read, or this format needs all of it
        return _size(read_file(path), str(path), is_whole=True)
    except ImageError as error:
        raise DataError(f"{where}: {error}", kind="broken picture") from None


def require_upright(image: Any, size_hw: tuple[int, int], where: str) -> None:
    """Whether boxes of an annotated size lie on a picture as it is opened.

    A copy of other sides will do, even a stretched one, since places are fractions of them; swapped sides will not.

    Raises:
        DataError: the sides are swapped, mostly by EXIF; with the name of the row.
    """
    height, width = picture_size(image, where)
    if same_shape(size_hw, (height, width)) or not same_shape(size_hw, (width, height)):
        return
    raise DataError(
        f"{where}: annotated as {size_hw[1]}×{size_hw[0]}, the picture is {width}×{height}{turned_by(image)}: expected "
        "sides that are not swapped. Annotate it as it is seen, or leave it out.",
        kind="another shape",
    )


def turned_by(image: Any) -> str:
    """What messages say of a picture that opening turns."""
    return ", turned by EXIF" if is_turned(image) else ""


def size_of(record: Record) -> tuple[int, int]:
    """Height and width of the record's picture, read from it where the record does not say.

    Raises:
        DataError: not a picture.
    """
    return record.size_hw if record.size_hw is not None else picture_size(record.images[0], record.where)


def pictures_of(folder: Path) -> list[Path]:
    """Every picture file of a folder and the folders in it, by name, in order."""
    found = []
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(base, name) for name in files if is_picture(name)]
    return sorted(found)


def is_picture(name: str) -> bool:
    """Whether a file's name ends as pictures do."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


class Names:
    """File names for pictures, each once.

    Args:
        taken: names that are in use, by their stems where those count.
        by_stem: a.jpg and a.png are the same name, as for formats with one table per picture.
    """

    def __init__(self, taken: Sequence[str] = (), *, by_stem: bool = False) -> None:
        self._by_stem = by_stem
        self._taken = {self._key(name) for name in taken}
        self._next: dict[str, int] = {}
        self._n = 0

    def of(self, image: Any, id: str = "") -> str:
        """A new name, as near to the picture's own as can be; one without a name is called by its id or number."""
        self._n += 1
        given = Path(image).name if isinstance(image, str | Path) else id or f"{self._n:06d}"
        stem, suffix = os.path.splitext(given)
        if suffix.lower() not in SUFFIXES:
            stem, suffix = given, _suffix_of(image)
        stem = re.sub(r"[\x00-\x1f/\\\ud800-\udfff]", "_", stem).strip() or f"{self._n:06d}"
        return self._free(stem, suffix)

    def _free(self, stem: str, suffix: str) -> str:
        name = f"{stem}{suffix}"
        for number in count(self._next.get(self._key(name), 1)):
            if self._key(name) not in self._taken:
                break
            name = f"{stem}-{number}{suffix}"
            self._next[self._key(f"{stem}{suffix}")] = number + 1
        self._taken.add(self._key(name))
        return name

    def _key(self, name: str) -> str:
        return (os.path.splitext(name)[0] if self._by_stem else name).casefold()  # some disks do not tell A from a


def save_picture(image: Any, path: Path, where: str) -> None:
    """Write a picture: files and bytes as they are, pixels as PNG; whole or not at all.

    Raises:
        DataError: it cannot be read.
    """
    with replaced(path) as part:
        if isinstance(image, str | Path):
            try:
                file = open(image, "rb")  # noqa: SIM115
            except OSError as error:
                raise DataError(f"{where}: {image} cannot be read ({error.strerror}): expected a picture.") from None
            with file, part.open("wb") as out:
                shutil.copyfileobj(file, out)
        else:
            part.write_bytes(encoded(image, where)[0])


def single_picture(record: Record) -> bool:
    """Whether a format with one picture per row can carry the record."""
    return len(record.images) == 1


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it gets that name when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()  # of a name that may fill its 255 bytes
    part = path.with_name(f".{mark}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def staged(*folders: Path) -> Iterator[tuple[Path, ...]]:
    """Empty folders to write to; they take the names of `folders`, and the place of older ones, when all went well."""
    parts = []
    try:
        for folder in folders:
            folder.parent.mkdir(parents=True, exist_ok=True)
            parts.append(Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent)))
            parts[-1].chmod(0o777 & ~_umask())
        yield tuple(parts)
        for part, folder in zip(parts, folders, strict=True):
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
                os.replace(folder, old / folder.name)
                os.replace(part, folder)
                shutil.rmtree(old)
            else:
                os.replace(part, folder)
    finally:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A hidden folder inside another, which is gone afterwards, whatever happened."""
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".writing.", suffix=".part", dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def refuse_existing(split: str, *places: Path, overwrite: bool) -> None:
    """Whether a split may be written.

    Raises:
        OptionError: it is there, and `overwrite` was not asked for.
    """
    there = next((place for place in places if place.exists()), None)
    if there is not None and not overwrite:
        raise OptionError(
            f"{there} exists: the split '{split}' is there already, expected a new folder. Name another one, or "
            "replace it with overwrite=True (--overwrite)."
        )


def open_text(path: Path) -> IO[str]:
    """A new text file in UTF-8 with plain line ends."""
    return path.open("w", encoding="utf-8", newline="\n")


def read_text(path: Path, what: str) -> str:
    """A text file.

    Raises:
        DataError: missing, not readable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}): save the file as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): expected {what}. Check the path.") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _suffix_of(image: Any) -> str:
    if isinstance(image, str | Path):
        return f".{kind_of(_file(Path(image))) or 'jpg'}"
    if isinstance(image, bytes | bytearray | memoryview):
        return f".{kind_of(bytes(image)) or 'jpg'}"
    return ".png"


def _file(path: Path) -> bytes:
    try:
        return read_file(path)
    except ImageError:
        return b""


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:
        return read_file(path)  # says what is wrong


def _size(data: bytes, name: str, *, is_whole: bool) -> tuple[int, int]:
    with open_picture(data, name, None) as picture:
        width, height = picture.size
        # Pillow decodes a PNG to its end in search of a turn; only look where the head has one, or text may follow.
        is_plain = picture.format == "PNG" and not is_whole and not picture.info.keys() & _PNG_TURNS
        turn = 1 if is_plain else orientation(picture)
        if picture.format == "TIFF" and turn in (5, 6, 7, 8):
            # Pillow turns it while decoding; which size its head tells depends on the release.
            if not is_whole:
                raise ImageError(f"{name}: a TIFF on its side is measured whole.")
            picture.load()
            return picture.height, picture.width
        return (width, height) if turn in (5, 6, 7, 8) else (height, width)


def _png_turn_may_follow(path: Path) -> bool:
    """Whether a PNG has chunks after its pixels that may hold an EXIF turn."""
    with path.open("rb") as file:
        file.seek(len(_PNG))
        is_past_pixels = False
        while len(chunk := file.read(8)) == 8:
            is_past_pixels |= chunk[4:] == b"IDAT"
            if is_past_pixels and chunk[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(chunk[:4], "big") + 4, os.SEEK_CUR)
    return False
