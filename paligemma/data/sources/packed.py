"""Parquet, tars and Hugging Face datasets as data sets of a folder: read by split, written by split."""

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paligemma.data.example import Example
from paligemma.data.sources.coco_write import is_json
from paligemma.data.sources.columns import Columns
from paligemma.data.sources.folder import refuse_existing
from paligemma.data.sources.hub import NO_SPLIT, datasets_package, open_hub
from paligemma.data.sources.jsonl import SPLITS
from paligemma.data.sources.parquet import Parquet, files_inside, find_parquet, split_of, write_parquet
from paligemma.data.sources.tars import OURS, Tars, find_tars, write_tars
from paligemma.errors import DataError, OptionError


def open_parquet(
    path: str | Path, *, columns: Any = None, images: str | Path | None = None, allow_outside: bool = False,
    failed: dict[str, DataError] | None = None,
) -> Mapping[str, Parquet]:  # fmt: skip
    """The splits of a folder of Parquet files; columns is a `Columns`, or its fields as a mapping."""
    own = {"columns": columns_of(columns), "images": images, "allow_outside": allow_outside}
    return find_parquet(path, failed=failed, **own)


def open_tars(
    path: str | Path, *, columns: Any = None, failed: dict[str, DataError] | None = None
) -> Mapping[str, Tars]:
    """The splits of a folder of tars, or of a pattern or an address."""
    return find_tars(path, columns=columns_of(columns), failed=failed)


def open_datasets(
    path: str | Path,
    *,
    columns: Any = None,
    streaming: bool = False,
    split: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    images: str | Path | None = None,
    n_examples: int | Mapping[str, int] | None = None,
    shuffle_buffer: int | None = None,
    shuffle_seed: int = 0,
    allow_outside: bool = False,
) -> Mapping[str, Any]:
    """The splits of a data set of `datasets`: a saved folder, or a name on the hub.

    Args:
        split: only this one; else those of train, valid and test that there are.
        n_examples: rows of a pass of a stream that does not say them: of train, or by split.
        name: of the configuration; shuffle_seed: of a stream's buffer; the others as in `open_hub`.
    """
    given: dict[str, Any] = {"columns": columns_of(columns), "images": images, "allow_outside": allow_outside}
    given |= {
        key: said for key, said in (("name", name), ("data_dir", data_dir), ("revision", revision)) if said is not None
    }
    if streaming:
        given |= {"shuffle_buffer": shuffle_buffer or 0, "seed": shuffle_seed}

    def opened(word: str, ours: str, *, is_only: bool = False) -> Any:
        sizes = n_examples if isinstance(n_examples, Mapping) else {"train": n_examples}
        n = n_examples if is_only and isinstance(n_examples, int) else sizes.get(ours)
        own = {"n_examples": n} if streaming else {}
        return open_hub(str(path), split=word, streaming=streaming, **given, **own)

    if split is not None:
        ours = split_of(split) or split
        return {ours: opened(split, ours, is_only=True)}
    found: dict[str, Any] = {}
    first: DataError | None = None
    for ours, words in SPLITS.items():
        for word in words:
            try:
                found[ours] = opened(word, ours)
                break
            except DataError as error:
                if error.kind != NO_SPLIT:
                    raise
                first = first or error
    if not found:
        raise first or DataError(f"{path}: no split: expected train, valid or test.")
    return found


def columns_of(given: Any) -> Columns:
    """A `Columns` from what a user writes: None, a `Columns`, a mapping of its fields, or (name, value) pairs."""
    if given is None or isinstance(given, Columns):
        return given or Columns()
    try:
        return Columns(**dict(given))
    except OptionError:
        raise
    except (TypeError, ValueError):
        known = [field.name for field in dataclasses.fields(Columns)]
        told = f"columns={given!r}: expected a mapping with {', '.join(known)}, such as {{suffix: caption}}."
        raise OptionError(told) from None


def write_parquet_split(
    examples: Iterable[Example],
    folder: str | Path,
    *,
    split: str = "train",
    overwrite: bool = False,
    left_out: Counter[str] | None = None,
) -> Path:
    """{split}.parquet in a folder."""
    path = Path(folder) / f"{split}.parquet"
    refuse_existing(split, path, overwrite=overwrite)
    write_parquet(_told(examples, left_out), path)
    return path


def write_tar_split(
    examples: Iterable[Example],
    folder: str | Path,
    *,
    split: str = "train",
    overwrite: bool = False,
    left_out: Counter[str] | None = None,
) -> Path:
    """{split}-000000.tar and so on in a folder; returns the first."""
    before = sorted(Path(folder).glob(f"{split}-*.tar"))
    refuse_existing(split, *before[:1], overwrite=overwrite)
    written = write_tars(_told(examples, left_out, OURS), folder, name=split)
    for stale in set(before) - set(written):  # of a longer split that was replaced
        stale.unlink()
    return written[0]


def write_saved_split(
    examples: Iterable[Example],
    folder: str | Path,
    *,
    split: str = "train",
    overwrite: bool = False,
    left_out: Counter[str] | None = None,
) -> Path:
    """A split of a folder as `DatasetDict.save_to_disk` writes it, beside those that are there.

    Raises:
        MissingExtra: without datasets.
    """
    package, target = datasets_package("writing Hugging Face data sets"), Path(folder) / split
    # A folder of that name that was not written so holds something else, pictures perhaps: it is never replaced.
    refuse_existing(split, target, overwrite=overwrite and is_saved(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as scratch:
        table, saved = Path(scratch) / "rows.parquet", Path(scratch) / "saved"
        write_parquet(_told(examples, left_out), table)
        # Without a cache of its own, an equal name would bring back the rows of another table.
        package.Dataset.from_parquet(str(table), cache_dir=str(Path(scratch) / "cache")).save_to_disk(str(saved))
        if target.exists():
            target.rename(Path(scratch) / "before")
        saved.rename(target)
        listed = Path(scratch) / "dataset_dict.json"
        listed.write_text(json.dumps({"splits": [name for name in SPLITS if is_saved(target.parent / name)]}))
        listed.replace(target.parent / listed.name)
    return target


def _told(examples: Iterable[Example], left_out: Counter[str] | None, taken: Sequence[str] = ()) -> Iterator[Example]:
    """The examples; what of their meta is written as text, since JSON has nothing like it, is counted.

    Args:
        taken: names that the format has for itself: fields of meta that are called so are not written.
    """
    for example in examples:
        if left_out is not None:
            left_out.update(f"meta '{key}'" for key in example.meta if key in taken)
            left_out.update(f"meta '{key}' but for its text" for key, it in example.meta.items() if not is_json(it))
        yield example


def is_parquet(path: Path) -> bool:
    """Whether a path is a Parquet file or a folder of them."""
    if path.is_file():
        return path.suffix == ".parquet"
    return _holds(path, ".parquet")


def is_tars(path: Path) -> bool:
    """Whether a path is a tar or a folder of them."""
    if path.is_file():
        return path.suffix == ".tar"
    return _holds(path, ".tar")


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`."""
    return path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _holds(path: Path, suffix: str) -> bool:
    if not path.is_dir() or is_saved(path):
        return False
    return next(files_inside(path, suffix), None) is not None
