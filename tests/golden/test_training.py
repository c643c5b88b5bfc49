"""Losses, gradients, schedules and ten-step runs of the original trainer, on its own small models.

Tolerances are those of the README beside the numbers: losses 5e-5, gradient norms 5e-5 relative, single gradients 1e-5
of the largest entry, final parameters 5e-6. The key bias of the image attention has a mathematically zero gradient, of
which Adam makes steps: it is compared with 1e-3.
"""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from paligemma.checkpoints import read, write
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import Batch
from paligemma.train.loss import cross_entropy, loss_sums, target_counts
from paligemma.train.optim import Optimizer, OptimOptions, global_norm
from paligemma.train.schedule import Duration, Schedule
from tests.golden_model import DATA

FOLDER = DATA / "training"
GENERATIONS = ("v1", "v2")
KEY_BIAS = "vision.blocks.{i}.attn.k.bias"
# The reference's patterns in native names.
PATTERNS = {
    "img/head/.*": "projector",
    "img/.*": "image",
    "llm/embedder/.*": "embedding",
    "llm/layers/mlp/.*": "mlp",
    "llm/.*": "text",
    ".*": "all",
    ".*/(w|gating_einsum|linear)$": r"text\.blocks\.\d+\.(attn|mlp)\.\w+\.weight",
}
DURATIONS = ("steps", "epochs", "examples", "percent")


def stated(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def model_of(generation: str, **text: Any) -> PaliGemmaModel:
    config, state = read(FOLDER / f"init_params_{generation}.npz", dtype=torch.float32)
    llm = stated(f"config_{generation}")["llm"]
    changes = {
        "attn_logits_softcap": llm["attn_logits_softcap"] or None,
        "final_logits_softcap": llm["final_logits_softcap"] or None,
        "query_pre_attn_scalar": llm["head_dim"],
        "final_cap": "later_steps",
        **text,
    }
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))
    model = PaliGemmaModel(config)
    model.load_state_dict(state)
    return model


def batch_of(generation: str, number: int, n_image_tokens: int) -> Batch:
    """The reference's text fields cover text alone, padding counts as input and hides behind `mask_ar`."""
    source = arrays(f"batches_{generation}")
    image, text, ar, loss = (source[f"batch{number}/{name}"] for name in ("image", "text", "mask_ar", "mask_loss"))

    def joined(image_value: int, of_text: np.ndarray, dtype: torch.dtype) -> Tensor:
        slots = np.full((len(text), n_image_tokens), image_value)
        return torch.from_numpy(np.concatenate([slots, of_text], axis=1)).to(dtype)

    mask_input = joined(1, np.ones_like(text), torch.bool)
    return Batch(
        tokens=joined(0, text, torch.int64),
        mask_image=joined(1, np.zeros_like(text), torch.bool),
        mask_ar=joined(0, ar, torch.int64),
        mask_input=mask_input,
        mask_loss=joined(0, loss, torch.bool),
        segment_ids=mask_input.long(),
        positions=(mask_input.cumsum(1) - 1).clamp_min(0),
        pixels=torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(),
        n_images=(1,) * len(text),
        order=tuple(range(len(text))),
    )


def loss_of(model: PaliGemmaModel, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    sums = loss_sums(model, batch, token_loss=cross_entropy(label_smoothing), chunk_tokens=7)
    return sums.total / target_counts(batch, "per_example")


def rename(folder, config, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Native tensors under the names and in the shapes of the reference."""
    target = folder / "renamed.npz"
    write(target, config, {name: t.detach().float() for name, t in tensors.items()}, "npz", overwrite=True)
    with np.load(target) as file:
        return {name: file[name] for name in file.files if name.startswith("params/")}


def native_tree(name: str) -> str:
    """params/img/…, whatever stands before img or llm."""
    place = min(i for i in (name.find("img/"), name.find("llm/")) if i >= 0)
    return f"params/{name[place:]}"


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("case", ["batch0_ls0.0", "batch1_ls0.0", "batch2_ls0.0", "batch0_ls0.3"])
def test_losses_gradient_norms_and_token_losses(generation, case):
    expected = stated(f"loss_and_grad_norms_{generation}")[case]
    model = model_of(generation)
    number, smoothing = int(case[5]), float(case.split("ls")[1])
    batch = batch_of(generation, number, model.config.vision.n_image_tokens)
    sums = loss_sums(model, batch, token_loss=cross_entropy(smoothing))
    loss = sums.total / target_counts(batch, "per_example")
    assert_allclose(loss.item(), expected["loss"], atol=5e-5, rtol=0)
    logp = arrays(f"token_logp_{generation}")[f"{case}/token_logp"]
    mask = arrays(f"batches_{generation}")[f"batch{number}/mask_loss"][:, 1:].astype(bool)
    assert_allclose(sums.tokens.numpy(), -logp[mask], atol=5e-5, rtol=0)
    loss.backward()
    norm = global_norm([p.grad for p in model.parameters()])
    assert_allclose(norm, expected["grad_global_l2"], rtol=5e-5)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_gradient_of_a_batch(generation, tmp_path):
    model = model_of(generation)
    loss_of(model, batch_of(generation, 0, model.config.vision.n_image_tokens)).backward()
    grads = rename(tmp_path, model.config, {name: p.grad for name, p in model.named_parameters()})
    expected = {native_tree(k): v for k, v in arrays(f"gradients_{generation}").items()}
    assert set(grads) == set(expected)
    for name, value in expected.items():
        atol = 1e-5 * np.abs(value).max() if "key/bias" not in name else 1e-6
        assert_allclose(grads[name], value, atol=atol, rtol=0, err_msg=name)


def test_the_final_cap_is_no_part_of_the_reference_loss_and_the_attention_cap_is():
    expected = stated("loss_and_grad_norms_v2")["batch0_ls0.0"]
    for field, value in (("final_logits_softcap", "loss_with_final_cap_off"), ("attn_logits_softcap", None)):
        model = model_of("v2", **{field: None})
        loss = loss_of(model, batch_of("v2", 0, model.config.vision.n_image_tokens)).item()
        assert (abs(loss - expected["loss"]) < 5e-5) == (value is not None)
    capped = model_of("v2", final_cap="everywhere")
    loss = loss_of(capped, batch_of("v2", 0, capped.config.vision.n_image_tokens)).item()
    assert abs(loss - expected["loss"]) > 1e-2


def schedule_of(stated_schedule: dict[str, Any] | None) -> Schedule | None:
    if stated_schedule is None:
        return None
    values = dict(stated_schedule)
    kind = values.pop("decay_type")
    parts: dict[str, Any] = {"kind": "linear" if kind == "polynomial" else kind}
    for phase in ("warmup", "cooldown"):
        given = {unit: values.pop(f"{phase}_{unit}") for unit in DURATIONS if f"{phase}_{unit}" in values}
        parts[phase] = Duration(**given)
    if kind == "stair":
        parts["stairs"] = tuple(zip(values.pop("steps"), values.pop("mults"), strict=True))
    parts["end"] = values.pop("linear_end", 0.0)
    parts.update(values)  # power, timescale
    return Schedule(**parts)


@pytest.mark.parametrize("case", stated("schedules"), ids=lambda case: json.dumps(case["schedule"]))
def test_schedules(case):
    schedule = schedule_of(case["schedule"])
    sizes = {"total_steps": case["total_steps"], "batch_size": case["batch_size"], "n_examples": case["data_size"]}
    got = [schedule.factor(step, **sizes) for step in range(len(case["multiplier_at_step"]))]
    assert_allclose(got, case["multiplier_at_step"], atol=2e-7)


def options_of(recipe: dict[str, Any]) -> OptimOptions:
    schedules = recipe["schedule"]
    rules = [[".*", schedules]] if isinstance(schedules, dict) else schedules

    def mults(name: str) -> tuple[tuple[str, float], ...]:
        return tuple((PATTERNS[pattern], value) for pattern, value in recipe[name] or () if pattern != ".*/kernel$")

    decay = OptimOptions().decay_mults if any(p == ".*/kernel$" for p, _ in recipe["wd_mults"]) else ()
    return OptimOptions(
        lr=recipe["lr"],
        weight_decay=recipe["wd"],
        betas=(recipe["optax"]["b1"], recipe["optax"].get("b2", 0.999)),
        eps=recipe["optax"].get("eps", 1e-8),
        clip_norm=recipe["grad_clip_norm"] or None,
        schedules=tuple((PATTERNS[pattern], schedule_of(value)) for pattern, value in rules),
        lr_mults=mults("lr_mults"),
        decay_mults=(*decay, *mults("wd_mults")),
    )


RUNS = sorted(p.stem for p in FOLDER.glob("run_v?_*.json") if "after" not in p.stem)


@pytest.mark.parametrize("run", RUNS)
def test_ten_steps(run, tmp_path):
    expected, generation = stated(run), run.split("_")[1]
    recipe = expected["recipe"]
    model = model_of(generation)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model.named_parameters(), options_of(recipe), total_steps=recipe["total_steps"])
    for step, (number, told) in enumerate(zip(expected["batch_of_step"], expected["steps"], strict=True)):
        batch = batch_of(generation, number, model.config.vision.n_image_tokens)
        loss = loss_of(model, batch, recipe["label_smoothing"])
        assert_allclose(loss.item(), told["training_loss"], atol=5e-5, rtol=0, err_msg=f"step {step}")
        loss.backward()
        last = {name: p.detach().clone() for name, p in model.named_parameters()}
        norm = optimizer.update(step)
        assert_allclose(norm, told["l2_grads"], rtol=5e-5, err_msg=f"step {step}")
        moved = global_norm([p.detach() - last[name] for name, p in model.named_parameters()])
        assert_allclose(moved, told["l2_updates"], rtol=1e-3, atol=1e-7, err_msg=f"step {step}")
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[name]), f"{name} is frozen"
    got = rename(tmp_path, model.config, dict(model.named_parameters()))
    start = rename(tmp_path, model.config, before)
    for name, told in expected["final_params"].items():
        if "key/bias" in name:
            continue
        delta = (got[f"params/{name}"].astype(np.float64) - start[f"params/{name}"]).ravel()
        assert_allclose(np.abs(delta).sum(), told["delta_abs_sum"], rtol=1e-4, atol=1e-7, err_msg=name)
    if (FOLDER / f"{run}_final_params.npz").exists():
        for name, value in arrays(f"{run}_final_params").items():
            atol = 1e-3 if "key/bias" in name else 5e-6
            assert_allclose(got[native_tree(name)], value, atol=atol, rtol=0, err_msg=name)
