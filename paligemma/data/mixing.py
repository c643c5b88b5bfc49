"""A mixture as a YAML file: which sources, how often each, what becomes of them.

    sources:
      animals: {data: animals-coco/, task: detect, weight: 3}
      captions: {data: captions/train.jsonl, weight: 1, limit: 100000}
    temperature: 1.0          # weights to the power 1 / temperature
    exhaustion: repeat        # repeat, drop or stop (data/mixture.py)

Every source is opened as `open_data` does it, and takes its options (format, images, columns, …); `task` and
`task_fields` name the builder of annotations. Paths are relative to the file.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from paligemma.data.builders import BUILDERS
from paligemma.data.mixture import Mixture, Part
from paligemma.errors import DataError, OptionError, nearest

Open = Callable[..., dict[str, Any]]  # (data=…, task=…, task_fields=…, **options) -> split -> rows
FIELDS = ("sources", "temperature", "exhaustion", "seed")
_OWN = ("weight", "limit")
_OF_THE_RUN = (  # what `open_rows` takes and a source cannot have of its own
    "augmentation", "mask_encoder", "mask_decoder", "load", "text_length", "reweight", "keep_all", "failed",
)  # fmt: skip


def is_mixture(path: str | Path) -> bool:
    """Whether a path is such a file; YOLO's data.yaml is another kind of YAML."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(tree, dict) and "sources" in tree


def read_mixture(
    path: str | Path, open_source: Open, *, seed: int = 0, shuffle: bool = True,
    reweight: Sequence[tuple[str, float]] = (), task: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The splits of a mixture: "train" is the `Mixture`; other splits are those of its sources, one after another.

    Args:
        open_source: opens one source.
        reweight: (name or task, factor) pairs: by how much a source's share grows before all are made to sum to 1. Its
            name counts before its tasks; of several tasks, which are asked alike, the factors are averaged.
        task: of sources that name none.

    Raises:
        DataError: not such a file, or a field that it does not have.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _OneOfEach)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: no mixture ({' '.join(str(error).split())[:160]}): expected YAML.") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("sources"), dict) or not tree["sources"]:
        raise DataError(f"{path}: expected `sources:` with a name, `data:` and `weight:` for each.")
    for key in tree:
        if key not in FIELDS:
            raise DataError(f"{path}: there is no field '{key}': expected {', '.join(FIELDS)}.{nearest(key, FIELDS)}")
    parts: dict[str, Part] = {}
    others: dict[str, list[Any]] = {}
    for name, given in tree["sources"].items():
        options = _options(given, f"{path}: source '{name}'")
        own = {key: options.pop(key) for key in _OWN if key in options}
        for key in options:  # others are the reader's, which knows them
            if meant := difflib.get_close_matches(key, _OWN, n=1, cutoff=0.75):
                raise DataError(f"{path}: source '{name}' has no '{key}'. Did you mean '{meant[0]}'?")
            if key in _OF_THE_RUN:
                raise DataError(
                    f"{path}: source '{name}' has '{key}', which is one for all: expected none. Leave it out here, and "
                    "give it to the run."
                )
        factor = _factor(str(name), options.get("task") or task, reweight)
        splits = open_source(data=_place(path.parent, options.pop("data"), options), **options)
        if "train" not in splits:
            raise DataError(f"{path}: source '{name}' has no train split: expected one beside {', '.join(splits)}.")
        parts[str(name)] = Part(source=splits.pop("train"), factor=factor, **own)
        for split, rows in splits.items():
            others.setdefault(split, []).append(rows)
    _check_reweighting(reweight, parts)
    seed = tree.get("seed", seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise DataError(f"{path}: seed: {seed!r}: expected a whole number of 0 or more.")
    rules = {key: tree[key] for key in ("temperature", "exhaustion") if key in tree}
    mixture = Mixture(parts, seed=seed, shuffle=shuffle, **rules)
    return {"train": mixture, **{split: Chain(rows) for split, rows in others.items()}}


class Chain:
    """Sources one after another."""

    def __init__(self, sources: list[Any]) -> None:
        self.sources = sources
        self.ends = [sum(len(source) for source in sources[: i + 1]) for i in range(len(sources))]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def at(self, index: int) -> tuple[Any, int]:
        """The source of a row, and its number there."""
        part = next(i for i, end in enumerate(self.ends) if range(len(self))[index] < end)
        return self.sources[part], index - (self.ends[part - 1] if part else 0)

    def where(self, index: int) -> str:
        """How messages call a row."""
        source, row = self.at(index)
        told: str = source.where(row)
        return told

    def __getitem__(self, index: int) -> Any:
        source, row = self.at(index)
        return source[row]


class _OneOfEach(yaml.SafeLoader):  # type: ignore[misc]
    """YAML whose mappings name everything once: the second of two sources of one name would replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' stands there twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _factor(name: str, task: str | None, reweight: Sequence[tuple[str, float]]) -> float:
    """By how much the share of a source grows."""
    factors = dict(reweight)
    if name in factors or not task:
        return float(factors.get(name, 1.0))
    tasks = [word.strip() for word in task.split(",")]
    return sum(factors.get(word, 1.0) for word in tasks) / len(tasks)


def _check_reweighting(reweight: Sequence[tuple[str, float]], parts: Mapping[str, Part]) -> None:
    """Tasks that no source has are passed over, since stages bring their own list; words that are no task are not.

    Raises:
        OptionError: neither a task nor the name of a source, or a factor that is none.
    """
    known = [*parts, *BUILDERS]
    for wanted, factor in reweight:
        if wanted not in known:
            hint = nearest(wanted, known)
            raise OptionError(f"reweight: no source or task {wanted!r}: expected one of {', '.join(known)}.{hint}")
        if not 0 < factor < float("inf"):
            raise OptionError(f"reweight: {wanted} has {factor}: expected a number above 0.")


def _place(folder: Path, data: str, options: Mapping[str, Any]) -> str:
    """Where a source lies: an address as it is, a path from the folder of the mixture, a name on the hub as it is."""
    if "://" in data or Path(data).is_absolute():
        return data
    here = folder / data
    return data if options.get("format") == "hf" and not here.exists() else str(here)


def _options(given: Any, where: str) -> dict[str, Any]:
    if isinstance(given, str):
        return {"data": given}
    if not isinstance(given, Mapping) or not isinstance(given.get("data"), str):
        raise DataError(f"{where}: expected `data:` with a path, and `weight:`.")
    return dict(given)
