"""The one grammar of boxes: detection, segmentation and reading with boxes all write and parse it.

    <locYMIN><locXMIN><locYMAX><locXMAX>[ <seg>x16][ label] ; …

Parsing goes left to right: anything up to four location tokens in a row, optionally sixteen mask tokens, optionally a
label (the longest run without `;`, `<`, `>`), optionally a separator. White space between these does not matter, so the
unspaced form of the RefCOCO transfer parses too. What belongs to no object is kept as a leftover. One pass, linear in
the text, whatever the text. Source: the parser of the published demo.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paligemma.errors import TaskError

N_SEG = 16
SEPARATOR = " ; "
_LOC = r"<loc(?:0[0-9]{3}|10[01][0-9]|102[0-3])>"  # 0000…1023: others are no tokens, so they are text
_SEG = r"<seg(?:0[0-9]{2}|1[01][0-9]|12[0-7])>"  # 000…127
_LOC_CHARS, _SEG_CHARS = len("<loc0000>"), len("<seg000>")
# All that follows the location tokens is optional, so a match never fails half way and nothing is tried twice.
_OBJECT = re.compile(rf"(?P<locs>(?:{_LOC}){{4}})\s*(?P<segs>(?:{_SEG}){{{N_SEG}}})?\s*(?P<label>[^;<>]+)? ?(?:; )?")
_REFERRING = re.compile(rf"(?P<locs>(?:{_LOC}){{4}})(?P<segs>(?:{_SEG}){{{N_SEG}}})")
_FORBIDDEN = re.compile(r"[;<>\n]")
_ANY_LOC, _ANY_SEG = re.compile(r"<loc[0-9]{4}>"), re.compile(r"<seg[0-9]{3}>")

Bins = tuple[int, int, int, int]
Span = tuple[int, int]  # first character, one past the last


@dataclass(frozen=True)
class Entry:
    """One object as the text has it.

    Attributes:
        bins: ymin, xmin, ymax, xmax in 0…1023; not checked to be the right way round.
        codes: sixteen mask codes, or None.
        label: without outer white space; may be empty.
        box_span, label_span: where the location tokens and the label stand in the text.
    """

    bins: Bins
    codes: tuple[int, ...] | None
    label: str
    box_span: Span
    label_span: Span

    @property
    def has_area(self) -> bool:
        y1, x1, y2, x2 = self.bins
        return y2 > y1 and x2 > x1

    @property
    def score_span(self) -> Span:
        """The characters whose tokens score this object: its label, or its box where there is none."""
        return self.label_span if self.label else self.box_span


def parse_entries(text: str) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Objects in their order, and a sentence for every piece of text that belongs to none; never fails.

    Boxes without area are returned like others; `check_area` puts them into words.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    end = 0
    for found in _OBJECT.finditer(text):
        problems += _leftover(text[end : found.start()])
        entries.append(_entry(found))
        end = found.end()
    problems += _leftover(text[end:])
    return tuple(entries), tuple(problems)


def parse_referring(text: str) -> Entry | None:
    """The RefCOCO rule: exactly four location and sixteen mask tokens at the very start; what follows is ignored."""
    found = _REFERRING.match(text)
    return _entry(found) if found else None


def _entry(found: re.Match[str]) -> Entry:
    groups = found.groupdict()
    locs, segs, label = groups["locs"], groups["segs"], groups.get("label") or ""
    y1, x1, y2, x2 = (int(locs[i + 4 : i + 8]) for i in range(0, 4 * _LOC_CHARS, _LOC_CHARS))
    codes = tuple(int(segs[i + 4 : i + 7]) for i in range(0, N_SEG * _SEG_CHARS, _SEG_CHARS)) if segs else None
    first = found.start("label") + len(label) - len(label.lstrip()) if label else found.end()
    label = label.strip()
    return Entry((y1, x1, y2, x2), codes, label, found.span("locs"), (first, first + len(label)))


def _leftover(text: str) -> list[str]:
    """What is wrong with text outside of any object; a lone separator is nothing wrong."""
    text = text.strip()
    if text in ("", ";"):
        return []
    return stray_tokens(text) or [f"text that belongs to no box: {text!r}"]


def stray_tokens(text: str) -> list[str]:
    """A sentence about location or mask tokens in a text without objects, if it has any."""
    n_loc, n_seg = len(_ANY_LOC.findall(text)), len(_ANY_SEG.findall(text))
    if n_loc:
        return [f"{n_loc} location token(s) that do not make a box of four in 0000…1023: {text!r}"]
    if n_seg:
        return [f"{n_seg} mask token(s) that do not make a mask of sixteen in 000…127 after a box: {text!r}"]
    return []


def check_area(text: str, entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """The objects whose boxes have area, and a sentence for each of the others."""
    problems = [
        f"a box without area (expected ymin < ymax and xmin < xmax): {_quote(text, entry)}"
        for entry in entries
        if not entry.has_area
    ]
    return [entry for entry in entries if entry.has_area], problems


def _quote(text: str, entry: Entry) -> str:
    return repr(text[entry.box_span[0] : max(entry.box_span[1], entry.label_span[1] if entry.label else 0)])


def format_entries(entries: Iterable[tuple[str, Sequence[int] | None, str]], *, spaced: bool = True) -> str:
    """(location tokens, mask codes or None, label) of each object -> the text a model should answer.

    Args:
        spaced: one space before the mask tokens, as the mix models answer; False writes the RefCOCO form.
    """
    gap = " " if spaced else ""
    texts = []
    for locs, codes, label in entries:
        segs = gap + "".join(f"<seg{code:03d}>" for code in codes) if codes is not None else ""
        texts.append(locs + segs + (f" {label}" if label else ""))
    return SEPARATOR.join(texts)


def check_label(label: str, what: str = "label", *, may_be_empty: bool = False) -> str:
    """The label itself, if the grammar can carry it.

    Raises:
        TaskError: it holds `;`, `<`, `>` or a newline, has outer white space, or is empty where a word is needed.
    """
    if not isinstance(label, str):
        raise TaskError(f"{what} {label!r} is of type {type(label).__name__}: expected text.")
    found = _FORBIDDEN.search(label)
    if found:
        raise TaskError(
            f"{what} {label!r} holds {found.group()!r}: expected text without ';', '<', '>' and newlines, which "
            "separate objects. Rename it, or give several labels as a list."
        )
    if label != label.strip():
        raise TaskError(
            f"{what} {label!r} begins or ends with white space: it would be lost in parsing. Strip it first."
        )
    if not label and not may_be_empty:
        raise TaskError(f"an empty {what}: expected a word or more.")
    return label


def check_labels(things: str | Iterable[str], what: str = "thing") -> str:
    """One thing or several -> `a ; b ; c` as prompts have it.

    Raises:
        TaskError: none at all, or one that `check_label` refuses.
    """
    names = [things] if isinstance(things, str) else list(things)
    if not names:
        raise TaskError(f"no {what} to look for: expected one or more names.")
    return SEPARATOR.join(check_label(name, what) for name in names)
