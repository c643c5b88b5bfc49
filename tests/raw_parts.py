"""Raw SigLIP and raw Gemma files of every format, written by hand from one native state."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from paligemma.checkpoints import assemble, write
from paligemma.config import PaliGemmaConfig
from tests.checkpoint_cases import hf_tensors, old_config_json, random_state, tiny_config

State = dict[str, Tensor]
Arrays = dict[str, np.ndarray]
PIECES, ROWS, SIDE = 48, 1200, 42  # a vocabulary before and after loc and seg; the side of a picture


def tower_tensors(state: State, prefix: str = "vision_model.") -> State:
    """The tower under Hugging Face's names for a raw SigLIP."""
    long = "vision_tower.vision_model."
    return {prefix + n.removeprefix(long): t for n, t in hf_tensors(state, 1).items() if n.startswith(long)}


def gemma_tensors(state: State, generation: int, n_pieces: int | None = None, prefix: str = "model.") -> State:
    """The decoder under Hugging Face's names for a raw Gemma, its table cut to `n_pieces` rows."""
    long = "language_model.model."
    out = {prefix + n.removeprefix(long): t for n, t in hf_tensors(state, generation).items() if n.startswith(long)}
    out[f"{prefix}embed_tokens.weight"] = out[f"{prefix}embed_tokens.weight"][:n_pieces]
    return out


def siglip_extras(width: int = 12) -> State:
    """What a raw SigLIP holds besides its tower."""
    return {
        "vision_model.head.probe": torch.ones(1, 1, width), "vision_model.head.mlp.fc1.bias": torch.ones(5),
        "text_model.embeddings.token_embedding.weight": torch.ones(7, width), "logit_scale": torch.ones(1),
        "logit_bias": torch.ones(1),
    }  # fmt: skip


def siglip_json(config: PaliGemmaConfig) -> dict:
    return {"model_type": "siglip", "vision_config": old_config_json(config)["vision_config"]
            | {"image_size": config.vision.resolution}}  # fmt: skip


def gemma_json(config: PaliGemmaConfig, n_pieces: int) -> dict:
    text = old_config_json(config)["text_config"]
    return text | {"vocab_size": n_pieces, "head_dim": config.text.head_dim, "eos_token_id": [1, 107]}


def folder_of(folder: Path, tensors: State, values: dict | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if values is not None:
        (folder / "config.json").write_text(json.dumps(values))
    return folder


def npz_of(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


def img_arrays(state: State, config: PaliGemmaConfig, *, scanned: bool) -> Arrays:
    """big_vision's names for a raw SigLIP, with its head, its text tower and the two numbers of its loss."""
    v = config.vision
    h, e, width = v.n_heads, v.width // v.n_heads, v.width
    blocks: list[dict[str, Tensor]] = []
    for j in range(v.depth):
        own = {
            n.removeprefix(f"vision.blocks.{j}."): t for n, t in state.items() if n.startswith(f"vision.blocks.{j}.")
        }
        att = "MultiHeadDotProductAttention_0"
        block = {
            "LayerNorm_0/scale": own["attn_norm.weight"], "LayerNorm_0/bias": own["attn_norm.bias"],
            "LayerNorm_1/scale": own["mlp_norm.weight"], "LayerNorm_1/bias": own["mlp_norm.bias"],
            f"{att}/out/kernel": own["attn.out.weight"].T.reshape(h, e, width), f"{att}/out/bias": own["attn.out.bias"],
            "MlpBlock_0/Dense_0/kernel": own["mlp.up.weight"].T, "MlpBlock_0/Dense_0/bias": own["mlp.up.bias"],
            "MlpBlock_0/Dense_1/kernel": own["mlp.down.weight"].T, "MlpBlock_0/Dense_1/bias": own["mlp.down.bias"],
        }  # fmt: skip
        for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
            block[f"{att}/{long}/kernel"] = own[f"attn.{short}.weight"].T.reshape(width, h, e)
            block[f"{att}/{long}/bias"] = own[f"attn.{short}.bias"].reshape(h, e)
        blocks.append(block)
    out = {
        "img/embedding/kernel": state["vision.patch_embedding.weight"].permute(2, 3, 1, 0),
        "img/embedding/bias": state["vision.patch_embedding.bias"],
        "img/pos_embedding": state["vision.position_embedding"][None],
        "img/Transformer/encoder_norm/scale": state["vision.final_norm.weight"],
        "img/Transformer/encoder_norm/bias": state["vision.final_norm.bias"],
        "img/MAPHead_0/probe": torch.ones(1, 1, width), "txt/Encoder_0/x": torch.ones(3), "t": torch.ones(1),
        "b": torch.ones(1),
    }  # fmt: skip
    for name in blocks[0]:
        if scanned:
            out[f"img/Transformer/encoderblock/{name}"] = torch.stack([block[name] for block in blocks])
        else:
            out |= {f"img/Transformer/encoderblock_{j}/{name}": block[name] for j, block in enumerate(blocks)}
    return {f"params/{name}": tensor.numpy() for name, tensor in out.items()}


def layer_arrays(state: State, config: PaliGemmaConfig, i: int) -> dict[str, Tensor]:
    """One decoder layer under Flax' names, [heads, in, out] and [in, out]."""
    t = config.text
    own = {n.removeprefix(f"text.blocks.{i}."): w for n, w in state.items() if n.startswith(f"text.blocks.{i}.")}

    def heads(name: str, n: int) -> Tensor:
        return own[f"attn.{name}.weight"].reshape(n, t.head_dim, t.width).permute(0, 2, 1)

    out = {
        "attn/q_einsum/w": heads("q", t.n_heads),
        "attn/kv_einsum/w": torch.stack([heads("k", t.n_kv_heads), heads("v", t.n_kv_heads)]),
        "attn/attn_vec_einsum/w": own["attn.out.weight"].T.reshape(t.n_heads, t.head_dim, t.width),
        "mlp/gating_einsum": torch.stack([own["mlp.gate.weight"].T, own["mlp.up.weight"].T]),
        "mlp/linear": own["mlp.down.weight"].T, "pre_attention_norm/scale": own["pre_attn_norm.scale"],
        "pre_ffw_norm/scale": own["pre_mlp_norm.scale"],
    }  # fmt: skip
    if t.post_norms:
        out |= {"post_attention_norm/scale": own["post_attn_norm.scale"],
                "post_ffw_norm/scale": own["post_mlp_norm.scale"]}  # fmt: skip
    return out


def flax_arrays(state: State, config: PaliGemmaConfig, n_pieces: int, *, variant: bool = False) -> Arrays:
    """Gemma's own Flax names; the variant has [2, F, D] gates, `/w` behind MLP names and no `transformer/`."""
    top = "" if variant else "transformer/"
    out = {
        f"{top}embedder/input_embedding": state["text.embedding.weight"][:n_pieces],
        f"{top}final_norm/scale": state["text.final_norm.scale"],
    }
    for i in range(config.text.depth):
        for name, tensor in layer_arrays(state, config, i).items():
            if variant and name == "mlp/gating_einsum":
                tensor = tensor.mT
            out[f"{top}layer_{i}/{name}{'/w' if variant and name.startswith('mlp/') else ''}"] = tensor
    return {name: tensor.contiguous().numpy() for name, tensor in out.items()}


def llm_arrays(state: State, config: PaliGemmaConfig, n_pieces: int) -> Arrays:
    """big_vision's stacked names for a raw Gemma."""
    layers = [layer_arrays(state, config, i) for i in range(config.text.depth)]
    out = {f"params/llm/layers/{name}": torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    out["params/llm/embedder/input_embedding"] = state["text.embedding.weight"][:n_pieces]
    out["params/llm/final_norm/scale"] = state["text.final_norm.scale"]
    return {name: tensor.numpy() for name, tensor in out.items()}


def gemma_pytorch_tensors(state: State, generation: int, n_pieces: int) -> State:
    """gemma_pytorch's names: queries, keys and values in one matrix, and a buffer of frequencies."""
    out = gemma_tensors(state, generation, n_pieces)
    out["embedder.weight"] = out.pop("model.embed_tokens.weight")
    for name in [name for name in out if "q_proj" in name]:
        out[name.replace("q_proj", "qkv_proj")] = torch.cat(
            [out.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        )
    return out | {"freqs_cis": torch.ones(4, dtype=torch.complex64), "local_freqs_cis": torch.ones(4)}


def quantised(tensors: State) -> State:
    """Matrices as int8 with a factor per row, as the quantised variant of gemma_pytorch keeps them."""
    out: State = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            out[name] = tensor
            continue
        factors = tensor.abs().amax(1) / 127
        out[name] = (tensor / factors[:, None]).round().to(torch.int8)
        out[f"{name}_scaler"] = factors
    return out


def model(generation: int = 2, dtype=torch.float32):
    """What the parts are taken from: 48 pieces, then loc and seg rows that no raw file holds."""
    config = tiny_config(generation, rows=ROWS, resolution=SIDE)
    return config, random_state(config, dtype)


def siglip(folder: Path, config, state, **fields) -> Path:
    return folder_of(folder, tower_tensors(state) | siglip_extras(), siglip_json(config) | fields)


def gemma(folder: Path, config, state, n_pieces: int = PIECES, **fields) -> Path:
    generation = 2 if config.text.post_norms else 1
    tensors = gemma_tensors(state, generation, n_pieces)
    return folder_of(folder, tensors, gemma_json(config, n_pieces) | fields)


def put_together(vision, text, **choices):
    """Configuration, every tensor, and the report."""
    config, state = assemble(vision, text, **{"resolution": SIDE, **choices})
    with state:
        return config, dict(state), state.report


# Every kind of file that a part comes in: (folder, configuration, native state) -> where it is.
VISION = {
    "SigLIP folder": siglip,
    "SigLIP file": lambda f, c, s: siglip(f, c, s) / "model.safetensors",
    "tower alone": lambda f, c, s: folder_of(
        f, tower_tensors(s, "") | {"head.probe": torch.ones(2)},
        siglip_json(c)["vision_config"],
    ),
    "another prefix": lambda f, c, s: folder_of(
        f, tower_tensors(s, "model.vision_tower.vision_model."), siglip_json(c)
    ),
    "big_vision, a layer at a time": lambda f, c, s: npz_of(f / "v.npz", img_arrays(s, c, scanned=False)),
    "big_vision, stacked": lambda f, c, s: npz_of(f / "v.npz", img_arrays(s, c, scanned=True)),
    "PaliGemma folder": lambda f, c, s: write(f, c, s),
    "PaliGemma archive": lambda f, c, s: write(f / "p.npz", c, s, "npz"),
}  # fmt: skip
TEXT = {
    "Gemma folder": gemma,
    "Gemma file": lambda f, c, s: gemma(f, c, s) / "model.safetensors",
    "decoder alone": lambda f, c, s: folder_of(
        f, gemma_tensors(s, 1 + c.text.post_norms, PIECES, ""), gemma_json(c, PIECES)
    ),
    "Flax": lambda f, c, s: npz_of(f / "t.npz", flax_arrays(s, c, PIECES)),
    "Flax, other names": lambda f, c, s: npz_of(f / "t.npz", flax_arrays(s, c, PIECES, variant=True)),
    "big_vision": lambda f, c, s: npz_of(f / "t.npz", llm_arrays(s, c, PIECES)),
    "gemma_pytorch": lambda f, c, s: folder_of(
        f, gemma_pytorch_tensors(s, 1 + c.text.post_norms, PIECES), gemma_json(c, PIECES)
    ),
}  # fmt: skip
