"""The published transfers: prompts letter by letter, what changes from pass to pass, where every number arrives."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma.api import load
from paligemma.api.loading import find, find_mask_vae
from paligemma.checkpoints import write
from paligemma.data.record import Mask
from paligemma.data.world import render, sample_scene
from paligemma.errors import DataError, OptionError, ShapeError
from paligemma.metrics.segmentation import mask_iou
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.presets import PRESETS, TINY
from paligemma.processing.image import load_image, to_pixels
from paligemma.processing.resize import resize
from paligemma.recipes.start import settled
from paligemma.recipes.transfer import TransferRecipe
from paligemma.recipes.transfers import (
    LR_SWEEP,
    SEARCH,
    TRANSFERS,
    Turn,
    asked_rows,
    open_rows,
    recipe,
    rows_of,
    score,
    table,
)
from paligemma.recipes.transfers.boxes import outlined
from paligemma.recipes.tree import from_tree, to_tree
from paligemma.results import pack_counts
from paligemma.tasks.segmentation import read_referring
from paligemma.train.optim import Optimizer

ROOT = Path(__file__).parents[3]
TRAINED = [name for name, transfer in TRANSFERS.items() if transfer.settings]
LARGE = {"tallyqa", "ocrvqa", "textvqa", "docvqa", "infovqa", "stvqa", "refcoco_seg", "simple"}
SMALL = {"forkme", "vertexai_l4", "notebook", *(name for name, t in TRANSFERS.items() if t.n_frames)}
HELD = Turn(is_training=False)


def written(
    folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl", size: tuple[int, int] = (40, 30)
) -> Path:
    """A file of rows, and the pictures a.png and b.png beside it."""
    for seed, picture in enumerate("ab"):
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{picture}.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def mask_vae() -> Any:
    return find_mask_vae(find("tiny"), None)


# The prompts and answers of the table, spelled out once more.
QUESTION = {"image": "a.png", "question": "what is it?"}
GOLDEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "cococap": ({"captions": ["A cat."]}, "caption en", "A cat."),
    "coco35l": ({"language": "de", "captions": ["Eine Katze"]}, "caption de", "Eine Katze"),
    "textcaps": ({"captions": ["A Sign saying STOP"]}, "caption en", "a sign saying stop"),
    "scicap": ({"caption": "loss over steps"}, "caption en", "loss over steps"),
    "screen2words": ({"summary": "a login page"}, "caption en", "a login page"),
    "widgetcap": ({"captions": ["go back"], "box_yxyx_norm": [0, 0, 0.5, 0.5]}, "caption en", "go back"),
    "vqav2": (QUESTION | {"answers": ["a cat"] * 10}, "answer en what is it?", "a cat"),
    "okvqa": (QUESTION | {"answers": ["a cat"]}, "answer en what is it?", "a cat"),
    "aokvqa_da": (QUESTION | {"answers": ["a cat"]}, "answer en what is it?", "a cat"),
    "aokvqa_mc": (
        QUESTION | {"choices": ["cat", "dog", "cow"], "answer": "dog"},
        "answer en  what is it? choose from: cat \t dog \t cow",
        "dog",
    ),
    "gqa": (QUESTION | {"answer": "cat"}, "answer en what is it?", "cat"),
    "nlvr2": (
        {"images": ["a.png", "b.png"], "sentence": "both are red", "label": True},
        "answer en both are red",
        "True",
    ),
    "ai2d": (QUESTION | {"choices": ["a", "b"], "answer": 1}, "answer en  what is it? choose from: a \t b", "b"),
    "science_qa": (
        QUESTION | {"hint": "look", "choices": ["x", "y"], "answer": 1},
        "Question: what is it?\nContext: look\nOptions: (A) x, (B) y\nAnswer:",
        "The answer is B.",
    ),
    "rsvqa_lr": (QUESTION | {"answer": "Yes"}, "answer en what is it?", "yes"),
    "rsvqa_hr": (QUESTION | {"answer": "0m2"}, "answer en what is it?", "0m2"),
    "chartqa": (QUESTION | {"answer": 14}, "what is it?", "14"),
    "vizwizvqa": (QUESTION | {"answers": [{"answer": "unanswerable"}]}, "answer en what is it?", "unanswerable"),
    "tallyqa": (QUESTION | {"answer": 3}, "answer en what is it?", "3"),
    "ocrvqa": (QUESTION | {"answer": "Sports"}, "answer en what is it?", "Sports"),
    "textvqa": (QUESTION | {"answers": ["nokia"] * 10}, "answer en what is it?", "nokia"),
    "docvqa": (QUESTION | {"answers": ["0.28"]}, "what is it?", "0.28"),
    "infovqa": (QUESTION | {"answers": ["Paris"]}, "answer en what is it?", "paris"),
    "stvqa": (QUESTION | {"answers": ["STOP"]}, "answer en what is it?", "stop"),
    "activitynet_cap": ({"images": ["a.png"], "captions": ["a man runs"]}, "caption en", "a man runs"),
    "activitynet_qa": (QUESTION | {"images": ["a.png"], "answer": "no"}, "answer en what is it?", "no"),
    "msrvtt_cap": ({"images": ["a.png"], "captions": ["a man runs"]}, "caption en", "a man runs"),
    "msrvtt_qa": (QUESTION | {"images": ["a.png"], "answer": "man"}, "answer en what is it?", "man"),
    "msvd_qa": (QUESTION | {"images": ["a.png"], "answer": "man"}, "answer en what is it?", "man"),
    "vatex_cap": ({"images": ["a.png"], "captions": ["a man runs"]}, "caption en", "a man runs"),
    "pope": (QUESTION | {"answer": "Yes"}, "what is it?", "yes"),
    "simple": ({"prefix": "detect cat", "suffix": "x"}, "detect cat", "x"),
    "forkme": ({"suffix": "A cow."}, "caption en", "A cow."),
    "vertexai_l4": ({"suffix": "A cow."}, "caption en", "A cow."),
    "notebook": ({"suffix": "A Cow."}, "caption en", "a cow."),
}


@pytest.mark.parametrize("name", [name for name in TRANSFERS if name != "refcoco_seg"])
def test_prompt_and_answer_are_those_of_the_table(name: str):
    row, prefix, suffix = GOLDEN[name]
    assert TRANSFERS[name].form({"image": "a.png"} | row, HELD) == (prefix, suffix)


def test_an_expression_is_the_whole_prompt_and_its_answer_is_twenty_tokens_that_give_back_the_mask():
    scene = sample_scene(3, "plain")
    drawn, thing = render(scene), scene.shapes[0]
    height, width = scene.size_hw
    left, top, right, bottom = drawn.boxes_xyxy_px[thing]
    mask = Mask.of(drawn.masks[thing])
    rle = {"size": [height, width], "counts": list(mask.counts)}
    row = {
        "image": "a.png",
        "sentence": "the left one",
        "segmentation": rle,
        "bbox": [left, top, right - left, bottom - top],
    }
    vae = mask_vae()
    turn = Turn(mask_encoder=vae.encode_array)
    prefix, suffix = TRANSFERS["refcoco_seg"].form(row, turn)
    assert prefix == "the left one"
    assert (suffix.count("<loc"), suffix.count("<seg"), " " in suffix) == (4, 16, False)
    found = read_referring(suffix, scene.size_hw, vae.decode_array)
    assert mask_iou(found.mask, drawn.masks[thing]) > 0.6
    without_box = {key: value for key, value in row.items() if key != "bbox"}
    assert TRANSFERS["refcoco_seg"].form(without_box, turn) == (prefix, suffix)
    with pytest.raises(OptionError, match="mask_decoder"):
        score("refcoco_seg", [suffix], [row])
    scores = score("refcoco_seg", [suffix], [row], mask_decoder=vae.decode_array)
    assert scores["mIoU"] == mask_iou(found.mask, drawn.masks[thing])
    assert (scores["box accuracy 0.5"], scores["invalid"]) == (1.0, 0.0)
    assert score("refcoco_seg", ["no"], [row], mask_decoder=vae.decode_array)["invalid"] == 1.0


def test_a_polygon_and_compressed_run_lengths_are_the_same_mask():
    pytest.importorskip("pycocotools")
    square = [[2.0, 2.0, 10.0, 2.0, 10.0, 8.0, 2.0, 8.0]]
    mask = Mask((12, 20), polygons=(tuple(square[0]),)).pixels()
    counts = list(Mask.of(mask).counts or ())
    turn = Turn(mask_encoder=mask_vae().encode_array)
    row = {"image": "a.png", "sentence": "it", "box_xyxy_px": [2, 2, 10, 8]}
    forms = [
        TRANSFERS["refcoco_seg"].form(row | more, turn)
        for more in (
            {"segmentation": square, "height": 12, "width": 20},
            {"mask": {"size": [12, 20], "counts": counts}},
            {"mask": {"size": [12, 20], "counts": pack_counts(counts)}},
        )
    ]
    assert forms[0] == forms[1] == forms[2]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [480], "counts": [1]}, r"has the size \[480\]: expected \[height, width\]"),
        ({"size": "x", "counts": [1]}, "has the size x"),
        ({"size": [12, 20], "counts": None}, "expected COCO's run lengths"),
        ({"size": [12, 20], "counts": ["a"]}, "expected COCO's run lengths"),
        ({"size": [12, 20], "counts": [7, -7, 240]}, "run-length"),
        ([["a", 2, 3, 4, 5, 6]], "expected polygons"),
        ([[1, 2, float("nan"), 4, 5, 6]], "expected polygons"),
        ({"size": [20, 12], "counts": [0, 240]}, "a mask of 12×20: expected the picture's 40×30"),
    ],
)
def test_masks_of_rows_that_are_none_are_named(mask: Any, message: str, tmp_path: Path):
    Image.new("RGB", (20, 12)).save(tmp_path / "a.png")
    row = {"image": "a.png", "sentence": "it", "box_xyxy_px": [2, 2, 10, 8], "mask": mask, "height": 12, "width": 20}
    source = rows_of("refcoco_seg", written(tmp_path, [row]), mask_encoder=mask_vae().encode_array)
    with pytest.raises(DataError, match=message) as caught:
        source[0]
    assert str(caught.value).startswith("train.jsonl line 1: ")


@pytest.mark.parametrize("box", [[2, 2, float("inf"), 8], [2, 2, float("nan"), 8], [10, 2, 2, 8], [2, 8, 10, 8]])
def test_boxes_that_are_none_are_drawn_nowhere(box: list[float], tmp_path: Path):
    Image.new("RGB", (20, 12)).save(tmp_path / "a.png")
    rows = written(tmp_path, [{"image": "a.png", "captions": ["ok"], "box_xyxy_px": box}])
    with pytest.raises(DataError, match=r"^train\.jsonl line 1: 'box_xyxy_px' is .*: expected"):
        np.asarray(rows_of("widgetcap", rows, resolution=28)[0].images[0])


def test_ids_used_twice_stop_a_published_transfer_too(tmp_path: Path):
    written(tmp_path, [QUESTION | {"id": 3}, QUESTION | {"id": 3}])
    with pytest.raises(DataError, match=r"^train: train\.jsonl line 2: id 3 is also that of train\.jsonl line 1"):
        open_rows("vqav2", tmp_path)
    told: list[str] = []
    open_rows("vqav2", tmp_path, skip_broken=True, say=told.append)
    assert len(told) == 1
    assert told[0].startswith("passed over: train: train.jsonl line 2")


@pytest.mark.parametrize("name", ["vqav2", "cococap", "infovqa", "textcaps"])
def test_answers_are_cycled_through_before_one_comes_again(name: str, tmp_path: Path):
    transfer = TRANSFERS[name]
    answers = [f"Answer {i}" for i in range(5)]
    base = {"image": "a.png", "question": "?", transfer.answer[0]: answers}
    rows = rows_of(name, written(tmp_path, [base | {"id": str(i)} for i in range(8)]), seed=3)
    expected = [answer.lower() for answer in answers] if transfer.lower else answers
    walks = [[rows.varied(i, epoch).suffix for epoch in range(10)] for i in range(8)]
    assert all(sorted(walk[:5]) == sorted(walk[5:]) == expected for walk in walks)
    assert len({tuple(walk) for walk in walks}) > 4  # every row has an order of its own
    again = rows_of(name, tmp_path / "train.jsonl", seed=3)
    assert [again.varied(0, epoch).suffix for epoch in range(10)] == walks[0]
    held_out = rows_of(name, tmp_path / "train.jsonl", is_training=False)
    assert {held_out.varied(i, epoch).suffix for i in range(8) for epoch in range(5)} == {expected[0]}


def test_answers_of_documents_are_drawn_with_replacement(tmp_path: Path):
    row = QUESTION | {"answers": ["one", "two", "three"]}
    rows = rows_of("docvqa", written(tmp_path, [row]))
    walks = [[rows.varied(0, 3 * walk + epoch).suffix for epoch in range(3)] for walk in range(40)]
    assert any(len(set(walk)) < 3 for walk in walks)
    assert set(Counter(answer for walk in walks for answer in walk)) == {"one", "two", "three"}


def test_languages_are_drawn_alike_and_the_caption_is_of_the_prompts_language(tmp_path: Path):
    captions = {lang: [f"{lang} {i}" for i in range(2)] for lang in ("de", "en", "zh")}
    rows = rows_of("coco35l", written(tmp_path, [{"image": "a.png", "captions": captions}]))
    seen = [rows.varied(0, epoch) for epoch in range(300)]
    assert all(example.suffix.startswith(example.prefix.removeprefix("caption ")) for example in seen)
    counts = Counter(example.prefix for example in seen)
    assert set(counts) == {"caption de", "caption en", "caption zh"}
    assert min(counts.values()) > 70
    held_out = rows_of("coco35l", tmp_path / "train.jsonl", is_training=False)[0]
    lang = held_out.prefix.removeprefix("caption ")
    found = score("coco35l", [held_out.suffix], [held_out.meta])
    assert found.keys() == {"CIDEr", f"CIDEr, {lang}"}
    assert all(math.isnan(value) for value in found.values()), "of one row nobody knows how rare its words are"


def test_captions_of_a_language_are_scored_among_themselves_and_languages_count_alike():
    cats = [{"language": "de", "captions": ["eine rote Katze"]}, {"language": "de", "captions": ["ein blauer Hund"]}]
    birds = [{"language": "en", "captions": [f"a bird number {i}"]} for i in range(6)]
    said = [row["captions"][0] for row in cats] + ["nothing of it"] * 6
    found = score("coco35l", said, [*cats, *birds])
    alone = score("coco35l", said[:2], cats)
    assert found["CIDEr, de"] == alone["CIDEr, de"] > 1
    assert found["CIDEr, en"] == 0
    assert found["CIDEr"] == pytest.approx(found["CIDEr, de"] / 2)


@pytest.mark.parametrize(("name", "n"), [("vqav2", 2), ("pope", 20)])
def test_a_lone_file_is_asked_as_a_run_holds_out_or_whole_where_nothing_is_learned(name: str, n: int, tmp_path: Path):
    rows = [{"image": f"{i}.png", "question": "?", "answer": "yes", "id": i} for i in range(20)]
    path = written(tmp_path, rows)
    for i in range(20):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    found, _ = asked_rows(name, path.parent)
    assert len(found) == n
    assert len(asked_rows(name, path.parent, "train")[0]) == 20
    with pytest.raises(OptionError, match="has no split 'test'"):
        asked_rows(name, path.parent, "test")


def test_small_letters_are_those_of_the_reference(tmp_path: Path):
    row = {"image": "a.png", "captions": ["CAFÉ ÖL"], "suffix": "CAFÉ ÖL"}
    said = {name: rows_of(name, written(tmp_path, [row]))[0].suffix for name in ("textcaps", "notebook")}
    assert said == {"textcaps": "cafÉ Öl", "notebook": "café öl"}, "the notebook lower-cases by Python"


@pytest.mark.parametrize("name", ["coco35l", "refcoco_seg"])
def test_a_pass_shows_every_picture_once_and_several_passes_every_row(name: str, tmp_path: Path):
    mask = {"size": [30, 40], "counts": [5, 900, 295]}
    said = {"coco35l": lambda i: {"language": "de", "captions": [f"{i}"]},
            "refcoco_seg": lambda i: {"sentence": f"{i}", "segmentation": mask}}[name]  # fmt: skip
    rows = [{"image": picture, **said(i)} for i, picture in enumerate(["a.png", "b.png", "a.png", "a.png", "b.png"])]
    written(tmp_path, rows)
    train, held, _ = open_rows(name, tmp_path, valid_share=0, mask_encoder=mask_vae().encode_array, resolution=28)
    assert (len(train), len(held)) == (2, 0)

    def word(picture: int, epoch: int) -> str:
        example = train.varied(picture, epoch)
        return example.suffix if name == "coco35l" else example.prefix

    for picture, own in enumerate((["0", "2", "3"], ["1", "4"])):
        for walk in range(4):
            shown = [word(picture, walk * len(own) + i) for i in range(len(own))]
            assert sorted(shown) == own
    orders = {tuple(word(0, 3 * walk + i) for i in range(3)) for walk in range(20)}
    assert len(orders) == 6
    written(tmp_path, rows, "valid.jsonl")
    train, held, _ = open_rows(name, tmp_path, mask_encoder=mask_vae().encode_array, resolution=28)
    assert (len(train), len(held)) == (2, 5), "every held-out row is asked"


def test_a_model_on_disk_says_which_numbers_it_takes(tmp_path: Path):
    model = tmp_path / "run-2024"
    for side, epochs in ((112, 5), (448, 10)):
        pg = load("tiny", resolution=side)
        write(model, pg.config, pg.model.state_dict(), overwrite=True)
        assert recipe("textvqa", data="d", model=str(model)).epochs == epochs
    assert recipe("textvqa", data="d", model="google/paligemma-3b-pt-448").epochs == 10


def test_a_method_that_is_asked_for_is_what_moves():
    assert not recipe("msrvtt_cap", data="d", method="full").optim.schedules
    frozen = settled(recipe("msrvtt_cap", data="d"), "frozen", 10, torch.device("cpu"))
    assert frozen.optim.schedules == (("image", None),)


def test_small_models_learn_faster_where_nobody_says_how_fast():
    for config, full, adapter in ((TINY, 1e-3, 3e-3), (PRESETS["paligemma2-3b-224"], 1e-5, 2e-4)):
        rates = [
            settled(TransferRecipe(data="d"), method, 10, torch.device("cpu"), config).lr for method in ("full", "lora")
        ]
        assert rates == [full, adapter]
    assert settled(TransferRecipe(data="d", lr=1e-6), "full", 10, torch.device("cpu"), TINY).lr == 1e-6


def test_adapters_learn_faster_than_the_table_says_for_whole_weights():
    assert recipe("vqav2", data="d").lr == 1e-5
    assert recipe("vqav2", data="d", method="lora").lr == 2e-4
    assert recipe("vqav2", data="d", method="lora", lr=3e-5).lr == 3e-5


def test_options_of_science_questions_change_places_in_training_and_the_letter_follows(tmp_path: Path):
    row = QUESTION | {"hint": "", "choices": ["iron", "tin", "lead"], "answer": "tin"}
    rows = rows_of("science_qa", written(tmp_path, [row]))
    letters = set()
    for epoch in range(30):
        example = rows.varied(0, epoch)
        letter = example.suffix.removeprefix("The answer is ").removesuffix(".")
        letters.add(letter)
        assert f"({letter}) tin" in example.prefix
        assert "\nContext: \nOptions: (A) " in example.prefix
    assert letters == {"A", "B", "C"}
    held_out = rows_of("science_qa", tmp_path / "train.jsonl", is_training=False)
    assert {held_out.varied(0, epoch).suffix for epoch in range(5)} == {"The answer is B."}


def test_a_widgets_box_is_drawn_after_the_resize_one_pixel_wide(tmp_path: Path):
    row = {"image": "a.png", "captions": ["x"], "box_xyxy_px": [10, 6, 30, 24]}  # of 40 × 30
    example = rows_of("widgetcap", written(tmp_path, [row]), resolution=56)[0]
    shown = load_image(example.images[0])
    plain = resize(load_image(tmp_path / "a.png"), 56, "bv_bilinear_aa")
    assert shown.shape == (56, 56, 3)
    changed = np.zeros((56, 56), bool)
    top, left, bottom, right = (int(f * 55) for f in (6 / 30, 10 / 40, 24 / 30, 30 / 40))
    changed[[top, bottom], left : right + 1] = True
    changed[top : bottom + 1, [left, right]] = True
    assert (shown[changed] == (255, 0, 0)).all()
    assert (shown[~changed] == plain[~changed]).all()
    # What the model sees is this picture: to resize it once more changes nothing.
    pixels = to_pixels(example.images[0], 56, "bv_bilinear_aa")
    assert torch.equal(pixels, to_pixels(shown, 56, "bv_bilinear_aa"))
    assert torch.equal(((pixels + 1) * 127.5).round(), torch.from_numpy(shown).permute(2, 0, 1).float())


def test_a_box_that_leaves_the_picture_is_drawn_as_far_as_it_goes():
    shown = outlined(np.zeros((11, 11, 3), np.uint8), (0.5, -0.4, 1.5, 0.5))
    red = (shown == (255, 0, 0)).all(axis=2)
    expected = np.zeros((11, 11), bool)
    expected[5, :6] = expected[5:, 5] = True
    assert (red == expected).all()


@pytest.mark.parametrize("name", ["ai2d", "rsvqa_lr", "rsvqa_hr", "vizwizvqa"])
def test_training_with_antialias_and_asking_without(name: str, tmp_path: Path):
    row = {"image": "a.png"} | GOLDEN[name][0]
    file = written(tmp_path, [row], size=(200, 150))
    picture = load_image(tmp_path / "a.png")
    how = dict(recipe(name, data="x").choices)["resize"]
    assert how == "bv_bilinear"
    for is_training, expected in ((True, "bv_bilinear_aa"), (False, "bv_bilinear")):
        example = rows_of(name, file, is_training=is_training, resolution=28)[0]
        seen = to_pixels(load_image(example.images[0]), 28, how)
        assert torch.equal(seen, to_pixels(picture, 28, expected))
    with pytest.raises(OptionError, match="resolution="):
        rows_of(name, file)


def test_a_short_clip_starts_over_and_a_long_one_is_cut(tmp_path: Path):
    rows = [{"images": names, "captions": ["x"]} for names in (["a.png", "b.png"], ["a.png"] * 30)]
    source = rows_of("vatex_cap", written(tmp_path, rows))
    assert [path.name for path in source[0].images] == ["a.png", "b.png"] * 8
    assert len(source[1].images) == 16
    assert len(rows_of("msvd_qa", written(tmp_path, [GOLDEN["msvd_qa"][0]]))[0].images) == 8


def test_a_folder_of_frames_is_read_with_the_transfers_stride(tmp_path: Path):
    (tmp_path / "clip").mkdir()
    for i in range(40):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "clip" / f"{i:03d}.png")
    file = written(tmp_path, [{"video": "clip", "captions": ["x"]}, {"video": "clip", "stride": 2, "captions": ["x"]}])
    source = rows_of("msrvtt_cap", file)
    levels = [[int(np.asarray(frame)[0, 0, 0]) for frame in source[i].images] for i in (0, 1)]
    assert levels[0] == [0, 9, 18, 27, 36] * 3 + [0]
    assert levels[1] == list(range(0, 32, 2))


@pytest.mark.parametrize("name", TRAINED)
def test_every_number_arrives_in_the_field_that_acts(name: str):
    transfer = TRANSFERS[name]
    for resolution, setting in transfer.settings.items():
        made = settled(recipe(name, data="x", resolution=resolution), "full", 1000, torch.device("cpu"))
        assert made.model == f"{transfer.model}-{resolution}"
        assert made.model.replace("-pt", "") in PRESETS
        assert made.resolution == resolution
        assert (made.lr, made.optim.lr, made.optim.weight_decay) == (setting.lr, setting.lr, setting.weight_decay)
        assert made.loader.batch_size == setting.batch_size
        assert made.loader.max_text == transfer.text_length + 1
        assert (made.fit.dropout, made.fit.label_smoothing) == (setting.dropout, setting.label_smoothing)
        assert made.fit.steps == (setting.steps or max(1, round(setting.epochs * 1000 / setting.batch_size)))
        clip_norm = None if name == "notebook" else 1.0
        assert (made.optim.betas, made.optim.clip_norm, made.optim.kind) == ((0.9, 0.999), clip_norm, transfer.kind)
        assert made.fit.save_every == transfer.save_every
        assert dict(made.choices).get("resize") == (transfer.resize_eval or transfer.resize)
        assert dict(made.choices)["final_logits_softcap"] is None
        # Warm-up is a share of the run: the factor at its end is 1, and 0 at the very first update.
        total = 1000
        factor = made.optim.schedule.factor
        assert factor(0, total_steps=total) == 0
        assert factor(round(total * transfer.warmup), total_steps=total) == 1
        assert factor(total, total_steps=total) == pytest.approx(0)
        assert from_tree(recipe(name, data="x"), to_tree(made)) == made


@pytest.mark.parametrize("name", TRAINED)
def test_who_learns_and_what_decays(name: str):
    with torch.device("meta"):
        model = PaliGemmaModel(TINY)
    names = {id(parameter): named for named, parameter in model.named_parameters()}
    whole = recipe(name, data="x")
    made = settled(whole, whole.method, 1000, torch.device("cpu"))
    optimizer = Optimizer(model.named_parameters(), made.optim, total_steps=10) if made.optim.kind != "adam" else None
    if optimizer is None:
        options = dataclasses.replace(made.optim, kind="adam")
        optimizer = Optimizer(((n, p) for n, p in model.named_parameters()), options, total_steps=10)
    trained = {names[id(parameter)] for parameter in optimizer.parameters}
    everything = set(names.values())
    if TRANSFERS[name].trains:
        assert trained == {n for n in everything if ".attn." in n and n.startswith("text.")}
    elif TRANSFERS[name].settings[224].freeze_image:
        assert made.method == "frozen"
        assert trained == {n for n in everything if n.startswith("text.")}
    else:
        assert trained == everything
    # torch's decay times its learning rate is the reference's, which is not multiplied by lr.
    for group in optimizer.torch.param_groups:
        decay = group["weight_decay"] * group["lr"]
        kernels = [names[id(p)] for p in group["params"]]
        if any(n == "projector.weight" for n in kernels):
            assert decay == pytest.approx(TRANSFERS[name].settings[224].weight_decay)
        if any(n.startswith("text.") for n in kernels):
            assert decay == 0


def test_the_table_has_the_resolutions_that_the_reference_trained_at():
    for name in TRAINED:
        sides = set(TRANSFERS[name].settings)
        assert sides == {224} | ({448} - ({448} if name in SMALL else set())) | ({896} if name in LARGE else set()), (
            name
        )
    for name, transfer in TRANSFERS.items():
        assert transfer.name == name
        assert transfer.text_length in (24, 32, 48, 64, 96, 128, 512)
        for setting in transfer.settings.values():
            assert setting.weight_decay in (0.0, pytest.approx(0.1 * setting.lr), pytest.approx(3e-7))
    assert sorted(name for name, t in TRANSFERS.items() if t.beams > 1) == ["cococap", "textcaps"]
    assert min(LR_SWEEP) == pytest.approx(0.03e-5)
    assert max(LR_SWEEP) == pytest.approx(3e-5)
    assert SEARCH["epochs"] == (1, 3, 10, 30, 100)


def test_the_resolution_decides_the_numbers():
    assert recipe("gqa", data="x", resolution=224).method == "full"
    assert recipe("gqa", data="x", model="paligemma2-3b-pt-448").method == "frozen"
    assert recipe("gqa", data="x", model="paligemma2-3b-pt-448").resolution is None
    tiny = recipe("textvqa", data="x", model="tiny", resolution=112)
    assert (tiny.resolution, tiny.epochs, tiny.out) == (112, 5, "runs/transfer.textvqa-112")
    assert recipe("textvqa", data="x", resolution=896).epochs == 10
    assert recipe("gqa", data="x", resolution=896).model == "paligemma-3b-pt-896"
    assert recipe("notebook", data="x").steps == 64
    assert recipe("notebook", data="x", epochs=2).steps is None
    assert recipe("vqav2", data="x", lr=3e-6, **{"loader.batch_size": 4}).loader.batch_size == 4
    assert recipe("simple", data="mixture.yaml").form is None
    assert recipe("forkme", data="x").model == "paligemma2-3b-pt-224"


def test_what_there_is_not_is_answered_with_the_nearest(tmp_path: Path):
    with pytest.raises(OptionError, match="Did you mean 'vqav2'"):
        recipe("vqa2", data="x")
    with pytest.raises(OptionError, match="only scored"):
        recipe("pope", data="x")
    with pytest.raises(OptionError, match="Did you mean 'epochs'"):
        recipe("vqav2", data="x", epoch=3)
    with pytest.raises(OptionError, match="a side in pixels"):
        recipe("vqav2", data="x", resolution=-1, model="tiny")
    with pytest.raises(ShapeError):
        score("gqa", ["a"], [])


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("vqav2", {"image": "a.png", "qestion": "?", "answers": ["x"]}, "no column 'question'.*Did you mean 'qestion'"),
        ("vqav2", {"imgae": "a.png", "question": "?", "answers": ["x"]}, "no column 'image' or 'images'.*'imgae'"),
        ("vqav2", QUESTION | {"answers": []}, "'answers' is an empty list"),
        ("vqav2", QUESTION | {"answers": [None]}, "'answers' holds a NoneType"),
        ("gqa", QUESTION | {"answer": ["a", "b"]}, "'answer' is a list of 2"),
        ("nlvr2", {"image": "a.png", "sentence": "s", "label": True}, "1 pictures: expected 2"),
        ("nlvr2", {"images": ["a.png", "b.png"], "sentence": "s", "label": "maybe"}, "expected true or false"),
        ("aokvqa_mc", QUESTION | {"choices": ["a"], "answer": "b"}, "expected one of the choices"),
        ("aokvqa_mc", QUESTION | {"choices": ["a"], "answer": 1}, "expected one of the choices"),
        ("science_qa", QUESTION | {"choices": ["a"], "answer": 0}, "no column 'hint'"),
        ("science_qa", QUESTION | {"hint": "", "choices": ["a"] * 27, "answer": 0}, "at most 26"),
        ("coco35l", {"image": "a.png", "captions": {}}, "holds no language"),
        ("coco35l", {"image": "a.png", "captions": ["x"]}, "no column 'language'"),
        ("refcoco_seg", {"image": "a.png", "sentence": "s", "mask": 3}, "expected polygons"),
        ("refcoco_seg", {"image": "a.png", "sentence": "s", "mask": {"size": [2, 2], "counts": [5]}}, "size"),
        ("refcoco_seg", {"image": "a.png", "sentence": "s", "mask": {"size": [2, 2], "counts": [4]}}, "mask is empty"),
        ("refcoco_seg", {"image": "a.png", "sentence": "s", "mask": {"size": [2, 2], "counts": [1, 3]}}, "encoder"),
        ("msvd_qa", {"image": "a.png", "question": "?", "answer": "x"}, "no column 'video' or 'images'"),
        ("msvd_qa", {"images": [], "question": "?", "answer": "x"}, "no frames"),
        ("gqa", {"image": "../a.png", "question": "?", "answer": "x"}, "lies outside"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named_in_one_line(name: str, row: dict[str, Any], message: str, tmp_path: Path):
    source = rows_of(name, written(tmp_path, [row]), resolution=28)
    with pytest.raises(DataError, match=message) as caught:
        source[0]
    assert "train.jsonl line 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_held_out_is_asked_as_in_an_evaluation(tmp_path: Path):
    rows = [QUESTION | {"answers": [f"a{i}", f"b{i}", f"c{i}"]} for i in range(20)]
    written(tmp_path, rows)
    train, held_out, told = open_rows("vqav2", tmp_path, seed=1)
    assert (len(train), len(held_out), told) == (18, 2, "every 10th row of train")
    assert {held_out[i].suffix for i in range(2)} == {"a5", "a15"}
    assert {train[i].suffix[0] for i in range(18)} == {"a", "b", "c"}
    assert not {train[i].where for i in range(18)} & {held_out[i].where for i in range(2)}
    written(tmp_path, rows[:3], "valid.jsonl")
    train, held_out, told = open_rows("vqav2", tmp_path)
    assert (len(train), len(held_out), told) == (20, 3, "the valid split")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(OptionError, match=r"train\.jsonl"):
        open_rows("vqav2", tmp_path)


@pytest.mark.parametrize(
    "name", [name for name in GOLDEN if name not in ("simple", "forkme", "vertexai_l4", "notebook")]
)
def test_true_answers_score_fully_and_others_not(name: str):
    row = GOLDEN[name][0]
    answer = TRANSFERS[name].form({"image": "a.png"} | row, HELD)[1]
    told, best = next(iter(score(name, [answer, answer], [row, row]).items()))
    worst = score(name, ["zzz", "zzz"], [row, row])[told]
    assert worst == 0
    if told != "CIDEr":  # over two equal captions every word is common, and weighs nothing
        given = [one["answer"] if isinstance(one, dict) else one for one in row.get("answers", [answer] * 3)]
        agree = given.count(answer)
        assert best == pytest.approx(min(1, agree / 3) if told == "VQA accuracy" else 1)


def test_captions_are_scored_against_all_of_a_rows():
    rows = [{"captions": ["a red cat sits", "the cat"]}, {"captions": ["two blue dogs run", "dogs run far"]}]
    assert score("cococap", ["the cat", "dogs run far"], rows)["CIDEr"] > 1
    assert score("scicap", ["a red cat sits", "two blue dogs run"], rows)["BLEU-4"] == pytest.approx(1)
    assert score("forkme", ["x"], [{"suffix": "x"}]) == {}


def test_a_page_holds_the_table_as_it_is():
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if table() in page.read_text()]
    assert pages, "no page under docs/ holds table() of recipes/transfers: paste it anew"


def test_the_table_names_every_transfer_and_its_numbers():
    lines = table().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == list(TRANSFERS)
    (line,) = (line for line in lines if "`refcoco_seg`" in line)
    assert "224: 100 ep lr 3e-5 do 0.1 ls 0.3; 448: 100 ep lr 1e-5 ls 0.3; 896: 100 ep lr 1e-5 bs 64 ls 0.3" in line
