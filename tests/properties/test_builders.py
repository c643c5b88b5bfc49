"""Laws of the builders: what a prompt and its answer say is what the record held, boxes up to half a bin."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.data.builders import BUILDERS, LANGUAGES, OneOf, builder_of, raster_order, read_example
from paligemma.data.record import Asked, Instance, Record, Text, Word

sizes_hw = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
# Any Unicode text but `;`, `<`, `>`, newlines, lone surrogates and outer white space.
labels = st.text(st.characters(exclude_characters=";<>\n", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text == text.strip()
)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
langs = st.sampled_from([*LANGUAGES, "quz", "is"])
styles = st.sampled_from(["caption", "cap", "describe"])
seeds = st.integers(0, 2**32 - 1)
# Fractions at least two bins apart, some beyond the picture: thinner boxes are widened (see the unit tests of tasks).
_edges = (
    st.tuples(st.floats(-0.5, 1.5), st.floats(-0.5, 1.5))
    .map(sorted)
    .filter(lambda e: min(e[1], 1) - max(e[0], 0) > 2 / 1023)
)


@st.composite
def boxes(draw: st.DrawFn, size_hw: tuple[int, int]) -> tuple[float, float, float, float]:
    (y1, y2), (x1, x2) = draw(_edges), draw(_edges)
    height, width = size_hw
    return (x1 * width, y1 * height, x2 * width, y2 * height)


@st.composite
def records(draw: st.DrawFn, least: int = 0) -> Record:
    size = draw(sizes_hw)

    def some(item: st.SearchStrategy) -> tuple:
        return tuple(draw(st.lists(item, min_size=least, max_size=4)))

    return Record(
        images=("a.jpg",),
        size_hw=size,
        instances=some(st.builds(Instance, labels, boxes(size), is_crowd=st.sampled_from([False, False, True]))),
        texts=some(st.builds(Text, texts, langs, st.none() | boxes(size), styles)),
        words=some(st.builds(Word, labels, boxes(size))),
        questions=some(st.builds(Asked, texts, st.lists(texts, max_size=2).map(tuple), langs)),
        id=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=3)),
    )


def _near(box: tuple[float, ...], truth: tuple[float, ...], size_hw: tuple[int, int]) -> bool:
    """Every edge within half a bin (and float32's last digits) of its side, after cutting off what is outside."""
    sides = (size_hw[1], size_hw[0]) * 2
    cut = [min(max(edge, 0), side) for edge, side in zip(truth, sides, strict=True)]
    return all(abs(a - b) <= (0.5 + 1e-3) / 1023 * side for a, b, side in zip(box, cut, sides, strict=True))


def _same_things(found: tuple[Instance, ...], truth: list[Instance], size_hw: tuple[int, int]) -> bool:
    return len(found) == len(truth) and all(
        a.label == b.label and _near(a.box_xyxy_px, b.box_xyxy_px, size_hw) for a, b in zip(found, truth, strict=True)
    )


@settings(max_examples=60)
@given(records(), seeds)
def test_things_come_back_in_their_order(record: Record, seed: int) -> None:
    single = [item for item in record.instances if not item.is_crowd]
    example = builder_of("detect", order="source").build(record, np.random.default_rng(seed))
    if not single:
        assert example is None
        return
    assert sorted(example.prefix.removeprefix("detect ").split(" ; ")) == sorted({item.label for item in single})
    assert _same_things(read_example(example, record.size_hw).instances, single, record.size_hw)


@settings(max_examples=60)
@given(records(), seeds, st.integers(1, 8))
def test_noise_is_gone_on_the_way_back_and_its_places_alone_are_unlearned(
    record: Record, seed: int, fill_to: int
) -> None:
    single = [item for item in record.instances if not item.is_crowd]
    builder = builder_of("detect_noise", order="source", fill_to=fill_to, noise_label="qqqqqqqqqqqqq")
    example = builder.build(record, np.random.default_rng(seed))
    assert len(example.unlearned) == max(0, fill_to - len(single))
    for back in (read_example(example, record.size_hw), builder.read(example, record.size_hw)):
        assert _same_things(back.instances, single, record.size_hw)
    learned = list(example.suffix)
    for start, end in reversed(example.unlearned):
        del learned[start:end]
    assert "".join(learned).count("<loc") == 4 * len(single)
    assert "".join(learned).count("qqqqqqqqqqqqq") == len(example.unlearned)


@settings(max_examples=60)
@given(records(), seeds)
def test_regions_and_words_with_boxes_come_back(record: Record, seed: int) -> None:
    example = BUILDERS["grounded_caption"].build(record, np.random.default_rng(seed))
    regions = [text for text in record.texts if text.box_xyxy_px is not None]
    assert (example is None) == (not regions)
    if example is not None:
        (text,) = read_example(example, record.size_hw).texts
        assert any(
            (text.text, text.lang) == (r.text.strip(), r.lang)
            and _near(text.box_xyxy_px, r.box_xyxy_px, record.size_hw)
            for r in regions
        )
    example = BUILDERS["ocr_boxes"].build(record, np.random.default_rng(seed))
    assert (example is None) == (not record.words)
    if example is not None:
        words = [record.words[i] for i in raster_order([word.box_xyxy_px for word in record.words])]
        back = read_example(example, record.size_hw).words
        assert [word.text for word in back] == [word.text for word in words]
        assert all(
            _near(a.box_xyxy_px, b.box_xyxy_px, record.size_hw) for a, b in zip(back, words, strict=True)
        )  # fmt: skip


@settings(max_examples=60)
@given(records(), seeds, st.sampled_from(["cycle", "random", "first"]))
def test_texts_and_questions_come_back_with_their_language(record: Record, seed: int, choice: str) -> None:
    for style in ("caption", "cap", "describe"):
        kept = [
            Text(t.text.strip(), t.lang, style=style) for t in record.texts if t.style == style and not t.box_xyxy_px
        ]
        example = builder_of(style, choice=choice).build(record, np.random.default_rng(seed))
        assert (example is None) == (not kept)
        if example is not None:
            (text,) = read_example(example, record.size_hw).texts
            assert text in kept
            assert choice != "first" or text == kept[0]
    whole = {(q.question.strip(), tuple(a.strip() for a in q.answers), q.lang) for q in record.questions}
    answered = {(q.question.strip(), answer.strip(), q.lang) for q in record.questions for answer in q.answers}
    for name, fields in (("answer", {}), ("answer", {"answer_lang": None}), ("question", {})):
        builder = builder_of(name, choice=choice, **fields)
        example = builder.build(record, np.random.default_rng(seed))
        assert (example is None) == (not answered)
        if example is not None:
            (asked,) = builder.read(example, record.size_hw).questions
            if name == "question":
                assert (asked.question, *asked.answers, asked.lang) in answered
            else:  # all answers of the question, one of which is learned
                assert (asked.question, asked.answers, asked.lang) in whole
                assert example.suffix in asked.answers


@settings(max_examples=60)
@given(records(), seeds, st.integers(1, 60))
def test_what_is_read_of_a_text_is_the_text_less_dropped_words(record: Record, seed: int, budget: int) -> None:
    whole = BUILDERS["ocr"].build(record, np.random.default_rng(seed))
    if whole is None:
        assert not record.words
        return
    back = read_example(whole, record.size_hw)
    assert " ".join(word.text for word in back.words) == whole.suffix
    shorter = builder_of("ocr", max_length=budget).build(record, np.random.default_rng(seed))
    if shorter is None:  # "" would say that there is nothing to read
        assert all(len(" ".join(word.text.split())) > budget for word in record.words if word.text.strip())
        return
    cut = shorter.suffix
    assert cut
    assert len(cut) <= budget
    assert not Counter(cut.split()) - Counter(whole.suffix.split())
    assert cut == whole.suffix or len(whole.suffix) > budget


@settings(max_examples=40)
@given(records(least=1), seeds)
def test_the_same_seed_builds_the_same_example(record: Record, seed: int) -> None:
    names = [name for name in BUILDERS if name not in ("segment", "referring", "list_objects", "multi_presence")]
    one = OneOf(tuple(BUILDERS[name] for name in names))
    classes = ("qqqqqqqqqqqqq", "rrrrrrrrrrrrr")
    example = one.build(record, np.random.default_rng(seed), classes)
    assert one.build(record, np.random.default_rng(seed), classes) == example
    assert read_example(example, record.size_hw) is not None
