"""How much memory a process holds for itself after it opened a source of many rows and read all over it."""

import subprocess
import sys
from pathlib import Path

import pytest

# The libraries are loaded and their own buffers filled by a small source before.
_MEASURE = """
import gc, sys
from paligemma.data.sources.{module} import {name}
def held():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Private"))
small, path, n = {name}(sys.argv[1]), sys.argv[2], int(sys.argv[3])
[small[i * (len(small) // 20)] for i in range(20)]
before = held()
source = {name}(path)
assert len(source) == n
[source[i * (n // 20)] for i in range(20)]
print(held() - before)
"""


def growth_bytes(name: str, module: str, small: Path, large: Path, n: int) -> int:
    """Bytes that a large source of n rows adds to a process that has read a small one.

    Args:
        name, module: the class of the source in `paligemma.data.sources`.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs /proc")
    code = _MEASURE.format(module=module, name=name)
    command = [sys.executable, "-c", code, str(small), str(large), str(n)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
