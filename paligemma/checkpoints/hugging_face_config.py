"""config.json and preprocessor_config.json of Hugging Face folders, old and new releases -> PaliGemmaConfig.

Sizes are read from the file where it states them, taken from the tensors where it is silent, and compared with the
tensors in any case. Class defaults of transformers are never used for sizes: they are not PaliGemma's.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paligemma.checkpoints import big_vision
from paligemma.checkpoints.files import Spec
from paligemma.checkpoints.hugging_face import read_json
from paligemma.config import PaliGemmaConfig, ProcessingConfig, Resize, TextConfig, TokenConfig, VisionConfig
from paligemma.errors import CheckpointError, ConfigError, PaliGemmaError

BLOCK = "paligemma_config"  # ours, inside config.json: the choices that the other fields cannot express
_TANH_GELU = (None, "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate")
_PIL_BILINEAR, _PIL_BICUBIC = 2, 3


@dataclass(frozen=True)
class Facts:
    """What the shapes of a folder's tensors tell."""

    width: int
    depth: int
    mlp_dim: int
    q_rows: int
    kv_rows: int
    vocab_size: int
    post_norms: bool
    vision_width: int
    vision_depth: int
    vision_mlp_dim: int
    patch_size: int
    n_positions: int


def facts_of(specs: Mapping[str, Spec], where: str) -> Facts:
    """Read the facts off the tensors, by inner names.

    Raises:
        CheckpointError: a tensor needed for a size is missing or has the wrong number of axes.
    """

    def axes(name: str, n: int) -> tuple[int, ...]:
        spec = specs.get(name)
        if spec is None:
            raise CheckpointError(
                f"{where}: the tensor {name} is missing: expected a complete PaliGemma checkpoint "
                "(language model, image tower and projector)."
            )
        if len(spec.shape) != n:
            raise CheckpointError(f"{where}: {name} has shape {list(spec.shape)}: expected {n} axes.")
        return spec.shape

    def count(prefix: str) -> int:
        numbers = {name[len(prefix) :].split(".")[0] for name in specs if name.startswith(prefix)}
        return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)

    rows, width = axes("language_model.embed_tokens.weight", 2)
    first = "language_model.layers.0"
    block = "vision_tower.encoder.layers.0"
    vision_width, _, patch, _ = axes("vision_tower.embeddings.patch_embedding.weight", 4)
    return Facts(
        width=width,
        depth=count("language_model.layers."),
        mlp_dim=axes(f"{first}.mlp.gate_proj.weight", 2)[0],
        q_rows=axes(f"{first}.self_attn.q_proj.weight", 2)[0],
        kv_rows=axes(f"{first}.self_attn.k_proj.weight", 2)[0],
        vocab_size=rows,
        post_norms=f"{first}.pre_feedforward_layernorm.weight" in specs,
        vision_width=vision_width,
        vision_depth=count("vision_tower.encoder.layers."),
        vision_mlp_dim=axes(f"{block}.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        n_positions=axes("vision_tower.embeddings.position_embedding.weight", 2)[0],
    )


def read_config(folder: Path, facts: Facts) -> PaliGemmaConfig:
    """The configuration of a folder, checked against its tensors.

    Raises:
        ConfigError: a field disagrees with the weights, or asks for a computation that PaliGemma does not have.
    """
    path = folder / "config.json"
    values = read_json(path) if path.is_file() else {}
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    preprocessor = _preprocessor(folder)
    if not values:
        warnings.warn(f"{folder}: no config.json; the configuration is inferred from the shapes alone.", stacklevel=2)
    try:
        config = parse(values, facts, str(path), generation=generation)
        resize = parse_preprocessor(preprocessor, config, str(folder))
    except PaliGemmaError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise ConfigError(
            f"{folder}: a field of config.json or of the preprocessor file has the wrong type ({error}): expected what "
            "transformers writes. Restore the files."
        ) from None
    config = replace(config, processing=ProcessingConfig(resize=resize))
    block = values.get(BLOCK)
    if block is None:
        return config
    if not isinstance(block, dict):
        raise ConfigError(f"{path}: {BLOCK} is not an object. Remove it.")
    ours = PaliGemmaConfig.from_dict(overlay(config.to_dict(), block))
    if pil_filter(ours.processing.resize) != pil_filter(resize):
        # Someone edited the preprocessor file after we wrote the block: the file that transformers reads wins.
        ours = replace(ours, processing=replace(ours.processing, resize=resize))
    return ours


def ties_head(folder: Path) -> bool:
    """Whether config.json ties the output head to the embedding table; true where it is silent."""
    path = folder / "config.json"
    values = read_json(path) if path.is_file() else {}
    return values.get("tie_word_embeddings", True) is not False


def parse(values: Mapping[str, Any], facts: Facts, where: str, *, generation: Mapping[str, Any]) -> PaliGemmaConfig:
    """config.json alone (without our block): old and new spellings, missing fields from the tensors."""
    kind = values.get("model_type", "paligemma")
    if kind != "paligemma":
        raise ConfigError(f"{where}: model_type={kind!r}: expected 'paligemma' (PaliGemma 1 and 2 alike).")
    text_values: dict[str, Any] = values.get("text_config") or {}
    text = _text(text_values, facts, where)
    vision = _vision(values.get("vision_config") or {}, facts, where)
    tokens = _tokens(values, text_values, generation, facts.vocab_size)
    config = PaliGemmaConfig(vision=vision, text=text, tokens=tokens, name=str(values.get("_name_or_path") or ""))
    return config


def _agree(where: str, field: str, given: Any, fact: int) -> int:
    if given is not None and given != fact:
        raise ConfigError(
            f"{where}: {field}={given} disagrees with the weights, which have {fact}: expected the configuration that "
            "was saved with them. Restore it, or set the field to the value of the weights."
        )
    return fact


def _above_zero(where: str, field: str, value: Any) -> float:
    if not 0 < float(value) < math.inf:
        raise ConfigError(f"{where}: {field}={value}: expected a positive number.")
    return float(value)


def _text(values: Mapping[str, Any], facts: Facts, where: str) -> TextConfig:
    family = values.get("model_type") or ("gemma2" if facts.post_norms else "gemma")
    if family not in ("gemma", "gemma2"):
        raise ConfigError(f"{where}: text_config.model_type={family!r}: expected 'gemma' or 'gemma2'.")
    if (family == "gemma2") != facts.post_norms:
        have = "with" if facts.post_norms else "without"
        raise ConfigError(
            f"{where}: text_config.model_type={family!r} disagrees with the weights, which have layers {have} post "
            f"norms: expected {'gemma2' if facts.post_norms else 'gemma'!r}."
        )
    _refuse_unsupported(values, where)
    d_table = 128 if facts.width == 4608 else 256
    n_heads, head_dim = values.get("num_attention_heads"), values.get("head_dim")
    if head_dim is None:
        head_dim = facts.q_rows // n_heads if n_heads else d_table
    n_heads = n_heads or facts.q_rows // head_dim
    n_kv_heads = values.get("num_key_value_heads") or facts.kv_rows // head_dim
    shares = {"num_attention_heads": (n_heads, facts.q_rows), "num_key_value_heads": (n_kv_heads, facts.kv_rows)}
    for field, (heads, rows) in shares.items():
        if heads * head_dim != rows:
            raise ConfigError(
                f"{where}: text_config.{field}={heads} times head_dim={head_dim} disagrees with the weights, whose "
                f"projection has {rows} rows. Restore the configuration that was saved with them."
            )
    is_2 = family == "gemma2"
    rope = values.get("rope_parameters") or {}
    scalar = values.get("query_pre_attn_scalar")
    if scalar is None:
        scalar = 144 if (facts.width, head_dim) == (4608, 128) else 256
    return TextConfig(
        width=_agree(where, "text_config.hidden_size", values.get("hidden_size"), facts.width),
        depth=_agree(where, "text_config.num_hidden_layers", values.get("num_hidden_layers"), facts.depth),
        mlp_dim=_agree(where, "text_config.intermediate_size", values.get("intermediate_size"), facts.mlp_dim),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=_agree(where, "text_config.vocab_size", values.get("vocab_size"), facts.vocab_size),
        post_norms=is_2,
        query_pre_attn_scalar=float(scalar) if is_2 else head_dim,
        attn_logits_softcap=float(values.get("attn_logit_softcapping", 50.0) or 0) or None if is_2 else None,
        final_logits_softcap=float(values.get("final_logit_softcapping", 30.0) or 0) or None if is_2 else None,
        sliding_window=_sliding_window(values, facts.depth, where) if is_2 else None,
        rope_theta=_above_zero(where, "rope_theta", rope.get("rope_theta") or values.get("rope_theta") or 10_000.0),
        norm_eps=_above_zero(where, "rms_norm_eps", values.get("rms_norm_eps") or 1e-6),
    )


def _refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    """Fields that change the arithmetic and that no PaliGemma has: better no answer than a wrong one."""
    act = values.get("hidden_activation") or values.get("hidden_act")
    if act not in (*_TANH_GELU, "gelu"):  # "gelu" in a Gemma file has always meant the tanh form
        raise ConfigError(f"{where}: text_config.hidden_act={act!r}: expected gelu_pytorch_tanh.")
    if values.get("attention_bias"):
        raise ConfigError(f"{where}: text_config.attention_bias=true: expected false, Gemma has no biases.")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where}: rotary positions of type {kind!r}: expected 'default' (unscaled).")


def _sliding_window(values: Mapping[str, Any], depth: int, where: str) -> int | None:
    window: int | None = values.get("sliding_window", 4096)
    kinds = values.get("layer_types")
    if kinds is None or window is None:
        return window
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(depth)]
    if kinds == ["full_attention"] * depth:
        return None
    if kinds != alternating:
        raise ConfigError(
            f"{where}: text_config.layer_types={kinds}: expected {depth} layers, sliding and full in turn (sliding "
            "first), or all full."
        )
    return window


def _vision(values: Mapping[str, Any], facts: Facts, where: str) -> VisionConfig:
    act = values.get("hidden_act")
    if act not in _TANH_GELU:
        raise ConfigError(f"{where}: vision_config.hidden_act={act!r}: expected gelu_pytorch_tanh.")
    patch = _agree(where, "vision_config.patch_size", values.get("patch_size"), facts.patch_size)
    resolution = values.get("image_size") or big_vision.resolution_for(facts.n_positions, patch, where)
    is_whole = isinstance(resolution, int) and not isinstance(resolution, bool)
    if not is_whole or (resolution // patch) ** 2 != facts.n_positions:
        raise ConfigError(
            f"{where}: vision_config.image_size={resolution} disagrees with the weights, whose position table has "
            f"{facts.n_positions} rows: expected {math.isqrt(facts.n_positions) * patch}."
        )
    n_heads = values.get("num_attention_heads")
    if n_heads is None:
        if facts.vision_width != 1152:
            raise ConfigError(
                f"{where}: vision_config.num_attention_heads is missing and a tower of width {facts.vision_width} is "
                "not So400m: expected the field. Add it, or give config=."
            )
        n_heads = 16
    return VisionConfig(
        width=_agree(where, "vision_config.hidden_size", values.get("hidden_size"), facts.vision_width),
        depth=_agree(where, "vision_config.num_hidden_layers", values.get("num_hidden_layers"), facts.vision_depth),
        mlp_dim=_agree(where, "vision_config.intermediate_size", values.get("intermediate_size"), facts.vision_mlp_dim),
        n_heads=n_heads,
        resolution=resolution,
        patch_size=patch,
        norm_eps=_above_zero(where, "layer_norm_eps", values.get("layer_norm_eps") or 1e-6),
    )


def _tokens(
    values: Mapping[str, Any], text: Mapping[str, Any], generation: Mapping[str, Any], rows: int
) -> TokenConfig:
    image = values.get("image_token_index", values.get("image_token_id"))
    stated = values.get("_vocab_size") or values.get("vocab_size") or text.get("_vocab_size")
    if image is not None and rows - 64 <= image <= rows:
        real = image  # <image> is the first id behind the real vocabulary; filler rows follow
    elif stated and stated <= rows:
        real = stated
    else:
        real = None
    tokens = big_vision.tokens_for(rows, real)

    def special(name: str, default: int) -> int:
        for source in (generation, values, text):
            value = source.get(name)
            # Gemma 2 files list [1, 107]: <eos> and the end of a chat turn, which PaliGemma never writes.
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int):
                return value
        return default

    return replace(
        tokens,
        pad=special("pad_token_id", 0),
        eos=special("eos_token_id", 1),
        bos=special("bos_token_id", 2),
        image=tokens.image if image is None else image,
    )


def _preprocessor(folder: Path) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            inner = values.get("image_processor", values)  # transformers 5 nests it in processor_config.json
            if isinstance(inner, dict) and "resample" in inner:
                return inner
    return {}


def parse_preprocessor(values: Mapping[str, Any], config: PaliGemmaConfig, where: str) -> Resize:
    """Which resize a preprocessor file asks for; anything that would change the pixels otherwise is refused.

    Pillow's bilinear filter widens its support when it shrinks, as the antialiased original does; the two differ by
    rounding, at most one step of 255.
    """
    resample = values.get("resample", _PIL_BICUBIC)
    if resample not in (_PIL_BILINEAR, _PIL_BICUBIC):
        raise ConfigError(f"{where}: preprocessor resample={resample}: expected 2 (bilinear) or 3 (bicubic).")
    size = values.get("size")
    side = config.vision.resolution
    if isinstance(size, dict) and {size.get("height", side), size.get("width", side)} != {side}:
        raise ConfigError(
            f"{where}: the preprocessor resizes to {size}, but the model reads {side} x {side} px: expected the two to "
            "agree. Copy the preprocessor file of this model."
        )
    for name, expected in (("image_mean", 0.5), ("image_std", 0.5)):
        given = values.get(name)
        if given is not None and any(x != expected for x in (given if isinstance(given, list) else [given])):
            raise ConfigError(f"{where}: preprocessor {name}={given}: expected {expected} for every colour.")
    factor = values.get("rescale_factor")
    if factor is not None and abs(factor * 255 - 1) > 1e-6:
        raise ConfigError(f"{where}: preprocessor rescale_factor={factor}: expected 1/255.")
    for name in ("do_rescale", "do_normalize"):
        if values.get(name) is False:
            raise ConfigError(f"{where}: preprocessor {name}=false: expected true, pixels stand in [-1, 1].")
    return "bv_bilinear_aa" if resample == _PIL_BILINEAR else "hf_bicubic"


def pil_filter(resize: Resize) -> int:
    return _PIL_BICUBIC if resize == "hf_bicubic" else _PIL_BILINEAR


def difference(ours: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `ours` that `plain` has otherwise, nested."""
    out: dict[str, Any] = {}
    for key, value in ours.items():
        if isinstance(value, dict):
            inner = difference(value, plain[key])
            if inner:
                out[key] = inner
        elif value != plain[key]:
            out[key] = value
    return out


def overlay(plain: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    """`plain` with the entries of `block` in place of its own; inverse of `difference`."""
    out = dict(plain)
    for key, value in block.items():
        old = out.get(key)
        out[key] = overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out
