"""Small models whose sizes all differ, random weights, and writers of files that are independent of the package."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from paligemma.checkpoints.rules import native_shapes
from paligemma.config import PaliGemmaConfig, TextConfig, TokenConfig, VisionConfig


def tiny_config(generation: int, *, rows: int = 1216, resolution: int = 42) -> PaliGemmaConfig:
    """PaliGemma 1 or 2 with 1,200 tokens; no two dims are equal."""
    text = TextConfig(
        width=20, depth=3, mlp_dim=44, n_heads=4, n_kv_heads=2 if generation == 2 else 1, head_dim=6, vocab_size=rows,
        post_norms=generation == 2, query_pre_attn_scalar=5 if generation == 2 else 6,
        attn_logits_softcap=50.0 if generation == 2 else None, final_logits_softcap=30.0 if generation == 2 else None,
        sliding_window=8 if generation == 2 else None,
    )  # fmt: skip
    return PaliGemmaConfig(
        vision=VisionConfig(width=12, depth=2, mlp_dim=28, n_heads=3, resolution=resolution, patch_size=14),
        text=text,
        tokens=TokenConfig(n_tokens=1200, loc_start=48, seg_start=1072, image=1200),
    )


def random_state(config: PaliGemmaConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in native_shapes(config).items()}


def as_npz_could_know(config: PaliGemmaConfig) -> PaliGemmaConfig:
    """The configuration with every choice that shapes cannot tell set to what an archive implies."""
    text = dataclasses.replace(config.text, sliding_window=None, query_pre_attn_scalar=config.text.head_dim)
    processing = dataclasses.replace(config.processing, resize="bv_bilinear_aa")
    return dataclasses.replace(config, text=text, processing=processing)


def hf_tensors(state: dict[str, Tensor], generation: int) -> dict[str, Tensor]:
    """Layout A by hand, so that the package's own table is not what checks it."""
    names: dict[str, Tensor] = {}
    tower = "vision_tower.vision_model"
    for native, tensor in state.items():
        if native == "vision.position_embedding":
            names[f"{tower}.embeddings.position_embedding.weight"] = tensor
            continue
        full = native
        for ours, theirs in (
            ("vision.patch_embedding", f"{tower}.embeddings.patch_embedding"),
            ("vision.blocks", f"{tower}.encoder.layers"),
            ("vision.final_norm", f"{tower}.post_layernorm"),
            ("projector", "multi_modal_projector.linear"),
            ("text.embedding", "language_model.model.embed_tokens"),
            ("text.blocks", "language_model.model.layers"),
            ("text.final_norm", "language_model.model.norm"),
        ):
            full = full.replace(ours, theirs) if native.startswith(ours) else full
        if native.startswith("vision"):
            pairs = {".attn_norm.": ".layer_norm1.", ".mlp_norm.": ".layer_norm2.", ".mlp.up.": ".mlp.fc1.",
                     ".mlp.down.": ".mlp.fc2.", ".attn.out.": ".self_attn.out_proj."}  # fmt: skip
        else:
            pre_mlp = ".pre_feedforward_layernorm." if generation == 2 else ".post_attention_layernorm."
            pairs = {".pre_attn_norm.": ".input_layernorm.", ".post_attn_norm.": ".post_attention_layernorm.",
                     ".pre_mlp_norm.": pre_mlp, ".post_mlp_norm.": ".post_feedforward_layernorm.",
                     ".attn.out.": ".self_attn.o_proj.", ".mlp.gate.": ".mlp.gate_proj.", ".mlp.up.": ".mlp.up_proj.",
                     ".mlp.down.": ".mlp.down_proj."}  # fmt: skip
        for letter in "qkv":
            pairs[f".attn.{letter}."] = f".self_attn.{letter}_proj."
        for ours, theirs in pairs.items():
            full = full.replace(ours, theirs)
        names[full.replace(".scale", ".weight")] = tensor
    return names


def old_config_json(config: PaliGemmaConfig) -> dict:
    """config.json as the first releases wrote it: most fields omitted."""
    t, v = config.text, config.vision
    text = {
        "model_type": "gemma2" if t.post_norms else "gemma", "hidden_size": t.width, "intermediate_size": t.mlp_dim,
        "num_attention_heads": t.n_heads, "num_hidden_layers": t.depth, "num_key_value_heads": t.n_kv_heads,
        "num_image_tokens": v.n_image_tokens, "torch_dtype": "float32", "vocab_size": t.vocab_size,
    }  # fmt: skip
    if t.post_norms:
        text |= {"query_pre_attn_scalar": t.query_pre_attn_scalar, "sliding_window": t.sliding_window}
    return {
        "_name_or_path": "somewhere/paligemma", "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "hidden_size": 2048, "ignore_index": -100,
        "image_token_index": config.tokens.image, "model_type": "paligemma", "projection_dim": t.width,
        "text_config": text, "torch_dtype": "float32", "transformers_version": "4.41.0.dev0",
        "vision_config": {
            "hidden_size": v.width, "intermediate_size": v.mlp_dim, "model_type": "siglip_vision_model",
            "num_attention_heads": v.n_heads, "num_hidden_layers": v.depth, "num_image_tokens": v.n_image_tokens,
            "patch_size": v.patch_size, "projection_dim": t.width, "projector_hidden_act": "gelu_fast",
            "vision_use_head": False,
        },
        "vocab_size": 257152,
    }  # fmt: skip


def hf_folder(folder: Path, config: PaliGemmaConfig, tensors: dict[str, Tensor], **fields: object) -> Path:
    """A Hugging Face folder written with the safetensors package; `fields` go into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(old_config_json(config) | fields))
    return folder


def npz_arrays(config: PaliGemmaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A big_vision tree of random numbers, shapes from the specification of the format."""
    t, v = config.text, config.vision
    h, e = v.n_heads, v.width // v.n_heads
    img, att = "params/img/Transformer/encoderblock", "MultiHeadDotProductAttention_0"
    heads = {f"{att}/{n}/kernel": (v.width, h, e) for n in ("query", "key", "value")}
    biases = {f"{att}/{n}/bias": (h, e) for n in ("query", "key", "value")}
    norms = {f"LayerNorm_{n}/{leaf}": (v.width,) for n in (0, 1) for leaf in ("scale", "bias")}
    block = heads | biases | norms | {
        f"{att}/out/kernel": (h, e, v.width), f"{att}/out/bias": (v.width,),
        "MlpBlock_0/Dense_0/kernel": (v.width, v.mlp_dim), "MlpBlock_0/Dense_0/bias": (v.mlp_dim,),
        "MlpBlock_0/Dense_1/kernel": (v.mlp_dim, v.width), "MlpBlock_0/Dense_1/bias": (v.width,),
    }  # fmt: skip
    llm = {
        "attn/q_einsum/w": (t.n_heads, t.width, t.head_dim), "attn/kv_einsum/w": (2, t.n_kv_heads, t.width, t.head_dim),
        "attn/attn_vec_einsum/w": (t.n_heads, t.head_dim, t.width), "mlp/gating_einsum": (2, t.width, t.mlp_dim),
        "mlp/linear": (t.mlp_dim, t.width), "pre_attention_norm/scale": (t.width,), "pre_ffw_norm/scale": (t.width,),
    }  # fmt: skip
    if t.post_norms:
        llm |= {"post_attention_norm/scale": (t.width,), "post_ffw_norm/scale": (t.width,)}
    shapes = {
        "params/img/embedding/kernel": (v.patch_size, v.patch_size, 3, v.width),
        "params/img/embedding/bias": (v.width,),
        "params/img/pos_embedding": (1, v.n_image_tokens, v.width),
        **{f"{img}/{name}": (v.depth, *shape) for name, shape in block.items()},
        "params/img/Transformer/encoder_norm/scale": (v.width,), "params/img/Transformer/encoder_norm/bias": (v.width,),
        "params/img/head/kernel": (v.width, t.width), "params/img/head/bias": (t.width,),
        "params/llm/embedder/input_embedding": (t.vocab_size, t.width), "params/llm/final_norm/scale": (t.width,),
        **{f"params/llm/layers/{name}": (t.depth, *shape) for name, shape in llm.items()},
    }  # fmt: skip
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return set(one) == set(other) and all(
        one[n].dtype == other[n].dtype and one[n].shape == other[n].shape
        and torch.equal(one[n].contiguous().view(torch.uint8), other[n].contiguous().view(torch.uint8))
        for n in one
    )  # fmt: skip
