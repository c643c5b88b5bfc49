"""The plan of a run: it counts what torch really keeps and what a real process takes, and says what would fit."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

from paligemma.config import PaliGemmaConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.models.lora import LoraOptions, add_lora
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.presets import MODEL_PRESETS
from paligemma.train.plan import Setup, plan

ROOT = Path(__file__).parents[3]
GIB = 1 << 30
M3B = MODEL_PRESETS["paligemma2-3b-224"]


def small(text_depth: int, vision_depth: int, *, is_gemma2: bool) -> PaliGemmaConfig:
    """Sizes that all differ, so that no tensor can stand for another."""
    caps = {"attn_logits_softcap": 50.0, "final_logits_softcap": 30.0} if is_gemma2 else {}
    return PaliGemmaConfig(
        vision=VisionConfig(width=96, depth=vision_depth, mlp_dim=208, n_heads=6, resolution=70),
        text=TextConfig(
            width=112, depth=text_depth, mlp_dim=272, n_heads=4, n_kv_heads=2, head_dim=40, vocab_size=1000,
            post_norms=is_gemma2, query_pre_attn_scalar=40, **caps,
        ),
        tokens=TokenConfig(n_tokens=1000, loc_start=900, seg_start=950, image=1000, n_loc=0, n_seg=0),
    )  # fmt: skip


def kept_bytes(config: PaliGemmaConfig, setup: Setup, *, narrow_base: bool = False) -> int:
    """Bytes that autograd keeps of a real forward pass, the parameters themselves not counted."""
    model = PaliGemmaModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    if setup.method == "frozen":
        model.vision.requires_grad_(False)
        model.projector.requires_grad_(False)
    elif setup.has_adapters:
        if narrow_base:
            model.to(torch.bfloat16)
        add_lora(model, dataclasses.replace(setup.lora, use_dora=setup.method == "dora"))
    model.train()
    model.vision.recompute = model.text.recompute = setup.recompute
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    rows, length, P = setup.part_size, setup.length(config), config.vision.n_image_tokens
    slot = torch.arange(length).expand(rows, length)
    autocast = setup.compute_bytes == 2 and not narrow_base
    where = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), where:
        out = model.pre_logits(
            torch.randint(0, 900, (rows, length)),
            mask_image=slot < P,
            mask_ar=(slot >= length - setup.target_length).long(),
            pixels=torch.randn(rows, 3, 70, 70),
        )
    assert out.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("is_gemma2", [True, False], ids=["gemma2", "gemma1"])
@pytest.mark.parametrize("compute_bytes", [4, 2], ids=["float32", "autocast"])
@pytest.mark.parametrize("method", ["full", "frozen", "lora", "dora"])
def test_a_block_keeps_the_bytes_that_autograd_keeps(method, compute_bytes, is_gemma2):
    setup = Setup(method=method, part_size=5, batch_size=5, text_length=20, compute_bytes=compute_bytes)
    for depths in ((3, 1), (2, 2)) if method in ("full",) else ((3, 1),):
        more, less = (small(*d, is_gemma2=is_gemma2) for d in (depths, (2, 1)))
        real = kept_bytes(more, setup) - kept_bytes(less, setup)
        planned = plan(more, setup).instants[0].activations - plan(less, setup).instants[0].activations
        assert planned == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_block_over_bfloat16_weights_keeps_the_bytes_that_autograd_keeps(method):
    setup = Setup(method=method, part_size=5, batch_size=5, text_length=20, compute_bytes=2, weight_bytes=2)
    more, less = small(3, 1, is_gemma2=True), small(2, 1, is_gemma2=True)
    real = kept_bytes(more, setup, narrow_base=True) - kept_bytes(less, setup, narrow_base=True)
    planned = plan(more, setup).instants[0].activations - plan(less, setup).instants[0].activations
    assert planned == pytest.approx(real, rel=0.01)


def test_adapters_of_the_tower_and_the_projector_are_counted():
    setup = Setup(
        method="lora", lora=LoraOptions(targets=("decoder", "vision", "projector")), part_size=5, batch_size=5
    )
    more, less = small(2, 2, is_gemma2=True), small(2, 1, is_gemma2=True)
    real = kept_bytes(more, setup) - kept_bytes(less, setup)
    planned = plan(more, setup).instants[0].activations - plan(less, setup).instants[0].activations
    assert planned == pytest.approx(real, rel=0.01)
