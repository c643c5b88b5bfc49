"""Every published transfer on four rows of drawn pictures, from JSONL to a moved model; three of them as whole runs."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import paligemma
from paligemma.api.loading import load
from paligemma.cli.main import main
from paligemma.data.loader import Loader
from paligemma.data.record import Mask
from paligemma.data.world import caption, render, sample_scene
from paligemma.recipes.start import open_base, settled, start
from paligemma.recipes.transfer import TransferRecipe, rows_of, run
from paligemma.recipes.transfers import TRANSFERS, recipe
from paligemma.recipes.transfers import rows_of as transfer_rows
from paligemma.train.loop import default_loss, fit

N = 4
SIDE = 112  # of tiny


def miniature(name: str, folder: Path, *splits: str) -> Path:
    """Four rows with the columns of a transfer, and drawn pictures beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits or ("train",):
        rows = [row(name, folder, f"{split}-{i}", seed=i + 100 * (split != "train")) for i in range(N)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(name: str, folder: Path, stem: str, seed: int) -> dict[str, Any]:
    transfer = TRANSFERS[name]
    scene = sample_scene(seed, "plain")
    drawn, thing = render(scene), scene.things[scene.shapes[0]]
    Image.fromarray(drawn.image).save(folder / f"{stem}.png")
    held = {
        "id": stem,
        "question": "What shape is it?",
        "sentence": f"there is a {thing.name}",
        "hint": "",
        "choices": [thing.shape, "nothing"],
        "language": "en",
        "prefix": "caption en",
        "suffix": f"A {thing.name}.",
        "answer": thing.shape,
        "answers": [thing.shape, thing.name],
        "caption": caption(scene, drawn),
        "captions": [caption(scene, drawn), thing.name],
        "summary": thing.name,
        "label": seed % 2 == 0,
        "box_xyxy_px": list(drawn.boxes_xyxy_px[scene.shapes[0]]),
        "segmentation": {
            "size": list(scene.size_hw),
            "counts": list(Mask.of(drawn.masks[scene.shapes[0]]).counts or ()),
        },
    }
    needed = {names[0] for names in transfer.columns} | {"id"} | ({"language"} if name == "coco35l" else set())
    if name == "refcoco_seg":
        needed.add("box_xyxy_px")
    picture = f"{stem}.png"
    n = transfer.n_images if transfer.n_frames is None else 3  # clips shorter than they should be start over
    images: dict[str, Any] = {"image": picture} if n == 1 else {"images": [picture] * n}
    renamed = {"summaries": "summary"}
    return images | {renamed.get(column, column): held[renamed.get(column, column)] for column in needed}


def small(name: str, data: Path, out: Path, **changes: Any) -> TransferRecipe:
    """The recipe as it is, on tiny, for two steps of half the rows: the very first update has factor 0."""
    given = {"steps": 2, "loader.batch_size": N // 2, "device": "cpu", "samples": 0, "eval_rows": N, **changes}
    return recipe(name, data=str(data), model="tiny", resolution=SIDE, out=str(out), **given)


@pytest.mark.parametrize("name", [name for name, transfer in TRANSFERS.items() if transfer.settings])
def test_a_miniature_trains(name: str, tmp_path: Path):
    transfer, setting = TRANSFERS[name], TRANSFERS[name].settings[224]
    made = small(name, miniature(name, tmp_path / "data"), tmp_path / "run", valid_share=0.0)
    base = open_base(made)
    train, held_out, _ = rows_of(made, base)
    assert (len(train), len(held_out)) == (N, 0)
    options = settled(made, made.method, len(train), torch.device("cpu"))
    begun = start(options, base, len(train))
    before = {key: value.detach().clone() for key, value in begun.state.model.named_parameters()}
    loader = Loader(train, begun.pg.processor, dataclasses.replace(options.loader, part_size=1))
    result = fit(begun.state, loader, options.fit, loss=begun.loss)
    assert result.finished
    assert result.last is not None
    assert math.isfinite(result.last.loss)
    assert set(result.last.factors) == {1.0}
    n_pictures = transfer.n_frames or transfer.n_images
    assert (result.last.n_examples, result.last.n_images) == (N // 2, N // 2 * n_pictures)
    assert result.last.n_targets >= 2 * N // 2  # a word and eos, or more
    assert result.last.n_silenced == 0
    moved = {key for key, value in begun.state.model.named_parameters() if not torch.equal(value, before[key])}
    assert moved
    if setting.freeze_image:
        assert all(key.startswith("text.") for key in moved)
    if transfer.trains:
        assert all(".attn." in key for key in moved)
    config = begun.pg.config
    assert config.text.final_logits_softcap is None
    assert config.text.attn_logits_softcap == 50.0
    assert config.processing.resize == (transfer.asked_resize or "float_bilinear_aa")


def test_what_is_only_scored_has_a_loss(tmp_path: Path):
    source = transfer_rows("pope", miniature("pope", tmp_path) / "train.jsonl", is_training=False)
    pg = load("tiny", device="cpu")
    made = recipe("simple", data="x", model="tiny")
    (part,) = Loader(source, pg.processor, dataclasses.replace(made.loader, batch_size=N)).step(0).parts
    with torch.no_grad():
        assert math.isfinite(float(default_loss(made.fit)(pg.model, part).total))


@pytest.mark.parametrize(("name", "metric"), [("pope", "accuracy"), ("coco35l", "CIDEr, en"), ("refcoco_seg", "mIoU")])
def test_a_published_set_is_scored_by_its_own_metric(name: str, metric: str, tmp_path: Path, capsys: Any):
    data = miniature(name, tmp_path / "data", "train", "valid")
    words = ["eval", str(data), "--transfer", name, "--json", "--device", "cpu"]
    resize = TRANSFERS[name].asked_resize
    for more, n, told in (([], N, "valid"), (["--split", "train"], N, "train"), (["--limit", "2"], 2, "valid")):
        assert main([*words, *more]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)[f"transfer.{name}"]
        assert found["rows"] == n
        assert metric in found
        assert f"{N} rows: the {told} split; pictures by {resize}" in err
    assert main([*words, "--split", "tests"]) == 2
    assert "has no split 'tests'" in capsys.readouterr().err
    assert main([*words, "--task", "detect"]) == 2
    assert "--transfer has prompts" in capsys.readouterr().err
    assert main([*words[:3], "poppe"]) == 2
    assert "Did you mean 'pope'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["refcoco_seg", "widgetcap", "msvd_qa"])
def test_a_miniature_goes_through_a_whole_run(name: str, tmp_path: Path):
    data = miniature(name, tmp_path / "data", "train", "valid")
    result = run(small(name, data, tmp_path / "run"), progress=False, say=lambda _text: None)
    assert result.finished
    assert result.report is not None
    assert sum(result.report.n_rows.values()) == N
    tuned = paligemma.load(result.model, device="cpu")
    assert tuned.config.text.final_logits_softcap is None
    assert tuned.config.processing.resize == TRANSFERS[name].asked_resize
    assert "lr" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
def test_the_command_line_knows_the_transfers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = miniature("vqav2", tmp_path / "data", "train", "valid")
    words = ["train", "transfer.vqav2", "--data", str(data), "--model", "tiny", "--device", "cpu", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path / "run"), "--set", "samples=0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "4 examples to learn, 4 held out (the valid split). Method: full" in err
    assert json.loads(out)["scores"]["answer"]["rows"] == N
    assert main(["train", "transfer.vqa2", "--data", str(data)]) == 2
    assert "Did you mean 'vqav2'" in capsys.readouterr().err
    (data / "train.jsonl").write_text('{"image": "train-0.png", "qestion": "?", "answers": ["x"]}\n')
    assert main([*words, "--out", str(tmp_path / "other")]) == 2
    message = capsys.readouterr().err
    assert "train.jsonl line 1: no column 'question'" in message
    assert message.count("\n") == 1
