"""One way through the house by command lines: a COCO folder on disk, check, train, eval, merge, detect."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ENV_WORDS = [sys.executable, "-m", "paligemma"]


def told(*words: str, status: int = 0) -> str:
    done = subprocess.run([*ENV_WORDS, *words], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_coco_folder_becomes_a_model_that_finds_things(tmp_path: Path):
    data, run, merged = tmp_path / "coco", tmp_path / "run", tmp_path / "merged"
    told("data", "generate", str(data), "--to", "coco", "--n", "12", "--valid", "4", "--no-colours")
    report = json.loads(told("data", "check", str(data), "--json"))
    assert report["errors"] == 0
    assert report["rows"] == {"train": 12, "valid": 4}
    told(
        "train", "transfer", "--data", str(data), "--task", "detect", "--method", "lora", "--steps", "3", "--out",
        str(run), "--set", "loader.batch_size=4", "--set", "merge=false", "--set", "samples=0",
        "--set", "augmentation.flip=0.5",
    )  # fmt: skip
    words = ("eval", str(data), "--task", "detect", "--split", "valid", "--json")
    tuned = json.loads(told(*words, "--adapter", str(run / "adapter")))["detect"]
    assert tuned["rows"] == 4
    assert tuned["AP50"] > 0.5  # `tiny` knows these shapes, and three steps do not make it forget them
    told("checkpoint", "merge", "tiny", str(run / "adapter"), str(merged))
    again = json.loads(told(*words, "--model", str(merged)))["detect"]
    assert again == tuned
    picture = next((data / "valid").glob("*.png"))
    found = json.loads(told("detect", str(picture), "circle", "square", "--model", str(merged), "--json"))
    assert {"detections", "raw", "problems"} <= set(found)


def test_what_is_wrong_is_said_before_and_by_training(tmp_path: Path):
    data = tmp_path / "coco"
    told("data", "generate", str(data), "--to", "coco", "--n", "6")
    next(data.rglob("_captions.coco.json")).unlink()  # it names the same pictures
    file = next(data.rglob("*.coco.json"))
    tree = json.loads(file.read_text())
    tree["images"][2]["file_name"] = "gone.png"
    x, y, w, h = tree["annotations"][0]["bbox"]
    tree["annotations"][0]["bbox"] = [x, y, -w, h]
    file.write_text(json.dumps(tree))
    report = json.loads(told("data", "check", str(data), "--json", status=2))
    assert {found["kind"]: found["count"] for found in report["findings"]} == {
        "missing picture": 1, "turned-over box": 1
    }  # fmt: skip
    words = [
        "train", "transfer", "--data", str(data), "--task", "detect", "--method", "lora", "--steps", "2", "--out",
        str(tmp_path / "run"), "--set", "loader.batch_size=6", "--set", "valid_share=0", "--set", "samples=0",
    ]  # fmt: skip
    stopped = subprocess.run([*ENV_WORDS, *words], capture_output=True, text=True, check=False)
    assert stopped.returncode == 2
    assert "gone.png" in stopped.stderr or "left < right" in stopped.stderr
    goes_on = subprocess.run(
        [*ENV_WORDS, *words, "--set", "loader.skip_broken=true"], capture_output=True, text=True, check=False
    )
    assert goes_on.returncode == 0, goes_on.stderr
    assert "gone.png" in goes_on.stderr


def test_what_is_passed_over_is_told_of_files_and_of_both_splits(tmp_path: Path):
    data = tmp_path / "rows"
    told("data", "generate", str(data), "--to", "jsonl", "--task", "detect", "--n", "6", "--valid", "3")
    for name, spoil in (("train", {"id": "same"}), ("valid", {"image": "gone.png"})):
        file = next(data.rglob(f"*{name}*.jsonl"))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows[:2] if name == "train" else rows[:1]:
            row.pop("images", None) if "image" in spoil else None
            row |= spoil
        file.write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "run"
    words = ["train", "transfer", "--data", str(data), "--method", "lora", "--steps", "2", "--out", str(out)]
    words += ["--set", "loader.batch_size=3", "--set", "samples=0", "--set", "loader.skip_broken=true"]
    done = subprocess.run([*ENV_WORDS, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "passed over: train: _annotations.train.jsonl line 2: id same is also that of _annotations.train.jsonl line 1"
        in done.stderr
    )
    assert "1 held-out rows could not be read and were left out:\n  _annotations.valid.jsonl line 1: " in done.stderr
    assert "1 held-out rows could not be read and are in no score: see log.jsonl" in done.stderr
    (left,) = [row for row in map(json.loads, (out / "log.jsonl").open()) if row["kind"] == "left out"]
    assert left["what"] == "held-out rows"
    assert "gone.png" in left["rows"][0]
