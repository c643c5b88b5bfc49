"""One run to a folder, over processes that really run."""

import subprocess
import sys

import pytest

from paligemma.errors import TrainingError
from paligemma.train.lock import alone_in

HOLD = """
import os, sys
from pathlib import Path
from paligemma.train.lock import alone_in

with alone_in(Path(sys.argv[1])):
    if os.fork() == 0:  # a reader of pictures, which outlives the run for a moment
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no record locks on Windows")
def test_a_folder_is_held_by_one_process_until_it_dies_however_it_does(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match=f"process {other.pid} on .* trains in it now"), alone_in(tmp_path):
            pass
        other.kill()
        other.wait()
        with alone_in(tmp_path), alone_in(tmp_path / "another"):
            assert (tmp_path / ".lock").read_text().startswith("process ")
        other.stdin.close()
