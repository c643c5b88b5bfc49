"""What a command line says before any model is loaded: verbs, options, and which words are pictures."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from paligemma.cli.args import parse_box, parse_choices, with_dashes
from paligemma.cli.detect import split_labels
from paligemma.cli.main import VERBS, main
from paligemma.cli.pictures import find_pictures, split_words
from paligemma.errors import OptionError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures, one text and one folder, as the current directory."""
    for name in ("b.png", "a.jpg", "deep/c.webp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(path)
    (tmp_path / "notes.txt").write_text("not a picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_and_typing_errors_need_no_torch():
    code = (
        "import sys; from paligemma.cli.main import main; main(['--help']); main(['detct']); "
        "main(['detect', '--help']); main(['detect', '--lable', 'cat']); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def test_a_typing_error_is_answered_in_one_line_with_the_nearest_name(capsys: pytest.CaptureFixture[str]):
    assert main(["detct", "a.png"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["detect", "--lable", "cat"]) == 2
    err = capsys.readouterr().err
    assert "'--lable'" in err
    assert "--label" in err
    assert err.count("\n") == 1
    assert main(["caption", "--batch-size", "many"]) == 2
    assert "batch-size" in capsys.readouterr().err


def test_an_option_before_the_verb_is_told_where_to_go(capsys: pytest.CaptureFixture[str]):
    assert main(["--json", "caption"]) == 2
    assert "Put the verb first" in capsys.readouterr().err


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]):
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        page = capsys.readouterr().out
        assert f"paligemma {verb}" in page
        assert "--debug" in page or verb in ("checkpoint", "data")  # whose actions have options of their own


def test_dashes_and_underscores_are_both_accepted_in_names_and_left_alone_in_values():
    assert with_dashes(["--max_new_tokens=8", "--mask_vae", "my_file.npz", "--set", "final_cap=none"]) == [
        "--max-new-tokens=8", "--mask-vae", "my_file.npz", "--set", "final_cap=none",
    ]  # fmt: skip
    assert with_dashes(["--label", "--", "--my_cat"]) == ["--label", "--", "--my_cat"]


def test_words_that_name_pictures_are_told_from_labels_and_questions(folder: Path):
    words = ["a.jpg", "red circle", "*.png", "deep", "star", "-", "no-such.png", "what is this?", "is it *that* one?"]
    assert split_words(words) == (
        ["a.jpg", "*.png", "deep", "-", "no-such.png"],
        ["red circle", "star", "what is this?", "is it *that* one?"],
    )
    assert split_words(["x" * 5000])[1] == ["x" * 5000]


def test_folders_and_globs_hold_their_pictures_in_order_and_nothing_else(folder: Path):
    assert [p.name for p in find_pictures(["."])] == ["a.jpg", "b.png"]
    assert [p.name for p in find_pictures(["**/*"])] == ["a.jpg", "b.png", "deep/c.webp"]
    assert [p.name for p in find_pictures(["b.png", "a.jpg"])] == ["b.png", "a.jpg"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("missing.png", "no such picture: 'missing.png'"),
        ("*.gif", r"no file matches '\*.gif'"),
        ("empty", "folder 'empty' holds no pictures"),
        ("https://example.org/cat.png", "is a web address"),
    ],
)
def test_a_word_without_a_picture_behind_it_is_refused(folder: Path, word: str, expected: str):
    (folder / "empty").mkdir()
    with pytest.raises(OptionError, match=expected):
        find_pictures([word])


def test_a_picture_can_come_through_stdin_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((folder / "b.png").read_bytes())))
    assert find_pictures(["-"])[0].source == (folder / "b.png").read_bytes()
    with pytest.raises(OptionError, match="given twice"):
        find_pictures(["-", "-"])


def test_labels_are_split_as_the_prompt_writes_them():
    assert split_labels("cat ; red car;dog ; ") == ["cat", "red car", "dog"]


def test_choices_and_boxes_are_read_as_values():
    given = parse_choices(
        ["sliding_window=none", "resize=bv_bilinear", "exif-orientation=false", "final_logits_softcap=30"]
    )
    assert given == {
        "sliding_window": None,
        "resize": "bv_bilinear",
        "exif_orientation": False,
        "final_logits_softcap": 30,
    }
    with pytest.raises(OptionError, match="expected NAME=VALUE"):
        parse_choices(["resize"])
    assert parse_box("10,20, 110,220.5") == (10, 20, 110, 220.5)
    with pytest.raises(OptionError, match="expected four numbers"):
        parse_box("1,2,3")


def test_doctor_reports_versions_devices_and_licences(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--json"]) == 0
    import json

    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"]
    assert report["devices"]["auto means"]
    assert "Gemma Terms" in " ".join(report["licences"].values())
