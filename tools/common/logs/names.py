"""Finds our numbers among a table's own names for its columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.common.run_dir.metrics import NON_FINITE
from tools.common.console import UsageError
from tools.common.logs.log import COLUMNS, NAMES, plain_name

MOST = 0.5  # of the rows with a loss: a column of steps that has fewer numbers there counts something else


def pick(names: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return {our name of a number: the file's key for it}. names: {name in the file: key}."""
    plain = {plain_name(name): key for name, key in reversed(names.items())}
    keys = {column: next((plain[name] for name in NAMES[column] if name in plain), None) for column in ("step", *COLUMNS)}
    absent = [column for column in ("step", "loss") if keys[column] is None]
    if absent:
        known = "; ".join(f"{column}: {', '.join(name.strip() for name in NAMES[column][:6])}" for column in absent)
        raise UsageError(f"{path} has no {' and no '.join(absent)} among {', '.join(list(names)[:12])}. Known names: {known}")
    return {column: key for column, key in keys.items() if key is not None}


def step_key(names: Mapping[str, Any], losses: Sequence[float | None], cells: Callable[[Any], Sequence[object]]) -> Any:
    """Return the key of the steps: of those named as steps the first that most rows with a loss have. cells: key -> column."""
    plain = {plain_name(name): key for name, key in reversed(names.items())}
    known = [plain[name] for name in NAMES["step"] if name in plain]
    for key in known:
        numbers = [number_of(cell) for cell, loss in zip(cells(key), losses, strict=True) if loss is not None]
        if sum(number is not None for number in numbers) > MOST * len(numbers):
            return key
    return known[0]


def float_or_nan(value: object) -> float:
    """Return a number as a float; NaN for what is none."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.inf


def number_of(cell: object) -> float | None:
    """Return a cell's number; None if it is empty or text. "NaN" and the like are numbers that are not finite."""
    if isinstance(cell, str):
        cell = cell.strip()
        if cell in NON_FINITE:
            return NON_FINITE[cell]
    if cell is None or cell == "" or isinstance(cell, bool):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
