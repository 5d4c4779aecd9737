"""Writes and reads `logs/attempts.jsonl`: a line for each start of a run's ranks, and for each end with how far it came."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.common.config.json_files import open_lines, parse_json, read_json
from recipes.common.run_dir.checkpoint_folders import SEAL, checkpoint_step, sealed_checkpoints
from recipes.common.run_dir.heartbeat import Beat, beat_files, read_beats
from recipes.common.run_dir.metrics import METRICS, read_metrics

FILE = "logs/attempts.jsonl"
GONE = "supervisor_lost"  # the cause of an attempt whose end was not recorded


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Return every record, in order; a truncated or damaged line is left out."""
    try:
        lines = (run_dir / FILE).read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = parse_json(line, FILE)
            if record.get("event") in ("start", "end") and type(record.get("attempt")) is int and "cause" in record:
                records.append(record)
    return records


def sealed_step(run_dir: Path) -> int:
    """Return the step of the newest sealed checkpoint; 0 without one."""
    return max((checkpoint_step(seal.parent) for seal in _seals(run_dir)), default=0)


def seals(run_dir: Path) -> frozenset[tuple[str, int, int]]:
    """Return what tells each seal from any other. One that was not there before is progress: in steps, runs may go back."""
    marks = set()
    for seal in _seals(run_dir):
        with contextlib.suppress(OSError):  # deleted meanwhile
            state = seal.stat()
            marks.add((seal.parent.name, state.st_mtime_ns, state.st_size))  # a time to be recognised by, not to be compared
    return frozenset(marks)


def _seals(run_dir: Path) -> list[Path]:
    return [seal for folder in sealed_checkpoints(run_dir) if (seal := folder / SEAL).is_file()]


def has_begun(run_dir: Path) -> bool:
    """Whether the ranks of this job, in the first attempt or one after it, have recorded their start in run.json.

    From then on the checkpoints are the job's own; before, its flags must be followed as they were given. A job without a record
    of a first start was only ever told to continue.
    """
    firsts = [r for r in read_attempts(run_dir) if r["event"] == "start" and r["cause"] == "first"]
    return not firsts or _run_starts(run_dir) != firsts[-1].get("run_starts")


def _run_starts(run_dir: Path) -> list[Any] | None:
    """Return run.json's run and how often its ranks have started: another value, another start. None without the file."""
    try:
        run = read_json(run_dir / "run.json")
        return [run["run_id"], len(run["starts"])]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        return []  # damaged: it was written


def beats_of_newest(run_dir: Path) -> list[Beat]:
    """Return the heartbeats of the newest attempt: none where the files are still as it found them."""
    starts = [record for record in read_attempts(run_dir) if record["event"] == "start"]
    untouched = bool(starts) and starts[-1].get("beats_before") == _digest(beat_files(run_dir))
    return [] if untouched else read_beats(run_dir)


def _digest(files: Mapping[str, bytes]) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


def begin_attempt(run_dir: Path, world_size: int | None, hosts: Mapping[str, int], cause: str, resumed_step: int = 0) -> int:
    """Record a start, and the end of one that was left open. Return its number, from 1.

    cause: why it is made: "first", "asked", or the cause of the end before. resumed_step: 0 for a fresh start.
    """
    records = read_attempts(run_dir)
    if records and records[-1]["event"] == "start":
        end_attempt(
            run_dir, records[-1]["attempt"], GONE, "no end was recorded: the supervisor or its machine was lost", lost=True
        )
    number = max((record["attempt"] for record in records), default=0) + 1
    _append(
        run_dir,
        {
            "event": "start",
            "attempt": number,
            "time": time.time(),
            "world_size": world_size,
            "hosts": list(hosts),
            "resumed_step": resumed_step,
            "cause": cause,
            # what is there from before, to know the attempt's own by
            "run_starts": _run_starts(run_dir),
            "beats_before": _digest(beat_files(run_dir)),
        },
    )
    return number


def end_attempt(run_dir: Path, number: int, cause: str, detail: str, *, lost: bool = False) -> dict[str, Any]:
    """Record an end, and where the attempt's time went. lost: it ended long ago, at its last heartbeat."""
    start = next((r for r in read_attempts(run_dir) if r["event"] == "start" and r["attempt"] == number), None)
    beats = beats_of_newest(run_dir)
    newest = max((beat.time for beat in beats), default=start["time"] if start else 0.0)
    sealed = sealed_step(run_dir)
    last_step, lost_seconds = _steps_after(run_dir, sealed)
    record = {
        "event": "end",
        "attempt": number,
        "time": newest if lost else time.time(),
        "cause": cause,
        "detail": detail,
        "last_beat": newest,
        "last_step": max(last_step, sealed),
        "sealed_step": sealed,
        "lost_steps": max(last_step - sealed, 0),
        "lost_seconds": round(lost_seconds, 3),
        "phase_seconds": dict(_of_rank_0(beats).phase_seconds) if beats else {},
    }
    _append(run_dir, record)
    return record


def _steps_after(run_dir: Path, sealed: int) -> tuple[int, float]:
    """Return the last step in metrics.jsonl, and the seconds of the steps after `sealed`, which will be repeated."""
    last, seconds = 0, 0.0
    if (run_dir / METRICS).exists():
        for record in read_metrics(run_dir, skip_damaged=True):
            last = record["step"]
            if last > sealed:
                seconds += record.get("seconds", 0.0)
    return last, seconds


def _of_rank_0(beats: list[Beat]) -> Beat:
    return min(beats, key=lambda beat: beat.rank)


def _append(run_dir: Path, record: dict[str, Any]) -> None:
    path = run_dir / FILE
    when = {"at": datetime.fromtimestamp(record["time"], UTC).isoformat(timespec="seconds")}
    with contextlib.suppress(OSError):  # a full disk must not end the run
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_lines(path) as file:
            file.write(json.dumps(record | when).encode() + b"\n")
