"""From the name of a transfer to something that `recipes.transfer.run` carries out."""

import re
from pathlib import Path
from typing import Any

from paligemma.data.loader import LoaderOptions
from paligemma.errors import OptionError
from paligemma.presets import EMBEDDED
from paligemma.recipes.start import ADAPTER_LR, ADAPTERS, config_of
from paligemma.recipes.transfer import TransferRecipe
from paligemma.recipes.transfers.base import Setting, Transfer
from paligemma.recipes.transfers.rows import transfer_of
from paligemma.recipes.tree import changed
from paligemma.train.loop import FitOptions
from paligemma.train.optim import OptimOptions
from paligemma.train.schedule import Duration, Schedule

BASE_RESOLUTIONS = (224, 448, 896)  # of published checkpoints


def recipe(
    name: str,
    *,
    data: str,
    resolution: int | None = None,
    model: str | None = None,
    out: str | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    **changes: Any,
) -> TransferRecipe:
    """A published transfer as a recipe, every number of it in the field that acts.

        recipe("vqav2", data="vqav2/", resolution=448)
        recipe("vqav2", data="vqav2/", model="tiny", epochs=1, **{"loader.batch_size": 4})

    Weight decay is the reference's: an absolute number, which stays when lr is changed.

    Args:
        name: of `TRANSFERS`.
        data: a folder of JSONL with the transfer's columns (`simple`: anything that `transfer` takes).
        resolution: side of the pictures; decides the numbers, those of the nearest resolution where the table has none
            for it. None: that of the model on disk or in its name, else 224.
        model: what to start from; None: the report's checkpoint of that resolution.
        out: folder of the run; runs/transfer.{name}-{resolution} where it is not given.
        epochs, lr: in place of the table's. An adapter asked for with `method` learns at 2e-4 where lr is not given.
        changes: more fields of `TransferRecipe` that shall be otherwise; dotted names lead into its parts.

    Raises:
        OptionError: no such transfer or field, or a transfer that is only scored.
    """
    transfer = transfer_of(name)
    side = resolution or _side_of(model) or 224
    setting = transfer.setting(side)
    if model is None:
        model = f"{transfer.model}-{_nearest(transfer, side)}"
        resolution = side
    choices: list[tuple[str, Any]] = [("final_logits_softcap", None)]  # off in transfers; the one of attention stays
    if transfer.asked_resize is not None:
        choices.insert(0, ("resize", transfer.asked_resize))
    made = TransferRecipe(
        data=data,
        form=None if name == "simple" else name,
        model=model,
        resolution=resolution,
        out=out or f"runs/transfer.{name}-{side}",
        method="frozen" if setting.freeze_image else "full",
        epochs=setting.epochs,
        steps=setting.steps,
        lr=setting.lr,
        choices=tuple(choices),
        loader=LoaderOptions(batch_size=setting.batch_size, max_text=transfer.text_length + 1),
        optim=_optim(transfer, setting),
        fit=FitOptions(
            steps=setting.steps or 1,
            dropout=setting.dropout,
            label_smoothing=setting.label_smoothing,
            save_every=transfer.save_every,
        ),
    )
    if epochs is not None:
        changes = {"epochs": epochs, "steps": None, **changes}
    if lr is None and changes.get("method") in ADAPTERS:
        lr = ADAPTER_LR  # the table's are for whole weights
    if lr is not None:
        changes = {"lr": lr, **changes}
    return changed(made, changes)


def _optim(transfer: Transfer, setting: Setting) -> OptimOptions:
    schedule = Schedule(kind="cosine", warmup=Duration(percent=transfer.warmup))
    schedules: tuple[tuple[str, Schedule | None], ...] = ()
    if transfer.trains is not None:  # a frozen image tower is the method "frozen"
        schedules = ((transfer.trains, schedule), ("all", None))
    return OptimOptions(
        kind=transfer.kind,
        lr=setting.lr,
        weight_decay=setting.weight_decay,
        betas=(0.9, 0.999),
        clip_norm=transfer.clip_norm,
        schedule=schedule,
        schedules=schedules,
    )


def _side_of(model: str | None) -> int | None:
    """The resolution of a checkpoint that is here, or that the name of one elsewhere ends in."""
    if model is None:
        return None
    if model in EMBEDDED or Path(model).exists():
        return config_of(model).vision.resolution
    found = re.search(r"-(\d{3,4})$", model)
    return int(found[1]) if found else None


def _nearest(transfer: Transfer, side: int) -> int:
    """The checkpoint to start from: that of the settings, or of the resolution itself where there is one."""
    if side < 1:
        raise OptionError(f"resolution={side}: expected a side in pixels, one of 224, 448, 896.")
    return side if side in BASE_RESOLUTIONS else transfer.nearest_resolution(side)
