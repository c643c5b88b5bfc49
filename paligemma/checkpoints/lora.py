"""PEFT LoRA adapters: read, checked against the model they are for, merged in float32.

An adapter names its tensors by module path in the transformers release that trained it, so the same weights come in
several spellings; `hugging_face.normalise` brings them together. What an adapter asks for and this file cannot do is
refused, never skipped.

    W' = W + s · B A,  s = alpha / r, or alpha / sqrt(r) with rsLoRA        DoRA: W' = m / ‖W + sBA‖_row · (W + sBA)

Source: peft 0.21, src/peft/tuners/lora/layer.py, config.py, utils/save_and_load.py.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from paligemma.checkpoints import hugging_face
from paligemma.checkpoints.adapter_config import AdapterConfig, parse_adapter_config
from paligemma.checkpoints.files import Spec
from paligemma.checkpoints.identify import refuse_pickle
from paligemma.checkpoints.rules import TABLE, depth_of, native_shapes
from paligemma.checkpoints.safetensors_io import SafetensorsFiles
from paligemma.checkpoints.state import State, as_state
from paligemma.config import PaliGemmaConfig
from paligemma.errors import CheckpointError

_Kind = Literal["A", "B", "embedding_A", "embedding_B", "magnitude"]
_UNTIED = (
    "{} the embedding table and the output head apart: PaliGemma ties the two, so no merged weights can hold both. "
    "Train with ensure_weight_tying=True, or leave embed_tokens and lm_head out."
)
_NAME = re.compile(
    r"(?P<module>.+?)\.(?:lora_(?P<pair>A|B|embedding_A|embedding_B)|lora_(?P<magnitude>magnitude)_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?"
)


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight."""

    a: Tensor  # [r, in], of an embedding [r, V], of a convolution [r, in, k, k]
    b: Tensor  # [out, r]
    scale: float
    magnitude: Tensor | None = None  # DoRA: [out]
    is_embedding: bool = False

    def apply(self, weight: Tensor) -> Tensor:
        """The merged weight in float32."""
        update: Tensor = self.scale * (self.b.float().flatten(1) @ self.a.float().flatten(1))
        merged = weight.float() + (update.T if self.is_embedding else update.reshape(weight.shape))
        if self.magnitude is None:
            return merged
        norms = torch.linalg.vector_norm(merged, dim=1)
        scaled: Tensor = merged * (self.magnitude.float().reshape(-1) / norms)[:, None]
        return scaled


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in native names.

    Attributes:
        deltas: native weight name -> what is added to it.
        replaced: native names that the adapter trained in full (`modules_to_save`, biases).
        base: the repository or folder it was trained on, as it says.
    """

    path: Path
    config: AdapterConfig
    deltas: Mapping[str, Delta]
    replaced: Mapping[str, Tensor]
    base: str = ""
    dropped: Mapping[str, str] = field(default_factory=dict)


def read_adapter(folder: str | Path, config: PaliGemmaConfig, *, strict: bool = True) -> Adapter:
    """Read a PEFT folder for a model of this configuration.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        strict: refuse tensors without a place, and modules that the configuration targets but the file lacks; False
            warns about them.

    Raises:
        CheckpointError: not a LoRA adapter, another model's, incomplete, or of a kind that cannot be merged.
        PickleRefused: only adapter_model.bin is there.
    """
    path = Path(folder)
    settings = parse_adapter_config(path)
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        if (path / "adapter_model.bin").is_file():
            raise refuse_pickle(path / "adapter_model.bin")
        raise CheckpointError(f"{path}: no adapter_model.safetensors: expected it beside its config.")
    file = SafetensorsFiles([weights])
    try:
        return _Reader(path, settings, config, file).read(strict)
    finally:
        file.close()


class _Reader:
    """Sorts the tensors of one adapter file into deltas, replacements and what is left."""

    def __init__(self, path: Path, settings: AdapterConfig, config: PaliGemmaConfig, file: SafetensorsFiles) -> None:
        self.path, self.settings, self.file = path, settings, file
        self.shapes = native_shapes(config)
        self.natives = _natives(config)
        self.unknown: list[str] = []

    def read(self, strict: bool) -> Adapter:
        parts: dict[str, dict[str, str]] = {}  # module path as trained -> kind -> tensor name
        replaced: dict[str, Tensor] = {}
        for name in self.file.specs:
            plain = name.removeprefix("base_model.model.")
            found = _NAME.fullmatch(plain)
            if found:
                if found["leaf"] == ".bias":
                    raise CheckpointError(f"{self.path}: {name}: a LoRA bias cannot be merged (lora_bias=true).")
                kind = found["pair"] or "magnitude"
                module = found["module"]
                if kind in parts.setdefault(module, {}):
                    raise CheckpointError(f"{self.path}: {name} and {parts[module][kind]} are the same tensor twice.")
                parts[module][kind] = name
            else:
                self._replacement(name, plain, replaced)
        self._require_tied_replacement(replaced)
        deltas = self._deltas(parts)
        missing, extra = _compare(self.settings, list(parts), self.natives)
        problems = [f"{module} is targeted, but has no tensors" for module in missing]
        problems += [f"{module} has tensors, but is not targeted" for module in extra]
        problems += [f"{name} has no place in this model" for name in self.unknown]
        if problems:
            text = f"{self.path}: adapter_config.json, tensors and model disagree {len(problems)} times: {problems[0]}"
            if strict:
                raise CheckpointError(f"{text}. Expected the adapter of this very model; strict=False takes what fits.")
            warnings.warn(f"{text}.", stacklevel=3)
        dropped = dict.fromkeys(self.unknown, "unknown; dropped because strict=False")
        return Adapter(self.path, self.settings, deltas, replaced, self.settings.base, dropped)

    def _deltas(self, parts: Mapping[str, Mapping[str, str]]) -> dict[str, Delta]:
        deltas: dict[str, Delta] = {}
        for module, kinds in parts.items():
            inner = hugging_face.normalise(f"{module}.weight")
            if inner == hugging_face.HEAD_NAME:
                continue  # settled with the embedding table below
            native = self.natives.get(inner)
            if native is None:
                self.unknown.extend(kinds.values())
                continue
            if native in deltas:
                raise CheckpointError(f"{self.path}: two LoRA pairs for {native}, one at {module}: expected one.")
            deltas[native] = self._delta(module, native, kinds)
        self._require_tied_delta(deltas.get(TABLE), parts)
        return deltas

    def _require_tied_delta(self, table: Delta | None, parts: Mapping[str, Mapping[str, str]]) -> None:
        """LoRA on the embedding table must act on the head alike (`ensure_weight_tying`): merged, they are one."""
        by_inner = {hugging_face.normalise(f"{module}.weight"): kinds for module, kinds in parts.items()}
        head = by_inner.get(hugging_face.HEAD_NAME)
        if head is None and table is None:
            return
        if head is None or table is None or not {"A", "B"} <= set(head):
            raise CheckpointError(f"{self.path}: {_UNTIED.format('LoRA on')}")
        a, b = self.file.read(head["A"]), self.file.read(head["B"])
        if not (torch.equal(a, table.b.T) and torch.equal(b, table.a.T)):
            raise CheckpointError(f"{self.path}: {_UNTIED.format('LoRA on')}")

    def _require_tied_replacement(self, replaced: dict[str, Tensor]) -> None:
        head, table = replaced.pop(hugging_face.HEAD_NAME, None), replaced.get(TABLE)
        if head is None and table is None:
            return
        if head is None or table is None or not torch.equal(head, table):
            raise CheckpointError(f"{self.path}: {_UNTIED.format('training')}")

    def _delta(self, module: str, native: str, kinds: Mapping[str, str]) -> Delta:
        is_embedding = "embedding_A" in kinds
        prefix = "embedding_" if is_embedding else ""
        pair = [kinds.get(f"{prefix}A"), kinds.get(f"{prefix}B")]
        if pair[0] is None or pair[1] is None:
            lacks = "A" if pair[0] is None else "B"
            raise CheckpointError(f"{self.path}: {module} has no lora_{prefix}{lacks}: expected both. Fetch it again.")
        a, b = self.file.read(pair[0]), self.file.read(pair[1])
        rank = self.settings.rank(module)
        shape = self.shapes[native]
        n_in = shape[0] if is_embedding else shape[1:]
        expected_a = (rank, n_in) if isinstance(n_in, int) else (rank, *n_in)
        n_out = shape[1] if is_embedding else shape[0]
        if tuple(a.shape) != expected_a or tuple(b.shape[:2]) != (n_out, rank) or b.numel() != n_out * rank:
            raise CheckpointError(
                f"{self.path}: {module} has A {list(a.shape)} and B {list(b.shape)}: expected {list(expected_a)} and "
                f"[{n_out}, {rank}] for {native} {list(shape)} at rank {rank}. Use it with the model it was trained on"
                f"{f' ({self.settings.base})' if self.settings.base else ''}."
            )
        magnitude = self.file.read(kinds["magnitude"]) if "magnitude" in kinds else None
        if (magnitude is not None) != self.settings.use_dora:
            raise CheckpointError(
                f"{self.path}: use_dora={self.settings.use_dora}, but {module} has "
                f"{'a' if magnitude is not None else 'no'} magnitude vector: expected the two to agree."
            )
        if magnitude is not None and (is_embedding or len(shape) != 2):
            raise CheckpointError(f"{self.path}: DoRA on {module}: only linear layers can be merged.")
        return Delta(a, b, self.settings.scale(module), magnitude, is_embedding)

    def _replacement(self, name: str, plain: str, replaced: dict[str, Tensor]) -> None:
        """A tensor trained in full: of `modules_to_save`, a bias, or the base of a LoRA embedding."""
        cleaned = re.sub(r"\.(modules_to_save|base_layer|original_module)(\.default)?(?=\.)", "", plain)
        module, _, leaf = cleaned.rpartition(".")
        inner = hugging_face.normalise(cleaned)
        native = TABLE if inner == hugging_face.HEAD_NAME else self.natives.get(inner)  # a head of the same shape
        is_head = inner == hugging_face.HEAD_NAME  # saved along with a table that it is tied to
        wanted = (
            self.settings.saves(module)
            or (is_head and self.settings.saves("embed_tokens"))
            or ".base_layer." in plain
            or (leaf == "bias" and self.settings.bias != "none")
        )
        if native is None or not wanted:
            self.unknown.append(name)
            return
        tensor = self.file.read(name)
        if tuple(tensor.shape) != self.shapes[native]:
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(tensor.shape)}: expected {list(self.shapes[native])} for "
                f"{native}. Use it with the model it was trained on."
            )
        replaced[inner if is_head else native] = tensor


def _natives(config: PaliGemmaConfig) -> dict[str, str]:
    """Inner Hugging Face parameter name -> native name."""
    return {
        rule.foreign.format(i=i): rule.native.format(i=i)
        for rule in hugging_face.rules_for(config.text.post_norms)
        for i in range(depth_of(rule.native, config))
    }


def _compare(settings: AdapterConfig, modules: list[str], natives: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Modules that the configuration targets and the file lacks, and the reverse.

    Patterns apply to module paths as they were named when the adapter was trained. Those of the file show which layouts
    that can have been; the one that fits best decides.
    """
    have = set(modules)
    best: tuple[list[str], list[str]] | None = None
    inner = [hugging_face.normalise(f"{module}.weight").removesuffix(".weight") for module in modules]
    for layout in get_args(hugging_face.Layout):
        in_this = {hugging_face.in_layout(name, layout) for name in inner if name != "lm_head"}
        if not in_this <= have:
            continue
        paths = [
            (hugging_face.in_layout(name, layout).removesuffix(".weight"), native)
            for name, native in natives.items()
            if native.endswith(".weight") and "norm" not in native
        ]
        targeted = {path for path, native in paths if settings.targets(path, _is_linear(native))}
        result = (sorted(targeted - have), sorted(have & {path for path, _ in paths} - targeted))
        if best is None or sum(map(len, result)) < sum(map(len, best)):
            best = result
    return best if best is not None else ([], [])


def _is_linear(native: str) -> bool:
    return native not in (TABLE, "vision.patch_embedding.weight")


class Merged(State):
    """A state with an adapter merged in, tensor by tensor as they are asked for."""

    def __init__(self, base: State, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter

    def spec(self, name: str) -> Spec:
        return self._base.spec(name)

    def get_as(self, name: str, dtype: torch.dtype | None) -> Tensor:
        wanted = dtype or self._base.spec(name).dtype
        delta, replaced = self._adapter.deltas.get(name), self._adapter.replaced.get(name)
        if delta is None and replaced is None:
            return self._base.get_as(name, dtype)
        tensor = replaced if replaced is not None else self._base.get_as(name, None)
        return (tensor if delta is None else delta.apply(tensor)).to(wanted)

    def source(self, name: str) -> str:
        return self._base.source(name)

    def reading_order(self) -> list[str]:
        return self._base.reading_order()

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def merge(state: Mapping[str, Tensor], adapter: Adapter) -> State:
    """The state with an adapter merged in: computed in float32, handed out in the dtype of each weight.

    Nothing is computed until a tensor is asked for, so the result of an open `Checkpoint` can be written away as a
    stream; `dict(merge(state, adapter))` holds it all.
    """
    unplaced = [name for name in (*adapter.deltas, *adapter.replaced) if name not in state]
    if unplaced:
        raise CheckpointError(f"{adapter.path}: changes {unplaced[0]}, which this state does not hold.")
    return Merged(as_state(state), adapter)


def adapter_summary(adapter: Adapter) -> dict[str, Any]:
    """What to tell people about an adapter."""
    return {
        "base": adapter.base or "not stated",
        "rank": adapter.config.r,
        "alpha": adapter.config.alpha,
        "kind": ("DoRA" if adapter.config.use_dora else "LoRA")
        + (", rank-stabilised" if adapter.config.use_rslora else ""),
        "weights changed": len(adapter.deltas),
        "tensors replaced": len(adapter.replaced),
    }
