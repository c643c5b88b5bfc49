"""One run to a folder: a second process that would write into it is told, before either harms the other."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from paligemma.errors import TrainingError
from paligemma.train.ranks import Ranks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


@contextlib.contextmanager
def alone_in(folder: Path, ranks: Ranks | None = None) -> Iterator[None]:
    """Hold a folder while the block runs; the system lets go of it when the process dies, however it does.

    A record lock, which a worker that was forked does not hold on to. Where the disk knows no locks, nothing is held.

    Raises:
        TrainingError: another process holds it; on every rank.
    """
    ranks = ranks or Ranks()
    with contextlib.ExitStack() as held:
        told = ranks.from_first(_held(folder, held) if ranks.is_first else None)
        if told is not None:
            raise TrainingError(told)
        yield


def _held(folder: Path, held: contextlib.ExitStack) -> str | None:
    """What to say where the folder is taken; None where it is ours now."""
    if fcntl is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = held.enter_context((folder / NAME).open("a+"))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip() or "another process"
        return f"{folder}: {who} trains in it now: expected a folder of its own. Wait for it, or choose another."
    except OSError:
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return None
