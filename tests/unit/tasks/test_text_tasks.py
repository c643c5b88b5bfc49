"""Captions, answers, questions: prompts as the models were trained on, answers as plain text."""

import math

import pytest

from paligemma.errors import OptionError, TaskError
from paligemma.results import Answer, Caption
from paligemma.tasks import TASKS
from paligemma.tasks.base import SpanScores


def test_the_table_names_every_task_by_its_own_name() -> None:
    assert list(TASKS) == ["caption", "answer", "detect", "segment", "read", "grounded_caption", "question"]
    assert all(task.name == name for name, task in TASKS.items())


def test_prompts_are_those_of_the_training_mixture() -> None:
    assert TASKS["caption"].prefix() == "caption en"
    assert TASKS["caption"].prefix("zh", style="describe") == "describe zh"
    assert TASKS["answer"].prefix("what is this?") == "answer en what is this?"
    assert TASKS["question"].prefix("on the sofa", "fil") == "question fil on the sofa"
    assert TASKS["read"].prefix() == "ocr"
    assert TASKS["detect"].prefix("cat") == "detect cat"
    assert TASKS["detect"].prefix(["cat", "red car"]) == "detect cat ; red car"
    assert TASKS["segment"].prefix(("cat", "Straßenbahn")) == "segment cat ; Straßenbahn"


def test_a_region_is_named_by_location_tokens_top_left_bottom_right() -> None:
    prefix = TASKS["grounded_caption"].prefix((10, 20, 50, 80), (100, 200))
    assert prefix == "caption <loc0205><loc0051><loc0818><loc0256>"


def test_text_is_read_without_outer_white_space_and_kept_raw() -> None:
    pieces = [(" a", -0.5), (" cat\n", -0.25), ("", -0.125)]  # the last one is the end of the sequence
    assert TASKS["caption"].parse(" a cat\n", token_logprobs=pieces) == Caption("a cat", -0.875, raw=" a cat\n")
    assert TASKS["answer"].parse("2") == Answer("2", 0.0, raw="2")
    assert TASKS["grounded_caption"].parse("").text == ""


def test_suffixes_are_the_texts_of_results_or_texts_themselves() -> None:
    assert TASKS["caption"].suffix(Caption("a cat", 0.0)) == "a cat"
    assert TASKS["answer"].suffix("zwei") == "zwei"
    assert TASKS["question"].suffix(Answer("why?", 0.0)) == "why?"
    assert TASKS["read"].suffix("") == ""


@pytest.mark.parametrize("lang", ["", "e n", " en", None])
def test_a_language_is_one_word(lang: str) -> None:
    with pytest.raises(TaskError, match="expected one language code"):
        TASKS["caption"].prefix(lang)


def test_a_misspelt_style_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(OptionError, match="Did you mean 'describe'"):
        TASKS["caption"].prefix(style="descibe")


def test_nothing_to_say_is_refused() -> None:
    with pytest.raises(TaskError, match="question is '  '"):
        TASKS["answer"].prefix("  ")
    with pytest.raises(TaskError, match="caption is ''"):
        TASKS["caption"].suffix("")


def test_scores_take_the_tokens_that_share_a_character_with_the_stretch() -> None:
    scores = SpanScores("a cat ; b", [("a", -1.0), (" c", -2.0), ("at", -4.0), (" ;", -8.0), (" b", -16.0)])
    assert scores.geometric_mean(2, 5) == pytest.approx(math.exp(-3.0))
    assert scores.geometric_mean(0, 1) == pytest.approx(math.exp(-1.0))
    assert scores.geometric_mean(8, 9) == pytest.approx(math.exp(-16.0))
    assert scores.total == -31.0


def test_a_character_spelled_in_bytes_counts_all_its_bytes() -> None:
    text = "x 猫 y"
    pieces = [("x ", -1.0), ("", -2.0), ("", -3.0), ("猫", -4.0), (" y", -5.0), ("", -6.0)]
    scores = SpanScores(text, pieces)
    assert scores.geometric_mean(2, 3) == pytest.approx(math.exp(-3.0))
    assert scores.geometric_mean(4, 5) == pytest.approx(math.exp(-5.0))


def test_pieces_of_another_text_are_refused() -> None:
    with pytest.raises(OptionError, match="expected pieces that join"):
        TASKS["detect"].parse("cat", token_logprobs=[("dog", 0.0)])
