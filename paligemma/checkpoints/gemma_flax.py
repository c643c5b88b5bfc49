"""Gemma under its own Flax names, as an Orbax checkpoint gives them once it is converted to `.npz`.

transformer/layer_3/attn/q_einsum/w  [H, D, d]      one array per layer where big_vision stacks all layers
transformer/layer_3/mlp/gating_einsum[/w]           [2, D, F], or [2, F, D]
transformer/embedder/input_embedding                256,000 rows, or 256,128 with padding
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from paligemma.checkpoints.big_vision import Tree
from paligemma.checkpoints.files import Spec
from paligemma.checkpoints.rules import Rule


def flax_tree(specs: Mapping[str, Spec]) -> Tree | None:
    """Gemma's own Flax names, one array per layer and no layer axis, in big_vision's words: llm/layers_{i}/…

    None for another archive.
    """
    if not any(re.match(r"(params/)?(transformer/)?layer_\d+/", name) for name in specs):
        return None
    names: dict[str, str] = {}
    for full in specs:
        name = re.sub(r"^(params/)?(transformer/)?", "", full)
        name = re.sub(r"^layer_(\d+)/", r"llm/layers_\1/", name)
        name = re.sub(r"^(?=(embedder|final_norm)/)", "llm/", name)
        names[re.sub(r"(/mlp/(gating_einsum|linear))/w$", r"\1", name)] = full
    return Tree(names, {name: specs[full] for name, full in names.items()})


def stacked_specs(specs: Mapping[str, Spec]) -> Mapping[str, Spec]:
    """Unstacked layers as if they were stacked, so that sizes and variants are read off in one way."""
    layers = {int(found[1]) for name in specs if (found := re.match(r"llm/layers_(\d+)/", name))}
    if not layers:
        return specs
    first = f"llm/layers_{min(layers)}/"
    depth = max(layers) + 1
    return {
        (name.replace(first, "llm/layers/") if name.startswith(first) else name): (
            Spec((depth, *spec.shape), spec.dtype) if name.startswith(first) else spec
        )
        for name, spec in specs.items()
    }


def unstacked(rule: Rule) -> Rule:
    """The rule for one array per layer that big_vision keeps in a stack."""
    if not rule.foreign.startswith("llm/layers/"):
        return rule
    return replace(
        rule, foreign=rule.foreign.replace("llm/layers/", "llm/layers_{i}/"), dims=rule.dims.removeprefix("L ")
    )
