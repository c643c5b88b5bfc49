"""Low-rank adapters on linear layers, several beside one base, chosen per call.

    y = W x + s · B A dropout(x),  s = alpha / r, or alpha / sqrt(r) rank-stabilised
    DoRA: y = m / ‖W + sBA‖_row · (W + sBA) x, the norm taken as a constant

B starts at zero, so that a new adapter changes nothing. Sources: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353),
rsLoRA (arXiv 2312.03732); the arithmetic is that of peft 0.21.
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.errors import OptionError, nearest
from paligemma.models.linear import Linear, linear

DEFAULT = "default"
# What LoRA acts on unless told otherwise: attention and MLP of the decoder; the image tower only when asked.
DECODER = r"text\.blocks\.\d+\.(attn\.(q|k|v|out)|mlp\.(gate|up|down))"
TARGETS: dict[str, str] = {
    "decoder": DECODER,
    "attention": r"text\.blocks\.\d+\.attn\.(q|k|v|out)",
    "mlp": r"text\.blocks\.\d+\.mlp\.(gate|up|down)",
    "vision": r"vision\.blocks\.\d+\.(attn\.(q|k|v|out)|mlp\.(up|down))",
    "projector": r"projector",
}
_BASE_ONLY = ""
_chosen: ContextVar[str | None] = ContextVar("adapter", default=None)


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """An adapter's shape.

    Attributes:
        rank: of the update.
        alpha: its strength.
        dropout: on the input of A, while training.
        targets: modules that get one: words of `TARGETS`, or regular expressions on whole module names.
        use_dora, use_rslora: the variants.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("decoder",)
    use_dora: bool = False
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError(f"lora.rank={self.rank}: expected at least 1.")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"lora.dropout={self.dropout}: expected at least 0 and less than 1.")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Lora(nn.Module):
    """The two matrices of one layer, and the magnitude of DoRA."""

    def __init__(self, base: nn.Linear, options: LoraOptions, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        device = base.weight.device
        self.scale, self.dropout = options.scale, options.dropout
        self.a = nn.Parameter(torch.empty(options.rank, base.in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(base.out_features, options.rank, device=device, dtype=dtype))
        magnitude = torch.empty(base.out_features, device=device, dtype=dtype) if options.use_dora else None
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)

    @torch.no_grad()
    def reset(self, base: nn.Linear, generator: torch.Generator | None = None) -> None:
        """A uniform within 1 / sqrt(inputs), as peft draws it; B zero; the magnitude that of the base."""
        bound = 1 / math.sqrt(base.in_features)
        self.a.uniform_(-bound, bound, generator=generator)
        self.b.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(torch.linalg.vector_norm(base.weight.float(), dim=1))


class LoraLinear(Linear):
    """A linear layer with adapters; the base keeps its parameters under their old names."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)  # parameters are taken over, not made
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.adapters = nn.ModuleDict()
        self.active: str = _BASE_ONLY

    def forward(self, input: Tensor) -> Tensor:
        base: Tensor = super().forward(input)
        name = _chosen.get()
        adapter = self.adapters[name if name is not None else self.active] if self._acts(name) else None
        if not isinstance(adapter, Lora):
            return base
        x = F.dropout(input, adapter.dropout, self.training).to(adapter.a.dtype)
        update = adapter.scale * linear(linear(x, adapter.a), adapter.b)
        if adapter.magnitude is None:
            return base + update.to(base.dtype)
        with torch.no_grad():  # DoRA section 4.3: the norm is a constant to the gradient
            merged = self.weight.float() + adapter.scale * (adapter.b.float() @ adapter.a.float())
            norm = torch.linalg.vector_norm(merged, dim=1)
        ratio = (adapter.magnitude.float() / norm).to(base.dtype)
        plain = base if self.bias is None else base - self.bias
        if adapter.dropout and self.training:  # what dropout took from A's input it takes from W's as well
            plain = linear(x.to(self.weight.dtype), self.weight)
        out: Tensor = base + (ratio - 1) * plain + ratio * update.to(base.dtype)
        return out

    def _acts(self, name: str | None) -> bool:
        return (self.active if name is None else name) in self.adapters


def add_lora(
    model: nn.Module, options: LoraOptions, *, name: str = DEFAULT, seed: int = 0, make_active: bool = True
) -> list[str]:
    """Put a new adapter on every module that the options target, and freeze everything else.

    Returns:
        Names of the modules, in the model's order.

    Raises:
        OptionError: a target that matches no linear layer.
    """
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = targeted(linears, options.targets)
    model.requires_grad_(False)
    generator = torch.Generator(device=next(iter(linears.values())).weight.device).manual_seed(seed)
    for path in chosen:
        layer = linears[path]
        adapter = Lora(layer, options)
        adapter.reset(layer, generator)
        put(model, path, name, adapter, make_active=make_active)
    return chosen


def put(model: nn.Module, path: str, name: str, adapter: Lora, *, make_active: bool) -> None:
    """Hang one adapter onto the linear layer at a path, which becomes a `LoraLinear` if it is none yet."""
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    layer = getattr(parent, leaf)
    if not isinstance(layer, LoraLinear):
        layer = LoraLinear(layer)
        setattr(parent, leaf, layer)
    layer.adapters[name] = adapter
    if make_active:
        layer.active = name


def targeted(modules: Iterable[str], targets: tuple[str, ...]) -> list[str]:
    """Module names that some target matches whole.

    Raises:
        OptionError: a target that matches none, or is no regular expression.
    """
    names = list(modules)
    found: set[str] = set()
    for word in targets:
        try:
            pattern = re.compile(TARGETS.get(word, word))
        except re.error as error:
            raise OptionError(f"the LoRA target {word!r} is no regular expression ({error}).") from None
        hits = {path for path in names if pattern.fullmatch(path)}
        if not hits:
            raise OptionError(
                f"the LoRA target {word!r} matches no linear layer: expected one of {', '.join(TARGETS)} or an "
                f"expression on names such as text.blocks.0.attn.q.{nearest(word, TARGETS)}"
            )
        found |= hits
    return [path for path in names if path in found]


def adapters_of(model: nn.Module) -> dict[str, dict[str, Lora]]:
    """Adapter name -> module path -> its matrices."""
    found: dict[str, dict[str, Lora]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            for name, adapter in module.adapters.items():
                assert isinstance(adapter, Lora)
                found.setdefault(name, {})[path] = adapter
    return found


@contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Answer with this adapter inside the block; None is the base alone. Other threads and tasks keep their own choice.

    Raises:
        OptionError: the model has no adapter of that name.
    """
    known = adapters_of(model)
    if name is not None and name not in known:
        have = ", ".join(known) or "one to be loaded first"
        raise OptionError(f"there is no adapter {name!r}: expected {have}.{nearest(name, known)}")
    token = _chosen.set(_BASE_ONLY if name is None else name)
    try:
        yield
    finally:
        _chosen.reset(token)


@torch.no_grad()
def merge_lora(model: nn.Module, name: str = DEFAULT) -> None:
    """Add an adapter into the weights, in float32, and take all adapters off: the layers are plain ones again.

    Raises:
        OptionError: the model has no adapter of that name.
    """
    known = adapters_of(model)
    if name not in known:
        raise OptionError(f"there is no adapter {name!r}: expected one of {', '.join(known)}.{nearest(name, known)}")
    for path, module in list(model.named_modules()):
        if not isinstance(module, LoraLinear):
            continue
        adapter = known[name].get(path)
        if adapter is not None:
            merged = module.weight.float() + adapter.scale * (adapter.b.float() @ adapter.a.float())
            if adapter.magnitude is not None:
                merged *= (adapter.magnitude.float() / torch.linalg.vector_norm(merged, dim=1))[:, None]
            module.weight.copy_(merged)
        plain = Linear(
            module.in_features, module.out_features, bias=module.bias is not None, device="meta",
            dtype=module.weight.dtype,
        )  # fmt: skip
        plain.weight, plain.bias = module.weight, module.bias
        parent_path, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent_path), leaf, plain)
