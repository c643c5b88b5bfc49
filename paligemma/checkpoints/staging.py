"""Files that appear whole or not at all: written under temporary names, synced, then renamed."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

from paligemma.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class Staging:
    """Collects the files of one output in its folder and puts them in place together.

        with Staging(folder, overwrite=False) as staged:
            staged.open("model.safetensors").write(…)
            staged.commit()

    Leaving without `commit` removes every temporary file, and the folder if it was created here.

    Raises:
        CheckpointError: a final name is taken (unless overwrite), or the disk is full.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False) -> None:
        self.folder, self.overwrite = folder, overwrite
        self._files: dict[str, tuple[Path, IO[bytes]]] = {}
        self._made: list[Path] = []

    def __enter__(self) -> "Staging":
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        for path in reversed(missing):
            try:
                path.mkdir()
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be created ({error.strerror}). Choose another place.") from None
            self._made.append(path)
        return self

    def require_space(self, n_bytes: int) -> None:
        """Refuse before the work rather than in the middle of it."""
        free = shutil.disk_usage(self.folder).free
        if free < n_bytes:
            raise CheckpointError(
                f"{self.folder}: {n_bytes / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free. Free some "
                "space or choose another disk."
            )

    def require_free(self, names: Iterable[str]) -> None:
        """Refuse names that are taken before the work rather than after it."""
        for name in names:
            self._require_free(name)

    def _require_free(self, name: str) -> None:
        if (self.folder / name).exists() and not self.overwrite:
            raise CheckpointError(
                f"{self.folder / name} exists already: expected a new name. Choose another, or overwrite=True "
                "(--overwrite)."
            )

    def open(self, name: str) -> IO[bytes]:
        """A new file that will be called `name`; kept open until `commit`."""
        self._require_free(name)
        temporary = self.folder / f".{name}.partial-{secrets.token_hex(4)}"
        try:
            file = temporary.open("xb")
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be written to ({error.strerror}).") from None
        self._files[name] = (temporary, file)
        return file

    def commit(self) -> None:
        """Sync every file, then give all of them their names, in the order in which they were opened."""
        for _, file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for name, (temporary, _) in self._files.items():
            temporary.replace(self.folder / name)
        self._files.clear()
        self._made.clear()
        sync_folder(self.folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for temporary, file in self._files.values():
            with contextlib.suppress(OSError):  # the buffered rest does not fit on the disk either
                file.close()
            temporary.unlink(missing_ok=True)
        for path in reversed(self._made):
            path.rmdir()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise CheckpointError(
                f"{self.folder}: {error.strerror} while writing: nothing was left behind. Free some space or choose "
                "another disk."
            ) from error


def sync_folder(folder: Path) -> None:
    """Make the renames themselves survive a power cut, where the system lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Put a text in the place of a file's content: all of it or, on any interruption, nothing."""
    part = path.with_name(f".{path.name}.partial")
    part.write_text(text)
    part.replace(path)
