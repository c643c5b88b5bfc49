"""Teaching: one loop for every stage and every way of training.

from paligemma.train import FitOptions, Optimizer, TrainState, fit
"""

from typing import TYPE_CHECKING

from paligemma.lazy import lazy

if TYPE_CHECKING:
    from paligemma.train.coordinates import coordinate_loss
    from paligemma.train.loop import FitOptions, FitResult, StepReport, fit
    from paligemma.train.optim import Optimizer, OptimOptions
    from paligemma.train.ranks import Ranks
    from paligemma.train.schedule import Duration, Schedule
    from paligemma.train.snapshots import Snapshots
    from paligemma.train.state import TrainState

__all__ = [
    "Duration", "FitOptions", "FitResult", "OptimOptions", "Optimizer", "Ranks", "Schedule", "Snapshots", "StepReport",
    "TrainState", "coordinate_loss", "fit",
]  # fmt: skip

__getattr__, __dir__ = lazy(
    __name__,
    {
        "fit": "paligemma.train.loop",
        "FitOptions": "paligemma.train.loop",
        "FitResult": "paligemma.train.loop",
        "StepReport": "paligemma.train.loop",
        "Optimizer": "paligemma.train.optim",
        "OptimOptions": "paligemma.train.optim",
        "Ranks": "paligemma.train.ranks",
        "Duration": "paligemma.train.schedule",
        "Schedule": "paligemma.train.schedule",
        "Snapshots": "paligemma.train.snapshots",
        "TrainState": "paligemma.train.state",
        "coordinate_loss": "paligemma.train.coordinates",
    },
)
