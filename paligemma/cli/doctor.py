"""`paligemma doctor`

paligemma doctor
paligemma doctor --json

Looks, changes nothing, and uses no network.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from paligemma.cli.args import add_output_options
from paligemma.cli.run import table
from paligemma.presets import EMBEDDED

# What stands behind each extra, where importing goes by another name than installing.
_IMPORT_NAMES = {"scikit-learn": "sklearn", "fonttools": "fontTools", "pillow": "PIL", "pytest-xdist": "xdist"}
_LICENCES = (
    ("this package, its embedded models and their picture", "Apache-2.0"),
    ("google/paligemma*, google/paligemma2*", "Gemma Terms of Use, https://ai.google.dev/gemma/terms"),
    ("bundled fonts", "free licences, beside them in paligemma/assets"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    print("\n\n".join(f"{title}\n{_lines(part)}" for title, part in report.items()))
    return 0


def examine() -> dict[str, dict[str, Any]]:
    """What this machine can do, as plain values under headings."""
    return {
        "versions": _versions(),
        "devices": _devices(),
        "attention": _attention(),
        "extras": _extras(),
        "weights": _weights(),
        "licences": dict(_LICENCES),
    }


def _versions() -> dict[str, Any]:
    import paligemma

    names = ("torch", "numpy", "pillow", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub")
    ours = {"paligemma": paligemma.__version__, "python": platform.python_version(), "system": platform.platform()}
    return ours | {name: importlib.metadata.version(name) for name in names}


def _devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "auto means": "cuda, bfloat16" if torch.cuda.is_available() else "cpu, float32",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use",
        "memory": _memory(),
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
    if torch.backends.mps.is_available():
        found["mps"] = "available; only used when asked for"
    return found


def _attention() -> dict[str, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    compiler = next((name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)), None)
    return {
        "without soft caps": "torch's fused attention",
        "with soft caps (PaliGemma 2)": "FlexAttention" if on_gpu else "plain attention, in blocks when long",
        "bfloat16 kernels on the CPU": _yes(_has_bfloat16()),
        "torch.compile": f"yes, with {compiler}" if compiler else "no: it needs a C++ compiler; everything else works",
    }  # fmt: skip


def _has_bfloat16() -> bool:
    import torch

    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]


def _extras() -> dict[str, Any]:
    """Each optional dependency group of the installed package: ready, or the command that completes it."""
    try:
        requires = importlib.metadata.requires("paligemma") or []
    except importlib.metadata.PackageNotFoundError:
        return {"unknown": "run from a source tree; `pip install -e .` makes extras known"}
    groups: dict[str, list[str]] = {}
    for line in requires:
        if match := re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line):
            groups.setdefault(match[2], []).append(match[1])
    report = {}
    for extra, packages in groups.items():
        missing = [p for p in packages if p != "paligemma" and not _is_installed(p)]
        report[extra] = f"missing {', '.join(missing)}: pip install 'paligemma[{extra}]'" if missing else "ready"
    return report


def _weights() -> dict[str, Any]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models = sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*paligemma*"))
    assets = Path(str(files("paligemma") / "assets"))
    sizes = {name: sum(f.stat().st_size for f in (assets / name).glob("*")) for name in EMBEDDED}
    return {
        **{
            name: f"embedded, {size / 1e6:.1f} MB" if size else "not in this installation"
            for name, size in sizes.items()
        },
        "hub cache": f"{cache}{'' if cache.is_dir() else ' (not there yet)'}",
        "in the cache": ", ".join(models) or "no PaliGemma yet",
        "offline": _yes(constants.HF_HUB_OFFLINE) + " (HF_HUB_OFFLINE)",
    }


def _lines(part: dict[str, Any]) -> str:
    rows = table([[name, str(value)] for name, value in part.items()]).splitlines()
    return "\n".join(f"  {row}" for row in rows)


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(_IMPORT_NAMES.get(package, package.replace("-", "_"))) is not None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):  # Windows
        return "unknown"
