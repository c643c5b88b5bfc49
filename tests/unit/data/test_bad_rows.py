"""What `check` calls an error, training stops at; told to skip, it goes on without that row and says which."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from paligemma.cli.main import main
from paligemma.data.check import check
from paligemma.data.loader import Loader, LoaderOptions
from paligemma.data.rows import open_rows
from paligemma.errors import DataError
from tests.picture_folders import picture
from tests.training_runs import processor

H, W = 48, 64
GOOD = {"image": "good.png", "prefix": "caption en", "suffix": "a cat"}


def jsonl(folder: Path, row: dict[str, Any] | bytes) -> Path:
    """A good row, and one that is given."""
    picture(folder / "good.png")
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    (folder / "train.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    return folder


def coco(folder: Path, *, size_hw: tuple[float, float] = (H, W), **annotation: Any) -> Path:
    """Two pictures with a box each; the second one's is given, as is the size that the file says of it."""
    for seed, name in enumerate(("a.png", "b.png")):
        picture(folder / "train" / name, seed=seed)
    fine = {"category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
    tree = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": W, "height": H},
            {"id": 2, "file_name": "b.png", "width": size_hw[1], "height": size_hw[0]},
        ],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, **fine}, {"id": 2, "image_id": 2, **fine, **annotation}],
    }
    (folder / "train" / "_annotations.coco.json").write_text(json.dumps(tree))
    return folder


def empty_clip(folder: Path) -> Path:
    (folder / "frames").mkdir()
    return jsonl(folder, {"video": "frames", "prefix": "caption en", "suffix": "a cat"})


def clip_without_frames(folder: Path) -> Path:
    """A file of no length, called as a video is."""
    (folder / "a.mp4").write_bytes(b"")
    return jsonl(folder, {"video": "a.mp4", "prefix": "caption en", "suffix": "a cat"})


def zero_size(folder: Path) -> Path:
    (folder / "empty.png").write_bytes(b"")
    return jsonl(folder, {**GOOD, "image": "empty.png"})


def turned_by_exif(folder: Path) -> Path:
    data = coco(folder)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(data / "train" / "b.png").save(data / "train" / "b.png", exif=exif)
    return data


def stub(folder: Path, data: bytes) -> Path:
    (folder / "stub.png").write_bytes(data)
    return jsonl(folder, {**GOOD, "image": "stub.png"})


def continent(folder: Path) -> Path:
    """A size that is wrong, and an outline in it: its pixels would fill the memory."""
    return coco(folder, size_hw=(2500 * H, 2500 * W), segmentation=[[4, 4, 20, 4, 20, 20]])


CLIP = {"video": "frames", "prefix": "caption en", "suffix": "a cat"}
ASKED = {"image": "good.png", "prefix": "caption en"}
RLE = {"size": [H, W], "counts": [9]}
SPOILED: dict[str, tuple[str, Callable[[Path], Path], str | None]] = {  # kind: what is told, the data, its task
    "missing picture": ("gone.png", lambda f: jsonl(f, {**GOOD, "image": "gone.png"}), None),
    "path outside": ("outside", lambda f: jsonl(f, {**GOOD, "image": "../secret.png"}), None),
    "absolute path": ("outside", lambda f: jsonl(f, {**GOOD, "image": "/etc/hostname"}), None),
    "wrong column": ("suffix", lambda f: jsonl(f, {**ASKED, "sufix": "a"}), None),
    "not UTF-8": ("UTF-8", lambda f: jsonl(f, json.dumps(GOOD).encode().replace(b"cat", b"\xff")), None),
    "zero-size picture": ("empty.png", zero_size, None),
    "no frames": ("frames", empty_clip, None),
    "no video": ("a.mp4", clip_without_frames, None),
    "one byte": ("stub.png", lambda f: stub(f, b"B"), None),
    "three bytes": ("stub.png", lambda f: stub(f, b"BM\0"), None),
    "turned-over box": ("left < right", lambda f: coco(f, bbox=[20, 4, -10, 20]), "detect"),
    "turned-over box, counted": ("left < right", lambda f: coco(f, bbox=[20, 4, -10, 20]), "count"),
    "box outside": ("outside", lambda f: coco(f, bbox=[W + 4, 4, 10, 20]), "detect"),
    "box outside, listed": ("outside", lambda f: coco(f, bbox=[W + 4, 4, 10, 20]), "list_objects"),
    "size of nothing": ("width 0.5", lambda f: coco(f, size_hw=(1, 0.5)), "detect"),
    "size of a continent": (f"width {10**10}", lambda f: coco(f, size_hw=(10**10, 10**10)), "detect"),
    "mask of a continent": ("mask for a picture of 160000×120000", continent, "detect"),
    "endless weight": ("weight", lambda f: jsonl(f, {**GOOD, "weight": 10**400}), None),
    "endless clip": ("n_frames", lambda f: jsonl(f, {**CLIP, "n_frames": 10**30, "stride": 1}), None),
    "RLE of the wrong size": (r"size \[6, 6\]", lambda f: coco(f, segmentation={**RLE, "size": [6, 6]}), "detect"),
    "RLE that does not add up": ("run-length", lambda f: coco(f, segmentation=RLE), "detect"),
    "two corners": ("three corners", lambda f: coco(f, segmentation=[[4, 4, 20, 20]]), "detect"),
    "another shape": ("annotated as 48×64", lambda f: coco(f, size_hw=(W, H)), "detect"),
    "turned by EXIF": ("turned by EXIF", turned_by_exif, "detect"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_check_finds_it_and_training_stops_at_it_or_passes_it_over(name: str, tmp_path: Path):
    told, make, task = SPOILED[name]
    data = make(tmp_path)
    assert check(open_rows(data, task=task, keep_all=True)).n_errors == 1

    def step(**options: Any) -> Any:
        rows = open_rows(data, task=task)["train"]
        return Loader(rows, processor(), LoaderOptions(batch_size=2, shuffle=False, **options)).step(0)

    with pytest.raises(DataError, match=told):
        step()
    passed = step(skip_broken=True)
    assert len(passed.broken) == 1
    assert sum(batch.tokens.shape[0] for batch in passed.parts) == 1, "the good row is learned"


@pytest.mark.parametrize("size_hw", [(2 * H, 2 * W), (3 * H, 4 * W)], ids=["smaller", "stretched"])
def test_annotations_of_a_copy_of_other_sides_fit(size_hw: tuple[int, int], tmp_path: Path):
    """Places are fractions of the sides."""
    rows = open_rows(coco(tmp_path, size_hw=size_hw), task="detect")["train"]
    assert Loader(rows, processor(), LoaderOptions(batch_size=2, shuffle=False)).step(0).broken == ()


def test_a_turned_picture_may_be_counted_in(tmp_path: Path):
    """Only places are wrong in it."""
    rows = open_rows(turned_by_exif(tmp_path), task="count")["train"]
    assert Loader(rows, processor(), LoaderOptions(batch_size=2, shuffle=False)).step(0).broken == ()


def test_a_turned_picture_is_found_whatever_was_read_before_it(tmp_path: Path):
    """Pictures of a step are read once; the same one beside other words does not hide it."""
    data = turned_by_exif(tmp_path)
    (data / "words").mkdir()
    (data / "train" / "rows.jsonl").write_text(json.dumps({**ASKED, "image": "b.png", "suffix": "x"}))
    sources = {
        "words": {"data": "train/rows.jsonl"},
        "boxes": {"data": "train/_annotations.coco.json", "task": "detect"},
    }
    (data / "mixture.yaml").write_text(yaml.safe_dump({"sources": sources}))
    rows = open_rows(data / "mixture.yaml", shuffle=False)["train"]
    passed = Loader(rows, processor(), LoaderOptions(batch_size=6, shuffle=False, skip_broken=True)).step(0)
    assert passed.broken
    assert all("turned by EXIF" in told for told in passed.broken)


def test_boxes_with_an_outline_of_nothing_are_boxes(tmp_path: Path):
    rows = open_rows(coco(tmp_path, segmentation=[[]]), task="detect")["train"]
    assert Loader(rows, processor(), LoaderOptions(batch_size=2, shuffle=False)).step(0).broken == ()


def test_check_sees_held_out_pictures_that_a_task_has_nothing_to_ask_about(tmp_path: Path, capsys: Any):
    data = coco(tmp_path)
    tree = json.loads((data / "train" / "_annotations.coco.json").read_text())
    picture(data / "valid" / "a.png", seed=7)
    file = picture(data / "valid" / "b.png", seed=8)  # without boxes
    file.write_bytes(file.read_bytes()[:200])
    (data / "valid" / "_annotations.coco.json").write_text(json.dumps({**tree, "annotations": tree["annotations"][:1]}))
    rows = open_rows(data, task="detect")
    assert len(rows["valid"]) == 1
    assert main(["data", "check", str(data), "--task", "detect", "--json"]) == 2
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert (found["kind"], found["count"]) == ("broken picture", 1)
