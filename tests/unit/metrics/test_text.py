"""Agreement of texts and facts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma.errors import ShapeError
from paligemma.metrics.text import edits, exact_match, plain, set_score, word_accuracy

texts = st.lists(st.sampled_from("abc"), max_size=6).map(" ".join)


def test_case_width_and_spaces_do_not_count_unless_literal() -> None:
    assert plain("  Ｔwo\tCATS ") == "two cats"
    assert exact_match(["Two ", "3"], ["two", "4"]) == 0.5
    assert exact_match(["Two"], ["two"], literal=True) == 0.0


def test_word_accuracy_is_one_minus_the_word_error_rate_of_all_texts_together() -> None:
    assert word_accuracy(["stop here", "a b c d"], ["stop there", "a b c d"]) == pytest.approx(1 - 1 / 6)
    assert word_accuracy(["here stop"], ["stop here"]) == 0.0
    assert word_accuracy(["far too many words"], ["stop"]) == 0.0
    assert word_accuracy(["Stop"], ["stop"]) == 0.0


@given(texts, texts, texts)
def test_edits_are_a_distance(a: str, b: str, c: str) -> None:
    ab, ba, bc, ac = (edits(x.split(), y.split()) for x, y in ((a, b), (b, a), (b, c), (a, c)))
    assert ab == ba
    assert (ab == 0) == (a == b)
    assert ac <= ab + bc
    assert abs(len(a.split()) - len(b.split())) <= ab <= max(len(a.split()), len(b.split()))


def test_facts_are_pooled_over_examples() -> None:
    score = set_score([{"red star", "blue star"}, set()], [{"red star"}, {"green dot", "red dot", "red star"}])
    assert (score.precision, score.recall, score.n_predicted, score.n_references) == (0.5, 0.25, 2, 4)
    assert score.f1 == pytest.approx(1 / 3)
    assert set_score([{1}], [{2}]).f1 == 0.0


def test_nothing_to_compare_is_nan_and_unlike_lengths_are_refused() -> None:
    assert math.isnan(exact_match([], []))
    assert math.isnan(word_accuracy([""], [""]))
    assert math.isnan(set_score([set()], [{1}]).precision)
    with pytest.raises(ShapeError, match="1 predictions, 0 references"):
        exact_match(["a"], [])
