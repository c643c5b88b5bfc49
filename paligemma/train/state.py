"""Everything of a run that changes: weights, optimiser, step. What a snapshot holds, and how it comes back."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paligemma.errors import TrainingError
from paligemma.models.paligemma import PaliGemmaModel
from paligemma.train.optim import Optimizer
from paligemma.train.snapshots import Snapshot


def _known(value: Any) -> Any:
    """What of a value counts: earlier versions wrote the name of a folder before the digest of its weights."""
    return re.sub(r"^.+ ([0-9a-f]{16})$", r"\1", value) if isinstance(value, str) else value


@dataclass
class TrainState:
    """A run at some step.

    Attributes:
        model: its weights; those that are trained require gradients.
        optimizer: with its moments.
        step: updates done.
        identity: what must be the same for a snapshot to fit: base weights, recipe, data; JSON types.
        free: keys of an identity that earlier versions kept and that change no number: they may differ.
        metrics: running values that a resumed run goes on from.
    """

    model: PaliGemmaModel
    optimizer: Optimizer
    step: int = 0
    identity: dict[str, Any] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    metrics: dict[str, float] = field(default_factory=dict)

    def trained(self) -> dict[str, Tensor]:
        """Native names -> weights that are trained; the others are those the run started from."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a snapshot holds, by file."""
        moments: dict[str, Tensor] = {}
        for name, parameter in self.trained().items():
            for key, value in self.optimizer.torch.state.get(parameter, {}).items():
                moments[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return {"model": self.trained(), "optimizer": moments}

    def values(self) -> dict[str, Any]:
        """What a snapshot holds besides tensors. Data position and random states follow from the step."""
        return {"identity": self.identity, "metrics": self.metrics}

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Become the run that a snapshot was taken of.

        Raises:
            TrainingError: it belongs to another run: other weights are trained, of other shapes, or by other data.
        """
        told = snapshot.values.get("identity", {})
        # What a snapshot of an earlier version does not know changes nothing as long as it is off.
        unlike = sorted(
            key
            for key in {*told, *self.identity} - self.free
            if _known(told.get(key)) != _known(self.identity.get(key)) and (key in told or self.identity[key])
        )
        if unlike:
            key = unlike[0]
            raise TrainingError(
                f"{snapshot.path}: a snapshot of another run: {key} was {told.get(key)!r}, is now "
                f"{self.identity.get(key)!r}. Resume with the same recipe, or start in another folder."
            )
        specs, trained = snapshot.specs(), self.trained()
        saved = specs.get("model", {})
        if set(trained) != set(saved):
            name = sorted(set(trained) ^ set(saved))[0]
            where = "is trained here and not there" if name in trained else "was trained there and is not here"
            raise TrainingError(f"{snapshot.path}: a snapshot of another run: {name} {where}.")
        for name, parameter in trained.items():
            if tuple(parameter.shape) != saved[name][0]:
                raise TrainingError(
                    f"{snapshot.path}: {name} has shape {list(saved[name][0])}, the model {list(parameter.shape)}: "
                    "a snapshot of another architecture."
                )
        moments: dict[str, Tensor] = {}
        for name, (shape, dtype) in specs.get("optimizer", {}).items():
            owner, _, key = name.rpartition("/")
            parameter = trained[owner]
            if shape == tuple(parameter.shape):
                moment = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            else:
                # Adam counts its steps on the CPU, unless it is fused.
                beside = shape or self.optimizer.torch.defaults.get("fused")
                moment = torch.zeros(shape, dtype=dtype, device=parameter.device if beside else "cpu")
            moments[name] = self.optimizer.torch.state[parameter][key] = moment
        snapshot.read_into({"model": trained, "optimizer": moments})
        self.step = snapshot.step
        self.metrics = dict(snapshot.values.get("metrics", {}))
