"""Snapshots of a run: written whole or not at all, checked when read, the last few and the best kept.

    checkpoints/step-000120/   model.safetensors   optimizer.safetensors   values.json   manifest.json
                               shards/ in their place, where many ranks write together (shards.py)

A snapshot is written into a folder of another name, synced, and renamed when the last byte is on the disk; its manifest
holds size and SHA-256 of every file. So a run that is killed, or a disk that is full, costs the snapshot being written
and never an older one. `latest` walks back to the newest that is sound.

Writing happens in a thread, from copies: training goes on meanwhile.
"""

import contextlib
import json
import math
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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paligemma.checkpoints.safetensors_io import TYPES
from paligemma.checkpoints.staging import replace_text, sync_folder
from paligemma.errors import TrainingError
from paligemma.train import shards
from paligemma.train.devices import available_memory
from paligemma.train.parallel import put
from paligemma.train.ranks import Ranks
from paligemma.train.shards import Specs, Tensors, sha256

SHARDS = "shards"
SCORE = "score.json"  # of a snapshot that was judged after it was written
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Snapshot:
    """One sound snapshot; its tensors are read when they are asked for.

    Attributes:
        values: everything but tensors, JSON types.
    """

    step: int
    path: Path
    values: dict[str, Any]

    @property
    def is_sharded(self) -> bool:
        return (self.path / SHARDS).is_dir()

    def specs(self) -> Specs:
        """Stem ("model", "optimizer") -> names -> shape and dtype."""
        if self.is_sharded:
            return shards.specs(self.path / SHARDS)
        found: Specs = {}
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
                found[file.stem] = {n: (tuple(p.get_shape()), TYPES[p.get_dtype()]) for n, p in parts.items()}
        return found

    def read_into(self, targets: Tensors) -> None:
        """Fill tensors, whole or shared out over any number of ranks."""
        if self.is_sharded:
            shards.read_into(self.path / SHARDS, targets)
            return
        for stem, named in targets.items():
            if not named:
                continue
            with safe_open(self.path / f"{stem}.safetensors", "pt") as opened:
                for name, target in named.items():
                    put(target, opened.get_tensor(name))

    def whole(self, stem: str) -> Mapping[str, Tensor]:
        """The tensors of a stem on the CPU."""
        if self.is_sharded:
            return shards.Whole(self.path / SHARDS, stem)
        with safe_open(self.path / f"{stem}.safetensors", "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)


class Snapshots:
    """The snapshots of one run.

    Args:
        folder: holds one folder per snapshot, on a disk that all ranks see; made when the first is written.
        keep: how many of the newest stay, at least 1; the best one by `score` stays besides.
        ranks: of the run. All of them call `save`, `finish` and `latest`.
        sharded: whether each rank holds a piece of the tensors and writes it, or the first all of them.
    """

    def __init__(self, folder: Path, *, keep: int = 2, ranks: Ranks | None = None, sharded: bool = False) -> None:
        self.folder, self.keep = folder, max(1, keep)
        self.ranks = ranks or Ranks()
        self._shards = shards.ShardWriter(self.ranks) if sharded else None
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._written = folder  # the snapshot that is, or was last
        self._torn: set[int] = set()  # met by `latest`; the run will come to them again

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
        content, is_short = {**values, "step": step, "score": score}, False
        if self._shards is not None:
            # Where another rank dies, its writer waits for ever: it must not keep this process.
            pieces = self._shards.copied(tensors)
            self._writer = threading.Thread(target=self._write_shards, args=(step, pieces, content), daemon=True)
        elif self.ranks.is_first:
            # Copies for the writer to go by while training goes on; where memory is short, or nobody goes on, none.
            n_bytes = sum(t.nbytes for named in tensors.values() for t in named.values())
            is_short = n_bytes > 0.9 * available_memory()
            copy = _AsTheyAre() if wait or is_short else _copy
            copies = {stem: {name: copy(t) for name, t in named.items()} for stem, named in tensors.items()}
            self._writer = threading.Thread(target=self._write, args=(step, copies, content))
        else:
            return
        self._written = self.path(step)
        self._writer.start()
        if wait:
            self.finish(strict=True)
        elif is_short:
            self.finish()

    def finish(self, *, strict: bool = False) -> None:
        """Wait for the writer; a failure warns, or raises with `strict`."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is None:
            return
        text = f"{self._written}: could not be written ({failure}): older ones are untouched. Free some space."
        if strict:
            raise TrainingError(text) from failure
        warnings.warn(text, stacklevel=2)

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
        part = self.folder / f".step-{step:06d}.partial-{secrets.token_hex(4)}"
        try:
            part.mkdir(parents=True)
            for stem, named in tensors.items():
                save_file(named, part / f"{stem}.safetensors")
            files = sorted(part.iterdir())
            self._complete(part, step, values, {path.name: _told(path) for path in files})
        except BaseException as error:  # told by `finish`, in the thread that trains
            self._failure = error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _write_shards(self, step: int, pieces: dict[str, Tensor], values: dict[str, Any]) -> None:
        assert self._shards is not None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.set_device(self.ranks.local_rank)  # a thread begins at device 0
        part = self.folder / f".step-{step:06d}.partial"
        try:
            self._shards.agree(shutil.rmtree if self.ranks.is_first else _nothing, part, True)
            sums = self._shards.write(part / SHARDS, pieces)
            manifest = {f"{SHARDS}/{name}": told for name, told in sums.items()}
            self._shards.agree(self._complete if self.ranks.is_first else _nothing, part, step, values, manifest)
        except BaseException as error:  # told by `finish`, in the thread that trains
            self._failure = error
        finally:
            if self.ranks.is_first:
                shutil.rmtree(part, ignore_errors=True)

    def _complete(self, part: Path, step: int, values: dict[str, Any], manifest: dict[str, Any]) -> None:
        """The tensors lie in `part`: add the rest, and put it in its place once it is all on the disk."""
        values_file = part / "values.json"
        values_file.write_text(json.dumps(values, indent=1) + "\n")
        manifest = {**manifest, values_file.name: _told(values_file)}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for name in (*manifest, "manifest.json"):
            with (part / name).open("rb+") as file:
                os.fsync(file.fileno())
        for folder in {part, *((part / name).parent for name in manifest)}:
            sync_folder(folder)
        self._put_in_place(part, self.path(step))
        self._torn.discard(step)
        self._prune(step)

    def _put_in_place(self, part: Path, final: Path) -> None:
        # A run that went back to an older snapshot meets the folder of the same step again.
        old = final.with_name(f".{final.name}.old-{secrets.token_hex(4)}")
        if final.exists():
            final.rename(old)
        part.rename(final)
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _prune(self, written: int) -> None:
        # Later ones are torn: the run went back before them, and will come to them again.
        steps = [step for step in self.steps() if step <= written]
        keep = set(steps[-self.keep :])
        best = self.best()
        for step in steps:
            if step not in keep and step != best:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def rate(self, step: int, score: float | None) -> None:
        """Give a snapshot that is on the disk its score, where it came later."""
        if score is not None and self.ranks.is_first and self.path(step).is_dir() and self.score(step) is None:
            with contextlib.suppress(OSError):  # on a full disk it goes without
                replace_text(self.path(step) / SCORE, json.dumps(score) + "\n")

    def score(self, step: int) -> float | None:
        """The score of a snapshot; None where it has none."""
        with contextlib.suppress(OSError, ValueError):
            said = json.loads((self.path(step) / "values.json").read_text()).get("score")
            found: float | None = json.loads((self.path(step) / SCORE).read_text()) if said is None else said
            return found
        return None

    def best(self) -> int | None:
        """The step of the highest score; None where none has one."""
        sound = [step for step in self.steps() if step not in self._torn]
        scores = {step: score for step in sound if (score := self.score(step)) is not None}
        return max(scores, key=lambda step: (scores[step], step), default=None)

    def best_score(self) -> float:
        """The highest score of a snapshot; -inf where none has one."""
        step = self.best()
        score = None if step is None else self.score(step)
        return -math.inf if score is None else score

    def latest(self, *, clean: bool = False) -> Snapshot | None:
        """The newest sound snapshot, or None where there is none; a torn one is passed over with a warning.

        Args:
            clean: remove what an interrupted writer left behind; for the run whose folder it is alone.

        Raises:
            TrainingError: there are snapshots and none of them is sound.
        """
        self.finish()
        step = self.ranks.from_first(self._newest(clean) if self.ranks.is_first else None)
        if isinstance(step, str):
            raise TrainingError(step)
        return None if step is None else self._opened(step)

    def _newest(self, clean: bool) -> int | str | None:
        """Its step, or what to say where none can be read."""
        if self.folder.is_dir() and clean:
            for path in self.folder.glob(".step-*"):
                final = self.folder / path.name[1:].split(".")[0]
                if ".old-" in path.name and not final.exists():  # its writer died before the new one stood there
                    path.rename(final)
                else:
                    shutil.rmtree(path, ignore_errors=True)
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read(step).step
            except TrainingError as error:
                if step == steps[0]:
                    return f"{error} No other is left: check the disk, or remove {self.folder} to begin anew."
                self._torn.add(step)
                warnings.warn(f"{error} Going back to an older snapshot.", stacklevel=3)
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
                if file.stat().st_size != told["bytes"] or sha256(file) != told["sha256"]:
                    raise TrainingError(f"{file}: not what was written: expected sha256 {told['sha256'][:12]}….")
            return self._opened(step)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TrainingError(f"{path}: torn ({error}): expected every file of its manifest.") from None

    def _opened(self, step: int) -> Snapshot:
        path = self.path(step)
        return Snapshot(step, path, json.loads((path / "values.json").read_text()))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


class _AsTheyAre:
    """Tensors on the CPU, not copied unless they share memory, which no file may."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, tensor: Tensor) -> Tensor:
        found = tensor.detach().to("cpu").contiguous()
        place = found.untyped_storage().data_ptr()
        if place in self.seen:
            return found.clone()
        self.seen.add(place)
        return found


def _told(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _nothing(*_arguments: Any) -> None:
    """What the other ranks do while the first does something."""
