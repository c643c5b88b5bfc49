"""The reference's tiny models and their inputs as this package holds them."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paligemma.checkpoints import read
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import Batch

DATA = Path(__file__).parent / "golden" / "data"
Arrays = dict[str, NDArray[Any]]

# What the README of each folder promises: image tower and projection; all after the decoder; log-probabilities.
TOWER_ATOL = 1e-4
LOGITS_ATOL = {"paligemma_v1": 5e-4, "paligemma_v2": 6e-3}
LOGPROB_ATOL = {"paligemma_v1": 1e-4, "paligemma_v2": 1e-3}
# The files of a variant end in its name; the first generation has one variant and no suffix.
VARIANTS = {
    "paligemma_v1": ("default",),
    "paligemma_v2": ("caps_on", "caps_off", "attn_cap_only", "final_cap_only", "caps_on_emb_per_head"),
}
CASES = [(folder, variant) for folder, variants in VARIANTS.items() for variant in variants]


@functools.cache
def arrays(folder: str, name: str) -> Arrays:
    with np.load(DATA / folder / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def outputs(folder: str, kind: str, variant: str) -> Arrays:
    """`forward` or `generate` outputs of a variant."""
    return arrays(folder, kind if variant == "default" else f"{kind}_{variant}")


def variant_overrides(folder: str, variant: str) -> dict[str, Any]:
    """The TextConfig fields in which a variant differs; big_vision writes 0 for a cap that is off."""
    stated = json.loads((DATA / folder / "config.json").read_text())
    llm = {**stated["llm"], **stated["forward_variants"][variant]}
    scales = {"rsqrt_head_dim": llm["head_dim"], "rsqrt_emb_per_head": llm["width"] // llm["num_heads"]}
    return {
        "attn_logits_softcap": llm["attn_logits_softcap"] or None,
        "final_logits_softcap": llm["final_logits_softcap"] or None,
        "query_pre_attn_scalar": scales[llm["query_pre_attn_norm"]],
    }


@functools.cache
def golden_model(folder: str, variant: str, file: str = "params", **text: Any) -> PaliGemmaModel:
    """The reference model in float32; its decoding (final cap from the second token on) unless told otherwise."""
    config, state = read(DATA / folder / f"{file}.npz", dtype=torch.float32)
    changes = {**variant_overrides(folder, variant), "final_cap": "later_steps", **text}
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))
    model = PaliGemmaModel(config)
    model.load_state_dict(state)
    return model.requires_grad_(False)


def golden_batch(
    folder: str, inputs: Arrays, prefix: str = "", rows: list[int] | None = None, *, with_input_mask: bool = False
) -> Batch:
    """The reference's inputs as a Batch: its `text` fields cover text alone, ours the image slots as well.

    Without an input mask padding counts as input; big_vision's plain forward does so and relies on `mask_ar`.
    """
    keep = list(range(len(inputs["image"]))) if rows is None else rows
    image, text, ar = (inputs[name][keep] for name in ("image", f"{prefix}text", f"{prefix}mask_ar"))
    real = inputs[f"{prefix}mask_input"][keep] if with_input_mask else np.ones_like(text)
    frames = image if image.ndim == 5 else image[:, None]
    n_slots = frames.shape[1] * golden_model(folder, VARIANTS[folder][0]).config.vision.n_image_tokens

    def joined(image_value: int, of_text: NDArray[Any], dtype: torch.dtype) -> Tensor:
        slots = np.full((len(text), n_slots), image_value)
        return torch.from_numpy(np.concatenate([slots, of_text], axis=1)).to(dtype)

    mask_input = joined(1, real, torch.bool)
    pixels = torch.from_numpy(frames).flatten(0, 1).permute(0, 3, 1, 2).contiguous()
    return Batch(
        tokens=joined(0, text, torch.int64),
        mask_image=joined(1, np.zeros_like(text), torch.bool),
        mask_ar=joined(0, ar, torch.int64),
        mask_input=mask_input,
        mask_loss=torch.zeros_like(mask_input),
        segment_ids=mask_input.long(),
        positions=(mask_input.cumsum(1) - 1).clamp_min(0),
        pixels=pixels,
        n_images=(frames.shape[1],) * len(text),
        order=tuple(range(len(text))),
    )


def until_eos(tokens: NDArray[Any], eos: int = 1) -> list[int]:
    """A row of reference tokens up to its first eos; what follows is garbage by its README."""
    row = tokens.tolist()
    return row[: row.index(eos) + 1] if eos in row else row
