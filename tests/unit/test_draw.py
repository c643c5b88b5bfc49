"""Overlays: what is drawn where, in which colour, and that no label can break them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma.draw import PALETTE, Style, colours_for, mask_picture, overlay, save, sheet
from paligemma.draw.paint import spot_for_tag
from paligemma.draw.style import INK, PAPER, font_for, shortened, wrapped
from paligemma.errors import OptionError, ShapeError
from paligemma.results import Answer, Caption, Choice, Detection, Detections, ReadText, Segment, Segments, Word

GREY = np.full((300, 400, 3), 128, np.uint8)
AS_IS = Style(min_long_side_px=400)


def colour_at(picture: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return picture.getpixel((x, y))  # type: ignore[return-value]


def test_a_box_is_outlined_in_the_colour_of_its_label_and_left_clear_inside():
    found = Detections([Detection("cat", (50, 60, 200, 250), 0.9), Detection("dog", (220, 60, 380, 250), 0.8)])
    drawn = overlay(GREY, found, style=AS_IS)
    assert drawn.size == (400, 300)
    assert colour_at(drawn, 50, 150) == PALETTE[0]
    assert colour_at(drawn, 199, 150) == PALETTE[0]
    assert colour_at(drawn, 220, 150) == PALETTE[1]
    assert colour_at(drawn, 125, 155) == (128, 128, 128)


def test_equal_labels_share_a_colour_and_a_given_colour_wins():
    assert colours_for(["cat", "dog", "cat"]) == {"cat": PALETTE[0], "dog": PALETTE[1]}
    drawn = overlay(GREY, [Detection("dog", (50, 60, 200, 250), 0.9)], colours={"dog": (1, 2, 3)}, style=AS_IS)
    assert colour_at(drawn, 50, 150) == (1, 2, 3)


def test_forty_labels_have_forty_colours():
    assert len(set(colours_for(map(str, range(40))).values())) == 40


def test_the_first_colours_stay_apart_without_red_or_green_cones():
    # Machado, Oliveira and Fernandes 2009, severity 1.0, in linear RGB.
    no_red = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    no_green = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    srgb = np.array(PALETTE[:6]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    for sight in (np.eye(3), np.array(no_red), np.array(no_green)):
        seen = np.clip(linear @ sight.T, 1e-6, 1) @ to_xyz.T / (0.9505, 1, 1.089)
        x, y, z = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116).T
        lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 25


def test_a_tag_is_written_on_the_box_in_an_ink_that_contrasts():
    drawn = np.asarray(overlay(GREY, [Detection("cat", (50, 60, 200, 250), 0.93)], style=AS_IS))
    tag = drawn[40:58, 52:110].reshape(-1, 3)
    assert (tag == PALETTE[0]).all(axis=1).mean() > 0.4
    assert (np.abs(tag.astype(int) - INK).max(axis=1) < 40).any()


def test_scores_can_be_left_out():
    boxes = [Detection("cat", (50, 60, 200, 250), 0.93)]
    with_score, without = (
        overlay(GREY, boxes, style=AS_IS),
        overlay(GREY, boxes, style=Style(min_long_side_px=400, scores=False)),
    )
    widths = [(np.asarray(p)[50] == PALETTE[0]).all(axis=1).sum() for p in (with_score, without)]
    assert widths[0] > widths[1] > 0


def test_tags_of_one_crowd_never_cover_each_other_while_there_is_room():
    box, taken = (100, 100, 140, 130), []
    for _ in range(6):
        taken.append(spot_for_tag(box, (60, 18), (400, 300), taken, []))
    for a, b in itertools.combinations(taken, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@given(
    box=st.tuples(*[st.integers(0, 200)] * 4).map(lambda v: (v[0], v[1], v[0] + 1 + v[2], v[1] + 1 + v[3])),
    tag=st.tuples(st.integers(1, 400), st.integers(1, 200)),
)
def test_a_tag_never_leaves_the_picture(box, tag):
    x0, y0, x1, y1 = spot_for_tag(box, tag, (401, 401), [], [])
    assert 0 <= x0 <= x1 <= 401
    assert 0 <= y0 <= y1 <= 401
    assert (x1 - x0, y1 - y0) == tag


@settings(max_examples=40)
@given(label=st.text(st.characters(codec=None), max_size=40), prompt=st.text(st.characters(codec=None), max_size=60))
def test_any_unicode_label_and_prompt_can_be_drawn(label, prompt):
    drawn = overlay(
        GREY[:60, :80], [Detection(label, (5, 5, 70, 50), 0.5)], prompt=prompt, style=Style(min_long_side_px=80)
    )
    assert drawn.width == 80


@pytest.mark.parametrize("box", [(-50, -50, 900, 900), (400, 300, 400, 300), (30, 30, 30, 30), (float("nan"), 0, 9, 9)])
def test_boxes_that_leave_the_picture_or_have_no_area_are_drawn_at_its_edge(box):
    drawn = overlay(GREY, [Detection("x", box, 0.5)], style=AS_IS)
    assert drawn.size == (400, 300)
    assert (np.asarray(drawn) == PALETTE[0]).all(axis=2).any()


def test_a_mask_tints_its_inside_outlines_its_edge_and_leaves_the_rest():
    mask = np.zeros((300, 400), bool)
    mask[100:200, 100:300] = True
    drawn = overlay(GREY, Segments([Segment("cat", (100, 100, 300, 200), mask, 0.9)]), style=AS_IS)
    tinted = 128 + 0.42 * (np.array(PALETTE[0]) - 128)
    assert np.abs(np.array(colour_at(drawn, 200, 150)) - tinted).max() <= 1
    assert colour_at(drawn, 200, 100) == PALETTE[0]
    assert colour_at(drawn, 350, 250) == (128, 128, 128)


@pytest.mark.parametrize("shape", ["speck", "line"])
@pytest.mark.parametrize("scale", [1, 4])
def test_thin_masks_stay_visible(shape, scale):
    mask = np.zeros((300, 400), bool)
    mask[150, 200 if shape == "speck" else slice(100, 300)] = True
    drawn = overlay(
        GREY, [Segment("", (0, 0, 400, 300), mask, 0.9)], style=Style(min_long_side_px=400 * scale, scores=False)
    )
    near = np.asarray(drawn)[150 * scale - 6 : 150 * scale + 6, 200 * scale - 6 : 200 * scale + 6]
    assert (np.abs(near.astype(int) - PALETTE[0]).max(axis=2) < 30).any()


def test_a_mask_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(ShapeError, match=r"\(10, 20\), the picture is \(300, 400\)"):
        overlay(GREY, [Segment("cat", (0, 0, 5, 5), np.ones((10, 20), bool), 0.9)])


def test_small_pictures_are_enlarged_and_large_ones_kept():
    assert overlay(GREY[:100, :50]).size == (360, 720)
    assert overlay(np.zeros((900, 1600, 3), np.uint8)).size == (1600, 900)


def test_captions_and_answers_stand_below_the_picture_and_leave_it_untouched():
    long = Caption("a very long caption that has to be wrapped because it is wider than the picture is", -3.0)
    for result in (
        Caption("a cat", -1.0),
        long,
        Answer("cat", -1.0, (Choice("cat", -1.0, 0.9), Choice("dog", -2.0, 0.1))),
    ):
        drawn = np.asarray(overlay(GREY, result, prompt="caption en", style=AS_IS))
        assert (drawn[:300] == 128).all()
        assert drawn.shape[0] > 320
        assert (drawn[-1] == PAPER).all()
        assert (np.abs(drawn[300:].astype(int) - INK).max(axis=2) < 40).any()
    assert overlay(GREY, long, style=AS_IS).height > overlay(GREY, Caption("a cat", 0.0), style=AS_IS).height


def test_an_empty_list_says_that_nothing_was_found():
    assert overlay(GREY, Detections(), style=AS_IS).height > 300


def test_words_are_boxed_and_text_without_words_is_written_below():
    words = ReadText("hi you", (Word("hi", (50, 60, 200, 250), 0.9), Word("you", (220, 60, 380, 250), 0.8)))
    drawn = overlay(GREY, words, style=AS_IS)
    assert drawn.height == 300
    assert colour_at(drawn, 50, 150) == colour_at(drawn, 220, 150) == PALETTE[0]
    assert overlay(GREY, ReadText("hi you"), style=AS_IS).height > 300


@settings(max_examples=50)
@given(text=st.text(max_size=200), width=st.integers(20, 300))
def test_wrapping_keeps_every_visible_character_and_the_width(text, width):
    font = font_for(Style(), (200, 200))
    lines = wrapped(text, font, width)
    kept, wanted = (
        "".join(lines).replace(" ", ""),
        "".join(c if c.isprintable() else "\ufffd" for c in "".join(text.split())),
    )
    assert kept == wanted
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)


def test_a_label_too_long_ends_in_an_ellipsis():
    font = font_for(Style(), (200, 200))
    short = shortened("w" * 500, font, 100)
    assert short.endswith("w…")
    assert font.getlength(short) <= 100
    assert shortened("cat", font, 100) == "cat"


def test_the_bundled_font_has_every_latin_letter():
    font = font_for(Style(), (700, 700))
    missing = bytes(font.getmask("\U000e0fff"))
    latin = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0x250)) if c != 0xAD]
    assert [c for c in latin if bytes(font.getmask(c)) == missing] == []


def test_save_writes_the_overlay_and_one_picture_per_mask_at_the_original_size(tmp_path: Path):
    mask = np.zeros((300, 400), bool)
    mask[10:20, 10:30] = True
    result = Segments([Segment("red cat", (10, 10, 30, 20), mask, 0.9), Segment("../../x", (0, 0, 5, 5), ~mask, 0.9)])
    files = save(tmp_path / "out", "street", GREY, result)
    assert [f.name for f in files] == ["street.png", "street.mask-01-red-cat.png", "street.mask-02-x.png"]
    assert {f.parent for f in files} == {tmp_path / "out"}
    assert np.array_equal(np.asarray(Image.open(files[1])) > 0, mask)
    assert np.array_equal(np.asarray(mask_picture(~mask)), np.where(mask, 0, 255))


def test_a_sheet_shows_all_pictures_on_one_page():
    page = sheet([Image.new("RGB", (100, 50 * i), PALETTE[i]) for i in range(1, 5)], columns=2, cell_px=100)
    assert {PALETTE[i] for i in range(1, 5)} <= {colour for _, colour in page.getcolors(1 << 20)}


@pytest.mark.parametrize("wrong", [3, [3], {"a": 1}])
def test_what_cannot_be_drawn_is_refused_by_name(wrong):
    with pytest.raises(OptionError, match=r"cannot draw a (int|dict)"):
        overlay(GREY, wrong)


def test_styles_are_checked():
    with pytest.raises(OptionError, match=r"mask_opacity=1\.5"):
        Style(mask_opacity=1.5)
    with pytest.raises(OptionError, match="text_scale=0"):
        Style(text_scale=0)
    with pytest.raises(OptionError, match="cannot be read as a font"):
        overlay(GREY, "text", style=Style(font=__file__))
