"""Detection, segmentation and reading with boxes: what is written, what is read, what stands in `.problems`."""

import math

import numpy as np
import pytest

from paligemma.errors import OptionError, TaskError
from paligemma.results import Detection, Detections, ReadText, Segment, Segments, Word
from paligemma.tasks import TASKS
from paligemma.tasks.coords import box_to_tokens
from paligemma.tasks.masks import crop_mask, paste_mask
from paligemma.tasks.segmentation import SegmentTask

SIZE = (1023, 2046)  # one bin is one pixel high and two wide
BOX = "<loc0010><loc0020><loc0110><loc0220>"
OTHER = "<loc0500><loc0600><loc0700><loc0800>"
SEGS = "".join(f"<seg{7 * i:03d}>" for i in range(16))
BOX_PX, OTHER_PX = (40.0, 10.0, 440.0, 110.0), (1200.0, 500.0, 1600.0, 700.0)

detect, segment, read = TASKS["detect"], TASKS["segment"], TASKS["read"]


def _decoder(codes: np.ndarray) -> np.ndarray:
    """Foreground in the upper half where the first code is even, everywhere where it is odd."""
    maps = np.ones((len(codes), 64, 64), np.float32)
    maps[codes[:, 0] % 2 == 0, 32:] = -1
    return maps


def _named(text: str) -> list[tuple[str, tuple[float, ...]]]:
    return [(found.label, found.box_xyxy_px) for found in detect.parse(text, size_hw=SIZE)]


def test_boxes_are_read_in_pixels_of_the_original_picture() -> None:
    found = detect.parse(f"{BOX} cat ; {OTHER} red car", size_hw=SIZE)
    assert list(found) == [Detection("cat", BOX_PX, 1.0), Detection("red car", OTHER_PX, 1.0)]
    assert (found.raw, found.problems, found.size_hw) == (f"{BOX} cat ; {OTHER} red car", (), SIZE)


def test_without_a_size_boxes_are_fractions() -> None:
    (found,) = detect.parse("<loc0000><loc0000><loc1023><loc1023> all")
    assert found.box_xyxy_px == (0.0, 0.0, 1.0, 1.0)


def test_the_demos_divisor_is_an_option() -> None:
    (found,) = detect.parse("<loc0000><loc0000><loc0512><loc1023> x", size_hw=(1024, 1024), divisor=1024)
    assert found.box_xyxy_px == (0.0, 0.0, 1023.0, 512.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (BOX, [("", BOX_PX)]),
        (f"\n\n{BOX} cat", [("cat", BOX_PX)]),
        (f"{BOX}cat", [("cat", BOX_PX)]),
        (f"{BOX} cat;{OTHER} dog", [("cat", BOX_PX), ("dog", OTHER_PX)]),
        (f"{BOX} cat {OTHER} dog ; ", [("cat", BOX_PX), ("dog", OTHER_PX)]),
        (f"{BOX} ; {OTHER} ;", [("", BOX_PX), ("", OTHER_PX)]),
        (f"{BOX} two  inner spaces ", [("two  inner spaces", BOX_PX)]),
        (f"{BOX} 猫 🐈 été", [("猫 🐈 été", BOX_PX)]),
    ],
)
def test_white_space_and_separators_do_not_matter(text: str, expected: list[object]) -> None:
    assert _named(text) == expected
    assert detect.parse(text, size_hw=SIZE).problems == ()


@pytest.mark.parametrize(
    ("text", "labels", "said", "quoted"),
    [
        ("no cat here", [], "text that belongs to no box", "no cat here"),
        (f"look: {BOX} cat", ["cat"], "text that belongs to no box", "look:"),
        (f"{BOX} cat ; and", ["cat"], "text that belongs to no box", "and"),
        (
            f"<loc0001><loc0002><loc0003> dog ; {BOX} cat",
            ["cat"],
            "3 location token",
            "<loc0001><loc0002><loc0003> dog",
        ),
        (f"{BOX}<loc0005> cat", [""], "1 location token", "<loc0005> cat"),
        (f"{BOX} {SEGS[:-8]} cat", [""], "15 mask token", "<seg098> cat"),
        ("<loc0000><loc0000><loc1024><loc0009> cat", [], "4 location token", "<loc1024>"),
        ("<loc0110><loc0020><loc0010><loc0220> cat", [], "a box without area", "<loc0220> cat"),
        ("<loc0010><loc0020><loc0110><loc0020> cat", [], "a box without area", "<loc0020> cat"),
        (f"{BOX} {SEGS} cat", ["cat"], "mask tokens that a detection has no use for", "cat"),
        (f"{BOX} a<b", ["a"], "text that belongs to no box", "<b"),
    ],
)
def test_what_cannot_be_read_is_said_with_the_text_itself(text: str, labels: list[str], said: str, quoted: str) -> None:
    found = detect.parse(text, size_hw=SIZE)
    assert [item.label for item in found] == labels
    assert len(found.problems) == 1
    assert said in found.problems[0]
    assert quoted in found.problems[0]
    assert found.raw == text


def test_a_score_is_the_geometric_mean_over_the_label_or_over_the_box_without_one() -> None:
    locs = [(f"<loc{i:04d}>", -0.1 * n) for n, i in enumerate((10, 20, 110, 220))]
    tail = [(" red", -1.0), (" car", -2.0), (" ;", -9.0), (" ", -9.0)]
    text = f"{BOX} red car ; {BOX}"
    found = detect.parse(text, size_hw=SIZE, token_logprobs=[*locs, *tail, *locs, ("", -9.0)])
    assert found[0].score == pytest.approx(math.exp(-1.5))
    assert found[1].score == pytest.approx(math.exp(-0.15))
    assert found.logprob == pytest.approx(-30.0 - 2 * 0.6)


@pytest.mark.parametrize(
    "text", [f"{BOX} {SEGS} cat", f"{BOX}{SEGS} cat", f"{BOX}{SEGS}cat", f"\n{BOX}  {SEGS}  cat ; "]
)
def test_masks_are_read_spaced_and_unspaced(text: str) -> None:
    found = segment.parse(text, size_hw=SIZE, mask_decoder=_decoder)
    (cat,) = found
    assert (cat.label, cat.box_xyxy_px, found.problems) == ("cat", BOX_PX, ())
    assert cat.mask.shape == SIZE
    rows, columns = np.nonzero(cat.mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 59, 40, 439)


def test_all_masks_of_a_text_are_decoded_in_one_call() -> None:
    calls = []

    def decoder(codes: np.ndarray) -> np.ndarray:
        calls.append(codes.copy())
        return _decoder(codes)

    segment.parse(f"{BOX} {SEGS} a ; {OTHER} b ; {OTHER} {SEGS}", size_hw=SIZE, mask_decoder=decoder)
    assert len(calls) == 1
    np.testing.assert_array_equal(calls[0], [[7 * i for i in range(16)]] * 2)


def test_an_object_without_a_readable_mask_keeps_its_box_and_is_named() -> None:
    found = segment.parse(f"{BOX} {SEGS[:-8]} cat ; {OTHER} {SEGS} dog", size_hw=SIZE, mask_decoder=_decoder)
    assert [(s.label, s.box_xyxy_px, bool(s.mask.any())) for s in found] == [
        ("", BOX_PX, False),
        ("dog", OTHER_PX, True),
    ]
    assert "15 mask token(s)" in found.problems[0]
    assert "a box without sixteen mask tokens, so its mask is empty" in found.problems[1]


def test_without_decoder_or_size_masks_are_empty_and_that_is_said() -> None:
    found = segment.parse(f"{BOX} {SEGS} cat", size_hw=SIZE)
    assert (found[0].mask.shape, found[0].mask.any()) == (SIZE, False)
    assert found.problems == ("no mask decoder was given, so the mask is empty: 'cat'",)
    assert "no picture size was given" in segment.parse(f"{BOX} {SEGS} cat", mask_decoder=_decoder).problems[0]


def test_a_segment_between_the_pixels_is_no_segment() -> None:
    found = segment.parse(f"<loc0500><loc0500><loc0505><loc0900> {SEGS} x", size_hw=(40, 60), mask_decoder=_decoder)
    assert list(found) == []
    assert "holds no whole pixel of 60×40" in found.problems[0]


def test_text_is_read_with_and_without_boxes_by_one_parser() -> None:
    assert read.parse("EXIT 12; Gate", size_hw=SIZE) == ReadText("EXIT 12; Gate", raw="EXIT 12; Gate")
    words = read.parse(f"{BOX} EXIT ; {OTHER} 12", size_hw=SIZE)
    assert words.text == "EXIT 12"
    assert words.words == (Word("EXIT", BOX_PX, 1.0), Word("12", OTHER_PX, 1.0))
    assert read.parse("<loc0001>EXIT").problems[0].startswith("1 location token(s)")
    assert read.parse("1 < 2 > 0; yes").problems == ()


def test_suffixes_are_written_as_the_models_answer() -> None:
    found = Detections([Detection("cat", BOX_PX, 0.3), Detection("", OTHER_PX, 0.2)], size_hw=SIZE)
    assert detect.suffix(found) == f"{BOX} cat ; {OTHER}"
    assert detect.suffix(list(found), SIZE) == f"{BOX} cat ; {OTHER}"
    assert detect.suffix([]) == ""
    assert read.suffix(ReadText("EXIT", (Word("EXIT", BOX_PX, 1.0),)), SIZE) == f"{BOX} EXIT"
    assert read.suffix(ReadText("EXIT 12")) == "EXIT 12"


def _encoder(masks: np.ndarray) -> np.ndarray:
    """The first code says how much of the box is foreground, in hundredths."""
    codes = np.zeros((len(masks), 16), np.int64)
    codes[:, 0] = np.round(100 * masks.mean(axis=(1, 2)))
    return codes


def test_masks_are_cropped_to_their_box_before_they_are_encoded() -> None:
    mask = np.zeros((100, 100), bool)
    mask[20:40, 10:30] = True
    cat = Segment("cat", (10.0, 20.0, 30.0, 60.0), mask, 1.0)  # the box is twice as high as the mask
    codes = "<seg050>" + "<seg000>" * 15
    locs = box_to_tokens(cat.box_xyxy_px, (100, 100))
    assert segment.suffix(Segments([cat]), mask_encoder=_encoder) == f"{locs} {codes} cat"
    assert SegmentTask(spaced=False).suffix([cat], mask_encoder=_encoder) == f"{locs}{codes} cat"
    assert SegmentTask(referring=True, spaced=False).suffix([cat], mask_encoder=_encoder) == f"{locs}{codes}"
    assert SegmentTask(referring=True).prefix("the cat on the left") == "the cat on the left"


@pytest.mark.parametrize("label", ["a;b", "a<b", "a>b", "a\nb", " cat", "cat ", "\u00a0cat", "\t"])
def test_labels_that_the_grammar_cannot_carry_are_refused_by_name(label: str) -> None:
    for write in (
        lambda: detect.prefix([label]),
        lambda: segment.prefix(label),
        lambda: detect.suffix([Detection(label, BOX_PX, 1.0)], SIZE),
        lambda: read.suffix(ReadText(label, (Word(label, BOX_PX, 1.0),)), SIZE),
    ):
        with pytest.raises(TaskError) as refused:
            write()
        assert repr(label) in str(refused.value)


def test_an_empty_label_is_refused_where_a_word_is_needed() -> None:
    with pytest.raises(TaskError, match="empty thing"):
        detect.prefix([""])
    with pytest.raises(TaskError, match="empty word"):
        read.suffix(ReadText("", (Word("", BOX_PX, 1.0),)), SIZE)
    with pytest.raises(TaskError, match="no thing to look for"):
        detect.prefix([])


def test_boxes_that_are_no_boxes_are_refused_with_their_numbers() -> None:
    for box, said in (
        ((10.0, 0.0, 10.0, 5.0), "has no area"),
        ((10.0, 5.0, 20.0, 0.0), "has no area"),
        ((200.0, 0.0, 300.0, 5.0), "lies outside of the picture: expected pixels of 100×50"),
        ((0.0, 0.0, float("nan"), 5.0), "expected four finite numbers"),
        ((0.0, 0.0, 5.0), "expected left, top, right, bottom"),
    ):
        with pytest.raises(TaskError, match=said):
            box_to_tokens(box, (50, 100))
    with pytest.raises(TaskError, match="no picture size"):
        detect.suffix([Detection("cat", BOX_PX, 1.0)])


def test_a_box_thinner_than_a_bin_still_reads_as_a_box() -> None:
    for x in (0.0, 0.4, 0.6, 2499.5, 4999.0, 4999.9):
        text = detect.suffix([Detection("hair", (x, 0.0, x + 0.1, 5000.0), 1.0)], (5000, 5000))
        (found,) = detect.parse(text, size_hw=(5000, 5000))
        assert abs(found.box_xyxy_px[0] - x) <= 5000 / 1023
        assert abs(found.box_xyxy_px[2] - x - 0.1) <= 5000 / 1023


def test_masks_that_do_not_fit_are_refused() -> None:
    small = Segment("cat", (0.0, 0.0, 5.0, 5.0), np.ones((5, 5), bool), 1.0)
    with pytest.raises(TaskError, match=r"the mask of 'cat' has shape \(5, 5\): expected \(9, 9\)"):
        segment.suffix([small], (9, 9), mask_encoder=_encoder)
    with pytest.raises(TaskError, match="masks need mask_encoder"):
        segment.suffix([small])
    elsewhere = np.zeros((50, 50), bool)
    elsewhere[40:, 40:] = True
    with pytest.raises(TaskError, match="has no pixel inside its box"):
        segment.suffix([Segment("cat", (0.0, 0.0, 5.0, 5.0), elsewhere, 1.0)], mask_encoder=_encoder)
    with pytest.raises(TaskError, match=r"mask is float64\[3, 3\]"):
        crop_mask(np.zeros((3, 3)), (0, 0, 1, 1))


def test_a_crop_without_a_pixel_takes_the_pixel_it_lies_in() -> None:
    mask = np.zeros((10, 10), bool)
    mask[9, 9] = True
    assert crop_mask(mask, (0.96, 0.96, 0.99, 0.99)).min() == 1.0
    assert crop_mask(mask, (0.31, 0.31, 0.32, 0.32)).max() == 0.0
    assert crop_mask(mask, (0.999, 0.999, 1.0, 1.0)).min() == 1.0


def test_a_crop_pasted_back_is_the_mask() -> None:
    y, x = np.mgrid[:200, :150]
    mask = (y - 90) ** 2 / 60**2 + (x - 70) ** 2 / 40**2 < 1
    box = (30.0, 30.0, 111.0, 151.0)
    crop = crop_mask(mask, (30 / 200, 30 / 150, 151 / 200, 111 / 150))
    back = paste_mask(2 * crop - 1, box, mask.shape)
    assert (back & mask).sum() / (back | mask).sum() > 0.97
    assert not paste_mask(np.ones((64, 64), np.float32), (500.0, 0.0, 600.0, 9.0), mask.shape).any()


def test_rounded_edges_give_back_boxes_of_whole_pixels_where_cut_ones_move() -> None:
    size, moved = (123, 97), 0
    for y1, x1 in ((10, 20), (11, 21), (33, 7), (60, 40)):
        mask = np.zeros(size, bool)
        mask[y1 : y1 + 30, x1 : x1 + 25] = True
        text = f"{box_to_tokens((x1, y1, x1 + 25, y1 + 30), size)}{'<seg001>' * 16}"
        (rounded,) = segment.parse(text, size_hw=size, mask_decoder=_decoder, edges="round")
        np.testing.assert_array_equal(rounded.mask, mask)
        (cut,) = segment.parse(text, size_hw=size, mask_decoder=_decoder)
        moved += not np.array_equal(cut.mask, mask)
    assert moved == 4
    with pytest.raises(OptionError, match="expected 'cut' or 'round'"):
        segment.parse(text, size_hw=size, mask_decoder=_decoder, edges="floor")
