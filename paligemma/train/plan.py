"""What a run will need, before it is started: memory per device, from shapes alone, and what to change if it is short.

A step is followed through its instants (`instants.py`), and a device must hold the largest. Weights, gradients and
moments are counted exactly, activations tensor by tensor (`kept.py`); what allocators and libraries add is a fixed
share. `benchmarks/plan_check.py` and the tests hold the sums against measured steps. Time and cost: `pace.py`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from paligemma.checkpoints.rules import native_shapes
from paligemma.config import PaliGemmaConfig
from paligemma.train.flops import Work, step_work
from paligemma.train.instants import Instant, instants
from paligemma.train.setup import ADAPTERS, METHODS, Setup, trained_names, with_method

__all__ = [
    "ADAPTERS", "METHODS", "Instant", "Plan", "Setup", "advice", "choose_method", "component_check", "largest_part",
    "plan", "remedies", "trained_names",
]  # fmt: skip

CPU_BASE_BYTES = 220 << 20  # the interpreter with torch
CUDA_BASE_BYTES = 600 << 20  # a CUDA context with its libraries, outside torch's allocator
SLACK = 0.03  # of the rest, for fragmentation


@dataclass(frozen=True)
class Plan:
    """Bytes per device, and the arithmetic of a step.

    Attributes:
        instants: of a step, in order.
        base: bytes that a process takes before it holds a model.
        n_trained, n_values: parameters trained, and all.
        work: FLOPs of a whole step over all devices.
    """

    instants: tuple[Instant, ...]
    base: float
    n_trained: int
    n_values: int
    work: Work

    @property
    def peak(self) -> Instant:
        """The instant that needs most."""
        return max(self.instants, key=lambda instant: instant.total)

    @property
    def total_bytes(self) -> float:
        """What one device must hold."""
        return self.base + self.peak.total * (1 + SLACK)


def plan(config: PaliGemmaConfig, setup: Setup) -> Plan:
    """Memory per device and arithmetic of one step; the model is not built."""
    shapes = native_shapes(config)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    trained = trained_names(config, setup)
    n_values, n_trained = sum(sizes.values()), sum(trained.values())
    work = step_work(
        config,
        n_images=setup.batch_size * setup.n_images,
        n_rows=setup.batch_size,
        row_length=setup.length(config),
        n_targets=setup.batch_size * setup.target_length,
        trained=component_check(trained),
        adapter_values=n_trained if setup.has_adapters else 0,
    )
    base = CUDA_BASE_BYTES if setup.on_cuda else CPU_BASE_BYTES
    return Plan(tuple(instants(config, setup, sizes, trained)), base, n_trained, n_values, work)


def component_check(trained: Mapping[str, int]) -> Callable[[str], bool]:
    """Component -> whether some weight of it moves; adapters count apart."""
    plain = [name for name in trained if not name.endswith(".adapters")]
    prefixes = {"vision": "vision.", "projector": "projector.", "embedding": "text.embedding", "text": "text.blocks"}

    def has(component: str) -> bool:
        return any(name.startswith(prefixes[component]) for name in plain)

    return has


WAYS = ("full", "lora", "qlora")  # from the best result to the least memory


def choose_method(
    config: PaliGemmaConfig, setup: Setup, available_bytes: float, *, may_share: bool = False
) -> tuple[str, str]:
    """The first of full, LoRA and QLoRA whose plan fits into the memory at hand, and why, in one sentence.

    Args:
        may_share: whether several devices may share the weights out, where that allows a better way.
    """
    method, why = _choose(config, setup, available_bytes)
    if may_share and setup.devices > 1 and method != WAYS[0]:
        better, reason = _choose(config, replace(setup, sharded=True), available_bytes)
        if WAYS.index(better) < WAYS.index(method):
            return better, f"shared out over {setup.devices} devices, {reason}"
    return method, why


def _choose(config: PaliGemmaConfig, setup: Setup, available_bytes: float) -> tuple[str, str]:
    told = []
    for method in WAYS:
        need = plan(config, with_method(setup, method)).total_bytes
        told.append(f"{method} needs {gib(need)}")
        if need <= available_bytes:
            return method, f"{told[-1]} of {gib(available_bytes)} at hand" + (
                f" ({', '.join(told[:-1])})" if told[:-1] else ""
            )
    return WAYS[-1], f"{', '.join(told)}, and {gib(available_bytes)} are at hand: expect to run out of memory"


def largest_part(config: PaliGemmaConfig, setup: Setup, available_bytes: float, *, most: int = 4096) -> int:
    """The most examples, up to `most`, that one device can hold at once; 0 where not even one fits.

    The batch grows with them: as many parts to a step as in `setup`, of which more than two take no more.
    """

    def fits(n: int) -> bool:
        grown = replace(setup, part_size=n, batch_size=n * setup.devices * min(2, setup.n_parts))
        return plan(config, grown).total_bytes <= available_bytes

    return _most(fits, most)


def _most(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where each below one that fits does as well; 0: none."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _part_of(config: PaliGemmaConfig, setup: Setup, available_bytes: float) -> int:
    """The most examples at once with which the batch as it is fits; 0: none.

    A batch in one part needs no place to add gradients up in, so that it is tried by itself.
    """

    def fits(n: int) -> bool:
        return plan(config, replace(setup, part_size=n)).total_bytes <= available_bytes

    return setup.rows if fits(setup.rows) else _most(fits, setup.rows - 1)


def remedies(config: PaliGemmaConfig, setup: Setup, available_bytes: float) -> Iterator[tuple[str, float]]:
    """What to change so that the plan fits, best first, and the bytes it takes then.

    First what leaves the result as it is (recomputation, smaller parts), then adapters, then more devices.
    """
    wanted = [("", setup)]
    if setup.method in ("full", "frozen"):
        wanted.append(("method=lora", with_method(setup, "lora")))
    if setup.method != "qlora":
        wanted.append(("method=qlora", with_method(setup, "qlora")))
    for words, changed in wanted:
        for recompute in dict.fromkeys((setup.recompute, True)):
            tried = replace(changed, recompute=recompute)
            said = [words] if words else []
            if recompute and not setup.recompute:
                said.append("recompute=true")
            rows = _part_of(config, tried, available_bytes)
            if rows == 0:
                continue
            if rows < tried.rows:
                said.append(f"loader.part_size={rows}")
            if said:
                fitting = replace(tried, part_size=min(rows, tried.part_size))
                yield ", ".join(said), plan(config, fitting).total_bytes
    for doublings in range(1, 8):
        more = replace(setup, devices=setup.devices * 2**doublings, sharded=True)
        more = replace(more, batch_size=max(setup.batch_size, more.devices))
        need = plan(config, more).total_bytes
        if need <= available_bytes:
            yield f"{more.devices} devices that share the weights (FSDP)", need
            return


def advice(config: PaliGemmaConfig, setup: Setup, available_bytes: float) -> str:
    """One line for a run that does not fit, or did not: what it needs, and what would fit, best first."""
    need = plan(config, setup).total_bytes
    said = f"the plan for {setup.method} with {setup.rows} at once is {gib(need)} of {gib(available_bytes)}"
    fitting = [f"{words} ({gib(n)})" for words, n in remedies(config, setup, available_bytes)][:3]
    if need <= available_bytes:
        half = max(1, setup.rows // 2)
        return f"{said}, which should have fitted: something else takes memory. Try loader.part_size={half}."
    if not fitting:
        return f"{said}, and nothing less would fit: take a smaller model or resolution, or a larger device."
    return f"{said}. What fits, best first: {'; '.join(fitting)}."


def gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
