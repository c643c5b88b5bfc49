"""Data sets of Hugging Face `datasets`: by number from memory-mapped tables, or streamed in their own order.

    open_hub("user/name", split="train", columns=Columns(prefix="=caption en", suffix="text"))
    open_hub("saved_folder")                                    what save_to_disk wrote
    open_hub("imagefolder", data_dir="pictures")
    open_hub("user/name", streaming=True, shuffle_buffer=1000)  a stream: nothing is downloaded as a whole

Pictures are not decoded by `datasets`: our loader decodes them as the reference does.
"""

import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import Any

from paligemma.data.example import Example
from paligemma.data.sources.columns import Columns, in_folder, nowhere
from paligemma.data.sources.identity import picture_key, repeated_ids
from paligemma.errors import DataError, MissingExtra, OptionError, PaliGemmaError, nearest

CHUNK = 256  # rows that are looked through at a time


NO_SPLIT = "no such split"  # kind of the error
_ARCHIVES = ("zip", "tar", "gzip", "bz2", "lz4", "xz", "zstd")


class HubDataset:
    """Rows of a `datasets.Dataset`, random access; its tables stay on disk.

    Args:
        dataset: a Dataset, or a name or folder that `open_hub` would open, with its options.
        columns: which column holds what. A class label is its name.
        images: folder of pictures that rows name instead of holding them.
        allow_outside: let rows name any path and address.

    Raises:
        DataError: it cannot be opened, has no rows, or lacks a column. MissingExtra: without datasets.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        columns: Columns | None = None,
        split: str | None = None,
        images: str | Path | None = None,
        allow_outside: bool = False,
        **options: Any,
    ) -> None:
        self.name, loaded = _loaded(dataset, split, options, streaming=False)
        self.columns = columns or Columns()
        self.dataset, self._labels = _undecoded(loaded)
        self.columns.check(self.dataset.column_names, self.name)
        self.find = _Find(None if images is None else Path(images), allow_outside, _roots(dataset, options))
        if not len(self.dataset):
            raise DataError(f"{self.name}: no rows: expected at least one. Is this the right split?")

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, index: int) -> str:
        """How messages call a row; counted from 0."""
        return f"{self.name} row {index}"

    def row(self, index: int) -> dict[str, Any]:
        """A row, its pictures as `datasets` stores them: {bytes, path}.

        Raises:
            DataError: `datasets` cannot read it.
        """
        with _told(self.where(index)):
            row: dict[str, Any] = _named(self.dataset[index], self._labels)
            return row

    def __getitem__(self, index: int) -> Example:
        """The example of a row; pictures are not decoded.

        Raises:
            DataError: as `row`, or a value of the wrong kind.
        """
        index = range(len(self))[index]
        return self.columns.example(self.row(index), self.where(index), self.find)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Rows with an id that an earlier one has; only the columns of ids are read."""
        return repeated_ids(self._ids, self.where)

    def _ids(self) -> Iterator[tuple[int, str]]:
        for index, row in self._some(self.columns.id_names(self.dataset.column_names)):
            if (identity := self.columns.id_of(row)) is not None:
                yield index, identity

    def picture_keys(self) -> Iterator[Hashable]:
        """For every row what its pictures are told by; the columns of pictures are read through once."""
        named, n = self.columns.picture_names(), 0
        for index, row in self._some([name for name in self.dataset.column_names if name in named]):
            yield from repeat((), index - n)  # rows that cannot be read
            yield tuple(map(picture_key, self.columns.shown(row)))
            n = index + 1
        yield from repeat((), len(self) - n)

    def _some(self, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Some columns of every row."""
        with _told(self.name):
            chosen = self.dataset.select_columns(names)
            for start in range(0, len(self) if names else 0, CHUNK):
                columns = chosen[start : start + CHUNK]
                for index, values in enumerate(zip(*(columns[name] for name in names), strict=True), start):
                    yield index, dict(zip(names, values, strict=True))


class StreamSource:
    """Rows of a `datasets.IterableDataset` in its own order, by number as long as the numbers do not fall.

    One pass is kept open. A number ahead reads on, a number behind begins anew, which costs all rows before it. Every
    process that reads (ranks and workers) runs through the whole stream for itself.

    Args:
        n_examples: rows of a pass, where the data set does not say.
        shuffle_buffer: rows among which `datasets` picks the next; 0: its own order.
        seed: of that choice; every pass has another.
        columns, images, allow_outside: as for `HubDataset`.

    Attributes:
        is_sequential: the loader must not shuffle.

    Raises:
        DataError: it cannot be opened, or lacks a column. MissingExtra: without datasets.
    """

    is_sequential = True

    def __init__(
        self,
        dataset: Any,
        *,
        columns: Columns | None = None,
        split: str | None = None,
        n_examples: int | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
        images: str | Path | None = None,
        allow_outside: bool = False,
        **options: Any,
    ) -> None:
        if n_examples is not None and n_examples < 1:
            raise OptionError(f"n_examples={n_examples}: expected at least 1, or None.")
        if shuffle_buffer < 0:
            raise OptionError(f"shuffle_buffer={shuffle_buffer}: expected 0 or more rows.")
        self.name, loaded = _loaded(dataset, split, options, streaming=True)
        self.columns = columns or Columns()
        self.n_examples = n_examples
        stream, self._labels = _undecoded(loaded)
        if stream.column_names:
            self.columns.check(stream.column_names, self.name)
        self.stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else stream
        self.find = _Find(None if images is None else Path(images), allow_outside, _roots(dataset, options))
        self._rows: Iterator[Any] | None = None
        self._next, self._epoch, self._pid = 0, 0, 0
        self._last: tuple[int, dict[str, Any]] | None = None

    def __len__(self) -> int:
        """Rows of a pass.

        Raises:
            DataError: neither the data set nor the user says.
        """
        if self.n_examples is not None:
            return self.n_examples
        splits, name = self.stream.info.splits, str(self.stream.split)
        n = getattr(splits.get(name), "num_examples", None) if splits else None
        if not n:
            raise DataError(
                f"{self.name}: a stream that does not say how many rows it has: expected n_examples. Give it, such as "
                "n_examples=100000: a pass ends there."
            )
        return int(n)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_last": None}  # an open pass belongs to its process

    def where(self, index: int) -> str:
        """How messages call a row; counted from 0 in the order of the stream."""
        return f"{self.name} row {index} of the stream"

    def __getitem__(self, index: int) -> Example:
        """The example of a row of the first pass; cheap where numbers do not fall.

        Raises:
            DataError: the stream ends before, cannot be read, or a value is of the wrong kind.
        """
        return self.varied(index, 0)

    def varied(self, index: int, epoch: int) -> Example:
        """The example of a row of any pass; a shuffled stream has another order in each."""
        if index < 0:
            raise IndexError(f"row {index} of a stream: expected 0 or more.")
        return self.columns.example(self._row(index, epoch), self.where(index), self.find)

    def _row(self, index: int, epoch: int) -> dict[str, Any]:
        if self._pid != os.getpid() or epoch != self._epoch:  # after a fork both would read from one file
            self._rows, self._last = None, None
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        with _told(self.where(index)):
            if self._rows is None or index < self._next:  # a stream skips by reading, so reading on is never more
                rest = self.stream.skip(index)
                rest.set_epoch(epoch)
                # In batches: a plain iteration would give each reader of a torch DataLoader only some of the shards.
                self._rows = iter(rest.iter(batch_size=1))
                self._next, self._epoch, self._pid = index, epoch, os.getpid()
            while True:
                rows, self._rows = self._rows, None  # a generator that raised is at its end
                batch = next(rows, None)
                if batch is None:
                    raise DataError(
                        f"{self.where(index)}: the stream ended before it: expected {len(self)} rows. Give the number "
                        "that there are: n_examples=…."
                    )
                self._rows = rows
                self._next += 1
                if self._next > index:
                    break
            row: dict[str, Any] = _named({name: values[0] for name, values in batch.items()}, self._labels)
        self._last = (index, row)
        return row


def open_hub(dataset: Any, *, streaming: bool = False, **options: Any) -> HubDataset | StreamSource:
    """A data set of `datasets` as a source.

    Args:
        dataset: a Dataset or IterableDataset, a name on the hub, a folder, or the name of a format (imagefolder,
            parquet, json, webdataset) with data_files or data_dir.
        streaming: read in order instead of downloading first.
        options: of `HubDataset` or `StreamSource`, and of `datasets.load_dataset`: name, data_files, data_dir,
            revision, token.

    Raises:
        DataError: it cannot be opened. MissingExtra: without datasets.
    """
    if streaming or (hasattr(dataset, "iter") and not hasattr(dataset, "__len__")):
        return StreamSource(dataset, **options)
    return HubDataset(dataset, **options)


class _Find:
    """A picture that a row names: in the folder, or where `datasets` itself put it."""

    def __init__(self, folder: Path | None, allow_outside: bool, roots: tuple[Path, ...]) -> None:
        self.folder, self.allow_outside, self.roots = folder, allow_outside, roots

    def __call__(self, name: str, where: str) -> Any:
        if "://" in name:
            return self._fetched(name, where)
        if Path(name).is_absolute() and any(Path(name).resolve().is_relative_to(root) for root in self.roots):
            return in_folder(name, where, folder=Path(name).parent, allow_outside=True)
        if self.folder is None and not self.allow_outside:
            return nowhere(name, where)
        return in_folder(name, where, folder=self.folder or Path(), allow_outside=self.allow_outside)

    def _fetched(self, name: str, where: str) -> bytes:
        """Streams of folders of pictures name them by their address on the hub."""
        if not (self.allow_outside or _is_on_hub(name)):
            raise DataError(
                f"{where}: the picture {name} is an address: expected its bytes. Allow it: allow_outside=True."
            )
        from datasets.utils.file_utils import xopen

        with _told(where), xopen(name, "rb") as file:
            data: bytes = file.read()
        return data


def _is_on_hub(name: str) -> bool:
    """Whether an address leads to the hub, and on the way through nothing but archives.

    `datasets` opens "a.png::hf://…" as the local file a.png.
    """
    *inner, outer = name.split("::")
    return outer.startswith("hf://") and all(hop.partition("://")[0] in _ARCHIVES and "://" in hop for hop in inner)


def _loaded(dataset: Any, split: str | None, options: Mapping[str, Any], *, streaming: bool) -> tuple[str, Any]:
    """How messages call a data set, and the one split of it."""
    package = datasets_package()
    name = str(dataset) if isinstance(dataset, str | Path) else "the dataset"
    if isinstance(dataset, str | Path):
        with _told(name):
            folder = Path(dataset)
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                loaded = package.load_from_disk(str(folder))
            else:
                loaded = package.load_dataset(str(dataset), streaming=streaming, **options)
    else:
        loaded = dataset
        if options:
            raise OptionError(f"{', '.join(options)}: expected no such option for a dataset that is open already.")
    if isinstance(loaded, Mapping):
        loaded, split = _chosen(loaded, split, name), split or next(iter(loaded))
    elif split is not None and isinstance(dataset, str | Path) and str(loaded.split or split) != split:
        raise OptionError(f"split={split!r}: {name} holds {loaded.split}. Leave the split out.")
    is_stream = isinstance(loaded, package.IterableDataset)
    if streaming and not is_stream:
        loaded = loaded.to_iterable_dataset()
    elif is_stream and not streaming:
        raise OptionError(f"{name} is a stream: expected a dataset with rows by number. Say streaming=True.")
    shown = Path(name).name if isinstance(dataset, Path) or Path(name).is_dir() else name
    return (f"{shown} {split}" if split else shown), loaded


def _chosen(splits: Mapping[str, Any], split: str | None, name: str) -> Any:
    there = ", ".join(map(str, splits))
    if split is None and len(splits) > 1:
        raise DataError(f"{name} holds {there}: expected to be told which. Say split='{next(iter(splits))}'.")
    chosen = split or next(iter(splits))
    if chosen not in splits:
        told = f"{name}: no split {chosen!r}: there are {there}.{nearest(chosen, map(str, splits))}"
        raise DataError(told, kind=NO_SPLIT)
    return splits[chosen]


def _undecoded(dataset: Any) -> tuple[Any, dict[str, Any]]:
    """The data set with its pictures left as files, and what knows the names of its class labels."""
    package = datasets_package()
    features = dict(dataset.features or {})
    for name, feature in features.items():
        plain = _plain(feature, package)
        if plain is not feature:
            dataset = dataset.cast_column(name, plain)
    found = {name: _namer(feature, package) for name, feature in features.items()}
    return dataset, {name: namer for name, namer in found.items() if namer is not None}


def _plain(feature: Any, package: Any) -> Any:
    """A feature whose pictures are not decoded; itself where it has none."""
    if isinstance(feature, package.Image) and feature.decode:
        return package.Image(mode=feature.mode, decode=False)
    inner = getattr(feature, "feature", None)
    if isinstance(feature, package.List) and inner is not None and (plain := _plain(inner, package)) is not inner:
        return package.List(plain, length=feature.length)
    return feature


def _namer(feature: Any, package: Any) -> Callable[[Any], Any] | None:
    """What puts names in the place of class numbers, in lists and groups as well; None of a feature without any."""
    if isinstance(feature, package.ClassLabel):
        return partial(_name_of, feature)
    if isinstance(feature, dict):
        inner = {name: namer for name, one in feature.items() if (namer := _namer(one, package)) is not None}
        return partial(_named, labels=inner) if inner else None
    of_items = getattr(feature, "feature", None)  # of a list, whatever kind of list
    namer = None if of_items is None else _namer(of_items, package)
    return None if namer is None else partial(_each, namer)


def _name_of(label: Any, value: Any) -> Any:
    """The name of a class; None of -1, which says that nobody knows."""
    if value is None or isinstance(value, str):
        return value
    number = int(value)  # a data set with a format of its own gives numpy's or torch's
    return label.int2str(number) if number >= 0 else None


def _each(namer: Callable[[Any], Any], values: Any) -> Any:
    return values if values is None else [namer(value) for value in values]


def _named(row: Mapping[str, Any] | None, labels: Mapping[str, Callable[[Any], Any]]) -> Any:
    """A row or a group in it, with names of classes."""
    return row if row is None else {**row, **{name: namer(row[name]) for name, namer in labels.items() if name in row}}


def _roots(dataset: Any, options: Mapping[str, Any]) -> tuple[Path, ...]:
    """Folders whose pictures may be named absolutely: the user's own, and where `datasets` puts what it fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    roots = [datasets_package().config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    if isinstance(dataset, str | Path) and Path(dataset).is_dir():
        roots.append(dataset)
    if options.get("data_dir"):
        roots.append(options["data_dir"])
    return tuple(Path(root).expanduser().resolve() for root in roots)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """What `datasets` raises, in one line: it has errors of its own, of its file formats and of the network."""
    try:
        yield
    except PaliGemmaError:
        raise
    except Exception as error:
        cause = error.__cause__ or error.__context__ or error
        said = [line for line in (str(error).strip().splitlines() or [type(error).__name__]) if line.strip()]
        more = f"; {str(cause).strip().splitlines()[0][:120]}" if cause is not error and str(cause).strip() else ""
        raise DataError(
            f"{where}: `datasets` cannot read it ({said[0][:200]}{more}): expected a data set. Check name and files.",
            kind=NO_SPLIT if re.match("(Unknown|Bad) split", said[0]) else "unreadable row",
        ) from None


def datasets_package(what: str = "reading Hugging Face data sets") -> Any:
    """The package `datasets`; what is done with it, for the message.

    Raises:
        MissingExtra: not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "data", what) from None
    return datasets
