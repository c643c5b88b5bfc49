"""The original `.npz` checkpoints of big_vision: names, stacked layers, variants, and the configuration they imply.

An archive carries no configuration, but its shapes tell every size; what shapes cannot tell (soft caps, query scale)
follows from the family. Source: big_vision models/ppp/gemma.py, models/vit.py, models/proj/paligemma/paligemma.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from paligemma.checkpoints.files import Spec
from paligemma.checkpoints.rules import NATIVE, POST_NORMS, Rule
from paligemma.config import PaliGemmaConfig, ProcessingConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.errors import CheckpointError, ConfigError
from paligemma.presets import EMBEDDED, MODEL_PRESETS, N_TOKENS, RAW_GEMMA_ROWS

PREFIX = "params/"
CONFIG_KEY = "extra/paligemma_config"  # ours: choices that shapes cannot tell, as UTF-8 JSON; ignored by big_vision
RAW_ROWS = (RAW_GEMMA_ROWS, 256_128)  # Gemma before the vocabulary extension, plain and padded to a multiple of 128

_IMG = "img/Transformer/encoderblock"
_ATT = f"{_IMG}/MultiHeadDotProductAttention_0"
_VIS = "vision.blocks.{i}"
_TXT = "text.blocks.{i}"

BIG_VISION: tuple[Rule, ...] = (
    Rule("vision.patch_embedding.weight", "img/embedding/kernel", "p p c W"),
    Rule("vision.patch_embedding.bias", "img/embedding/bias", "W"),
    Rule("vision.position_embedding", "img/pos_embedding", "1 N W"),
    Rule(f"{_VIS}.attn_norm.weight", f"{_IMG}/LayerNorm_0/scale", "l W"),
    Rule(f"{_VIS}.attn_norm.bias", f"{_IMG}/LayerNorm_0/bias", "l W"),
    Rule(f"{_VIS}.attn.q.weight", f"{_ATT}/query/kernel", "l W h e"),
    Rule(f"{_VIS}.attn.q.bias", f"{_ATT}/query/bias", "l h e"),
    Rule(f"{_VIS}.attn.k.weight", f"{_ATT}/key/kernel", "l W h e"),
    Rule(f"{_VIS}.attn.k.bias", f"{_ATT}/key/bias", "l h e"),
    Rule(f"{_VIS}.attn.v.weight", f"{_ATT}/value/kernel", "l W h e"),
    Rule(f"{_VIS}.attn.v.bias", f"{_ATT}/value/bias", "l h e"),
    Rule(f"{_VIS}.attn.out.weight", f"{_ATT}/out/kernel", "l h e W"),
    Rule(f"{_VIS}.attn.out.bias", f"{_ATT}/out/bias", "l W"),
    Rule(f"{_VIS}.mlp_norm.weight", f"{_IMG}/LayerNorm_1/scale", "l W"),
    Rule(f"{_VIS}.mlp_norm.bias", f"{_IMG}/LayerNorm_1/bias", "l W"),
    Rule(f"{_VIS}.mlp.up.weight", f"{_IMG}/MlpBlock_0/Dense_0/kernel", "l W m"),
    Rule(f"{_VIS}.mlp.up.bias", f"{_IMG}/MlpBlock_0/Dense_0/bias", "l m"),
    Rule(f"{_VIS}.mlp.down.weight", f"{_IMG}/MlpBlock_0/Dense_1/kernel", "l m W"),
    Rule(f"{_VIS}.mlp.down.bias", f"{_IMG}/MlpBlock_0/Dense_1/bias", "l W"),
    Rule("vision.final_norm.weight", "img/Transformer/encoder_norm/scale", "W"),
    Rule("vision.final_norm.bias", "img/Transformer/encoder_norm/bias", "W"),
    Rule("projector.weight", "img/head/kernel", "W D"),
    Rule("projector.bias", "img/head/bias", "D"),
    Rule("text.embedding.weight", "llm/embedder/input_embedding", "V D"),
    Rule(f"{_TXT}.pre_attn_norm.scale", "llm/layers/pre_attention_norm/scale", "L D"),
    Rule(f"{_TXT}.attn.q.weight", "llm/layers/attn/q_einsum/w", "L H D d"),
    Rule(f"{_TXT}.attn.k.weight", "llm/layers/attn/kv_einsum/w", "L 2:0 K D d"),
    Rule(f"{_TXT}.attn.v.weight", "llm/layers/attn/kv_einsum/w", "L 2:1 K D d"),
    Rule(f"{_TXT}.attn.out.weight", "llm/layers/attn/attn_vec_einsum/w", "L H d D"),
    Rule(f"{_TXT}.post_attn_norm.scale", "llm/layers/post_attention_norm/scale", "L D"),
    Rule(f"{_TXT}.pre_mlp_norm.scale", "llm/layers/pre_ffw_norm/scale", "L D"),
    Rule(f"{_TXT}.mlp.gate.weight", "llm/layers/mlp/gating_einsum", "L 2:0 D F"),
    Rule(f"{_TXT}.mlp.up.weight", "llm/layers/mlp/gating_einsum", "L 2:1 D F"),
    Rule(f"{_TXT}.mlp.down.weight", "llm/layers/mlp/linear", "L F D"),
    Rule(f"{_TXT}.post_mlp_norm.scale", "llm/layers/post_ffw_norm/scale", "L D"),
    Rule("text.final_norm.scale", "llm/final_norm/scale", "D"),
)

_FUSED = "llm/layers/attn/qkv_einsum/w"  # gemma_7b-like: as many key/value heads as query heads, one array for all
_GATING = "llm/layers/mlp/gating_einsum"

# Arrays that a checkpoint may hold and that are no part of the model: prefix -> why.
IGNORABLE: dict[str, str] = {
    "img/MAPHead_0/": "pooling head of the raw SigLIP tower, not used by PaliGemma",
    "txt/": "text tower of the raw SigLIP model",
    "t": "temperature of the SigLIP loss",
    "b": "bias of the SigLIP loss",
    "opt/": "optimizer state",
    "extra/": "trainer state",
}


@dataclass(frozen=True)
class Tree:
    """The parameter tree of an archive: short names ("img/…", "llm/…") and where each stands in the file."""

    names: Mapping[str, str]  # short name -> name in the archive
    specs: Mapping[str, Spec]  # by short name
    only: tuple[str, ...] = ()  # native prefixes, when a sub-key cut the tree


def find_tree(specs: Mapping[str, Spec], where: str, subkey: str = "") -> Tree:
    """Strip `params/` or `opt/target/`, if any name has it, and cut the tree to a sub-key such as `img`.

    Raises:
        CheckpointError: no parameters under that name.
    """
    prefix = next((p for p in (PREFIX, "opt/target/") if any(name.startswith(p) for name in specs)), "")
    only: tuple[str, ...] = ()
    if subkey:
        short = subkey.strip("/").removeprefix(prefix)
        if short in ("img", "llm"):
            only = ("vision.", "projector.") if short == "img" else ("text.",)
        elif short + "/" != prefix:
            prefix = f"{subkey.strip('/')}/"
            prefix += next((p for p in (PREFIX, "opt/target/") if any(n.startswith(prefix + p) for n in specs)), "")
    names = {name.removeprefix(prefix) if name.startswith(prefix) else name: name for name in specs}
    if len(names) != len(specs):
        raise CheckpointError(f"{where}: arrays with and without the prefix {prefix} have the same name: expected one.")
    if not any(name.startswith(("img/", "llm/")) and full.startswith(prefix) for name, full in names.items()):
        tops = sorted({name.split("/")[0] for name in specs})
        raise CheckpointError(
            f"{where}{':' + subkey if subkey else ''}: no PaliGemma parameters: expected arrays named params/img/… and "
            f"params/llm/…, found {', '.join(tops[:8]) or 'nothing'}. For part of a file use file.npz:img or :llm."
        )
    return Tree(names, {short: specs[full] for short, full in names.items()}, only)


def rules_for(tree: Tree, config: PaliGemmaConfig) -> tuple[Rule, ...]:
    """The table above, adapted to the variants in circulation: unscanned towers, fused qkv, transposed gating."""
    specs = tree.specs
    rules = BIG_VISION
    if not config.text.post_norms:
        rules = tuple(rule for rule in rules if rule.native not in POST_NORMS)
    if f"{_IMG}_0/LayerNorm_0/scale" in specs:
        rules = tuple(_unscanned(rule) if rule.foreign.startswith(f"{_IMG}/") else rule for rule in rules)
    if _FUSED in specs:
        rules = tuple(_fused(rule) if rule.native in _QKV else rule for rule in rules)
    gating = specs.get(_GATING)
    if gating is not None and len(gating.shape) == 4 and gating.shape[2] > gating.shape[3]:
        # [L, 2, F, D] instead of [L, 2, D, F]; F > D in every Gemma.
        rules = tuple(
            replace(rule, dims=rule.dims.replace("D F", "F D")) if rule.foreign == _GATING else rule for rule in rules
        )
    return rules


_QKV = tuple(f"{_TXT}.attn.{part}.weight" for part in "qkv")


def _unscanned(rule: Rule) -> Rule:
    return replace(rule, foreign=rule.foreign.replace(_IMG, _IMG + "_{i}"), dims=rule.dims.removeprefix("l "))


def _fused(rule: Rule) -> Rule:
    heads = "H" if rule.native == _QKV[0] else "K"
    return replace(rule, foreign=_FUSED, dims=f"L 3:{_QKV.index(rule.native)} {heads} D d")


def leftovers(tree: Tree, used: set[str]) -> tuple[dict[str, str], list[str]]:
    """Arrays (by their names in the file) that no rule used: those known to be no part of the model, and the others."""
    reasons: dict[str, str] = {}
    unknown: list[str] = []
    for name, full in tree.names.items():
        if full in used or full == CONFIG_KEY:
            continue
        if tree.only and name.startswith(("img/", "llm/")):
            reasons[full] = "outside the sub-key that was asked for"
            continue
        hit = next((p for p in IGNORABLE if name == p or (p.endswith("/") and name.startswith(p))), None)
        if hit:
            reasons[full] = IGNORABLE[hit]
        else:
            unknown.append(full)
    return reasons, unknown


def infer_config(tree: Tree, where: str) -> PaliGemmaConfig:
    """The configuration that the shapes of an archive imply.

    Soft caps 50 and 30 for Gemma 2 and none for Gemma 1; queries scaled by head_dim, in the 27B size (width 4608) by
    144; no sliding window (big_vision has none); pictures resized with bilinear and antialias, as its evaluations do.

    Raises:
        CheckpointError: an array needed for a size is missing or has the wrong number of axes.
        ConfigError: shapes that no PaliGemma has.
    """
    vision, text = _infer_vision(tree, where), _infer_text(tree, where)
    tokens = tokens_for(text.vocab_size)
    config = PaliGemmaConfig(
        vision=vision, text=text, tokens=tokens, processing=ProcessingConfig(resize="bv_bilinear_aa")
    )
    return replace(config, name=preset_name(config))


def tokens_for(rows: int, n_tokens: int | None = None) -> TokenConfig:
    """Where loc and seg tokens stand in a table: the last 1,152 real rows."""
    real = n_tokens or (N_TOKENS if rows >= N_TOKENS else rows)
    if real <= 1152:
        return TokenConfig(n_tokens=real, loc_start=real, seg_start=real, image=real, n_loc=0, n_seg=0)
    return TokenConfig(n_tokens=real, loc_start=real - 1152, seg_start=real - 128, image=real)


def preset_name(config: PaliGemmaConfig) -> str:
    """The preset of the same sizes, or the empty string."""
    for name, preset in MODEL_PRESETS.items():
        text = replace(config.text, vocab_size=preset.text.vocab_size, sliding_window=preset.text.sliding_window)
        if name not in EMBEDDED and (preset.vision, preset.text) == (config.vision, text):
            return name
    return ""


def resolution_for(n_positions: int, patch: int, where: str) -> int:
    """The picture side that gives so many positions; 729 is SigLIP 384, whose last 6 px fill no patch."""
    grid = math.isqrt(n_positions)
    if grid * grid != n_positions:
        raise ConfigError(f"{where}: {n_positions} position embeddings: expected a square number (256, 1024, 4096).")
    return 384 if (grid, patch) == (27, 14) else grid * patch


def _axes(tree: Tree, where: str, name: str, n: int) -> tuple[int, ...]:
    spec = tree.specs.get(name)
    if spec is None:
        raise CheckpointError(f"{where}: the array {name} is missing: expected a complete PaliGemma checkpoint.")
    if len(spec.shape) != n:
        raise CheckpointError(f"{where}: {name} has shape {list(spec.shape)}: expected {n} axes.")
    return spec.shape


def _infer_vision(tree: Tree, where: str) -> VisionConfig:
    patch, patch2, _, width = _axes(tree, where, "img/embedding/kernel", 4)
    _, n_positions, _ = _axes(tree, where, "img/pos_embedding", 3)
    if patch != patch2:
        raise ConfigError(f"{where}: patches of {patch} x {patch2} px: expected square ones.")
    if f"{_IMG}_0/LayerNorm_0/scale" in tree.specs:
        depth = sum(f"{_IMG}_{j}/LayerNorm_0/scale" in tree.specs for j in range(len(tree.specs)))
        _, n_heads, _ = _axes(tree, where, f"{_IMG}_0/MultiHeadDotProductAttention_0/query/kernel", 3)
        _, mlp_dim = _axes(tree, where, f"{_IMG}_0/MlpBlock_0/Dense_0/kernel", 2)
    else:
        depth, _, n_heads, _ = _axes(tree, where, f"{_ATT}/query/kernel", 4)
        _, _, mlp_dim = _axes(tree, where, f"{_IMG}/MlpBlock_0/Dense_0/kernel", 3)
    return VisionConfig(
        width=width, depth=depth, mlp_dim=mlp_dim, n_heads=n_heads, patch_size=patch,
        resolution=resolution_for(n_positions, patch, where),
    )  # fmt: skip


def _infer_text(tree: Tree, where: str) -> TextConfig:
    if _FUSED in tree.specs:
        depth, _, n_heads, width, head_dim = _axes(tree, where, _FUSED, 5)
        n_kv_heads = n_heads
    else:
        depth, n_heads, width, head_dim = _axes(tree, where, "llm/layers/attn/q_einsum/w", 4)
        _, _, n_kv_heads, _, _ = _axes(tree, where, "llm/layers/attn/kv_einsum/w", 5)
    rows, _ = _axes(tree, where, "llm/embedder/input_embedding", 2)
    _, mlp_dim, _ = _axes(tree, where, "llm/layers/mlp/linear", 3)
    return family_defaults(
        TextConfig(
            width=width, depth=depth, mlp_dim=mlp_dim, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
            vocab_size=rows, post_norms="llm/layers/post_ffw_norm/scale" in tree.specs, query_pre_attn_scalar=head_dim,
        )
    )  # fmt: skip


def family_defaults(text: TextConfig) -> TextConfig:
    """Soft caps and query scale, which no shape tells, from the family."""
    is_27b = (text.width, text.head_dim) == (4608, 128)
    return replace(
        text,
        query_pre_attn_scalar=144 if is_27b else text.head_dim,
        attn_logits_softcap=50.0 if text.post_norms else None,
        final_logits_softcap=30.0 if text.post_norms else None,
    )


def foreign_layout(config: PaliGemmaConfig) -> dict[str, list[Rule]]:
    """What to write: every array of the archive, sorted by name, with the rules that fill it."""
    arrays: dict[str, list[Rule]] = {}
    for rule in BIG_VISION:
        if config.text.post_norms or rule.native not in POST_NORMS:
            arrays.setdefault(rule.foreign, []).append(rule)
    return dict(sorted(arrays.items()))


def array_dtype(natives: Mapping[str, Spec], rules: list[Rule]) -> torch.dtype:
    """The dtype of a stacked array: the widest of its parts, so that nothing is rounded."""
    dtype: torch.dtype | None = None
    for name, spec in natives.items():
        if any(_matches(rule.native, name) for rule in rules):
            dtype = spec.dtype if dtype is None else torch.promote_types(dtype, spec.dtype)
    assert dtype is not None
    return dtype


def _matches(template: str, name: str) -> bool:
    head, _, tail = template.partition("{i}")
    return name == template if not tail else name.startswith(head) and name.endswith(tail)


assert {rule.native for rule in BIG_VISION} == set(NATIVE)
