"""Opens one of the two runs that are compared: its record, its numbers, and the lines of text in its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.anomalies.events import Event
from recipes.common.run_dir.metrics import METRICS, read_metrics
from recipes.common.run_dir.segments import REWIND, Segment
from tools.changed.part import precision_of
from tools.common.console import UsageError, tell_notes
from tools.common.logs.run_numbers import Table, is_run, read_numbers
from tools.common.run_record import RunRecord, open_record

TEXTS = ("drift", "skip_reason")


@dataclass(frozen=True)
class Side:
    """A run, a segment of one, or a log, as it is compared."""

    name: str  # as it was given
    record: RunRecord
    table: Table | None  # the numbers; None of a run without a step
    events: tuple[Event, ...]  # that the detectors find in them
    texts: tuple[tuple[int, str, str], ...]  # (step, field, text), of the fields TEXTS

    @property
    def newest(self) -> Segment | None:
        """Return the segment that was asked for, or the last one."""
        if self.record.chosen is not None:
            return self.record.at(0)
        return self.record.segments[-1] if self.record.segments else None

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.newest.facts if self.newest else {}

    @property
    def precision(self) -> str | None:
        return precision_of(self.facts)

    def resumed_after(self) -> list[int]:
        """Return the steps after which the run went on from a checkpoint, in another process."""
        return sorted({s.step for s in self.record.segments if s.step and s.cause != REWIND})

    def column(self, name: str) -> dict[int, float]:
        """Return step -> value, where it is known and finite."""
        if self.table is None or name not in self.table:
            return {}
        pairs = zip(self.table["step"].tolist(), self.table[name].tolist(), strict=True)
        return {step: value for step, value in pairs if np.isfinite(value)}


def open_side(text: str) -> Side:
    """Read a run, a segment of one, or a log. Raises UsageError for one that is not there, or that says nothing."""
    record = open_record(text)
    source = record.source
    try:
        numbers = read_numbers(source)
    except UsageError:
        if not record.segments:
            raise
        return Side(text, record, None, (), ())
    tell_notes(numbers.notes)
    first, last = record.steps()
    table = _between(numbers.table, first, last)
    events = tuple(event for event in numbers.events if event.onset_step >= first and (last is None or event.onset_step <= last))
    texts = [text for text in _texts(source) if text[0] >= first and (last is None or text[0] <= last)]
    return Side(text, record, table, events, tuple(texts))


def _between(table: Table, first: int, last: int | None) -> Table | None:
    kept = (table["step"] >= first) & (table["step"] <= (last if last is not None else np.iinfo(np.int64).max))
    return {name: values[kept] for name, values in table.items()} if kept.any() else None


def _texts(source: Path) -> list[tuple[int, str, str]]:
    if not is_run(source):
        return []
    records = list(read_metrics(source / METRICS, skip_damaged=True))
    return [(r["step"], field, r[field]) for r in records for field in TEXTS if isinstance(r.get(field), str)]
