"""Reads numbers in JSON: one object a line, or one document as trainer_state.json is, with a list of objects in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from recipes.common.run_dir.metrics import METRICS
from tools.common.console import UsageError
from tools.common.logs.log import Log, build_log
from tools.common.logs.log_open import open_text
from tools.common.logs.names import number_of, pick, step_key

TRAINER_STATE = "trainer_state.json"  # transformers/trainer_callback.py: TrainerState
Row = dict[str, Any]


def read_json(path: Path, name: str | None = None) -> Log:
    """Read JSON lines, each with a step and a loss under any name in NAMES, or a document that holds a list of such objects."""
    try:
        rows = _read_document(path)
    except RecursionError:
        raise UsageError(f"{path} cannot be read as a log: JSON that is nested too deep") from None
    source = (
        "JSON lines" if rows is None else "a Hugging Face trainer state" if "trainer_state" in path.name else "a JSON document"
    )
    rows = _read_lines(path) if rows is None else rows
    names = {key: key for row in rows for key in row}
    keys = pick(names, path)
    losses = [number_of(row.get(keys["loss"])) for row in rows]
    keys["step"] = step_key(names, losses, lambda key: [row.get(key) for row in rows])
    columns = {column: [number_of(row.get(key)) for row in rows] for column, key in keys.items() if column != "step"}
    steps = [number_of(row.get(keys["step"])) for row in rows]
    if path.name == METRICS:
        source = "a run's metrics"
    steps = [math.nan if step is None else step for step in steps]
    return build_log(name or str(path), source, steps, columns, _resumes(path.parent))


def _read_document(path: Path) -> list[Row] | None:
    """Return the objects in a file that is one JSON value; None where it is one object a line, or is cut."""
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
        value = _parsed(first)
        if isinstance(value, dict) and "log_history" not in value:
            return None
        rest = file.read()
    if value is None or rest.strip():
        value = _parsed(first + rest)
    if value is None:
        return None
    rows = _rows_in(value)
    if rows is None:
        held = ", ".join(list(value)[:8]) if isinstance(value, dict) else "a list" if isinstance(value, list) else "one value"
        raise UsageError(f"{path} cannot be read as a log: JSON without a list of steps that have a loss (it holds: {held})")
    return rows


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _rows_in(value: Any) -> list[Row] | None:
    """Return the list of objects that a document is, or that one of its fields is."""
    for candidate in [value, *(value.values() if isinstance(value, dict) else ())]:
        if isinstance(candidate, list) and candidate and isinstance(candidate[0], dict):
            return [row for row in candidate if isinstance(row, dict)]
    return None


def _read_lines(path: Path) -> list[Row]:
    """Read one object a line. A truncated last line is left out."""
    rows: list[Row] = []
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith("\n"):
                    break
                if line.strip():
                    raise UsageError(f"{path}, line {number}, is not JSON: {error}") from None
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _resumes(run_dir: Path) -> list[int]:
    """Return the steps from which a run's processes restarted, if its launcher recorded them."""
    path = run_dir / "logs" / "attempts.jsonl"
    if not path.is_file():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [record["resumed_step"] for record in records if isinstance(record, dict) and record.get("resumed_step")]
