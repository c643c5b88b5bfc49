"""Hugging Face folders: the four tensor-name layouts in circulation, one file or shards.

    A  all hub repositories, transformers < 4.52:  language_model.model.…   vision_tower.vision_model.…
    B  4.52 … 4.x:                           model.language_model.…   model.vision_tower.vision_model.…   lm_head
    C  names in memory of 5.x:               model.language_model.…   model.vision_tower.…
    D  written by 5.x from a configuration:        language_model.model.…   vision_tower.…

Every name is first brought to one inner scheme (`normalise`); the table of rules is written in that scheme.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from paligemma.checkpoints.files import CHUNK_BYTES
from paligemma.checkpoints.rules import NATIVE, POST_NORMS, Rule
from paligemma.checkpoints.safetensors_io import SafetensorsFiles
from paligemma.errors import CheckpointError, OptionError, nearest

Layout = Literal["A", "B", "C", "D"]

_LAYER = "language_model.layers.{i}"
_BLOCK = "vision_tower.encoder.layers.{i}"
_NAMES: dict[str, str] = {
    "vision.patch_embedding": "vision_tower.embeddings.patch_embedding",
    "vision.position_embedding": "vision_tower.embeddings.position_embedding.weight",
    "vision.blocks.{i}.attn_norm": f"{_BLOCK}.layer_norm1",
    "vision.blocks.{i}.attn.q": f"{_BLOCK}.self_attn.q_proj",
    "vision.blocks.{i}.attn.k": f"{_BLOCK}.self_attn.k_proj",
    "vision.blocks.{i}.attn.v": f"{_BLOCK}.self_attn.v_proj",
    "vision.blocks.{i}.attn.out": f"{_BLOCK}.self_attn.out_proj",
    "vision.blocks.{i}.mlp_norm": f"{_BLOCK}.layer_norm2",
    "vision.blocks.{i}.mlp.up": f"{_BLOCK}.mlp.fc1",
    "vision.blocks.{i}.mlp.down": f"{_BLOCK}.mlp.fc2",
    "vision.final_norm": "vision_tower.post_layernorm",
    "projector": "multi_modal_projector.linear",
    "text.embedding": "language_model.embed_tokens",
    "text.blocks.{i}.pre_attn_norm.scale": f"{_LAYER}.input_layernorm.weight",
    "text.blocks.{i}.attn.q": f"{_LAYER}.self_attn.q_proj",
    "text.blocks.{i}.attn.k": f"{_LAYER}.self_attn.k_proj",
    "text.blocks.{i}.attn.v": f"{_LAYER}.self_attn.v_proj",
    "text.blocks.{i}.attn.out": f"{_LAYER}.self_attn.o_proj",
    "text.blocks.{i}.post_attn_norm.scale": f"{_LAYER}.post_attention_layernorm.weight",
    "text.blocks.{i}.pre_mlp_norm.scale": f"{_LAYER}.pre_feedforward_layernorm.weight",
    "text.blocks.{i}.mlp.gate": f"{_LAYER}.mlp.gate_proj",
    "text.blocks.{i}.mlp.up": f"{_LAYER}.mlp.up_proj",
    "text.blocks.{i}.mlp.down": f"{_LAYER}.mlp.down_proj",
    "text.blocks.{i}.post_mlp_norm.scale": f"{_LAYER}.post_feedforward_layernorm.weight",
    "text.final_norm.scale": "language_model.norm.weight",
}
TABLE_NAME = "language_model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"

# Tensors that a folder may hold and that are no part of the model: pattern of the inner name -> why.
IGNORABLE: dict[str, str] = {
    r".*embeddings\.position_ids": "the numbers 0 … N-1, kept as a buffer by old releases",
    r".*rotary_emb\.inv_freq": "rotary frequencies, computed from the configuration",
    r".*embed_tokens\.embed_scale": "sqrt(width), computed from the configuration",
    r"vision_tower\.head\..*": "pooling head of the raw SigLIP tower, not used by PaliGemma",
}


def rules_for(post_norms: bool) -> tuple[Rule, ...]:
    """One rule per native parameter, file names in the inner scheme."""
    return tuple(
        Rule(native, _foreign(native, post_norms), dims)
        for native, dims in NATIVE.items()
        if post_norms or native not in POST_NORMS
    )


def _foreign(native: str, post_norms: bool) -> str:
    if native == "text.blocks.{i}.pre_mlp_norm.scale" and not post_norms:
        # Gemma 1 calls the norm before its MLP "post attention"; Gemma 2 has a real one of that name.
        return f"{_LAYER}.post_attention_layernorm.weight"
    if native in _NAMES:
        return _NAMES[native]
    module, _, leaf = native.rpartition(".")
    return f"{_NAMES[module]}.{leaf}"


def normalise(name: str) -> str:
    """Any of the four layouts -> the inner scheme."""
    name = re.sub(r"^model\.(?=(language_model|vision_tower|multi_modal_projector)\.)", "", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def in_layout(name: str, layout: Layout) -> str:
    """The inner scheme -> one of the four layouts."""
    if layout not in get_args(Layout):
        raise OptionError(f"layout={layout!r}: expected one of A, B, C, D.{nearest(layout, get_args(Layout))}")
    top, _, rest = name.partition(".")
    if top == "language_model" and layout in "AD":
        rest = f"model.{rest}"
    if top == "vision_tower" and layout in "AB":
        rest = f"vision_model.{rest}"
    return f"{'model.' if layout in 'BC' else ''}{top}.{rest}"


def layout_of(names: Iterable[str]) -> Layout | None:
    """Which layout the names of a file follow; None when they follow none or several."""
    found = [name for name in names if re.match(r"(model\.)?(language_model|vision_tower)\.(?!lm_head)", name)]
    layouts: tuple[Layout, ...] = ("A", "B", "C", "D")
    for layout in layouts:
        if found and all(in_layout(normalise(name), layout) == name for name in found):
            return layout
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or the shards that the index names.

    Raises:
        CheckpointError: none there, two sets of them, a shard missing, or an index that cannot be read.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        if single.is_file():
            raise CheckpointError(
                f"{folder}: holds both {single.name} and {index.name}: expected one checkpoint. Remove the stale one."
            )
        names = sorted(set(read_index(index).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: the shard {missing[0]} named by {index.name} is missing ({len(missing)} of {len(names)}). "
                "Download the folder again."
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if not found:
        raise CheckpointError(f"{folder}: no safetensors file: expected model.safetensors or shards with their index.")
    return found


def read_index(path: Path) -> dict[str, str]:
    """`weight_map` of an index file: tensor name -> shard file."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: has no weight_map from tensor names to files. Download it again.")
    if any(Path(name).name != name for name in weight_map.values()):
        raise CheckpointError(f"{path}: names a shard outside its own folder: expected plain file names.")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}). Download it again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object. Download it again.")
    return values


def check_index(folder: Path, files: SafetensorsFiles) -> None:
    """The index and the shards must agree on which tensor stands where."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    weight_map = read_index(index)
    for name, shard in weight_map.items():
        if name not in files.specs or Path(files.where(name)).name != shard:
            raise CheckpointError(f"{folder}: {index.name} places {name} in {shard}, which does not hold it.")
    extra = sorted(set(files.specs) - set(weight_map))
    if extra:
        raise CheckpointError(f"{folder}: {files.where(extra[0])} holds {extra[0]}, which {index.name} does not name.")


def inner_names(files: SafetensorsFiles, where: str) -> dict[str, str]:
    """Inner name -> name in the file; two names for one parameter are refused."""
    names: dict[str, str] = {}
    for full in files.specs:
        inner = normalise(full)
        if inner in names:
            raise CheckpointError(
                f"{where}: {names[inner]} and {full} are the same parameter in two layouts: expected it once. "
                "Remove the stale file."
            )
        names[inner] = full
    return names


def leftovers(names: Mapping[str, str], used: set[str]) -> tuple[dict[str, str], list[str]]:
    """Tensors (by names in the file) that no rule used: those known to be no part of the model, and the others."""
    reasons: dict[str, str] = {}
    unknown: list[str] = []
    for inner, full in names.items():
        if full in used or inner == HEAD_NAME:
            continue
        reason = next((why for pattern, why in IGNORABLE.items() if re.fullmatch(pattern, inner)), None)
        if reason:
            reasons[full] = reason
        else:
            unknown.append(full)
    return reasons, unknown


def check_head(files: SafetensorsFiles, names: Mapping[str, str], *, is_tied: bool, where: str) -> str:
    """Compare an output head, when there is one, with the embedding table it is tied to; say what becomes of it.

    Raises:
        CheckpointError: it differs and config.json says that it is a parameter of its own.
    """
    head, table = names[HEAD_NAME], names[TABLE_NAME]
    if _equal(files, head, table):
        return "equal to the embedding table it is tied to"
    if not is_tied:
        raise CheckpointError(
            f"{where}: {head} differs from {table} and config.json says tie_word_embeddings=false: PaliGemma "
            "ties them. Set tie_word_embeddings to true to drop the head."
        )
    warnings.warn(
        f"{where}: {head} differs from {table}, to which config.json ties it; the table is used, the head dropped.",
        stacklevel=2,
    )
    return "differs from the embedding table, which config.json says is used instead"


def _equal(files: SafetensorsFiles, one: str, other: str) -> bool:
    a, b = files.specs[one], files.specs[other]
    if a.shape != b.shape or len(a.shape) != 2:
        return False
    rows = max(1, CHUNK_BYTES // max(1, a.shape[1] * 4))
    for start in range(0, a.shape[0], rows):
        stop = min(a.shape[0], start + rows)
        x, y = files.read_rows(one, start, stop), files.read_rows(other, start, stop)
        if not torch.equal(x.float(), y.float()):
            return False
    return True
