"""A model whose weights, gradients and moments are shared out over the processes of a run: FSDP2.

    every block ─┐  each rank keeps 1/n of its weights          gathered for its forward and its backward pass,
    the rest   ──┘  (dimension 0 in n pieces)                   gradients summed and cut on the way back

Two things are ours. Gradients are *summed* over ranks, because a loss is divided once, by what the whole step counts.
And all ranks must gather the same weights equally often: a rank that has fewer parts of a step than another, or a part
without pictures beside one with, gets blank examples of weight zero (`even_parts`).
"""

# n ranks · B rows · S slots of a row · R pixels of a side

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from paligemma.checkpoints.state import State
from paligemma.config import PaliGemmaConfig
from paligemma.errors import OptionError, nearest
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.processing.batch import ROW_FIELDS, Batch, Item, collate
from paligemma.processing.prompt import lay_out
from paligemma.train.ranks import Ranks

Strategy = Literal["auto", "ddp", "fsdp"]


def require_strategy(strategy: str) -> None:
    """
    Raises:
        OptionError: no such strategy, with the nearest.
    """
    if strategy not in get_args(Strategy):
        hint = nearest(str(strategy), get_args(Strategy))
        raise OptionError(f"strategy={strategy!r}: expected auto, ddp or fsdp.{hint}")


# ------------------------------------------------------------------------------------------------------------ weights


def mesh_of(ranks: Ranks, device: torch.device) -> DeviceMesh:
    """All ranks in one line."""
    return init_device_mesh(device.type, (ranks.world_size,))


def shard(model: PaliGemmaModel, mesh: DeviceMesh) -> PaliGemmaModel:
    """Share out the parameters of a model, in place; they become DTensors, so make the optimiser afterwards.

    Parameters on the meta device stay there; others move to the mesh's device, a block at a time.
    """
    for block in (*model.vision.blocks, *model.text.blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    register_fsdp_forward_method(model, "pre_logits")
    return model


def sharded_model(
    config: PaliGemmaConfig, state: State, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype = torch.float32
) -> PaliGemmaModel:
    """A sharded model filled from a checkpoint: at most one tensor stands whole in memory, on the CPU."""
    model = shard(PaliGemmaModel(config, device="meta", dtype=dtype), mesh)
    model.to_empty(device=device)
    for name, tensor in state.stream(dtype):
        put(model.get_parameter(name), tensor)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was here."""
    return isinstance(model, FSDPModule)


def settle(model: nn.Module) -> None:
    """Drop gathered weights that a forward pass without a backward pass leaves in place: the next step changes them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Copy a tensor into its place, of a shared-out one the piece that this rank keeps; nothing is sent."""
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    place = target.placements[0]
    pieces = whole.chunk(target.device_mesh.size(), dim=place.dim)  # type: ignore[attr-defined]
    local, rank = target.to_local(), target.device_mesh.get_local_rank()
    if rank < len(pieces):  # of few rows, the last ranks have none
        local.copy_(pieces[rank])


# -------------------------------------------------------------------------------------------------------------- steps


def even_parts(parts: Sequence[Batch], config: PaliGemmaConfig, ranks: Ranks) -> list[Batch]:
    """The parts of this rank's step, with blanks so that every rank runs the same modules equally often."""
    kinds = ranks.all([_kind(part) for part in parts])
    out: list[Batch] = []
    for number in range(max(map(len, kinds))):
        has_image = any(number < len(kind) and kind[number] for kind in kinds)
        if number >= len(parts):
            out.append(blank(config, has_image=has_image))
        elif has_image and not _kind(parts[number]):
            out.append(with_blank(parts[number], config))
        else:
            out.append(parts[number])
    return out


def _kind(part: Batch) -> bool:
    """Whether the image tower runs."""
    return part.pixels is not None


def blank(config: PaliGemmaConfig, *, has_image: bool) -> Batch:
    """One example of weight zero."""
    n_image, side = config.vision.n_image_tokens if has_image else 0, config.vision.resolution
    pixels = torch.zeros(1, 3, side, side) if has_image else None
    return collate([Item(lay_out(n_image, [0], (), [0], bos=None, eos=None), pixels=pixels, weight=0.0)])


def with_blank(part: Batch, config: PaliGemmaConfig) -> Batch:
    """A part without pictures and a row with one, of weight zero."""
    extra = blank(config, has_image=True)
    length = max(part.length, extra.length)
    rows: dict[str, Any] = {
        name: torch.cat([_longer(getattr(part, name), length), _longer(getattr(extra, name), length)])
        for name in ROW_FIELDS
    }
    weights = torch.ones(part.n_examples) if part.weights is None else part.weights
    return dataclasses.replace(
        part,
        **rows,
        pixels=extra.pixels,
        n_images=(*part.n_images, 1),
        order=(*part.order, part.n_examples),
        weights=torch.cat([weights, torch.zeros(1)]),
    )


def _longer(tensor: Tensor, length: int) -> Tensor:
    return F.pad(tensor, (0, length - tensor.shape[1]))
