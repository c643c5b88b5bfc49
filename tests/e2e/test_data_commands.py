"""`paligemma data`: drawn worlds in every format, there and back, looked at and checked."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from paligemma.cli.main import main
from paligemma.data.order import Draw
from paligemma.data.rows import open_rows
from paligemma.data.sources.open import open_data
from paligemma.recipes import stages
from paligemma.recipes.start import config_of, open_base
from paligemma.recipes.transfer import as_learned, loader_of, rows_of
from paligemma.recipes.tree import changed

FORMATS = ("jsonl", "coco", "coco_official", "yolo", "voc", "parquet", "wds", "hf")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "coco"
    assert main(["data", "generate", str(folder), "--to", "coco", "--n", "5", "--valid", "2"]) == 0
    return folder


def boxes(folder: Path) -> list[list[tuple[str, list[int]]]]:
    """Labels and boxes of every training picture, to a pixel, in any order."""
    records = open_data(folder)["train"]
    return sorted(
        sorted((item.label, [round(side) for side in item.box_xyxy_px]) for item in records[i].instances)
        for i in range(len(records))
    )


def test_a_split_that_cannot_be_opened_does_not_hide_what_the_others_hold(tmp_path, coco, capsys):
    (folder := tmp_path / "coco").mkdir()
    for split in ("train", "valid"):
        shutil.copytree(coco / split, folder / split)
    (folder / "test").mkdir()
    (folder / "test" / "_annotations.coco.json").write_bytes(b'{"images": [], "annotations": [], "caf\xe9": []}')
    assert main(["data", "check", str(folder), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == {"test": 0, "train": 5, "valid": 2}
    errors = [(one["kind"], one["count"]) for one in told["findings"] if one["level"] == "error"]
    assert errors == [("not UTF-8", 1)]
    assert main(["data", "check", str(folder)]) == 2
    told = capsys.readouterr().out
    assert "test: 0 rows, 0 pictures" in told
    assert "not UTF-8 × 1" in told
    assert main(["data", "check", str(folder), "--json", "--split", "train"]) == 0
    capsys.readouterr()
    assert main(["train", "transfer", "--data", str(folder), "--task", "detect", "--out", str(tmp_path / "run")]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_a_parquet_file_that_is_cut_costs_its_rows_alone(tmp_path, capsys):
    folder = tmp_path / "rows"
    assert main(["data", "generate", str(folder), "--to", "parquet", "--n", "4", "--valid", "0"]) == 0
    whole = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").rename(folder / "train-00000.parquet")
    (folder / "train-00001.parquet").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert main(["data", "check", str(folder), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == {"train": 4}
    assert [(one["kind"], one["count"]) for one in told["findings"]] == [("cut archive", 1)]
    words = ["eval", str(folder), "--split", "train", "--limit", "1", "--json"]
    assert main(words) == 2, "a score of half the rows is none"
    assert "cut off" in capsys.readouterr().err
    assert main([*words, "--skip-broken"]) == 0
    assert "passed over" in capsys.readouterr().err


def test_half_a_character_is_told_whatever_the_terminal(tmp_path):
    """What is wrong with a name must not break the line that says so."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": f"{name}.png", "prefix": "p", "suffix": "s"} for name in ("b\ud800", "ö😀")]
    rows += [{"image": "a.png", "prefix": "p", "suffix": "s", "id": "\ud83d"}] * 2
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for encoding in ("utf-8:strict", "ascii", "latin-1"):
        for more in ([], ["--json"]):
            done = subprocess.run(
                [sys.executable, "-m", "paligemma", "data", "check", str(tmp_path), *more],
                capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, check=False,
            )  # fmt: skip
            assert done.returncode == 2, done.stderr
            assert b"\\ud800" in done.stdout
        found = json.loads(done.stdout.decode(encoding.partition(":")[0]))["findings"]
        assert {one["kind"] for one in found} >= {"missing picture", "duplicate id"}
        assert any("ö😀" in example["message"] for one in found for example in one["examples"])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_drawn_found_and_clean(name, tmp_path, capsys):
    folder = tmp_path / name
    assert main(["data", "generate", str(folder), "--to", name, "--n", "3", "--valid", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {split: counts["rows"] for split, counts in told["splits"].items()} == {"train": 3, "valid": 2}
    assert main(["data", "check", str(folder), "--json", "--model", "tiny"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == {"train": 3, "valid": 2}
    assert report["errors"] == 0


@pytest.mark.parametrize("between", ["yolo", "voc", "coco_official"])
def test_annotations_come_back_through_every_other_format(between, coco, tmp_path):
    assert main(["data", "convert", str(coco), str(tmp_path / "there"), "--to", between]) == 0
    assert main(["data", "convert", str(tmp_path / "there"), str(tmp_path / "back"), "--to", "coco"]) == 0
    assert boxes(tmp_path / "back") == boxes(coco)


@pytest.mark.parametrize("packed", ["jsonl", "parquet", "wds", "hf"])
def test_prompts_come_back_through_files_tables_and_tars(packed, coco, tmp_path):
    words = [
        "data",
        "convert",
        str(coco),
        str(tmp_path / "rows"),
        "--to",
        packed,
        "--task",
        "segment",
        "--model",
        "tiny",
    ]
    assert main([*words, "--task-field", "order=raster"]) == 0
    found = open_rows(tmp_path / "rows")["train"]
    assert len(found) == 5
    assert all(found[i].prefix.startswith("segment ") and "<seg" in found[i].suffix for i in range(5))
    assert (
        main(["data", "convert", str(tmp_path / "rows"), str(tmp_path / "back"), "--to", "coco", "--model", "tiny"])
        == 0
    )
    back, there = boxes(tmp_path / "back"), boxes(coco)
    for ours, theirs in zip(back, there, strict=True):
        assert [label for label, _ in ours] == [label for label, _ in theirs]
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            assert all(abs(x - y) <= 1 for x, y in zip(a, b, strict=True))
    records = open_data(tmp_path / "back")["train"]
    assert all(item.mask is not None for item in records[0].instances)  # read back with the codes of `tiny`


def test_masks_are_read_with_the_codes_of_the_model_that_is_named(coco, tmp_path, capsys):
    words = [
        "data",
        "convert",
        str(coco),
        str(tmp_path / "rows"),
        "--to",
        "jsonl",
        "--task",
        "segment",
        "--model",
        "tiny",
    ]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["data", "convert", str(tmp_path / "rows"), str(tmp_path / "back"), "--to", "coco"]) == 0
    told = capsys.readouterr()
    assert "masks left out" in told.out
    assert "--model says whose codes" in told.err
    records = open_data(tmp_path / "back")["train"]
    assert all(item.mask is None for i in range(len(records)) for item in records[i].instances)


def test_a_page_shows_rows_and_their_passes(coco, tmp_path, capsys):
    out = tmp_path / "page.html"
    words = ["data", "preview", str(coco), "--task", "detect", "--out", str(out), "--n", "2", "--split", "train"]
    assert main([*words, "--passes", "3", "--augment", "flip=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    assert out.read_text().count("<article>") == 6


def test_a_page_counts_pictures_that_cannot_be_decoded_and_survives_half_a_character(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff no picture")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    rows = [{"image": "a.jpg", "prefix": "p", "suffix": "s"}, {"image": "b.png", "prefix": "p", "suffix": "\ud83d"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "preview", str(tmp_path), "--out", str(tmp_path / "p.html"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["broken"] >= 1
    assert (tmp_path / "p.html").read_text().count('class="broken"') >= 1


def test_templates_of_columns_are_taken_as_they_are_written(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "rows").mkdir()
    example = {
        "image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"},
        "question": "what?",
        "answer": "x",
    }
    table = pa.Table.from_pylist([example])
    pq.write_table(table, tmp_path / "rows" / "train.parquet")
    words = ["--column", "prefix=answer en {question}", "--column", "suffix={answer}"]
    assert main(["data", "convert", str(tmp_path / "rows"), str(tmp_path / "out"), "--to", "jsonl", *words]) == 0
    (row,) = (json.loads(line) for line in next((tmp_path / "out").glob("*.jsonl")).read_text().splitlines())
    assert (row["prefix"], row["suffix"]) == ("answer en what?", "x")


def test_check_is_as_strict_as_it_is_told(tmp_path, capsys):
    row = {"prefix": "caption en", "suffix": "a red circle and a blue square and a green star"}
    for i in range(4):
        Image.fromarray(np.full((20, 30, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])  # opening it shows that
    rows = [json.dumps({"image": f"{i}.png", **row}) for i in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:3]))
    words = ["data", "check", str(tmp_path), "--json"]

    def found(*more: str) -> tuple[int, dict[str, int], int]:
        status = main([*words, *more])
        tree = json.loads(capsys.readouterr().out)
        shown = [len(one["examples"]) for one in tree["findings"]]
        return status, {one["kind"]: one["count"] for one in tree["findings"]}, max(shown, default=0)

    assert found() == (0, {}, 0)
    long = ("--model", "tiny", "--max-text", "6")
    assert found(*long) == (0, {"text too long": 3}, 3)
    assert found(*long, "--strict") == (2, {"text too long": 3}, 3)
    assert found(*long, "--examples", "1") == (0, {"text too long": 3}, 1)
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    assert found()[:2] == (2, {"broken picture": 1})
    assert found("--no-decode")[:2] == (0, {})


def test_a_page_shows_what_augmentation_makes_of_a_row(coco, tmp_path):
    """Flipped in every pass or in none: the other pixels, and boxes that follow them."""
    words = ["data", "preview", str(coco), "--task", "detect", "--model", "tiny", "--n", "3", "--split", "train"]
    words += ["--task-field", "order=raster", "--task-field", "n_absent=0"]
    shown = []
    for flip in ("0", "1"):
        out = tmp_path / f"{flip}.html"
        assert main([*words, "--augment", f"flip={flip}", "--out", str(out)]) == 0
        page = html.unescape(out.read_text())
        seen = re.findall(r'base64,([^"]+)" alt="picture 1 as the model sees it', page)
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in seen]
        places = [
            sorted(tuple(map(int, box)) for box in re.findall(r"<loc(\d{4})>" * 4, answer))
            for answer in re.findall(r'<p class="answer">([^\n]*)</p>', page)
        ]
        shown.append((pictures, places))
    (plain, there), (flipped, moved) = shown
    assert len(plain) == len(flipped) == 3
    for a, b in zip(plain, flipped, strict=True):
        assert np.abs(a[:, ::-1].astype(int) - b).max() <= 2, "mirrored before the resize, which rounds"
    for boxes_there, boxes_moved in zip(there, moved, strict=True):
        mirrored = sorted((y1, 1023 - x2, y2, 1023 - x1) for y1, x1, y2, x2 in boxes_there)
        assert len(mirrored) == len(boxes_moved)
        for expected, found in zip(mirrored, boxes_moved, strict=True):
            assert max(abs(x - y) for x, y in zip(expected, found, strict=True)) <= 1


def test_a_page_shows_rows_as_a_run_does(coco, tmp_path):
    """The same prompts, places and distorted pixels as the loader of that run hands to the model."""
    out = tmp_path / "page.html"
    changes = ["loc_step=64", "task_weights=[[detect, 2.5]]", "loader.seed=3", "robust.jpeg_probability=1"]
    words = ["data", "preview", str(coco), "--recipe", "stage1", "--task", "detect", "--model", "tiny", "--n", "5"]
    assert main([*words, "--out", str(out), *[word for change in changes for word in ("--set", change)]]) == 0
    page = html.unescape(out.read_text())

    whole = stages.recipe("stage1", data=str(coco), model="tiny", config=config_of("tiny"))
    recipe = changed(whole, {"task": "detect", **dict(change.split("=", 1) for change in changes)})
    base = open_base(recipe)
    loader = loader_of(recipe, as_learned(recipe, rows_of(recipe, base)[0]), base.processor)
    shown = re.findall(r'base64,([^"]+)" alt="picture 1 as the model sees it', page)
    assert len(shown) == 5
    for row, data in enumerate(shown):
        example, item = loader.example(loader.line.place(Draw(row, 0)))
        assert f'<p class="answer">{example.suffix}</p>' in page
        assert all(int(bin_) % 64 in (0, 63) for bin_ in re.findall(r"<loc(\d{4})>", example.suffix))
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[::2, ::2]  # every pixel is a square
        pixels = item.pixels[0].permute(1, 2, 0)
        assert (torch.from_numpy(picture / 127.5 - 1) - pixels).abs().max() <= 0.51 / 127.5
        undistorted = base.processor.pixels(list(example.images))[0].permute(1, 2, 0)
        assert (undistorted - pixels).abs().max() > 2 / 127.5
    assert page.count("weight 2.5") == 5
    assert main([*words, "--out", str(out), "--n", "2", "--passes", "3", "--set", "augmentation.flip=0.5"]) == 0
    names = re.findall(r"<header><b>([^<]+)", html.unescape(out.read_text()))
    assert [names.count(name) for name in dict.fromkeys(names)] == [3, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "nowhere"], "nowhere: no such file or folder"),
        (["convert", "{coco}", "{out}", "--to", "yollo"], "Did you mean 'yolo'"),
        (["convert", "{coco}", "{out}", "--to", "jsonl"], "--task detect"),
        (["convert", "{coco}", "{coco}", "--to", "coco"], "is the data itself"),
        (
            ["convert", "{coco}", "{coco}/train/_annotations.coco.json", "--to", "jsonl", "--task", "detect"],
            "place that can be written",
        ),
        (["preview", "{coco}", "--task", "detect", "--out", "{out}/no/p.html"], "place that can be written"),
        (["convert", "{coco}", "{out}", "--to", "jsonl", "--task", "detect, segment"], "expected --model"),
        (["preview", "{coco}", "--task", "detekt"], "Did you mean 'detect'"),
        (["preview", "{coco}", "--task", "detect", "--augment", "flip"], "expected NAME=VALUE"),
        (["preview", "{coco}", "--task", "detect", "--augment", "flop=1"], "Did you mean 'flip'"),
        (["preview", "{coco}", "--set", "loc_step=8"], "expected --recipe"),
        (["preview", "{coco}", "--recipe", "transfer", "--augment", "flip=1"], "--set augmentation.NAME=VALUE"),
        (["preview", "{coco}", "--recipe", "transfre"], "Did you mean 'transfer'"),
        (["check", "{coco}", "--split", "test"], "has no split 'test'"),
        (["generate", "{coco}", "--to", "coco"], "--overwrite"),
        (["generate", "{out}", "--to", "coco", "--n", "0"], "expected at least one training picture"),
    ],
)
def test_mistakes_are_answered_in_one_line(words, message, coco, tmp_path, capsys):
    filled = [word.format(coco=coco, out=tmp_path / "out") for word in words]
    assert main(["data", *filled]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
