"""`paligemma train`

paligemma train transfer --data digits/                       the way of training that fits the memory here
paligemma train transfer --data digits/ --model paligemma2-3b-pt-224 --method lora --out runs/digits
paligemma train transfer --data digits/ --set optim.clip_norm=0.5 --set loader.batch_size=16
paligemma train runs/digits/config.yaml --set epochs=20 --out runs/longer
paligemma train transfer --data animals-coco/ --task detect   annotations of COCO, YOLO or VOC, prompts by a builder
paligemma train transfer.vqav2 --data vqav2/                  a published transfer, with its prompts and numbers
paligemma train stage1 --data mixture.yaml --model stage0/    a stage of pre-training; stage2_448, stage2_896, mix
paligemma train transfer --data digits/ --show                every number of the recipe, nothing is run

Data are a folder with train.jsonl (rows of image, prefix and suffix; valid.jsonl or test.jsonl where there are), any
other format that `paligemma data` knows, or the YAML file of a mixture. An interrupted run goes on where it stopped:
call the same command again. Stage 0 is `paligemma checkpoint assemble`.
"""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma.cli.args import add_reading_options
from paligemma.cli.run import column, note, pair
from paligemma.errors import OptionError, nearest

if TYPE_CHECKING:
    from paligemma.recipes.transfer import TransferRecipe

LENGTHS = ("steps", "examples", "epochs")  # of a run: the first that is given decides
RECIPES = ("transfer", "stage1", "stage2_448", "stage2_896", "mix")
SHORT = {
    "data": "folder or file of examples, or a mixture in YAML",
    "task": "builder of prompts for annotations: detect, segment, caption, …",
    "format": "of the data (default: auto)",
    "model": "what to start from (default: tiny)",
    "resolution": "side of the pictures, if another than the model's",
    "out": "folder of the run (default: runs/RECIPE)",
    "method": "auto, full, frozen, lora, dora, qlora (default: auto)",
    "epochs": "passes over the examples (default: 10), in place of a recipe's examples or steps",
    "steps": "updates, in place of epochs",
    "lr": "learning rate (default: 1e-5, adapters 2e-4; models below 100 million parameters 1e-3, 3e-3)",
    "device": "auto, cpu, cuda, mps (default: auto)",
}


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe and changes to it."""
    parser.add_argument("recipe", metavar="RECIPE", help=f"{', '.join(RECIPES)}, transfer.NAME, or a saved YAML file")
    for name, text in SHORT.items():
        parser.add_argument(f"--{name}", metavar=name.upper(), help=text)
    add_reading_options(parser)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="change any number of the recipe, as in --set optim.weight_decay=1e-6",
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="go on with the run in --out (default: auto)"
    )
    parser.add_argument("--export", choices=("hf",), help="hf: a folder that transformers loads (the default)")
    parser.add_argument("--show", action="store_true", help="print the recipe and stop")
    parser.add_argument("--json", action="store_true", help="the scores as one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="tracebacks for errors")


def huge_pages() -> None:
    """Have torch ask for huge pages, before it is imported: a full step on a CPU is half as long again without."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def run(args: argparse.Namespace) -> int:
    huge_pages()
    import yaml

    from paligemma.recipes.transfer import run as transfer
    from paligemma.recipes.tree import to_tree

    recipe = recipe_of(args)
    if args.show:
        print(yaml.safe_dump(to_tree(recipe), sort_keys=False), end="")
        return 0
    if not recipe.data:
        raise OptionError("no examples: expected --data with a folder or file of them.")
    result = transfer(recipe, resume=args.resume, say=note)
    if not result.finished:
        note(f"stopped; the same command goes on from {result.folder}")
        return 0
    if args.json:
        import json

        scores = None if result.report is None else result.report.to_dict()
        print(json.dumps({"model": str(result.model or result.adapter), "scores": scores}))
    return 0


def recipe_of(args: argparse.Namespace) -> "TransferRecipe":
    """The recipe that the words of a command line mean.

    Raises:
        OptionError: an unknown recipe, number or value.
    """
    from paligemma.recipes.transfer import TransferRecipe
    from paligemma.recipes.tree import changed, from_tree

    changes: dict[str, Any] = {name: value for name in SHORT if (value := getattr(args, name)) is not None}
    for word in args.changes:
        name, equals, value = word.partition("=")
        if not equals:
            raise OptionError(f"--set {word}: expected NAME=VALUE, for example --set optim.clip_norm=0.5.")
        changes[name.strip()] = value.strip()
    # How long a run is stands in one of three fields; a longer-lived one must not win over the one that is asked for.
    for i, name in enumerate(LENGTHS):
        if name in changes:
            changes = {**dict.fromkeys(LENGTHS[:i], None), **changes}
    path = Path(args.recipe)
    if path.suffix in (".yaml", ".yml"):
        recipe = from_tree(TransferRecipe(data=args.data or ""), read_yaml(path))
    else:
        recipe = named(args.recipe, args.data or "", args.model, changes)
    recipe = changed(recipe, changes)
    if fields := [pair(word, "--task-field") for word in getattr(args, "task_field", [])]:
        recipe = dataclasses.replace(recipe, task_fields=(*recipe.task_fields, *fields))
    if columns := [column(word) for word in getattr(args, "column", [])]:
        before = dict(dict(recipe.data_options).get("columns") or {})
        others = tuple(option for option in recipe.data_options if option[0] != "columns")
        joined = ("columns", tuple({**before, **dict(columns)}.items()))
        recipe = dataclasses.replace(recipe, data_options=(*others, joined))
    return recipe


def named(name: str, data: str, model: str | None, changes: dict[str, Any]) -> "TransferRecipe":
    """A recipe by its name; what it starts from decides some of its numbers.

    Args:
        changes: to it; those from which other numbers follow are taken out.

    Raises:
        OptionError: no such recipe, or a stage without a model to start from.
    """
    from paligemma.recipes.transfer import TransferRecipe
    from paligemma.recipes.tree import changed, from_tree_field

    if name == "transfer":
        return TransferRecipe(data=data)
    resolution = str(changes.get("resolution", ""))
    given: dict[str, Any] = {"resolution": int(resolution)} if resolution.isdigit() else {}
    if name.startswith("transfer."):
        from paligemma.recipes import transfers

        if "method" in changes and "lr" not in changes:
            given["method"] = changes["method"]
        return transfers.recipe(name.removeprefix("transfer."), data=data, model=model, **given)
    if name in ("stage0", "stage_0"):
        raise OptionError(
            "stage 0 trains nothing: expected `paligemma checkpoint assemble --vision … --text … --out …`."
        )
    if name not in RECIPES:
        raise OptionError(
            f"there is no recipe '{name}': expected {', '.join(RECIPES)}, transfer.NAME or a YAML file."
            f"{nearest(name, RECIPES)}"
        )
    from paligemma.recipes import stages
    from paligemma.recipes.start import config_of

    if model is None:
        raise OptionError(f"{name} without --model: expected what it starts from, the folder that stage 0 or 1 wrote.")
    own = {f.name for f in dataclasses.fields(stages.Stage)} - {f.name for f in dataclasses.fields(TransferRecipe)}
    for field in own & set(changes):
        given[field] = from_tree_field(stages.Stage, field, changes.pop(field))
    # The slight crop of `robust` is a part of `augmentation`, made with the stage.
    of_robust = {path: changes.pop(path) for path in list(changes) if path.split(".")[0] == "robust"}
    given["robust"] = changed(stages.STAGES[name], of_robust).robust
    return stages.recipe(name, data=data, model=model, config=config_of(model), **given)


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe that was saved.

    Raises:
        OptionError: no such file, or no YAML mapping.
    """
    import yaml

    if not path.is_file():
        raise OptionError(f"{path}: no such file: expected a recipe in YAML.")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise OptionError(f"{path}: not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(tree, dict):
        raise OptionError(f"{path}: expected a mapping of the recipe's fields.")
    return tree
