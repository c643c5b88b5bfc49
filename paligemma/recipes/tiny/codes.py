"""Stage 2: the mask auto-encoder, 64 x 64 masks of the world's shapes <-> 16 of 128 codes.

Training follows AiT (arXiv 2301.02229): straight-through vector quantisation, a codebook kept as a moving average,
commitment weight 0.25, squared error on the +-1 mask. Codes that nothing chooses are moved onto inputs, without which
a small codebook loses most of its words.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from paligemma.data.world import World, render, sample_scene
from paligemma.models.mask_vae import MaskVae
from paligemma.recipes.tiny.precision import autocast

HIDDEN, CODE_DIM, N_CODES = (8, 16, 32, 64), 64, 128
LR, DECAY, COMMITMENT = 2e-3, 0.99, 0.25


def draw_crops(n: int, seed: int) -> Tensor:
    """uint8[n, 64, 64] in 0..255: visible masks of drawn things, cut to their boxes and stretched."""
    rng = np.random.default_rng([seed, 64])
    crops: list[np.ndarray] = []
    while len(crops) < n:
        world: World = "full" if rng.random() < 0.7 else "plain"
        drawn = render(sample_scene(int(rng.integers(2**48)), world))
        for mask, box in zip(drawn.masks, drawn.boxes_xyxy_px, strict=True):
            picture = Image.fromarray(mask.astype(np.uint8) * 255)
            crops.append(np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR, box=box)))
    return torch.from_numpy(np.stack(crops[:n]))


def train_mask_vae(path: Path, *, n_crops: int = 12_000, steps: int = 3_000, batch: int = 96, seed: int = 0) -> float:
    """Train, write `path` (the official npz layout, narrower), and return the mean IoU on unseen crops."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    crops, held_out = draw_crops(n_crops, seed), draw_crops(1_000, seed + 1)
    vae = MaskVae(hidden=HIDDEN, code_dim=CODE_DIM, n_codes=N_CODES)
    codebook = vae.codebook.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    counts, sums = torch.ones(N_CODES), codebook.detach().clone()
    quantised_from = steps // 8  # a plain auto-encoder first, so that the first codewords are drawn from real features
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        masks = _turned(crops[torch.randint(len(crops), (batch,), generator=rng)].float() / 255, rng)
        with autocast("cpu"):
            features = vae.encode_features(masks)
        features = features.float()
        quantised = features
        if step >= quantised_from:
            flat = features.detach().permute(0, 2, 3, 1).reshape(-1, CODE_DIM)
            if step == quantised_from:
                sums = flat[torch.randperm(len(flat), generator=rng)[:N_CODES]].clone()
                codebook.copy_(sums)
            ids = torch.cdist(flat, codebook).argmin(dim=1)
            one_hot = F.one_hot(ids, N_CODES).float()
            counts.mul_(DECAY).add_(one_hot.sum(dim=0), alpha=1 - DECAY)
            sums.mul_(DECAY).add_(one_hot.T @ flat, alpha=1 - DECAY)
            unused = counts < 0.5
            if step % 20 == 0 and step < 0.8 * steps and unused.any():
                sums[unused] = flat[torch.randint(len(flat), (int(unused.sum()),), generator=rng)]
                counts[unused] = 1.0
            codebook.copy_(sums / counts.clamp_min(1e-5)[:, None])
            quantised = codebook[ids].reshape(len(masks), 4, 4, CODE_DIM).permute(0, 3, 1, 2)
        with autocast("cpu"):
            out = vae.decode_features(features + (quantised - features).detach())
        loss = F.mse_loss(out, masks * 2 - 1) + COMMITMENT * F.mse_loss(features, quantised.detach())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 250 == 0:
            print(f"mask codes: step {step} loss {loss.item():.4f} IoU {mean_iou(vae, held_out):.4f}", flush=True)
    score = mean_iou(vae, held_out)
    print(f"mask codes: held-out IoU {score:.4f}, {int((counts > 0.5).sum())} codes in use", flush=True)
    vae.to_npz(path)
    return score


def _turned(masks: Tensor, rng: torch.Generator) -> Tensor:
    """One of the eight symmetries of the square for the whole batch: more masks than were drawn."""
    turns, flip = torch.randint(4, (), generator=rng).item(), torch.randint(2, (), generator=rng).item()
    masks = torch.rot90(masks, int(turns), (1, 2))
    return masks.flip(2) if flip else masks


@torch.no_grad()
def mean_iou(vae: MaskVae, crops: Tensor) -> float:
    """Mean IoU of masks with what comes back from their codes."""
    truth = crops.float() / 255
    back = vae.decode(vae.encode(truth)) > 0
    truth_b = truth > 0.5
    inter = (back & truth_b).sum(dim=(1, 2)).float()
    return float((inter / (back | truth_b).sum(dim=(1, 2)).clamp_min(1)).mean())
