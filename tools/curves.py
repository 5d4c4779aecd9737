"""Curves of several runs in one picture: a small SVG file, and the numbers at the end of each.

    python -m tools.curves runs/a runs/b --y val_loss --out curves.svg
    python -m tools.curves runs/a train.log --x tokens --y loss --mean-of 20 --limits 4:7 --out curves.svg

A RUN is a run directory, or a log that `tools.spikes scan` reads. Of a run directory any number of metrics.jsonl can be drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from tools.common.console import GOOD, UsageError, exit_code, table
from tools.common.logs.run_numbers import Table, read_numbers
from tools.common.svg_chart import Line, chart

X_NAMES = {"step": "step", "tokens": "tokens"}


def main(argv: list[str] | None = None) -> int:
    flags = _parse_flags(argv)
    return exit_code(lambda: _run(flags))


def _run(flags: argparse.Namespace) -> int:
    limits = _limits(flags.limits, flags.log)
    if flags.mean_of < 1:
        raise UsageError(f"--mean-of={flags.mean_of} must be at least 1")
    lines = [read_line(source, flags.x, flags.y, flags.mean_of) for source in flags.runs]
    if flags.log:
        lines = [_over_zero(line, flags.y) for line in lines]
    y_name = flags.y + (f", mean of {flags.mean_of}" if flags.mean_of > 1 else "")
    text = chart(lines, x_name=X_NAMES[flags.x], y_name=y_name, limits=limits, log=flags.log)
    try:
        flags.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out={flags.out}: {error}") from None
    rows = [
        [line.name, len(line.y), f"{line.y[-1]:.4g}", f"{line.y.min():.4g}", f"{line.x[line.y.argmin()]:.10g}"] for line in lines
    ]
    if flags.json:
        runs = [{"run": line.name, "x": line.x.tolist(), "y": line.y.tolist()} for line in lines]
        print(json.dumps({"picture": str(flags.out), "runs": runs}))
    else:
        print(table(rows, ["run", "points", f"last {flags.y}", "lowest", f"at {flags.x}"]))
        print(flags.out)
    return GOOD


def read_line(source: Path, x: str, y: str, mean_of: int) -> Line:
    """Column `y` of a run over `x`, each point the mean of the last `mean_of` known values. Raises UsageError."""
    if not source.exists():
        raise UsageError(f"{source}: no such run directory or log")
    columns = read_numbers(source).table
    if y not in columns:
        raise UsageError(f"--y={y}: {source} has no such column; it has {', '.join(sorted(set(columns) - {'step'}))}")
    places, known = _places(source, columns, x), np.isfinite(columns[y])
    values = columns[y][known]
    if len(values) < mean_of:
        raise UsageError(f"--mean-of={mean_of}: {source} has {len(values)} values of {y}")
    means = np.convolve(values, np.full(mean_of, 1 / mean_of), "valid")
    return Line(source.resolve().name, places[known][mean_of - 1 :], means)


def _over_zero(line: Line, y: str) -> Line:
    """What a logarithmic scale can show; the rest is said on stderr."""
    kept = line.y > 0
    if not kept.any():
        raise UsageError(f"--log: no {y} of {line.name} is over 0; leave --log out")
    if not kept.all():
        print(f"{line.name}: {(~kept).sum()} of {len(kept)} values are 0 or less, and not drawn", file=sys.stderr)
    return Line(line.name, line.x[kept], line.y[kept])


def _places(source: Path, columns: Table, x: str) -> np.ndarray:
    if x == "step":
        return columns["step"].astype(float)
    if "consumed_tokens" not in columns:
        raise UsageError(f"--x=tokens: {source} does not say its tokens; use --x step")
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
    parser.add_argument("--x", choices=tuple(X_NAMES), default="step", help="(default: %(default)s)")
    parser.add_argument("--y", default="loss", metavar="COLUMN", help="a number of metrics.jsonl (default: %(default)s)")
    parser.add_argument("--mean-of", type=int, default=1, metavar="N", help="draw the mean of the last N values (default: 1)")
    parser.add_argument("--limits", metavar="LOW:HIGH", help="of y (default: all that there is)")
    parser.add_argument("--log", action="store_true", help="y on a logarithmic scale")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the SVG file to write")
    parser.add_argument("--json", action="store_true", help="print the curves as one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
