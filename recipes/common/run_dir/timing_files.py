"""Where each rank's time went: `timing/rank_00003.jsonl`, appended to by every rank, read by tools.throughput.

    {"start": {...}}                    one a start of the process: its place, the layout, the host
    [step, steps, micro_batches, ...]   microseconds by PARTS, summed over the `steps` steps that end with `step`
    {"talks": [...], "steps": n}        since the one before: group, op, bytes, ranks, peer, how many, us in all, the least us
    {"memory": {...}}                   bytes by class, once the optimizer's states exist

A row a step for the first THIN_AFTER steps of a start, then one for every THIN_STEPS: half a million steps are 6 MB a rank. Lines
leave the process every FLUSH_SECONDS, all that `kill -9` can lose; a line that it cut is not read.
Steps chosen by --trace-steps go to `timing/trace_00003.jsonl`, every span of them (`Trace`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.common.runtime.step_clock import PARTS, CommKey, Span, StepTimes

FOLDER = "timing"
THIN_AFTER, THIN_STEPS = 1000, 10
FIRST_TALKS, TALKS_ROWS = 2, 50  # rows after which communication is written: first, so that warming up stays apart; then
FLUSH_SECONDS = 5.0  # 10,000 ranks write to one file system


class TimingWriter:
    """One rank's file. What the disk refuses is lost, never the run."""

    def __init__(self, out_dir: Path, rank: int, start: Mapping[str, Any]) -> None:
        self._folder, self._rank = out_dir / FOLDER, rank
        self._lines: list[str] = []
        self._written = time.monotonic()
        self._rows, self._row, self._row_steps = 0, [0.0] * len(PARTS), 0
        self._talks: dict[CommKey, list[int]] = {}
        self._talk_steps, self._next_talks = 0, FIRST_TALKS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = (self._folder / f"rank_{rank:05d}.jsonl").open("ab", buffering=0)
        self.add({"start": {**start, "rank": rank, "time": round(time.time(), 3), "parts": PARTS}})
        self.flush()

    def step(self, times: StepTimes) -> None:
        self._row = [total + times.parts[part] / 1e3 for total, part in zip(self._row, PARTS, strict=True)]
        self._row_steps += 1
        self._talk_steps += 1
        for talk, (count, total, least) in times.talks.items():
            entry = self._talks.setdefault(talk, [0, 0, least])
            self._talks[talk] = [entry[0] + count, entry[1] + total, min(entry[2], least)]
        if self._row_steps >= (THIN_STEPS if self._rows >= THIN_AFTER else 1):
            self.add([times.step, self._row_steps, times.micro_batches, *map(round, self._row)])
            self._rows, self._row, self._row_steps = self._rows + 1, [0.0] * len(PARTS), 0
            if self._rows >= self._next_talks:
                self._next_talks = self._rows + TALKS_ROWS
                self._add_talks()
        if times.marks:
            self._trace(times)
        if time.monotonic() - self._written >= FLUSH_SECONDS:
            self.flush()

    def add(self, line: Any) -> None:
        self._lines.append(json.dumps(line, separators=(",", ":")))

    def close(self) -> None:
        self._add_talks()
        self.flush()
        self._file.close()

    def flush(self) -> None:
        try:
            if self._lines:
                self._file.write(("\n".join(self._lines) + "\n").encode())
        except OSError:  # a full disk must not end the run
            pass
        self._lines, self._written = [], time.monotonic()

    def _add_talks(self) -> None:
        if self._talk_steps:
            rows = [
                [*talk, count, round(total / 1e3), round(least / 1e3, 1)] for talk, (count, total, least) in self._talks.items()
            ]
            self.add({"talks": rows, "steps": self._talk_steps})
        self._talks, self._talk_steps = {}, 0

    def _trace(self, times: StepTimes) -> None:
        spans = [[what.part, what.talk, began, length] for what, began, length in _spans(times.marks)]
        line = json.dumps({"step": times.step, "began": times.began, "spans": spans}, separators=(",", ":"))
        try:
            with (self._folder / f"trace_{self._rank:05d}.jsonl").open("a") as file:
                file.write(line + "\n")
        except OSError:  # as in flush
            pass


@dataclass(frozen=True)
class Phase:
    part: str
    talk: None = None


def _spans(marks: list[tuple[Span | str | None, int]]) -> Iterator[tuple[Span | Phase, int, int]]:
    """(what, begin, length) in ns since the step began, outer ones before inner ones at equal begins."""
    stack: list[tuple[Span, int]] = []
    found: list[tuple[Span | Phase, int, int]] = []
    phase: tuple[str, int] | None = None
    for what, stamp in marks:
        if what is None:
            span, began = stack.pop()
            found.append((span, began, stamp - began))
        elif isinstance(what, str):
            if phase is not None:
                found.append((Phase(phase[0]), phase[1], stamp - phase[1]))
            phase = what, stamp
        else:
            stack.append((what, stamp))
    return iter(sorted(found, key=lambda item: (item[1], -item[2])))


@dataclass
class RankTiming:
    """One rank's newest start."""

    start: dict[str, Any]
    rows: list[list[int]] = field(default_factory=list)  # [step, steps, micro_batches, us by part]
    talks: list[tuple[CommKey, int, float, float]] = field(default_factory=list)  # how many, us in all, least us
    talk_steps: int = 0
    memory: dict[str, int] = field(default_factory=dict)


def read_timing(run_dir: Path) -> list[RankTiming]:
    """The newest start of every rank, by rank. Raises ValueError with what is wrong; FileNotFoundError without any.

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
    """rank -> its traced steps: {"step", "began": Unix ns, "spans": [[part, talk, begin, length], ...]}."""
    traces = {}
    for path in sorted((run_dir / FOLDER).glob("trace_*.jsonl")):
        steps = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for step in steps:
            step["spans"] = [(part, talk and CommKey(*talk), began, length) for part, talk, began, length in step["spans"]]
        newest = {step["step"]: step for step in steps}  # a step that was run again is there twice
        traces[int(path.stem.rpartition("_")[2])] = [newest[step] for step in sorted(newest)]
    return traces


def _read_rank(path: Path) -> RankTiming | None:
    found, talks = None, []
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                content = json.loads(line)
                if isinstance(content, list):
                    found.rows.append(content)
                elif "start" in content:
                    found, talks = RankTiming(content["start"]), []
                elif "talks" in content:
                    talks.append(content)
                elif "memory" in content:
                    found.memory |= {name: max(size, found.memory.get(name, 0)) for name, size in content["memory"].items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number} is not what a run writes: {error}") from None
    if found is not None:
        for piece in talks[1:] if len(talks) > 1 else talks:
            found.talk_steps += piece["steps"]
            found.talks += [(CommKey(*row[:5]), *row[5:]) for row in piece["talks"]]
    return found
