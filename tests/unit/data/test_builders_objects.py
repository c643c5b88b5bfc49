"""Questions about what is there: listing, presence, several at once, counting."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from paligemma.data.builders import BUILDERS, builder_of, read_example
from paligemma.data.example import Example
from paligemma.data.record import Asked, Instance, Record
from paligemma.errors import DataError

LABELS = ("dog", "cat", "sofa", "crowd", "car", "bus")
RECORD = Record(
    ("a.jpg",),
    (100, 200),
    instances=(
        Instance("sofa", (0, 60, 90, 100)),
        Instance("cat", (50, 0, 80, 20)),
        Instance("dog", (0, 0, 20, 20)),
        Instance("cat", (100, 60, 120, 80)),
        Instance("crowd", (150, 0, 200, 30), is_crowd=True),
    ),
    where="row 3",
)
BARE = replace(RECORD, instances=())


def said(name, record=RECORD, seed=0, labels=LABELS, **fields):
    example = builder_of(name, **fields).build(record, np.random.default_rng(seed), labels)
    return None if example is None else (example.prefix, example.suffix)


def test_what_is_there_is_listed_once_in_raster_order():
    question = "answer en What objects are in the image?"
    assert said("list_objects") == (question, "dog, cat, crowd, sofa")
    assert said("list_objects", order="source")[1] == "sofa, cat, dog, crowd"
    assert said("list_objects", order="area")[1] == "sofa, crowd, cat, dog"
    assert said("list_objects", BARE) is None
    back = read_example(Example((), question, "dog, cat"), (100, 200))
    assert back.questions == (Asked("What objects are in the image?", ("dog, cat",)),)
    assert back.meta["present"] == ("dog", "cat")


def test_all_answers_of_a_question_that_looks_made_come_back():
    asked = Asked("How many dogs are there?", ("2", "3", "2"))
    example = builder_of("answer").build(replace(RECORD, questions=(asked,)), np.random.default_rng(0), LABELS)
    assert read_example(example, (100, 200)).questions == (asked,)


def test_a_thing_that_is_no_class_is_no_zero():
    assert said("count", thing="cat") == ("answer en How many cat?", "2")
    with pytest.raises(DataError, match=r"thing='cats' is none of the 6 classes.*Did you mean 'cat'"):
        said("count", thing="cats")


def test_presence_is_asked_evenly_and_answered_truly():
    answers = Counter()
    for seed in range(600):
        prefix, answer = said("presence", seed=seed)
        thing = prefix.removeprefix("answer en Is ").removesuffix(" in the image?")
        assert thing in LABELS
        assert answer == ("yes" if thing in ("dog", "cat", "sofa", "crowd") else "no")
        answers[answer] += 1
    assert 240 < answers["yes"] < 360
    assert {said("presence", seed=seed, p_yes=0.0)[1] for seed in range(20)} == {"no"}


def test_where_only_one_answer_is_possible_it_is_asked_for():
    assert {said("presence", BARE, seed)[1] for seed in range(20)} == {"no"}
    assert {said("presence", seed=seed, labels=("cat",))[1] for seed in range(20)} == {"yes"}
    assert said("presence", labels=(), p_yes=1.0)[1] == "yes"
    assert said("presence", BARE, labels=(), p_yes=1.0) is None


def test_absent_things_need_the_class_names_of_the_data_set():
    for name in ("presence", "multi_presence"):
        with pytest.raises(DataError, match=r"^row 3: what is not there is drawn from the class names"):
            said(name, labels=())


def test_several_are_answered_in_asked_order_or_by_none():
    answers, n_present = Counter(), Counter()
    for seed in range(300):
        prefix, answer = said("multi_presence", seed=seed)
        things = prefix.removeprefix("answer en Which of ").removesuffix(" are in the image?").split(", ")
        present = [thing for thing in things if thing in ("dog", "cat", "sofa", "crowd")]
        assert len(things) == len(set(things)) == 3
        assert answer == (", ".join(present) or "none")
        answers[answer] += 1
        n_present[len(present)] += 1
        back = BUILDERS["multi_presence"].read(Example((), prefix, answer), (9, 9))
        assert back.meta["present"] == tuple(present)
        assert set(back.meta["present"] + back.meta["absent"]) == set(things)
    assert set(n_present) == {1, 2, 3}  # two things are absent, so one at least is there
    assert said("multi_presence", BARE, n_things=2)[1] == "none"
    assert len(said("multi_presence", n_things=99)[0].split(", ")) == len(LABELS)


def test_things_are_counted_and_absent_ones_are_none():
    seen = set()
    for seed in range(200):
        prefix, answer = said("count", seed=seed)
        seen.add((prefix, answer))
    assert seen == {
        ("answer en How many dog?", "1"),
        ("answer en How many cat?", "2"),
        ("answer en How many sofa?", "1"),
        ("answer en How many car?", "0"),
        ("answer en How many bus?", "0"),
    }
    assert said("count", thing="cat", p_absent=0) == ("answer en How many cat?", "2")
    assert {said("count", seed=seed, labels=())[1] for seed in range(50)} == {"1", "2"}
    back = read_example(Example((), "answer en How many red car?", "12"), (9, 9))
    assert back.meta["count"] == {"red car": 12}


def test_a_region_of_many_cannot_be_counted():
    assert said("count", thing="crowd") is None
    only = replace(RECORD, instances=(*RECORD.instances[4:], Instance("crowd", (0, 0, 9, 9))))
    assert said("count", only, labels=()) is None


def test_labels_that_would_read_as_two_or_as_none_are_refused():
    comma = replace(RECORD, instances=(Instance("cup, blue", (0, 0, 9, 9)),))
    for name in ("list_objects", "multi_presence"):
        with pytest.raises(DataError, match=r"^row 3: the label 'cup, blue' holds ','"):
            said(name, comma, labels=("cup, blue",))
    none = replace(RECORD, instances=(Instance("none", (0, 0, 9, 9)),))
    with pytest.raises(DataError, match="a label is 'none', the answer for nothing"):
        said("multi_presence", none, labels=("none",))
    with pytest.raises(DataError, match=r"^row 3: label 'a;b' holds ';'"):
        said("count", replace(RECORD, instances=(Instance("a;b", (0, 0, 9, 9)),)), labels=())


def test_questions_of_other_data_sets_are_read_without_guessing():
    back = read_example(Example((), "answer en How many people are there?", "a few"), (9, 9))
    assert back.questions == (Asked("How many people are there?", ("a few",)),)
    assert "count" not in back.meta
    assert "present" not in read_example(Example((), "answer en Is it in the image?", "maybe"), (9, 9)).meta


def test_other_wordings_are_fields():
    worded = {"question": "wie viele {thing} sind da?", "lang": "de", "thing": "cat"}
    assert said("count", **worded) == ("answer de wie viele cat sind da?", "2")
    builder = builder_of("count", **worded)
    assert builder.read(Example((), "answer de wie viele cat sind da?", "2"), (9, 9)).meta["count"] == {"cat": 2}
    with pytest.raises(DataError, match="the prompt 'answer en How many cat' is none of 'count'"):
        builder.read(Example((), "answer en How many cat", "2"), (9, 9))
