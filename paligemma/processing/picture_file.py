"""Open picture files of unknown origin: by content, within a limit, with errors that name the file."""

import io
import struct
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from paligemma.errors import ImageError

# Pillow's own limit: a quarter of a GiB as RGB. A few kilobytes can claim any size, so it is checked before decoding.
MAX_PIXELS = 89_478_485

# What Pillow's plugins raise for bytes that are damaged, or of another format than they look: each has its own way.
DAMAGED = (
    SyntaxError, LookupError, ArithmeticError, TypeError, ValueError, OSError, EOFError, RuntimeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip

# Formats that Pillow hands to another program (Ghostscript, the operating system) are not opened.
_REFUSED = frozenset({"EPS", "WMF"})
_ORIENTATION = 0x0112


def read_file(path: Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        ImageError: missing, a folder, or not readable.
    """
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder: expected a picture file. Name the files in it.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{path} cannot be read ({reason}): expected a picture file. Check the path.") from None


def open_picture(data: bytes, name: str, max_pixels: int | None) -> Image.Image:
    """Read the head of a picture file; nothing is decoded yet.

    `Image.open` would check the size against a limit that is global to the process, and warn or raise by that; this
    walks Pillow's table of formats instead, so that one limit, the caller's, decides.

    Raises:
        ImageError: empty, or of no format that Pillow knows.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes): expected a picture. Fetch it again.")
    file = io.BytesIO(data)
    for register in (Image.preinit, Image.init):  # the five common formats, then all
        register()
        for kind in Image.ID:
            if kind not in _REFUSED and (picture := _opened_as(kind, file, data[:16])):
                return picture
    raise ImageError(
        f"{name} is not a picture, or a damaged one: expected PNG, JPEG, WebP, GIF, TIFF, BMP or another format that "
        "Pillow reads. Convert it, or fetch it again."
    )


def orientation(picture: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1, upright, where there is none or it cannot be read."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # the tag is a hint inside untrusted data; a picture is worth more than its EXIF block
        return 1
    return value if isinstance(value, int) else 1


def is_turned(image: Any) -> bool:
    """Whether opening a picture turns it, as its EXIF block says; False where that cannot be known."""
    if not isinstance(image, str | Path | bytes):
        return False
    try:
        data = image if isinstance(image, bytes) else read_file(Path(image))
        with open_picture(data, "the picture", None) as picture:
            return orientation(picture) in range(2, 9)
    except ImageError:
        return False


def _opened_as(kind: str, file: io.BytesIO, head: bytes) -> ImageFile.ImageFile | None:
    factory, accept = Image.OPEN[kind]
    file.seek(0)
    try:
        if accept and accept(head) is not True:  # plugins say False, or why the format is not supported here
            return None
        return factory(file, "")
    except DAMAGED:
        return None  # a head that looked like this format and is none, or is damaged
