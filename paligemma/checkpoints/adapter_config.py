"""adapter_config.json of PEFT: which modules an adapter changes, and how strongly."""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paligemma.checkpoints.hugging_face import read_json
from paligemma.errors import CheckpointError

# Fields without a bearing on the merged weights.
_HARMLESS = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "fan_in_fan_out",
)  # fmt: skip
_READ = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "bias", "use_rslora", "use_dora", "modules_to_save",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights",
)  # fmt: skip
# Fields that change the mathematics in ways a merge here does not know: allowed only while off.
_REFUSED = {
    "layer_replication": "it repeats layers of the base model",
    "use_qalora": "its A matrices work on pooled inputs",
    "alora_invocation_tokens": "it acts only after certain tokens, so it cannot be merged",
    "trainable_token_indices": "it replaces single rows of the embedding table",
    "target_parameters": "it targets bare parameters",
    "megatron_config": "it splits layers over devices",
    "lora_bias": "its B matrices have biases, and Gemma's layers have none to add them to",
    "use_bdlora": "its matrices are block diagonal",
    "arrow_config": "it routes between adapters by token",
    "kasa_config": "it changes singular values of the base weights",
    "monteclora_config": "it samples its matrices",
}
# Initialisations that also changed the base weights: A and B alone do not say what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of adapter_config.json that decide what is merged where."""

    r: int
    alpha: float
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base: str = ""

    def rank(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) when rank-stabilised."""
        rank = self.rank(module)
        return float(_by_pattern(self.alpha_pattern, module, self.alpha)) / (
            math.sqrt(rank) if self.use_rslora else rank
        )

    def saves(self, module: str) -> bool:
        """Whether a module is trained and saved in full."""
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save)

    def targets(self, module: str, is_linear: bool) -> bool:
        """Whether PEFT puts a LoRA pair on the module of this path."""
        if _listed(self.exclude_modules, module) or self.saves(module):
            return False
        targets = self.target_modules
        if isinstance(targets, str):
            return is_linear if targets.lower() == "all-linear" else re.fullmatch(targets, module) is not None
        if module in targets:
            return True
        if not _listed(targets, module):
            return False
        return not self.layers_to_transform or self._layer_of(module) in self.layers_to_transform

    def _layer_of(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return int(found[1]) if found else None


def _listed(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def parse_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json; warn about unknown fields, refuse what a merge could not honour.

    Raises:
        CheckpointError: missing, not LoRA, or with a field that changes the mathematics.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no adapter_config.json: expected a PEFT folder. Check the path.")
    values = read_json(path)
    if values.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type={values['peft_type']!r}: expected 'LORA', the only kind that can be merged."
        )
    for name, why in _REFUSED.items():
        if values.get(name):
            raise CheckpointError(f"{path}: {name}={values[name]!r} cannot be merged: {why}. Use peft itself.")
    init = str(values.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights={init!r} changed the base weights too: expected an adapter to plain weights. "
            "Convert it with peft's path_initial_model_for_weight_conversion, or merge it with peft itself."
        )
    unknown = sorted(set(values).difference(_HARMLESS, _READ, _REFUSED))
    if unknown:
        warnings.warn(f"{path}: unknown fields ignored: {', '.join(unknown)}.", stacklevel=3)
    if values.get("fan_in_fan_out"):
        warnings.warn(f"{path}: fan_in_fan_out=true has no meaning for linear layers; ignored.", stacklevel=3)
    try:
        return _build(values)
    except (TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{path}: a field has the wrong type ({error}). Save the adapter again.") from None


def _build(values: Mapping[str, Any]) -> AdapterConfig:
    rank = int(values.get("r", 8))
    return AdapterConfig(
        r=rank,
        alpha=float(values.get("lora_alpha", 8)),
        target_modules=_names(values.get("target_modules")),
        exclude_modules=_names(values.get("exclude_modules")),
        modules_to_save=tuple(values.get("modules_to_save") or ()),
        bias=str(values.get("bias", "none")),
        use_rslora=bool(values.get("use_rslora")),
        use_dora=bool(values.get("use_dora")),
        layers_to_transform=_tuple(values.get("layers_to_transform"), int),
        layers_pattern=_tuple(values.get("layers_pattern"), str),
        rank_pattern=dict(values.get("rank_pattern") or {}),
        alpha_pattern=dict(values.get("alpha_pattern") or {}),
        base=str(values.get("base_model_name_or_path") or ""),
    )


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())


def _tuple(value: Any, kind: type) -> tuple[Any, ...]:
    if value is None or isinstance(value, kind):
        return () if value is None else (value,)
    return tuple(kind(item) for item in value)
