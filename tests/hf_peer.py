"""The same tiny model in transformers, and the same batch as transformers wants it.

Traps of transformers 5.23: without token_type_ids and attention_mask, eager attention is causal over the prefix, while
sdpa sees everything; so both are always given, and attention is always "eager".
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PaliGemmaConfig as PeerConfig
from transformers import PaliGemmaForConditionalGeneration

from paligemma.config import PaliGemmaConfig
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.models.siglip import of_levels
from paligemma.processing.batch import Batch

_TOWER = {
    ".attn_norm.": ".layer_norm1.", ".mlp_norm.": ".layer_norm2.", ".mlp.up.": ".mlp.fc1.", ".mlp.down.": ".mlp.fc2.",
    ".attn.q.": ".self_attn.q_proj.", ".attn.k.": ".self_attn.k_proj.", ".attn.v.": ".self_attn.v_proj.",
    ".attn.out.": ".self_attn.out_proj.", "vision.blocks.": "vision.encoder.layers.",
    "vision.final_norm.": "vision.post_layernorm.", "vision.patch_embedding.": "vision.embeddings.patch_embedding.",
    "vision.position_embedding": "vision.embeddings.position_embedding.weight", "vision.": "model.vision_tower.",
}  # fmt: skip
_DECODER = {
    ".attn.q.": ".self_attn.q_proj.", ".attn.k.": ".self_attn.k_proj.", ".attn.v.": ".self_attn.v_proj.",
    ".attn.out.": ".self_attn.o_proj.", ".mlp.gate.": ".mlp.gate_proj.", ".mlp.up.": ".mlp.up_proj.",
    ".mlp.down.": ".mlp.down_proj.", ".post_attn_norm.": ".post_attention_layernorm.",
    ".pre_attn_norm.": ".input_layernorm.", ".post_mlp_norm.": ".post_feedforward_layernorm.",
    "text.blocks.": "text.layers.", "text.final_norm.": "text.norm.", "text.embedding.": "text.embed_tokens.",
    ".scale": ".weight", "text.": "model.language_model.",
}  # fmt: skip


def peer_name(native: str, *, post_norms: bool) -> str:
    """What transformers calls a parameter. Its Gemma 1 names the norm before the MLP after the attention before it."""
    if native.startswith("projector."):
        return native.replace("projector.", "model.multi_modal_projector.linear.")
    pre_mlp = ".pre_feedforward_layernorm." if post_norms else ".post_attention_layernorm."
    pairs = _TOWER if native.startswith("vision.") else {**_DECODER, ".pre_mlp_norm.": pre_mlp}
    for ours, theirs in pairs.items():
        native = native.replace(ours, theirs)
    return native


def peer_of(model: PaliGemmaModel) -> PaliGemmaForConditionalGeneration:
    """transformers' model with the same weights and dtype, every one of its parameters filled."""
    config = peer_config(model.config)
    peer = PaliGemmaForConditionalGeneration(config).to(model.projector.weight.dtype).eval()
    names = {name: peer_name(name, post_norms=model.config.text.post_norms) for name in model.state_dict()}
    state = {names[name]: value.clone() for name, value in model.state_dict().items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    peer.tie_weights()
    assert peer.lm_head.weight is peer.model.language_model.embed_tokens.weight
    return peer


def peer_config(config: PaliGemmaConfig) -> PeerConfig:
    text, vision = config.text, config.vision
    fields: dict[str, Any] = {
        "model_type": "gemma2" if text.post_norms else "gemma", "hidden_size": text.width,
        "num_hidden_layers": text.depth, "intermediate_size": text.mlp_dim, "num_attention_heads": text.n_heads,
        "num_key_value_heads": text.n_kv_heads, "head_dim": text.head_dim, "vocab_size": text.vocab_size,
    }  # fmt: skip
    if text.post_norms:
        fields |= {
            "query_pre_attn_scalar": text.query_pre_attn_scalar, "attn_logit_softcapping": text.attn_logits_softcap,
            "final_logit_softcapping": text.final_logits_softcap,
            "sliding_window": text.sliding_window or 1 << 20,
        }  # fmt: skip
    peer = PeerConfig(
        text_config=fields,
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": vision.width, "num_hidden_layers": vision.depth,
            "intermediate_size": vision.mlp_dim, "num_attention_heads": vision.n_heads,
            "image_size": vision.resolution, "patch_size": vision.patch_size, "vision_use_head": False,
        },
        image_token_index=config.tokens.image, projection_dim=text.width, hidden_size=text.width,
        bos_token_id=config.tokens.bos, eos_token_id=config.tokens.eos, pad_token_id=config.tokens.pad,
    )  # fmt: skip
    peer._attn_implementation = "eager"
    return peer


def peer_inputs(batch: Batch, config: PaliGemmaConfig) -> dict[str, Tensor]:
    """Token type 0 is image, prefix and padding; 1 the suffix. Placeholders stand in the image slots."""
    inputs = {
        "input_ids": batch.tokens.masked_fill(batch.mask_image, config.tokens.image),
        "attention_mask": batch.mask_input.long(),
        "token_type_ids": (batch.mask_ar.bool() & batch.mask_input).long(),
    }
    if batch.pixels is None:
        return inputs
    pixels = of_levels(batch.pixels) if batch.pixels.dtype == torch.uint8 else batch.pixels
    return {**inputs, "pixel_values": pixels}
