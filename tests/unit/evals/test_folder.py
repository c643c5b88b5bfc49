"""Scores of rows: any of several right answers is right, and captions are compared with all of a row's references."""

import dataclasses

import pytest

import paligemma
from paligemma.data.builders import builder_of
from paligemma.data.example import Example
from paligemma.data.record import Asked, Record, Text
from paligemma.data.world import render, sample_scene
from paligemma.evals.folder import evaluate_folder

PICTURE = render(sample_scene(5, "plain")).image


@pytest.fixture(scope="module")
def tiny() -> paligemma.PaliGemma:
    return paligemma.load("tiny", device="cpu")


def record(**fields) -> Record:
    return Record((PICTURE,), PICTURE.shape[:2], where="a.png", **fields)


def built(name: str, made_of: Record, **fields) -> Example:
    import numpy as np

    return builder_of(name, **fields).build(made_of, np.random.default_rng(0))


def scores(tiny, *rows: Example) -> dict[str, float]:
    (found,) = evaluate_folder(tiny, list(rows), progress=False).scores.values()
    return found


def test_any_of_several_answers_is_right(tiny):
    question = "is there a circle?"
    said = tiny.answer(PICTURE, question).text
    row = built(
        "answer",
        record(questions=(Asked(question, ("nonsense", f" {said.upper()} ", "more nonsense")),)),
        choice="first",
    )
    assert row.suffix == "nonsense"
    assert scores(tiny, row)["exact match"] == 1.0
    alone = built("answer", record(questions=(Asked(question, ("nonsense",)),)))
    assert alone.references == ("nonsense",)
    assert scores(tiny, alone)["exact match"] == 0.0


def test_a_caption_is_compared_with_every_reference_of_its_row(tiny):
    said = tiny.caption(PICTURE).text
    other = "nothing of the kind is here at all"
    texts = (Text(other), Text(said), Text("etwas anderes", "de"), Text(said, style="describe"))
    row = built("caption", record(texts=texts), choice="first", lang="en")
    assert (row.suffix, row.references) == (other, (other, said))
    together = scores(tiny, row)
    apart = scores(tiny, *(dataclasses.replace(row, suffix=text, meta={}) for text in row.references))
    assert together == apart
    assert together["exact match"] == 1.0
    assert scores(tiny, row, row) == together


def test_other_columns_of_that_name_are_no_references():
    assert Example((), "a", "b", meta={"references": [1, 2]}).references == ("b",)
    assert Example((), "a", "b", meta={"references": "b and c"}).references == ("b",)
    assert Example((), "a", "b", meta={"references": []}).references == ("b",)
