"""How long a step of a plan takes: products at the pace of the device's arithmetic, the rest at that of its memory.

    step = products / (peak · share) + bytes moved / (bandwidth · share) + bytes sent / link

Products are the model's FLOPs, forward and backward, and with activation checkpointing the forward pass of the blocks
again. Bytes moved count what is touched outside of products: the update (weights, gradients, moments), casts under
autocast, and every kept activation some times. Measured steps that it is held against: `benchmarks/plan_check.py`.
"""

from dataclasses import dataclass

from paligemma.config import PaliGemmaConfig
from paligemma.train.devices import Device
from paligemma.train.plan import Plan
from paligemma.train.setup import Setup

# Bytes per trained value: Adam reads weight, gradient and two moments and writes three of them (28); the gradient is
# written, and read for its norm (8).
UPDATE_BYTES = 36.0
CAST_BYTES = 6.0  # per value of a weight under autocast: float32 read, bfloat16 written
FRESH = 2.0  # times that gradients, casts and kept activations, or short-lived tensors of their size, are mapped anew
TOUCHES = 8.0  # of a kept activation: written and read by norms, gates, residuals, and on the way back


@dataclass(frozen=True)
class Pace:
    """Seconds of one step, and what follows from them.

    Attributes:
        products, memory, links: seconds of each; links overlap with nothing here, so the sum is careful.
        tokens_per_s: real tokens, image and text, of all devices.
        mfu: model FLOPs over the peak of all devices.
    """

    products: float
    memory: float
    links: float
    tokens_per_s: float
    mfu: float

    @property
    def step_s(self) -> float:
        return self.products + self.memory + self.links


def pace(config: PaliGemmaConfig, setup: Setup, planned: Plan, device: Device) -> Pace:
    """Time of a step on some devices of a kind."""
    dtype = "bfloat16" if setup.compute_bytes == 2 else "float32"
    peak = device.flops_of(dtype)
    again = planned.work.forward if setup.recompute else 0.0
    products = (planned.work.total + again) / setup.devices / (peak * device.shares.products)

    shards = setup.devices if setup.sharded else 1
    is_cast = setup.compute_bytes == 2 and not (setup.has_adapters and setup.weight_bytes <= 2)
    kept = max(instant.activations for instant in planned.instants)
    moved = UPDATE_BYTES * planned.n_trained / shards
    moved += CAST_BYTES * planned.n_values * is_cast
    moved += TOUCHES * kept * setup.n_parts
    memory = moved / (device.bandwidth * device.shares.memory)
    casts = 2.0 * (planned.n_values + planned.n_trained) * is_cast
    memory += FRESH * (4.0 * planned.n_trained / shards + casts + kept * setup.n_parts) / device.fresh

    sent = 0.0
    if setup.devices > 1:
        part = (setup.devices - 1) / setup.devices
        # Gradients to everyone and back; shared-out weights are gathered twice besides, and each part of a step anew.
        rounds = 3 * setup.n_parts if setup.sharded else 2
        sent = part * 4.0 * rounds * (planned.n_values if setup.sharded else planned.n_trained)
    links = sent / device.link

    seconds = products + memory + links
    tokens = setup.batch_size * setup.length(config)
    return Pace(products, memory, links, tokens / seconds, planned.work.total / seconds / (peak * setup.devices))
