"""`paligemma plan`

paligemma plan transfer --model paligemma2-3b-pt-224 --device h100 --devices 8 --examples 50000 --price 2.50
paligemma plan transfer --model paligemma2-10b-pt-448 --device l40s --method lora --set loader.batch_size=4
paligemma plan runs/digits/config.yaml --device this
paligemma plan transfer --data digits/ --model paligemma2-3b-pt-224        rows are measured, as the run would

Memory per device, time per step, total time, cost and the largest batch of a recipe; no weights are read, no model is
built. Nothing fits? It says what to change.
"""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from paligemma.cli.run import table
from paligemma.cli.train import add_recipe_arguments, huge_pages, recipe_of
from paligemma.errors import OptionError

if TYPE_CHECKING:
    from paligemma.config import PaliGemmaConfig
    from paligemma.recipes.transfer import TransferRecipe
    from paligemma.train.setup import Setup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--devices", type=int, default=1, help="devices that share a step (default: 1)")
    parser.add_argument("--examples", type=int, help="rows to learn, where no --data tells")
    parser.add_argument("--text", type=int, help="text tokens of an example (default: measured, or the recipe's limit)")
    parser.add_argument("--price", type=float, metavar="MONEY", help="of one device for an hour")
    parser.add_argument("--json", action="store_true", help="the numbers as one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="tracebacks for errors")


def run(args: argparse.Namespace) -> int:
    huge_pages()  # as the run would
    from paligemma.recipes.start import config_of, steps_of
    from paligemma.train.devices import device_of
    from paligemma.train.pace import pace
    from paligemma.train.plan import advice, largest_part, plan

    if args.devices < 1:
        raise OptionError(f"--devices {args.devices}: expected at least 1.")
    recipe = recipe_of(args)
    device = device_of(args.device or "this")
    config = config_of(recipe.model, recipe.resolution)
    setup, n_examples, method, why = _setup(args, recipe, config, device)
    planned = plan(config, setup)
    speed = pace(config, setup, planned, device)
    steps = steps_of(recipe, n_examples)
    seconds = None if steps is None else steps * speed.step_s
    largest = largest_part(config, setup, device.memory_bytes)
    peak = planned.peak
    answer: dict[str, Any] = {
        "model": config.name or recipe.model, "method": method, "why": why, "device": device.name,
        "devices": setup.devices, "strategy": "fsdp" if setup.sharded else "ddp" if setup.devices > 1 else "one",
        "batch_size": setup.batch_size, "part_size": setup.rows,
        "image_tokens": setup.length(config) - setup.text_length, "text_tokens": setup.text_length,
        "memory_bytes": {
            "weights": peak.weights, "gradients": peak.gradients, "moments": peak.moments,
            "activations": peak.activations, "working": peak.working, "total": planned.total_bytes,
            "available": device.memory_bytes, "peak_at": peak.when,
        },
        "fits": planned.total_bytes <= device.memory_bytes, "largest_part": largest,
        "trained": planned.n_trained, "parameters": planned.n_values, "step_s": speed.step_s,
        "step_parts_s": {"products": speed.products, "memory": speed.memory, "links": speed.links},
        "tokens_per_s": speed.tokens_per_s, "mfu": speed.mfu,
        "steps": steps, "total_s": seconds,
        "cost": None if seconds is None or args.price is None else seconds / 3600 * args.price * setup.devices,
        "pace_source": device.shares.source,
    }  # fmt: skip
    if args.json:
        print(json.dumps(answer))
        return 0
    print(_told(answer))
    if not answer["fits"]:
        print(f"\nIt does not fit: {advice(config, setup, device.memory_bytes)}")
    return 0


def _setup(
    args: argparse.Namespace, recipe: "TransferRecipe", config: "PaliGemmaConfig", device: Any
) -> tuple["Setup", int | None, str, str]:
    """What is planned, the number of rows where it is known, the way of training and why."""
    import torch

    from paligemma.recipes.memory import setup_of
    from paligemma.recipes.rows import measure
    from paligemma.train.plan import choose_method, plan

    place, n_examples, lengths = torch.device(device.kind), args.examples, None
    if recipe.data:
        from paligemma.api.loading import find, find_tokenizer
        from paligemma.processing.processor import Processor
        from paligemma.recipes.start import open_base
        from paligemma.recipes.transfer import rows_of

        train, _, _ = rows_of(recipe, open_base(recipe))
        n_examples = n_examples or len(train)
        processor = Processor(config, find_tokenizer(find(recipe.model), None, config))
        lengths = measure(train, processor, recipe.loader.max_text, skip_broken=recipe.loader.skip_broken)
    method, why = recipe.method, "as asked"
    if method == "auto":
        setup = _of_length(setup_of(recipe, place, lengths, devices=args.devices), args.text)
        may_share = recipe.strategy != "ddp"
        method, why = choose_method(  # type: ignore[assignment]
            config, setup, device.memory_bytes, may_share=may_share
        )
    known = dataclasses.replace(recipe, method=method)
    setup = _of_length(setup_of(known, place, lengths, devices=args.devices), args.text)
    if args.devices > 1 and recipe.strategy != "ddp":
        is_needed = plan(config, setup).total_bytes > device.memory_bytes and method != "qlora"
        setup = dataclasses.replace(setup, sharded=recipe.strategy == "fsdp" or is_needed)
    return setup, n_examples, method, why


def _of_length(setup: "Setup", text: int | None) -> "Setup":
    if text is None:
        return setup
    return dataclasses.replace(setup, text_length=text, target_length=min(text, setup.target_length))


def _told(a: dict[str, Any]) -> str:
    memory, parts = a["memory_bytes"], a["step_parts_s"]
    shared = {"one": "", "ddp": ", each with the whole model", "fsdp": ", sharing the weights (FSDP)"}[a["strategy"]]
    held = ", ".join(f"{k} {_gib(memory[k])}" for k in ("weights", "gradients", "moments", "activations", "working"))
    took = ", ".join(f"{name} {_seconds(value)}" for name, value in parts.items() if value)
    rows = [
        ("plan", f"{a['model']}, {a['method']} ({a['why']})"),
        ("on", f"{a['devices']} x {a['device']}{shared}"),
        (
            "batch",
            f"{a['batch_size']:,} examples of {a['image_tokens']:,} image and {a['text_tokens']:,} text tokens; "
            f"{a['part_size']:,} at once on a device",
        ),
        ("trained", f"{a['trained']:,} of {a['parameters']:,} parameters"),
        ("memory", f"{_gib(memory['total'])} of {_gib(memory['available'])} GiB: {held} ({memory['peak_at']})"),
        ("largest", f"{a['largest_part']} examples at once on a device"),
        ("step", f"{_seconds(a['step_s'])}: {took}; {a['tokens_per_s']:,.0f} tokens/s, MFU {a['mfu']:.0%}"),
    ]
    if a["steps"] is not None:
        cost = "" if a["cost"] is None else f", {a['cost']:,.2f} at that price"
        rows.append(("run", f"{a['steps']:,} steps in {_duration(a['total_s'])}{cost}"))
    rows.append(("pace", a["pace_source"]))
    return table(rows)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
