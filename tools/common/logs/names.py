"""Finds our numbers among a table's own names for its columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.common.console import UsageError
from tools.common.logs.cells import has_decimal_commas, is_unread, number_of, step_of
from tools.common.logs.log import COLUMNS, NAMES, plain_name

MOST = 0.5  # of the rows with a loss: a column of steps that has fewer whole numbers there counts something else


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
        numbers = [step_of(cell) for cell, loss in zip(cells(key), losses, strict=True) if loss is not None]
        if sum(number.is_integer() for number in numbers) > MOST * len(numbers):
            return key
    return known[0]


def read_columns(
    name: str, keys: Mapping[str, Any], names: Mapping[str, Any], cells: Callable[[Any], Sequence[object]]
) -> tuple[list[float], dict[str, list[float | None]], list[str]]:
    """Return (steps, our numbers, what of them is no number) of a file. keys: as `pick` found them; cells: key -> column."""
    raw = {column: cells(key) for column, key in keys.items() if column != "step"}
    comma = has_decimal_commas(name, (cell for values in raw.values() for cell in values))
    columns = {column: [number_of(cell, decimal_comma=comma) for cell in values] for column, values in raw.items()}
    steps_at = step_key(names, columns["loss"], cells)
    step_cells = cells(steps_at)
    notes = []
    for column, values in {"step": step_cells, **raw}.items():
        unread = [cell for cell in values if is_unread(cell) and not (comma and number_of(cell, decimal_comma=True) is not None)]
        if unread:
            notes.append(
                f"{len(unread)} of {len(values)} rows have a {column} that is no number, the first {str(unread[0])[:40]!r}"
            )
    return [step_of(cell) for cell in step_cells], columns, notes


def float_or_nan(value: object) -> float:
    """Return a number as a float; NaN for what is none."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.inf
