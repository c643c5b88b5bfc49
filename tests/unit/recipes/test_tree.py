"""Recipes as trees: there and back, single leaves, and every mistake answered by name."""

import pytest
import yaml

from paligemma.errors import OptionError
from paligemma.recipes.transfer import TransferRecipe
from paligemma.recipes.tree import changed, from_tree, leaves, to_tree
from paligemma.train.schedule import Duration, Schedule

RECIPE = TransferRecipe(data="x")


def test_a_recipe_survives_yaml():
    special = changed(
        RECIPE,
        {
            "optim.schedules": [["image", None], ["text", {"kind": "linear", "warmup": {"steps": 3}}]],
            "lora.targets": "[decoder, vision]",
            "lr": "3e-5",
        },
    )
    assert special.optim.schedules == (("image", None), ("text", Schedule(kind="linear", warmup=Duration(steps=3))))
    assert special.lora.targets == ("decoder", "vision")
    text = yaml.safe_dump(to_tree(special))
    assert from_tree(RECIPE, yaml.safe_load(text)) == special


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("optim.lr", "1e-5", 1e-5),
        ("optim.clip_norm", "none", None),
        ("optim.betas", "[0.9, 0.98]", (0.9, 0.98)),
        ("fit.steps", "20", 20),
        ("fit.steps", "2e1", 20),
        ("fit.precision", "bfloat16", "bfloat16"),
        ("loader.part-size", "4", 4),
        ("merge", "false", False),
        ("model", "7", "7"),
        ("epochs", "3", 3.0),
        ("optim.schedule.warmup.percent", "0.1", 0.1),
    ],
)
def test_a_leaf_is_set_from_text(name, text, value):
    recipe = changed(RECIPE, {name: text})
    found = recipe
    for part in name.replace("-", "_").split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optim.learning_rate", "1", "the recipe has no 'optim.learning_rate'"),
        ("optim.clipnorm", "1", "Did you mean 'optim.clip_norm'"),
        ("epoch", "1", "Did you mean 'epochs'"),
        ("epochs.x", "1", "has no fields"),
        ("fit.steps", "many", "expected a whole number"),
        ("fit.steps", "1.5", "expected a whole number"),
        ("merge", "perhaps", "expected true or false"),
        ("method", "lroa", "expected one of auto, full"),
        ("optim.betas", "[0.9]", r"fit|betas"),
        ("loader.arrange", "packed", "expected one of bucket, pack"),
    ],
)
def test_a_mistake_is_answered_by_name(name, text, message):
    with pytest.raises(OptionError, match=message):
        changed(RECIPE, {name: text})


def test_every_leaf_can_be_named():
    names = leaves(RECIPE)
    assert {"data", "optim.lr", "optim.schedule.warmup.steps", "lora.rank", "loader.batch_size"} <= set(names)
    assert len(names) == len(set(names))
