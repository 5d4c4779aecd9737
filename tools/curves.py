"""Draws curves of several runs in one picture (SVG, PNG or PDF) and prints the last and lowest value of each.

    python -m tools.curves runs/a runs/b --y val_loss --out curves.svg
    python -m tools.curves runs/a train.log --x tokens --y loss --mean-of 20 --limits 4:7 --out curves.svg

A RUN is a run directory (any number in its metrics.jsonl can be drawn) or a log that `tools.spikes scan` reads. A dotted line
shows where a run went on from a checkpoint, and what changed there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from recipes.common.run_dir.differences import describe_changes
from tools.common.console import GOOD, UsageError, exit_code, machine_words, table, tell_notes
from tools.common.logs.run_numbers import Table, read_numbers
from tools.common.run_record import open_record, segment_changes

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")  # Okabe and Ito's
MARKED = 40  # lines of fewer points show each point
LETTERS = 95  # of the key's smallest font that one row of it holds
MOST_WORDS, LONGEST_MARK = 8, 64  # segments that say what changed, and letters of that
STYLE = {
    "svg.hashsalt": "curves",  # the same runs give the same file
    "svg.fonttype": "none",  # text stays text
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": "#8d96a6",
    "axes.labelcolor": "#24292f",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e1e5ea",
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Line:
    name: str
    x: np.ndarray  # [n], rising
    y: np.ndarray  # [n]
    marks: tuple[tuple[float, str], ...] = ()  # (x, what changed there) of each segment after the first


def main(argv: list[str] | None = None) -> int:
    flags = _parse_flags(argv)
    return exit_code(lambda: _run(flags))


def _run(flags: argparse.Namespace) -> int:
    limits = _limits(flags.limits, flags.log)
    if flags.mean_of < 1:
        raise UsageError(f"--mean-of={flags.mean_of} must be at least 1")
    lines = [read_line(source, flags.x, flags.y, flags.mean_of) for source in flags.runs]
    if flags.log:
        lines = [_positive(line, flags.y) for line in lines]
    y_name = flags.y + (f", mean of {flags.mean_of}" if flags.mean_of > 1 else "")
    try:
        draw(lines, flags.out, x_name=flags.x, y_name=y_name, limits=limits, log=flags.log)
    except (OSError, ValueError) as error:  # ValueError: matplotlib does not write files of this suffix
        raise UsageError(f"--out={flags.out}: {machine_words(error) or error}") from None
    rows = [
        [line.name, len(line.y), f"{line.y[-1]:.4g}", f"{line.y.min():.4g}", f"{line.x[line.y.argmin()]:.10g}"] for line in lines
    ]
    if flags.json:
        runs = [{"run": line.name, "x": line.x.tolist(), "y": line.y.tolist(), "segments": line.marks} for line in lines]
        print(json.dumps({"picture": str(flags.out), "runs": runs}))
    else:
        print(table(rows, ["run", "points", f"last {flags.y}", "lowest", f"at {flags.x}"]))
        print(flags.out)
    return GOOD


def draw(
    lines: Sequence[Line], out: Path, *, x_name: str, y_name: str, limits: tuple[float, float] | None = None, log: bool = False
) -> None:
    """Write the picture in the format of the suffix of `out`. `limits` of y clips what lies outside (default: all)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.6), dpi=100, layout="constrained")
        axes = figure.add_subplot(xlabel=x_name, ylabel=y_name, yscale="log" if log else "linear")
        axes.set_prop_cycle(color=COLORS)
        drawn = [axes.plot(line.x, line.y, marker="o" if len(line.x) < MARKED else "")[0] for line in lines]
        mark_segments(axes, [(line.marks, curve.get_color()) for line, curve in zip(lines, drawn, strict=True)])
        axes.set_ylim(limits)
        axes.margins(x=0.01)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.get_major_locator().set_params(integer=True)
        names = [line.name for line in lines]
        columns = max(1, LETTERS // (max(map(len, names)) + 8))
        key = figure.legend(drawn, names, loc="outside upper left", ncols=columns, frameon=False)
        for handle, text in zip(key.legend_handles, key.get_texts(), strict=True):
            handle.set_linewidth(2.5)
            text.set_parse_math(False)  # a run's name may hold a "$"
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def mark_segments(axes: Axes, marks: Sequence[tuple[Sequence[tuple[float, str]], str]]) -> None:
    """Draw a dotted line where each segment begins, in the colour of its run, and say beside it what changed.

    marks: of each run, with its colour. Where there are many, only those that something changed at have words.
    """
    told = [(x, text, color) for of_run, color in marks for x, text in of_run]
    for x, _, color in told:
        axes.axvline(x, color=color, linestyle=":", linewidth=0.8)
    worded = [mark for mark in told if mark[1]][:MOST_WORDS]
    for row, (x, text, _) in enumerate(worded):
        shown = text if len(text) <= LONGEST_MARK else f"{text[: LONGEST_MARK - 3]}..."
        low, high = axes.get_xlim()
        left = x > (low + high) / 2
        side = {"ha": "right" if left else "left", "va": "bottom", "xycoords": ("data", "axes fraction"), "clip_on": True}
        words = axes.annotate(f" {shown} ", (x, 0.01 + 0.055 * row), fontsize=6.5, color="#57606a", **side)
        words.set_parse_math(False)


def segment_marks(source: Path, place: Callable[[int], float | None]) -> tuple[tuple[float, str], ...]:
    """Return where each segment of a run after the first begins, and what changed there. place: of a step on the axis."""
    if not source.is_dir():
        return ()
    found = []
    for segment, differences in segment_changes(open_record(str(source)))[1:]:
        x, changes = place(segment.step), describe_changes(differences)
        if x is not None:
            found.append((x, f"{segment.cause}: {changes}" if changes else ""))
    return tuple(found)


def read_line(source: Path, x: str, y: str, mean_of: int) -> Line:
    """Return column `y` of a run over `x`, each point the mean of the last `mean_of` known values. Raises UsageError."""
    if not source.exists():
        raise UsageError(f"{source}: no such run directory or log")
    numbers = read_numbers(source)
    tell_notes(numbers.notes)
    columns = numbers.table
    if y not in columns:
        raise UsageError(f"--y={y}: {source} has no such column; it has {', '.join(sorted(set(columns) - {'step'}))}")
    positions, known = _positions(source, columns, x), np.isfinite(columns[y])
    values = columns[y][known]
    if len(values) < mean_of:
        raise UsageError(f"--mean-of={mean_of}: {source} has {len(values)} values of {y}")
    means = np.convolve(values, np.full(mean_of, 1 / mean_of), "valid")
    drawn = positions[known][mean_of - 1 :]

    def place(step: int) -> float | None:
        at = np.flatnonzero(columns["step"] <= step)
        x = positions[at[-1]] if len(at) else math.nan
        return float(x) if drawn[0] <= x <= drawn[-1] else None

    return Line(source.resolve().name, drawn, means, segment_marks(source, place))


def _positive(line: Line, y: str) -> Line:
    """Drop values <= 0, with a warning: a logarithmic axis cannot show them."""
    kept = line.y > 0
    if not kept.any():
        raise UsageError(f"--log: no {y} of {line.name} is over 0; leave --log out")
    if not kept.all():
        print(f"{line.name}: {(~kept).sum()} of {len(kept)} values are 0 or less and not drawn", file=sys.stderr)
    return Line(line.name, line.x[kept], line.y[kept], line.marks)


def _positions(source: Path, columns: Table, x: str) -> np.ndarray:
    if x == "step":
        return columns["step"].astype(float)
    if "consumed_tokens" not in columns:
        raise UsageError(f"--x=tokens: {source} does not record its tokens; use --x step")
    return np.where(columns["step"] == 0, 0.0, columns["consumed_tokens"])  # the evaluation before the first step


def _limits(text: str | None, log: bool) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low, high = 0.0, 0.0
    if not low < high or (log and low <= 0):
        raise UsageError(f"--limits={text}: write LOW:HIGH with LOW < HIGH{', over 0 with --log' if log else ''}, like 4:7")
    return low, high


def _parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.curves", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory, or a log")
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="(default: %(default)s)")
    parser.add_argument("--y", default="loss", metavar="COLUMN", help="a number of metrics.jsonl (default: %(default)s)")
    parser.add_argument("--mean-of", type=int, default=1, metavar="N", help="draw the mean of the last N values (default: 1)")
    parser.add_argument("--limits", metavar="LOW:HIGH", help="limits of y (default: all of it)")
    parser.add_argument("--log", action="store_true", help="y on a logarithmic scale")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture to write: .svg, .png or .pdf")
    parser.add_argument("--json", action="store_true", help="print the curves as one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
