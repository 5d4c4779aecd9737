"""Writes and reads where each rank's time went: `timing/rank_00003.jsonl`, read by tools.throughput.

    {"start": {...}}                    one a start of the process: its coordinates, the layout, the host
    [step, steps, micro_batches, ...]   microseconds by PARTS, summed over the `steps` steps that end with `step`
    {"comms": [...], "steps": n}        since the one before: group, op, bytes, ranks, peer, how many, us in all, the least us
    {"memory": {...}}                   bytes by class, once the optimizer's states exist

A row a step for the first THIN_AFTER steps of a start, then one for every THIN_STEPS: half a million steps are 6 MB a rank. Lines
leave the process every FLUSH_SECONDS, which is all that `kill -9` can lose; a truncated line is not read.
Every span of the steps chosen by --trace-steps goes to `timing/trace_00003.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.common.config.json_files import open_lines
from recipes.common.runtime.step_clock import PARTS, CommKey, Span, StepTimes

FOLDER = "timing"
THIN_AFTER, THIN_STEPS = 1000, 10
FIRST_COMM_ROWS, COMM_ROWS = 2, 50  # rows after which communication is written: first, so that warming up stays apart; then
FLUSH_SECONDS = 5.0  # 10,000 ranks write to one file system


class TimingWriter:
    """One rank's file. What the disk refuses is lost, never the run."""

    def __init__(self, out_dir: Path, rank: int, start: Mapping[str, Any]) -> None:
        self._folder, self._rank = out_dir / FOLDER, rank
        self._lines: list[str] = []
        self._written = time.monotonic()
        self._rows, self._row, self._row_steps = 0, [0.0] * len(PARTS), 0
        self._comms: dict[CommKey, list[int]] = {}
        self._comm_steps, self._next_comms = 0, FIRST_COMM_ROWS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = open_lines(self._folder / f"rank_{rank:05d}.jsonl")
        self.add({"start": {**start, "rank": rank, "time": round(time.time(), 3), "parts": PARTS}})
        self.flush()

    def step(self, times: StepTimes) -> None:
        self._row = [total + times.parts[part] / 1e3 for total, part in zip(self._row, PARTS, strict=True)]
        self._row_steps += 1
        self._comm_steps += 1
        for comm, (count, total, least) in times.comms.items():
            entry = self._comms.setdefault(comm, [0, 0, least])
            self._comms[comm] = [entry[0] + count, entry[1] + total, min(entry[2], least)]
        if self._row_steps >= (THIN_STEPS if self._rows >= THIN_AFTER else 1):
            self.add([times.step, self._row_steps, times.micro_batches, *map(round, self._row)])
            self._rows, self._row, self._row_steps = self._rows + 1, [0.0] * len(PARTS), 0
            if self._rows >= self._next_comms:
                self._next_comms = self._rows + COMM_ROWS
                self._add_comms()
        if times.marks:
            self._trace(times)
        if time.monotonic() - self._written >= FLUSH_SECONDS:
            self.flush()

    def add(self, line: Any) -> None:
        self._lines.append(json.dumps(line, separators=(",", ":")))

    def close(self) -> None:
        self._add_comms()
        self.flush()
        self._file.close()

    def flush(self) -> None:
        try:
            if self._lines:
                self._file.write(("\n".join(self._lines) + "\n").encode())
        except OSError:  # a full disk must not end the run
            pass
        self._lines, self._written = [], time.monotonic()

    def _add_comms(self) -> None:
        if self._comm_steps:
            rows = [
                [*comm, count, round(total / 1e3), round(least / 1e3, 1)] for comm, (count, total, least) in self._comms.items()
            ]
            self.add({"comms": rows, "steps": self._comm_steps})
        self._comms, self._comm_steps = {}, 0

    def _trace(self, times: StepTimes) -> None:
        spans = [[what.part, what.comm, began, length] for what, began, length in _spans(times.marks)]
        line = json.dumps({"step": times.step, "began": times.began, "spans": spans}, separators=(",", ":"))
        try:
            with open_lines(self._folder / f"trace_{self._rank:05d}.jsonl") as file:
                file.write(line.encode() + b"\n")
        except OSError:  # as in flush
            pass


@dataclass(frozen=True)
class PhaseSpan:
    part: str
    comm: None = None


def _spans(marks: list[tuple[Span | str | None, int]]) -> Iterator[tuple[Span | PhaseSpan, int, int]]:
    """Return (what, begin, length) in ns since the step began, outer ones before inner ones at equal begins."""
    stack: list[tuple[Span, int]] = []
    found: list[tuple[Span | PhaseSpan, int, int]] = []
    phase: tuple[str, int] | None = None
    for what, stamp in marks:
        if what is None:
            span, began = stack.pop()
            found.append((span, began, stamp - began))
        elif isinstance(what, str):
            if phase is not None:
                found.append((PhaseSpan(phase[0]), phase[1], stamp - phase[1]))
            phase = what, stamp
        else:
            stack.append((what, stamp))
    return iter(sorted(found, key=lambda item: (item[1], -item[2])))


@dataclass
class RankTiming:
    """One rank's newest start."""

    start: dict[str, Any]
    rows: list[list[int]] = field(default_factory=list)  # [step, steps, micro_batches, us by part]
    comms: list[tuple[CommKey, int, float, float]] = field(default_factory=list)  # how many, us in all, least us
    comm_steps: int = 0
    memory: dict[str, int] = field(default_factory=dict)


def read_timing(run_dir: Path) -> list[RankTiming]:
    """Return the newest start of every rank, by rank. Raises ValueError with what is wrong; FileNotFoundError without any.

    The first steps' communication is left out where there is later one.
    """
    paths = sorted((run_dir / FOLDER).glob("rank_*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"{run_dir / FOLDER} holds no rank_*.jsonl")
    ranks = [found for found in map(_read_rank, paths) if found is not None]
    if not ranks:
        raise ValueError(f"{run_dir / FOLDER} holds no whole line")
    world = ranks[0].start["world"]
    ranks = [rank for rank in ranks if rank.start["rank"] < world and rank.start["world"] == world]  # others are of older starts
    return sorted(ranks, key=lambda rank: rank.start["rank"])


def read_trace(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """Return rank -> its traced steps: {"step", "began": Unix ns, "spans": [[part, comm, begin, length], ...]}."""
    traces = {}
    for path in sorted((run_dir / FOLDER).glob("trace_*.jsonl")):
        steps = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, RecursionError):
                if line.endswith("\n"):
                    steps.append(json.loads(line))
        for step in steps:
            step["spans"] = [(part, comm and CommKey(*comm), began, length) for part, comm, began, length in step["spans"]]
        newest = {step["step"]: step for step in steps}  # a step that was run again is there twice
        traces[int(path.stem.rpartition("_")[2])] = [newest[step] for step in sorted(newest)]
    return traces


def _read_rank(path: Path) -> RankTiming | None:
    found, comms = None, []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):  # cut by a kill, which the next start went on after, or zeroed
                continue
            try:
                if isinstance(content, list):
                    found.rows.append(content)
                elif "start" in content:
                    found, comms = RankTiming(content["start"]), []
                elif "comms" in content:
                    comms.append(content)
                elif "memory" in content:
                    found.memory |= {name: max(size, found.memory.get(name, 0)) for name, size in content["memory"].items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number} is not a line of a timing file: {error}") from None
    if found is not None:
        for piece in comms[1:] if len(comms) > 1 else comms:
            found.comm_steps += piece["steps"]
            found.comms += [(CommKey(*row[:5]), *row[5:]) for row in piece["comms"]]
    return found
