"""Clips: frames of a video file (PyAV) or of a folder of pictures, sampled in time.

    read_clip("a.mp4", n_frames=16, stride=30)     frames 0, 30, 60, … of the source: ActivityNet captions
    read_clip("a.mp4", n_frames=16, fps=1.0)       one a second
    read_clip("a.mp4", n_frames=16)                evenly spread, the first and the last among them

Strides of the published transfers, in frames of the source, 16 frames each: ActivityNet captions 30, ActivityNet-QA
70, MSRVTT captions and QA 9, MSVD-QA 26 (8 frames in the code), VATEX 7. Source: big_vision's transfer configurations.
A clip that ends early has fewer frames; `tiled` starts it over, as `video_pixels` does.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from paligemma.data.sources.columns import in_folder
from paligemma.data.sources.parquet import by_number
from paligemma.data.sources.paths import is_inside, leads_out
from paligemma.errors import DataError, ImageError, MissingExtra, OptionError
from paligemma.processing.image import load_image
from paligemma.processing.resize import Picture

N_FRAMES: Final = 16  # of every video transfer; nothing longer is trained
SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv"}
)
FRAMES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_VIDEOS = (b"\x1a\x45\xdf\xa3", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"FLV\x01", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11")
_STILLS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # pictures in the container of MP4


def read_clip(
    path: str | Path,
    *,
    n_frames: int = N_FRAMES,
    stride: int | None = None,
    fps: float | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    root: str | Path | None = None,
) -> tuple[Picture, ...]:
    """Frames of a video file, or of a folder with a picture per frame, sorted by the numbers in their names.

    Frames are decoded one after another and only the chosen ones are kept. A file that breaks off gives the frames
    before the break. Frames are turned upright where the file says how.

    Args:
        n_frames: at most so many.
        stride: frames of the source from one to the next.
        fps: frames a second, in place of a stride: at each time the frame that is shown then. Neither: evenly spread.
        root: folder that links among the frames must not lead out of; None allows any.
        start_s, end_s: where the clip begins, and where it ends before the file does.

    Returns:
        uint8[H, W, 3] each.

    Raises:
        DataError: no such file, no video, or not one frame. OptionError: options that make no clip.
        MissingExtra: a video file without PyAV.
    """
    path = Path(path)
    _check(n_frames, stride, fps, start_s, end_s)
    if path.is_dir():
        if fps is not None or start_s or end_s is not None:
            raise OptionError(f"{path} is a folder of frames, which have no time: expected stride, not fps or start_s.")
        return _of_folder(path, n_frames, stride, None if root is None else Path(root))
    if not path.is_file():
        raise DataError(f"{path}: no such file: expected a video or a folder of frames. Check the path.")
    wanted: Sequence[int] = range(0, n_frames * stride, stride) if stride else ()
    if stride is None and fps is None:
        wanted = evenly(_count(path, start_s, end_s), n_frames)
    with _opened(path) as (container, stream):
        shown = _decoded(path, container, stream, start_s)
        if end_s is not None:
            limit = end_s - _blur(stream)
            shown = itertools.takewhile(lambda timed: timed[0] < limit, shown)
        if fps is None:
            frames = _numbered(shown, wanted)
        else:
            frames = _at_times(shown, fps, n_frames, float(1 / _rate(stream)), _blur(stream))
    if not frames:
        raise DataError(
            f"{path} has no frames{f' after {start_s:g} s' if start_s else ''}"
            f"{'' if end_s is None else f' before {end_s:g} s'}: expected a video. Check it."
        )
    return tuple(frames)


def evenly(n: int, n_frames: int) -> list[int]:
    """Which of n frames: all, or so many evenly spread from the first to the last."""
    if n <= n_frames:
        return list(range(n))
    return [0] if n_frames == 1 else [round(i * (n - 1) / (n_frames - 1)) for i in range(n_frames)]


def tiled(frames: Sequence[Picture], n_frames: int) -> tuple[Picture, ...]:
    """So many frames: a clip of fewer starts over from its first. Source: big_vision pp/proj/paligemma/video.py.

    Raises:
        DataError: no frame at all.
    """
    if not frames:
        raise DataError(f"a clip of {n_frames} frames has no frames: expected at least one to start over from.")
    return tuple(frames[i % len(frames)] for i in range(n_frames))


def is_video(path: str | Path) -> bool:
    """Whether a file is a video: by its first bytes, and by its name where those say nothing."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return path.suffix.lower() in SUFFIXES and not path.is_dir()
    if head[4:8] == b"ftyp":
        return head[8:12] not in _STILLS
    if head.startswith(_VIDEOS) or (head[:4] == b"RIFF" and head[8:12] == b"AVI "):
        return True
    is_picture = head.startswith(_PICTURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
    return path.suffix.lower() in SUFFIXES and not is_picture


def clip_of_row(
    row: Mapping[str, Any], folder: str | Path, where: str, *, allow_outside: bool = False
) -> tuple[Picture, ...]:
    """The frames of a row {"video": "a.mp4", "n_frames": 16, "stride": 9}; also fps, start_s and end_s.

    Raises:
        DataError: no video there, an option of the wrong kind, or a file that cannot be read; with the row's name.
    """
    name = row.get("video")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: the video is {name!r}: expected the name of a file or of a folder of frames.")
    options = {key: row[key] for key in ("n_frames", "stride", "fps", "start_s", "end_s") if row.get(key) is not None}
    for key, value in options.items():
        kinds = int if key in ("n_frames", "stride") else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) < 1e9:
            raise DataError(f"{where}: '{key}' is {repr(value)[:40]}: expected a number below a billion.")
    path = Path(folder) / name
    if not os.path.isdir(path):  # unlike Path's, False of a name that no file can have
        path = in_folder(name, where, folder=Path(folder), allow_outside=allow_outside)
    elif not allow_outside and (leads_out(name) or not is_inside(folder, path)):
        raise DataError(f"{where}: the frames {name} lie outside {folder}: expected a folder inside. Move it there.")
    try:
        return read_clip(path, **options, root=None if allow_outside else folder)
    except (DataError, OptionError) as error:
        raise DataError(f"{where}: {error}") from None


def _check(n_frames: int, stride: int | None, fps: float | None, start_s: float, end_s: float | None) -> None:
    if n_frames < 1 or (stride is not None and stride < 1):
        raise OptionError(f"n_frames={n_frames}, stride={stride}: expected at least 1 of each.")
    if fps is not None and not 0 < fps < float("inf"):
        raise OptionError(f"fps={fps}: expected more than 0 frames a second.")
    if fps is not None and stride is not None:
        raise OptionError(f"stride={stride} and fps={fps}: expected one of them.")
    if not 0 <= start_s < float("inf"):
        raise OptionError(f"start_s={start_s}: expected 0 seconds or more.")
    if end_s is not None and not start_s < end_s < float("inf"):
        raise OptionError(f"start_s={start_s}, end_s={end_s}: expected an end behind the start.")


def _of_folder(folder: Path, n_frames: int, stride: int | None, root: Path | None) -> tuple[Picture, ...]:
    named = (path for path in folder.iterdir() if path.suffix.lower() in FRAMES and path.name[0] != ".")
    files = sorted(named, key=lambda path: by_number(path.name))
    if not files:
        raise DataError(f"{folder} has no frames: expected pictures such as 0001.jpg.")
    if root is not None and any(file.is_symlink() and not is_inside(root, file) for file in files):
        raise DataError(f"{folder}: a frame is a symbolic link that leads outside: expected files. Copy them in.")
    chosen = evenly(len(files), n_frames) if stride is None else range(0, len(files), stride)[:n_frames]
    try:
        return tuple(load_image(files[i]) for i in chosen)
    except ImageError as error:
        raise DataError(str(error)) from None


def _numbered(frames: Iterable[tuple[float, Any]], wanted: Sequence[int]) -> list[Picture]:
    """Frames by their numbers, in order; nothing is decoded behind the last."""
    found: list[Picture] = []
    if not wanted:
        return found
    for number, (_, frame) in enumerate(frames):
        if number == wanted[len(found)]:
            found.append(_upright(frame))
            if len(found) == len(wanted):
                break
    return found


def _at_times(
    frames: Iterable[tuple[float, Any]], fps: float, n_frames: int, hold_s: float, blur_s: float
) -> list[Picture]:
    """The frame that is shown at each time k / fps after the first; the last one is shown for `hold_s`."""
    found: list[Picture] = []
    first = last = 0.0
    shown = None

    def show(until: float) -> None:
        while shown is not None and len(found) < n_frames and len(found) / fps < until - first - blur_s:
            found.append(_upright(shown))

    for last, frame in frames:
        if shown is None:
            first = last
        show(last)
        shown = frame
        if len(found) == n_frames:
            return found
    show(last + hold_s)
    return found


def _rate(stream: Any) -> Any:
    """Frames a second, a fraction; some formats leave it to guesses."""
    return stream.average_rate or stream.guessed_rate or 25


def _blur(stream: Any) -> float:
    """Seconds that are no difference: times are rounded to ticks of the file's clock."""
    return min(float(stream.time_base) / 2, 1e-3)


def _decoded(path: Path, container: Any, stream: Any, start_s: float) -> Iterator[tuple[float, Any]]:
    """Every frame from a time on, with its time in seconds after the stream's start; ends where the file breaks."""
    import av

    begin_s = start_s - _blur(stream)
    frames = _timed(container, stream)
    if start_s:
        with suppress(av.error.FFmpegError):
            container.seek((stream.start_time or 0) + int(start_s / stream.time_base), stream=stream)
        head = next(frames, None)
        if head is None or head[0] > begin_s or not head[1].key_frame:
            # Some formats seek by guess, behind the whole frame that the ones after it build on: from the beginning.
            with _opened(path) as (container, stream):
                yield from ((time, frame) for time, frame in _timed(container, stream) if time >= begin_s)
            return
        frames = itertools.chain([head], frames)
    yield from ((time, frame) for time, frame in frames if time >= begin_s)


def _timed(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    import av

    first, tick, rate = stream.start_time or 0, stream.time_base, _rate(stream)
    frames = container.decode(stream)
    for n_seen in itertools.count():
        try:
            frame = next(frames)
        except (StopIteration, av.error.FFmpegError):
            return
        yield float((frame.pts - first) * tick if frame.pts is not None else n_seen / rate), frame


def _count(path: Path, start_s: float, end_s: float | None) -> int:
    """Frames from a time on, to another: as the file's head says, or by its packets, which are not decoded."""
    import av

    with _opened(path) as (container, stream):
        if not start_s and end_s is None and stream.frames:
            return int(stream.frames)
        n, first, tick = 0, stream.start_time or 0, stream.time_base
        with suppress(av.error.FFmpegError):
            for packet in container.demux(stream):
                time = start_s if packet.pts is None else float((packet.pts - first) * tick)
                blur = _blur(stream)
                n += bool(packet.size) and start_s - blur <= time < (float("inf") if end_s is None else end_s - blur)
        return n


def _upright(frame: Any) -> Picture:
    pixels: Picture = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4  # counterclockwise
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A video file and its stream of pictures."""
    try:
        import av
    except ImportError:
        raise MissingExtra("av", "video", f"reading {path}") from None
    try:
        # Files of unknown origin may name others: nothing but this machine's files is opened for them.
        container = av.open(str(path.resolve()), options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path} cannot be read ({reason}): expected a video. It is damaged or cut short.") from None
    with container:
        if not container.streams.video:
            raise DataError(f"{path} has no frames: expected a video, it holds no pictures. Check it.")
        yield container, container.streams.video[0]
