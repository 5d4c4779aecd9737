"""Reads what a run directory holds around one event: numbers, statistics of tensors, black boxes, data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.anomalies.robust_window import MAD_TO_SD
from recipes.common.config.json_files import read_json
from recipes.common.recipe import Recipe
from recipes.common.run_dir.black_box import read_boxes
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.run_dir.tensor_stats import Stats, read_stats
from tools.common.console import UsageError
from tools.common.logs.names import float_or_nan
from tools.common.recipe_io import read_recipe
from tools.data.lookup import DataOrder, StepRead, read_run, read_step
from tools.spikes.batch_stats import Oddity, oddities, ordinary_sequences, sequence_stats, step_tokens

BEFORE, AFTER = 256, 64  # steps around the event that are read
HISTORY = 24  # steps to extrapolate from
LOOK_BACK, LOOK_AHEAD = 8, 3  # the onset lies at most so far from where the user points
STANDS_OUT = 6.0  # robust z


@dataclass(frozen=True)
class Case:
    """An event of a run. Arrays are over `steps`, with NaN where a step lacks the number."""

    folder: Path
    step: int  # where the user points
    onset: int  # the first step that stands out near it; else where the user points
    moved: dict[str, float]  # what stood out there -> robust z
    recipe: Recipe
    deepspeed: dict[str, Any]  # what DeepSpeed was given
    starts: list[dict[str, Any]]  # of run.json
    boxes: list[dict[str, Any]]  # black boxes near the event
    steps: np.ndarray
    columns: dict[str, np.ndarray]
    stats: Stats | None

    @cached_property
    def run(self) -> DataOrder:
        return read_run(self.folder, self.onset)

    @cached_property
    def all_steps(self) -> dict[int, dict[str, Any]]:
        return {r["step"]: r for r in read_metrics(self.folder) if "loss" in r}

    @cached_property
    def layout(self) -> dict[str, Any]:
        """The layout of the start that computed the event."""
        return self.start["layout"] | {"data": self.start["sizes"]["data"]}

    @property
    def start(self) -> dict[str, Any]:
        return [s for s in self.starts if (s["resumed_step"] or 0) < self.onset][-1]

    def at(self, name: str, step: int) -> float:
        """Return a number of one step; NaN where there is none."""
        found = np.flatnonzero(self.steps == step)
        column = self.columns.get(name)
        return float(column[found[0]]) if found.size and column is not None else math.nan

    def near_onset(self) -> list[int]:
        """Return the steps that may hold the cause: just before the onset to the step given, more if nothing stands out."""
        first = self.onset - 2 if self.moved else self.step - LOOK_BACK
        first = max(first, self.run.order.since_step + 1)  # before, sequences had other numbers
        return [int(s) for s in self.steps if first <= s <= max(self.step, self.onset + 1)]

    def odd_sequences(self, step: int) -> list[Oddity]:
        """Compare the sequences of a step with ordinary ones of the run's data. Raises OSError or ValueError without the data."""
        read = read_step(self.folder, step)
        ordinary, reference = ordinary_sequences(self.run, read)
        return oddities(sequence_stats(step_tokens(self.run, read), ordinary), sequence_stats(reference, ordinary))

    def read_at(self, step: int) -> StepRead:
        return read_step(self.folder, step)


def read_case(folder: Path, event: str) -> Case:
    """Read the case. Raises UsageError for what is no run, or no event of it."""
    recipe = read_recipe(folder)
    try:
        records = [r for r in read_metrics(folder) if "loss" in r]
        starts = read_json(folder / "run.json")["starts"]
        deepspeed = read_json(folder / "deepspeed.json")
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder}: {error}") from error
    if not records:
        raise UsageError(f"{folder}/metrics.jsonl has no step yet")
    boxes = read_boxes(folder)
    step = event_step(folder, event, boxes)
    first, last = records[0]["step"], records[-1]["step"]
    if not first <= step <= last:
        raise UsageError(f"EVENT {event}: metrics.jsonl of {folder} has steps {first} to {last}")
    window = [r for r in records if step - BEFORE <= r["step"] <= step + AFTER]
    steps = np.array([r["step"] for r in window])
    columns = _columns(window)
    try:
        stats = read_stats(folder, int(steps[0]), int(steps[-1]))
    except FileNotFoundError:
        stats = None
    onset, moved = find_onset(steps, columns, step)
    near = [box for box in boxes if onset - LOOK_BACK <= box["onset_step"] <= step + LOOK_AHEAD]
    return Case(
        folder=folder,
        step=step,
        onset=onset,
        moved=moved,
        recipe=recipe,
        deepspeed=deepspeed,
        starts=starts,
        boxes=near,
        steps=steps,
        columns=columns,
        stats=stats if stats is not None and stats.steps.size else None,
    )


def event_step(folder: Path, event: str, boxes: list[dict[str, Any]]) -> int:
    """Return the step of an event: a number, or a black box by its folder's name or path."""
    if event.isdigit():
        return int(event)
    name = Path(event).name
    for box in boxes:
        if box["folder"] == name:
            return int(box["onset_step"])
    there = ", ".join(box["folder"] for box in boxes[-5:]) or "none"
    raise UsageError(f"EVENT {event!r} is neither a step nor a black box of {folder}/events (there: {there})")


def find_onset(steps: np.ndarray, columns: dict[str, np.ndarray], pointed: int) -> tuple[int, dict[str, float]]:
    """Return (first step near `pointed` at which loss or gradient norm stands out, robust z of each that does)."""
    for index in np.flatnonzero((steps >= pointed - LOOK_BACK) & (steps <= pointed + LOOK_AHEAD)):
        moved = {}
        for name in ("loss", "grad_norm"):
            values = columns.get(name)
            if values is not None:
                z = robust_z(steps, np.log(np.maximum(values, 1e-30)) if name == "grad_norm" else values, int(index))
                if abs(z) > STANDS_OUT or not math.isfinite(values[index]):
                    moved[name] = z
        if moved:
            return int(steps[index]), moved
    return pointed, {}


def robust_z(steps: np.ndarray, values: np.ndarray, index: int) -> float:
    """Return how far values[index] is from its extrapolation, in robust spreads of the values before. NaN with too few."""
    predicted, spread = expected(steps, values, index)
    return (float(values[index]) - predicted) / spread


def expected(steps: np.ndarray, values: np.ndarray, index: int) -> tuple[float, float]:
    """Extrapolate values[index] from the values before: (value, their robust spread); NaN with too few before.

    By a parabola, for curves of training bend, or a line through the last half, whichever ends closer to the last values: a
    parabola may turn up where the curve only flattens. Outliers of the first fits do not count in the last.
    """
    known = np.flatnonzero(np.isfinite(values[:index]))[-HISTORY:]
    if len(known) < 6:
        return math.nan, math.nan
    x, before = (steps[known] - steps[index]).astype(np.float64) / HISTORY, values[known]
    half = len(known) // 2
    fits = [_robust_fit(x[-half:], before[-half:], 1)] if half >= 6 else []
    fits.append(_robust_fit(x, before, 2 if len(known) >= 12 else 1))
    last = float(np.median(before[-6:]))
    predicted, spread = min(fits, key=lambda fit: abs(fit[0] - last))
    return predicted, max(spread, 1e-3 * (abs(predicted) + 1e-12))  # a few equal values are no measure of spread


def _robust_fit(x: np.ndarray, values: np.ndarray, degree: int) -> tuple[float, float]:
    """Fit a polynomial robustly and return (its value at x=0, the robust spread around it)."""
    kept = np.ones(len(values), dtype=bool)
    for _ in range(3):
        fit = np.polynomial.polynomial.polyfit(x[kept], values[kept], degree)
        rest = np.abs(values - np.polynomial.polynomial.polyval(x, fit))
        spread = MAD_TO_SD * float(np.median(rest))
        kept = rest <= max(3.5 * spread, 1e-12)
    return float(fit[0]), spread


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = {name for r in records for name, value in r.items() if isinstance(value, int | float) and name != "step"}
    return {name: np.array([float_or_nan(r.get(name)) for r in records]) for name in sorted(names)}
