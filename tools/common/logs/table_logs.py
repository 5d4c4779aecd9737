"""Reads tables of a run's numbers: CSV, W&B's CSV export, TensorBoard event files."""

from __future__ import annotations

import csv
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from recipes.common.run_dir.metrics import METRICS
from tools.common.console import UsageError
from tools.common.logs.json_logs import TRAINER_STATE, read_json
from tools.common.logs.log import NAMES, Log, build_arrays, build_log, plain_name
from tools.common.logs.log_open import delimiter_of, open_text
from tools.common.logs.names import pick, read_columns

RUN_COLUMNS = ("file", "run")  # text columns that name the runs in one table
WANDB_BOUNDS = ("__MIN", "__MAX")  # beside each of its columns


def read_folder(folder: Path) -> Log:
    """Read a run directory, or a folder with TensorBoard event files."""
    if (folder / METRICS).is_file():
        return read_json(folder / METRICS, str(folder))
    for place in (folder, folder / "tensorboard"):
        if place.is_dir() and any("tfevents" in path.name for path in place.iterdir()):
            return read_tensorboard(place)
    if (folder / TRAINER_STATE).is_file():
        return read_json(folder / TRAINER_STATE, str(folder))
    raise UsageError(f"{folder} is no run directory: it has neither {METRICS} nor TensorBoard event files nor {TRAINER_STATE}")


def is_header(line: str) -> bool:
    """Whether a table's first line names a step and a loss."""
    try:
        names = {plain_name(cell) for cell in next(csv.reader([line], delimiter=delimiter_of(line)))}
    except csv.Error:
        return False
    return len(names) > 1 and any(name in names for name in NAMES["step"])


def read_csv(path: Path) -> list[Log]:
    """Read a table with a header: one Log for each run that a text column `file` or `run` names."""
    with open_text(path) as file:
        first = next(line for line in file if line.strip())
        delimiter = delimiter_of(first)
        header = next(csv.reader([first], delimiter=delimiter))
        names = {name: header.index(cell) for name, cell in _wandb_names(header, path).items()}
        keys = pick(names, path)
        run_column = next((i for i, name in enumerate(header) if plain_name(name) in RUN_COLUMNS), None)
        if run_column is None:
            log = _read_numbers(path, keys, delimiter, len(header))
            if log is not None:
                return [log]
        rows, notes = _read_rows(csv.reader((line.replace("\0", "") for line in file), delimiter=delimiter), len(header))
    if not rows:
        raise UsageError(f"{path}: a table without any step" + (f" ({notes[0]})" if notes else ""))
    runs: dict[str, list[list[str]]] = defaultdict(list)
    for row in rows:
        runs["" if run_column is None else row[run_column]].append(row)
    logs = []
    for run, mine in runs.items():
        name = f"{path}:{run}" if run else str(path)
        steps, columns, unread = read_columns(name, keys, names, lambda at, mine=mine: [row[at] for row in mine])
        logs.append(build_log(name, "a table", steps, columns, notes=unread))
    return [replace(logs[0], notes=(*(f"{path}: {note}" for note in notes), *logs[0].notes)), *logs[1:]]


def _read_rows(reader: Iterator[list[str]], cells: int) -> tuple[list[list[str]], list[str]]:
    """Return the rows of a table, and what is left out. Empty cells after the last are ignored."""
    rows: list[list[str]] = []
    odd: list[tuple[int, list[str]]] = []
    count = 0
    for row in reader:
        count += bool(row)
        if len(row) == cells or (len(row) > cells and not any(row[cells:])):
            rows.append(row)
        elif row:
            odd.append((count, row))
    if odd and odd[-1][0] == count and len(odd[-1][1]) < cells:
        odd.pop()  # the last line of a table still being written may be short
    if not odd:
        return rows, []
    number, row = odd[0]
    cure = "" if len(row) < cells else "; put numbers with a comma in quotes, or write decimal points"
    first = f"the first is row {number}, {','.join(row)[:60]!r} with {len(row)}"
    return rows, [f"{len(odd)} of {count} rows are left out: they do not have the header's {cells} cells; {first}{cure}"]


def _read_numbers(path: Path, keys: dict[str, int], delimiter: str, cells: int) -> Log | None:
    """Read a table of numbers only, five times as fast; None if a cell is empty or text, or a step is none."""
    with open_text(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, where there are no rows
        next(line for line in file if line.strip())
        try:
            numbers = np.loadtxt(
                _even(file, cells, delimiter), delimiter=delimiter, usecols=list(keys.values()), ndmin=2, comments=None
            )
        except ValueError:
            return None
    if not len(numbers):
        return None
    columns = dict(zip(keys, numbers.T.copy(), strict=True))
    steps = columns.pop("step")
    if not (steps == np.floor(steps)).all():
        return None
    for name, values in columns.items():
        if name != "loss":
            values[np.isnan(values)] = np.inf
    return build_arrays(str(path), "a table", steps, columns, np.ones(len(steps), dtype=bool))


def _even(lines: Iterable[str], cells: int, delimiter: str) -> Iterator[str]:
    """Yield the lines. Raises ValueError for one with more or fewer cells than the header: `1,000,2.5` is not step 1."""
    for line in lines:
        if line.count(delimiter) != cells - 1 and line.strip():
            raise ValueError(line)
        yield line


def _wandb_names(header: list[str], path: Path) -> dict[str, str]:
    """Map plain names to the header's cells, W&B's "RUN - train/loss" without the run."""
    names: dict[str, str] = {}
    runs = set()
    for cell in header:
        if cell.endswith(WANDB_BOUNDS):
            continue
        run, dash, name = cell.rpartition(" - ")
        if dash:
            runs.add(run)
        names.setdefault(name if dash else cell, cell)
    if len(runs) > 1:
        raise UsageError(f"{path} is an export of {len(runs)} W&B runs ({', '.join(sorted(runs)[:3])}); export one run a file")
    return names


def read_tensorboard(path: Path) -> Log:
    """Read the scalars of an event file, or of all in a folder. Where a run went back, TensorBoard keeps the later values."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(path), size_guidance={SCALARS: 0, TENSORS: 0}).Reload()
    tags = {tag: tag for tag in [*events.Tags()["scalars"], *events.Tags()["tensors"]]}
    if not tags:
        raise UsageError(f"{path}: TensorBoard events without scalars")
    keys = pick({"step": "step", **tags}, path)
    table: dict[int, dict[str, float]] = defaultdict(dict)
    for column, tag in keys.items():
        if column == "step":
            continue
        if tag in events.Tags()["scalars"]:
            values = [(event.step, event.value) for event in events.Scalars(tag)]
        else:  # newer writers store scalars as tensors
            values = [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)]
        for step, value in values:
            table[step][column] = value
    steps = sorted(table)
    columns = {column: [table[step].get(column) for step in steps] for column in keys if column != "step"}
    return build_log(str(path), "TensorBoard events", steps, columns)
