"""The beginning of a transfer: the base looked at, the recipe's open questions decided, the state at step 0."""

import dataclasses
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from paligemma.api import PaliGemma, load
from paligemma.api.loading import find, find_mask_vae, find_tokenizer, pick_device, with_choices
from paligemma.checkpoints import open_checkpoint
from paligemma.checkpoints.rules import native_shapes
from paligemma.config import PaliGemmaConfig
from paligemma.errors import OptionError
from paligemma.models.lora import add_lora
from paligemma.presets import MODEL_PRESETS
from paligemma.processing.processor import Processor
from paligemma.processing.tokenizer import Tokenizer
from paligemma.recipes.tree import to_tree
from paligemma.train.loop import Loss, default_loss, prepare
from paligemma.train.loss import TokenLoss
from paligemma.train.optim import Optimizer
from paligemma.train.parallel import mesh_of, shard, sharded_model
from paligemma.train.ranks import Ranks
from paligemma.train.snapshots import Snapshot
from paligemma.train.state import TrainState

if TYPE_CHECKING:
    from paligemma.recipes.transfer import TransferRecipe

ADAPTER_LR = 2e-4  # where the recipe leaves lr to the method
FULL_LR = 1e-5
SMALL, SMALL_LR, SMALL_ADAPTER_LR = 100_000_000, 1e-3, 3e-3  # below so many parameters; ours, by the studies of `tiny`
ADAPTERS = ("lora", "dora", "qlora")
# Fields that change no number of a run: they may differ between its parts.
_FREE = {"out", "device", "eval_every", "eval_rows", "merge", "data", "model", "loader.workers", "strategy"}
_FREE |= {"loader.skip_broken", "loader.part_size", "recompute"}
_FREE |= {"trackers", "samples", "score_before"}
_FREE |= {"fit.save_every", "fit.save_minutes", "fit.keep", "fit.max_loss"}


@dataclass(frozen=True)
class Base:
    """What a run starts from; the weights are not read yet.

    Attributes:
        print: the weights by content, so that a run never goes on over others.
    """

    path: Path
    config: PaliGemmaConfig
    processor: Processor
    device: torch.device
    print: str


@dataclass(frozen=True)
class Start:
    """A run at its first step."""

    pg: PaliGemma
    state: TrainState
    loss: Loss


def open_base(recipe: "TransferRecipe") -> Base:
    """Configuration and tokenizer of the base model.

    Raises:
        CheckpointError, HubError, TokenizerError: it cannot be had.
    """
    path = find(recipe.model)
    with open_checkpoint(path, resolution=recipe.resolution) as checkpoint:
        config = with_choices(checkpoint.config, **dict(recipe.choices))
        words = find_tokenizer(path, None, config)
    return Base(path, config, Processor(config, words), pick_device(recipe.device), fingerprint(path))


@dataclass(frozen=True)
class TokenCount:
    """How many tokens a text takes; unlike a lambda, it travels to worker processes that are not forked."""

    tokenizer: Tokenizer

    def __call__(self, text: str) -> int:
        return len(self.tokenizer.encode(text))


def published(model: str | Path) -> PaliGemmaConfig | None:
    """The configuration of a published name, with or without its "google/", "pt" and "mix"; None of any other."""
    words = [w for w in str(model).removeprefix("google/").lower().split("-") if w not in ("pt", "mix")]
    return MODEL_PRESETS.get("-".join(words))


def config_of(model: str | Path, resolution: int | None = None) -> PaliGemmaConfig:
    """The configuration behind a name, by size and resolution where it is a published one: nothing is fetched for it.

    Args:
        resolution: side of the pictures, if another than the checkpoint's.
    """
    named = published(model) if not Path(model).exists() else None
    if named is None:
        with open_checkpoint(find(model), resolution=resolution) as checkpoint:
            return checkpoint.config
    vision = dataclasses.replace(named.vision, resolution=resolution or named.vision.resolution)
    return dataclasses.replace(named, vision=vision, name=str(model))


def data_options(recipe: "TransferRecipe", base: Base) -> dict[str, Any]:
    """How a recipe's data are opened; mask codes, pictures and tokens are those of the base model."""
    vae = find_mask_vae(base.path, None)
    return {
        "format": recipe.format,
        "allow_outside": recipe.allow_outside,
        "task": recipe.task,
        "task_fields": recipe.task_fields,
        "augmentation": recipe.augmentation,
        "mask_encoder": None if vae is None else vae.encode_array,
        "mask_decoder": None if vae is None else vae.decode_array,
        "load": base.processor.load_image,
        "text_length": TokenCount(base.processor.tokenizer),
        "max_text": recipe.loader.max_text,
        "shuffle": recipe.loader.shuffle,
        "seed": recipe.loader.seed,
        "reweight": recipe.reweight,
        **dict(recipe.data_options),
    }


def as_begun(recipe: "TransferRecipe", folder: Path) -> "TransferRecipe":
    """The recipe of a run that goes on, with the way of training and the learning rate that it was begun with.

    Neither memory at hand now nor another default of a later version changes them; what the recipe names stays.
    """
    file = folder / "config.yaml"
    if not file.exists() or not any((folder / "checkpoints").glob("step-*")):
        return recipe
    said = yaml.safe_load(file.read_text()) or {}
    method, lr = said.get("method"), said.get("lr")
    if recipe.method == "auto" and isinstance(method, str):
        recipe = dataclasses.replace(recipe, method=method)  # type: ignore[arg-type]
    if recipe.lr is None and isinstance(lr, float) and recipe.method == method:
        recipe = dataclasses.replace(recipe, lr=lr)
    return recipe


def steps_of(recipe: "TransferRecipe", n_examples: int | None) -> int | None:
    """Updates of a run; None where it makes passes over rows that nobody has counted."""
    if recipe.steps is not None:
        return recipe.steps
    n_seen: float | None = recipe.examples
    if n_seen is None and n_examples is not None:
        n_seen = recipe.epochs * n_examples
    return None if n_seen is None else max(1, round(n_seen / recipe.loader.batch_size))


def learning_rate(method: str, config: PaliGemmaConfig | None = None) -> float:
    """What a recipe that names none takes: the reports' 1e-5, for adapters 2e-4; both far too slow for a small model.

    Args:
        config: None is a model of a released size.
    """
    is_adapter = method in ADAPTERS
    if config is not None and n_values(config) < SMALL:
        return SMALL_ADAPTER_LR if is_adapter else SMALL_LR
    return ADAPTER_LR if is_adapter else FULL_LR


def n_values(config: PaliGemmaConfig) -> int:
    """Parameters of a model."""
    return sum(math.prod(shape) for shape in native_shapes(config).values())


def settled(
    recipe: "TransferRecipe", method: str, n_examples: int, device: torch.device, config: PaliGemmaConfig | None = None
) -> "TransferRecipe":
    """The recipe with everything that was left open decided: what is saved beside the weights.

    Args:
        config: of the model, whose size decides the learning rate where the recipe names none.
    """
    steps = steps_of(recipe, n_examples)
    assert steps is not None, "the rows are counted"
    is_adapter = method in ADAPTERS
    lr = learning_rate(method, config) if recipe.lr is None else recipe.lr
    schedules = recipe.optim.schedules
    if method == "frozen" and ("image", None) not in schedules:
        schedules = (("image", None), *schedules)  # the first rule that matches a weight holds
    dtype = recipe.base_dtype
    if dtype == "auto":
        dtype = "bfloat16" if is_adapter and device.type == "cuda" else "float32"
    return dataclasses.replace(
        recipe,
        method=method,  # type: ignore[arg-type]
        steps=steps,
        lr=lr,
        base_dtype=dtype,
        lora=dataclasses.replace(recipe.lora, use_dora=recipe.lora.use_dora or method == "dora"),
        optim=dataclasses.replace(recipe.optim, lr=lr, schedules=schedules),
        fit=dataclasses.replace(recipe.fit, steps=steps),
    )


def base_model(recipe: "TransferRecipe", base: Base, device: torch.device) -> PaliGemma:
    """What a settled recipe starts from, loaded whole."""
    return load(
        base.path,
        device=device,
        dtype=recipe.base_dtype if recipe.method in ADAPTERS else "float32",
        quantize="nf4" if recipe.method == "qlora" else None,
        resolution=recipe.resolution,
        **dict(recipe.choices),
    )


def start(
    recipe: "TransferRecipe",
    base: Base,
    n_examples: int,
    token_loss: TokenLoss | None = None,
    *,
    order: str | None = None,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
) -> Start:
    """The model loaded, its trained part chosen, the optimiser made; the recipe is a settled one.

    Args:
        order: what decides the order of the examples besides the recipe, such as the weights of a mixture.
        ranks: share the weights out over them (FSDP).
        device: in place of the base's.
    """
    method, device = recipe.method, device or base.device
    if ranks is not None:
        pg = _shared_out(recipe, base, device, ranks)
    else:
        pg = base_model(recipe, base, device)
        if method in ADAPTERS:
            add_lora(pg.model, recipe.lora, seed=recipe.fit.seed)
    model = pg.model
    if method not in ADAPTERS:
        model.requires_grad_(True)
    model.vision.recompute = model.text.recompute = recipe.recompute
    prepare(model, recipe.fit)
    optimizer = Optimizer(
        model.named_parameters(), recipe.optim, total_steps=recipe.fit.steps,
        batch_size=recipe.loader.batch_size, n_examples=n_examples,
    )  # fmt: skip
    flat = {name: value for name, value in _flat(to_tree(recipe)).items() if name not in _FREE}
    told = "cross-entropy" if token_loss is None else getattr(token_loss, "__name__", "one of the user's")
    identity = {"base weights": base.print, "examples": n_examples, "loss": told, **flat}
    if order is not None:
        identity["mixture"] = order
    return Start(
        pg, TrainState(model, optimizer, identity=identity, free=frozenset(_FREE)), default_loss(recipe.fit, token_loss)
    )


def _shared_out(recipe: "TransferRecipe", base: Base, device: torch.device, ranks: Ranks) -> PaliGemma:
    mesh = mesh_of(ranks, device)
    if recipe.method not in ADAPTERS:
        with open_checkpoint(base.path, resolution=recipe.resolution) as checkpoint:
            model = sharded_model(base.config, checkpoint, mesh, device)
        return PaliGemma(model.eval(), base.processor, None)
    if recipe.method == "qlora":
        raise OptionError("strategy='fsdp' with 4-bit weights: expected whole ones. Take strategy=ddp, or method=lora.")
    pg = base_model(recipe, base, torch.device("cpu"))
    add_lora(pg.model, recipe.lora, seed=recipe.fit.seed)
    shard(pg.model, mesh)
    return pg


def rebuilt(recipe: "TransferRecipe", base: Base, n_examples: int, snapshot: Snapshot) -> PaliGemma:
    """The whole model of a run that was shared out, on the CPU, from its snapshot."""
    begun = start(recipe, base, n_examples, device=torch.device("cpu"))
    snapshot.read_into({"model": begun.state.trained()})
    return begun.pg


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def fingerprint(path: Path) -> str:
    """The weights behind a path by content: sizes and names of their files, first and last bytes of each."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 20))
            opened.seek(-min(1 << 20, file.stat().st_size), os.SEEK_END)
            digest.update(opened.read())
    return digest.hexdigest()[:16]
