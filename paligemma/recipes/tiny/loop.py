"""The loop of the unimodal lessons of stage 0: one schedule, two optimisers, an average, and a state that resumes.

Stages 1 and 2 run through `train.loop.fit` like any user's training; the two lessons before them have models of their
own, and steps that fit on a screen.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from paligemma.recipes.tiny.precision import autocast
from paligemma.train.muon import Muon


@dataclass(frozen=True, kw_only=True)
class LessonOptions:
    """How a lesson is taught.

    Attributes:
        steps: of the whole lesson; minutes: of one call at most, the next goes on.
        lr: of matrices and the rest alike; warmup: steps; cooldown: share of the run over which it falls to nothing.
        ema: decay of the average of the weights, which is what the lesson hands on.
        workers: processes that draw pictures.
    """

    steps: int
    minutes: float = math.inf
    lr: float = 2e-3
    warmup: int = 100
    cooldown: float = 0.3
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema: float = 0.99
    save_minutes: float = 5.0
    workers: int = 1
    seed: int = 0


class Steps(IterableDataset[Any]):
    """`draw(step)` for every step from the first on; step n is the same whoever draws it."""

    def __init__(self, draw: Callable[[int], Any], first: int) -> None:
        self.draw, self.first = draw, first

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            torch.set_num_threads(1)
        step = self.first + offset
        while True:
            yield self.draw(step)
            step += stride


def teach(
    name: str,
    model: nn.Module,
    draw: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], dict[str, Tensor]],
    matrices: Iterable[nn.Parameter],
    work: Path,
    options: LessonOptions,
    device: torch.device,
) -> tuple[nn.Module, bool]:
    """Train a model on drawn steps; the average of its weights, and whether the lesson is over.

    Args:
        name: of the state file in `work`.
        draw: the data of a step.
        loss: of a step; the entry "loss" is minimised, the others are told.
        matrices: parameters that Muon moves; AdamW moves the rest.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    inside = list(matrices)
    taken = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "muon": Muon(inside, lr=options.lr, weight_decay=options.weight_decay),
        "adamw": torch.optim.AdamW(rest, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    }
    path, step = work / f"{name}.state.pt", 0
    if path.exists():
        # Our own file, written below; weights_only keeps it to tensors and plain values.
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][key])
        step = state["step"]

    def save() -> None:
        part = path.with_suffix(".part")
        state = {"model": model.state_dict(), "average": average.state_dict(), "step": step}
        torch.save({**state, "optimizers": {key: o.state_dict() for key, o in optimizers.items()}}, part)
        os.replace(part, path)

    loader = DataLoader(
        Steps(draw, step), batch_size=None, num_workers=options.workers, prefetch_factor=4 if options.workers else None
    )
    started = saved = time.monotonic()
    first, seen = step, {}  # type: int, dict[str, float]
    for data in loader:
        if step >= options.steps or time.monotonic() - started > 60 * options.minutes:
            break
        lr = options.lr * min(1.0, (step + 1) / options.warmup, (1 - step / options.steps) / options.cooldown)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            sums = loss(model, data)
        torch.autograd.backward(sums["loss"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        for optimizer in optimizers.values():
            optimizer.step()
        step += 1
        decay = min(options.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        for key, value in sums.items():
            seen[key] = 0.95 * seen.get(key, value.item()) + 0.05 * value.item()
        if step % 25 == 0 or step == options.steps:
            rate = (step - first) / (time.monotonic() - started)
            told = " ".join(f"{key} {value:.3f}" for key, value in seen.items())
            print(f"{name} step {step} of {options.steps}: {told}  {rate:.2f} steps/s", flush=True)
        if time.monotonic() - saved > 60 * options.save_minutes:
            save()
            saved = time.monotonic()
    save()
    return average, step >= options.steps
