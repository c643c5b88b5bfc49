"""The loss: a sum over target tokens, divided once by what a named rule counts.

    per_example   Σ_e w_e · mean_t(loss_t) / number of examples        big_vision; an example without targets adds 0
    per_token     Σ_e w_e · Σ_t loss_t / number of target tokens       transformers

Both numbers are counted over the whole step, all its parts and all ranks, before anything is divided; so accumulating
a parts of b examples is one batch of a·b, and the loss does not depend on how a batch is cut.

The vocabulary projection and its loss are computed together, some tokens at a time: for 257,152 words the logits of one
448 px batch would take gigabytes in float32, their gradient as much again.

Sources: big_vision trainers/proj/paligemma/train.py (`per_example`, label smoothing); chunking after Liger-Kernel's
fused linear cross-entropy (arXiv 2410.10989).
"""

# B rows · S slots of a row · N target tokens · D width · V table rows

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from paligemma.errors import OptionError, nearest
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import Batch

Normalization = Literal["per_example", "per_token"]
# float32[n, V] logits, int64[n] targets -> float32[n] losses, differentiable; must treat every token on its own.
TokenLoss = Callable[[Tensor, Tensor], Tensor]

MAX_LOGITS = 1 << 26  # elements of one chunk: 256 MB in float32


@dataclass(frozen=True)
class LossSums:
    """What one part of a step adds to the loss.

    Attributes:
        total: float32[], Σ of weighted token losses; divide by the step's count and run backward.
        tokens: float32[N], the plain loss of every target token, without gradient, for what is told on the way.
        targets: int64[N].
    """

    total: Tensor
    tokens: Tensor
    targets: Tensor


def cross_entropy(label_smoothing: float = 0.0) -> TokenLoss:
    """-Σ q log p with 1 - ε on the target and ε / (V - 1) on every other word.

    torch's own `label_smoothing` spreads ε over all V words, the target too; big_vision does not.
    """
    if not 0 <= label_smoothing < 1:
        raise OptionError(f"label_smoothing={label_smoothing}: expected at least 0 and less than 1.")

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        if not label_smoothing:
            return F.cross_entropy(logits, targets, reduction="none")
        log_z = logits.logsumexp(dim=-1)
        at_target = logits.gather(-1, targets[:, None])[:, 0] - log_z
        other = label_smoothing / (logits.shape[-1] - 1)
        everywhere = logits.sum(dim=-1) - logits.shape[-1] * log_z
        return -(1 - label_smoothing - other) * at_target - other * everywhere

    return loss


def target_counts(batch: Batch, normalization: Normalization) -> int:
    """What a batch adds to the number by which the loss of its step is divided."""
    if normalization not in get_args(Normalization):
        hint = nearest(str(normalization), get_args(Normalization))
        raise OptionError(f"normalization={normalization!r}: expected per_example or per_token.{hint}")
    return batch.n_examples if normalization == "per_example" else int(batch.mask_loss.sum())


def target_weights(batch: Batch, normalization: Normalization) -> Tensor:
    """float32[B, S]: the weight of every target token in the sum, 0 elsewhere."""
    mask = batch.mask_loss
    weights = mask.float()
    example = example_of_slot(batch)
    if normalization == "per_example":
        counts = torch.zeros(batch.n_examples + 1, device=mask.device).index_add_(0, example[mask], weights[mask])
        weights = weights / counts.clamp_min(1)[example]
    if batch.weights is not None:
        weights = weights * torch.cat([batch.weights, batch.weights.new_zeros(1)])[example]
    return weights


def example_of_slot(batch: Batch) -> Tensor:
    """int64[B, S]: the example of a slot, in reading order of the rows; n_examples at padding."""
    per_row = batch.segment_ids.amax(dim=1)
    first = per_row.cumsum(0) - per_row
    example = first[:, None] + batch.segment_ids - 1
    return example.masked_fill(batch.segment_ids == 0, batch.n_examples)


def loss_sums(
    model: PaliGemmaModel,
    batch: Batch,
    *,
    normalization: Normalization = "per_example",
    token_loss: TokenLoss | None = None,
    chunk_tokens: int | None = None,
) -> LossSums:
    """The loss of one batch as a sum.

    Args:
        model: its table is the vocabulary projection; the final soft cap acts where its config says so.
        batch: at least one example; on the model's device.
        token_loss: in place of plain cross-entropy.
        chunk_tokens: target tokens whose logits stand at once; default as many as make 256 MB.
    """
    targets_at = batch.mask_loss[:, 1:]
    keep = F.pad(targets_at, (0, 1))
    table: Tensor = model.text.embedding.weight
    if not isinstance(table, DTensor):  # a sharded one is gathered by the model's pass
        table = _Early.apply(table)  # type: ignore[no-untyped-call]
    hidden = model.pre_logits(**batch.model_inputs())[keep]  # type: ignore[arg-type]
    targets = batch.tokens[:, 1:][targets_at]
    weights = target_weights(batch, normalization)[:, 1:][targets_at]
    config = model.config.text
    cap = config.final_logits_softcap if config.final_cap == "everywhere" else None
    total, tokens = chunked_loss(
        hidden,
        model.text.embedding.weight if isinstance(table, DTensor) else table,
        targets,
        weights,
        token_loss or cross_entropy(),
        softcap=cap,
        chunk_tokens=chunk_tokens,
    )
    return LossSums(total, tokens, targets)


def chunked_loss(
    hidden_ND: Tensor,
    table_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    token_loss: TokenLoss,
    *,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ weight · token_loss(hidden · tableᵀ, target) without all logits standing at once.

    Gradients are computed on the way forward, chunk by chunk, and only multiplied on the way back; the numbers are
    those of the whole. The products run in the dtype of `hidden`, softmax and loss in float32.

    Returns:
        float32[] the sum, with gradients to hidden and table; float32[N] the plain token losses, without.
    """
    chunk = chunk_tokens or max(1, MAX_LOGITS // len(table_VD))
    apply: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLoss.apply
    return apply(hidden_ND, table_VD, targets_N, weights_N, token_loss, softcap, chunk)


class _Early(torch.autograd.Function):
    """The table as it is, taken before its rows are looked up, so that on the way back its gradient comes after theirs.

    Autograd adds sparse rows to a dense gradient in place only when the dense one comes last; otherwise a second one of
    257,152 rows would stand beside it for a moment.
    """

    @staticmethod
    def forward(ctx: Any, table_VD: Tensor) -> Tensor:
        return table_VD.view_as(table_VD)

    @staticmethod
    def backward(ctx: Any, grad_VD: Tensor) -> Tensor:
        return grad_VD


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        table_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        token_loss: TokenLoss,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_table = ctx.needs_input_grad[:2]
        table = table_VD.to(hidden_ND.dtype)
        grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_table = torch.zeros_like(table_VD) if wants_table else None
        tokens = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), chunk):
                part = slice(start, start + chunk)
                product = F.linear(hidden_ND[part], table).float()
                with torch.enable_grad():
                    logits = product.requires_grad_(wants_hidden or wants_table)
                    capped = logits if softcap is None else (logits / softcap).tanh() * softcap
                    losses = token_loss(capped, targets_N[part])
                    weighted = (losses * weights_N[part]).sum()
                tokens[part] = losses.detach()
                total += weighted.detach()
                if not logits.requires_grad:
                    continue
                (slope,) = torch.autograd.grad(weighted, logits)
                slope = slope.to(hidden_ND.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = slope @ table
                if grad_table is not None:
                    _add_outer(grad_table, slope, hidden_ND[part])
        ctx.grads = (grad_hidden, grad_table)  # our own, neither input nor output: nothing keeps a cycle alive
        ctx.mark_non_differentiable(tokens)
        return total, tokens

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("chunked_loss can run backward once: its gradients are scaled in place.")
        grads, ctx.grads = ctx.grads, None
        hidden, table = (None if grad is None else grad.mul_(grad_total) for grad in grads)
        return hidden, table, None, None, None, None, None


def _add_outer(grad_VD: Tensor, slope_NV: Tensor, hidden_ND: Tensor) -> None:
    """grad += slopeᵀ hidden; in one product where the dtypes agree, else some rows of the table at a time."""
    if grad_VD.dtype == hidden_ND.dtype:
        grad_VD.addmm_(slope_NV.T, hidden_ND)
        return
    rows = 1 << 14
    for start in range(0, len(grad_VD), rows):
        part = slice(start, start + rows)
        grad_VD[part] += slope_NV[:, part].T @ hidden_ND
