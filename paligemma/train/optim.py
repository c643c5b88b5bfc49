"""The optimiser: who is trained, how fast, and with how much decay.

One update, in the reference's order (s: schedule factor of the parameter's group at this step):

    clip the gradients of all that is trained to a global norm
    Δ = -s · (lr · mult · adam(gradient) + weight_decay · mult · parameter)

Weight decay is decoupled and *not* multiplied by the learning rate; in the words of AdamW it is weight_decay / lr. By
default only matrices of the image tower and the projector decay: big_vision's rule is the name ".*/kernel$", which
matches no Gemma parameter. Source: big_vision optax.py.

Every rule is a pair of a pattern and a value; the first pattern that matches a parameter's whole name wins. A pattern
is a regular expression on native names ("text\\.blocks\\.[0-3]\\..*") or one of the components in `COMPONENTS`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from paligemma.errors import OptionError, nearest
from paligemma.models.nf4 import bitsandbytes
from paligemma.train.muon import Muon
from paligemma.train.schedule import Duration, Schedule

Kind = Literal["adam", "adam8bit", "muon", "sgd"]

COMPONENTS: dict[str, str] = {
    "vision": r"vision\..*",
    "projector": r"projector\..*",
    "image": r"(vision|projector)\..*",  # what big_vision calls img/.* and freezes together
    "text": r"text\..*",
    "embedding": r"text\.embedding\..*",
    "attention": r"text\.blocks\.\d+\.attn\..*",
    "mlp": r"text\.blocks\.\d+\.mlp\..*",
    "all": r".*",
}
COSINE = Schedule(kind="cosine", warmup=Duration(percent=0.05))  # of every transfer of the reports
# Where weight decay acts: ".*/kernel$" of big_vision in native names.
KERNELS = r"vision\.(patch_embedding|blocks\.\d+\.(attn|mlp)\.\w+)\.weight|projector\.weight"


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """How parameters move; the defaults are the reports' simple transfer setting.

    Attributes:
        kind: "adam"; "adam8bit" keeps the moments of tensors of 4,096 values and more in 8 bits (bitsandbytes, an
            extra); "muon" moves the matrices inside the blocks by orthogonalised momentum, the rest by Adam (for models
            taught from nothing; `muon.py`); "sgd" without momentum.
        lr: learning rate at factor 1.
        weight_decay: at factor 1, *not* multiplied by lr; the reports use 0 or 0.1 · lr.
        betas, eps: of Adam; eps stands outside the root.
        clip_norm: largest global norm of the gradients of everything trained; None never clips.
        schedule: of everything that no rule in `schedules` matches.
        schedules: (pattern, schedule) rules; None freezes.
        lr_mults: (pattern, factor of lr) rules; 1 where none matches.
        decay_mults: (pattern, factor of weight_decay) rules; 0 where none matches.
        layer_decay: each block's learning rate is that of the block above it in its tower times this.
    """

    kind: Kind = "adam"
    lr: float = 1e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    schedule: Schedule = COSINE
    schedules: tuple[tuple[str, Schedule | None], ...] = ()
    lr_mults: tuple[tuple[str, float], ...] = ()
    decay_mults: tuple[tuple[str, float], ...] = ((KERNELS, 1.0),)
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise OptionError(
                f"optim.kind={self.kind!r}: expected one of {', '.join(get_args(Kind))}."
                f"{nearest(str(self.kind), get_args(Kind))}"
            )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"optim.lr={self.lr}: expected more than 0.")
        if self.weight_decay < 0:
            raise OptionError(f"optim.weight_decay={self.weight_decay}: expected 0 or more.")
        if not 0 < self.layer_decay <= 1:
            raise OptionError(f"optim.layer_decay={self.layer_decay}: expected more than 0 and at most 1.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise OptionError(f"optim.clip_norm={self.clip_norm}: expected more than 0, or None to never clip.")


def pattern_of(word: str) -> re.Pattern[str]:
    """A component's name or a regular expression as a pattern.

    Raises:
        OptionError: not a regular expression.
    """
    try:
        return re.compile(COMPONENTS.get(word, word))
    except re.error as error:
        raise OptionError(
            f"the pattern {word!r} is no regular expression ({error}): expected one on names such as "
            f"text.blocks.0.attn.q.weight, or one of {', '.join(COMPONENTS)}."
        ) from None


def first_match(rules: Sequence[tuple[str, Any]], name: str, default: Any) -> Any:
    """The value of the first rule whose pattern matches the whole name."""
    return next((value for word, value in rules if pattern_of(word).fullmatch(name)), default)


def require_used(rules: Iterable[tuple[str, Any]], names: Sequence[str], what: str) -> None:
    """A pattern that matches nothing is a typo.

    Raises:
        OptionError: naming the pattern and the nearest component.
    """
    for word, _ in rules:
        if not any(pattern_of(word).fullmatch(name) for name in names):
            raise OptionError(
                f"{what}: the pattern {word!r} matches no parameter: expected a component ({', '.join(COMPONENTS)}) or "
                f"an expression on names such as {names[0]}.{nearest(word, COMPONENTS)}"
            )


class Optimizer:
    """A torch optimiser whose groups follow their own schedules.

    Freezing happens here: parameters whose schedule is None lose `requires_grad`, so they take neither gradients nor
    state, and nothing clips by them.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        options: OptimOptions,
        *,
        total_steps: int,
        batch_size: int | None = None,
        n_examples: int | None = None,
    ) -> None:
        self.options = options
        self._sizes: dict[str, Any] = {
            "total_steps": total_steps, "batch_size": batch_size, "n_examples": n_examples
        }  # fmt: skip
        named = list(named_parameters)
        names = [name for name, _ in named]
        require_used(options.schedules, names, "optim.schedules")
        require_used(options.lr_mults, names, "optim.lr_mults")
        groups: dict[tuple[Schedule, float, float, bool], list[nn.Parameter]] = {}
        for name, parameter in named:
            schedule = first_match(options.schedules, name, options.schedule) if parameter.requires_grad else None
            if schedule is None:
                parameter.requires_grad_(False)
                continue
            mult = first_match(options.lr_mults, name, 1.0) * layer_mult(name, names, options.layer_decay)
            decay = first_match(options.decay_mults, name, 0.0)
            by_adam = options.kind != "muon" or parameter.ndim != 2 or ".blocks." not in name
            groups.setdefault((schedule, mult, decay, by_adam), []).append(parameter)
        if not groups:
            raise OptionError("every parameter is frozen: expected something to train. Remove a rule that freezes.")
        self.schedules = [schedule for schedule, *_ in groups]
        self.parameters = [p for parameters in groups.values() for p in parameters]
        self.torch = _make(
            options,
            [
                # AdamW multiplies decay by its learning rate, which is lr · mult · factor here.
                {
                    "params": parameters,
                    "lr": options.lr * mult,
                    "base_lr": options.lr * mult,
                    "weight_decay": options.weight_decay * decay / (options.lr * mult) if mult else 0.0,
                    **({"adam": by_adam} if options.kind == "muon" else {}),
                }
                for (_, mult, decay, by_adam), parameters in groups.items()
            ],
        )

    def factors(self, step: int) -> list[float]:
        """The schedule factor of every group at a step, counted from 0."""
        return [schedule.factor(step, **self._sizes) for schedule in self.schedules]

    def update(self, step: int) -> float:
        """Clip, set the learning rates of this step, move, and drop the gradients.

        Returns:
            The global norm of the gradients before clipping; where it is no finite number, nothing moved.
        """
        for parameter in self.parameters:
            if parameter.grad is None:  # a step without pictures: moments fade and weights decay all the same
                parameter.grad = torch.zeros_like(parameter)
        norm = clip(self.parameters, self.options.clip_norm)
        if not math.isfinite(norm):
            self.torch.zero_grad(set_to_none=True)
            return norm
        for group, factor in zip(self.torch.param_groups, self.factors(step), strict=True):
            group["lr"] = group["base_lr"] * factor
        self.torch.step()
        self.torch.zero_grad(set_to_none=True)
        return norm


def layer_mult(name: str, names: Sequence[str], decay: float) -> float:
    """decay to the power of the number of blocks above a parameter in its tower."""
    if decay == 1.0:
        return 1.0
    tower = name.split(".")[0]
    depth = 1 + max((int(m[1]) for n in names if (m := re.match(rf"{tower}\.blocks\.(\d+)\.", n))), default=-1)
    block = re.match(rf"{tower}\.blocks\.(\d+)\.", name)
    if block:
        return decay ** (depth - 1 - int(block[1]))
    is_below = any(part in name for part in ("patch_embedding", "position_embedding", "text.embedding"))
    return decay**depth if is_below else 1.0


def clip(parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
    """Scale all gradients so that their global norm is at most `max_norm`; unchanged, to the bit, where it is less."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = global_norm(grads)
    if max_norm is not None and norm >= max_norm:
        torch._foreach_mul_(grads, max_norm / norm)
    return norm


def global_norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm of all elements of all tensors together; of sharded tensors, of the whole."""
    if not tensors:
        return 0.0
    norm = torch.nn.utils.get_total_norm(tensors)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _make(options: OptimOptions, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if options.kind == "sgd":
        return torch.optim.SGD(groups, lr=options.lr)
    if options.kind == "muon":
        if any(hasattr(p, "full_tensor") for group in groups for p in group["params"]):
            raise OptionError("optim.kind='muon' with sharded weights: expected whole ones. Take optim.kind=adam.")
        return Muon(groups, lr=options.lr, betas=options.betas, eps=options.eps)
    if options.kind == "adam8bit":
        if any(hasattr(p, "full_tensor") for group in groups for p in group["params"]):
            raise OptionError("optim.kind='adam8bit' with sharded weights: expected whole ones. Take optim.kind=adam.")
        library = bitsandbytes("8-bit Adam")
        made: torch.optim.Optimizer = library.optim.AdamW8bit(
            groups, lr=options.lr, betas=options.betas, eps=options.eps
        )
        return made
    # Fused: one pass over each tensor. The plain loop makes two more tensors of the size of the largest, the table.
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused)
