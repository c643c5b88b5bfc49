"""Muon for the matrices of the blocks: momentum whose singular values are all made about one.

torch.optim.Muon orthogonalises in bfloat16, which a CPU without bfloat16 instructions computes one by one; here it is
float32 there, and matrices of one shape go through in one batch, since small ones cost more to start than to multiply.

Source: Jordan et al., "Muon: an optimizer for hidden layers" (2024); update scale of Liu et al., arXiv 2502.16982, so
that one learning rate serves both this and AdamW.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# The quintic a X + b (X Xᵀ) X + c (X Xᵀ)² X, five times: singular values of 0.01 … 1 end within 0.7 … 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
N_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; groups marked `adam` are moved by AdamW instead.

    Args:
        params: parameters of two dimensions, or groups; a group with `"adam": True` may hold any.
        betas, eps: of those groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "adam": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            moved = [param for param in group["params"] if param.grad is not None]
            if group["adam"]:
                self._adam(group, moved)
                continue
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for param in moved:
                by_shape.setdefault(tuple(param.shape), []).append(param)
            for (rows, columns), params in by_shape.items():
                moments = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                grads = [p.grad for p in params if p.grad is not None]
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                looked_ahead = torch._foreach_lerp(grads, moments, group["momentum"])
                updates = orthogonalise(torch.stack(list(looked_ahead))) * (0.2 * math.sqrt(max(rows, columns)))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"])

    def _adam(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        states = [self.state[param] for param in params]
        beta1, beta2 = group["betas"]
        adamw(
            params, [p.grad for p in params if p.grad is not None], [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states], foreach=True, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip


def orthogonalise(matrices_NRC: Tensor) -> Tensor:
    """[N, R, C] with every singular value brought near one; directions are kept."""
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.mT if is_tall else matrices_NRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    a, b, c = QUINTIC
    for _ in range(N_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
