"""Run, teach, judge, serve and scale PaliGemma and PaliGemma 2.

Public names only, each imported when it is first touched: `import paligemma` and `paligemma --help` load no torch.

    pg = paligemma.load("tiny")
    pg.detect("shapes.png", ["red circle", "star"])
"""

import importlib
from typing import TYPE_CHECKING, Any

from paligemma import errors
from paligemma.errors import PaliGemmaError

if TYPE_CHECKING:
    from paligemma import interop, metrics, presets, recipes, results, tasks, train
    from paligemma.api import EncodedImage, PaliGemma, load
    from paligemma.presets import PRESETS

__all__ = [
    "PRESETS",
    "EncodedImage",
    "PaliGemma",
    "PaliGemmaError",
    "errors",
    "interop",
    "load",
    "metrics",
    "presets",
    "recipes",
    "results",
    "tasks",
    "train",
]

_HOMES = {
    "load": "paligemma.api",
    "PaliGemma": "paligemma.api",
    "EncodedImage": "paligemma.api",
    "PRESETS": "paligemma.presets",
}
_MODULES = ("interop", "metrics", "presets", "recipes", "results", "tasks", "train")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"paligemma.{name}")
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("paligemma")
        except PackageNotFoundError:  # run from a source tree that was never installed
            return "0+source"
    raise AttributeError(f"module 'paligemma' has no attribute {name!r}.{errors.nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
