"""`spikes scan LOG...`: lists the events of logs, one process a file, on all cores."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from recipes.common.anomalies.detector import judge_log
from recipes.common.anomalies.events import MEASURES, Event
from tools.common.console import GOOD, UsageError, printable, progress_bar, table, tell_notes
from tools.common.logs.reader import read_logs

SINGLES_SHOWN = 10  # one-batch outliers listed: a noisy log has hundreds


@dataclass(frozen=True)
class Scanned:
    """The events of one file."""

    file: str
    source: str
    points: int
    first_step: int
    last_step: int
    signals: tuple[str, ...]
    events: tuple[Event, ...]
    failures: tuple[str, ...] = ()  # of detectors
    notes: tuple[str, ...] = ()  # what of the file was left out


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="a run directory, a log, a CSV or TensorBoard events")


def run(flags: argparse.Namespace) -> int:
    found = list(scan_files(flags.logs))
    for scanned in found:
        for failure in scanned.failures:
            print(printable(f"{scanned.file}: {failure}"), file=sys.stderr)
    tell_notes(note for scanned in found for note in scanned.notes)
    if flags.json:
        objects = [as_json(scanned) for scanned in found]
        print(json.dumps(objects[0] if len(objects) == 1 else {"files": objects}, allow_nan=False))
        return GOOD
    print(printable("\n\n".join(as_text(scanned) for scanned in found)))
    return GOOD


def scan_files(paths: Sequence[Path]) -> Iterator[Scanned]:
    """Yield each file's events, in the order given. Raises UsageError for the first file that cannot be read."""
    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        raise UsageError(f"no such file or run directory: {', '.join(absent)}")
    workers = min(len(paths), len(os.sched_getaffinity(0)))
    if workers == 1:
        yield from _shown(map(scan_file, paths), len(paths))
        return
    # spawned: a fork of a process that has run threads may hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from _shown(pool.map(scan_file, paths), len(paths))


def _shown(items: Iterable[Any], total: int) -> Iterator[Any]:
    with progress_bar("scanning", total, "file") as bar:
        for item in items:
            bar.update()
            yield item


def scan_file(path: Path) -> Scanned:
    """Scan all runs of a file together: a table of several is rare, and steps tell them apart."""
    logs = read_logs(path)
    findings = [judge_log(log.steps, log.columns, log.resumes) for log in logs]
    return Scanned(
        file=str(path),
        source=logs[0].source,
        points=sum(len(log.steps) for log in logs),
        first_step=min(int(log.steps.min()) for log in logs),
        last_step=max(int(log.steps.max()) for log in logs),
        signals=tuple(dict.fromkeys(name for log in logs for name in log.columns)),
        events=tuple(event for found in findings for event in found.events),
        failures=tuple(dict.fromkeys(failure for found in findings for failure in found.failures)),
        notes=tuple(note for log in logs for note in log.notes),
    )


def as_json(scanned: Scanned) -> dict[str, Any]:
    return {"file": scanned.file, "points": scanned.points, "events": [event_json(event) for event in scanned.events]}


def event_json(event: Event) -> dict[str, Any]:
    """Return an event as `scan --json` prints it. JSON has no NaN: the delta of a loss that was not finite is None."""
    return {
        "onset_step": event.onset_step,
        "peak_step": event.peak_step,
        "end_step": event.end_step,
        "delta": round(event.delta, 4) if math.isfinite(event.delta) else None,
        "class": event.kind,
        "actionable": event.actionable,
        "first_signal": event.first_signal,
        "lead_steps": event.lead_steps,
    }


def as_text(scanned: Scanned) -> str:
    """Return a line about the log and a table of its events, actionable ones marked."""
    steps = f"steps {scanned.first_step} to {scanned.last_step}, {scanned.points} points"
    head = f"{scanned.file}: {scanned.source}, {steps}, {', '.join(scanned.signals)}"
    if not scanned.events:
        return f"{head}\nno events"
    single = [event for event in scanned.events if event.kind == "outlier_batch"]
    unlisted = single if len(single) > SINGLES_SHOWN else []
    rows = [
        [
            "!" if event.actionable else "",
            event.onset_step,
            event.peak_step,
            "open" if event.end_step is None else event.end_step,
            f"{event.delta:+.3f}",
            event.kind,
            event.first_signal,
            event.lead_steps,
            _z(event),
        ]
        for event in scanned.events
        if event not in unlisted
    ]
    header = ["", "onset", "peak", "end", "delta", "class", "first signal", "lead steps", "robust z"]
    actionable = sum(event.actionable for event in scanned.events)
    more = f"; not listed: {len(unlisted)} outlier batches, the first at step {unlisted[0].onset_step}" if unlisted else ""
    listed = f"\n{table(rows, header)}" if rows else ""
    return f"{head}{listed}\n{len(scanned.events)} events, {actionable} actionable (!){more}"


def _z(event: Event) -> str:
    """Return the evidence in one cell: how far off each signal was."""
    return ", ".join(f"{short} {event.evidence[name]}" for name, short in MEASURES.items() if event.evidence.get(name))
