"""Tiny models of both generations, whose sizes all differ so that swapped dims show, and prompts to ask them."""

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paligemma.config import PaliGemmaConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import Batch, Item, PaddingSide, collate
from paligemma.processing.prompt import lay_out

EOS, BOS, SEPARATOR = 1, 2, 4
N_TOKENS = 70


def tiny_config(generation: int, **text: Any) -> PaliGemmaConfig:
    """PaliGemma 1 (one key/value head) or 2 (two, caps, post norms, a window shorter than any row); no filler rows."""
    sizes: dict[str, Any] = {
        1: {"n_kv_heads": 1, "post_norms": False, "query_pre_attn_scalar": 6},
        2: {
            "n_kv_heads": 2, "post_norms": True, "query_pre_attn_scalar": 5, "attn_logits_softcap": 5.0,
            "final_logits_softcap": 3.0, "sliding_window": 7,
        },
    }[generation]  # fmt: skip
    common = {"width": 20, "depth": 3, "mlp_dim": 44, "n_heads": 4, "head_dim": 6, "vocab_size": N_TOKENS}
    return PaliGemmaConfig(
        vision=VisionConfig(width=12, depth=2, mlp_dim=28, n_heads=3, resolution=28),
        text=TextConfig(**{**common, **sizes, **text}),
        tokens=TokenConfig(n_tokens=N_TOKENS, loc_start=40, seg_start=56, image=N_TOKENS, n_loc=16, n_seg=14),
    )


@functools.cache
def tiny_model(config: PaliGemmaConfig, seed: int = 0) -> PaliGemmaModel:
    """Random weights, norms and biases included; eos is likely enough to end some answers early. Do not change it."""
    model = PaliGemmaModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                is_factor = name.startswith("vision") and "norm" in name and name.endswith("weight")
                weight.copy_(0.1 * noise + float(is_factor))
            else:
                weight.copy_(1.5 * noise / weight[0].numel() ** 0.5)
        model.text.embedding.weight[EOS] *= 2.5
    return model.requires_grad_(False)


def random_item(
    config: PaliGemmaConfig,
    seed: int,
    *,
    n_images: int = 1,
    n_prefix: int = 5,
    n_suffix: int = 0,
    is_open: bool = False,
) -> Item:
    """One example: random pictures, a random prefix, a random suffix (with eos unless `is_open`)."""
    rng = np.random.default_rng(seed)
    words = rng.integers(5, N_TOKENS, n_prefix + n_suffix).tolist()
    R = config.vision.resolution
    return Item(
        lay_out(
            n_images * config.vision.n_image_tokens, words[:n_prefix], [SEPARATOR], words[n_prefix:],
            bos=BOS, eos=EOS if n_suffix and not is_open else None,
        ),
        pixels=torch.from_numpy(rng.uniform(-1, 1, (n_images, 3, R, R)).astype(np.float32)) if n_images else None,
    )  # fmt: skip


def unlike_items(config: PaliGemmaConfig, *, n_suffix: int = 0) -> list[Item]:
    """Four prompts of unlike lengths and image counts, one without any picture."""
    shapes = [(1, 5), (0, 3), (2, 9), (1, 1)]
    return [
        random_item(config, 10 + i, n_images=images, n_prefix=prefix, n_suffix=n_suffix + i if n_suffix else 0)
        for i, (images, prefix) in enumerate(shapes)
    ]


def unlike_prompts(config: PaliGemmaConfig, padding_side: PaddingSide = "right", **options: Any) -> Batch:
    return collate(unlike_items(config), padding_side=padding_side, **options)


def logits_of(model: PaliGemmaModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch.model_inputs())


def changed(config: PaliGemmaConfig, **text: Any) -> PaliGemmaConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **text))
