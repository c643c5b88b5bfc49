"""Pictures: every mode, every kind of source, transparent, turned, animated, broken and oversized ones."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma.errors import ImageError, OptionError, ShapeError
from paligemma.processing.image import load_image, resize, to_pixels, video_pixels

RNG = np.random.default_rng(7)
COLOUR = RNG.integers(0, 256, (23, 31, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (23, 31), dtype=np.uint8)


def smooth(height: int = 40, width: int = 60) -> Image.Image:
    """Neighbours alike, so that lossy formats stay close."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([3 * x, 5 * y, 255 - 2 * x - y], axis=-1).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------------- modes


def test_every_8_bit_mode_shows_the_same_picture():
    """CMYK, YCbCr, LAB and HSV lose a little on the way there; the way back must not lose the picture."""
    image = smooth()
    expected = np.asarray(image).astype(int)
    for mode, tolerance in (("RGB", 0), ("RGBA", 0), ("RGBX", 0), ("RGBa", 0), ("CMYK", 1), ("YCbCr", 3), ("HSV", 12)):
        found = load_image(image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode))
        assert found.shape == (40, 60, 3)
        assert found.dtype == np.uint8
        assert np.abs(found - expected).max() <= tolerance, mode


def test_grey_modes_repeat_the_level_in_three_channels():
    for image in (Image.fromarray(GREY), Image.fromarray(GREY).convert("LA"), Image.fromarray(GREY.astype(np.int32))):
        np.testing.assert_array_equal(load_image(image), np.repeat(GREY[..., None], 3, axis=2))
    bits = Image.fromarray(GREY > 127)
    assert bits.mode == "1"
    np.testing.assert_array_equal(load_image(bits)[..., 0], np.where(GREY > 127, 255, 0))


def test_a_palette_is_looked_up_with_and_without_alpha():
    image = smooth().quantize(16)
    assert image.mode == "P"
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(load_image(image), expected)
    np.testing.assert_array_equal(load_image(image.convert("PA")), expected)


def test_lab_comes_back_as_the_colours_it_was_made_from():
    from PIL import ImageCms

    profiles = [ImageCms.ImageCmsProfile(ImageCms.createProfile(space)) for space in ("sRGB", "LAB")]
    lab = ImageCms.ImageCmsTransform(*profiles, "RGB", "LAB").apply(smooth())
    assert lab.mode == "LAB"
    assert np.abs(load_image(lab).astype(int) - np.asarray(smooth())).mean() < 3


def test_16_bits_are_cut_to_the_high_byte_in_every_spelling():
    deep = RNG.integers(0, 65536, (9, 11), dtype=np.uint16)
    expected = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
    image = Image.fromarray(deep)
    assert image.mode == "I;16"
    big_endian = Image.frombytes("I;16B", (11, 9), deep.astype(">u2").tobytes())
    for source in (
        image,
        big_endian,
        Image.fromarray(deep.astype(np.int32)),
        saved(image, "PNG"),
        saved(image, "TIFF"),
    ):
        np.testing.assert_array_equal(load_image(source), expected)
    assert expected.std() > 50  # Pillow's own convert("RGB") gives nearly all white here


def test_float_levels_are_0_to_1_or_0_to_255():
    unit = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    for levels in (unit, unit * 255):
        found = load_image(Image.fromarray(levels))[..., 0].astype(float)
        assert np.abs(found - unit * 255).max() <= 1
    assert load_image(Image.fromarray(np.array([[np.nan, 0.5]], np.float32)))[0, 0].tolist() == [0, 0, 0]


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG", "PPM", "TGA", "JPEG2000", "ICO"])
def test_usual_formats_are_read_from_files_and_bytes_whatever_their_name(kind: str, tmp_path: Path):
    image = smooth()
    lossless = {"WEBP": {"lossless": True}, "ICO": {"sizes": [image.size]}}.get(kind, {})
    data = saved(image, kind, **lossless)
    path = tmp_path / "misnamed.jpg"
    path.write_bytes(data)
    found = load_image(path)
    np.testing.assert_array_equal(found, load_image(data))
    np.testing.assert_array_equal(found, load_image(str(path)))
    np.testing.assert_array_equal(found, load_image(bytearray(data)))
    loss = {"JPEG": 12, "GIF": 24}.get(kind, 0)
    assert np.abs(found.astype(int) - np.asarray(image)).max() <= loss


def test_a_cmyk_jpeg_is_read():
    found = load_image(saved(smooth().convert("CMYK"), "JPEG"))
    assert np.abs(found.astype(int) - np.asarray(smooth())).max() <= 14


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert load_image(data).reshape(-1, 3).tolist() == [[255, 0, 0]] * 48


def test_alpha_is_dropped_or_laid_on_white():
    rgba = np.dstack([COLOUR, np.zeros_like(GREY)])
    for source in (Image.fromarray(rgba), rgba, saved(Image.fromarray(rgba), "PNG")):
        np.testing.assert_array_equal(load_image(source), COLOUR)
        assert load_image(source, alpha="white").min() == 255
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert np.unique(load_image(half, alpha="white")).tolist() == [127]
    transparent_colour = saved(Image.new("RGB", (2, 2), (10, 20, 30)), "PNG", transparency=(10, 20, 30))
    assert load_image(transparent_colour)[0, 0].tolist() == [10, 20, 30]
    assert load_image(transparent_colour, alpha="white")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_formats_that_pillow_turns_itself_are_not_turned_twice(orientation: int):
    flat = np.zeros((4, 6, 3), np.uint8)
    flat[0, 0], flat[0, 5] = 255, 100
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = {}
    for form in ("PNG", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(flat).save(file, form, exif=exif)
        files[form] = file.getvalue()
    np.testing.assert_array_equal(load_image(files["TIFF"]), load_image(files["PNG"]))
    for data in files.values():
        np.testing.assert_array_equal(load_image(data, exif_orientation=False), flat)


def test_orientation_is_applied_to_files_and_bytes_only_and_can_be_turned_off(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows of the file are columns of the scene
    data = saved(smooth(), "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(data)
    flat, upright = np.asarray(smooth()), np.rot90(np.asarray(smooth()), -1)
    np.testing.assert_array_equal(load_image(data), upright)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), upright)
    np.testing.assert_array_equal(load_image(data, exif_orientation=False), flat)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(load_image(image), flat)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_unreadable_exif_block_does_not_cost_the_picture():
    data = saved(smooth(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert load_image(data).shape == (40, 60, 3)


# ------------------------------------------------------------------------------------------------------------ arrays


def test_arrays_of_one_three_and_four_channels_are_pictures():
    assert load_image(COLOUR) is COLOUR
    for grey in (GREY, GREY[..., None]):
        np.testing.assert_array_equal(load_image(grey), np.repeat(GREY[..., None], 3, axis=2))
    np.testing.assert_array_equal(load_image(torch.from_numpy(COLOUR)), COLOUR)


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (COLOUR.astype(np.float32) / 255, "Multiply by 255 and cast"),
        (COLOUR.transpose(2, 0, 1), r"array\.transpose\(1, 2, 0\)"),
        (COLOUR.astype(np.int64), "Bring it into that form"),
        (COLOUR[..., :2], "Bring it into that form"),
        (COLOUR[None], "Bring it into that form"),
        (COLOUR[:0], "Bring it into that form"),
        (np.zeros(5, np.uint8), "Bring it into that form"),
    ],
)
def test_other_arrays_are_refused_with_a_hint(array: np.ndarray, hint: str):
    with pytest.raises(ImageError, match=rf"is not a picture: expected uint8 \[H, W, 3\].*{hint}") as caught:
        load_image(array)
    assert "\n" not in str(caught.value)


def test_things_that_are_no_picture_are_refused():
    with pytest.raises(ImageError, match="int is not a picture: expected a path, bytes, a PIL image or a uint8"):
        load_image(3)
    with pytest.raises(OptionError, match=r"alpha='wite': expected 'drop' or 'white'\. Did you mean 'white'\?"):
        load_image(COLOUR, alpha="wite")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused_by_name(kind: str, kept: float, tmp_path: Path):
    data = saved(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError, match=rf"cut\.{kind.lower()} .*: expected") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


def test_empty_missing_and_foreign_files_are_refused_by_name(tmp_path: Path):
    (tmp_path / "zero.png").touch()
    (tmp_path / "text.png").write_text("this is no picture, but long enough to have a head")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    for name, message in (
        ("zero.png", r"zero\.png is empty \(0 bytes\): expected a picture\. Fetch it again"),
        ("text.png", r"text\.png is not a picture, or a damaged one: expected PNG"),
        ("page.eps", r"page\.eps is not a picture"),  # Pillow would run Ghostscript on it
        ("none.png", r"none\.png cannot be read \(No such file or directory\): expected a picture file"),
        ("", r"is a folder: expected a picture file"),
        ("a\0b", r"cannot be read"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"the picture of 0 bytes is empty"):
        load_image(b"")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few dozen bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9_600, 20_000, 60_000])
def test_a_decompression_bomb_is_refused_before_decoding_with_the_way_to_raise_the_limit(side: int):
    """9,600² is where Pillow would only warn, 20,000² where it would raise an error of its own."""
    with pytest.raises(
        ImageError, match=rf"{side} × {side} = {side * side:,} pixels: expected at most 89,478,485.*max_pixels"
    ):
        load_image(bomb(side, side))


def test_the_limit_can_be_lowered_raised_and_lifted():
    data = saved(smooth(), "PNG")  # 2,400 pixels
    assert load_image(data, max_pixels=2400).shape == (40, 60, 3)
    for source in (data, smooth()):
        with pytest.raises(ImageError, match="60 × 40 = 2,400 pixels: expected at most 2,399"):
            load_image(source, max_pixels=2399)
    # Above Pillow's own limit of 179 million: the size is accepted, the missing rows are what is wrong.
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(bomb(200_000_000, 1), max_pixels=None)


# ------------------------------------------------------------------------------------------------------------- resize


def test_a_picture_of_the_right_size_is_left_alone_by_every_resize():
    square = COLOUR[:23, :23]
    for how in ("hf_bicubic", "bv_bilinear", "bv_bilinear_aa", "float_bilinear_aa"):
        np.testing.assert_array_equal(resize(square, 23, how), square)


@pytest.mark.parametrize("how", ["hf_bicubic", "bv_bilinear", "bv_bilinear_aa", "float_bilinear_aa"])
@pytest.mark.parametrize("size_hw", [(1, 1), (1, 200), (500, 3), (29, 31)])
def test_an_even_picture_stays_even_at_any_size(how: Any, size_hw: tuple[int, int]):
    for level in (0, 1, 127, 255):
        pixels = to_pixels(np.full((*size_hw, 3), level, np.uint8), 28, how)
        assert pixels.shape == (3, 28, 28)
        assert pixels.dtype == torch.float32
        # Weights add up to 1 within rounding; where the result is cut, that may cost one level.
        assert (pixels - (level / 127.5 - 1)).abs().max() <= 1.01 * 2 / 255


@pytest.mark.parametrize("how", ["hf_bicubic", "bv_bilinear", "bv_bilinear_aa", "float_bilinear_aa"])
def test_black_is_minus_one_and_white_is_one_exactly(how: Any):
    assert to_pixels(np.zeros((5, 4, 3), np.uint8), 7, how).unique().tolist() == [-1.0]
    assert to_pixels(np.full((14, 14, 3), 255, np.uint8), 14, how).unique().tolist() == [1.0]


def test_every_level_is_rounded_as_the_references_round_it():
    """x / 127.5 - 1 in their place: all 256 levels, bit by bit."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    x, one, half, two = levels.astype(np.float32) / np.float32(255), np.float32(1), np.float32(0.5), np.float32(2)
    expected = {"hf_bicubic": (x - half) / half, "bv_bilinear": x * two - one, "bv_bilinear_aa": x * two - one}
    for how, plane in expected.items():
        found = to_pixels(np.repeat(levels[..., None], 3, axis=2), 16, how)
        for channel in found.numpy():
            np.testing.assert_array_equal(channel.view(np.int32), plane.view(np.int32), err_msg=how)


# ------------------------------------------------------------------------------------------------------------- draft


def test_a_draft_is_decoded_at_the_smallest_fraction_that_covers_the_square():
    data = saved(smooth(160, 240), "JPEG", quality=95)
    for draft, expected_hw in ((161, (160, 240)), (80, (80, 120)), (81, (160, 240)), (20, (20, 30)), (1, (20, 30))):
        found = load_image(data, draft=draft)
        assert found.shape == (*expected_hw, 3)
        whole = np.asarray(Image.fromarray(load_image(data)).reduce(160 // expected_hw[0]))
        assert np.abs(found.astype(int) - whole).mean() < 3  # the same picture, not the same pixels


def test_a_draft_changes_nothing_but_jpeg_files():
    image = smooth(160, 240)
    for source in (image, np.asarray(image), saved(image, "PNG"), saved(image, "WEBP", lossless=True)):
        np.testing.assert_array_equal(load_image(source, draft=20), load_image(source))
    grey = load_image(saved(image.convert("L"), "JPEG"), draft=40)
    assert grey.shape == (40, 60, 3)
    assert (grey == grey[..., :1]).all()


def test_a_draft_is_turned_upright_and_counts_as_large_as_the_file_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(smooth(160, 240), "JPEG", exif=exif)
    assert load_image(data, draft=40).shape == (60, 40, 3)
    with pytest.raises(ImageError, match="240 × 160 = 38,400 pixels: expected at most 9,600"):
        load_image(data, draft=20, max_pixels=9600)
    with pytest.raises(OptionError, match="draft=0: expected a side of 1 pixel or more"):
        load_image(data, draft=0)


def test_mirrored_pictures_give_mirrored_pixels():
    for how in ("hf_bicubic", "float_bilinear_aa"):
        plain, mirrored = to_pixels(COLOUR, 14, how), to_pixels(np.ascontiguousarray(COLOUR[:, ::-1]), 14, how)
        torch.testing.assert_close(plain, mirrored.flip(2), atol=1.01 * 2 / 255, rtol=0)


def test_antialias_looks_at_every_pixel_and_its_absence_at_few():
    dot = np.zeros((64, 64, 3), np.uint8)
    dot[17, 17] = 255  # plain bilinear looks at rows and columns 19 and 20 of these eight
    assert resize(dot, 8, "float_bilinear_aa").sum() > 0
    assert resize(dot, 8, "bv_bilinear").sum() == 0


def test_resize_refuses_what_is_no_picture_and_names_the_nearest_way():
    with pytest.raises(ImageError, match=r"resize got float32\[4, 4, 3\]: expected uint8\[H, W, 3\]"):
        resize(np.zeros((4, 4, 3), np.float32), 4, "hf_bicubic")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"resize='bicubic': expected one of hf_bicubic.*Did you mean 'hf_bicubic'\?"):
        resize(COLOUR, 4, "bicubic")  # type: ignore[arg-type]


def test_a_clip_needs_frames():
    with pytest.raises(ShapeError, match="0 frames for a clip of 4: expected at least one"):
        video_pixels([], 28, 4)
    assert video_pixels([COLOUR], 28, 3).shape == (3, 3, 28, 28)
