"""Captions, regions, writing in the picture, questions and answers: what is written, and what is refused."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from paligemma.data.builders import Turn, builder_of, read_example
from paligemma.data.example import Example
from paligemma.data.record import Asked, Instance, Record, Text, Word
from paligemma.data.unfold import joined
from paligemma.errors import DataError

SIZE = (1023, 2046)  # one bin is one pixel high and two wide
BOX_PX, BOX = (40.0, 10.0, 440.0, 110.0), "<loc0010><loc0020><loc0110><loc0220>"
EMPTY = Record(("a.jpg",), SIZE, where="row 7")


def build(name, record, seed=0, **fields):
    return builder_of(name, **fields).build(record, np.random.default_rng(seed))


def said(name, record, seed=0, **fields):
    example = build(name, record, seed, **fields)
    return None if example is None else (example.prefix, example.suffix)


def test_each_style_of_caption_has_its_prompt():
    texts = (Text("A cat. "), Text("cat pic", style="cap"), Text("eine Katze", "de"), Text("long", style="describe"))
    record = replace(EMPTY, texts=(*texts, Text("ear", box_xyxy_px=BOX_PX)))
    assert said("caption", record, lang="en") == ("caption en", "A cat.")
    assert said("caption", record, lang="en", lower=True) == ("caption en", "a cat.")
    assert said("caption", record, lang="de") == ("caption de", "eine Katze")
    assert said("caption", record, lang="fr") is None
    assert said("cap", record) == ("cap en", "cat pic")
    assert said("describe", record) == ("describe en", "long")
    assert {said("caption", record, seed)[0] for seed in range(20)} == {"caption en", "caption de"}
    assert all(said(name, EMPTY) is None for name in ("caption", "cap", "describe", "grounded_caption", "ocr"))


def test_blank_answers_are_none():
    asked = Asked("what?", ("cat", " ", "dog"))
    record = replace(EMPTY, questions=(asked, Asked("why?", ("",))))
    answers = {said("answer", record, seed)[1] for seed in range(30)}
    assert answers == {"cat", "dog"}
    assert build("answer", record).references == ("cat", "dog")


def test_every_reference_of_a_caption_comes_back():
    record = replace(EMPTY, texts=(Text("a"), Text("b"), Text("a"), Text("c", "de")))
    example = build("caption", record, choice="first")
    assert read_example(example, SIZE).texts == (Text("a"), Text("b"))


def test_a_region_keeps_its_style_and_needs_an_area():
    record = replace(EMPTY, size_hw=SIZE, texts=(Text("a long ear", "de", BOX_PX, "describe"),))
    assert read_example(build("grounded_caption", record), SIZE).texts == record.texts
    with pytest.raises(DataError, match="expected a region with an area"):
        read_example(Example((), "caption <loc0100><loc0100><loc0100><loc0200>", "x"), SIZE)


def test_what_a_prompt_says_of_itself_is_never_another_rows():
    german = read_example(Example((), "answer en wo ist die Katze?", "here", meta={"question_lang": "de"}), SIZE)
    english = read_example(Example((), "answer en where is the dog?", "there"), SIZE)
    both = joined(german, english)
    assert {(asked.question, asked.lang) for asked in both.questions} == {
        ("wo ist die Katze?", "de"), ("where is the dog?", "en"),
    }  # fmt: skip
    made = [builder_of("answer").build(both, np.random.default_rng(0), turn=Turn(seed=0, epoch=e)) for e in (0, 1)]
    again = {read_example(example, SIZE).questions[0] for example in made}
    assert again == set(both.questions)


def test_rows_that_say_the_same_make_one_record_that_says_it_once():
    boxed = replace(EMPTY, words=(Word("NO ENTRY", BOX_PX), Word("9", BOX_PX)))
    plain = replace(EMPTY, words=(Word("NO"), Word("ENTRY"), Word("9"), Word("9")))
    for one, other in ((boxed, plain), (plain, boxed)):
        words = joined(one, other).words
        assert sorted(words, key=str) == sorted((*boxed.words, Word("9")), key=str)
    he, him = Asked("who?", ("he", "him")), Asked("who?", ("he",))
    for one, other in ((he, him), (him, he)):
        assert joined(replace(EMPTY, questions=(one,)), replace(EMPTY, questions=(other,))).questions == (he,)


def test_a_tall_sign_is_no_line_of_all_that_stands_beside_it():
    boxes = [(0, 0, 40, 500), (100, 260, 150, 280), (200, 260, 250, 280), (100, 300, 150, 320), (200, 300, 250, 320)]
    words = [Word(text, box) for text, box in zip(["HOTEL", "A1", "A2", "B1", "B2"], boxes, strict=True)]
    for order in (words, words[::-1]):
        assert said("ocr", replace(EMPTY, words=tuple(order)))[1] == "HOTEL A1 A2 B1 B2"


def test_an_empty_caption_is_an_error_that_names_the_record():
    with pytest.raises(DataError, match=r"^row 7: caption is ' ': expected text"):
        build("caption", replace(EMPTY, texts=(Text(" "),)))


def test_a_region_is_asked_for_by_its_box():
    record = replace(EMPTY, texts=(Text("ein Ohr", "de", BOX_PX), Text("whole")), instances=(Instance("cat", BOX_PX),))
    assert said("grounded_caption", record) == (f"caption {BOX}", "ein Ohr")
    both = {said("grounded_caption", record, seed, from_instances=True)[1] for seed in range(20)}
    assert both == {"ein Ohr", "cat"}
    assert said("grounded_caption", record, lang="en", from_instances=True) == (f"caption {BOX}", "cat")
    crowd = replace(EMPTY, instances=(Instance("cats", BOX_PX, is_crowd=True),))
    assert said("grounded_caption", crowd, from_instances=True) is None
    back = read_example(build("grounded_caption", record), SIZE)
    assert back.texts == (Text("ein Ohr", "de", BOX_PX),)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((50, 10, 40, 20), r"box \(50, 10, 40, 20\) has no area: expected left < right"),
        ((-9, 10, 0, 20), r"box \(-9, 10, 0, 20\) lies outside of the picture: expected pixels of 2046×1023"),
        ((0, 0, float("nan"), 9), r"box \(.*nan.*\): expected four finite numbers"),
    ],
)
def test_boxes_that_cannot_be_are_refused_in_the_words_of_the_tasks(box, message):
    with pytest.raises(DataError, match="^row 7: " + message):
        build("grounded_caption", replace(EMPTY, texts=(Text("x", box_xyxy_px=box),)))
    with pytest.raises(DataError, match="^row 7: " + message):
        build("ocr_boxes", replace(EMPTY, words=(Word("x", box),)))
    with pytest.raises(DataError, match="^row 7: " + message):
        build("detect", replace(EMPTY, instances=(Instance("x", box),)))


def test_without_the_pictures_size_boxes_are_refused_and_texts_are_not():
    record = Record(("a.jpg",), texts=(Text("a cat"), Text("ear", box_xyxy_px=BOX_PX)), where="row 8")
    assert said("caption", record) == ("caption en", "a cat")
    with pytest.raises(DataError, match=r"^row 8: the picture's size is not known"):
        build("grounded_caption", record)


WORDS = (Word("b", (50, 12, 60, 22)), Word("a", (0, 10, 10, 20)), Word("\n", (0, 0, 5, 5)), Word("c d", (0, 40, 9, 50)))


def test_words_are_read_in_raster_order_with_single_spaces():
    record = replace(EMPTY, words=WORDS)
    assert said("ocr", record) == ("ocr", "a b c d")
    assert said("ocr", record, order="source") == ("ocr", "b a c d")
    unplaced = replace(EMPTY, words=(*WORDS, Word("e")))
    assert said("ocr", unplaced) == ("ocr", "b a c d e")
    assert said("ocr", EMPTY, empty=True) == said("ocr_boxes", EMPTY, empty=True) == ("ocr", "")


def test_words_with_boxes_have_the_grammar_of_detection():
    record = replace(EMPTY, words=(Word("late", (1200, 500, 1600, 700)), Word("to day", BOX_PX)))
    text = f"{BOX} to day ; <loc0500><loc0600><loc0700><loc0800> late"
    assert said("ocr_boxes", record) == ("ocr", text)
    back = read_example(build("ocr_boxes", record), SIZE)
    assert back.words == (Word("to day", BOX_PX), Word("late", (1200, 500, 1600, 700)))


def test_words_that_the_grammar_cannot_carry_are_an_error_or_left_out():
    record = replace(EMPTY, words=(Word("a;", BOX_PX), Word("b", BOX_PX)))
    with pytest.raises(DataError, match=r"^row 7: word 'a;' holds ';'"):
        build("ocr_boxes", record)
    assert said("ocr_boxes", record, unfit="skip") == ("ocr", f"{BOX} b")
    assert said("ocr", record) == ("ocr", "a; b")
    with pytest.raises(DataError, match=r"^row 7: the word 'b' has no box"):
        build("ocr_boxes", replace(EMPTY, words=(Word("b"),)))


def test_random_words_are_dropped_until_the_rest_fits_and_none_is_favoured():
    record = replace(EMPTY, words=tuple(Word(f"{i:02d}", (0, 20 * i, 10, 20 * i + 10)) for i in range(20)))
    kept = Counter()
    for seed in range(1000):
        _, text = said("ocr", record, seed, max_length=23)
        words = text.split(" ")
        assert len(text) == 23  # eight words of two and seven spaces: not one dropped too many
        assert words == sorted(words)
        kept.update(words)
    assert all(330 < kept[f"{i:02d}"] < 470 for i in range(20)), kept  # 400 expected, standard deviation 15.5


def test_one_long_piece_does_not_empty_the_answer():
    record = replace(EMPTY, words=(Word("x" * 200), Word("OPEN"), Word("9")))
    assert {said("ocr", record, seed, max_length=20)[1] for seed in range(20)} == {"OPEN 9"}


def test_the_budget_counts_what_it_is_told_to_count():
    record = replace(EMPTY, words=tuple(Word("x" * 9, (0, 20 * i, 10, 20 * i + 10)) for i in range(6)))
    assert said("ocr", record, max_length=4, length=lambda text: len(text.split()))[1].split() == ["x" * 9] * 4
    assert build("ocr", record, max_length=5) is None  # "" would say that there is nothing to read
    _, boxed = said("ocr_boxes", record, max_length=100)
    assert len(boxed) <= 100
    assert boxed.count("<loc") == 8


def test_questions_are_asked_both_ways():
    record = replace(EMPTY, questions=(Asked("wo ist die Katze? ", ("On the sofa",), "de"), Asked("and?", ())))
    assert said("answer", record) == ("answer en wo ist die Katze?", "On the sofa")
    assert said("answer", record, lower=True) == ("answer en wo ist die Katze?", "on the sofa")
    assert said("answer", record, answer_lang=None) == ("answer de wo ist die Katze?", "On the sofa")
    assert said("answer", record, lang="fr") is None
    assert said("question", record) == ("question de On the sofa", "wo ist die Katze?")
    asked = Asked("wo ist die Katze?", ("On the sofa",), "de")
    for fields in ({}, {"answer_lang": None}):
        assert read_example(build("answer", record, **fields), SIZE).questions == (asked,)
    assert read_example(build("question", record), SIZE).questions == (asked,)


def test_which_answer_is_a_choice():
    record = replace(EMPTY, questions=(Asked("what?", ("a", "b", "c")), Asked("who?", ("d",))))
    assert said("answer", record, question_choice="first", choice="first") == ("answer en what?", "a")
    answers = {said("answer", record, seed, question_choice="first", choice="random")[1] for seed in range(40)}
    assert answers == {"a", "b", "c"}
