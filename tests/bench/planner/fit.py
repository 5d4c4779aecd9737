"""Fits the terms' values to published tables, for layouts that nobody has measured.

Rows in 16 bits; memory that is arithmetic stays out. A table has a factor of its own on a layer's time (its software), a GPU of
many rows the mean of its tables'. Spreads are of rows held out.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import numpy as np

from tests.bench.planner import table_cases
from tests.bench.planner.table_fit import TimeFit, fit_time, held_out, take
from tests.bench.planner.tables import MeasuredRun, read_rows
from tests.bench.planner.validate import FOLDS, PUBLISHED_EFFECT
from tools.common.console import GOOD, UsageError, table
from tools.plan import memory_model, time_model
from tools.plan.coefficients import Coefficients, write_coefficients

HALF = ("fp16", "bf16")
DEVICE_ROWS = 10  # a GPU with fewer rows has no factor of its own


def run(flags: argparse.Namespace) -> int:
    rows = {path: read_rows(path)[0] for path in flags.csv}
    timed = [row for of in rows.values() for row in of if row.seconds and row.precision in HALF]
    weighed = [row for of in rows.values() for row in of if row.memory and not row.arithmetic]
    if len(timed) < FOLDS or len(weighed) < FOLDS:
        raise UsageError(
            f"CSV: a fit needs {FOLDS} rows with times and as many with memory; found {len(timed)} and {len(weighed)}"
        )
    coefficients = fit_tables(timed, weighed, [path.name for path in flags.csv])
    write_coefficients(flags.out, coefficients)
    print(
        json.dumps({"out": str(flags.out), "provenance": coefficients.provenance})
        if flags.json
        else _text(coefficients, flags.out)
    )
    return GOOD


def fit_tables(timed: list[MeasuredRun], weighed: list[MeasuredRun], names: list[str]) -> Coefficients:
    cases, seconds = table_cases.time_cases(timed, by_table=True), np.array([row.seconds for row in timed])
    stages, peaks = [table_cases.memory_case(row) for row in weighed], np.array([row.memory for row in weighed])
    fit = fit_time(cases, seconds, effect_width=PUBLISHED_EFFECT)

    def time_of(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        return fit_time(take(cases, train), seconds[train], effect_width=PUBLISHED_EFFECT).predict(take(cases, test))

    def memory_of(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        terms = memory_model.fit_memory([stages[i] for i in train], peaks[train])
        return memory_model.peak_bytes(terms, [stages[i] for i in test])

    return Coefficients(
        time=fit.terms,
        memory=memory_model.fit_memory(stages, peaks),
        device_factor=_device_factors(fit, timed),
        layer_factor={},
        time_spread=_spread(held_out(len(timed), FOLDS, time_of), seconds),
        memory_spread=_spread(held_out(len(weighed), len(weighed), memory_of), peaks),
        provenance={
            "fitted on": names,
            "rows": {"time": len(timed), "memory": len(weighed)},
            "date": datetime.date.today().isoformat(),
            "command": "python -m tests.bench.planner fit " + " ".join(names),
        },
    )


def _device_factors(fit: TimeFit, timed: list[MeasuredRun]) -> dict[str, float]:
    """Return the mean of the tables' factors over the rows of each GPU that has enough of them."""
    factors: dict[str, list[float]] = {}
    for row in timed:
        factors.setdefault(row.device.name, []).append(np.log(fit.effects[(row.table,)]))
    return {gpu: float(np.exp(np.mean(values))) for gpu, values in sorted(factors.items()) if len(values) >= DEVICE_ROWS}


def _spread(predicted: np.ndarray, measured: np.ndarray) -> float:
    return float(np.percentile(np.abs(predicted / measured - 1), 90))


def _text(coefficients: Coefficients, out: Path) -> str:
    rows = []
    for model, values in ((time_model, coefficients.time), (memory_model, coefficients.memory)):
        for (term, (prior, _)), value in zip(model.TERMS.items(), values, strict=True):
            rows.append([term, f"{prior:.4g}", f"{value:.4g}"])
    spreads = (
        f"nine of ten held-out rows within {coefficients.time_spread:.0%} in time, {coefficients.memory_spread:.0%} in memory"
    )
    return f"{table(rows, ['term', 'first principles', 'fitted'])}\n{spreads}\n{out}"
