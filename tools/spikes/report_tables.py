"""The numbers of a run as columns: its steps as they stand, and those that a rewind or a resume left behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.metrics import METRICS, read_metrics
from tools.common.console import UsageError

Table = dict[str, np.ndarray]  # column -> [n], NaN where a step lacks it; "step" is whole


def read_tables(run: Path) -> tuple[Table, list[Table]]:
    """(the run, stretches that were left behind). Raises UsageError where there is nothing to draw."""
    path = run / METRICS
    if not path.is_file():
        raise UsageError(f"{run} holds no {METRICS}: name a run directory, or a log that `scan` reads")
    try:
        table = to_table(record for record in read_metrics(path))
        undone = [branch for aside in sorted(run.glob("metrics.after_step_*.jsonl")) for branch in branches(read_metrics(aside))]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if "loss" not in table:
        raise UsageError(f"{path} holds no step with a loss yet")
    return derived(table), [branch for branch in undone if "loss" in branch]


def to_table(records: Iterable[Mapping[str, Any]]) -> Table:
    """Columns of every field that is a number."""
    rows = list(records)
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, int | float))
    table = {name: np.array([row.get(name, np.nan) for row in rows], dtype=float) for name in names}
    return table | {"step": table["step"].astype(np.int64)} if rows else {}


def branches(records: Iterable[Mapping[str, Any]]) -> list[Table]:
    """A file of lines moved aside may hold several tries at the same steps, one after another."""
    tries: list[list[Mapping[str, Any]]] = []
    for record in records:
        if not tries or record["step"] <= tries[-1][-1]["step"]:
            tries.append([])
        tries[-1].append(record)
    return [to_table(rows) for rows in tries]


def derived(table: Table) -> Table:
    """With what is drawn but not recorded."""
    if "loss_max" in table:
        table["loss_excess"] = table["loss_max"] - table["loss"]
    return table
