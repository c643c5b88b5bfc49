"""One real training run of a few steps in a process of its own: what `paligemma plan` predicts, measured.

    python benchmarks/helpers/probe.py '{"shape": {…}, "method": "lora", …}'     answers in JSON

The shape is that of a PaliGemma 2 with other sizes; weights are random.
"""

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script, by the benchmark and by the tests
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch

from helpers.steps import anonymous_bytes, make_step, measure_steps
from paligemma.config import PaliGemmaConfig, TextConfig, TokenConfig, VisionConfig
from paligemma.models.lora import LoraOptions, add_lora
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.train.devices import Device, measured_cpu
from paligemma.train.loop import FitOptions, default_loss, prepare, train_step
from paligemma.train.optim import Optimizer, OptimOptions
from paligemma.train.plan import Setup
from paligemma.train.ranks import Ranks
from paligemma.train.state import TrainState

# 3B widths; the cases say how many layers, how many words.
SHAPE = {
    "vision_width": 1152, "vision_depth": 1, "vision_mlp": 4304, "vision_heads": 16, "resolution": 224,
    "width": 2304, "depth": 1, "mlp": 9216, "heads": 8, "kv_heads": 4, "head_dim": 256, "vocab": 257216,
    "is_gemma2": True,
}  # fmt: skip


def config_of(shape: dict[str, Any]) -> PaliGemmaConfig:
    s = SHAPE | shape
    caps = {"attn_logits_softcap": 50.0, "final_logits_softcap": 30.0} if s["is_gemma2"] else {}
    n = s["vocab"]
    return PaliGemmaConfig(
        vision=VisionConfig(
            width=s["vision_width"], depth=s["vision_depth"], mlp_dim=s["vision_mlp"], n_heads=s["vision_heads"],
            resolution=s["resolution"],
        ),
        text=TextConfig(
            width=s["width"], depth=s["depth"], mlp_dim=s["mlp"], n_heads=s["heads"], n_kv_heads=s["kv_heads"],
            head_dim=s["head_dim"], vocab_size=n, post_norms=s["is_gemma2"], query_pre_attn_scalar=s["head_dim"],
            **caps,
        ),
        tokens=TokenConfig(n_tokens=n, loc_start=n, seg_start=n, image=n, n_loc=0, n_seg=0),
    )  # fmt: skip


def setup_of(case: dict[str, Any]) -> Setup:
    """The same case as the plan sees it."""
    rows, n_parts = case.get("rows", 2), case.get("n_parts", 1)
    return Setup(
        method=case["method"], part_size=rows, batch_size=rows * n_parts, text_length=case.get("text", 64),
        target_length=case.get("targets", 16), compute_bytes=2 if case.get("precision") == "bfloat16" else 4,
        recompute=case.get("recompute", False),
    )  # fmt: skip


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Real steps of a case; see `setup_of` for its keys, and n_warm, n_steps, threads, rates."""
    torch.set_num_threads(case.get("threads", 1))
    torch.manual_seed(0)
    device = torch.device("cpu")
    rates = _rates(measured_cpu()) if case.get("rates") else None
    _warm_libraries()
    base = anonymous_bytes()
    config, setup = config_of(case["shape"]), setup_of(case)
    model = PaliGemmaModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01) if parameter.numel() > 1 << 26 else parameter.normal_(std=0.02)
    schedules: tuple[tuple[str, None], ...] = ()
    if setup.has_adapters:
        add_lora(model, LoraOptions(use_dora=setup.method == "dora"))
    elif setup.method == "frozen":
        schedules = (("image", None),)
    model.vision.recompute = model.text.recompute = setup.recompute
    options = FitOptions(steps=10, precision=case.get("precision", "float32"))
    prepare(model, options)
    optimizer = Optimizer(model.named_parameters(), OptimOptions(schedules=schedules), total_steps=10)
    state = TrainState(model, optimizer)
    data = make_step(config, setup.rows, setup.text_length, setup.target_length, setup.n_parts)
    loss = default_loss(options)
    trained = sum(p.numel() for p in optimizer.parameters)
    exact = 4 * (sum(p.numel() for p in model.parameters()) + 3 * trained)

    def step() -> float:
        return train_step(state, data, options, loss, Ranks()).loss

    measured = measure_steps(step, device, case.get("n_warm", 1), case.get("n_steps", 1))
    return {"base_bytes": base, "exact_bytes": exact, "rates": rates, **measured}


def _rates(device: Device) -> dict[str, float]:
    return {**device.flops, "bandwidth": device.bandwidth}


def _warm_libraries() -> None:
    """What libraries take once belongs to the base, not to the model."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, 64, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
