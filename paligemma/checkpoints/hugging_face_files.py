"""PaliGemmaConfig -> the JSON files of a Hugging Face folder."""

import warnings
from dataclasses import replace
from typing import Any

from paligemma.checkpoints.hugging_face_config import BLOCK, Facts, difference, parse, parse_preprocessor, pil_filter
from paligemma.config import PaliGemmaConfig, ProcessingConfig


def to_json(config: PaliGemmaConfig, dtype: str) -> dict[str, Any]:
    """config.json for any release of transformers since 4.41, with our block where its fields fall short."""
    v, t, tokens = config.vision, config.text, config.tokens
    text: dict[str, Any] = {
        "model_type": "gemma2" if t.post_norms else "gemma",
        "hidden_size": t.width, "num_hidden_layers": t.depth, "intermediate_size": t.mlp_dim,
        "num_attention_heads": t.n_heads, "num_key_value_heads": t.n_kv_heads, "head_dim": t.head_dim,
        "vocab_size": t.vocab_size, "num_image_tokens": v.n_image_tokens,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": t.norm_eps, "rope_theta": t.rope_theta,
        "rope_parameters": {"rope_theta": t.rope_theta, "rope_type": "default"},
        "max_position_embeddings": 8192, "attention_bias": False, "torch_dtype": dtype,
        "bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad,
    }  # fmt: skip
    if t.post_norms:
        sliding = t.sliding_window is not None
        scalar = t.query_pre_attn_scalar
        text |= {
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "attn_logit_softcapping": t.attn_logits_softcap,
            "final_logit_softcapping": t.final_logits_softcap,
            # A number even where no layer slides, which layer_types says: transformers asks for one.
            "sliding_window": t.sliding_window if sliding else 4096,
            "layer_types": [
                "sliding_attention" if sliding and i % 2 == 0 else "full_attention" for i in range(t.depth)
            ],
        }
    values: dict[str, Any] = {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
        "bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad,
        "image_token_index": tokens.image, "vocab_size": tokens.n_tokens, "hidden_size": t.width,
        "projection_dim": t.width, "tie_word_embeddings": True, "torch_dtype": dtype,
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": v.width, "num_hidden_layers": v.depth,
            "intermediate_size": v.mlp_dim, "num_attention_heads": v.n_heads, "image_size": v.resolution,
            "patch_size": v.patch_size, "num_channels": 3, "num_image_tokens": v.n_image_tokens,
            "projection_dim": t.width, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": v.norm_eps,
            "vision_use_head": False, "torch_dtype": dtype,
        },
    }  # fmt: skip
    plain = parse(values, _facts_from(config), "config.json", generation={})
    plain_resize = parse_preprocessor(preprocessor_json(config), plain, "config.json")
    plain = replace(plain, processing=ProcessingConfig(resize=plain_resize))
    block = difference(config.to_dict(), plain.to_dict())
    if block:
        values[BLOCK] = block
    arithmetic = [key for key in block.get("text", {}) if key not in ("final_cap", "embed_scale")]
    if arithmetic:
        warnings.warn(
            f"config.json of transformers cannot express text.{arithmetic[0]}={block['text'][arithmetic[0]]} for this "
            "family; it is kept for this package only, and transformers will compute other numbers.",
            stacklevel=3,
        )
    return values


def _facts_from(config: PaliGemmaConfig) -> Facts:
    v, t = config.vision, config.text
    return Facts(
        width=t.width, depth=t.depth, mlp_dim=t.mlp_dim, q_rows=t.n_heads * t.head_dim,
        kv_rows=t.n_kv_heads * t.head_dim, vocab_size=t.vocab_size, post_norms=t.post_norms, vision_width=v.width,
        vision_depth=v.depth, vision_mlp_dim=v.mlp_dim, patch_size=v.patch_size, n_positions=v.n_image_tokens,
    )  # fmt: skip


def preprocessor_json(config: PaliGemmaConfig) -> dict[str, Any]:
    side = config.vision.resolution
    return {
        "image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor",
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 255,
        "image_seq_length": config.vision.n_image_tokens, "resample": pil_filter(config.processing.resize),
        "size": {"height": side, "width": side},
    }  # fmt: skip


def generation_json(config: PaliGemmaConfig) -> dict[str, Any]:
    tokens = config.tokens
    return {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
