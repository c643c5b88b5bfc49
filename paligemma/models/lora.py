"""Low-rank adapters on linear layers, several beside one base, chosen per call.

    y = W x + s · B A dropout(x),  s = alpha / r, or alpha / sqrt(r) rank-stabilised
    DoRA: y = m / ‖W + sBA‖_row · (W + sBA) x, the norm taken as a constant

B starts at zero, so that a new adapter changes nothing. Sources: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353),
rsLoRA (arXiv 2312.03732); the arithmetic is that of peft 0.21. W may stand in 4 bits (`nf4.py`): that is QLoRA.
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
from paligemma.models.nf4 import Nf4Linear, Nf4Weight, dense, product

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

    def __init__(self, base: "Base", options: LoraOptions, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        device = base.weight.device
        self.scale, self.dropout = options.scale, options.dropout
        self.a = nn.Parameter(torch.empty(options.rank, base.in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(base.out_features, options.rank, device=device, dtype=dtype))
        magnitude = torch.empty(base.out_features, device=device, dtype=dtype) if options.use_dora else None
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)

    @torch.no_grad()
    def reset(self, base: "Base", generator: torch.Generator | None = None) -> None:
        """A uniform within 1 / sqrt(inputs), as peft draws it; B zero; the magnitude that of the base."""
        bound = 1 / math.sqrt(base.in_features)
        self.a.uniform_(-bound, bound, generator=generator)
        self.b.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(torch.linalg.vector_norm(dense(base.weight), dim=1))

    def merged(self, weight: nn.Parameter | Nf4Weight) -> Tensor:
        """float32[O, D]: W + s · B A, before the magnitude."""
        return dense(weight) + self.scale * (self.b.float() @ self.a.float())


class LoraLinear(nn.Module):
    """A linear layer of either kind with adapters; the base keeps its parameters under their old names."""

    weight: nn.Parameter | Nf4Weight
    bias: nn.Parameter | None

    def __init__(self, base: nn.Linear | Nf4Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        weight = base.weight  # taken over, not copied
        assert isinstance(weight, nn.Parameter | Nf4Weight)
        self.weight = weight
        self.register_parameter("bias", base.bias)
        self.adapters = nn.ModuleDict()
        self.active: str = _BASE_ONLY

    def forward(self, input: Tensor) -> Tensor:
        base = product(input, self.weight, self.bias)
        name = _chosen.get()
        adapter = self.adapters[name if name is not None else self.active] if self._acts(name) else None
        if not isinstance(adapter, Lora):
            return base
        x = F.dropout(input, adapter.dropout, self.training).to(adapter.a.dtype)
        update = adapter.scale * linear(linear(x, adapter.a), adapter.b)
        if adapter.magnitude is None:
            return base + update.to(base.dtype)
        with torch.no_grad():  # DoRA section 4.3: the norm is a constant to the gradient
            norm = torch.linalg.vector_norm(adapter.merged(self.weight), dim=1)
        ratio = (adapter.magnitude.float() / norm).to(base.dtype)
        plain = base if self.bias is None else base - self.bias
        if adapter.dropout and self.training:  # what dropout took from A's input it takes from W's as well
            plain = product(x.to(input.dtype), self.weight)
        out: Tensor = base + (ratio - 1) * plain + ratio * update.to(base.dtype)
        return out

    def bare(self) -> nn.Linear | Nf4Linear:
        """The layer without adapters, holding the same weight."""
        if isinstance(self.weight, Nf4Weight):
            return Nf4Linear(self.weight, self.bias)
        has_bias, dtype = self.bias is not None, self.weight.dtype
        plain = Linear(self.in_features, self.out_features, bias=has_bias, device="meta", dtype=dtype)
        plain.weight, plain.bias = self.weight, self.bias  # type: ignore[assignment]
        return plain

    def _acts(self, name: str | None) -> bool:
        return (self.active if name is None else name) in self.adapters


Base = nn.Linear | Nf4Linear | LoraLinear  # what an adapter may be hung on


def linears_of(model: nn.Module) -> dict[str, Base]:
    """Path -> linear layer of whichever kind, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Base)}


def add_lora(
    model: nn.Module, options: LoraOptions, *, name: str = DEFAULT, seed: int = 0, make_active: bool = True
) -> list[str]:
    """Put a new adapter on every module that the options target, and freeze everything else.

    Returns:
        Names of the modules, in the model's order.

    Raises:
        OptionError: a target that matches no linear layer.
    """
    linears = linears_of(model)
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
    """Hang one adapter onto the linear layer at a path, which becomes a `LoraLinear` if it is none yet.

    Raises:
        OptionError: a name that a module cannot have.
    """
    check_name(name)
    layer = model.get_submodule(path)
    if not isinstance(layer, LoraLinear):
        assert isinstance(layer, nn.Linear | Nf4Linear)
        layer = LoraLinear(layer)
        _replace(model, path, layer)
    layer.adapters[name] = adapter
    if make_active:
        layer.active = name


def check_name(name: str) -> None:
    """Refuse names that PyTorch cannot give to a module: empty, with a dot, or a method of `nn.ModuleDict`."""
    if not name or "." in name or hasattr(nn.ModuleDict, name) or name == "training":
        raise OptionError(f"an adapter cannot be called {name!r}: expected a word without dots, such as 'cats'.")


def drop_lora(model: nn.Module, name: str) -> None:
    """Take one adapter off; layers that have no other are plain ones again.

    Raises:
        OptionError: the model has no adapter of that name.
    """
    for path in _require(model, name):
        layer = model.get_submodule(path)
        assert isinstance(layer, LoraLinear)
        if len(layer.adapters) == 1:
            _replace(model, path, layer.bare())
            continue
        del layer.adapters[name]
        layer.active = _BASE_ONLY if layer.active == name else layer.active


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent_path, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent_path), leaf, layer)


def _require(model: nn.Module, name: str) -> dict[str, Lora]:
    """Module path -> matrices of an adapter that must be there."""
    known = adapters_of(model)
    if name not in known:
        have = ", ".join(known) or "one to be loaded first"
        raise OptionError(f"there is no adapter {name!r}: expected {have}.{nearest(name, known)}")
    return known[name]


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


def chosen_adapter() -> str | None:
    """What `use_adapter` or `choosing` chose around here: a name, "" for the base alone, None where nothing did."""
    return _chosen.get()


@contextmanager
def choosing(name: str) -> Iterator[None]:
    """`use_adapter` for a name that is known to exist; "" is the base alone."""
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Answer with this adapter inside the block; None is the base alone. Other threads and tasks keep their own choice.

    Raises:
        OptionError: the model has no adapter of that name.
    """
    if name is not None:
        _require(model, name)
    with choosing(_BASE_ONLY if name is None else name):
        yield


@torch.no_grad()
def merge_lora(model: nn.Module, name: str = DEFAULT) -> None:
    """Add an adapter into the weights, in float32, and take all adapters off: the layers are plain ones again.

    Raises:
        OptionError: the model has no adapter of that name, or it lies over packed weights. Those would be rounded to 4
            bits once more with the sum, or unpacked into the memory they were to save; the files hold better ones.
    """
    adapters = _require(model, name)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    packed = next((path for path in adapters if isinstance(layers[path].weight, Nf4Weight)), None)
    if packed is not None:
        raise OptionError(
            f"the adapter {name!r} lies over 4-bit weights ({packed}), which cannot take it: expected dense ones. "
            "Merge it into the files: load(..., adapter=FOLDER), or `paligemma checkpoint merge`."
        )
    for path, layer in layers.items():
        adapter = adapters.get(path)
        if adapter is not None:
            merged = adapter.merged(layer.weight)
            if adapter.magnitude is not None:
                merged *= (adapter.magnitude.float() / torch.linalg.vector_norm(merged, dim=1))[:, None]
            assert isinstance(layer.weight, Tensor)
            layer.weight.copy_(merged)
        _replace(model, path, layer.bare())
