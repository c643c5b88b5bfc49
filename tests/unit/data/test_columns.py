"""Rows of tables with names of their own become examples; what does not fit is named."""

import io

import numpy as np
import pytest
from PIL import Image

from paligemma.data.sources.columns import Columns, encoded, kind_of
from paligemma.errors import DataError, OptionError
from paligemma.processing.image import load_image

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def png(picture: Image.Image = PICTURE) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


ROW = {"img": png(), "question": "what?", "answers": ["a cat", "cat"], "n": 3, "qa": {"q": "why?"}, "id": 7}


def test_a_template_is_filled_from_columns_and_what_is_left_is_kept():
    columns = Columns(image="img", prefix="answer en {question}", suffix="{answers[0]} {n:02d}", weight="n")
    example = columns.example(ROW, "row 1")
    assert (example.images, example.prefix, example.suffix) == ((ROW["img"],), "answer en what?", "a cat 03")
    assert (example.weight, example.meta, example.where) == (3.0, {"qa": {"q": "why?"}, "id": 7}, "row 1")


def test_a_text_may_be_the_same_in_every_row():
    example = Columns(image=None, prefix="=caption {en}", suffix="{qa[q]}").example(ROW, "row 1")
    assert (example.images, example.prefix, example.suffix) == ((), "caption {en}", "why?")


@pytest.mark.parametrize("cell", [PICTURE, png(), {"bytes": png(), "path": "a.png"}, np.asarray(PICTURE)])
def test_every_form_of_a_picture_is_the_same_picture(cell):
    columns = Columns()
    (picture,) = columns.example({"image": cell, "prefix": "", "suffix": ""}, "row 1").images
    assert np.array_equal(load_image(picture), np.asarray(PICTURE))
    assert len(columns.example({"image": [cell, cell], "prefix": "", "suffix": ""}, "row 1").images) == 2


def test_names_are_looked_up_in_their_folder():
    row = {"image": ["a.png", {"bytes": None, "path": "b.png"}], "prefix": "", "suffix": ""}
    assert Columns().example(row, "row 1", lambda name, where: (name, where)).images == (
        ("a.png", "row 1"),
        ("b.png", "row 1"),
    )
    with pytest.raises(DataError, match=r"the picture is the name 'a\.png'.*images="):
        Columns().example(row, "row 1")


def test_a_table_in_our_own_layout_reads_like_jsonl():
    row = {"images": None, "image": None, "prefix": "p", "suffix": "s", "weight": 2, "meta": '{"id": 7}',
           "unlearned": [[0, 1]]}  # fmt: skip
    example = Columns().example(row, "row 1")
    assert (example.images, example.weight, example.meta, example.unlearned) == ((), 2.0, {"id": 7}, ((0, 1),))
    foreign = Columns(image=None, prefix="prefix", suffix="text").example({**row, "text": "t"}, "row 1")
    assert (foreign.weight, foreign.unlearned) == (1.0, ())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(image="imgs"), "row 1: no column 'imgs': there are img, question, .*Did you mean 'img'"),
        (Columns(image="img", prefix="{quesion}"), "no column 'quesion'.*Did you mean 'question'"),
        (Columns(image="img", prefix="question", suffix="n"), r"'n' is a int: expected text.*'\{n\}'"),
        (Columns(image="img", prefix="question", suffix="{answers}"), r"a list of 2: expected text or a number.*\[0\]"),
        (Columns(image="img", prefix="question", suffix="{answers[9]}"), r"no answers\[9\]"),
        (Columns(image="img", prefix="{question:d}", suffix="question"), "'question' is 'what\\?'.*format 'd'"),
        (Columns(image="n", prefix="question", suffix="question"), "the picture is a int"),
        (Columns(image=None, prefix="question", suffix="question", weight="question"), "'weight' is 'what\\?'"),
    ],
)
def test_what_does_not_fit_is_named(columns, message):
    with pytest.raises(DataError, match=message):
        columns.example(ROW, "row 1")


def test_an_empty_cell_is_no_text():
    with pytest.raises(DataError, match=r"'suffix' is empty \(null\)"):
        Columns(image=None).example({"prefix": "a", "suffix": None}, "row 1")


def test_a_table_is_checked_before_any_row_is_read():
    Columns().check(["images", "prefix", "suffix"], "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'suffix'.*Did you mean 'sufix'"):
        Columns().check(["image", "prefix", "sufix"], "a.parquet")


@pytest.mark.parametrize("template", ["{question", "{}", "{a.b[}", "a } b {c}"])
def test_a_template_that_cannot_be_read_is_refused(template):
    with pytest.raises(OptionError, match="the template"):
        Columns(prefix=template)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_pixels_are_written_without_loss(mode):
    picture = PICTURE.convert(mode)
    data, name = encoded(picture, "row 1")
    assert (kind_of(data), name) == ("png", None)
    assert np.array_equal(load_image(data), load_image(picture))


def test_files_are_written_as_they_are(tmp_path):
    PICTURE.save(tmp_path / "a.jpg")
    data, name = encoded(tmp_path / "a.jpg", "row 1")
    assert (data, name, kind_of(data)) == ((tmp_path / "a.jpg").read_bytes(), "a.jpg", "jpg")
    with pytest.raises(DataError, match=r"row 1: .*gone\.jpg"):
        encoded(tmp_path / "gone.jpg", "row 1")
    assert kind_of(b"text") == ""
