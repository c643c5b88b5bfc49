"""Weights from scratch, as big_vision draws them (models/vit.py, models/ppp/gemma.py, models/proj/paligemma)."""

import math

import torch
from torch import Tensor, nn

from paligemma.models.gemma import GemmaDecoder
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.models.siglip import SiglipTower

# A normal cut at two standard deviations has this standard deviation; flax divides by it to keep the variance.
_TRUNCATED_STD = 0.87962566103423978


def _lecun_normal_(weight: Tensor, fan_in: int, generator: torch.Generator | None) -> None:
    std = 1 / math.sqrt(fan_in) / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


@torch.no_grad()
def init_weights(
    model: PaliGemmaModel, generator: torch.Generator | None = None, *, zero_projector: bool = True
) -> PaliGemmaModel:
    """Fill every parameter.

    Args:
        generator: source of the random numbers, on the model's device.
        zero_projector: start the projector at zero (big_vision `head_zeroinit`), so that image tokens are zero vectors
            and gradients reach the tower only after the projector has moved. False draws it like a dense layer, which
            a model without pre-trained parts needs.
    """
    init_tower(model.vision, generator)
    nn.init.zeros_(model.projector.bias)
    if zero_projector:
        nn.init.zeros_(model.projector.weight)
    else:
        _lecun_normal_(model.projector.weight, model.config.vision.width, generator)
    init_decoder(model.text, generator)
    return model


@torch.no_grad()
def init_decoder(decoder: GemmaDecoder, generator: torch.Generator | None = None) -> None:
    """Fill a Gemma decoder: norms at zero (they multiply by 1 + scale), LeCun-normal matrices, normal rows."""
    for name, weight in decoder.named_parameters():
        if name.endswith("scale"):
            nn.init.zeros_(weight)
        elif name == "embedding.weight":
            nn.init.normal_(weight, std=decoder.config.width**-0.5, generator=generator)
        else:
            _lecun_normal_(weight, weight.shape[1], generator)


@torch.no_grad()
def init_tower(tower: SiglipTower, generator: torch.Generator | None = None) -> None:
    """Fill a SigLIP tower: Xavier-uniform matrices, LeCun-normal patches, normal positions of std 1 / sqrt(width)."""
    config = tower.config
    nn.init.normal_(tower.position_embedding, std=config.width**-0.5, generator=generator)
    _lecun_normal_(tower.patch_embedding.weight, 3 * config.patch_size**2, generator)
    for name, weight in tower.named_parameters():
        if name == "patch_embedding.bias":
            nn.init.zeros_(weight)
        elif "norm" in name:
            nn.init.ones_(weight) if name.endswith("weight") else nn.init.zeros_(weight)
        elif ".attn." in name or ".mlp." in name:
            if name.endswith("weight"):
                nn.init.xavier_uniform_(weight, generator=generator)
            elif ".mlp." in name:
                nn.init.normal_(weight, std=1e-6, generator=generator)
            else:
                nn.init.zeros_(weight)
