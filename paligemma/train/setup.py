"""The terms of a run from which its needs follow: which weights move, how many examples at once, in which dtypes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from paligemma.checkpoints.rules import native_shapes
from paligemma.config import PaliGemmaConfig
from paligemma.models.lora import LoraOptions, targeted
from paligemma.train.optim import OptimOptions, first_match

METHODS = ("full", "frozen", "lora", "dora", "qlora")
ADAPTERS = ("lora", "dora", "qlora")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What decides how much a step needs.

    Attributes:
        method: which weights are trained: "full"; "frozen", all but the image tower and projector; "lora", "dora",
            "qlora", adapters.
        lora: their shape.
        optim: schedules that freeze, and the kind of moments.
        part_size: examples in memory at once; batch_size: of a step, over all devices.
        text_length: text tokens of an example; target_length: of them learned.
        n_images: pictures per example.
        weight_bytes: per value of weights below adapters: 4 float32, 2 bfloat16; of QLoRA, of all but its matrices.
            All others are float32.
        compute_bytes: per value of a product's result: 4 float32, 2 bfloat16.
        recompute: activation checkpointing.
        devices: that share the step; sharded splits weights, gradients and moments among them as well.
        on_cuda: kernels of a GPU, which keep no attention scores.
    """

    method: str = "full"
    lora: LoraOptions = LoraOptions()  # noqa: RUF009
    optim: OptimOptions = OptimOptions()  # noqa: RUF009
    part_size: int = 8
    batch_size: int = 8
    text_length: int = 64
    target_length: int = 16
    n_images: int = 1
    weight_bytes: float = 4
    compute_bytes: int = 4
    recompute: bool = False
    devices: int = 1
    sharded: bool = False
    on_cuda: bool = False

    @property
    def rows(self) -> int:
        """Examples that one device holds at once."""
        return max(1, min(self.part_size, -(-self.batch_size // self.devices)))

    @property
    def n_parts(self) -> int:
        """Parts into which a device cuts its share of a step."""
        return -(-max(1, -(-self.batch_size // self.devices)) // self.rows)

    @property
    def has_adapters(self) -> bool:
        return self.method in ADAPTERS

    def length(self, config: PaliGemmaConfig) -> int:
        """Slots of a row, image tokens included."""
        return self.n_images * config.vision.n_image_tokens + self.text_length


def with_method(setup: Setup, method: str) -> Setup:
    """The same run in another way; products with a narrow base below adapters are as narrow."""
    narrower = min(setup.compute_bytes, int(setup.weight_bytes)) if method in ADAPTERS else setup.compute_bytes
    return replace(setup, method=method, compute_bytes=narrower)


def trained_names(config: PaliGemmaConfig, setup: Setup) -> dict[str, int]:
    """Names and sizes of the weights that move; of adapters, one name per layer that has one."""
    shapes = native_shapes(config)
    if setup.has_adapters:
        found = {}
        for path in targeted(linear_paths(shapes), setup.lora.targets):
            n_out, n_in = shapes[f"{path}.weight"]
            magnitude = n_out if setup.lora.use_dora or setup.method == "dora" else 0
            found[f"{path}.adapters"] = setup.lora.rank * (n_in + n_out) + magnitude
        return found
    frozen = setup.optim.schedules
    if setup.method == "frozen":
        frozen = (("image", None), *frozen)
    return {
        name: math.prod(shape)
        for name, shape in shapes.items()
        if first_match(frozen, name, setup.optim.schedule) is not None
    }


def linear_paths(names: Iterable[str]) -> list[str]:
    """Paths of all linear layers, by the names of the weights."""
    return [name.removesuffix(".weight") for name in names if _is_linear(name)]


def _is_linear(name: str) -> bool:
    return name.endswith(".weight") and "embedding" not in name and "norm" not in name
