"""Adapters between a model in memory and PEFT folders: written so that peft itself loads them, hung on when read.

The modules are named as transformers 5 names them (layout C), the targets as one regular expression that matches just
the modules that have matrices, so that the image tower's equally named layers stay out.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paligemma.checkpoints import hugging_face
from paligemma.checkpoints.files import Spec
from paligemma.checkpoints.lora import Adapter
from paligemma.checkpoints.rules import depth_of
from paligemma.checkpoints.safetensors_io import SafetensorsWriter
from paligemma.checkpoints.staging import Staging
from paligemma.config import PaliGemmaConfig
from paligemma.errors import CheckpointError
from paligemma.models.lora import DEFAULT, Lora, LoraOptions, adapters_of, linears_of, put
from paligemma.models.paligemma import PaliGemmaModel


def write_adapter(
    folder: str | Path,
    model: PaliGemmaModel,
    options: LoraOptions,
    *,
    name: str = DEFAULT,
    base: str = "",
    overwrite: bool = False,
) -> Path:
    """Write one adapter of a model as a PEFT folder.

    Args:
        options: with which it was made.
        base: hub id or path of the weights it was trained on, for `base_model_name_or_path`.

    Raises:
        CheckpointError: the model has no such adapter, the folder holds one already, or the disk is full.
    """
    path = Path(folder)
    layers = adapters_of(model).get(name)
    if not layers:
        raise CheckpointError(f"the model has no adapter {name!r}: expected one of {', '.join(adapters_of(model))}.")
    modules = peft_modules(model.config)
    tensors: dict[str, Tensor] = {}
    for native, adapter in layers.items():
        stem = f"base_model.model.{modules[native]}"
        tensors[f"{stem}.lora_A.weight"] = adapter.a
        tensors[f"{stem}.lora_B.weight"] = adapter.b
        if adapter.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = adapter.magnitude
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": target_expression([modules[native] for native in layers]),
        "bias": "none",
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with Staging(path, overwrite=overwrite) as staged:
        specs = {key: Spec(tuple(t.shape), t.dtype) for key, t in tensors.items()}
        writer = SafetensorsWriter(staged.open("adapter_model.safetensors"), specs, {"format": "pt"})
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        writer.finish()
        staged.open("adapter_config.json").write((json.dumps(settings, indent=2) + "\n").encode())
        staged.commit()
    return path


def load_adapter(
    model: PaliGemmaModel, adapter: Adapter, *, name: str = DEFAULT, make_active: bool = True
) -> LoraOptions:
    """Hang an adapter onto a model beside those it has.

    Returns:
        Options that describe it; ranks and strengths may still differ from layer to layer.

    Raises:
        CheckpointError: it changes more than linear layers, which only `merge` can do.
        OptionError: a name that a module cannot have.
    """
    if adapter.replaced:
        raise CheckpointError(
            f"{adapter.path}: replaces {next(iter(adapter.replaced))} as a whole: expected matrices for linear layers "
            "only. Merge it into the weights instead (adapter= of load, `paligemma checkpoint merge`)."
        )
    linears = linears_of(model)
    for native in adapter.deltas:
        if native.removesuffix(".weight") not in linears:
            raise CheckpointError(
                f"{adapter.path}: changes {native}, which is no linear layer: expected only those. Merge it into the "
                "weights instead."
            )
    settings = adapter.config
    options = LoraOptions(
        rank=settings.r, alpha=settings.alpha, use_dora=settings.use_dora, use_rslora=settings.use_rslora
    )
    for native, delta in adapter.deltas.items():
        path = native.removesuffix(".weight")
        made = Lora(linears[path], LoraOptions(rank=delta.a.shape[0], use_dora=delta.magnitude is not None))
        made.scale = delta.scale
        with torch.no_grad():
            made.a.copy_(delta.a)
            made.b.copy_(delta.b)
            if made.magnitude is not None and delta.magnitude is not None:
                made.magnitude.copy_(delta.magnitude.reshape(-1))
        put(model, path, name, made.eval(), make_active=make_active)
    return options


def peft_modules(config: PaliGemmaConfig) -> dict[str, str]:
    """Native module path -> module path in transformers 5, of every layer with a weight."""
    found: dict[str, str] = {}
    for rule in hugging_face.rules_for(config.text.post_norms):
        for i in range(depth_of(rule.native, config)):
            native, foreign = rule.native.format(i=i), hugging_face.in_layout(rule.foreign.format(i=i), "C")
            if native.endswith(".weight") and foreign.endswith(".weight"):
                found[native.removesuffix(".weight")] = foreign.removesuffix(".weight")
    return found


def target_expression(modules: list[str]) -> str:
    """One regular expression for just these modules: equal paths up to the number of a layer share a branch.

    >>> target_expression(["model.layers.0.q_proj", "model.layers.1.q_proj"])
    '(model\\\\.layers\\\\.(0|1)\\\\.q_proj)'
    """
    branches: dict[str, list[str]] = {}
    for path in modules:
        number = re.search(r"\.(\d+)\.", path)
        stem = path if number is None else f"{path[: number.start()]}.#.{path[number.end() :]}"
        branches.setdefault(stem, []).append(number[1] if number else "")
    written: list[Any] = [
        re.escape(stem).replace(r"\#", f"({'|'.join(numbers)})") if numbers[0] else re.escape(stem)
        for stem, numbers in branches.items()
    ]
    return f"({'|'.join(written)})"
