"""Reads the numbers of a run or a log as columns: its final steps, and those that a rewind or a restart undid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.anomalies.detector import scan
from recipes.common.anomalies.events import Event
from recipes.common.anomalies.rewinds import read_history
from recipes.common.config.json_files import laid_out, read_json
from recipes.common.run_dir.metrics import METRICS, read_metrics
from tools.common.console import UsageError
from tools.common.logs.log import COLUMNS, Log
from tools.common.logs.names import float_or_nan
from tools.common.logs.reader import read_log

Table = dict[str, np.ndarray]  # column -> [n], NaN where a step lacks it; "step" is whole


@dataclass(frozen=True)
class Numbers:
    """The numbers of a run or a log, for drawing."""

    table: Table  # the final steps
    undone: tuple[Table, ...]  # stretches that were undone
    events: tuple[Event, ...]  # found by the detectors
    notes: tuple[str, ...] = ()  # what of a log was left out


def is_run(source: Path) -> bool:
    return (source / METRICS).is_file()


def read_numbers(source: Path) -> Numbers:
    """Read a run directory or a log. Raises UsageError when it has no step with a loss."""
    if is_run(source):
        return _read_run(source)
    log = read_log(source)
    final = log.final()
    events = tuple(scan(log.steps, log.columns, log.resumes))
    return Numbers({"step": final.steps, **final.columns}, tuple(_repeated(log)), events, log.notes)


def _read_run(run: Path) -> Numbers:
    try:
        table = to_table(read_metrics(run))
        undone = [branch for aside in sorted(run.glob("metrics.after_step_*.jsonl")) for branch in branches(read_metrics(aside))]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if "loss" not in table:
        raise UsageError(f"{run / METRICS} holds no step with a loss yet")
    trained = ~np.isnan(table["tokens"]) if "tokens" in table else ~np.isnan(table["loss"])  # not the evaluation before step 1
    columns = {name: table[name][trained] for name in COLUMNS if name in table}
    events = tuple(scan(table["step"][trained], columns, _resumes(run)))
    if "loss_max" in table:
        table["loss_excess"] = table["loss_max"] - table["loss"]
    return Numbers(table, tuple(branch for branch in undone if "loss" in branch), events)


def _resumes(run: Path) -> tuple[int, ...]:
    """Return the steps of the checkpoints from which the run resumed, by a user or by itself."""
    path = run / "run.json"
    with laid_out(path):
        starts = read_json(path)["starts"] if path.is_file() else []
        by_hand = {start["resumed_step"] for start in starts if start.get("resumed_step")}
        return tuple(sorted(by_hand | {rewind.to_step for rewind in read_history(run)}))


def _repeated(log: Log) -> Iterator[Table]:
    """Yield the stretches of a log that a restart from a checkpoint repeated."""
    least_after = np.minimum.accumulate(np.append(log.steps[1:], np.iinfo(np.int64).max)[::-1])[::-1]
    lost = np.flatnonzero(log.steps >= least_after)
    for part in np.split(lost, np.flatnonzero((np.diff(lost) > 1) | (np.diff(log.steps[lost]) <= 0)) + 1) if len(lost) else ():
        yield {"step": log.steps[part], **{name: column[part] for name, column in log.columns.items()}}


def to_table(records: Iterable[Mapping[str, Any]]) -> Table:
    """Return columns of every field that is a number."""
    rows = list(records)
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, int | float))
    table = {name: np.array([float_or_nan(row.get(name)) for row in rows]) for name in names}
    return table | {"step": table["step"].astype(np.int64)} if rows else {}


def branches(records: Iterable[Mapping[str, Any]]) -> list[Table]:
    """Separate the tries at the same steps that a file of undone lines may hold, one after another."""
    tries: list[list[Mapping[str, Any]]] = []
    for record in records:
        if not tries or record["step"] <= tries[-1][-1]["step"]:
            tries.append([])
        tries[-1].append(record)
    return [to_table(rows) for rows in tries]
