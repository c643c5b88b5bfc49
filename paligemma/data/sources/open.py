"""Any data set by its path: what format it is, and its splits.

    open_data("animals/")                      {"train": Coco, "valid": Coco}
    open_data("rows/", format="jsonl")         {"train": Jsonl}

A format is one line in `READERS`, and one in `SNIFFERS` for it to be found by content.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paligemma.data.sources.coco import coco_files, find_coco
from paligemma.data.sources.jsonl import SPLITS, find_splits
from paligemma.data.sources.packed import is_parquet, is_saved, is_tars, open_datasets, open_parquet, open_tars
from paligemma.data.sources.storage import is_address
from paligemma.data.sources.voc import find_voc
from paligemma.data.sources.yolo import find_yolo, yolo_file
from paligemma.errors import DataError, OptionError, nearest

Reader = Callable[..., Mapping[str, Any]]  # (path, **options) → split → source

_HEAD_BYTES = 64 * 1024
_WORDS = tuple(word for words in SPLITS.values() for word in words)
_JSONL = re.compile(rf"(?:_?annotations\.)?(?:{'|'.join(_WORDS)})\.jsonl")
_COCO_TABLES = re.compile(rb'"(?:images|annotations|categories|imgs|anns)"\s*:\s*[\[{]')


def _is_jsonl(path: Path) -> bool:
    if path.is_file():
        return path.suffix in (".jsonl", ".ndjson") or bool(re.match(rb'\s*\{[^\n]*"suffix"', _head(path)))
    if any(_JSONL.fullmatch(file.name) for base in (path, path / "dataset") for file in base.glob("*.jsonl")):
        return True
    return any(
        (base / word / name).is_file()
        for base in (path, path / "dataset")
        for word in _WORDS
        for name in ("_annotations.jsonl", "annotations.jsonl")
    )


def _is_coco(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".json" and bool(_COCO_TABLES.search(_head(path)))
    return bool(coco_files(path))


def _is_yolo(path: Path) -> bool:
    if path.is_file():
        return path.suffix in (".yaml", ".yml") and bool(re.search(rb"^['\"]?names['\"]?\s*:", _head(path), re.M))
    return yolo_file(path) is not None


def _is_voc(path: Path) -> bool:
    if not path.is_dir():
        return False
    places = ("Annotations", "VOC*/Annotations", "VOCdevkit/VOC*/Annotations", *_WORDS, "")
    folders = [folder for place in places for folder in (path.glob(place) if place else [path])]
    files = [file for folder in folders for file in _some(folder, "*.xml")]
    return any(b"<annotation" in _head(file) for file in files)


READERS: dict[str, Reader] = {
    "jsonl": find_splits,
    "coco": find_coco,
    "yolo": find_yolo,
    "voc": find_voc,
    "parquet": open_parquet,
    "wds": open_tars,
    "hf": open_datasets,
}
SNIFFERS: dict[str, Callable[[Path], bool]] = {
    "jsonl": _is_jsonl,
    "coco": _is_coco,
    "yolo": _is_yolo,
    "voc": _is_voc,
    "parquet": is_parquet,
    "wds": is_tars,
    "hf": is_saved,
}
_ADDRESSES = ("wds", "hf")  # formats whose data need not be a local path


def sniff(path: str | Path) -> str:
    """The format of a data set, by its content.

    Raises:
        DataError: nothing there, or nothing that is known.
        OptionError: several formats in one folder.
    """
    place = Path(path)
    if is_address(path) or (re.search(r"\{\d+\.\.\d+\}|\*", str(path)) and str(path).endswith(".tar")):
        return "wds"
    if not place.exists():
        raise DataError(
            f"{path}: no such file or folder: expected a data set. Check the path; a name on the hub needs format='hf'."
        )
    found = [name for name, is_it in SNIFFERS.items() if is_it(place)]
    if not found:
        raise DataError(
            f"{path}: no format that is known: expected one of {', '.join(SNIFFERS)}, such as train.jsonl, "
            "train/_annotations.coco.json, data.yaml or Annotations/*.xml. Say which with format=…"
        )
    if len(found) > 1:
        raise OptionError(f"{path} holds {' and '.join(found)}: expected to be told which. Say format='{found[0]}'.")
    return found[0]


def open_data(
    path: str | Path, *, format: str = "auto", failed: dict[str, DataError] | None = None, **options: Any
) -> dict[str, Any]:
    """The splits of a data set: sources of examples, or of records where annotations are no prompts yet.

    Args:
        format: one of `READERS`, or "auto" to look at the content.
        failed: takes splits that cannot be opened, where others can and the format tells them apart; None: an error.
        options: those of the format's reader, such as images, allow_outside, one_based; None is as not given.

    Raises:
        OptionError: an unknown format or option; the nearest is offered.
        DataError: nothing there, or nothing that can be read.
    """
    if format == "auto":
        format = sniff(path)
    if not isinstance(format, str) or format not in READERS:
        known = ["auto", *READERS]
        raise OptionError(f"format={format!r}: expected one of {', '.join(known)}.{nearest(str(format), known)}")
    reader = READERS[format]
    given = {name: value for name, value in options.items() if value is not None}
    parameters = inspect.signature(reader).parameters
    kept = {} if failed is None or "failed" not in parameters else {"failed": failed}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = [name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY and name != "failed"]
        given = {name: value for name, value in given.items() if value is not False or name in known}
        for name in given:
            if name not in known:
                raise OptionError(
                    f"{name}={given[name]!r}: format '{format}' has {', '.join(known) or 'no options'}: expected one "
                    f"of those.{nearest(name, known)}"
                )
    try:
        found = dict(reader(path, **given, **kept))
        if failed and not found:
            raise next(iter(failed.values()))
        return found
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise OptionError(f"format '{format}': {error}: expected options that it has. Leave it out.") from None


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): expected a data set. Check the path.") from None


def _some(folder: Path, pattern: str, n: int = 3) -> list[Path]:
    """A few files of a folder."""
    return [file for file, _ in zip(folder.glob(pattern), range(n), strict=False)] if folder.is_dir() else []
