"""What studies share: results that survive an interruption, fixed subsets, the words about the machine."""

import json
import os
import platform
from collections.abc import MutableMapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import paligemma


class Results(MutableMapping[str, Any]):
    """A mapping that lies in a JSON file, written after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values_: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __getitem__(self, key: str) -> Any:
        return self.values_[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.values_[key] = value
        self._write()

    def __delitem__(self, key: str) -> None:
        del self.values_[key]
        self._write()

    def __iter__(self) -> Any:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.values_, indent=1) + "\n")
        os.replace(part, self.path)


def subset(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n of the rows, drawn by the seed; all where there are no more."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[:n])


def describe() -> str:
    """Machine and versions, one line."""
    here = {"torch": torch.__version__, "paligemma": paligemma.__version__}
    with suppress(PackageNotFoundError):
        here["scikit-learn"] = version("scikit-learn")
    versions = ", ".join(f"{name} {number}" for name, number in here.items())
    return (
        f"Measured on {os.cpu_count()} {platform.machine()} cores with {versions}, Python {platform.python_version()}."
    )
