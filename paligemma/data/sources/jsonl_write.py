"""Examples to JSONL with their pictures beside them: the flat layout of Roboflow's export."""

import filecmp
import json
import os
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from paligemma.data.builders.base import RECORD_ID
from paligemma.data.example import Example
from paligemma.data.sources.coco_write import is_json
from paligemma.data.sources.folder import Names, open_text, refuse_existing, replaced, save_picture, split_name
from paligemma.data.sources.identity import content_of
from paligemma.data.sources.jsonl import COLUMNS
from paligemma.errors import DataError

_TAKEN = (*COLUMNS, "images", "unlearned")


def write_jsonl(
    examples: Iterable[Example],
    folder: str | Path,
    split: str = "train",
    *,
    overwrite: bool = False,
    left_out: Counter[str] | None = None,
) -> Path:
    """Write _annotations.{split}.jsonl and the pictures beside it; files are copied, pixels become PNG.

    A picture that several examples name is written once. A file that is there already is never replaced: one of the
    same content is used, beside any other the new picture gets a name of its own.

    Args:
        overwrite: replace the rows of this split where they are there already.
        left_out: counts what JSON cannot carry.

    Returns:
        The JSONL file.

    Raises:
        OptionError: the split is there already, or an unknown split.
        DataError: a picture that cannot be read, or no examples.
    """
    folder, split = Path(folder), split_name(split)
    left_out = Counter() if left_out is None else left_out
    file = folder / f"_annotations.{split}.jsonl"
    refuse_existing(split, file, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    names = Names([file.name])
    written: dict[Hashable, str] = {}
    n = 0
    with replaced(file) as part, open_text(part) as out:
        for example in examples:
            images = [_saved(image, example, folder, names, written) for image in example.images]
            image = images[0] if len(images) == 1 else images or None
            row: dict[str, Any] = {"image": image, "prefix": example.prefix, "suffix": example.suffix}
            if example.weight != 1:
                row["weight"] = example.weight
            if example.unlearned:
                row["unlearned"] = [list(stretch) for stretch in example.unlearned]
            for key, value in example.meta.items():
                if key in _TAKEN or not is_json(value):
                    left_out[f"meta '{key}'"] += 1
                else:
                    row[key] = value
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            n += 1
        if not n:
            raise DataError(f"no examples for {file}: expected at least one.")
    return file


def _saved(image: Any, example: Example, folder: Path, names: Names, written: dict[Hashable, str]) -> str:
    """The name of the picture in the folder."""
    source = content_of(Path(image).absolute() if isinstance(image, str | Path) else image)
    if source in written:
        return written[source]
    called = str(example.meta.get(RECORD_ID, example.meta.get("id", "")))
    part = folder / f".picture.{os.getpid()}.part"
    try:
        save_picture(image, part, example.where)
        while True:
            name = names.of(image, called)
            there = folder / name
            if not there.exists():
                part.replace(there)
                break
            if there.is_file() and filecmp.cmp(part, there, shallow=False):
                break
    finally:
        part.unlink(missing_ok=True)
    written[source] = name
    return name
