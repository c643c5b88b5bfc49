"""What a run will need, before it is started: memory by part, arithmetic, time and cost, from shapes alone.

Weights, gradients and moments are counted exactly. Activations are the tensors that autograd keeps, layer by layer, as
the model files of this package produce them; a fixed share is added for what allocators and libraries take.
`benchmarks/train_step.py` and the tests hold the sums against measured runs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from paligemma.checkpoints.rules import native_shapes
from paligemma.config import PaliGemmaConfig
from paligemma.models.lora import LoraOptions, targeted
from paligemma.train.flops import Work, step_work
from paligemma.train.loss import MAX_LOGITS
from paligemma.train.optim import OptimOptions, first_match

METHODS = ("full", "frozen", "lora", "dora", "qlora")
BASE_BYTES = 220 << 20  # the interpreter with torch: 150 to 300 MB on a CPU, some more with a CUDA context
SLACK = 0.03  # of the rest, for fragmentation


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
        weight_bytes: per value of frozen weights (4 float32, 2 bfloat16, 0.5 NF4); trained ones are float32.
        compute_bytes: per value of an activation.
        recompute: activation checkpointing.
        devices: that share the step; sharded splits weights, gradients and moments among them as well.
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
    compute_bytes: float = 4
    recompute: bool = False
    devices: int = 1
    sharded: bool = False


@dataclass(frozen=True)
class Plan:
    """Bytes per device by part, and the arithmetic of a step.

    Attributes:
        weights, gradients, moments, activations, logits, base: bytes.
        n_trained, n_values: parameters trained, and all.
        work: FLOPs of a whole step over all devices.
    """

    weights: float
    gradients: float
    moments: float
    activations: float
    logits: float
    base: float
    n_trained: int
    n_values: int
    work: Work

    @property
    def total_bytes(self) -> float:
        """What one device must hold at the peak of a step."""
        parts = self.weights + self.gradients + self.moments + self.activations + self.logits
        return self.base + parts * (1 + SLACK)


def trained_names(config: PaliGemmaConfig, setup: Setup) -> dict[str, int]:
    """Names and sizes of the weights that move; of adapters, one name per layer that has one."""
    shapes = native_shapes(config)
    if setup.method in ("lora", "dora", "qlora"):
        linears = [name.removesuffix(".weight") for name in shapes if _is_linear(name, shapes)]
        found = {}
        for path in targeted(linears, setup.lora.targets):
            n_out, n_in = shapes[f"{path}.weight"]
            magnitude = n_out if setup.lora.use_dora or setup.method == "dora" else 0
            found[f"{path}.adapters"] = setup.lora.rank * (n_in + n_out) + magnitude
        return found
    frozen = setup.optim.schedules
    if setup.method == "frozen":
        frozen = (*frozen, ("image", None))
    return {
        name: math.prod(shape)
        for name, shape in shapes.items()
        if first_match(frozen, name, setup.optim.schedule) is not None
    }


def plan(config: PaliGemmaConfig, setup: Setup) -> Plan:
    """Memory per device and arithmetic of one step; the model is not built."""
    shapes = native_shapes(config)
    n_values = sum(math.prod(shape) for shape in shapes.values())
    trained = trained_names(config, setup)
    n_trained = sum(trained.values())
    is_adapter = setup.method in ("lora", "dora", "qlora")
    n_frozen = n_values if is_adapter else n_values - n_trained
    shares = setup.devices if setup.sharded else 1
    moment_bytes = {"adam": 8, "adam8bit": 2, "sgd": 0}[setup.optim.kind]
    has = component_check(trained)
    rows = max(1, min(setup.part_size, -(-setup.batch_size // setup.devices)))
    length = setup.n_images * config.vision.n_image_tokens + setup.text_length
    work = step_work(
        config,
        n_images=setup.batch_size * setup.n_images,
        n_rows=setup.batch_size,
        row_length=length,
        n_targets=setup.batch_size * setup.target_length,
        trained=has,
        adapter_values=n_trained if is_adapter else 0,
    )
    return Plan(
        weights=(n_frozen * setup.weight_bytes + n_trained * 4) / shares,
        gradients=n_trained * 4 / shares,
        moments=n_trained * moment_bytes / shares,
        activations=activation_bytes(config, setup, rows, length, has),
        logits=logit_bytes(config, rows * setup.target_length, setup, has),
        base=BASE_BYTES,
        n_trained=n_trained,
        n_values=n_values,
        work=work,
    )


def activation_bytes(
    config: PaliGemmaConfig, setup: Setup, rows: int, length: int, trained: Callable[[str], bool]
) -> float:
    """What autograd keeps of one part's forward pass, and the working memory of one block."""
    text, vision, b = config.text, config.vision, setup.compute_bytes
    is_adapter = setup.method in ("lora", "dora", "qlora")
    tokens, patches = rows * length, rows * setup.n_images * vision.n_image_tokens
    q, kv = text.n_heads * text.head_dim, text.n_kv_heads * text.head_dim
    # Norms keep their input and its scale; projections keep their input; the MLP keeps gate, up and their product.
    per_token = (8 if text.post_norms else 5) * text.width + 3 * q + 4 * kv + 4 * text.mlp_dim
    scores = text.n_heads * length * (3 if text.attn_logits_softcap is not None else 1) * 4
    block = tokens * (per_token * b + scores)
    decoder = text.depth * block
    if setup.recompute:
        decoder = text.depth * tokens * text.width * b + block
    if not (trained("text") or trained("vision") or trained("projector") or trained("embedding") or is_adapter):
        decoder = block
    per_patch = 8 * vision.width + 2 * vision.mlp_dim
    tower_block = patches * per_patch * b
    tower = vision.depth * tower_block if trained("vision") else tower_block
    if setup.recompute and trained("vision"):
        tower = vision.depth * patches * vision.width * b + tower_block
    pixels = rows * setup.n_images * 3 * vision.resolution**2 * 4
    return float(decoder + tower + 2 * tokens * text.width * b + pixels)


def logit_bytes(config: PaliGemmaConfig, n_targets: int, setup: Setup, trained: Callable[[str], bool]) -> float:
    """Logits of one chunk with softmax and slope, and the second gradient of the table while it is scaled."""
    chunk = min(n_targets, max(1, MAX_LOGITS // config.text.vocab_size))
    table = config.text.vocab_size * config.text.width
    cast = table * setup.compute_bytes if setup.compute_bytes < 4 else 0
    return float(chunk * config.text.vocab_size * 4 * 4 + cast + (table * 4 if trained("embedding") else 0))


def component_check(trained: Mapping[str, int]) -> Callable[[str], bool]:
    """Component -> whether some weight of it moves; adapters count apart."""
    plain = [name for name in trained if not name.endswith(".adapters")]
    prefixes = {"vision": "vision.", "projector": "projector.", "embedding": "text.embedding", "text": "text.blocks"}

    def has(component: str) -> bool:
        return any(name.startswith(prefixes[component]) for name in plain)

    return has


def choose_method(config: PaliGemmaConfig, setup: Setup, available_bytes: float) -> tuple[str, str]:
    """The first of full, LoRA and QLoRA whose plan fits into the memory at hand, and why, in one sentence."""
    told = []
    for method in ("full", "lora", "qlora"):
        weight_bytes = 0.5 if method == "qlora" else setup.weight_bytes
        need = plan(config, replace(setup, method=method, weight_bytes=weight_bytes)).total_bytes
        told.append(f"{method} needs {_gib(need)}")
        if need <= available_bytes:
            return method, f"{told[-1]} of {_gib(available_bytes)} at hand" + (
                f" ({', '.join(told[:-1])})" if told[:-1] else ""
            )
    return "qlora", f"{', '.join(told)}, and {_gib(available_bytes)} are at hand: expect to run out of memory"


def largest_part(config: PaliGemmaConfig, setup: Setup, available_bytes: float) -> int:
    """The most examples that fit into memory at once; 0 where not even one does."""
    low, high = 0, 1
    while high <= 4096 and plan(config, replace(setup, part_size=high, batch_size=high)).total_bytes <= available_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = plan(config, replace(setup, part_size=middle, batch_size=middle)).total_bytes <= available_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low


def _is_linear(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return name.endswith(".weight") and len(shapes[name]) == 2 and "embedding" not in name


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
