"""Reads tables of a run's numbers: metrics.jsonl and other JSON lines, CSV, W&B's CSV export, TensorBoard event files."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np

from recipes.common.run_dir.metrics import METRICS, NON_FINITE
from tools.common.console import UsageError
from tools.common.logs.log import COLUMNS, NAMES, Log, build_arrays, build_log, open_text, plain_name

RUN_COLUMNS = ("file", "run")  # text columns that name the runs in one table
WANDB_BOUNDS = ("__MIN", "__MAX")  # beside each of its columns


def read_folder(folder: Path) -> Log:
    """Read a run directory, or a folder with TensorBoard event files."""
    if (folder / METRICS).is_file():
        return read_json_lines(folder / METRICS, str(folder))
    for place in (folder, folder / "tensorboard"):
        if place.is_dir() and any("tfevents" in path.name for path in place.iterdir()):
            return read_tensorboard(place)
    raise UsageError(f"{folder} is no run directory: it has neither {METRICS} nor TensorBoard event files")


def read_json_lines(path: Path, name: str | None = None) -> Log:
    """Read one JSON object a line, with a step and a loss under any name in NAMES. A truncated last line is left out."""
    rows: list[dict[str, object]] = []
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith("\n"):
                    break
                if line.strip():
                    raise UsageError(f"{path}, line {number}, is not JSON: {error}") from None
                continue
            if isinstance(row, dict):
                rows.append(row)
    keys = _pick({key: key for row in rows[:100] for key in row}, path)
    steps = [_float(row.get(keys["step"])) for row in rows]
    columns = {column: [_float(row.get(key)) for row in rows] for column, key in keys.items() if column != "step"}
    steps = [math.nan if step is None else step for step in steps]
    source = "a run's metrics" if path.name == METRICS else "JSON lines"
    return build_log(name or str(path), source, steps, columns, _resumes(path.parent))


def _resumes(run_dir: Path) -> list[int]:
    """Return the steps from which a run's processes restarted, if its launcher recorded them."""
    path = run_dir / "logs" / "attempts.jsonl"
    if not path.is_file():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [record["resumed_step"] for record in records if isinstance(record, dict) and record.get("resumed_step")]


def is_header(line: str) -> bool:
    """Whether a table's first line names a step and a loss."""
    names = {plain_name(cell) for cell in next(csv.reader([line]))}
    return len(names) > 1 and any(name in names for name in NAMES["step"])


def read_csv(path: Path) -> list[Log]:
    """Read a table with a header: one Log for each run that a text column `file` or `run` names."""
    with open_text(path) as file:
        header = next(csv.reader(file))
        keys = {column: header.index(name) for column, name in _pick(_wandb_names(header, path), path).items()}
        run_column = next((i for i, name in enumerate(header) if plain_name(name) in RUN_COLUMNS), None)
        if run_column is None:
            log = _read_numbers(path, keys)
            if log is not None:
                return [log]
        runs: dict[str, list[list[str]]] = defaultdict(list)
        for row in csv.reader(file):
            if len(row) == len(header):  # the last line of a table still being written may be short
                runs["" if run_column is None else row[run_column]].append(row)
    if not runs:
        raise UsageError(f"{path}: a table without any step")
    logs = []
    for run, rows in runs.items():
        cells = {column: [_float(row[at]) for row in rows] for column, at in keys.items()}
        steps = [math.nan if step is None else step for step in cells.pop("step")]
        logs.append(build_log(f"{path}:{run}" if run else str(path), "a table", steps, cells))
    return logs


def _read_numbers(path: Path, keys: dict[str, int]) -> Log | None:
    """Read a table of numbers only, five times as fast; None if a cell is empty or text."""
    with open_text(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, where there are no rows
        next(file)
        try:
            numbers = np.loadtxt(file, delimiter=",", usecols=list(keys.values()), ndmin=2, comments=None)
        except ValueError:
            return None
    if not len(numbers):
        return None
    columns = dict(zip(keys, numbers.T.copy(), strict=True))
    steps = columns.pop("step")
    for name, values in columns.items():
        if name != "loss":
            values[np.isnan(values)] = np.inf
    return build_arrays(str(path), "a table", steps, columns, np.ones(len(steps), dtype=bool))


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


def _pick(names: dict[str, str], path: Path) -> dict[str, str]:
    """Return {our name of a number: the file's key for it}. names: {name in the file: key}."""
    plain = {plain_name(name): key for name, key in reversed(names.items())}
    keys = {column: next((plain[name] for name in NAMES[column] if name in plain), None) for column in ("step", *COLUMNS)}
    absent = [column for column in ("step", "loss") if keys[column] is None]
    if absent:
        known = "; ".join(f"{column}: {', '.join(name.strip() for name in NAMES[column][:6])}" for column in absent)
        raise UsageError(f"{path} has no {' and no '.join(absent)} among {', '.join(list(names)[:12])}. Known names: {known}")
    return {column: key for column, key in keys.items() if key is not None}


def read_tensorboard(path: Path) -> Log:
    """Read the scalars of an event file, or of all in a folder. Where a run went back, TensorBoard keeps the later values."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(path), size_guidance={SCALARS: 0, TENSORS: 0}).Reload()
    tags = {tag: tag for tag in [*events.Tags()["scalars"], *events.Tags()["tensors"]]}
    if not tags:
        raise UsageError(f"{path}: TensorBoard events without scalars")
    keys = _pick({"step": "step", **tags}, path)
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


def _float(cell: object) -> float | None:
    """Return a cell's number; None if it is empty or text. "NaN" and the like are numbers that are not finite."""
    if isinstance(cell, str):
        cell = cell.strip()
        if cell in NON_FINITE:
            return NON_FINITE[cell]
    if cell is None or cell == "" or isinstance(cell, bool):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None
