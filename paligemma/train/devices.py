"""Devices by name: what a step is planned against, and how much of it a step gets.

Peaks are those of the makers' data sheets, dense (half of what they print "with sparsity"), float32 on the ordinary
cores, as torch multiplies it unless told otherwise. Memory is what the driver offers, a little less than the label.

How much of a peak a training step reaches is a number to be measured. The shares of CPUs are:
`benchmarks/plan_check.py` holds them against real steps. Those of GPUs are assumptions until the commands in
docs/gpu-todo.md have been run.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from paligemma.errors import OptionError, nearest

GIB = float(1 << 30)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much of a device a training step gets.

    Attributes:
        products: of the peak, in matrix products.
        memory: of the memory's bandwidth, in everything else.
        source: where the two come from.
    """

    products: float
    memory: float
    source: str


MEASURED_CPU = Shares(products=0.85, memory=1.0, source="measured, benchmarks/plan_check.py")
ASSUMED_GPU = Shares(products=0.5, memory=0.8, source="assumed, not measured yet")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        name: as people call it.
        kind: "cuda" or "cpu".
        memory_bytes: what a program may take.
        flops: dtype -> dense FLOP/s.
        bandwidth: of its memory, bytes per second.
        fresh: bytes per second of memory that is touched for the first time: large tensors of a CPU are mapped anew in
            every step, and the system clears each page. A GPU's allocator keeps its memory.
        link: to its neighbours, bytes per second in one direction.
        shares: how much of this a step gets.
        source: of the numbers.
    """

    name: str
    kind: str = "cuda"
    memory_bytes: float
    flops: dict[str, float]
    bandwidth: float
    link: float
    shares: Shares = ASSUMED_GPU
    source: str
    fresh: float = float("inf")

    def flops_of(self, dtype: str) -> float:
        """Peak in a dtype; one without instructions of its own runs as float32."""
        return self.flops.get(dtype, self.flops["float32"])


def _gpu(name: str, gib: float, f32: float, bf16: float | None, tb_s: float, link_gb_s: float, source: str) -> Device:
    flops = {"float32": f32 * 1e12} | ({} if bf16 is None else {"bfloat16": bf16 * 1e12})
    return Device(
        name=name, memory_bytes=gib * GIB, flops=flops, bandwidth=tb_s * 1e12, link=link_gb_s * 1e9, source=source
    )  # fmt: skip


#        label          GiB   TFLOP/s f32, bf16  TB/s   GB/s one way
DEVICES: dict[str, Device] = {
    "h100": _gpu("H100 SXM 80 GB", 79.1, 66.9, 989.4, 3.35, 450, "NVIDIA H100 data sheet; NVLink 4"),
    "h200": _gpu("H200 SXM 141 GB", 139.8, 66.9, 989.4, 4.8, 450, "NVIDIA H200 data sheet; NVLink 4"),
    "a100-40": _gpu("A100 SXM 40 GB", 39.4, 19.5, 312, 1.555, 300, "NVIDIA A100 data sheet; NVLink 3"),
    "a100-80": _gpu("A100 SXM 80 GB", 79.1, 19.5, 312, 2.039, 300, "NVIDIA A100 data sheet; NVLink 3"),
    "l4": _gpu("L4 24 GB", 22.0, 30.3, 121, 0.3, 32, "NVIDIA L4 data sheet; PCIe 4 x16"),
    "l40s": _gpu("L40S 48 GB", 44.4, 91.6, 362, 0.864, 32, "NVIDIA L40S data sheet; PCIe 4 x16"),
    "a10g": _gpu("A10G 24 GB", 22.0, 31.5, 70, 0.6, 32, "NVIDIA A10G data sheet; PCIe 4 x16"),
    # Turing has no bfloat16: torch computes it in float32.
    "t4": _gpu("T4 16 GB", 14.6, 8.1, None, 0.32, 16, "NVIDIA T4 data sheet; PCIe 3 x16"),
    "rtx4090": _gpu("RTX 4090 24 GB", 23.5, 82.6, 165.2, 1.008, 32, "NVIDIA Ada white paper; PCIe 4 x16"),
    "rtx3090": _gpu("RTX 3090 24 GB", 23.5, 35.6, 71, 0.936, 32, "NVIDIA GA102 white paper; PCIe 4 x16"),
}
# What torch.cuda.get_device_name says -> the name here; the first that it holds wins.
_CUDA_NAMES = {
    "H100": "h100", "H200": "h200", "A100-SXM4-40": "a100-40", "A100-PCIE-40": "a100-40", "A100": "a100-80",
    "L40S": "l40s", "L4": "l4", "A10G": "a10g", "T4": "t4", "RTX 4090": "rtx4090", "RTX 3090": "rtx3090",
}  # fmt: skip
HERE = ("this", "cpu")


def device_of(name: str) -> Device:
    """A device by name: one of `DEVICES`, "cpu", or "this" for the first GPU of this machine, else its CPU.

    "cpu" and unknown GPUs are measured on the spot, which takes about a second.

    Raises:
        OptionError: a name that is not known.
    """
    key = name.lower().replace(" ", "").replace("_", "-")
    if key in ("cpu", "this"):
        return measured_cpu() if key == "cpu" or not torch.cuda.is_available() else this_gpu()
    if key not in DEVICES:
        known = (*DEVICES, *HERE)
        raise OptionError(f"there is no device '{name}': expected one of {', '.join(known)}.{nearest(key, known)}")
    return DEVICES[key]


def this_gpu() -> Device:
    """The first CUDA device: from the table where it is known, else measured."""
    label = torch.cuda.get_device_name(0)
    key = next((known for word, known in _CUDA_NAMES.items() if word in label), None)
    total = float(torch.cuda.get_device_properties(0).total_memory)
    if key is not None:
        known = DEVICES[key]
        return Device(**{**vars(known), "name": label, "memory_bytes": total})
    place = torch.device("cuda", 0)
    flops = {dtype: product_rate(dtype, place) for dtype in ("float32", "bfloat16")}
    return Device(
        name=label, memory_bytes=total, flops=flops, bandwidth=copy_rate(place), link=32e9,
        source="measured here; the link is assumed",
    )  # fmt: skip


def measured_cpu() -> Device:
    """This machine's CPU: matrix products and memory, timed on the spot with the threads torch has now."""
    place = torch.device("cpu")
    flops = {"float32": product_rate("float32", place)}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        flops["bfloat16"] = product_rate("bfloat16", place)
    threads = torch.get_num_threads()
    return Device(
        name=f"this CPU, {threads} thread{'s' * (threads > 1)}", kind="cpu", memory_bytes=available_memory(),
        flops=flops, bandwidth=copy_rate(place), link=1e9, shares=MEASURED_CPU, source="measured here",
        fresh=fresh_rate(),
    )  # fmt: skip


def peak_of(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a device that is training here, for MFU; a CPU is measured only where somebody watches."""
    if device.type == "cuda":
        return this_gpu().flops_of(precision)
    return measured_cpu().flops_of(precision) if device.type == "cpu" and sys.stderr.isatty() else None


def product_rate(dtype: str, place: torch.device) -> float:
    """FLOP/s of a matrix product of the model's proportions: 512 rows through a projection of 2,304 by 4,608."""
    rows, n_in, n_out = (512, 2304, 4608) if place.type == "cpu" else (4096, 4096, 8192)
    kind: torch.dtype = getattr(torch, dtype)
    x, w = torch.ones(rows, n_in, dtype=kind, device=place), torch.ones(n_in, n_out, dtype=kind, device=place)
    out = torch.empty(rows, n_out, dtype=kind, device=place)
    return 2.0 * rows * n_in * n_out / _fastest(lambda: torch.mm(x, w, out=out), place)


def copy_rate(place: torch.device) -> float:
    """Bytes per second, read and written, of a copy much larger than the caches."""
    source = torch.ones(1 << 25, device=place)
    target = torch.empty_like(source)
    return 2.0 * source.numel() * 4 / _fastest(lambda: target.copy_(source), place)


def fresh_rate() -> float:
    """Bytes per second of a first write to new memory; huge pages (THP_MEM_ALLOC_ENABLE=1) give several times more."""
    n_bytes = 1 << 28
    return n_bytes / _fastest(lambda: torch.empty(n_bytes, dtype=torch.uint8).zero_(), torch.device("cpu"), repeats=3)


def available_memory() -> float:
    """Bytes of main memory that a new program may take."""
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
        return float(int(fields["MemAvailable"].split()[0]) * 1024)
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _fastest(call: Callable[[], object], place: torch.device, repeats: int = 7) -> float:
    """Seconds of the fastest of some calls: whatever else runs only ever adds time."""

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    call()
    wait()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - started)
    return best
