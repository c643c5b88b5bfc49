"""The instants of a step, and what one device holds at each: parameters, what is kept, what lives for a moment.

At the end of the forward pass all activations stand beside the first logits. On the way back gradients come as
activations go. Where the decoder's part of it ends, a sharded table has two gradients, the head's and the lookup's. The
update makes copies of its own unless it is fused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from paligemma.checkpoints.rules import TABLE
from paligemma.config import PaliGemmaConfig
from paligemma.models.nf4 import BITS
from paligemma.train.kept import Learns, Pass, cast_weights, decoder_block, tower_block
from paligemma.train.loss import MAX_LOGITS
from paligemma.train.optim import Optimizer, OptimOptions
from paligemma.train.setup import Setup, linear_paths

NF4_BYTES = BITS / 8  # per value of a matrix

# Values kept per trained value; of Muon's matrices one, of its other weights two: counted as if there were only those.
_MOMENTS = {"adam": 2, "adam8bit": 0.5, "muon": 2, "sgd": 0}


@dataclass(frozen=True)
class Instant:
    """What one device holds at one instant of a step, in bytes.

    Attributes:
        when: "forward", "backward", "lookup", "tower", "update".
        weights, gradients, moments: of the parameters; activations: kept for the way back.
        working: logits and copies that live for a moment.
    """

    when: str
    weights: float
    gradients: float
    moments: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments + self.activations + self.working


@dataclass(frozen=True)
class _Block:
    """A block of either tower: what is trained in it, and the bytes it keeps and needs on the way back."""

    values: int
    trained: int
    kept: float
    backward: float


def instants(
    config: PaliGemmaConfig, setup: Setup, sizes: Mapping[str, int], trained: Mapping[str, int]
) -> Iterator[Instant]:
    """The instants of a step on one device, in order.

    Args:
        sizes: native name -> values, of every parameter; trained: of those that move, from `trained_names`.
    """
    part = _pass(config, setup)
    text, vision = config.text, config.vision
    stem = ("vision.patch_embedding.weight", "vision.position_embedding")
    tower = list(_blocks(config, setup, "vision", sizes, trained, part, below=any(name in trained for name in stem)))
    tower_learns = any(name.startswith("vision.") for name in trained)
    projected = tower_learns or any(name.startswith("projector") for name in trained)
    has_table = TABLE in trained
    decoder = list(_blocks(config, setup, "text", sizes, trained, part, below=projected or has_table))
    decoder_learns = projected or has_table or any(name.startswith("text.blocks") for name in trained)

    def bytes_of(prefix: str) -> float:
        return 4.0 * sum(n for name, n in trained.items() if name.startswith(prefix)) / shares

    shares = setup.devices if setup.sharded else 1
    weights = _weight_bytes(setup, sizes, trained) / shares
    moments = 4.0 * sum(trained.values()) / shares * _MOMENTS[setup.optim.kind]
    everything = bytes_of("")
    table = 4.0 * sizes[TABLE]
    image, decoder_grads = bytes_of("vision.") + bytes_of("projector"), bytes_of("text.blocks")
    head = bytes_of(TABLE)
    several = setup.n_parts > 1  # then gradients stand from the first part on, and new ones are added to them

    patches = part.n_images * vision.n_image_tokens
    tower_kept = sum(block.kept for block in tower)
    if tower_learns:
        tower_kept += patches * (3 * vision.patch_size**2 * part.compute + vision.width * part.residual)
    tower_kept += projected * patches * vision.width * part.compute
    decoder_kept = sum(block.kept for block in decoder)
    if decoder_learns:  # final norm, masks, angles
        decoder_kept += part.tokens * (8.0 * text.width + 4 * text.head_dim + part.length)
    pixels = part.n_images * 3.0 * vision.resolution**2 * 4
    embeds = part.tokens * text.width * float(part.residual)
    gathered = _gathered(setup, sizes, has_table)
    largest = max((block.backward for block in decoder), default=0.0) * decoder_learns
    new_head = table * has_table * several

    def instant(when: str, gradients: float, activations: float, working: float) -> Instant:
        held = everything if several else gradients
        return Instant(when, weights, held, moments, activations, working + gathered + pixels)

    logits = _loss_bytes(config, setup, part) + new_head
    yield instant("forward", head, tower_kept + decoder_kept + embeds, logits)
    yield instant("backward", head, tower_kept + decoder_kept + embeds, largest + new_head)
    extra = table * has_table * (shares > 1)  # a gathered table's rows are added beside it, a whole one's in place
    yield instant("lookup", head + decoder_grads, tower_kept, max(largest, extra) + new_head)
    yield instant("tower", head + decoder_grads + image, 0.0, max((b.backward for b in tower), default=0.0))
    yield Instant("update", weights, everything, moments, 0.0, _update_bytes(setup, trained) / shares)


def _pass(config: PaliGemmaConfig, setup: Setup) -> Pass:
    narrow = setup.compute_bytes == 2
    is_cast = narrow and (setup.weight_bytes == 4 or not setup.has_adapters) and setup.method != "qlora"
    residual = 4 if is_cast or not narrow else 2
    return Pass(
        rows=setup.rows, length=setup.length(config), n_images=setup.rows * setup.n_images,
        compute=setup.compute_bytes, residual=residual, is_cast=is_cast, is_fused=setup.on_cuda,
    )  # fmt: skip


def _blocks(
    config: PaliGemmaConfig,
    setup: Setup,
    tower: str,
    sizes: Mapping[str, int],
    trained: Mapping[str, int],
    part: Pass,
    *,
    below: bool,
) -> Iterator[_Block]:
    """The blocks of a tower from below."""
    by_block: dict[str, dict[str, int]] = {}
    for name, n in sizes.items():
        if name.startswith(f"{tower}.blocks."):
            block, leaf = name.split(".", 3)[2], name.split(".", 3)[3].rpartition(".")[0]
            leaves = by_block.setdefault(block, {})
            leaves[leaf] = leaves.get(leaf, 0) + n
    moving: dict[str, dict[str, int]] = {block: {} for block in by_block}
    adapted: dict[str, dict[str, int]] = {block: {} for block in by_block}
    for name, n in trained.items():
        if name.startswith(f"{tower}.blocks."):
            block, leaf = name.split(".", 3)[2], name.split(".", 3)[3].rpartition(".")[0]
            kind = adapted if name.endswith(".adapters") else moving
            kind[block][leaf] = kind[block].get(leaf, 0) + n
    use_dora = setup.lora.use_dora or setup.method == "dora"
    for block, leaves in by_block.items():
        ranks = dict.fromkeys(adapted[block], setup.lora.rank)
        learns = Learns(weights=frozenset(moving[block]), ranks=ranks, below=below, use_dora=use_dora)
        matrices = {leaf: n for leaf, n in leaves.items() if "norm" not in leaf}
        casts = cast_weights(matrices, learns, part) + 2.0 * sum(adapted[block].values()) * part.is_cast
        if tower == "text":
            kept, width = decoder_block(config.text, learns, part), config.text.width * part.tokens
            working = _decoder_working(config, part)
        else:
            tokens = part.n_images * config.vision.n_image_tokens
            kept, width = tower_block(config.vision, learns, part), config.vision.width * tokens
            working = tokens * (2.0 * config.vision.mlp_dim + config.vision.width) * part.compute
        if setup.method == "qlora" and tower == "text":
            # A matrix is unpacked for its product: its codes, its values, and copies in other orders.
            working += 4.0 * max(matrices.values(), default=0) * part.compute
        working = working if learns.anything else 0.0
        n_trained = sum(moving[block].values()) + sum(adapted[block].values())
        if setup.recompute and learns.anything:
            # Casts of weights that are trained stay in autocast's cache until the forward pass is over.
            cached = 2.0 * sum(matrices[leaf] for leaf in moving[block] if leaf in matrices) * part.is_cast
            cached *= not setup.sharded
            yield _Block(sum(leaves.values()), n_trained, width * float(part.residual) + cached, kept + casts + working)
        else:
            yield _Block(sum(leaves.values()), n_trained, kept + casts, working)
        below = learns.anything


def _decoder_working(config: PaliGemmaConfig, part: Pass) -> float:
    """Slopes that stand beside each other on the way back through one decoder block: of the MLP or of the scores."""
    text = config.text
    mlp = part.tokens * (3.0 * text.mlp_dim * part.compute + 2 * text.width * 4)
    scores = 0.0 if part.is_fused else part.rows * text.n_heads * part.length**2 * 12.0
    return max(mlp, scores)


def _loss_bytes(config: PaliGemmaConfig, setup: Setup, part: Pass) -> float:
    """Logits of one chunk, their cap and softmax, and the slopes of the last two."""
    text = config.text
    chunk = min(part.rows * setup.target_length, max(1, MAX_LOGITS // text.vocab_size))
    is_capped = text.final_logits_softcap is not None and text.final_cap == "everywhere"
    return chunk * text.vocab_size * 4.0 * (6 if is_capped else 4)


def _weight_bytes(setup: Setup, sizes: Mapping[str, int], trained: Mapping[str, int]) -> float:
    n_trained = sum(trained.values())
    if not setup.has_adapters:
        return 4.0 * sum(sizes.values())
    if setup.method != "qlora":
        return sum(sizes.values()) * setup.weight_bytes + 4.0 * n_trained
    packed = sum(sizes[f"{path}.weight"] for path in linear_paths(sizes) if ".blocks." in path)
    rest = sum(sizes.values()) - packed
    return packed * NF4_BYTES + rest * setup.weight_bytes + 4.0 * n_trained


def _gathered(setup: Setup, sizes: Mapping[str, int], has_table: bool) -> float:
    """What a device holds whole while it computes with shards: the table, its gradient, and two blocks."""
    if not setup.sharded or setup.devices == 1:
        return 0.0
    block = max(
        sum(n for name, n in sizes.items() if name.startswith(f"{tower}.blocks.0.")) for tower in ("vision", "text")
    )
    return 4.0 * (sizes[TABLE] * (1 + has_table) + 2 * block)


def _update_bytes(setup: Setup, trained: Mapping[str, int]) -> float:
    """Copies that Adam makes: none where it is fused, of every parameter at once on a GPU, two of one on a CPU."""
    if setup.optim.kind != "adam" or is_fused(setup.optim):
        return 0.0
    return 4.0 * sum(trained.values()) if setup.on_cuda else 8.0 * max(trained.values(), default=0)


def is_fused(options: OptimOptions) -> bool:
    """Whether the optimiser that these options make updates in one pass, without copies."""
    plain = replace(options, schedules=(), lr_mults=(), decay_mults=())
    made = Optimizer([("x", nn.Parameter(torch.zeros(1)))], plain, total_steps=1)
    return bool(made.torch.defaults.get("fused"))
