"""Laws of the tasks: parse ∘ format is the identity up to half a bin, and no text whatever breaks a parser."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paligemma.results import Detection, Detections, ReadText, Segment, Segments, Word
from paligemma.tasks import TASKS
from paligemma.tasks.coords import decode_coord, encode_coord
from paligemma.tasks.grammar import format_entries, parse_entries
from paligemma.tasks.segmentation import read_referring

sizes_hw = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
# Any Unicode text but `;`, `<`, `>`, newlines, lone surrogates and outer white space.
labels = st.text(st.characters(exclude_characters=";<>\n", exclude_categories=["Cs"]), max_size=12).filter(
    lambda text: text == text.strip()
)
words = labels.filter(bool)
# Fractions at least two bins apart: thinner boxes are widened (see the unit tests).
_edges = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda e: e[1] - e[0] > 2 / 1023)


@st.composite
def boxes(draw: st.DrawFn, size_hw: tuple[int, int]) -> tuple[float, float, float, float]:
    (y1, y2), (x1, x2) = draw(_edges), draw(_edges)
    height, width = size_hw
    return (x1 * width, y1 * height, x2 * width, y2 * height)


def _near(box: tuple[float, ...], other: tuple[float, ...], size_hw: tuple[int, int]) -> bool:
    """Every edge within half a bin (and float32's last digits) of its side."""
    sides = (size_hw[1], size_hw[0]) * 2
    return all(abs(a - b) <= (0.5 + 1e-3) / 1023 * side for a, b, side in zip(box, other, sides, strict=True))


@given(st.data())
def test_detections_survive_format_and_parse_up_to_half_a_bin(data: st.DataObject) -> None:
    size = data.draw(sizes_hw)
    truth = [Detection(data.draw(labels), data.draw(boxes(size)), 1.0) for _ in range(data.draw(st.integers(0, 4)))]
    back = TASKS["detect"].parse(TASKS["detect"].suffix(Detections(truth), size), size_hw=size)
    assert back.problems == ()
    assert [found.label for found in back] == [found.label for found in truth]
    assert all(_near(a.box_xyxy_px, b.box_xyxy_px, size) for a, b in zip(back, truth, strict=True))


@given(st.data())
def test_words_survive_format_and_parse_up_to_half_a_bin(data: st.DataObject) -> None:
    size = data.draw(sizes_hw)
    truth = tuple(Word(data.draw(words), data.draw(boxes(size)), 1.0) for _ in range(data.draw(st.integers(1, 4))))
    back = TASKS["read"].parse(TASKS["read"].suffix(ReadText("", truth), size), size_hw=size)
    assert back.problems == ()
    assert [word.text for word in back.words] == [word.text for word in truth]
    assert all(_near(a.box_xyxy_px, b.box_xyxy_px, size) for a, b in zip(back.words, truth, strict=True))


def _encode(masks: np.ndarray) -> np.ndarray:
    """A mask auto-encoder that a test can see through: each code says whether its 16 x 16 cell is mostly foreground."""
    cells = masks.reshape(-1, 4, 16, 4, 16).mean(axis=(2, 4)).reshape(-1, 16)
    return (cells > 0.5).astype(np.int64)


def _decode(codes: np.ndarray) -> np.ndarray:
    cells = (2.0 * codes - 1).astype(np.float32).reshape(-1, 4, 1, 4, 1)
    return np.broadcast_to(cells, (len(codes), 4, 16, 4, 16)).reshape(-1, 64, 64)


@given(st.data(), st.integers(40, 200), st.integers(40, 200))
def test_segments_survive_format_and_parse(data: st.DataObject, height: int, width: int) -> None:
    """Boxes up to half a bin and masks up to one pixel at the edges, for boxes full of foreground."""
    size, truth = (height, width), []
    for _ in range(data.draw(st.integers(1, 3))):
        y1, x1 = data.draw(st.integers(0, height - 20)), data.draw(st.integers(0, width - 20))
        y2, x2 = data.draw(st.integers(y1 + 20, height)), data.draw(st.integers(x1 + 20, width))
        mask = np.zeros(size, bool)
        mask[y1:y2, x1:x2] = True
        truth.append(Segment(data.draw(labels), (float(x1), float(y1), float(x2), float(y2)), mask, 1.0))
    text = TASKS["segment"].suffix(Segments(truth), size, mask_encoder=_encode)
    back = TASKS["segment"].parse(text, size_hw=size, mask_decoder=_decode)
    assert back.problems == ()
    for a, b in zip(back, truth, strict=True):
        assert a.label == b.label
        assert _near(a.box_xyxy_px, b.box_xyxy_px, size)
        x1, y1, x2, y2 = (int(edge) for edge in b.box_xyxy_px)
        assert a.mask[y1:y2, x1:x2][:-1, :-1].all()  # edges are cut down to whole pixels, as in the reference
        a.mask[max(y1 - 1, 0) : y2, max(x1 - 1, 0) : x2] = False
        assert not a.mask.any()


@given(st.floats(0, 1))
def test_a_coordinate_survives_up_to_half_a_bin(fraction: float) -> None:
    assert abs(decode_coord(encode_coord(fraction)) - fraction) <= 0.5 / 1023 + 1e-7


@given(st.integers(0, 1023))
def test_a_bin_survives_exactly(index: int) -> None:
    assert encode_coord(decode_coord(index)) == index


_fragments = st.one_of(
    st.sampled_from(
        [
            "<loc0000>", "<loc0500>", "<loc1023>", "<loc1024>", "<loc99>", "<loc0500><loc0400><loc0600><loc0700>",
            "<seg000>", "<seg127>", "<seg128>", "<seg001>" * 16, "<seg", "<loc", ">", ";", " ; ", "; ", " ", "\n", "\t",
            "zebra", "<eos>", "<loc٠١٢٣>",
        ]
    ),
    st.text(max_size=5),
)  # fmt: skip
answers = st.lists(_fragments, max_size=30).map("".join)


@given(answers, st.one_of(st.none(), st.tuples(st.integers(1, 60), st.integers(1, 60))))
def test_no_text_breaks_a_parser_and_all_of_it_is_kept(text: str, size_hw: tuple[int, int] | None) -> None:
    for name, task in TASKS.items():
        result = task.parse(text, size_hw=size_hw, mask_decoder=_decode)
        assert result.raw == text
        if name in ("detect", "segment"):
            height, width = size_hw or (1, 1)
            for found in result:
                x1, y1, x2, y2 = found.box_xyxy_px
                assert 0 <= x1 < x2 <= width
                assert 0 <= y1 < y2 <= height
    read_referring(text, size_hw or (1, 1), _decode)


@given(answers)
def test_every_word_of_a_text_is_in_a_label_or_in_a_problem(text: str) -> None:
    """Nothing is dropped in silence: what is neither grammar nor white space turns up again."""
    entries, problems = parse_entries(text)
    kept = "".join(entry.label for entry in entries) + "".join(problems)
    assert kept.count("zebra") == text.count("zebra")


@given(answers)
def test_what_was_read_reads_the_same_when_it_is_written_again(text: str) -> None:
    entries, _ = parse_entries(text)

    def locs(bins: tuple[int, ...]) -> str:
        return "".join(f"<loc{i:04d}>" for i in bins)

    for spaced in (True, False):
        again, problems = parse_entries(
            format_entries([(locs(e.bins), e.codes, e.label) for e in entries], spaced=spaced)
        )
        assert problems == ()
        assert [(e.bins, e.codes, e.label) for e in again] == [(e.bins, e.codes, e.label) for e in entries]


@given(st.data())
def test_scores_do_not_depend_on_how_the_rest_is_cut_into_tokens(data: st.DataObject) -> None:
    """A label's score is the geometric mean over its own tokens, whatever the tokens around it."""
    label = data.draw(words)
    logprobs = data.draw(st.lists(st.floats(-20, 0), min_size=len(label), max_size=len(label)))
    before, after = "<loc0010><loc0020><loc0110><loc0220> ", " ; "
    cut = data.draw(st.integers(0, len(before) - 1))
    pieces = [(before[:cut], -7.0), (before[cut:], -7.0), *zip(label, logprobs, strict=True), (after, -7.0), ("", -7.0)]
    (found,) = TASKS["detect"].parse(before + label + after, token_logprobs=pieces)
    mean = sum(logprobs) / len(logprobs)
    assert math.isclose(found.score, math.exp(mean), rel_tol=1e-9)


def test_long_hostile_texts_are_read_in_one_pass() -> None:
    """A parser that tries things twice would need hours for these; nothing is asserted about seconds."""
    box = "<loc0000><loc0000><loc0001><loc0001>"
    for part in (
        "<loc0000>",
        "<loc0000>" * 3 + "x",
        box,
        box + " ",
        box + "<seg000>" * 15,
        "<seg000>",
        "<",
        "; ",
        " ",
        "a",
    ):
        text = part * (1_000_000 // len(part))
        entries, problems = parse_entries(text)
        assert len(entries) + len(problems) > 0 or not text.strip()
