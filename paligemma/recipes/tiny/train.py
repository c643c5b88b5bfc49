"""Stage 3: the model itself, taught from nothing on drawn pictures.

A short loop, on purpose: one optimiser, one schedule, an average of the weights, and a state file from which an
interrupted run goes on with the very next step. What is particular to this recipe:

- location tokens are learned as places, not as names: their target is spread over neighbouring bins (`loc_sigma`, in
  bins, shrinking over the run);
- the image tower learns what lies in each patch before it is asked anything, and keeps learning it (`patches.py`);
- several questions share one run of the image tower.
"""

import copy
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.config import PaliGemmaConfig
from paligemma.models.init import init_weights
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.recipes.tiny.examples import ExampleOptions, Rows, Step, WorldSteps, to_device
from paligemma.recipes.tiny.patches import PatchHeads, begin_with_waves, place_loss
from paligemma.recipes.tiny.precision import autocast
from paligemma.train.muon import Muon


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    steps: int = 6_000
    lr: float = 1.5e-3
    warmup: int = 100
    cooldown: float = 0.3  # share of the run, at its end, over which the learning rate falls to nothing
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    ema: float = 0.99
    patch_weight: float = 0.3  # of the patch lesson once questions are asked
    loc_sigma: tuple[float, float] = (12.0, 4.0)  # bins of 1/1023 of a side, at the start and at the end
    compile: bool = False
    workers: int = 1
    save_minutes: float = 10.0
    seed: int = 0


def train(
    config: PaliGemmaConfig,
    work: Path,
    options: TrainOptions,
    examples: ExampleOptions,
    *,
    device: torch.device | str = "cpu",
    start_from: dict[str, Tensor] | None = None,
    minutes: float = math.inf,
) -> bool:
    """Train until `options.steps`, or for `minutes`; state and averaged weights land in `work`.

    The schedule follows steps, so an interrupted run and an undisturbed one see the same learning rates.

    Args:
        start_from: native weights to begin with in place of random ones (teaching an existing model further).

    Returns:
        Whether the run is finished.
    """
    device = torch.device(device)
    torch.manual_seed(options.seed)
    model = PaliGemmaModel(config)
    init_weights(model, torch.Generator().manual_seed(options.seed), zero_projector=False)
    begin_with_waves(model)
    if start_from is not None:
        model.load_state_dict(start_from)
    model.to(device)
    heads = PatchHeads(config).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model, heads, options)
    step = 0
    state_path = work / "state.pt"
    if state_path.exists():
        # Our own file, written below; weights_only keeps it to tensors and plain values.
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"], strict=False)
        average.load_state_dict(state["average"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        step = state["step"]
        print(f"going on from step {step}", flush=True)
    if options.compile:
        model.text.whole_rows = True
        for blocks in (model.vision.blocks, model.text.blocks):
            for block in blocks:
                block.forward = torch.compile(block.forward, dynamic=True)
    first, started = step, time.monotonic()
    saved = started
    seen: dict[str, float] = {}
    for batch in _steps(config, work, examples, options, step):
        if step >= options.steps or time.monotonic() - started > 60 * minutes:
            break
        done = step / options.steps
        # Both parts of the run, patches alone and then questions, begin with a short ramp.
        ramp = step - examples.patch_steps if step >= examples.patch_steps else step
        lr = options.lr * min(1.0, (ramp + 1) / options.warmup, (1 - done) / options.cooldown)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
        start, end = options.loc_sigma
        sigma = start * (end / start) ** done
        weight = 1.0 if step < examples.patch_steps else options.patch_weight
        sums = step_loss(model, heads, to_device(batch, device), sigma, weight, examples.loc_step)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(sums["loss"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        for optimizer in optimizers.values():
            optimizer.step()
        step += 1
        decay = min(options.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        for name, value in sums.items():
            seen[name] = 0.98 * seen.get(name, value.item()) + 0.02 * value.item()
        if step % 25 == 0:
            rate = len(batch.pixels) * (step - first) / (time.monotonic() - started)
            told = " ".join(f"{name} {value:.3f}" for name, value in seen.items())
            print(f"step {step} lr {lr:.2e} sigma {sigma:.1f} {told} {rate:.0f} pictures/s", flush=True)
        if time.monotonic() - saved > 60 * options.save_minutes:
            _save(work, model, heads, average, optimizers, step, options)
            saved = time.monotonic()
    _save(work, model, heads, average, optimizers, step, options)
    return step >= options.steps


def step_loss(
    model: PaliGemmaModel, heads: PatchHeads, step: Step, sigma: float, patch_weight: float, loc_step: int = 1
) -> dict[str, Tensor]:
    """Weighted mean over the supervised tokens of all groups; also the plain means of places, masks and words.

    A token of a suffix of n weighs n^-0.5: by tokens alone, captions and masks would drown the one-word answers; by
    examples alone, the answers would drown the masks.
    """
    tokens = model.config.tokens
    kinds: dict[str, list[Tensor]] = {"loc": [], "seg": [], "text": []}
    total = weight_sum = noticed = torch.zeros((), device=step.pixels.device)
    half_way: list[Tensor] = []
    middle = model.text.blocks[model.config.text.depth // 2 - 1]
    hook = middle.register_forward_hook(lambda _module, _inputs, output: half_way.append(output))
    with autocast(step.pixels.device):
        embeds = model.embed_image(step.pixels)
        patches = heads.loss(model, embeds, step.patches, sigma, loc_step)
        for rows in step.groups:
            logits, targets = _predict(model, embeds, rows)
            noticed = noticed + heads.notice(half_way.pop(), rows.asked) / len(step.groups)
            weights = rows.mask_loss.sum(dim=1, keepdim=True).float().rsqrt().expand_as(rows.mask_loss)[rows.mask_loss]
            is_loc = (targets >= tokens.loc_start) & (targets < tokens.loc_start + tokens.n_loc)
            losses = F.cross_entropy(logits, targets, reduction="none")
            bins = targets[is_loc] - tokens.loc_start
            places = place_loss(logits[is_loc], bins, tokens.loc_start, sigma, loc_step)
            losses = losses.masked_scatter(is_loc, places)
            total, weight_sum = total + (losses * weights).sum(), weight_sum + weights.sum()
            is_seg = targets >= tokens.seg_start
            for kind, chosen in (("loc", is_loc), ("seg", is_seg), ("text", ~is_loc & ~is_seg)):
                kinds[kind].append(losses.detach()[chosen])
    means = {kind: torch.cat(values).mean() for kind, values in kinds.items() if sum(v.numel() for v in values)}
    hook.remove()
    loss = total / weight_sum.clamp_min(1e-6) + patch_weight * torch.stack(list(patches.values())).sum() + 2 * noticed
    return {
        "loss": loss,
        **means,
        **{name: value.detach() for name, value in patches.items()},
        "asked": noticed.detach(),
    }


def _predict(model: PaliGemmaModel, embeds: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    n_image = embeds.shape[1]
    keep = F.pad(rows.mask_loss[:, 1:], (n_image, 1))
    logits = model(
        F.pad(rows.tokens, (n_image, 0)),
        mask_image=F.pad(torch.zeros_like(rows.mask_loss), (n_image, 0), value=True),
        mask_ar=F.pad(rows.mask_ar, (n_image, 0)),
        mask_input=F.pad(rows.mask_input, (n_image, 0), value=True),
        image_embeds=embeds[rows.image],
        keep=keep,
    )
    return logits, rows.tokens[rows.mask_loss]


def make_optimizers(
    model: PaliGemmaModel, heads: PatchHeads, options: TrainOptions
) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    inside = [p for blocks in (model.vision.blocks, model.text.blocks) for p in blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in inside}
    rest = [p for p in (*model.parameters(), *heads.parameters()) if id(p) not in taken]
    return {
        "muon": Muon(inside, lr=options.lr, weight_decay=options.weight_decay),
        "adamw": torch.optim.AdamW(rest, lr=options.lr, betas=options.betas, weight_decay=0.0, fused=True),
    }


def _steps(
    config: PaliGemmaConfig, work: Path, examples: ExampleOptions, options: TrainOptions, first: int
) -> Iterator[Step]:
    source = WorldSteps(config, str(work / "tokenizer.model"), str(work / "mask_vae.npz"), examples, first)
    loader = torch.utils.data.DataLoader(
        source, batch_size=None, num_workers=options.workers, prefetch_factor=8 if options.workers else None
    )
    return iter(loader)


def _save(
    work: Path,
    model: PaliGemmaModel,
    heads: PatchHeads,
    average: PaliGemmaModel,
    optimizers: dict[str, torch.optim.Optimizer],
    step: int,
    options: TrainOptions,
) -> None:
    state = {
        "model": model.state_dict(),
        "heads": heads.state_dict(),
        "average": average.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "step": step,
        "options": asdict(options),
    }
    part = work / "state.pt.part"
    torch.save(state, part)
    os.replace(part, work / "state.pt")
    print(f"saved step {step}", flush=True)
