"""Pages of studies: intervals, tables, pictures, and sentences that follow from the numbers alone."""

import argparse
import math
import statistics
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from helpers.pictures import QUICK, Sizes
from helpers.study import Results, describe

WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "studies"
BLUE, RED, GRAY, GREEN = "#1f4e8c", "#d1495b", "#8a8a8a", "#3a7d44"
COLOURS = (BLUE, RED, GREEN, GRAY)


def parser_of(doc: str | None, names: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of a script of studies."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default all")
    parser.set_defaults(known=tuple(names))
    parser.add_argument("--work", type=Path, help="stage 0, pictures, models (default: runs/studies)")
    parser.add_argument("--out", type=Path, help="folder of pages, pictures and results run by run (docs/studies)")
    parser.add_argument("--seeds", type=int, help="runs of everything; default as in the pages")
    parser.add_argument("--steps", type=int, default=Sizes.steps, help="of stage 1")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the arithmetic; 1 where another study runs beside")
    parser.add_argument("--quick", action="store_true", help="two steps of two pictures: does it run at all?")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """What a command line says, with `sizes` and `torch_device` that follow from it."""
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in args.known]
    if unknown:
        parser.error(f"there is no study {unknown[0]!r}: expected {', '.join(args.known)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:  # nothing of a trial may be taken for a run
        args.work = args.work or Path(tempfile.mkdtemp(prefix="studies-"))
        args.out = args.out or args.work / "pages"
    args.work, args.out = args.work or Path("runs/studies"), args.out or DOCS
    args.names = args.names or list(args.known)
    args.sizes = QUICK if args.quick else Sizes(steps=args.steps)
    args.torch_device = torch.device(args.device)
    args.lr_default = parser.get_default("lr")
    return args


def repeat(args: argparse.Namespace, script: str, name: str) -> str:
    """The command that gives the page again."""
    words = [f"python studies/{script} {name}"]
    if args.seeds is not None:
        words.append(f"--seeds {args.seeds}")
    if args.steps != Sizes.steps:
        words.append(f"--steps {args.steps}")
    if args.device != "cpu":
        words.append(f"--device {args.device}")
    if args.threads:  # the arithmetic of another number differs in its last digits
        words.append(f"--threads {args.threads}")
    if getattr(args, "lr", None) != args.lr_default:
        words.append(f"--lr {args.lr:g}")
    return " ".join(words)


def results_of(args: argparse.Namespace, name: str, about: dict[str, Any]) -> Results:
    """Runs that were made before; those of other sizes are refused.

    Args:
        about: the sizes; kept in the file under "_".
    """
    results = Results(args.out / f"{name}.json")
    if results.get("_", about) != about:
        raise SystemExit(
            f"{results.path}: holds runs of {results['_']}: expected {about}. Give another --out, or remove the file."
        )
    results["_"] = about
    return results


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; nan where there is one value alone."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def cell(values: Sequence[float], digits: int = 3) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def change(base: Sequence[float], other: Sequence[float], digits: int = 3) -> tuple[str, str]:
    """How other differs from base, seed by seed, and the words for it.

    Returns:
        "higher" or "lower"; "not seen" where the 95 % interval of the paired differences holds 0, which does not say
        that there is none; "unknown" with one seed.
    """
    mean, half = interval([b - a for a, b in zip(base, other, strict=True)])
    if math.isnan(half):
        return "unknown", f"{mean:+.{digits}f}, one seed: no interval"
    found = "not seen" if abs(mean) <= half else "higher" if mean > 0 else "lower"
    said = "no difference seen" if found == "not seen" else found
    return found, f"{mean:+.{digits}f} ± {half:.{digits}f}: {said}"


def verdict(found: str, reported: str, largest: str) -> str:
    """What a difference says about a report's.

    Args:
        found: as `change` says it.
        reported: "higher", "lower", "slightly lower", … or "the same".
        largest: the largest difference that the interval allows, towards the report's where that has a direction.
    """
    if found == "unknown":
        return "one seed decides nothing"
    if reported == "the same":
        return f"here at most {largest} either way" if found == "not seen" else "not what is seen here"
    if found == "not seen":
        return f"neither confirmed nor contradicted here, where {largest} {reported.split()[-1]} would be possible"
    return "as here" if found == reported.split()[-1] else "the opposite of what is seen here"


def compare(
    values: Mapping[str, Sequence[float]], bases: Mapping[str, str], reported: Mapping[str, str], what: str,
    source: str, *, digits: int = 3,
) -> str:  # fmt: skip
    """A line for each arm against its base, and what it says about the report.

    Args:
        bases: arm -> the arm that it is compared with.
        reported: arm -> "higher", "lower" or "the same" than its base in the report, where it has such an arm.
        what: is compared, such as "right answers"; source: of the report's results.
    """
    lines = []
    for arm, base in bases.items():
        found, words = change(values[base], values[arm], digits)
        line = f"- *{arm}* against *{base}*: {words}."
        if arm in reported:
            mean, half = interval([b - a for a, b in zip(values[base], values[arm], strict=True)])
            told = "no difference" if reported[arm] == "the same" else reported[arm]
            towards = {"higher": mean, "lower": -mean}.get(reported[arm].split()[-1], abs(mean))
            line += f" The report: {told}; {verdict(found, reported[arm], f'{towards + half:.{digits}f}')}."
        lines.append(line)
    intro = (
        f"{what[0].upper()}{what[1:]}, the same seeds paired, mean difference ± half its 95 % interval by Student's t"
        + (f" (the report: {source}):" if reported else ":")
    )
    return "\n\n".join([intro, "\n".join(lines)])


def page(out: Path, name: str, text: str) -> None:
    """Write a page, paragraphs wrapped; machine and versions stand at its end."""
    paragraphs = f"{text.strip()} {describe()}".split("\n\n")
    wrapped = [
        part if part[0] in "|#-!" else textwrap.fill(" ".join(part.split()), 120, **WHOLE) for part in paragraphs
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n\n".join(wrapped) + "\n")
    print("\n\n".join(wrapped))


def _axes(figure_height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, figure_height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    return figure, axes


def draw_arms(path: Path, values: Mapping[str, Sequence[float]], label: str, level: float | None = None) -> None:
    """Each run a point, the bar their mean; `level` is what no picture is needed for."""
    figure, axes = _axes(0.45 * len(values) + 1.2)
    for at, numbers in enumerate(values.values()):
        axes.plot(numbers, [at] * len(numbers), "o", color="#9db7d5", markersize=6)
        axes.plot([statistics.mean(numbers)] * 2, [at - 0.25, at + 0.25], color=BLUE, linewidth=2.5)
    if level is not None:
        axes.axvline(level, color=GRAY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.savefig(path, dpi=110)


def draw_curves(
    path: Path, curves: Mapping[str, Mapping[float, Sequence[float]]], x_label: str, y_label: str,
    levels: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """Means with their 95 % intervals over a logarithmic axis; dashed levels of the same names."""
    figure, axes = _axes(4.0)
    ticks = sorted({x for points in curves.values() for x in points})
    for (name, points), colour in zip(curves.items(), COLOURS * 3, strict=False):
        found = [interval(numbers) for numbers in points.values()]
        halves = [0.0 if math.isnan(half) else half for _, half in found]
        axes.errorbar(list(points), [m for m, _ in found], yerr=halves, fmt="o-", color=colour, capsize=3, label=name)
        if levels and name in levels:
            axes.axhline(levels[name], color=colour, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
