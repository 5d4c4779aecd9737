"""Writes and reads where each rank is: logs/heartbeat/rank_00003.json, overwritten in place at every phase.

tools/supervise detects hangs with them, and which rank is behind; tools/throughput counts where a run's time went.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from recipes.common.config.json_files import parse_json

FOLDER = "logs/heartbeat"
PHASES = ("start", "data", "step", "log", "evaluate", "save", "end")  # in the order of one step; "log" is the rest of it
_BYTES = 1024  # one write inside one page: a reader sees the old line or the new one


class Heartbeat:
    """This rank's file. `enter` costs one write of a kilobyte into the page cache (measured: 8 microseconds)."""

    def __init__(self, out_dir: Path, rank: int) -> None:
        folder = out_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(_path(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        self._rank, self._host = rank, socket.gethostname()
        self._step, self._phase = 0, PHASES[0]
        self._began = self._step_began = time.monotonic()  # a clock that is set must not make a step of an hour
        self._step_seconds = 0.0
        self._phase_seconds = dict.fromkeys(PHASES, 0.0)
        self.enter(0, PHASES[0])

    def enter(self, step: int, phase: str) -> None:
        """Write that `phase` of `step` begins now."""
        now = time.monotonic()
        self._phase_seconds[self._phase] += now - self._began
        if step != self._step:
            self._step_seconds = now - self._step_began if self._step else 0.0
            self._step_began = now
        self._step, self._phase, self._began = step, phase, now
        line = json.dumps(
            {
                "rank": self._rank,
                "host": self._host,
                "pid": os.getpid(),
                "step": step,
                "phase": phase,
                "time": round(time.time(), 3),
                "step_seconds": round(self._step_seconds, 4),  # of the step before this one
                "phase_seconds": {name: round(seconds, 3) for name, seconds in self._phase_seconds.items()},
            }
        )
        with contextlib.suppress(OSError):  # a full disk must not end the run
            os.pwrite(self._file, line.encode().ljust(_BYTES - 1) + b"\n", 0)


@dataclass(frozen=True)
class Beat:
    """The content of one rank's file."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    time: float  # Unix seconds, by that host's clock, at which `phase` began: to be shown, not compared
    step_seconds: float  # of the last whole step; 0 before there is one
    phase_seconds: Mapping[str, float]  # so far, without the current phase


def read_beats(out_dir: Path, before: Mapping[str, bytes] = MappingProxyType({})) -> list[Beat]:
    """Return the newest beat of every rank, by rank. before: another start's, from `beat_files`: not those that are as they were.

    Hosts' and file servers' clocks differ, and are set: no time says which start a file is of.
    """
    beats = []
    for name, content in beat_files(out_dir).items():
        if before.get(name) != content:
            try:
                beat = Beat(**parse_json(content, name))
                beats.append(replace(beat, rank=operator.index(beat.rank)))
            except (ValueError, TypeError):
                continue  # being written for the first time
    return sorted(beats, key=lambda beat: beat.rank)


def beat_files(out_dir: Path) -> dict[str, bytes]:
    """Return what is in the ranks' files, by their names."""
    files = {}
    for path in (out_dir / FOLDER).glob("rank_*.json"):
        with contextlib.suppress(OSError):  # removed
            files[path.name] = path.read_bytes()
    return files


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"
