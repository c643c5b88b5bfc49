"""The parts that stage 0 starts from, opened: a raw SigLIP or a raw Gemma, in every format they are published in.

    vision  big_vision .npz (params/img/…), Hugging Face SigLIP, the tower of any PaliGemma
    text    Hugging Face Gemma and Gemma 2, big_vision .npz (params/llm/…), Flax .npz (transformer/layer_0/…),
            safetensors with the names of gemma_pytorch (fused qkv, int8 weights with a scaler), any PaliGemma

A part becomes an ordinary `Checkpoint` of which only one half is filled: names are brought to those of a whole
PaliGemma, a stand-in of a published size takes the place of the other half, and the rules of the whole do the rest.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from paligemma.checkpoints import big_vision, hugging_face, hugging_face_config
from paligemma.checkpoints.checkpoint import Checkpoint, open_checkpoint
from paligemma.checkpoints.files import Spec, TensorFile, is_float
from paligemma.checkpoints.gemma_flax import flax_tree, stacked_specs, unstacked
from paligemma.checkpoints.gemma_pytorch import IGNORABLE, Derived
from paligemma.checkpoints.identify import identify, npz_in, refuse_pickled_part, split_subkey
from paligemma.checkpoints.npz_io import NpzFile
from paligemma.checkpoints.rules import Piece, depth_of, match, shape_of, sizes_of
from paligemma.checkpoints.safetensors_io import SafetensorsFiles
from paligemma.config import PaliGemmaConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.errors import CheckpointError, ConfigError, OptionError, PaliGemmaError, nearest
from paligemma.presets import HF_TABLE_ROWS, MODEL_PRESETS, N_TOKENS, TEXT_PRESETS, VISION_PRESETS, gemma_2b, so400m

Kind = Literal["vision", "text"]
NOUNS: dict[Kind, str] = {"vision": "image tower (SigLIP)", "text": "text decoder (Gemma)"}
A: dict[Kind, str] = {"vision": "an", "text": "a"}
STAND_IN = PaliGemmaConfig(vision=so400m(224), text=gemma_2b())
_ANY = torch.float32  # dtype of the stand-in's tensors, which are never read

# Tensors without which no size can be read off a part; the first of them tells that a part is there at all.
_HF_NEEDED: dict[Kind, tuple[str, ...]] = {
    "vision": (
        "vision_tower.embeddings.patch_embedding.weight",
        "vision_tower.embeddings.position_embedding.weight",
        "vision_tower.encoder.layers.0.mlp.fc1.weight",
    ),
    "text": (
        "language_model.embed_tokens.weight",
        "language_model.layers.0.mlp.gate_proj.weight",
        "language_model.layers.0.self_attn.q_proj.weight",
        "language_model.layers.0.self_attn.k_proj.weight",
    ),
}
_NPZ_NEEDED: dict[Kind, tuple[str, ...]] = {
    "vision": ("img/embedding/kernel", "img/pos_embedding"),
    "text": ("llm/embedder/input_embedding", "llm/layers/mlp/linear"),
}
_HF_PROJECTOR, _NPZ_PROJECTOR = "multi_modal_projector.linear.weight", "img/head/kernel"
# What else the files of a raw SigLIP hold: pattern of the inner name -> why it is left out.
_HF_IGNORABLE: dict[str, str] = {
    r"(model\.)?text_model\..*": "text tower of the raw SigLIP model",
    r"(model\.)?logit_scale": "temperature of the SigLIP loss",
    r"(model\.)?logit_bias": "bias of the SigLIP loss",
    **IGNORABLE,
    **hugging_face.IGNORABLE,
}
# Where config.json keeps the fields of a part, by its model_type.
_SECTIONS: dict[Kind, dict[str, str]] = {
    "vision": {"siglip": "vision_config", "siglip_vision_model": "", "paligemma": "vision_config"},
    "text": {"gemma": "", "gemma2": "", "paligemma": "text_config"},
}


@dataclass(frozen=True)
class Part:
    """One half of a model, open.

    Attributes:
        checkpoint: holds every native tensor of this half; what else it may hold is not looked at.
        tokens: text: the ids that mean something, in a vocabulary that may still lack loc and seg tokens.
        is_raw: text: loc and seg rows are still to be appended.
        dropped: tensors of the files that are left out -> why.
    """

    kind: Kind
    checkpoint: Checkpoint
    tokens: TokenConfig
    is_raw: bool
    dropped: Mapping[str, str]

    @property
    def config(self) -> PaliGemmaConfig:
        """Of this half; the other one is a stand-in."""
        return self.checkpoint.file_config

    @property
    def folder(self) -> Path:
        """Where a tokenizer may lie."""
        path = self.checkpoint.path
        return path if path.is_dir() else path.parent

    def names(self) -> Iterator[str]:
        return (name for name in self.checkpoint if name.startswith(f"{self.kind}."))


def open_part(
    kind: Kind, path: str | Path, *, config: VisionConfig | TextConfig | str | None = None, strict: bool = True
) -> Part:
    """Open the image tower or the decoder that a file or folder holds; no data are read.

    Sizes come from the tensors. What no shape tells (number of heads in Hugging Face's names, query scale, soft caps,
    epsilon of the norms) comes from `config`, else from config.json, else from the published size of equal shapes.

    Args:
        config: a preset's name ("gemma-2-2b", "siglip-so400m-patch14-224", "tiny") or the values themselves; its
            resolution and its number of rows do not matter.
        strict: refuse tensors that nobody asked for; False lists them as dropped.

    Raises:
        CheckpointError: another part than asked for, missing, misshapen or unexpected tensors; PickleRefused and, with
            the command that converts it, an Orbax or tensorstore folder.
        ConfigError: a config.json that disagrees with the weights.
        OptionError: an unknown preset; no configuration and no published size of these shapes.
    """
    given = preset_part(kind, config) if isinstance(config, str) else config
    file_path, subkey = split_subkey(path)
    found = identify(path)
    if found == "pickle":
        raise refuse_pickled_part(file_path)
    if found == "adapter":
        raise CheckpointError(f"{file_path}: a LoRA adapter: expected the whole weights of a {NOUNS[kind]}.")
    opened = (
        _open_npz(kind, file_path, subkey, given, strict)
        if found == "npz"
        else _open_safetensors(kind, file_path, given, strict)
    )
    return opened or _half_of_whole(kind, path, given, strict)


def preset_part(kind: Kind, name: str) -> VisionConfig | TextConfig:
    """The half of a preset by its name."""
    alone: Mapping[str, VisionConfig | TextConfig] = VISION_PRESETS if kind == "vision" else TEXT_PRESETS
    if name in alone:
        return alone[name]
    if name in MODEL_PRESETS:
        return MODEL_PRESETS[name].vision if kind == "vision" else MODEL_PRESETS[name].text
    raise OptionError(
        f"{kind}_preset={name!r}: expected one of {', '.join(alone)}, or a model's name.{nearest(name, alone)}"
    )


def _half_of_whole(kind: Kind, path: str | Path, given: VisionConfig | TextConfig | None, strict: bool) -> Part:
    """A part of a complete PaliGemma, so that a later stage can be put on another foundation."""
    whole = open_checkpoint(path, strict=strict)
    if given is not None:
        whole.close()
        whole = open_checkpoint(path, strict=strict, config=_with_half(whole.config, given))
    if not any(name.startswith(f"{kind}.") for name in whole):
        whole.close()
        raise CheckpointError(f"{path}: no {NOUNS[kind]} inside: expected one. Leave the part after the colon out.")
    other = "decoder and projector" if kind == "vision" else "image tower and projector"
    reason = f"{other} of a whole PaliGemma, of which the {NOUNS[kind]} is used"
    rest = {whole.source(name): reason for name in whole if not name.startswith(f"{kind}.")}
    return Part(kind, whole, whole.config.tokens, False, {**whole.dropped, **rest})


def _with_half(config: PaliGemmaConfig, given: VisionConfig | TextConfig) -> PaliGemmaConfig:
    """`config` with the choices of `given`, its resolution and rows left as they are."""
    if isinstance(given, VisionConfig):
        return replace(config, vision=replace(given, resolution=config.vision.resolution))
    return replace(config, text=replace(given, vocab_size=config.text.vocab_size))


def _require_part(kind: Kind, needed: Mapping[Kind, tuple[str, ...]], specs: Mapping[str, Spec], where: str) -> None:
    other: Kind = "text" if kind == "vision" else "vision"
    if needed[kind][0] not in specs:
        if needed[other][0] in specs:
            raise CheckpointError(
                f"{where}: holds {A[other]} {NOUNS[other]} and no {NOUNS[kind]}: expected it as the {other} part. "
                "Swap the two, or name another file."
            )
        first = ", ".join(sorted(specs)[:3]) or "nothing"
        raise CheckpointError(f"{where}: no {NOUNS[kind]} inside: expected {needed[kind][0]}, found {first}…")
    for name in needed[kind]:
        if name not in specs:
            raise CheckpointError(
                f"{where}: the tensor {name} is missing: expected a complete {NOUNS[kind]}. "
                "Download or convert it again."
            )


# ---------------------------------------------------------------------------------------------------------------- npz


def _open_npz(
    kind: Kind, path: Path, subkey: str, given: VisionConfig | TextConfig | None, strict: bool
) -> Part | None:
    """None for a whole PaliGemma."""
    where = str(path)
    if path.is_dir():
        (path,) = npz_in(path)
    file = NpzFile(path)
    try:
        tree = flax_tree(file.specs) or big_vision.find_tree(file.specs, where, subkey)
        stacked = stacked_specs(tree.specs)
        _require_part(kind, _NPZ_NEEDED, stacked, where)
        table = _NPZ_NEEDED["text"][0]
        rows = tree.specs[table].shape[0] if table in tree.specs else 0
        if rows not in (0, *big_vision.RAW_ROWS) and {_NPZ_NEEDED["vision"][0], _NPZ_PROJECTOR} <= set(tree.specs):
            file.close()
            return None
        mine = "img/" if kind == "vision" else "llm/"
        own = {name: spec for name, spec in stacked.items() if name.startswith(mine)}
        own |= {name: spec for name, spec in _stand_in_arrays().items() if not name.startswith(mine)}
        full = big_vision.Tree(tree.names, own)
        config = replace(big_vision.infer_config(full, where), name="")
        config = config if given is None else _with_half(config, given)
        rules = big_vision.rules_for(full, config)
        if stacked is not tree.specs:
            rules = tuple(unstacked(rule) for rule in rules)
        pieces = match(rules, config, tree.specs, where, names=tree.names, only=(f"{kind}.",))
        used = {piece.foreign for piece in pieces}
        outside = {
            full_name: f"not of the {NOUNS[kind]}"
            for name, full_name in tree.names.items()
            if name.startswith(("img/head/", "llm/") if kind == "vision" else "img/")
        }
        reasons, unknown = big_vision.leftovers(tree, used | set(outside))
        return _part(kind, path, "npz", file, config, pieces, {**outside, **reasons}, unknown, strict)
    except BaseException:
        file.close()
        raise


def _stand_in_arrays() -> dict[str, Spec]:
    sizes = sizes_of(STAND_IN)
    layout = big_vision.foreign_layout(STAND_IN)
    return {name: Spec(shape_of(rules[0].dims, sizes), _ANY) for name, rules in layout.items()}


# -------------------------------------------------------------------------------------------------------- safetensors


def _open_safetensors(kind: Kind, path: Path, given: VisionConfig | TextConfig | None, strict: bool) -> Part | None:
    """None for a whole PaliGemma."""
    where, folder = str(path), path if path.is_dir() else path.parent
    raw = SafetensorsFiles(hugging_face.weight_files(folder) if path.is_dir() else [path])
    try:
        if path.is_dir():
            hugging_face.check_index(folder, raw)
        plain = _inner_names(raw, where)
        file = Derived(raw, plain, where)
        names = file.names
        specs = {inner: file.specs[full] for inner, full in names.items()}
        _require_part(kind, _HF_NEEDED, specs, where)
        if {_HF_NEEDED["vision"][0], _HF_NEEDED["text"][0], _HF_PROJECTOR} <= set(specs):
            raw.close()
            return None
        config = _hf_config(kind, path, folder, specs, given)
        rules = hugging_face.rules_for(config.text.post_norms)
        pieces = match(rules, config, specs, where, names=names, only=(f"{kind}.",))
        used = {source for piece in pieces for source in file.sources(piece.foreign)}
        reasons: dict[str, str] = {}
        unknown: list[str] = []
        for inner, full in plain.items():
            why = next((why for pattern, why in _HF_IGNORABLE.items() if re.fullmatch(pattern, inner)), None)
            if full in used or inner == hugging_face.HEAD_NAME:
                continue
            if why is None and inner.startswith("language_model." if kind == "vision" else "vision_tower."):
                why = f"not of the {NOUNS[kind]}"
            if why is None:
                unknown.append(full)
            else:
                reasons[full] = why
        head = plain.get(hugging_face.HEAD_NAME)
        if head is not None and kind == "text":
            is_tied = hugging_face_config.ties_head(folder)
            reasons[head] = hugging_face.check_head(raw, plain, is_tied=is_tied, where=where)
        return _part(kind, path, "hf", file, config, pieces, reasons, unknown, strict)
    except BaseException:
        raw.close()
        raise


def _inner_names(file: SafetensorsFiles, where: str) -> dict[str, str]:
    """Names of a whole PaliGemma for those of a raw part -> names in the file."""
    names: dict[str, str] = {}
    for full in file.specs:
        name = hugging_face.normalise(full)
        name = re.sub(
            r"^(model\.)?(vision_tower\.)?(vision_model\.)?(?=(embeddings|encoder|post_layernorm|head)\.)",
            "vision_tower.",
            name,
        )
        name = re.sub(r"^(model\.)?(?=(embed_tokens|layers|norm)\.)", "language_model.", name)
        name = re.sub(r"^embedder\.", "language_model.embed_tokens.", name)  # gemma_pytorch
        if name in names:
            raise CheckpointError(
                f"{where}: {names[name]} and {full} are the same parameter under two names: expected it once. "
                "Remove the stale file."
            )
        names[name] = full
    return names


def _hf_config(
    kind: Kind,
    path: Path,
    folder: Path,
    specs: Mapping[str, Spec],
    given: VisionConfig | TextConfig | None,
) -> PaliGemmaConfig:
    where = str(path)
    mine = "vision_tower." if kind == "vision" else "language_model."
    own = {name: spec for name, spec in specs.items() if name.startswith(mine)}
    sizes = sizes_of(STAND_IN)
    for rule in hugging_face.rules_for(False):
        for i in range(depth_of(rule.native, STAND_IN)):
            if not rule.foreign.startswith(mine):
                own[rule.foreign.format(i=i)] = Spec(shape_of(rule.dims, sizes), _ANY)
    facts = hugging_face_config.facts_of(own, where)
    values = _section(kind, path, folder)
    if given is None and not (values and (kind == "text" or "num_attention_heads" in values)):
        given = _of_equal_shapes(kind, facts, where)
    if given is not None:
        resolution = big_vision.resolution_for(facts.n_positions, facts.patch_size, where)
        vision = replace(STAND_IN.vision, resolution=resolution, patch_size=facts.patch_size)
        text = replace(STAND_IN.text, vocab_size=facts.vocab_size)
        tokens = big_vision.tokens_for(facts.vocab_size)
        return _with_half(PaliGemmaConfig(vision=vision, text=text, tokens=tokens), given)
    file = folder / "generation_config.json"
    generation = hugging_face.read_json(file) if kind == "text" and file.is_file() else {}
    whole = {"model_type": "paligemma", f"{kind}_config": values}
    try:
        return hugging_face_config.parse(whole, facts, str(folder / "config.json"), generation=generation)
    except PaliGemmaError:
        raise
    except (TypeError, AttributeError, KeyError, ArithmeticError, ValueError) as error:
        raise ConfigError(
            f"{folder}: a field of config.json has the wrong type ({error}): expected what transformers writes. "
            "Restore the file."
        ) from None


def _section(kind: Kind, path: Path, folder: Path) -> dict[str, Any]:
    """The fields of config.json that describe a part; empty without a file."""
    file = folder / "config.json"
    values = hugging_face.read_json(file) if file.is_file() else {}
    model_type = values.get("model_type")
    if model_type is None:
        return dict(values.get(f"{kind}_config") or values)
    if not isinstance(model_type, str) or model_type not in _SECTIONS[kind]:
        if not path.is_dir():  # a single file may lie beside the configuration of something else
            return {}
        raise ConfigError(
            f"{file}: model_type={model_type!r}: expected one of {', '.join(_SECTIONS[kind])} for the {kind} part."
        )
    section = _SECTIONS[kind][model_type]
    return dict(values.get(section) or {} if section else values)


def _of_equal_shapes(kind: Kind, facts: hugging_face_config.Facts, where: str) -> VisionConfig | TextConfig:
    found: dict[tuple[Any, ...], VisionConfig | TextConfig]
    if kind == "vision":
        found = {(v.width, v.depth, v.mlp_dim, v.patch_size): v for v in VISION_PRESETS.values()}
        shape: tuple[Any, ...] = (facts.vision_width, facts.vision_depth, facts.vision_mlp_dim, facts.patch_size)
    else:
        found = {
            (t.width, t.depth, t.mlp_dim, t.n_heads * t.head_dim, t.n_kv_heads * t.head_dim, t.post_norms): t
            for t in TEXT_PRESETS.values()
        }
        shape = (facts.width, facts.depth, facts.mlp_dim, facts.q_rows, facts.kv_rows, facts.post_norms)
    if shape in found:
        return found[shape]
    raise OptionError(
        f"{where}: no config.json tells the number of heads, and width {shape[0]}, depth {shape[1]}, MLP {shape[2]} is "
        f"no published {NOUNS[kind]}: expected its configuration. Put config.json beside the weights, or name a preset "
        f"of these sizes with --{kind}-preset ({kind}_preset=)."
    )


# --------------------------------------------------------------------------------------------------------------- both


def _part(
    kind: Kind,
    path: Path,
    format: Literal["hf", "npz"],
    file: TensorFile,
    config: PaliGemmaConfig,
    pieces: list[Piece],
    dropped: dict[str, str],
    unknown: list[str],
    strict: bool,
) -> Part:
    if unknown and strict:
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors have no place in a {NOUNS[kind]}, first {unknown[0]}: expected none. "
            "If they may be dropped, open it with strict=False (--no-strict)."
        )
    for piece in pieces:
        if not is_float(file.specs[piece.foreign].dtype):
            raise CheckpointError(
                f"{file.where(piece.foreign)}: {piece.foreign} holds {file.specs[piece.foreign].dtype} without a "
                "scaler beside it: expected floating point. Take the original checkpoint."
            )
    dropped |= dict.fromkeys(unknown, "unknown; dropped because strict=False")
    checkpoint = Checkpoint(path, format, file, config, pieces, dropped)
    is_raw = kind == "text" and config.text.vocab_size not in (N_TOKENS, HF_TABLE_ROWS)
    return Part(kind, checkpoint, config.tokens, is_raw, dropped)
