"""Stages are recipes whose numbers are those of the reports, and whose learning rate is one curve."""

import argparse

import pytest
import torch
import yaml

from paligemma.cli.train import add_arguments, recipe_of
from paligemma.data.convert import write_split
from paligemma.data.world.records import WorldRecords
from paligemma.errors import OptionError
from paligemma.presets import MODEL_PRESETS
from paligemma.recipes.rows import mixture_of
from paligemma.recipes.stages import STAGES, recipe
from paligemma.recipes.start import config_of, open_base, settled
from paligemma.recipes.transfer import TransferRecipe, as_learned, rows_of
from paligemma.recipes.tree import changed, from_tree, to_tree
from paligemma.train.optim import first_match
from paligemma.train.schedule import Duration, Schedule
from paligemma.train.setup import Setup, trained_names


def of(name: str, preset: str = "paligemma2-3b-224", **changes: object) -> TransferRecipe:
    return recipe(name, data="mixture.yaml", model="stage0", config=MODEL_PRESETS[preset], **changes)


@pytest.mark.parametrize(
    ("preset", "lr"),
    [
        ("paligemma-3b-224", 2e-5),
        ("paligemma2-3b-224", 1e-5),
        ("paligemma2-10b-224", 5e-6),
        ("paligemma2-28b-224", 5e-6),
    ],
)
def test_the_learning_rate_is_that_of_the_size(preset, lr):
    assert of("stage1", preset).lr == lr


def test_stages_see_what_the_reports_say():
    seen = {name: (of(name).resolution, of(name).examples, of(name).loader.max_text) for name in STAGES}
    assert seen == {
        "stage1": (224, 1_000_000_000, 129), "stage2_448": (448, 50_000_000, 513), "stage2_896": (896, 10_000_000, 513),
        "mix": (448, None, 513),
    }  # fmt: skip
    assert of("mix").epochs == 10
    assert of("mix", resolution=224).loader.max_text == 257
    assert of("mix", resolution=224, text_length=300).loader.max_text == 301


def test_stage_two_draws_what_needs_pixels_more_often(tmp_path):
    parts = {name: WorldRecords(20, seed=i) for i, name in enumerate(("seen", "read"))}
    for name, records in parts.items():
        write_split(records, tmp_path / name, to="coco", split="train")
    sources = {"seen": {"data": "seen", "task": "presence"}, "read": {"data": "read", "task": "detect"}}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"sources": sources}, sort_keys=False))
    shares = {}
    for name in ("stage1", "stage2_448", "stage2_896"):
        made = recipe(name, data=str(tmp_path / "mixture.yaml"), model="tiny", config=config_of("tiny"))
        train, _, _ = rows_of(made, open_base(made))
        shares[name] = mixture_of(as_learned(made, train)).shares
    assert shares == {"stage1": (0.5, 0.5), "stage2_448": (0.25, 0.75), "stage2_896": (0.25, 0.75)}


def test_only_the_second_generation_has_soft_caps():
    assert dict(of("stage1").choices) == {"attn_logits_softcap": 50.0, "final_logits_softcap": 30.0}
    assert dict(of("mix").choices) == {"attn_logits_softcap": 50.0, "final_logits_softcap": None}
    assert of("stage1", "paligemma-3b-224").choices == ()


def factor(recipe: TransferRecipe, step: int, image: bool = False) -> float:
    schedule = dict(recipe.optim.schedules).get("vision") if image else None
    chosen = schedule or recipe.optim.schedule
    total = round(recipe.examples / recipe.loader.batch_size)
    return chosen.factor(step, total, batch_size=recipe.loader.batch_size)


def test_the_curve_goes_on_from_stage_to_stage():
    stages = [of(name) for name in ("stage1", "stage2_448", "stage2_896")]
    steps = [round(stage.examples / stage.loader.batch_size) for stage in stages]
    for before, after, n in zip(stages, stages[1:], steps, strict=False):
        for image in (False, True):
            assert factor(after, 0, image) == pytest.approx(factor(before, n, image), rel=1e-4)
            assert factor(after, 0, image) > factor(after, 1, image)


@pytest.mark.parametrize("batch_size", [64, 1024])
def test_the_curve_goes_on_whatever_a_batch_holds(batch_size):
    first, second = (changed(of(name), {"loader.batch_size": batch_size}) for name in ("stage1", "stage2_448"))
    for image in (False, True):
        end = factor(first, round(first.examples / batch_size), image)
        assert factor(second, 0, image) == pytest.approx(end, rel=1e-4)


def test_the_curve_goes_on_where_the_next_stage_has_another_batch_or_the_first_was_shorter():
    short = {"examples": 10**8, "image_ramp": 10**7}
    first, second = of("stage1", **short), of("stage2_448", seen_before=10**8, image_ramp_before=10**7, batch_size=2048)
    for image in (False, True):
        end = factor(first, round(first.examples / first.loader.batch_size), image)
        assert end < 0.7
        assert factor(second, 0, image) == pytest.approx(end, rel=1e-3)


def test_a_stage_that_cannot_be_is_refused_with_the_way_out():
    with pytest.raises(OptionError, match=r"seen_before=50000000 and image_ramp_before=100000000.*image_ramp_before=5"):
        of("stage2_448", seen_before=50_000_000)
    for field, value in {
        "schedule": "linear", "resolution": 0, "text_length": -5, "timescale": 0, "attn_logits_softcap": -3.0,
        "examples": 0, "reweight": (("ocr", -5.0),),
    }.items():  # fmt: skip
        with pytest.raises(OptionError, match=field):
            of("stage2_448", **{field: value})


def test_a_time_scale_of_nothing_is_refused_in_any_unit():
    for nothing in (0.0, -1.0, Duration(), Duration(steps=0), Duration(examples=0)):
        with pytest.raises(OptionError, match="timescale"):
            Schedule(kind="rsqrt", timescale=nothing)
    assert Schedule(kind="rsqrt", timescale=Duration(examples=80)).factor(10, 100, batch_size=8) == pytest.approx(
        0.5**0.5
    )


def test_a_learning_rate_of_nothing_is_not_the_default():
    with pytest.raises(OptionError, match="lr=0"):
        TransferRecipe(data="x", lr=0.0)


def test_the_command_line_changes_the_slight_crop_with_the_rest_of_robust():
    def told(*changes: str) -> TransferRecipe:
        words = [word for change in changes for word in ("--set", change)]
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return recipe_of(parser.parse_args(["stage2_448", "--model", "tiny", "--data", "x", *words]))

    assert told().augmentation.crop == 1
    assert not told("robust=none").augmentation.is_on
    changed_area = told("robust.crop_area=[0.5,1]", "robust.jpeg_probability=0.9")
    assert changed_area.augmentation.crop_area == (0.5, 1.0)
    assert changed_area.robust.jpeg_probability == 0.9
    assert told("robust=none", "augmentation.flip=0.5").augmentation.flip == 0.5
    with pytest.raises(OptionError, match=r"robust\.crop_area"):
        told("robust.crop_aera=[0.5,1]")


def test_a_frozen_tower_rests_in_stages_too():
    stage = settled(of("stage1"), "frozen", 1000, torch.device("cpu"))
    names = ["vision.blocks.0.mlp.up.weight", "projector.weight", "text.blocks.0.mlp.up.weight"]
    found = [first_match(stage.optim.schedules, name, stage.optim.schedule) for name in names]
    assert found == [None, None, stage.optim.schedule]
    config = MODEL_PRESETS["paligemma2-3b-224"]
    trained = trained_names(config, Setup(method="frozen", optim=of("stage1").optim))
    assert {name.split(".")[0] for name in trained} == {"text"}


def test_a_stage_without_a_configuration_asks_the_model(tmp_path):
    first = recipe("stage1", data="mixture.yaml", model="paligemma-3b-224")
    assert (first.lr, first.choices) == (2e-5, ())
    assert recipe("stage1", data="mixture.yaml", model="google/paligemma-3b-pt-224").choices == ()
    assert recipe("stage1", data="mixture.yaml", model="paligemma2-10b-pt-224").lr == 5e-6


def test_the_image_tower_begins_slowly_and_catches_up():
    stage = of("stage1")
    ramp = round(100_000_000 / stage.loader.batch_size)
    for step in (100, 1000, ramp // 2):
        assert factor(stage, step, image=True) < factor(stage, step)
    assert factor(stage, 2 * ramp, image=True) == pytest.approx(factor(stage, 2 * ramp), rel=0.25)


def test_robust_pictures_are_of_stages_one_and_two_alone():
    assert of("stage1").robust is not None
    assert of("stage1").augmentation.crop == 1
    assert of("mix").robust is None
    assert not of("mix").augmentation.is_on
    assert of("stage1", robust=None).augmentation.is_on is False


def test_a_saved_stage_is_the_same_stage():
    for name in STAGES:
        whole = of(name)
        assert from_tree(TransferRecipe(data=""), to_tree(whole)) == whole


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("stage0", {}, "stage0 trains nothing.*paligemma checkpoint assemble"),
        ("stage3", {}, "there is no stage 'stage3'.*Did you mean 'stage1'"),
        ("stage1", {"image_rampp": 3}, "a stage has no 'image_rampp'.*Did you mean 'image_ramp'"),
    ],
)
def test_typos_are_answered_with_the_nearest(name, changes, message):
    with pytest.raises(OptionError, match=message):
        of(name, **changes)
