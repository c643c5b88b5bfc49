"""Scores of answers by the evaluators of the reference, case by case and over all of them."""

import json

import pytest

from paligemma.metrics.answers import (
    anls,
    as_digits,
    letter_of,
    normalised,
    relaxed_match,
    soft_accuracy,
    vqa_accuracy,
)
from paligemma.recipes.transfers import score
from tests.golden_model import DATA

NEAR = 1e-9


def stated(name):
    return json.loads((DATA / "metrics" / f"{name}.json").read_text())


def cased(text, lower):
    return text.lower() if lower else text


@pytest.mark.parametrize("lower", [False, True])
def test_soft_accuracy_and_anls(lower):
    found = stated("vqa")
    several = [case for case in found["several_answers"] if case["answers"]]
    for case in several + [{**case, "answers": [case["answer"]]} for case in found["single_answer"]]:
        said, true = cased(case["prediction"], lower), [cased(text, lower) for text in case["answers"]]
        scores = case[f"scores_to_lower_{lower}"]
        assert anls(said, true) == pytest.approx(scores["anls"], abs=NEAR), case
        assert float(said in true) == scores["acc_any"]
        row = {"question": "q", **({"answer": true[0]} if "answer" in case else {"answers": true})}
        assert score("okvqa", [said], [row])["VQA accuracy"] == pytest.approx(scores["acc"], abs=NEAR), case
        if "answer" not in case:
            assert soft_accuracy(said, true) == pytest.approx(scores["acc"], abs=NEAR), case
    rows = [{"question": "q", "answers": [cased(text, lower) for text in case["answers"]]} for case in several]
    said = [cased(case["prediction"], lower) for case in several]
    of_all = found["several_answers_aggregate"][f"to_lower_{lower}"]
    assert score("okvqa", said, rows)["VQA accuracy"] == pytest.approx(of_all["acc"], abs=NEAR)
    assert score("okvqa", said, rows)["exact match with any"] == pytest.approx(of_all["acc_any"], abs=NEAR)
    if lower:
        assert score("docvqa", said, rows)["ANLS"] == pytest.approx(of_all["anls"], abs=NEAR)


def test_vqav2_case_by_case_and_by_type():
    found = stated("vqav2")
    for case in found["text_normalisation"]:
        assert normalised(case["stripped"]) == case["processed"], case
    for case in found["cases"]:
        assert vqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["scores"]["acc"], abs=NEAR), case
    rows = [{"question": "q", **case} for case in found["cases"]]
    scores = score("vqav2", [case["prediction"] for case in found["cases"]], rows)
    for name, ours in (("acc", "VQAv2 accuracy"), *((f"acc/{t}", f"VQAv2 accuracy, {n}") for t, n in TYPES.items())):
        assert scores[ours] == pytest.approx(found["aggregate"][name], abs=NEAR)


TYPES = {"yesno": "yes/no", "number": "number", "other": "other"}


@pytest.mark.parametrize("lower", [False, True])
def test_relaxed_accuracy(lower):
    found = stated("chartqa")
    for case in found["cases"]:
        said, true = (cased(case[name], lower) for name in ("prediction", "answer"))
        assert relaxed_match(said, true) == case[f"scores_to_lower_{lower}"]["relaxed_acc"], case
    if lower:
        rows = [{"question": "q", "answer": case["answer"]} for case in found["cases"]]
        scores = score("chartqa", [case["prediction"] for case in found["cases"]], rows)
        of_all = found["aggregate"]["to_lower_True"]
        assert scores["relaxed accuracy"] == pytest.approx(of_all["relaxed_acc"], abs=NEAR)
        assert scores["exact match"] == pytest.approx(of_all["acc"], abs=NEAR)
        told_apart = [{**row, "source": "human" if i % 3 else "augmented"} for i, row in enumerate(rows)]
        scores = score("chartqa", [case["prediction"] for case in found["cases"]], told_apart)
        apart = [scores["relaxed accuracy, human"], scores["relaxed accuracy, augmented"]]
        assert apart[0] != apart[1]
        assert scores["relaxed accuracy"] == sum(apart) / 2
        files = [{**row, "source": f"page {i % 3}"} for i, row in enumerate(rows)]  # somebody's own column
        scores = score("chartqa", [case["prediction"] for case in found["cases"]], files)
        assert scores["relaxed accuracy"] == pytest.approx(of_all["relaxed_acc"], abs=NEAR)


def test_counts():
    found = stated("tallyqa")
    for case in found["cases"]:
        assert (as_digits(case["prediction"]) == as_digits(case["answer"])) == case["scores"]["acc"], case
    rows = [{"question": "q", **case} for case in found["cases"]]
    scores = score("tallyqa", [case["prediction"] for case in found["cases"]], rows)
    names = {"accuracy": "acc", "accuracy, simple": "acc/simple", "accuracy, complex": "acc/complex"}
    counted = {f"accuracy, answer {n}": f"acc/count_{n}" for n in range(16) if f"acc/count_{n}" in found["aggregate"]}
    for ours, name in (names | counted).items():
        assert scores[ours] == pytest.approx(found["aggregate"][name], abs=NEAR)
    assert set(scores) == {*names, *counted, "exact match"}


def test_letters():
    found = stated("science_qa")
    for case in found["cases"]:
        for name in ("prediction", "answer"):
            assert (letter_of(case[name]) or "failed") == case[f"parsed_{name}"], case
    choices = {"question": "q", "hint": "", "choices": [str(n) for n in range(26)]}
    for number, letter in ((0, "A"), (2, "C"), (25, "Z")):
        cases = [case for case in found["cases"] if case["answer"] == f"The answer is {letter}."]
        rows = [{**choices, "answer": number}] * len(cases)
        scores = score("science_qa", [case["prediction"] for case in cases], rows)
        for ours, name in (("accuracy", "acc"), ("without a letter", "parsefail")):
            expected = sum(case["scores"][name] for case in cases) / len(cases)
            assert scores[ours] == pytest.approx(expected, abs=NEAR), letter


def test_kinds_of_questions_count_alike():
    found = stated("rsvqa")
    rows = [{"question": "q", "answer": case["answers"][0], **case} for case in found["cases"]]
    said = [case["prediction"].lower() for case in found["cases"]]
    scores, of_all = score("rsvqa_hr", said, rows), found["aggregate"]["to_lower_True"]
    assert scores["mean of kinds"] == pytest.approx(of_all["acc_avg"], abs=NEAR)
    assert scores["mean of kinds, without numbers"] == pytest.approx(of_all["acc_avg_nonum"], abs=NEAR)
    assert scores["exact match"] == pytest.approx(of_all["acc_any"], abs=NEAR)
    three = [of_all[f"acc_{kind}"] for kind in ("comp", "presence", "rural_urban")]
    assert score("rsvqa_lr", said, rows)["mean of kinds, without numbers"] == pytest.approx(sum(three) / 3, abs=NEAR)
    assert score("rsvqa_lr", said, [{"question": "q", "answer": r["answer"]} for r in rows]).keys() == {"exact match"}
    assert scores["accuracy, rural_urban"] == pytest.approx(of_all["acc_rural_urban"], abs=NEAR)


def test_yes_and_no():
    found = stated("pope")
    cases = [case for case in found["cases"] if case["answer"] in ("yes", "no")]
    scores = score(
        "pope", [c["prediction"] for c in cases], [{"question": "q", "answer": case["answer"]} for case in cases]
    )
    assert scores["accuracy"] == pytest.approx(sum(c["scores"]["acc"] for c in cases) / len(cases), abs=NEAR)
    assert scores["valid"] == pytest.approx(sum(c["scores"]["valid_percent"] for c in cases) / len(cases), abs=NEAR)


def test_a_row_without_true_answers_is_refused():
    with pytest.raises(ValueError, match="no true answer"):
        anls("a", [])
    with pytest.raises(ValueError, match="no true answer"):
        vqa_accuracy("a", [])
    assert [vqa_accuracy(said, ["a\tcat "]) for said in ("a cat", "cat")] == [1, 0]  # one person: as it stands
