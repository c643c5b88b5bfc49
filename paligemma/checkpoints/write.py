"""Native state dict -> Hugging Face folder or big_vision archive, one tensor at a time."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from paligemma.checkpoints import big_vision, hugging_face, hugging_face_files
from paligemma.checkpoints.files import DTYPES, Spec, as_dtype, dtype_name
from paligemma.checkpoints.finite import require_finite
from paligemma.checkpoints.hugging_face_config import difference
from paligemma.checkpoints.npz_io import NpzWriter
from paligemma.checkpoints.rules import NATIVE, TABLE, depth_of, native_shapes, rearrange, shape_of, sizes_of
from paligemma.checkpoints.safetensors_io import SafetensorsWriter, plan_shards, shard_names
from paligemma.checkpoints.staging import Staging
from paligemma.checkpoints.state import State, as_state
from paligemma.config import PaliGemmaConfig
from paligemma.errors import CheckpointError, ConfigError, OptionError, nearest
from paligemma.presets import with_table_rows

Target = Literal["hf", "npz"]
TARGETS: dict[str, str] = {"hf": "a Hugging Face folder", "npz": "a big_vision archive"}
MAX_SHARD_BYTES = 5_000_000_000
SUMS = "SHA256SUMS"  # beside the shards, in the format of sha256sum; `verify` reads it
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_JSON_FILES = ("generation_config.json", "preprocessor_config.json", "config.json")
_SPARE_BYTES = 1 << 20  # for headers and JSON files


def write(
    path: str | Path,
    config: PaliGemmaConfig,
    state: Mapping[str, Tensor],
    format: Target = "hf",
    *,
    layout: hugging_face.Layout = "A",
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    table_rows: int | None = None,
    overwrite: bool = False,
    beside: Iterable[Path] = (),
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write a checkpoint; on any failure nothing stands under the final name.

    Args:
        path: a folder for "hf", an `.npz` file for "npz".
        state: every native tensor of `config`; an open `Checkpoint` is read while it is written.
        layout: tensor names of a Hugging Face folder; "A" is read by every release of transformers.
        dtype: of all tensors; None keeps each one's own.
        max_shard_bytes: larger folders are cut into shards with an index.
        table_rows: rows of the embedding table written. Default: as they are for "hf"; for "npz" the real
            vocabulary alone, because big_vision refuses filler rows. Added rows are filler: the mean of all others.
        beside: files to copy into a Hugging Face folder (tokenizer).
        progress: called with the bytes of each tensor written.

    Returns:
        `path`.

    Raises:
        CheckpointError: `state` does not fit `config`, the target exists, the disk is full, or a value overflows.
        OptionError: an unknown format, layout or dtype.
    """
    target = Path(path)
    if format not in TARGETS:
        raise OptionError(f"format={format!r}: expected one of {', '.join(TARGETS)}.{nearest(format, TARGETS)}")
    _require_fit(config, as_state(state))
    if table_rows is None:
        table_rows = config.tokens.n_tokens if format == "npz" else config.text.vocab_size
    source = _Outgoing(as_state(state), config, as_dtype(dtype), table_rows, progress)
    if format == "npz":
        _write_npz(target, source, overwrite)
    else:
        hugging_face.in_layout("language_model.x", layout)  # an unknown layout is refused before any work
        _write_hf(target, source, layout, max_shard_bytes, overwrite, beside)
    return target


def _require_fit(config: PaliGemmaConfig, state: State) -> None:
    expected = native_shapes(config)
    for name, shape in expected.items():
        if name not in state:
            raise CheckpointError(f"the state has no {name}: expected every parameter of the configuration.")
        have = state.spec(name).shape
        if have != shape:
            raise CheckpointError(f"{name} has shape {list(have)}: expected {list(shape)} for this configuration.")
    extra = [name for name in state if name not in expected]
    if extra:
        raise CheckpointError(f"the state holds {extra[0]}, which is no parameter of this configuration.")


class _Outgoing:
    """The tensors as they are to be written: cast, the table fitted, overflow refused."""

    def __init__(
        self,
        state: State,
        config: PaliGemmaConfig,
        dtype: torch.dtype | None,
        rows: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        if rows < config.tokens.n_tokens:
            raise ConfigError(
                f"a table of {rows} rows would lose real tokens: expected at least {config.tokens.n_tokens}. "
                "Only filler rows can be cut."
            )
        self.config = with_table_rows(config, rows)
        self._state, self._dtype, self._progress = state, dtype, progress
        self.specs = {
            name: Spec(shape, dtype or state.spec(name).dtype) for name, shape in native_shapes(self.config).items()
        }

    def get(self, name: str) -> Tensor:
        tensor = self._state.get_as(name, self._dtype)
        if tensor.dtype == torch.float16 and self._state.spec(name).dtype != torch.float16:
            require_finite(tensor, f"{name}, rounded to float16 (at most 65,504),")
        if name == TABLE:
            tensor = fit_rows(tensor, self.config.text.vocab_size)
        if self._progress is not None:
            self._progress(self._state.spec(name).n_bytes)
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """The one dtype, or float32 when there are several."""
        found = {spec.dtype for spec in self.specs.values()}
        return found.pop() if len(found) == 1 else torch.float32

    @property
    def n_bytes(self) -> int:
        return sum(spec.n_bytes for spec in self.specs.values())


def fit_rows(table_VD: Tensor, rows: int) -> Tensor:
    """Cut a table, or append filler rows equal to its mean, so that the extra logits are those of a mean token.

    transformers drew its 64 filler rows from a narrow normal distribution around the mean; no model was trained on
    them, and a constant needs no seed.
    """
    have = len(table_VD)
    if rows <= have:
        return table_VD[:rows]
    total = torch.zeros(table_VD.shape[1], dtype=torch.float64)
    for start in range(0, have, 4096):
        total += table_VD[start : start + 4096].double().sum(0)
    out = torch.empty(rows, table_VD.shape[1], dtype=table_VD.dtype)
    out[:have] = table_VD
    out[have:] = total / have
    return out


def _write_hf(
    folder: Path,
    source: _Outgoing,
    layout: hugging_face.Layout,
    max_shard_bytes: int,
    overwrite: bool,
    beside: Iterable[Path],
) -> None:
    if folder.suffix in (".npz", ".safetensors") or folder.is_file():
        raise OptionError(f"{folder}: a Hugging Face checkpoint is a folder. Give the name of one.")
    config = source.config
    inner = {
        rule.native.format(i=i): rule.foreign.format(i=i)
        for rule in hugging_face.rules_for(config.text.post_norms)
        for i in range(depth_of(rule.native, config))
    }
    natives = {hugging_face.in_layout(inner[name], layout): name for name in source.specs}
    shards = plan_shards({full: source.specs[name] for full, name in natives.items()}, max_shard_bytes)
    names = shard_names(len(shards))
    stale = _stale_weights(folder)
    if stale and not overwrite:
        raise CheckpointError(
            f"{folder}: holds weights already ({stale[0].name}): expected a new folder. Choose another, or "
            "overwrite=True (--overwrite)."
        )
    beside = list(beside)
    with Staging(folder, overwrite=overwrite) as staged:
        staged.require_space(source.n_bytes + _SPARE_BYTES)
        staged.require_free([*names, *(path.name for path in beside), SUMS, *_JSON_FILES])
        sums: list[str] = []
        for name, shard in zip(names, shards, strict=True):
            writer = SafetensorsWriter(staged.open(name), shard, {"format": "pt"})
            for full in shard:
                writer.add(full, source.get(natives[full]))
            sums.append(f"{writer.finish()}  {name}\n")
        if len(shards) > 1:
            weight_map = {full: name for name, shard in zip(names, shards, strict=True) for full in shard}
            index = {"metadata": {"total_size": source.n_bytes}, "weight_map": weight_map}
            _put_json(staged, "model.safetensors.index.json", index)
        staged.open(SUMS).write("".join(sums).encode())
        for path in beside:
            staged.open(path.name).write(path.read_bytes())
        _put_json(staged, "generation_config.json", hugging_face_files.generation_json(config))
        _put_json(staged, "preprocessor_config.json", hugging_face_files.preprocessor_json(config))
        _put_json(staged, "config.json", hugging_face_files.to_json(config, dtype_name(source.dtype)))
        staged.commit()
    # Of the checkpoint that stood here before: its shards, and what would win over the new files beside them.
    written = {*names, *(path.name for path in beside), *(["model.safetensors.index.json"] if len(shards) > 1 else [])}
    words = TOKENIZER_FILES if written & set(TOKENIZER_FILES) else ()
    for path in (*filter(_is_ours, stale), *(folder / name for name in ("processor_config.json", *words))):
        if path.name not in written and stale:
            path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether a file has a name that checkpoints have, and is not somebody's file that lies in the folder."""
    return re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name) is not None


def _stale_weights(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"))
    return sorted(path for path in found if not path.name.startswith("adapter_"))


def _put_json(staged: Staging, name: str, values: Mapping[str, Any]) -> None:
    staged.open(name).write((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _write_npz(path: Path, source: _Outgoing, overwrite: bool) -> None:
    if path.suffix != ".npz" or path.is_dir():
        raise OptionError(f"{path}: a big_vision checkpoint is one file ending in .npz. Give the name of one.")
    config = source.config
    for spec in source.specs.values():
        if spec.dtype not in DTYPES.values():
            raise OptionError(f"{dtype_name(spec.dtype)} cannot stand in an .npz: expected one of {', '.join(DTYPES)}.")
    sizes = sizes_of(config)
    layout = big_vision.foreign_layout(config)
    arrays = {
        name: Spec(shape_of(rules[0].dims, sizes), big_vision.array_dtype(source.specs, rules))
        for name, rules in layout.items()
    }
    with Staging(path.parent, overwrite=overwrite) as staged:
        staged.require_space(source.n_bytes + _SPARE_BYTES)
        writer = NpzWriter(staged.open(path.name))
        choices = _choices(config, arrays)
        if choices:
            data = torch.from_numpy(np.frombuffer(choices, dtype=np.uint8).copy())
            with writer.array(big_vision.CONFIG_KEY, Spec(tuple(data.shape), data.dtype)) as array:
                array.add(data)
        for name, rules in layout.items():
            with writer.array(big_vision.PREFIX + name, arrays[name]) as array:
                # Parts of one layer follow each other (key, value), then comes the next layer.
                for i in range(depth_of(rules[0].native, config)):
                    for rule in rules:
                        native = rule.native.format(i=i)
                        _, dims = rule.split()
                        array.add(
                            rearrange(source.get(native), NATIVE[rule.native], dims, sizes, dtype=arrays[name].dtype)
                        )
        writer.finish()
        staged.commit()


def _choices(config: PaliGemmaConfig, arrays: Mapping[str, Spec]) -> bytes:
    """What a reader could not infer from the shapes, as JSON; empty when it can infer everything."""
    tree = big_vision.Tree({name: name for name in arrays}, arrays)
    inferred = big_vision.infer_config(tree, "npz")
    block = difference(config.to_dict(), inferred.to_dict())
    return json.dumps(block).encode() if block else b""
