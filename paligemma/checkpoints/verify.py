"""Everything that can be wrong with weights on disk, found in one pass: structure, checksums, NaN and Inf."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paligemma.checkpoints import hugging_face
from paligemma.checkpoints.adapter_config import parse_adapter_config
from paligemma.checkpoints.checkpoint import Checkpoint, open_checkpoint
from paligemma.checkpoints.files import CHUNK_BYTES
from paligemma.checkpoints.finite import describe_nonfinite
from paligemma.checkpoints.identify import identify
from paligemma.checkpoints.safetensors_io import SafetensorsFiles
from paligemma.checkpoints.write import SUMS
from paligemma.errors import CheckpointError

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class Verdict:
    """The outcome of `verify`: sound when `problems` is empty."""

    path: str
    n_tensors: int
    n_values: int
    checked: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        return not self.problems


def verify(path: str | Path, *, strict: bool = True, progress: Progress | None = None) -> Verdict:
    """Read a checkpoint or adapter from end to end and list what is wrong with it.

    Names, shapes and sizes; checksums (SHA256SUMS beside the files, the name of a hub cache blob, the CRC of every
    array of an .npz); every value finite.

    Raises:
        CheckpointError: so damaged or incomplete that it cannot even be opened; PickleRefused for a pickle.
    """
    if identify(path) == "adapter":
        return _verify_adapter(Path(path))
    with open_checkpoint(path, strict=strict) as checkpoint:
        problems = _size_problems(checkpoint) + _hash_problems(_files(checkpoint))
        done = 0
        for name in checkpoint:
            try:
                found = describe_nonfinite(checkpoint[name])
            except CheckpointError as error:
                problems.append(str(error))
            else:
                if found:
                    problems.append(f"{checkpoint.source(name)} ({name}) holds {found}")
            done += checkpoint.spec(name).n_bytes
            if progress is not None:
                progress(done, checkpoint.n_bytes)
        checked = ["names and shapes", "file sizes", "finite values"]
        checked.append("checksums of arrays" if checkpoint.format == "npz" else _hash_kind(_files(checkpoint)))
        n_values = sum(checkpoint.spec(name).n_values for name in checkpoint)
        return Verdict(str(path), len(checkpoint), n_values, tuple(filter(None, checked)), tuple(problems))


def _verify_adapter(folder: Path) -> Verdict:
    parse_adapter_config(folder)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{folder}: no adapter_model.safetensors: expected it beside adapter_config.json.")
    file = SafetensorsFiles([weights])
    try:
        problems = _hash_problems([weights])
        for name in file.specs:
            found = describe_nonfinite(file.read(name))
            if found:
                problems.append(f"{weights}: {name} holds {found}")
        n_values = sum(spec.n_values for spec in file.specs.values())
        return Verdict(str(folder), len(file.specs), n_values, ("file sizes", "finite values"), tuple(problems))
    finally:
        file.close()


def _files(checkpoint: Checkpoint) -> list[Path]:
    return sorted({Path(checkpoint.source(name).split(": ")[0]) for name in checkpoint})


def _size_problems(checkpoint: Checkpoint) -> list[str]:
    index = checkpoint.path / "model.safetensors.index.json"
    if not index.is_file():
        return []
    stated = hugging_face.read_json(index).get("metadata", {}).get("total_size")
    # Some releases count a tied head once more than the shards hold it: only a shortfall is a fault.
    have = sum(spec.n_bytes for spec in checkpoint.file_specs.values())
    if not stated or have >= stated:
        return []
    return [f"{index}: total_size is {stated:,}, but the shards hold only {have:,} bytes"]


def _hash_problems(files: list[Path]) -> list[str]:
    problems: list[str] = []
    for path in files:
        expected = _expected_sha256(path)
        if expected and sha256_of(path) != expected:
            problems.append(f"{path}: its sha256 is not {expected[:12]}…: the file was changed or damaged")
    return problems


def _hash_kind(files: list[Path]) -> str:
    n_hashed = sum(_expected_sha256(path) is not None for path in files)
    return f"sha256 of {n_hashed} of {len(files)} files" if n_hashed else ""


def _expected_sha256(path: Path) -> str | None:
    """From SHA256SUMS beside it, or from the hub cache, which names large files by their hash."""
    sums = path.parent / SUMS
    if sums.is_file():
        for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            if name.strip() == path.name:
                return digest
    blob = path.resolve().name
    return blob if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else None


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
