"""Draws a number of two runs, their difference with the rounding to be expected, and what changed at each segment."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from recipes.common.run_dir.differences import describe_changes
from tools.changed.part import EXACT, Metrics, expected_rounding
from tools.changed.side import Side
from tools.common.run_record import segment_changes
from tools.curves import COLORS, STYLE, mark_segments


def draw_parting(a: Side, b: Side, metrics: Metrics, column: str, out: Path) -> None:
    """Write the picture, in the format of the suffix of `out`."""
    one, other = metrics.columns[column]
    difference = np.abs(other - one)
    parting = metrics.of(column)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "changed"}):
        figure = Figure(figsize=(7.6, 5.2), dpi=100, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        upper.set_ylabel(column)
        for side, color in zip((a, b), COLORS, strict=False):
            values = side.column(column)
            upper.plot(list(values), list(values.values()), color=color, label=side.name)
        lower.set(xlabel="step", ylabel="difference", yscale="log")
        shown = difference > 0
        if shown.any():
            lower.plot(metrics.steps[shown], difference[shown], color=COLORS[6], label=f"|difference of {column}|")
            lower.plot(metrics.steps, _expected(metrics, column, one), color=COLORS[2], ls="--", label="rounding to be expected")
        else:
            lower.text(0.5, 0.5, f"{column} is equal at every common step", ha="center", va="center", transform=lower.transAxes)
        if parting is not None:
            for axes in (upper, lower):
                axes.axvline(parting.step, color=COLORS[3], lw=1)
            place = {"xycoords": ("data", "axes fraction"), "va": "top"}
            upper.annotate(f" parts at step {parting.step}", (parting.step, 1), color=COLORS[3], fontsize=8, **place)
        mark_segments(upper, [(_marks(side), color) for side, color in zip((a, b), COLORS, strict=False)])
        lower.xaxis.set_major_formatter(EngFormatter(sep=""))
        lower.xaxis.get_major_locator().set_params(integer=True)
        for axes in (upper, lower):
            key = axes.legend(loc="best", frameon=False, fontsize=8) if axes.get_legend_handles_labels()[0] else None
            for text in key.get_texts() if key else ():
                text.set_parse_math(False)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _expected(metrics: Metrics, column: str, values: np.ndarray) -> np.ndarray:
    """Return the rounding to be expected at each step, NaN before the parting and where there is none."""
    parting = metrics.of(column)
    assert parting is not None
    tokens = metrics.columns["tokens"][0] if "tokens" in metrics.columns else np.ones(len(values))
    since = metrics.steps - parting.step
    expected = expected_rounding(column, values, tokens, metrics.precision) * (1 if column in EXACT else since + 1)
    return np.where((since >= 0) & (expected > 0), expected, np.nan)


def _marks(side: Side) -> list[tuple[float, str]]:
    """Return where each segment after the first begins, and what changed there; of one that was asked for, its own start."""
    found = []
    for segment, differences in segment_changes(side.record)[1:]:
        if side.record.chosen in (None, segment.index):
            changes = describe_changes(differences)
            found.append((segment.step + 0.5, f"{segment.cause}: {changes}" if changes else ""))
    return found
