"""Reads numbers in JSON: one object a line, or one document as trainer_state.json is, with a list of objects in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.common.config.json_files import parse_json
from recipes.common.run_dir.attempts import FILE as ATTEMPTS
from recipes.common.run_dir.metrics import LARGEST_STEP, METRICS
from tools.common.console import UsageError
from tools.common.logs.log import Log, build_log
from tools.common.logs.log_open import open_text
from tools.common.logs.names import pick, read_columns

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
    steps, columns, unread = read_columns(str(path), keys, names, lambda key: [row.get(key) for row in rows])
    if path.name == METRICS:
        source = "a run's metrics"
    resumes, notes = read_resumes(path.parent)
    log = build_log(name or str(path), source, steps, columns, resumes, unread)
    return replace(log, notes=(*log.notes, *notes))


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


def read_resumes(run_dir: Path) -> tuple[list[int], list[str]]:
    """Return the steps from which a run's processes restarted, if its launcher recorded them, and what of it is damaged.

    Damaged lines are left out. The last line may be one that is being written.
    """
    path = run_dir / ATTEMPTS
    if not path.is_file():
        return [], []
    resumes: list[int] = []
    damaged: list[str] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            step = parse_json(line, "damaged").get("resumed_step")
            if step is not None and (type(step) is not int or not 0 <= step <= LARGEST_STEP):
                raise ValueError(f"resumed_step={json.dumps(step)[:40]}: must be a step")
        except ValueError as error:
            damaged.append(f"line {number}: {error}")
        else:
            resumes += [step] if step else []
    more = f" (so are {len(damaged) - 1} more lines)" if len(damaged) > 1 else ""
    return resumes, [f"{path}, {damaged[0]}; left out{more}: a restart may be missing"] if damaged else []
