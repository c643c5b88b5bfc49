"""A loss that knows that places are near each other; an example of a task loss of one's own.

Cross-entropy treats the 1,024 location tokens as words without order: to say 501 where 500 is right costs as much as to
say 900. Here a location target is spread over its neighbours, q(b) ∝ exp(-(b - target)² / 2σ²), and the loss is the
cross-entropy to q; every other token keeps its own. `docs/studies/coordinate_loss.md` measures what that gives.

    recipes.transfer.run(recipe, token_loss=coordinate_loss(config.tokens, sigma=4))
"""

import torch
from torch import Tensor

from paligemma.config import TokenConfig
from paligemma.errors import OptionError
from paligemma.train.loss import TokenLoss, cross_entropy


def coordinate_loss(
    tokens: TokenConfig, *, sigma: float = 4.0, step: int = 1, label_smoothing: float = 0.0
) -> TokenLoss:
    """Cross-entropy whose location targets are bell curves over the bins.

    Args:
        tokens: where the location tokens stand in the vocabulary.
        sigma: width of the curve in bins of 1/1024 of a side; 0 is plain cross-entropy.
        label_smoothing: of all other tokens.
        step: the curve has its values on every n-th bin and the last, for targets that are written so.
    """
    if step < 1:
        raise OptionError(f"step={step}: expected 1 or more.")
    if sigma < 0:
        raise OptionError(f"sigma={sigma}: expected bins, 0 or more.")
    plain = cross_entropy(label_smoothing)
    if not sigma:
        return plain
    first, last = tokens.loc_start, tokens.loc_start + tokens.n_loc

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        losses = plain(logits, targets)
        is_place = (targets >= first) & (targets < last)
        bins = torch.arange(tokens.n_loc, device=targets.device)
        distance = bins - (targets[is_place, None] - first)
        closeness = -(distance**2) / (2 * sigma**2)
        if step > 1:
            closeness = closeness.masked_fill((bins % step != 0) & (bins != tokens.n_loc - 1), -torch.inf)
        share = torch.softmax(closeness, dim=-1)
        places = logits[is_place]
        # -Σ q log p = log Z - Σ q · logit, since q sums to 1.
        soft = places.logsumexp(dim=-1) - (share * places[:, first:last]).sum(dim=-1)
        return losses.masked_scatter(is_place, soft)

    loss.__name__ = f"coordinates sigma {sigma:g}"
    return loss
