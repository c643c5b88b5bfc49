"""Clips: the right frames of real files, upright, as many as there are; what is no video is named."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paligemma.data.sources.video import clip_of_row, evenly, is_video, read_clip, tiled
from paligemma.errors import DataError, OptionError
from paligemma.processing.image import video_pixels

av = pytest.importorskip("av")

HEIGHT, WIDTH, SIDE, FPS = 48, 160, 16, 10


def frame(i: int) -> np.ndarray:
    """Black, with a white square whose place tells the number: 9 to a row of the picture."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    row, column = divmod(i, 9)
    pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE] = 255
    return pixels


def number(pixels: np.ndarray) -> int:
    light = pixels.mean(2)
    ys, xs = np.nonzero(light > 128)
    return int(ys.mean() // SIDE) * 9 + int(xs.mean() // SIDE)


def numbers(frames) -> list[int]:
    return [number(pixels) for pixels in frames]


def write(path: Path, n: int, codec: str = "mpeg4", **options: object) -> Path:
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 2_000_000
        stream.codec_context.time_base = Fraction(1, FPS)
        container.start_encoding()
        for i in range(n):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(i), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    found = {name: write(folder / name, 27) for name in ("a.mp4", "a.avi", "a.mkv", "a.ts")}
    found["a.webm"] = write(folder / "a.webm", 27, "libvpx-vp9" if "libvpx-vp9" in av.codecs_available else "libvpx")
    frames = folder / "frames"
    frames.mkdir()
    for i in range(27):
        Image.fromarray(frame(i)).save(frames / f"frame_{i}.png")
    (frames / "notes.txt").write_text("no frame")
    return {**found, "frames": frames}


KINDS = ["a.mp4", "a.avi", "a.mkv", "a.ts", "a.webm", "frames"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"n_frames": 4, "stride": 7}, [0, 7, 14, 21]),
        ({"n_frames": 16, "stride": 9}, [0, 9, 18]),
        ({"n_frames": 3, "stride": 1}, [0, 1, 2]),
        ({"n_frames": 3}, [0, 13, 26]),
        ({"n_frames": 1}, [0]),
        ({"n_frames": 40}, list(range(27))),
    ],
)
def test_the_right_frames_come(clips, kind, options, expected):
    frames = read_clip(clips[kind], **options)
    assert numbers(frames) == expected
    assert {(pixels.dtype.str, pixels.shape) for pixels in frames} == {("|u1", (HEIGHT, WIDTH, 3))}


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fps": 2.0, "n_frames": 16}, [0, 5, 10, 15, 20, 25]),
        ({"fps": 2.0, "n_frames": 3}, [0, 5, 10]),
        ({"fps": 20.0, "n_frames": 6}, [0, 0, 1, 1, 2, 2]),
        ({"fps": 20.0, "n_frames": 80, "start_s": 2.5}, [25, 25, 26, 26]),
        ({"fps": 1.0, "start_s": 1.2}, [12, 22]),
        ({"stride": 5, "start_s": 1.2}, [12, 17, 22]),
        ({"n_frames": 2, "start_s": 1.2}, [12, 26]),
        ({"n_frames": 2, "start_s": 1.2, "end_s": 2.0}, [12, 19]),
        ({"stride": 5, "start_s": 1.2, "end_s": 1.9}, [12, 17]),
        ({"stride": 9, "end_s": 1.8}, [0, 9]),
        ({"fps": 2.0, "end_s": 1.1}, [0, 5, 10]),
    ],
)
def test_the_right_times_come(clips, kind, options, expected):
    assert numbers(read_clip(clips[kind], **options)) == expected


def test_evenly_takes_the_first_and_the_last_and_no_frame_twice():
    for n in range(1, 60):
        for n_frames in range(2, 20):
            chosen = evenly(n, n_frames)
            assert len(set(chosen)) == len(chosen) == min(n, n_frames)
            assert (chosen[0], chosen[-1]) == (0, n - 1)


def test_a_short_clip_starts_over_as_the_processor_lets_it(clips):
    frames = read_clip(clips["a.mp4"], stride=9)
    assert numbers(tiled(frames, 8)) == [0, 9, 18, 0, 9, 18, 0, 9]
    assert video_pixels(frames, 14, 8).equal(video_pixels(tiled(frames, 8), 14, 8))
    with pytest.raises(DataError, match="has no frames"):
        tiled((), 8)


def test_a_turned_file_is_turned_upright(clips, tmp_path):
    data = bytearray(clips["a.mp4"].read_bytes())
    # The track header of MP4 ends with a 3×3 matrix, 16.16 fixed point, then width and height. This one is what phones
    # write that were held upright: show it a quarter turned clockwise.
    at = data.index(b"tkhd") + 4 + 40
    identity = b"".join(x.to_bytes(4, "big") for x in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    assert data[at : at + 36] == identity
    turned = (0, 1 << 16, 0, (1 << 32) - (1 << 16), 0, 0, HEIGHT << 16, 0, 1 << 30)
    data[at : at + 36] = b"".join(x.to_bytes(4, "big") for x in turned)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    frames = read_clip(path, n_frames=3)
    assert frames[0].shape == (WIDTH, HEIGHT, 3)
    assert numbers(np.rot90(pixels) for pixels in frames) == [0, 13, 26]


@pytest.mark.parametrize("kind", ["a.ts", "a.mkv"])
def test_a_file_that_breaks_off_gives_the_frames_before(clips, tmp_path, kind):
    data = clips[kind].read_bytes()
    path = tmp_path / kind
    path.write_bytes(data[: len(data) * 2 // 3])
    found = numbers(read_clip(path, n_frames=40))
    assert 10 < len(found) < 27
    assert found == list(range(len(found)))
    assert numbers(read_clip(path, stride=4)) == list(range(0, len(found), 4))


def test_what_is_no_video_is_named(clips, tmp_path):
    def of(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    whole = clips["a.mp4"].read_bytes()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "gone.mp4", "no such file"), (of("text.mp4", b"text" * 100), "cannot be read"),
        (of("zero.mp4", b""), "cannot be read"), (of("cut.mp4", whole[:300]), "cannot be read"),
        (tmp_path / "sound.wav", "has no frames"), (tmp_path / "empty", "has no frames"),
        (write(tmp_path / "none.mkv", 0), "has no frames|cannot be read"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message) as caught:
            read_clip(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="has no frames after 99 s"):
        read_clip(clips["a.mp4"], start_s=99)


def test_a_damaged_frame_in_a_folder_is_named(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.jpg is empty"):
        read_clip(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_frames": 0}, "n_frames=0"), ({"stride": 0}, "stride=0"), ({"fps": 0.0}, "fps=0"),
        ({"fps": 1.0, "stride": 2}, "expected one of them"), ({"start_s": -1.0}, "start_s=-1"),
        ({"start_s": 2.0, "end_s": 2.0}, "expected an end behind the start"),
    ],
)  # fmt: skip
def test_options_that_make_no_clip_are_refused(clips, options, message):
    with pytest.raises(OptionError, match=message):
        read_clip(clips["a.mp4"], **options)
    with pytest.raises(OptionError, match="folder of frames"):
        read_clip(clips["frames"], fps=1.0)


def test_content_decides_what_is_a_video_and_the_name_where_it_says_nothing(clips, tmp_path):
    assert all(is_video(clips[kind]) for kind in KINDS[:-1])
    assert not is_video(clips["frames"])
    (tmp_path / "renamed.jpg").write_bytes(clips["a.mp4"].read_bytes())
    Image.fromarray(frame(0)).save(tmp_path / "renamed.mp4", "JPEG")
    (tmp_path / "unknown.mp4").write_bytes(b"?" * 100)
    assert is_video(tmp_path / "renamed.jpg")
    assert not is_video(tmp_path / "renamed.mp4")
    assert is_video(tmp_path / "unknown.mp4")
    assert is_video("not/there.webm")
    assert not is_video("not/there.png")


def test_a_row_names_its_clip(clips):
    folder = clips["a.mp4"].parent
    assert numbers(clip_of_row({"video": "a.mp4", "n_frames": 2, "stride": 9, "prefix": "x"}, folder, "row 1")) == [
        0,
        9,
    ]
    assert len(clip_of_row({"video": "frames", "stride": None}, folder, "row 1")) == 16
    for row, message in [
        ({"video": "b.mp4"}, "row 1: .*b.mp4 is not in.*Did you mean"), ({"video": None}, "row 1: the video is None"),
        ({"video": "../a.mp4"}, "lies outside"), ({"video": str(clips["frames"])}, "lie outside"),
        ({"video": "../" + folder.name + "/frames"}, "lie outside"),
        ({"video": "a.mp4", "stride": "9"}, "row 1: 'stride' is '9'"),
        ({"video": "a.mp4", "n_frames": 0}, "row 1: n_frames=0"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            clip_of_row(row, folder, "row 1")
    assert numbers(clip_of_row({"video": str(clips["a.mp4"]), "n_frames": 1}, "x", "row 1", allow_outside=True)) == [0]
