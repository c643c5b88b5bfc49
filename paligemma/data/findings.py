"""What `check` finds in a data set: kinds of faults, counts with examples, the table that people read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS: dict[str, tuple[str, str]] = {  # kind -> "error" or "warning", what it means
    "unreadable row": ("error", "a row, file or annotation that cannot be read"),
    "not UTF-8": ("error", "text in another encoding"),
    "wrong column": ("error", "a column that is missing, misspelled or of the wrong type"),
    "missing picture": ("error", "a row names a file that is not there"),
    "path outside": ("error", "a row names a file outside of its folder"),
    "broken picture": ("error", "a picture that cannot be decoded, or has no pixels"),
    "another shape": ("error", "a picture whose sides are not as the annotations say: turned by EXIF, or replaced"),
    "no frames": ("error", "a video without a frame that can be decoded"),
    "cut archive": ("error", "a tar or Parquet file that ends in the middle, or is none"),
    "bad mask": ("error", "a run-length encoding of another size than the picture, or a polygon that is none"),
    "turned-over box": ("error", "right <= left or bottom <= top"),
    "box outside": ("error", "a box that lies outside of the picture altogether"),
    "bad label": ("error", "a label that a prompt cannot carry: it holds ; < > or a newline, or is empty"),
    "malformed suffix": ("error", "location or mask tokens that make no box or mask"),
    "duplicate id": ("error", "two rows of a split with one id"),
    "same picture in two splits": ("error", "what is held out was learned"),
    "file": ("error", "something about a whole file"),
    "turned by EXIF": ("warning", "a picture that is turned when it is opened, with boxes in it: are they turned too?"),
    "box over the edge": ("warning", "a box that reaches beyond the picture by more than a pixel; it is clipped"),
    "empty suffix": ("warning", "an answer of nothing, where the prompt asks for text"),
    "text too long": ("warning", "more tokens than the model will see; the end is cut"),
    "similar pictures in two splits": ("warning", "the same picture saved again, or nearly the same"),
    "same picture twice": ("warning", "one picture several times in a split, under different names"),
    "likely typo": ("warning", "a rare label that nearly is a frequent one"),
    "label only held out": ("warning", "a label that train never shows"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    split: str
    message: str

    @property
    def is_error(self) -> bool:
        return KINDS[self.kind][0] == "error"


@dataclass
class Findings:
    """Everything found.

    Attributes:
        n_rows, n_pictures: by split.
        found: in the order of the rows.
        labels: split -> label -> how many objects.
        tasks: split -> first word of the prompt -> rows.
    """

    n_rows: dict[str, int] = field(default_factory=dict)
    n_pictures: dict[str, int] = field(default_factory=dict)
    found: list[Finding] = field(default_factory=list)
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    tasks: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> how often, errors first, in the order of `KINDS`."""
        counted = Counter(finding.kind for finding in self.found)
        order = sorted(KINDS, key=lambda kind: KINDS[kind][0] != "error")
        return {kind: counted[kind] for kind in order if counted[kind]}

    @property
    def n_errors(self) -> int:
        return sum(finding.is_error for finding in self.found)

    def of(self, kind: str) -> list[Finding]:
        return [finding for finding in self.found if finding.kind == kind]

    def to_dict(self, n_examples: int = 5) -> dict[str, Any]:
        """JSON types; of every kind the first few messages."""
        return {
            "rows": self.n_rows,
            "pictures": self.n_pictures,
            "errors": self.n_errors,
            "findings": [
                {
                    "kind": kind, "level": KINDS[kind][0], "count": count,
                    "examples": [{"split": f.split, "message": f.message} for f in self.of(kind)[:n_examples]],
                }
                for kind, count in self.counts.items()
            ],
            "labels": {split: dict(counter.most_common()) for split, counter in self.labels.items()},
            "tasks": {split: dict(counter.most_common()) for split, counter in self.tasks.items()},
        }  # fmt: skip


def table_lines(findings: Findings, n_examples: int = 3) -> Sequence[str]:
    """What people read: rows, findings with their first examples, class balance."""
    lines = [f"{split}: {n:,} rows, {findings.n_pictures[split]:,} pictures" for split, n in findings.n_rows.items()]
    if not findings.found:
        lines.append("nothing found")
    for kind, count in findings.counts.items():
        level, meaning = KINDS[kind]
        lines += ["", f"{level}: {kind} × {count:,} ({meaning})"]
        for finding in findings.of(kind)[:n_examples]:
            lines.append(f"  {finding.split}: {finding.message}")
        if count > n_examples:
            lines.append(f"  … and {count - n_examples:,} more")
    lines += _balance(findings.labels, "label")
    lines += _balance(findings.tasks, "prompt")
    return lines


def _balance(by_split: Mapping[str, Counter[str]], what: str, n_shown: int = 12) -> list[str]:
    total: Counter[str] = sum(by_split.values(), Counter())
    if not total:
        return []
    names = [name for name, _ in total.most_common()]
    shown = names if len(names) <= n_shown + 2 else [*names[: n_shown - 3], *names[-3:]]
    width = max(len(what), *(len(repr(name)[1:-1]) for name in shown), 3)
    splits = list(by_split)
    columns = [max(len(split), 7) for split in splits]
    head = f"{what:<{width}}" + "".join(f"  {split:>{n}}" for split, n in zip(splits, columns, strict=True))
    rows = ["", head]
    for i, name in enumerate(shown):
        if len(shown) < len(names) and i == len(shown) - 3:
            rows.append(f"… {len(names) - len(shown)} more")
        cells = "".join(f"  {by_split[split][name]:>{n},}" for split, n in zip(splits, columns, strict=True))
        rows.append(f"{repr(name)[1:-1]:<{width}}{cells}")
    return rows
