"""Snapshots of a run: written whole or not at all, checked when read, the last few and the best kept.

    checkpoints/step-000120/   model.safetensors   optimizer.safetensors   values.json   manifest.json

A snapshot is written into a folder of another name, synced, and renamed when the last byte is on the disk; its manifest
holds size and SHA-256 of every file. So a run that is killed, or a disk that is full, costs the snapshot being written
and never an older one. `latest` walks back to the newest that is sound.

Writing happens in a thread, from copies: training goes on meanwhile.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from paligemma.checkpoints.staging import sync_folder
from paligemma.errors import TrainingError

Tensors = Mapping[str, Mapping[str, Tensor]]  # file stem -> names -> tensors
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Snapshot:
    """One sound snapshot.

    Attributes:
        tensors: file stem ("model", "optimizer") -> names -> tensors, on the CPU.
        values: everything else, JSON types.
    """

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


class Snapshots:
    """The snapshots of one run.

    Args:
        folder: holds one folder per snapshot; made when the first is written.
        keep: how many of the newest stay, at least 1; the best one by `score` stays besides.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, max(1, keep)
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def steps(self) -> list[int]:
        """Steps of which there is a snapshot, ascending; sound or not."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save(
        self, step: int, tensors: Tensors, values: Mapping[str, Any], *, score: float | None = None, wait: bool = False
    ) -> None:
        """Write a snapshot of copies taken now.

        Args:
            score: larger is better; the snapshot of the best score is kept.
            wait: return when it is on the disk, and raise if it is not; otherwise a failure is a warning.

        Raises:
            TrainingError: with `wait`, the disk is full or cannot be written.
        """
        self.finish()
        copies = {stem: {name: _copy(t) for name, t in named.items()} for stem, named in tensors.items()}
        content = {**values, "step": step, "score": score}
        self._writer = threading.Thread(target=self._write, args=(step, copies, content), name=f"snapshot {step}")
        self._writer.start()
        if wait:
            self.finish(strict=True)

    def finish(self, *, strict: bool = False) -> None:
        """Wait for the writer; a failure warns, or raises with `strict`."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is None:
            return
        text = f"{self.folder}: a snapshot could not be written ({failure}): older ones are untouched. Free some space."
        if strict:
            raise TrainingError(text) from failure
        warnings.warn(text, stacklevel=2)

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
        part = self.folder / f".step-{step:06d}.partial-{secrets.token_hex(4)}"
        try:
            part.mkdir(parents=True)
            for stem, named in tensors.items():
                save_file(named, part / f"{stem}.safetensors")
            (part / "values.json").write_text(json.dumps(values, indent=1) + "\n")
            files = sorted(part.iterdir())
            manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            for path in (*files, part / "manifest.json"):
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            sync_folder(part)
            self._put_in_place(part, self.path(step))
            self._prune()
        except BaseException as error:  # told by `finish`, in the thread that trains
            self._failure = error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _put_in_place(self, part: Path, final: Path) -> None:
        # A run that went back to an older snapshot meets the folder of the same step again.
        old = final.with_name(f".{final.name}.old-{secrets.token_hex(4)}")
        if final.exists():
            final.rename(old)
        part.rename(final)
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _prune(self) -> None:
        steps = self.steps()
        keep = set(steps[-self.keep :])
        best = self.best()
        for step in steps:
            if step not in keep and step != best:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def best(self) -> int | None:
        """The step of the highest score; None where none has one."""
        scores = {}
        for step in self.steps():
            with contextlib.suppress(OSError, ValueError):
                score = json.loads((self.path(step) / "values.json").read_text()).get("score")
                if score is not None:
                    scores[step] = score
        return max(scores, key=lambda step: (scores[step], step), default=None)

    def latest(self) -> Snapshot | None:
        """The newest sound snapshot, or None where there is none; a torn one is passed over with a warning.

        What an interrupted writer left behind is removed.
        """
        self.finish()
        if self.folder.is_dir():
            for path in self.folder.glob(".step-*"):
                shutil.rmtree(path, ignore_errors=True)
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except TrainingError as error:
                warnings.warn(f"{error} Going back to an older snapshot.", stacklevel=2)
        return None

    def read(self, step: int) -> Snapshot:
        """A snapshot, after every byte of it was checked.

        Raises:
            TrainingError: it is torn: a file is missing, short, or not what was written.
        """
        path = self.path(step)
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            for name, told in manifest.items():
                file = path / name
                if file.stat().st_size != told["bytes"] or _sha256(file) != told["sha256"]:
                    raise TrainingError(f"{file}: not what was written: expected sha256 {told['sha256'][:12]}….")
            stems = [name.removesuffix(".safetensors") for name in manifest if name.endswith(".safetensors")]
            tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in stems}
            values = json.loads((path / "values.json").read_text())
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TrainingError(f"{path}: torn ({error}): expected every file of its manifest.") from None
        return Snapshot(step, path, tensors, values)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
